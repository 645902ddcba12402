"""Publish: put the model on the Hub, with a card made from the metrics. For people, and no stage of dvc.yaml.

Usage   python stages/publish.py ORG/NAME --licence ID [--seed SEED] [--dry-run] [--public]
        The token is that of `hf auth login` or of the environment variable HF_TOKEN. A dry run needs none.
Reads   models/finetuned/<seed>/, metrics/, params.yaml, dvc.lock, the data card, and what `dvc status` reads
Writes  the model's files and README.md to ORG/NAME on the Hub, as one commit; nothing here
"""

import argparse
import hashlib
import re
import textwrap
from pathlib import Path
from typing import Any

import numpy as np

from shared import cards, records, report, significance, status
from shared.errors import InputError, causes, run
from shared.params import ROOT, Metric, Params, Seed, read_params, read_yaml
from shared.ranks import RankTable, read_ranks
from shared.records import rounded
from shared.scores import score
from shared.sources import HUB_UNREACHABLE

LOCK = ROOT / "dvc.lock"
CARD = "README.md"  # the Hub's name for the model card


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("repository", help="on the Hub: ORG/NAME; made where it does not exist")
    parser.add_argument("--licence", help="of the weights, by the Hub's id, such as apache-2.0")
    parser.add_argument("--seed", type=int, help="of train.seeds; else the best by its validation score")
    parser.add_argument("--dry-run", action="store_true", help="show what would go; needs no token and no network")
    parser.add_argument("--public", action="store_true", help="a new repository is public, and not private")
    arguments = parser.parse_args()
    params = read_params()
    data_card = cards.read_card(params.prepare.card)
    check_arguments(arguments.repository, arguments.licence, data_card)

    # 1. The model: it must be the one that dvc.lock names, and the run must be of the committed code and params.
    seed = choose_seed(arguments.seed, params.train.seeds)
    lock = read_yaml(LOCK)
    files = model_files(seed)
    model_md5 = check_model(seed, files, lock)
    commit = check_run(lock)

    # 2. The card: what was measured, and how to repeat it.
    text = write_card(arguments.repository, arguments.licence, seed, params, data_card, commit, model_md5)

    # 3. Both to the Hub.
    if arguments.dry_run:
        sizes = {name: path.stat().st_size for name, path in files.items()} | {CARD: len(text.encode())}
        listed = "\n".join(f"{size:>15,}  {name}" for name, size in sizes.items())
        print(f"To {arguments.repository} would go, in bytes:\n{listed}\n\n{CARD}:\n\n{text}", end="")
    else:
        print(upload(arguments.repository, files, text, f"The model of {commit}", arguments.public))


def check_arguments(repository: str, licence: str | None, data_card: cards.Card) -> None:
    """Raises InputError."""
    if not repository:
        raise InputError("which repository? `make publish TO=org/name LICENCE=apache-2.0`")
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repository)
        if "/" not in repository:
            raise HFValidationError("the organization or user is missing")
    except HFValidationError as error:
        raise InputError(f"{repository!r} is no repository on the Hub, ORG/NAME: {error}") from None
    if not licence or not re.fullmatch(r"[a-z0-9.-]+", licence):
        what = f"{licence!r} is none of the Hub's ids" if licence else "it has to be named"
        raise InputError(
            f"--licence: {what}, such as apache-2.0 or cc-by-4.0 (huggingface.co/docs/hub/repositories-licenses)."
            f"\nYou choose it, within what data and base model allow; of the data it is: {data_card.licence}"
        )


def choose_seed(wanted: int | None, seeds: list[Seed]) -> int:
    """Where none is wanted, the best by its validation score: the test is not for choosing. Raises InputError."""
    if wanted is None:
        return max(seeds, key=lambda seed: records.read_metrics(f"train/{seed}")["validation"])
    if wanted not in seeds:
        raise InputError(f"params.yaml: train.seeds is {seeds}, which has no {wanted}")
    return wanted


def model_files(seed: int) -> dict[str, Path]:
    """Name in the folder → path, sorted by name."""
    folder = records.FINETUNED / str(seed)
    paths = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    return dict(sorted(paths.items()))


def check_model(seed: int, files: dict[str, Path], lock: dict[str, Any]) -> str:
    """The model's MD5 in dvc.lock. Raises InputError where the files have another: every byte and name is in it."""
    name = f"models/finetuned/{seed}"
    if not files:
        raise InputError(f"{name} is missing; `dvc pull` fetches it where there is a DVC remote, `dvc repro` trains it")
    stage = lock.get("stages", {}).get(f"train@{seed}", {})
    locked = {out["path"]: out["md5"] for out in stage.get("outs", [])}
    if name not in locked:
        raise InputError(f"dvc.lock has no {name}; `dvc repro`, then commit dvc.lock and metrics/")
    if status.folder_md5({own: status.file_md5(path) for own, path in files.items()}) != locked[name]:
        raise InputError(
            f"{name} is not the model that dvc.lock names: a file was changed, added or removed."
            f"\n`dvc checkout --force {name}` brings that back; `dvc repro --force train@{seed}` trains it again"
        )
    return locked[name]


def check_run(lock: dict[str, Any]) -> str:
    """The commit that holds the run: the last one that changed dvc.lock or a file that it names. Raises InputError."""
    named = {
        entry["path"] for stage in lock["stages"].values() for entry in stage.get("deps", []) + stage.get("outs", [])
    }
    paths = ["dvc.lock", "dvc.yaml", "params.yaml", "requirements.txt", *sorted(named)]
    found = status.mismatches()
    if found:
        raise InputError(
            f"the result is not of this state: {found[0]}{and_more(found[1:])}."
            "\n`dvc repro`, then commit dvc.lock and metrics/; `make gate` lists all"
        )
    uncommitted = status.git("status", "--porcelain", "--", *paths)
    if uncommitted is None:
        raise InputError("Git knows no repository here, and the card names the commit that holds the run")
    if uncommitted:
        first, *others = [line.split(maxsplit=1)[1] for line in uncommitted.splitlines()]
        raise InputError(f"{first} is not committed{and_more(others)}; `git commit` first: the card names the commit")
    return status.git("log", "-1", "--format=%H", "--", *paths)


def and_more(others: list[str]) -> str:
    return f" (and {len(others)} more)" if others else ""


# --- the card ---


def write_card(
    repository: str, licence: str, seed: int, params: Params, data_card: cards.Card, commit: str, model_md5: str
) -> str:
    """The same model gives the same bytes: no date, and nothing of the machine. Raises InputError."""
    metric, data = params.evaluate.primary_metric, records.read_metrics("data")
    table = read_table()
    ranks = {"base": table.base, "reference": table.reference, "finetuned": table.finetuned[str(seed)]}
    scores = {model: scores_of(own, metric) for model, own in ranks.items()}
    intervals = {model: interval(own, metric, table.groups) for model, own in ranks.items()}
    gains = gains_of(table, seed, metric)
    shown, chosen = as_shown(params, seed), {seed: records.read_metrics(f"train/{seed}")}
    text = f"""---
{front_matter(repository, licence, seed, params, data_card, data, table)}
---

# {repository.rpartition("/")[2]}

A sentence-embedding model for retrieval: it finds the passage that answers a question.

{report.headline(shown, data, gains)}

{report.score_table(shown, scores, intervals)}

{report.groups_in_words(gains)}, {data["passages"]:,} passages to search. \
Intervals: bootstrap over the groups. {seeds_in_words(params, seed)}{report.dropped_in_words(data, data_card)}

## How to use

```python
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("{repository}")
queries = model.encode_query(["When does the library open?"])
passages = model.encode_document(["It opens at nine in the morning.", "Books are lent for four weeks."])
print(model.similarity(queries, passages))
```

## What it was made of

**Data**: {plain(data_card.title)}. Revision {plain(data["revision"])}; {data["rows"]["train"]:,} training, \
{data["rows"]["validation"]:,} validation and {data["rows"]["test"]:,} test rows. Licence: {plain(data_card.licence)}. \
Source: {plain(data_card.citation)} {link(data_card.url or "")}

**Base model**: {shown.models.base}.

**Training**: {plain(report.training_in_words(shown.train))} {report.chosen_in_words(shown.train, chosen)}

**Licence** of these weights: {licence}. Data and base model have their own.

## How to repeat it

{repeat_in_words(commit)}

There, dvc.lock (SHA-256 `{hashlib.sha256(LOCK.read_bytes()).hexdigest()}`) names data, code and params by hash or \
value, and this model's folder by the MD5 `{model_md5}`; requirements.txt pins the packages. The same machine gives \
the same bytes; on another, numbers may differ a little.
"""
    return re.sub(r" +$", "", text, flags=re.MULTILINE)  # where a sentence has nothing to say


def read_table() -> RankTable:
    """metrics/ranks.csv. Raises InputError."""
    path = records.METRICS / "ranks.csv"
    table = read_ranks(path.read_text(encoding="utf-8")) if path.exists() else None
    if table is None:
        raise InputError("metrics/ranks.csv is missing or damaged; `git checkout metrics`, or `dvc repro`")
    return table


def front_matter(
    repository: str,
    licence: str,
    seed: int,
    params: Params,
    data_card: cards.Card,
    data: dict[str, Any],
    table: RankTable,
) -> str:
    from huggingface_hub import EvalResult, ModelCardData

    base, primary, ranks = params.models.base, params.evaluate.primary_metric, table.finetuned[str(seed)]
    hub_data = data_card if isinstance(data_card, cards.HubCard) else None
    results = []
    for metric in report.headline_metrics(primary):
        low, high = interval(ranks, metric, table.groups)
        results.append(
            EvalResult(
                task_type="information-retrieval",
                task_name="Information Retrieval",
                dataset_type=hub_data.dataset if hub_data else data["card"],
                dataset_name=one_line(data_card.title),
                dataset_config=hub_data.config if hub_data else None,
                dataset_split="test",
                dataset_revision=data["revision"],
                metric_type=metric,
                metric_name=report.title(metric),
                metric_value=rounded(score(metric, ranks).mean()),
                metric_args={"confidence_level": significance.CONFIDENCE, "low": rounded(low), "high": rounded(high)},
            )
        )
    return ModelCardData(
        model_name=repository.rpartition("/")[2],
        library_name="sentence-transformers",
        pipeline_tag="sentence-similarity",
        tags=["sentence-transformers", "sentence-similarity", "feature-extraction"],
        license=licence,
        base_model=None if base.startswith(("./", "/", "package:")) else base.partition("@")[0],
        datasets=[hub_data.dataset] if hub_data else None,
        eval_results=results,
    ).to_yaml()


def scores_of(ranks: np.ndarray, primary: Metric) -> dict[str, float]:
    return {metric: float(score(metric, ranks).mean()) for metric in report.headline_metrics(primary)}


def interval(ranks: np.ndarray, metric: Metric, groups: np.ndarray) -> tuple[float, float]:
    return significance.score_interval(score(metric, ranks[None]), groups)


def gains_of(table: RankTable, seed: int, metric: Metric) -> dict[str, Any]:
    """What metrics/gain.json says, of this seed alone, as far as `report.headline` reads it."""
    before = {"base": score(metric, table.base[None]), "reference": score(metric, table.reference[None])}
    after = score(metric, table.finetuned[str(seed)][None])
    gains: dict[str, Any] = {"test": {"queries": len(table.groups)} | significance.group_counts(table.groups)}
    groups = significance.groups_of_some(table.groups, table.unseen)
    for model, own in before.items():
        gains[f"over_{model}"] = {metric: significance.compare(after, own, table.groups)._asdict()}
        if groups is not None:
            unseen = significance.compare(after[:, table.unseen], own[:, table.unseen], groups)
            gains[f"over_{model}"]["without_near_duplicates"] = unseen._asdict()
    gains["over_base"]["queries"] = significance.wins_and_losses(after, before["base"])
    return gains


def seeds_in_words(params: Params, seed: int) -> str:
    """Of several seeds, which one this is, and how the others are."""
    seeds, metric = params.train.seeds, params.evaluate.primary_metric
    if len(seeds) == 1:
        return "One seed was trained: its luck is not in the intervals."
    validation = {own: records.read_metrics(f"train/{own}")["validation"] for own in seeds}
    each = ", ".join(f"{own} {score:.4f}" for own, score in validation.items())
    test = records.read_metrics("gain")["seeds"]
    return (
        f"This is seed {seed}; validation {report.title(metric)} by seed: {each}."
        f" The mean of all seeds on the test is {test['mean']:.4f} (standard deviation {test['sd']:.4f})."
    )


def as_shown(params: Params, seed: int) -> Params:
    """The params of this one model, with models' names that tell nothing of the machine and break no Markdown."""
    models = params.models.model_copy(
        update={"base": shown_model(params.models.base), "reference": shown_model(params.models.reference)}
    )
    train = params.train.model_copy(update={"seeds": [seed]})
    return params.model_copy(update={"models": models, "train": train})


def shown_model(name: str) -> str:
    return "a model of a local folder" if name.startswith(("./", "/")) else plain(name)


def one_line(text: str) -> str:
    return " ".join(text.split())


def plain(text: str) -> str:
    """In one line, so that nothing in a user's text is taken for Markdown or HTML."""
    return re.sub(r"([\\`*_{}\[\]<>#|~&$!])", r"\\\1", one_line(text))


def link(url: str) -> str:
    return f"<{url}>" if re.fullmatch(r"https?://[^\s<>\\]+", url) else plain(url)


def repeat_in_words(commit: str) -> str:
    """With the address of `origin` where others can use it: no path, and never a password."""
    origin = status.git("remote", "get-url", "origin") or ""
    match = re.fullmatch(
        r"(?:https://(?:[^@/]+@)?|(?:ssh://)?git@)([\w-]+(?:\.[\w-]+)+)[/:](?!\d+/)([\w./~-]+)", origin
    )
    clone = f"git clone https://{match[1]}/{match[2]} repository\ncd repository\n" if match else ""
    where = "" if match else "In the repository that it was made in:\n\n"
    pull = "make .venv/bin/.installed && git ls-files -z '*.dvc' | xargs -0 .venv/bin/dvc pull\n"
    if not status.git("ls-files", "*.dvc"):  # data and models of one's own, which a clone gets from the remote
        pull = ""
    return f"{where}```bash\n{clone}git checkout {commit}\n{pull}make  # install, and run all of it\n```"


# --- the Hub ---


def upload(repository: str, files: dict[str, Path], card: str, message: str, public: bool) -> str:
    """Add the files and the card, as one commit; what else the repository holds stays. Raises InputError."""
    from huggingface_hub import CommitOperationAdd, HfApi, ModelCard, get_token

    token = ""
    try:
        token = get_token() or ""
        if not token:
            raise InputError("the Hub asks for a token: log in with `hf auth login`, or set HF_TOKEN")
        if not token.isascii():
            raise InputError("the Hub's token holds a character that none has; `hf auth login`, or set HF_TOKEN again")
        hub = HfApi(token=token)
        ModelCard(card).validate()  # by the Hub, before there is a repository
        hub.create_repo(repository, private=not public, exist_ok=True)
        before = hub.model_info(repository).sha
        additions = [CommitOperationAdd(name, path) for name, path in files.items()]
        additions.append(CommitOperationAdd(CARD, card.encode()))
        commit = hub.create_commit(repository, additions, commit_message=message)
    except InputError:
        raise
    except Exception as error:
        raise refusal(error, repository, token) from None
    if commit.oid == before:
        return f"{repository}: already there: nothing changed"
    return f"{repository}: published as {commit.commit_url}"


def refusal(error: Exception, repository: str, token: str) -> InputError:
    """What went wrong at the Hub, and what to do; without the token."""
    from huggingface_hub.errors import HfHubHTTPError

    answers = [link.response.status_code for link in causes(error) if isinstance(link, HfHubHTTPError)]
    if answers and answers[0] in (401, 403, 404):
        return InputError(
            f"the Hub does not let this token write to {repository} ({answers[0]}): it is wrong or has expired, or has"
            "\nno write access there. Take one that has: `hf auth login`, or set HF_TOKEN"
        )
    if HUB_UNREACHABLE & {type(link).__name__ for link in causes(error)}:
        return InputError("the Hub cannot be reached; check the network, HF_ENDPOINT and HF_HUB_OFFLINE")
    text = str(error).replace(token, "***") if token else str(error)
    said = [message.replace('\\"', '"') for message in re.findall(r'"message": ?"(.+?)(?<!\\)"', text)]  # as JSON
    words = textwrap.shorten(" ".join(said) or text, 300) or type(error).__name__
    return InputError(f"{repository} could not be published: {words}")


if __name__ == "__main__":
    run(main)
