"""Pull request: what this branch does to the result, as the comment that CI posts. Needs Git alone, no data or models.

Usage   python stages/pull_request.py [TARGET]   (what to compare with: a Git revision; main unless named)
Reads   metrics/, params.yaml and dvc.lock, here and at TARGET
"""

import argparse
import html
import json
import os
import re
import signal
from typing import Any

import numpy as np
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError
from tabulate import tabulate

from shared import records, report, significance, status
from shared.errors import InputError, run
from shared.params import ROOT, Metric, read_params, read_yaml
from shared.ranks import read_ranks
from shared.scores import score
from shared.sources import first_line
from shared.status import git

MARK = "<!-- result of the pipeline -->"  # by which .github/workflows/pull-request.yml finds its earlier comment
SHOWN = ["scores", "ranks"]  # of report.PICTURES; the others are a click away
TEST_FILES = ["data/prepared/corpus.jsonl", "data/prepared/test.jsonl"]
FOLDED = [name for name in report.PICTURES if name not in SHOWN]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("target", nargs="?", default="main")
    target = parser.parse_args().target
    metric = read_params().evaluate.primary_metric
    if git("rev-parse", "--verify", "--quiet", f"{target}^{{commit}}") is None:
        raise InputError(f"Git knows no revision {target}; a branch: `git fetch --depth 1 origin {target}:{target}`")
    head, _, rest = written("metrics/report.md").removeprefix("# Result").partition(report.HEADLINE_END)

    text = f"""{MARK}
## This branch against `{target}`

{staleness()}{verdict_against(target, metric)}

{dvc_diff("params", target) or f"No param differs from `{target}`."}

{environment_changes(target)}

{score_changes(target, metric)}

## Fine-tuned against base and reference

{without_pictures(head)}

{pictures(target, SHOWN)}

{folded("More pictures", pictures(target, FOLDED))}

{folded(f"All metrics that differ from `{target}`", metrics_diff(target, metric))}

{folded("The rest of the report", f"{report.HEADLINE_END}{without_pictures(rest)}")}

`{target}` {git("rev-parse", "--short=12", target)} → this branch {git("rev-parse", "--short=12", "HEAD")}"""
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # a reader that has seen enough (`| head`) is no error
    print(re.sub(r"\n{3,}", "\n\n", text))  # where a part has nothing to say


def staleness() -> str:
    found = status.mismatches()
    few = "; ".join(found[:3]) + (f"; and {len(found) - 3} more" if len(found) > 3 else "")
    what = "**What follows is not of this state of the branch, but of its last run**"
    return f"{what} (`dvc repro`): {few}.\n\n" if few else ""


def written(name: str) -> str:
    """The file of this branch that the last run wrote. Raises InputError."""
    try:
        return (ROOT / name).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError(f"{name} is missing; `dvc repro` writes it") from None


def json_at(target: str, name: str) -> dict[str, Any]:
    """metrics/<name>.json at the revision; empty where it has none. Raises InputError."""
    try:
        return json.loads(git("show", f"{target}:metrics/{name}.json") or "{}")
    except ValueError as error:
        raise InputError(f"{target}: metrics/{name}.json is damaged: {first_line(error)}") from None


def yaml_at(target: str, name: str) -> dict[str, Any]:
    """The YAML file at the revision; empty where it has none. Raises InputError."""
    try:
        return YAML(typ="safe", pure=True).load(git("show", f"{target}:{name}") or "") or {}
    except YAMLError as error:
        raise InputError(f"{target}: {name} is damaged: {first_line(error)}") from None


def dvc_diff(kind: str, target: str) -> str:
    """The table of `dvc metrics diff` or `dvc params diff`; empty where nothing differs. Raises InputError."""
    table = status.dvc(kind, "diff", target, "--md")
    # Each cell is as wide as the longest, with which a comment may outgrow GitHub's 65,536 characters.
    head, *lines = re.sub("-{3,}", "---", re.sub(" {2,}", " ", table)).splitlines() or [""]
    head = "this branch".join(head.rsplit("workspace", 1))
    # As code, since GitHub takes ndcg@10.gain for an e-mail address. Environments are compared elsewhere. Sorted, since
    # DVC's own order changes from run to run.
    rows = [re.sub(r"^\| (\S+) \| (\S+) \|", r"| `\1` | `\2` |", line) for line in lines[1:]]
    # The rest of a value of several lines, as an environment's prompt may be, is a line without a path.
    rows = sorted(row for row in rows if row.startswith("| `") and "metrics/environment/" not in row)
    return "\n".join([head, lines[0], *rows]) if rows else ""


def metrics_diff(target: str, metric: Metric) -> str:
    """The table of `dvc metrics diff`, and a word on what in it is of two metrics."""
    theirs = yaml_at(target, "params.yaml").get("evaluate", {}).get("primary_metric")
    same = theirs in (metric, None)
    note = f"What gain.json names without a metric (as `validation`, `seeds`) is {metric} here and {theirs} there.\n\n"
    return ("" if same else note) + (dvc_diff("metrics", target) or "None.")


def verdict_against(target: str, metric: Metric) -> str:
    """Whether this branch's fine-tuned model is better than the target's: a paired comparison, query by query."""
    if not test_files(yaml_at(target, "dvc.lock")):
        return f"`{target}` has no run in its dvc.lock to compare with."
    if not same_test(target):
        return "**The test rows or the passages to search differ**, so that the scores cannot be compared."
    here = read_ranks(written("metrics/ranks.csv"))
    if here is None:
        raise InputError("metrics/ranks.csv is damaged; `git checkout metrics`, or `dvc repro`")
    there = read_ranks(git("show", f"{target}:metrics/ranks.csv") or "")
    if there is None:
        return (
            f"`{target}` has no metrics/ranks.csv as it is now, so that the models cannot be compared query by query."
        )
    groups, unseen, ours, theirs = here.groups, here.unseen & there.unseen, here.finetuned, there.finetuned
    in_both = ours.keys() & theirs.keys()
    same = bool(in_both) and all(np.array_equal(ours[seed], theirs[seed]) for seed in in_both)
    if same and ours.keys() == theirs.keys():
        return f"This branch's fine-tuned model ranks every query's passage as `{target}`'s does."
    after, before = (score(metric, np.stack(list(ranks.values()))) for ranks in (ours, theirs))
    comparison = significance.compare(after, before, groups)
    words = report.verdict(comparison, metric, "This branch's fine-tuned model", f"`{target}`'s", len(groups))
    text = f"**{words}**; paired randomization test, p {report.p_in_words(comparison.p_value)}."
    own_groups = significance.groups_of_some(groups, unseen)
    if own_groups is not None:
        few = significance.compare(after[:, unseen], before[:, unseen], own_groups)
        text += f" Without near-duplicates of training or validation rows: {report.gain_and_p(few._asdict())[0]}."
    if same:
        text += f" Only the seeds differ: with seed {', '.join(sorted(in_both))} both rank every passage the same."
    text += report.few_in_words(significance.effective_groups(groups))
    if 1 in (len(after), len(before)):
        text += f" Seeds: `{target}` {len(before)}, this branch {len(after)}; of one, the luck is not in the interval."
    return text


def same_test(target: str) -> bool:
    """Whether both runs were of the same test queries and corpus, by their hashes in dvc.lock."""
    return test_files(read_yaml(ROOT / "dvc.lock")) == test_files(yaml_at(target, "dvc.lock"))


def test_files(lock: dict[str, Any]) -> dict[str, str]:
    """The hashes of the test's files in a dvc.lock."""
    deps = lock.get("stages", {}).get("baseline_eval@base", {}).get("deps", [])
    return {dep["path"]: dep["md5"] for dep in deps if dep["path"] in TEST_FILES}


def score_changes(target: str, primary: Metric) -> str:
    """The models' scores that differ from the target's; nothing where the test is another."""
    if not same_test(target):
        return ""
    metrics, rows = report.headline_metrics(primary), []
    for model, name in report.MODELS.items():
        here, there = records.read_metrics(model), json_at(target, model)
        if here != there:
            rows.append([name, *(change(there.get(metric), here[metric]) for metric in metrics)])
    titles = [f"`{target}` → this branch", *map(report.title, metrics)]
    return tabulate(rows, headers=titles, tablefmt="github", disable_numparse=True) if rows else ""


def change(before: float | None, after: float) -> str:
    if before is None or before == after:
        return f"{after:.4f}"
    return f"{before:.4f} → {after:.4f} ({round(after, 4) - round(before, 4):+.4f})"


def environment_changes(target: str) -> str:
    """Versions, device and threads that differ, stage by stage, where both have run it."""
    stages = sorted(path.stem for path in records.ENVIRONMENT.glob("*.json"))
    both = {stage: there for stage in stages if (there := json_at(target, f"environment/{stage}"))}
    changes = [
        f"{stage}: {name} {report.quoted(str(there[name]))} → {report.quoted(str(here))}"
        for stage, there in both.items()
        for name, here in records.read_metrics(f"environment/{stage}").items()
        if name in there and there[name] != here
    ]
    if not both:
        return f"No stage has its environment recorded both here and at `{target}`."
    return f"Environment: {'; '.join(changes)}." if changes else f"Environment of {', '.join(both)}: the same."


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
    return re.sub(r"^!\[.*\n", "", text, flags=re.MULTILINE)


def folded(summary: str, text: str) -> str:
    return f"<details><summary>{summary}</summary>\n\n{text}\n\n</details>"


if __name__ == "__main__":
    run(main)
