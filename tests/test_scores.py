"""Each query's score against an independent scorer; the other protocol for duplicates against a search of its own."""

from typing import get_args

import ir_measures
import numpy as np
import pytest

from prepare import assign_documents
from shared.params import Metric
from shared.scores import ranks_in_other_protocol, ranks_of, score

THEIRS = {"ndcg": ir_measures.nDCG, "mrr": ir_measures.RR, "map": ir_measures.AP, "accuracy": ir_measures.Success}


def test_an_independent_scorer_agrees_query_by_query():
    draw = np.random.default_rng(0)
    rows = [{"id": f"q{i}", "document_id": f"d{draw.integers(150)}"} for i in range(300)]
    rankings = [
        {
            "query_id": row["id"],
            "results": [{"corpus_id": f"d{d}"} for d in draw.permutation(150)[: draw.integers(101)]],
        }
        for row in rows
    ]
    qrels = [ir_measures.Qrel(row["id"], row["document_id"], 1) for row in rows]
    run = [
        ir_measures.ScoredDoc(ranking["query_id"], result["corpus_id"], -place)
        for ranking in rankings
        for place, result in enumerate(ranking["results"])
    ]
    ranks = ranks_of(rankings, rows)
    assert np.isinf(ranks).any()
    for metric in get_args(Metric):
        name, cutoff = metric.split("@")
        measure = THEIRS[name] @ int(cutoff)
        theirs = {one.query_id: one.value for one in ir_measures.iter_calc([measure], qrels, run)}
        assert score(metric, ranks) == pytest.approx([theirs.get(row["id"], 0.0) for row in rows], abs=1e-9), metric


def test_the_other_protocol_is_what_a_search_under_it_finds(static_model):
    from sentence_transformers import SentenceTransformer

    from shared.retrieval import make_evaluator, search_with_encoder

    draw = np.random.default_rng(0)
    words = ["heart", "lung", "bone", "small", "large", "absent", "pain", "skin", "left", "upper", "tooth", "cell"]
    # No two passages of the same words: to this model they would be one, and equal scores stand in the order of ids.
    passages = sorted({" ".join(sorted(draw.choice(words, 4, replace=False))) for _ in range(40)})
    rows = [
        {"id": str(i), "anchor": " ".join(draw.choice(words, 3)), "positive": str(draw.choice(passages))}
        for i in range(120)
    ]
    model = SentenceTransformer(str(static_model))
    searched = {}
    for merged in (True, False):
        assign_documents(rows, merged)
        corpus = {row["document_id"]: row["positive"] for row in rows}
        rankings = search_with_encoder(make_evaluator(rows, corpus, 8, keep_rankings=True), model, [])
        searched[merged] = ranks_of(rankings, rows), ranks_in_other_protocol(rankings, rows, rows, merged)
    assert not np.array_equal(searched[True][0], searched[False][0])
    for merged in (True, False):
        found, derived = searched[not merged][0], searched[merged][1]
        shallow = found <= 20  # the hundred kept results hold fewer distinct passages
        assert shallow.sum() > 20
        assert np.array_equal(derived[shallow], found[shallow])


def ranked_by_bm25(query: str, corpus: dict[str, str]) -> list[str]:
    from shared.retrieval import make_evaluator, search_with_bm25

    row = {"id": "q", "anchor": query, "document_id": "b"}
    (ranking,) = search_with_bm25(make_evaluator([row], corpus, 8, keep_rankings=True))
    return [result["corpus_id"] for result in ranking["results"]]


def test_bm25_finds_the_passage_that_shares_the_rarer_words_first():
    corpus = {"a": "the heart of a child", "b": "pains in the chest and the heart", "c": "a broken bone of the hand"}
    assert ranked_by_bm25("chest pain near the heart", corpus) == ["b", "a"]


def test_bm25_tells_words_of_one_letter_apart():
    corpus = {"a": "vaccines against hepatitis A", "b": "vaccines against hepatitis C", "c": "vaccines against polio"}
    assert ranked_by_bm25("hepatitis C vaccine", corpus)[0] == "b"


@pytest.mark.parametrize(
    ("query", "wrong", "right"),
    [
        ("什么是高血压", "糖尿病是指血糖升高", "高血压是指血压升高，COVID-19 除外"),
        ("ไต", "ตับอักเสบ", "โรคไตเรื้อรัง"),
        ("東京駅へ", "大阪で買えます", "切符は東京駅で買えます"),
        ("covid19の原因", "原発", "原因はcovid19ウイルス"),
        ("肺", "肺炎", "左 肺 右"),
    ],
)
def test_bm25_reads_scripts_without_spaces(query, wrong, right):
    assert ranked_by_bm25(query, {"a": wrong, "b": right, "c": "no word in common"})[0] == "b"


def test_memory_does_not_grow_with_queries_times_passages():
    from shared.retrieval import make_evaluator

    rows = [{"id": str(number), "anchor": "heart", "document_id": "a"} for number in range(20_000)]
    assert len(rows) * make_evaluator(rows, {"a": "heart"}, 8, keep_rankings=False).corpus_chunk_size <= 10**8


def test_copies_of_a_text_have_one_embedding():
    import torch

    from shared.retrieval import embed_inputs

    def embed(model: None, texts: list[str], pool: dict) -> torch.Tensor:
        assert texts == ["heart", "lung"]
        return torch.tensor([[1.0], [2.0]])

    assert embed_inputs(embed, None, ["heart", "lung", "heart"], pool={"a": 1}).tolist() == [[1.0], [2.0], [1.0]]
