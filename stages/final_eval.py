"""Final evaluation: score the fine-tuned models as the baselines were, and weigh what training gained.

Reads   models/finetuned/<seed>/, data/prepared/, data/rankings/{base,reference}.jsonl, the data card,
        metrics/{data,base,reference,validation/base}.json, metrics/environment/baseline_eval@{base,reference}.json,
        metrics/train/<seed>.json, metrics/curves/<seed>/
Writes  data/rankings/finetuned/<seed>.jsonl
        metrics/: finetuned.json (mean of the seeds), gain.json, ranks.csv, report.md, plots/*.svg,
        environment/final_eval.json
"""

import re
import shutil
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from shared import cards, environment, pictures, records, report, significance, sources
from shared.errors import InputError, run
from shared.groups import alike_group_ids, group_ids
from shared.params import Metric, read_params
from shared.records import Ranking, Row, rounded
from shared.scores import ranks_in_other_protocol, ranks_of, score

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

EXAMPLES = 5  # queries that gained most, and as many that lost most, in the report

Ranks = dict[str, np.ndarray]  # base, reference, finetuned → rank of each query's passage, shape (seeds, queries)


def main() -> None:
    params = read_params()
    seeds, metric = params.train.seeds, params.evaluate.primary_metric
    card = cards.read_card(params.prepare.card)
    splits = {split: records.read_split(split) for split in ("train", "validation", "test")}
    test, corpus, near_duplicates = splits["test"], records.read_corpus(), records.read_near_duplicates()
    data = records.read_metrics("data")
    metrics = {model: records.read_metrics(model) for model in ("base", "reference")}
    rankings = {model: [records.read_ranking(model)] for model in ("base", "reference")}
    training = {seed: records.read_metrics(f"train/{seed}") for seed in seeds}
    validation_before = records.read_metrics("validation/base")[metric]
    environments = {
        model: records.read_metrics(f"environment/baseline_eval@{model}") for model in ("base", "reference")
    }

    # Ten seconds of imports: after the checks above, so that errors come at once.
    from shared import encoders, retrieval

    # 1. Search with each fine-tuned model, as the baselines did; training scored validation rows in its own precision.
    validation, devices = splits["validation"], encoders.devices()
    evaluator = retrieval.make_evaluator(validation + test, corpus, params.evaluate.batch_size, keep_rankings=True)
    of_both = [retrieval.search_with_encoder(evaluator, load_finetuned(seed), devices) for seed in seeds]
    on_validation = [retrieval.mean_scores(ranking[: len(validation)], validation) for ranking in of_both]
    rankings["finetuned"] = [ranking[len(validation) :] for ranking in of_both]
    by_seed = [retrieval.mean_scores(ranking, test) for ranking in rankings["finetuned"]]
    metrics["finetuned"] = mean_metrics(by_seed)

    # 2. The rank of each query's passage: all the evidence is made of it. Groups stand or fall together.
    ranks = {model: np.stack([ranks_of(one, test) for one in several]) for model, several in rankings.items()}
    groups = np.array(group_ids(test))

    # 3. The gain; and again without queries that training nearly saw, with queries that are alike as one group,
    # and under the other protocol for duplicates.
    views = {"all": (ranks, groups)}
    unseen = np.array([row["id"] not in near_duplicates for row in test])
    own_groups = significance.groups_of_some(groups, unseen)
    if own_groups is not None:
        views["without_near_duplicates"] = ({model: own[:, unseen] for model, own in ranks.items()}, own_groups)
    alike = np.array(alike_group_ids(test, params.prepare.near_duplicate_similarity))
    if 0 < alike.max() < groups.max():
        views["near_duplicates_together"] = (ranks, alike)
    if data["repeated_passages"]:
        merged, rows = params.prepare.merge_identical_passages, [row for split in splits.values() for row in split]
        other = {
            model: np.stack([ranks_in_other_protocol(one, test, rows, merged) for one in several])
            for model, several in rankings.items()
        }
        views["one_document_a_row" if merged else "identical_passages_merged"] = (other, groups)
    gains: dict[str, Any] = {"test": {"queries": len(test)} | significance.group_counts(groups)}
    gains |= {f"over_{model}": gain_over(model, views, metric) for model in ("base", "reference")}
    gains["validation"] = {"before": validation_before, "after": mean_metrics(on_validation)[metric]}
    gains["seeds"] = spread(seeds, np.array([own[metric] for own in by_seed]))

    # 4. For people.
    changes = score(metric, ranks["finetuned"]) - score(metric, ranks["base"])
    carried = [card.package] if isinstance(card, cards.OboCard) else []
    machine = environment.describe("scipy", "scikit-learn", *carried)
    text = report.write_report(
        params,
        card,
        data,
        metrics,
        {model: significance.score_interval(score(metric, own), groups) for model, own in ranks.items()},
        gains,
        training,
        environments,
        {what: examples(what, changes[0], groups, test, corpus, rankings, ranks) for what in ("gained", "lost")},
        machine,
    )
    query_words = np.array([len(row["anchor"].split()) for row in test])
    drawn = {
        "scores": pictures.scores(ranks, groups, report.headline_metrics(metric)),
        "training": pictures.training(records.CURVES, training, validation_before, metric),
        "recall": pictures.recall(ranks),
        "ranks": pictures.rank_moves(ranks["base"], ranks["finetuned"]),
        "length": pictures.gain_by_length(changes, groups, query_words, metric),
    }

    with records.new_folder(records.RANKINGS / "finetuned") as folder:
        for seed, ranking in zip(seeds, rankings["finetuned"], strict=True):
            records.write_jsonl(folder / f"{seed}.jsonl", ranking)
    records.write_json(records.METRICS / "finetuned.json", metrics["finetuned"])
    records.write_json(records.METRICS / "gain.json", gains)
    records.write_json(records.ENVIRONMENT / "final_eval.json", machine)
    records.write_csv(records.METRICS / "ranks.csv", *rank_table(test, groups, near_duplicates, ranks, seeds))
    for name, picture in drawn.items():
        records.write_text(records.METRICS / f"plots/{name}.svg", picture)
    records.write_text(records.METRICS / "report.md", text)
    remove_other_seeds(seeds)
    print(report.headline(params, data, gains))


def remove_other_seeds(seeds: list[int]) -> None:
    """Remove what an earlier run with more seeds has left: DVC takes the whole folders for what this stage reads."""
    for folder in (records.FINETUNED, records.CURVES, records.METRICS / "train", records.ENVIRONMENT):
        for path in folder.iterdir():
            seed = path.stem.removeprefix("train@")
            if seed.isdecimal() and int(seed) not in seeds:
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def load_finetuned(seed: int) -> "SentenceTransformer":
    """The model that train wrote. Raises InputError."""
    from shared import encoders

    folder, name = records.FINETUNED / str(seed), f"models/finetuned/{seed}"
    try:
        sources.check_model(folder, name)
        return encoders.load_encoder(folder, name)
    except InputError as error:
        remedy = f"`dvc checkout --force` brings the last one back, `dvc repro --force train@{seed}` trains it again"
        raise InputError(f"{error}\n{remedy}") from error


def mean_metrics(by_seed: list[dict[str, float]]) -> dict[str, float]:
    return {name: rounded(np.mean([own[name] for own in by_seed])) for name in by_seed[0]}


def gain_over(model: str, views: dict[str, tuple[Ranks, np.ndarray]], metric: Metric) -> dict[str, Any]:
    """What the fine-tuned model gains over `model`: by the primary metric, in each view of the test, by the others."""

    def compare(view: str, metric: Metric) -> dict[str, float]:
        ranks, groups = views[view]
        comparison = significance.compare(score(metric, ranks["finetuned"]), score(metric, ranks[model]), groups)
        return {name: rounded(value) for name, value in comparison._asdict().items()}

    def means(view: str) -> dict[str, float]:
        ranks, groups = views[view]
        before, after = (rounded(score(metric, ranks[name]).mean()) for name in (model, "finetuned"))
        return {"queries": len(groups), **significance.group_counts(groups), "before": before, "after": after}

    ranks, _ = views["all"]
    return {
        metric: compare("all", metric),
        "queries": significance.wins_and_losses(score(metric, ranks["finetuned"]), score(metric, ranks[model])),
        **{view: means(view) | compare(view, metric) for view in views if view != "all"},
        "secondary": {other: compare("all", other) for other in get_args(Metric) if other != metric},
    }


def spread(seeds: list[int], scores: np.ndarray) -> dict[str, Any]:
    """Each seed's score by the primary metric and, where there are several, their mean and standard deviation."""
    by_seed = {str(seed): rounded(own) for seed, own in zip(seeds, scores, strict=True)}
    return by_seed | ({"mean": rounded(scores.mean()), "sd": rounded(scores.std(ddof=1))} if len(seeds) > 1 else {})


def examples(
    what: Literal["gained", "lost"],
    changes: np.ndarray,
    groups: np.ndarray,
    test: list[Row],
    corpus: dict[str, str],
    rankings: dict[str, list[Ranking]],
    ranks: Ranks,
) -> list[dict[str, Any]]:
    """The queries that gained (or lost) most, as `shared.report` shows them; of several seeds, with the first one."""
    sign = 1 if what == "gained" else -1
    change, before, after = sign * changes, ranks["base"][0], ranks["finetuned"][0]
    # Many change by the same score: then those first whose passage moved farthest.
    farthest = sign * (1 / after - 1 / before)
    order = [i for i in np.lexsort((-farthest, -change)) if change[i] > 0]
    _, firsts = np.unique(groups[order], return_index=True)  # one of each group, since the others say the same
    most = [order[place] for place in sorted(firsts)[:EXAMPLES]]
    first = {
        model: {ranking["query_id"]: ranking["results"][0]["corpus_id"] for ranking in rankings[model][0]}
        for model in ("base", "finetuned")
    }
    return [
        {
            "query": test[i]["anchor"],
            "passage": test[i]["positive"],
            "before": before[i],
            "after": after[i],
            "first_before": None if before[i] == 1 else corpus[first["base"][test[i]["id"]]],
            "first_after": None if after[i] == 1 else corpus[first["finetuned"][test[i]["id"]]],
        }
        for i in most
    ]


def rank_table(
    test: list[Row], groups: np.ndarray, near_duplicates: set[str], ranks: Ranks, seeds: list[int]
) -> tuple[list[str], list[list[Any]]]:
    """Header and rows of ranks.csv: enough to compare two commits query by query, from Git alone. Empty: not found."""
    columns = {"base": ranks["base"][0], "reference": ranks["reference"][0]}
    columns |= {f"finetuned-{seed}": own for seed, own in zip(seeds, ranks["finetuned"], strict=True)}
    rows = [
        [
            re.sub("^(?=[-=+@])", "'", row["id"]),  # a spreadsheet would take -1 or =A1 for a formula
            groups[i],
            int(row["id"] in near_duplicates),
            *("" if np.isinf(own[i]) else int(own[i]) for own in columns.values()),
        ]
        for i, row in enumerate(test)
    ]
    return ["query_id", "group", "near_duplicate", *columns], rows


if __name__ == "__main__":
    run(main)
