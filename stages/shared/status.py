"""Do metrics/ and dvc.lock belong to the code and the params that stand beside them? Git alone tells."""

import json
import subprocess
import sys

from shared.errors import InputError
from shared.params import ROOT

ABSENT = ("deleted", "not in cache")  # data and models are not in Git, so that a clone may be without them


def out_of_date() -> list[str]:
    """What has changed since the run that wrote dvc.lock, as "stage: path": by `dvc status`. Raises InputError."""
    found = []
    for stage, changes in json.loads(dvc("status", "--json")).items():
        for change in changes:
            if isinstance(change, str):
                found.append(f"{stage}: {change}")
                continue
            for paths in change.values():
                for path, state in paths.items():
                    if isinstance(state, dict):  # params, name by name
                        found += [f"{stage}: {name}" for name in state]
                    elif state not in ABSENT:
                        found.append(f"{stage}: {path}")
    return sorted(found)


def dvc(*arguments: str) -> str:
    """What the DVC command prints. Raises InputError where it fails."""
    command = [sys.executable, "-m", "dvc", *arguments]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, encoding="utf-8")
    if result.returncode:
        raise InputError(f"`dvc {' '.join(arguments)}` failed: {result.stderr.strip()}")
    return result.stdout.strip()
