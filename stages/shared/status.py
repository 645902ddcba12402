"""Do metrics/, dvc.lock, params.yaml and the code belong together? Git alone tells: no data, model, GPU or network."""

import hashlib
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import numpy as np
from packaging.utils import canonicalize_name

from shared import records, report, significance
from shared.errors import InputError
from shared.params import ROOT, Metric, read_params, read_yaml
from shared.ranks import read_ranks
from shared.scores import score

MADE = ("data/prepared", "data/rankings", "models/finetuned")  # by stages, and not in Git


def mismatches() -> list[str]:
    """What does not belong together, each in some words that begin with where. Raises InputError."""
    stages = locked_stages()
    of_files = changes(stages) + contradictions(stages) + strangers(stages) + other_versions()
    return of_files or other_scores() + other_params()


def changes(stages: dict[str, dict[str, Any]]) -> list[str]:
    """Files and params that are not as the stages read or wrote them, by `dvc status`; what stages write comes last."""
    stages_of: dict[str, list[str]] = {}
    for stage, changed in json.loads(dvc("status", "--json")).items():
        for change in changed:
            if isinstance(change, str):  # "changed command"
                stages_of.setdefault(f"dvc.yaml ({change})", []).append(stage)
                continue
            for paths in change.values():
                for path, state in paths.items():
                    if isinstance(state, dict):  # params, each by its own name
                        names = [f"{path}: {param}" for param in state]
                    else:
                        names = [] if is_elsewhere(path, state, items(stages.get(stage, {}))) else [path]
                    for name in names:
                        stages_of.setdefault(name, []).append(stage)
    names = sorted(stages_of, key=lambda name: (name.startswith((*MADE, "metrics/")), name))
    return [f"{name}: changed since {', '.join(stages_of[name])}{remedy(name)}" for name in names]


def remedy(path: str) -> str:
    """What stages made may be in the cache, where that which is here is of another branch's run."""
    if path == "data/cards":
        return " (if that is all, `dvc repro prepare` may do)"
    return " (if that is all, `dvc checkout` brings it back)" if path.startswith(MADE) else ""


def is_elsewhere(path: str, state: str, locked: dict[str, dict[str, Any]]) -> bool:
    """Whether it is data or a model that Git does not hold, so that a clone may be without it, or without a part."""
    folder = ROOT / path
    # DVC leaves an empty folder where an experiment failed in a clone without data.
    is_empty = folder.is_dir() and not any(inside.is_file() for inside in folder.rglob("*"))
    if is_empty or state in ("deleted", "not in cache"):
        return git("check-ignore", path) is not None
    absent = [pointer for pointer in folder.rglob("*.dvc") if not pointer.with_suffix("").exists()]
    md5 = md5_with(absent, folder) if absent else ""
    if md5 is None:
        print(f"note: {path} cannot be checked here, without what `dvc add` keeps of it", file=sys.stderr)
    return md5 in (None, locked.get(path, {}).get("md5"))


def md5_with(pointers: list[Path], folder: Path) -> str | None:
    """The folder's hash with the files that the *.dvc files stand for; None where one is a folder or was never here."""
    md5s = {path.relative_to(folder).as_posix(): file_md5(path) for path in folder.rglob("*") if path.is_file()}
    for pointer in pointers:
        for out in read_yaml(pointer)["outs"]:
            if out.get("md5", ".dir").endswith(".dir"):
                return None
            md5s[(pointer.parent / out["path"]).relative_to(folder).as_posix()] = out["md5"]
    return folder_md5(md5s)


def file_md5(path: Path) -> str:
    with path.open("rb") as content:
        return hashlib.file_digest(content, "md5").hexdigest()


def folder_md5(md5s: dict[str, str]) -> str:
    """As DVC has it: the MD5 of the list of the files' names and MD5s, sorted by name."""
    entries = [{"md5": md5, "relpath": name} for name, md5 in sorted(md5s.items())]
    return hashlib.md5(json.dumps(entries).encode()).hexdigest() + ".dir"


def locked_stages() -> dict[str, dict[str, Any]]:
    """The entries of dvc.lock, without those of stages that dvc.yaml no longer has."""
    locked = read_yaml(ROOT / "dvc.lock").get("stages", {})
    return {name: locked[name] for name in dvc("stage", "list", "--name-only").split() if name in locked}


def items(stage: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Path → {"md5", "size", "nfiles"} of what the stage read and wrote."""
    return {item["path"]: item for item in stage.get("deps", []) + stage.get("outs", [])}


def contradictions(stages: dict[str, dict[str, Any]]) -> list[str]:
    """Paths that two stages saw with different contents, folders that are not what is in them: entries of two runs."""
    seen: dict[str, tuple[dict[str, Any], str]] = {}
    found = []
    for stage, entry in stages.items():
        for path, item in items(entry).items():
            first, first_stage = seen.setdefault(path, (item, stage))
            if item["md5"] != first["md5"]:
                found.append(f"dvc.lock: {path} of {stage} is not that of {first_stage}")
    for path, (folder, stage) in seen.items():
        inside = {other: item for other, (item, _) in seen.items() if other.startswith(f"{path}/")}
        if sum(item.get("nfiles", 1) for item in inside.values()) != folder.get("nfiles"):
            continue  # not all that is in it is named
        md5s = {other.removeprefix(f"{path}/"): item["md5"] for other, item in inside.items()}
        of_files = not any(md5.endswith(".dir") for md5 in md5s.values())
        if sum(item["size"] for item in inside.values()) != folder["size"] or (
            of_files and folder_md5(md5s) != folder["md5"]
        ):
            found.append(f"dvc.lock: {path} of {stage} is not what other stages saw in it")
    return found


def strangers(stages: dict[str, dict[str, Any]]) -> list[str]:
    """Files in metrics/ that no stage has written."""
    written = {path for entry in stages.values() for path in items(entry)}
    there = git("ls-files", "--cached", "--others", "--exclude-standard", "metrics") or ""
    return [f"{path}: no stage writes it" for path in there.splitlines() if path not in written]


def other_versions() -> list[str]:
    """Packages with which a stage ran, where requirements.txt asks for another version."""
    text = (ROOT / "requirements.txt").read_text(encoding="utf-8")
    pins = {canonicalize_name(name): pin for name, pin in re.findall(r"^([\w.-]+)==(\S+)", text, re.MULTILINE)}
    return [
        f"metrics/environment/{path.name}: {name} {version}, and requirements.txt asks for {pin}"
        for path in sorted(records.ENVIRONMENT.glob("*.json"))
        for name, version in records.read_metrics(f"environment/{path.stem}").items()
        if (pin := pins.get(canonicalize_name(name))) and str(version).partition("+")[0] != pin
    ]


def other_scores() -> list[str]:
    """Scores that are not what the ranks give, query by query."""
    table = read_ranks((records.METRICS / "ranks.csv").read_text(encoding="utf-8"))
    if table is None:
        return ["metrics/ranks.csv: damaged"]
    ranks = {"base": table.base, "reference": table.reference, "finetuned": np.stack(list(table.finetuned.values()))}
    pairs = [
        (f"{model}.json: {metric}", written[metric], score(metric, ranks[model]).mean())
        for model, written in {model: records.read_metrics(model) for model in ranks}.items()
        for metric in get_args(Metric)
    ]
    # What the gate asks of; the others hang together with it.
    primary, gains = read_params().evaluate.primary_metric, records.read_metrics("gain")
    if primary not in gains.get("over_base", {}) or "effective_groups" not in gains.get("test", {}):
        return [f"metrics/gain.json: is of another version, or of another evaluate.primary_metric than {primary}"]
    given = significance.compare(score(primary, ranks["finetuned"]), score(primary, table.base[None]), table.groups)
    pairs += [
        (f"gain.json: over_base {name}", gains["over_base"][primary][name], own)
        for name, own in given._asdict().items()
    ]
    effective = significance.effective_groups(table.groups)
    pairs += [("gain.json: effective_groups", gains["test"]["effective_groups"], effective)]
    return [
        f"metrics/{name} is {written}, and metrics/ranks.csv gives {records.rounded(own):g}"
        for name, written, own in pairs
        if abs(written - own) > 2e-6  # of rounding
    ]


def other_params() -> list[str]:
    """What the report says of the params, where params.yaml says otherwise: so it is after `dvc commit --force`."""
    params, text = read_params(), (records.METRICS / "report.md").read_text(encoding="utf-8")
    said = [
        report.training_in_words(params.train),
        f"`{params.prepare.card}`",
        params.models.base,
        params.models.reference,
    ]
    return [f"metrics/report.md: does not say {words!r}, as params.yaml does" for words in said if words not in text]


def dvc(*arguments: str) -> str:
    """What the DVC command prints. Raises InputError where it fails."""
    command = [sys.executable, "-m", "dvc", *arguments]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, encoding="utf-8")
    if result.returncode:
        raise InputError(f"`dvc {' '.join(arguments)}` failed: {result.stderr.strip()}")
    return result.stdout.strip()


def git(*arguments: str) -> str | None:
    """What the Git command prints, or None where it fails."""
    result = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, encoding="utf-8")
    return result.stdout.strip() if result.returncode == 0 else None
