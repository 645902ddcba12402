"""prepare's own steps, on rows made for the purpose."""

import random

import pytest

from prepare import assign_documents, clean_rows, clean_text, drop_rows, group_ids, overlaps, split_rows
from shared.cards import Columns, Part, Source
from shared.errors import InputError
from shared.params import read_params

COLUMNS = Columns(anchor="q", positive="p", id="id")


def make_rows(pairs: list[tuple[str, str]], split: str | None = None) -> list[dict]:
    return [{"id": str(i), "anchor": a, "positive": p, "split": split} for i, (a, p) in enumerate(pairs)]


def source(**parts: list[dict]) -> Source:
    return Source([Part(split, split, rows) for split, rows in parts.items()], COLUMNS, "r")


@pytest.fixture
def params():
    return read_params().prepare


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("  a\u00a0 b\n\tc ", "a b c"),
        ("a\x00b\x1fc", "a b c"),
        ("broken \ud800 surrogate", "broken \ufffd surrogate"),
        ("\u200fשלום", "\u200fשלום"),
        ("=SUM(A1)", "=SUM(A1)"),
        (17, "17"),
        (None, ""),
    ],
)
def test_clean_text(raw, clean):
    assert clean_text(raw, "q", "row 1") == clean


def test_groups_join_through_shared_passages_and_queries():
    rows = make_rows([("q1", "p1"), ("q2", "p1"), ("q2", "p2"), ("Q3", "p3"), ("q3", "p4"), ("p1", "q1")])
    a, b, c, d, e, f = group_ids(rows)
    assert a == b == c
    assert d == e
    assert len({a, d, f}) == 3  # the same text as a query and as a passage is no link


def test_no_group_is_in_two_splits(params):
    draw = random.Random(0)
    rows = make_rows([(f"q{draw.randrange(400)}", f"p{draw.randrange(400)}") for _ in range(300)])
    assign_documents(rows, merge_identical=True)
    splits = split_rows(rows, params)
    assert sum(map(len, splits.values())) == len(rows)
    assert len(splits["test"]) == round(params.test_fraction * len(rows))
    assert all(count == 0 for pair in overlaps(splits).values() for count in pair.values())
    for split in splits.values():
        assert [row["id"] for row in split] == sorted((row["id"] for row in split), key=int)


def test_splits_of_the_card_are_kept_and_their_overlaps_counted(params):
    train = make_rows([(f"q{i}", f"p{i}") for i in range(50)], "train")
    test = make_rows([("q7", "p7"), ("q8", "other"), ("new", "p9")], "test")
    splits = split_rows(train + test, params)
    assert splits["test"] == test
    assert len(splits["validation"]) == round(params.validation_fraction * 50)
    between = overlaps(splits)
    assert sum(between[pair]["queries"] for pair in ("train_test", "validation_test")) == 2
    assert sum(between[pair]["passages"] for pair in ("train_test", "validation_test")) == 2
    assert between["train_validation"] == {"queries": 0, "passages": 0}


def test_identical_passages_are_one_document_or_one_a_row():
    rows = make_rows([("q1", "same"), ("q2", "same"), ("q3", "other")])
    assign_documents(rows, merge_identical=True)
    assert [row["document_id"] for row in rows] == ["0", "0", "2"]
    assign_documents(rows, merge_identical=False)
    assert [row["document_id"] for row in rows] == ["0", "1", "2"]


def test_an_id_in_two_splits_loses_no_passage():
    rows, _ = clean_rows(source(train=[{"id": 1, "q": "a", "p": "b"}], test=[{"id": 1, "q": "c", "p": "d"}]), False)
    assert [row["id"] for row in rows] == ["train/1", "test/1"]


def test_an_id_twice_in_a_split_is_refused():
    row = {"id": 1, "q": "a", "p": "b"}
    with pytest.raises(InputError, match=r"train, row 2: the id '1' stands in row 1 already; .*leave `id` out"):
        clean_rows(source(train=[row, row]), False)


def test_dropped_rows_are_counted_by_reason():
    rows = make_rows(
        [("small head", "a small head"), ("a b c d", "a b c"), ("new words", "text"), ("new words", "text")]
    )
    kept, dropped = drop_rows(rows, max_word_overlap=0.75, drop_duplicates=True)
    assert [row["id"] for row in kept] == ["1", "2"]
    assert dropped == {"duplicate": 1, "word_overlap": 1}
    kept, dropped = drop_rows(rows, max_word_overlap=1.0, drop_duplicates=False)
    assert kept == rows
