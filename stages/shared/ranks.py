"""metrics/ranks.csv, read again: enough to compare models query by query, from Git alone."""

import csv
import io
from typing import NamedTuple

import numpy as np


class RankTable(NamedTuple):
    """Of each query: its group, whether it is no near-duplicate, and the rank of its passage with each model."""

    groups: np.ndarray
    unseen: np.ndarray
    base: np.ndarray
    reference: np.ndarray
    finetuned: dict[str, np.ndarray]  # by seed


def read_ranks(table: str) -> RankTable | None:
    """None where the table is damaged, or of another version of this repo."""
    try:
        rows = list(csv.DictReader(io.StringIO(table)))
        groups, near_duplicates = ([int(row[name]) for row in rows] for name in ("group", "near_duplicate"))
        ranks = {
            name: np.array([float(row[name] or "inf") for row in rows])
            for name in rows[0]
            if name in ("base", "reference") or name.startswith("finetuned-")
        }
        base, reference = ranks.pop("base"), ranks.pop("reference")
    except (ValueError, KeyError, IndexError, TypeError):
        return None
    finetuned = {name.removeprefix("finetuned-"): own for name, own in ranks.items()}
    return RankTable(np.array(groups), np.array(near_duplicates) == 0, base, reference, finetuned)
