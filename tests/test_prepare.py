"""prepare's own steps, on rows made for the purpose."""

import random

import pytest

from conftest import default_params
from prepare import (
    assign_documents,
    clean_rows,
    clean_text,
    count_unusual,
    drop_rows,
    near_duplicates,
    overlaps,
    split_rows,
)
from shared.cards import Columns, Part, Source
from shared.errors import InputError
from shared.groups import alike_group_ids, group_ids

COLUMNS = Columns(anchor="q", positive="p", id="id")


def make_rows(pairs: list[tuple[str, str]], split: str | None = None) -> list[dict]:
    return [{"id": str(i), "anchor": a, "positive": p, "split": split} for i, (a, p) in enumerate(pairs)]


def source(**parts: list[dict]) -> Source:
    return Source([Part(split, split, rows) for split, rows in parts.items()], COLUMNS, "r")


@pytest.fixture
def params():
    return default_params().prepare


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("  a\u00a0 b\n\tc ", "a b c"),
        ("a\x00b\x1fc", "a b c"),
        ("broken \ud800 surrogate", "broken \ufffd surrogate"),
        ("a pair \ud83d\ude00 is a character", "a pair 😀 is a character"),
        ("\u200fשלום \u202etxt.exe\u202c", "שלום txt.exe"),
        ("Ou\u0300 est le cafe\u0301", "Où est le café"),
        ("=SUM(A1)", "=SUM(A1)"),
        (17, "17"),
        (None, ""),
    ],
)
def test_clean_text(raw, clean):
    assert clean_text(raw, "q", "row 1") == clean


def test_groups_join_rows_that_are_alike_too():
    rows = make_rows(
        [
            ("a small head", "Abnormally small size of the cranium."),
            ("a large foot", "Abnormally large size of the pedal skeleton."),
            ("tiny skull", "An abnormally small size of the cranium."),
            ("tiny skulls", "No word in common."),
        ]
    )
    assert group_ids(rows) == [0, 1, 2, 3]
    assert alike_group_ids(rows, 0.7) == [0, 1, 0, 0]
    assert alike_group_ids(rows, 1.0) == [0, 1, 2, 3]


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


def test_near_duplicates_of_test_rows_are_found_by_query_and_by_passage():
    train = make_rows(
        [
            ("Absence of a permanent lower front tooth", "Agenesis of a lower incisor."),
            ("Curved fingers", "Bowing of the digits"),
            ("缺少一颗门牙的病人", "门牙缺失"),
        ]
    )
    test = make_rows(
        [
            ("absence of a permanent upper front tooth", "A tooth is missing."),
            ("Curved fingers of a man with bent toes", "agenesis of a lower  incisor."),
            ("Curved lips", "Nothing alike"),
            ("缺少一颗门牙的病人", "Curved fingers"),
        ]
    )
    found = near_duplicates(test, train, 0.7)
    assert [(row["id"], row["column"], row["other_id"]) for row in found] == [
        ("0", "anchor", "0"),
        ("3", "anchor", "2"),
        ("1", "positive", "0"),
    ]
    assert [row["similarity"] for row in found] == pytest.approx([0.8, 1, 1], abs=0.1)
    assert found[0]["text"].startswith("absence")
    assert found[0]["other_text"].startswith("Absence")
    assert near_duplicates(test, train, 0.99) == found[1:]


def test_near_duplicates_are_the_same_however_they_are_compared(monkeypatch):
    draw = random.Random(0)
    words = ["heart", "lung", "bone", "small", "large", "absent", "pain", "skin"]
    rows = make_rows([(" ".join(draw.choices(words, k=4)), " ".join(draw.choices(words, k=5))) for _ in range(90)])
    whole = near_duplicates(rows[:40], rows[40:], 0.5)
    assert len(whole) > 20
    for how, number in {"COMPARED_AT_ONCE": 7, "COMMON": 9}.items():
        monkeypatch.setattr(f"shared.groups.{how}", number)
        assert near_duplicates(rows[:40], rows[40:], 0.5) == whole


def test_a_test_split_of_one_passage_is_refused(params):
    train = make_rows([(f"q{i}", f"p{i}") for i in range(50)], "train")
    with pytest.raises(InputError, match="one passage only"):
        split_rows(train + make_rows([("a", "same"), ("b", "same")], "test"), params)
    with pytest.raises(InputError, match="all hang together"):
        split_rows(train + make_rows([("a", "one"), ("a", "two"), ("b", "two")], "test"), params)


def test_a_group_too_large_for_the_test_split_is_named(params, capsys):
    splits = split_rows(make_rows([(f"q{i}", "yes" if i < 60 else f"p{i}") for i in range(100)]), params)
    assert not any(row["positive"] == "yes" for row in splits["test"])
    note = "note: 60 rows that hang together by texts that they share ('yes' stands in 60) are too many for the test"
    assert note in capsys.readouterr().out


def test_identical_passages_are_one_document_or_one_a_row():
    rows = make_rows([("q1", "same"), ("q2", "same"), ("q3", "other")])
    rows[1]["positive"] = "Same"
    assert drop_rows([*rows, rows[1] | {"anchor": "Q2"}], 1, drop_duplicates=True)[0] == rows
    assert overlaps({"train": rows[:1], "validation": rows[1:2], "test": rows[2:]})["train_validation"]["passages"] == 1
    assign_documents(rows, merge_identical=True)
    assert [(row["document_id"], row["positive"]) for row in rows] == [("0", "same"), ("0", "same"), ("2", "other")]
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


def test_unusual_rows_are_counted_by_kind():
    rows = [
        {"id": 1, "q": "usual\ttext", "p": "of two\nlines, -5 and 😀 \ud83d\ude00"},
        {"id": 2, "q": "nul\x00", "p": "escape \x1b[31m"},
        {"id": "\x7f3", "q": "half \udc00", "p": "half \ud800"},
        {"id": 4, "q": "=1+1", "p": "@SUM(A1)"},
        {"id": "-5", "q": "\u202etxt.exe", "p": "word " * 3000},
        {"id": 6, "q": None},
    ]
    assert count_unusual(source(train=rows[:3], test=rows[3:])) == {
        "control_characters": 2,
        "lone_surrogates": 1,
        "invisible_marks": 1,
        "formula_like": 2,
        "longer_than_10000_characters": 1,
    }
