"""Each query's score, from the rank at which a model puts the one passage that answers it."""

import numpy as np

from shared.errors import InputError
from shared.params import Metric
from shared.records import Ranking, Row


def ranks_of(rankings: list[Ranking], rows: list[Row]) -> np.ndarray:
    """The rank of each row's passage in its query's ranking, shape (rows,): 1 is first, inf: it is not in it.

    Raises InputError where a row has no ranking.
    """
    found = {ranking["query_id"]: [result["corpus_id"] for result in ranking["results"]] for ranking in rankings}
    if any(row["id"] not in found for row in rows):
        raise InputError("data/rankings/ holds a search for other test rows; `dvc repro` brings all to one state")
    return np.array([place(row["document_id"], found[row["id"]]) for row in rows])


def ranks_in_other_protocol(rankings: list[Ranking], rows: list[Row], all_rows: list[Row], merged: bool) -> np.ndarray:
    """What `ranks_of` would be if identical passages were one document a row (they are `merged`), or else one document.

    `all_rows` are those of all splits, of which the corpus was made. Copies of a passage have the same score, so that
    they stand together in a ranking, in the order of their ids. (BM25's scores would change a little, since copies
    make their words commoner. Rows that prepare dropped as duplicates stay dropped. A ranking has 100 documents: where
    they are copies of fewer passages than a metric looks at, a passage below those counts as not found.)
    """
    text = {row["document_id"]: row["positive"].casefold() for row in all_rows}
    copies: dict[str, list[str]] = {}
    for row in sorted(all_rows, key=lambda row: row["id"]):
        copies.setdefault(row["positive"].casefold(), []).append(row["id"])
    found = {
        ranking["query_id"]: list(dict.fromkeys(text[result["corpus_id"]] for result in ranking["results"]))
        for ranking in rankings
    }
    if not merged:
        return np.array([place(row["positive"].casefold(), found[row["id"]]) for row in rows])
    return np.array([place(row["id"], [id for passage in found[row["id"]] for id in copies[passage]]) for row in rows])


def place(wanted: str, found: list[str]) -> float:
    return found.index(wanted) + 1 if wanted in found else np.inf


def score(metric: Metric, ranks: np.ndarray) -> np.ndarray:
    """Each query's score (0 to 1, the shape of `ranks`), whose mean over the queries is the metric.

    One passage is right, so that the ideal DCG is 1, and average precision is the reciprocal rank.
    """
    name, _, cutoff = metric.partition("@")
    formulas = {"ndcg": 1 / np.log2(1 + ranks), "mrr": 1 / ranks, "map": 1 / ranks, "accuracy": np.ones(ranks.shape)}
    return np.where(ranks <= int(cutoff), formulas[name], 0.0)
