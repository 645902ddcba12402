"""Prepare: from the source that a data card names to clean (anchor, positive) rows in three splits and one corpus.

Reads   data/cards/<prepare.card>.yaml and what it names
Writes  data/prepared/{train,validation,test,corpus,near_duplicates}.jsonl, metrics/data.json
"""

import re
import unicodedata
from collections import Counter
from itertools import chain, combinations
from typing import Any

import numpy as np

from shared import cards, records
from shared.errors import InputError, run
from shared.groups import group_ids, jaccard_similarities
from shared.params import PrepareParams, nearest, read_params
from shared.records import Row

SPLITS = ("train", "validation", "test")
LONE_SURROGATE = r"[\ud800-\udbff](?![\udc00-\udfff])|(?<![\ud800-\udbff])[\udc00-\udfff]"
# Marks of writing direction, soft hyphens, and characters of no width but the joiners, which some scripts need.
INVISIBLE_MARKS = r"[\u00ad\u061c\u200e\u200f\u202a-\u202e\u2060\u2066-\u2069\ufeff]"
# Rows whose id, query or passage matches are counted. Of these, clean_text mends the first three; the others are kept
# as they are: no file of ours evaluates a formula, and of a long text a model reads what fits into it.
UNUSUAL = {
    "control_characters": r"[\x00-\x08\x0e-\x1f\x7f-\x9f]",
    "lone_surrogates": LONE_SURROGATE,
    "invisible_marks": INVISIBLE_MARKS,
    "formula_like": r"^[-=+@]",
    "longer_than_10000_characters": r"(?s)^.{10001}",
}


def main() -> None:
    params = read_params().prepare
    card = cards.read_card(params.card)
    source = cards.load(card)

    check_columns(source)
    unusual = count_unusual(source)
    rows, empty = clean_rows(source, params.drop_empty_rows)
    rows, dropped = drop_rows(rows, card.max_word_overlap, drop_duplicates=params.merge_identical_passages)
    check_parts(source, rows)
    assign_documents(rows, params.merge_identical_passages)
    splits = split_rows(rows, params)
    corpus = {row["document_id"]: row["positive"] for row in rows}
    similar = near_duplicates(splits["test"], splits["train"] + splits["validation"], params.near_duplicate_similarity)

    with records.new_folder(records.PREPARED) as folder:
        for split in SPLITS:
            contract = [{field: row[field] for field in records.ROW_FIELDS} for row in splits[split]]
            records.write_jsonl(folder / f"{split}.jsonl", contract)
        records.write_jsonl(folder / "corpus.jsonl", ({"id": id, "text": text} for id, text in corpus.items()))
        records.write_jsonl(folder / "near_duplicates.jsonl", similar)
    summary = {
        "card": params.card,
        "revision": source.revision,
        "rows": {split: len(splits[split]) for split in SPLITS},
        "passages": len(corpus),
        "largest_group": max(Counter(group_ids(rows)).values()),  # rows that hang together by texts that they share
        "mean_words": {column: mean_words(rows, column) for column in ("anchor", "positive")},
        "dropped_rows": {"empty": empty} | dropped,
        "unusual_rows": unusual,
        "repeated_passages": len(rows) - len({row["positive"].casefold() for row in rows}),
        "repeated_queries": len(rows) - len({row["anchor"].casefold() for row in rows}),
        "overlap": overlaps(splits),
        # Test rows whose query or passage (and in `rows`, either) nearly stands in the training or validation rows.
        "near_duplicates": {
            "queries": len({row["id"] for row in similar if row["column"] == "anchor"}),
            "passages": len({row["id"] for row in similar if row["column"] == "positive"}),
            "rows": len({row["id"] for row in similar}),
        },
    }
    records.write_json(records.METRICS / "data.json", summary)
    sizes = ", ".join(f"{len(splits[split]):,} {split}" for split in SPLITS)
    print(
        f"{card.title}: {sizes} rows; {len(corpus):,} passages; {empty + sum(dropped.values()):,} rows dropped;"
        f" {summary['near_duplicates']['rows']:,} test rows (nearly) stand in the other splits"
    )


def check_columns(source: cards.Source) -> None:
    """Every column that the card names is in every part of the source. Raises InputError."""
    for part in source.parts:
        there = sorted({name for row in part.rows for name in row})
        if not part.rows:
            raise InputError(f"{part.origin} has no rows")
        for ours, theirs in source.columns.model_dump(exclude_none=True).items():
            if theirs not in there:
                raise InputError(
                    f"{part.origin} has no column {theirs!r}, which the card names as {ours}{nearest(theirs, there)}"
                )


def count_unusual(source: cards.Source) -> dict[str, int]:
    """How many rows, as the source has them, hold a text of each kind in `UNUSUAL`."""
    names = source.columns.model_dump(exclude_none=True).values()
    texts = [[str(row.get(name)) for name in names] for part in source.parts for row in part.rows]
    return {
        kind: sum(any(re.search(pattern, text) for text in row) for row in texts) for kind, pattern in UNUSUAL.items()
    }


def clean_rows(source: cards.Source, drop_empty: bool) -> tuple[list[dict[str, Any]], int]:
    """Rows {"id", "anchor", "positive", "split"} with clean texts and unique ids, and how many empty ones were dropped.

    An id that stands in two splits would be two passages under one name: then every id gets its split's name in front.
    Raises InputError for an empty text, a value that is no text, and an id that stands twice in one part.
    """
    columns, rows, empty = source.columns, [], 0
    for part in source.parts:
        places: dict[str, int] = {}
        for number, raw in enumerate(part.rows, start=1):
            place = f"{part.origin}, row {number}"
            id = str(number) if columns.id is None else clean_text(raw.get(columns.id), columns.id, place)
            anchor = clean_text(raw.get(columns.anchor), columns.anchor, place)
            positive = clean_text(raw.get(columns.positive), columns.positive, place)
            if not id:
                raise InputError(
                    f"{place}: {columns.id!r} is empty; mend it, or leave `id` out of the card's columns, so that rows"
                    " are numbered"
                )
            if not (anchor and positive):
                if not drop_empty:
                    column = columns.positive if anchor else columns.anchor
                    raise InputError(
                        f"{place}: {column!r} is empty;"
                        " mend the row, or drop all such rows, passages too, with prepare.drop_empty_rows: true"
                    )
                empty += 1
                continue
            if id in places:
                raise InputError(
                    f"{place}: the id {id!r} stands in row {places[id]} already; mend it, or leave `id` out of"
                    " the card's columns, so that rows are numbered"
                )
            places[id] = number
            rows.append({"id": id, "anchor": anchor, "positive": positive, "split": part.split})
    if len({row["id"] for row in rows}) < len(rows):
        for row in rows:
            row["id"] = f"{row['split']}/{row['id']}"
    return rows, empty


def clean_text(value: Any, column: str, place: str) -> str:
    """One line of valid Unicode, in its form NFC; None is empty, and so is NaN, which pandas writes for it.

    White space and control characters become single spaces, half of a surrogate pair becomes U+FFFD, and marks of
    writing direction, which no model reads and which can make a line look like another, go.
    """
    if value is None or value != value:
        return ""
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise InputError(f"{place}: {column!r} holds {type(value).__name__} {value!r:.60}, where text is needed")
    text = re.sub(INVISIBLE_MARKS, "", re.sub(LONE_SURROGATE, "\ufffd", str(value)))
    pairs_joined = text.encode("utf-16", "surrogatepass").decode("utf-16")
    return re.sub(r"[\s\x00-\x1f\x7f-\x9f]+", " ", unicodedata.normalize("NFC", pairs_joined)).strip()


def drop_rows(rows: list[dict[str, Any]], max_word_overlap: float, drop_duplicates: bool) -> tuple[list, dict]:
    """The rows to keep, and how many were dropped for which reason. Nothing is dropped between splits."""
    kept, seen, dropped = [], set(), Counter(duplicate=0, word_overlap=0)
    for row in rows:
        pair = (row["split"], row["anchor"].casefold(), row["positive"].casefold())
        if drop_duplicates and pair in seen:
            dropped["duplicate"] += 1
        elif word_overlap(row["anchor"], row["positive"]) > max_word_overlap:
            dropped["word_overlap"] += 1
        else:
            kept.append(row)
        seen.add(pair)
    return kept, dict(dropped)


def word_overlap(query: str, passage: str) -> float:
    """Share of the query's distinct words that stand in the passage, 0 to 1."""
    query_words, passage_words = (set(re.findall(r"\w+", text.casefold())) for text in (query, passage))
    return len(query_words & passage_words) / max(len(query_words), 1)


def check_parts(source: cards.Source, rows: list[dict[str, Any]]) -> None:
    """Raises InputError where cleaning has left nothing of a part."""
    for part in source.parts:
        if not any(row["split"] == part.split for row in rows):
            raise InputError(f"{part.origin} has no usable row: all are empty, or above the card's max_word_overlap")


def assign_documents(rows: list[dict[str, Any]], merge_identical: bool) -> None:
    """Set each row's document_id: its own id or, where identical passages are merged, that of the first row with it.

    Passages that differ in upper and lower case alone are identical, and spelt as the first is.
    """
    first: dict[str, dict[str, Any]] = {}
    for row in rows:
        same = first.setdefault(row["positive"].casefold(), row) if merge_identical else row
        row["document_id"], row["positive"] = same["id"], same["positive"]


def split_rows(rows: list[dict[str, Any]], params: PrepareParams) -> dict[str, list[dict[str, Any]]]:
    """The rows of each split, in the source's order. Splits that the card brings are kept as they are.

    A missing validation split is taken from train; without any, test is taken from all rows first. No passage and no
    question is on both sides of a split made here. Raises InputError where a split is empty.
    """
    has_splits = any(row["split"] for row in rows)
    if not has_splits:
        assign_split(rows, None, "test", params.test_fraction, params.seed)
        for row in rows:
            row["split"] = row["split"] or "train"
    if not any(row["split"] == "validation" for row in rows):
        assign_split(rows, "train", "validation", params.validation_fraction, params.seed)
    splits = {split: [row for row in rows if row["split"] == split] for split in SPLITS}
    for split in SPLITS:
        if not splits[split]:
            groups = len(set(group_ids(rows)))
            raise InputError(
                f"the {split} split is empty: {len(rows)} usable rows in {groups} groups that share no text are too few"
                " for prepare.test_fraction and prepare.validation_fraction; give more rows"
            )
    if len(set(group_ids(splits["test"]))) < 2:
        remedy = "give it more rows" if has_splits else "give more rows, another prepare.seed or splits of your own"
        raise InputError(
            "the test split has one passage only, or rows that all hang together by passages and questions that they"
            f" share, which tells nothing of others; {remedy}"
        )
    return splits


def assign_split(rows: list[dict[str, Any]], from_split: str | None, to_split: str, fraction: float, seed: int) -> None:
    """Move whole groups, in an order that the seed gives, until `fraction` of the rows in `from_split` has moved."""
    candidates = [row for row in rows if row["split"] == from_split]
    groups: dict[int, list[dict[str, Any]]] = {}
    for group, row in zip(group_ids(candidates), candidates, strict=True):
        groups.setdefault(group, []).append(row)
    space = round(fraction * len(candidates))
    for group in np.random.default_rng(seed).permutation(list(groups)):
        if len(groups[group]) <= space:
            space -= len(groups[group])
            for row in groups[group]:
                row["split"] = to_split
    largest = max(groups.values(), key=len, default=[])
    if len(largest) > round(fraction * len(candidates)):
        text, count = Counter(row[column] for row in largest for column in ("anchor", "positive")).most_common(1)[0]
        print(
            f"note: {len(largest)} rows that hang together by texts that they share ({text!r:.40} stands in {count})"
            f" are too many for the {to_split} split, which has none; leave them out, or bring splits of your own"
        )


def overlaps(splits: dict[str, list[Row]]) -> dict[str, dict[str, int]]:
    """For each two splits, how many distinct queries and passages stand in both, in upper or lower case."""
    texts = {
        (split, column): {row[column].casefold() for row in rows}
        for split, rows in splits.items()
        for column in ("anchor", "positive")
    }
    return {
        f"{one}_{other}": {
            plural: len(texts[one, column] & texts[other, column])
            for plural, column in (("queries", "anchor"), ("passages", "positive"))
        }
        for one, other in combinations(SPLITS, 2)
    }


def near_duplicates(test: list[Row], others: list[Row], similarity: float) -> list[dict[str, Any]]:
    """For each test row and column, the other row whose text is most alike, where it is `similarity` alike or more.

    Rows {"id", "column", "text", "similarity", "other_id", "other_text"}.
    """
    found = []
    for column in ("anchor", "positive"):
        blocks = jaccard_similarities([row[column] for row in test], [row[column] for row in others])
        for row, alike in zip(test, chain.from_iterable(blocks), strict=True):
            best = alike.argmax()
            if alike[best] >= similarity:
                other = {"other_id": others[best]["id"], "other_text": others[best][column]}
                text = {"id": row["id"], "column": column, "text": row[column]}
                found.append(text | {"similarity": round(float(alike[best]), 3)} | other)
    return found


def mean_words(rows: list[Row], column: str) -> float:
    return round(float(np.mean([len(row[column].split()) for row in rows])), 2)


if __name__ == "__main__":
    run(main)
