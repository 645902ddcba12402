"""Pull request: what this branch does to the result, as the comment that CI posts. Needs Git alone, no data or models.

Usage   python stages/pull_request.py [TARGET]   (what to compare with: a Git revision; main unless named)
Reads   metrics/, params.yaml and dvc.lock, here and at TARGET
"""

import argparse
import csv
import html
import io
import json
import os
import re
import subprocess
import sys
from typing import Any

import numpy as np
from ruamel.yaml import YAML
from tabulate import tabulate

from shared import records, report, significance, status
from shared.errors import InputError, run
from shared.params import ROOT, Metric, read_params
from shared.scores import score

MARK = "<!-- result of the pipeline -->"  # by which .github/workflows/pull-request.yml finds its earlier comment
SHOWN = ["scores", "ranks"]  # of report.PICTURES; the others are a click away
FOLDED = [name for name in report.PICTURES if name not in SHOWN]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("target", nargs="?", default="main")
    target = parser.parse_args().target
    metric = read_params().evaluate.primary_metric
    if git("rev-parse", "--verify", "--quiet", f"{target}^{{commit}}") is None:
        raise InputError(f"Git knows no revision {target}; a branch: `git fetch --depth 1 origin {target}:{target}`")
    text = written("metrics/report.md")
    head, _, _ = text.removeprefix("# Result").partition(report.HEADLINE_END)

    print(
        f"""{MARK}
## This branch against `{target}`

{staleness()}{verdict_against(target, metric)}

{score_changes(target, metric)}

{dvc_diff("params", target) or f"No param differs from `{target}`."}

{environment_changes(target)}

## Its result

{without_pictures(head)}

{pictures(target, SHOWN)}

{folded("More pictures", pictures(target, FOLDED))}

{folded("All metrics that differ", dvc_diff("metrics", target) or "None.")}

{folded("The whole report", without_pictures(text))}"""
    )


def staleness() -> str:
    changed = status.out_of_date()
    few = ", ".join(changed[:3]) + (f" and {len(changed) - 3} more" if len(changed) > 3 else "")
    return (
        f"**The metrics are of an earlier state of this branch**: {few} changed since. `dvc repro`.\n\n" if few else ""
    )


def written(name: str) -> str:
    """The file of this branch that the last run wrote. Raises InputError."""
    try:
        return (ROOT / name).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError(f"{name} is missing; `dvc repro` writes it") from None


def git(*arguments: str) -> str | None:
    """What the Git command prints, or None where it fails."""
    result = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, encoding="utf-8")
    return result.stdout.strip() if result.returncode == 0 else None


def json_at(target: str, name: str) -> dict[str, Any]:
    """metrics/<name>.json at the revision; empty where it has none."""
    return json.loads(git("show", f"{target}:metrics/{name}.json") or "{}")


def dvc_diff(kind: str, target: str) -> str:
    """The table of `dvc metrics diff` or `dvc params diff`; empty where nothing differs. Raises InputError."""
    command = [sys.executable, "-m", "dvc", kind, "diff", target, "--md"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, encoding="utf-8")
    if result.returncode:
        raise InputError(f"`dvc {kind} diff {target}` failed: {result.stderr.strip()}")
    lines = result.stdout.strip().splitlines()
    head, rows = lines[:2], lines[2:]
    head[0] = head[0].replace("workspace", "this branch")
    return "\n".join(head + sorted(rows)) if rows else ""  # DVC's own order changes from run to run


def verdict_against(target: str, metric: Metric) -> str:
    """Whether this branch's fine-tuned model is better than the target's: a paired comparison, query by query."""
    if not same_test(target):
        return "**The test data differ**, so that the scores cannot be compared."
    here = read_ranks(written("metrics/ranks.csv"))
    if here is None:
        raise InputError("metrics/ranks.csv is damaged; `git checkout metrics`, or `dvc repro`")
    there = read_ranks(git("show", f"{target}:metrics/ranks.csv") or "")
    if there is None:
        return (
            f"`{target}` has no metrics/ranks.csv as it is now, so that the models cannot be compared query by query."
        )
    (groups, unseen, after), (_, _, before) = here, there
    if np.array_equal(after, before):
        return f"This branch's fine-tuned model finds every query's passage where `{target}`'s does."
    after, before = score(metric, after), score(metric, before)
    comparison = significance.compare(after, before, groups)
    words = report.verdict(comparison, metric, "This branch's fine-tuned model", f"`{target}`'s", len(groups))
    text = f"**{words}**, p {report.p_in_words(comparison.p_value)}."
    _, own_groups = np.unique(groups[unseen], return_inverse=True)
    if own_groups.any():  # there are two or more
        few = significance.compare(after[:, unseen], before[:, unseen], own_groups)
        text += f" Without near-duplicates of training rows: {report.gain_and_p(few._asdict())[0]}."
    return f"{text} {report.ONE_SEED}" if 1 in (len(after), len(before)) else text


def same_test(target: str) -> bool:
    """Whether both runs were of the same test queries and corpus, by their hashes in dvc.lock."""
    hashes = []
    for lock in (written("dvc.lock"), git("show", f"{target}:dvc.lock") or ""):
        stages = (YAML(typ="safe", pure=True).load(lock) or {}).get("stages", {})
        deps = stages.get("baseline_eval@base", {}).get("deps", [])
        hashes.append({dep["path"]: dep["md5"] for dep in deps if dep["path"].startswith("data/prepared/")})
    return hashes[0] == hashes[1]


def read_ranks(table: str) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """Of a ranks.csv: each query's group, whether it is no near-duplicate, and the fine-tuned models' ranks of its
    passage, shape (seeds, queries). None where the table is damaged, or of another version of this repo.
    """
    try:
        rows = list(csv.DictReader(io.StringIO(table)))
        groups, near_duplicates = ([int(row[name]) for row in rows] for name in ("group", "near_duplicate"))
        seeds = [name for name in rows[0] if name.startswith("finetuned-")]
        ranks = np.array([[float(row[seed] or "inf") for row in rows] for seed in seeds])  # empty: not found
    except (ValueError, KeyError, IndexError, TypeError):
        return None
    return np.array(groups), np.array(near_duplicates) == 0, ranks


def score_changes(target: str, primary: Metric) -> str:
    if not same_test(target):
        return ""
    metrics = report.headline_metrics(primary)
    rows = []
    for model, name in report.MODELS.items():
        here, there = records.read_metrics(model), json_at(target, model)
        rows.append([name, *(change(there.get(metric), here[metric]) for metric in metrics)])
    return tabulate(rows, headers=["", *map(report.title, metrics)], tablefmt="github", disable_numparse=True)


def change(before: float | None, after: float) -> str:
    if before is None or before == after:
        return f"{after:.4f}"
    return f"{before:.4f} → {after:.4f} ({after - before:+.4f})"


def environment_changes(target: str) -> str:
    """Versions, device and threads that differ, stage by stage, where both have run it."""
    stages = sorted(path.stem for path in records.ENVIRONMENT.glob("*.json"))
    both = {stage: json_at(target, f"environment/{stage}") for stage in stages}
    changes = [
        f"{stage}: {name} {there[name]} → {here}"
        for stage, there in both.items()
        for name, here in records.read_metrics(f"environment/{stage}").items()
        if name in there and there[name] != here
    ]
    if not any(both.values()):
        return f"`{target}` does not record its environment."
    return f"Environment: {'; '.join(changes)}." if changes else "Environment: the same."


def pictures(target: str, names: list[str]) -> str:
    """Each picture of this branch, beside the target's where that has another."""
    text = []
    for name in names:
        path = f"metrics/plots/{name}.svg"
        before, after = picture(path, target, report.PICTURES[name]), picture(path, "HEAD", report.PICTURES[name])
        if before and git("rev-parse", f"{target}:{path}") != git("hash-object", path):
            titles = f"<tr><th>{html.escape(target)}</th><th>this branch</th></tr>"
            text.append(f"<table>{titles}<tr><td>{before}</td><td>{after}</td></tr></table>")
        else:
            text.append(f"<p>{after}</p>")
    return "\n".join(text)


def picture(path: str, revision: str, description: str) -> str:
    """As HTML: from GitHub, as it is at the revision; or the file here, where GitHub cannot have it."""
    committed, changed = git("rev-parse", f"{revision}:{path}"), revision == "HEAD" and git("diff", "HEAD", "--", path)
    if committed and not changed and remote_url():
        return f'<img src="{remote_url()}/raw/{git("rev-parse", revision)}/{path}" alt="{description}">'
    return f'<img src="{path}" alt="{description}">' if revision == "HEAD" else ""


def remote_url() -> str | None:
    """The repo's page on GitHub: the runner knows it, elsewhere the remote `origin` does. Never with its password."""
    if "GITHUB_REPOSITORY" in os.environ:
        return f"{os.environ['GITHUB_SERVER_URL']}/{os.environ['GITHUB_REPOSITORY']}"
    origin = git("remote", "get-url", "origin") or ""
    match = re.fullmatch(r"(?:https://(?:[^@/]+@)?|(?:ssh://)?git@)(github\.[^/:]+)[/:](.+?)(?:\.git)?/?", origin)
    return f"https://{match[1]}/{match[2]}" if match else None


def without_pictures(text: str) -> str:
    return re.sub(r"^!\[.*\n", "", text, flags=re.MULTILINE).strip()


def folded(summary: str, text: str) -> str:
    return f"<details><summary>{summary}</summary>\n\n{text}\n\n</details>"


if __name__ == "__main__":
    run(main)
