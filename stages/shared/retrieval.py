"""Retrieval over the whole corpus, scored in one way for every model: base, reference, fine-tuned, and in training."""

import copy
import json
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator
from tqdm import tqdm

from shared.by_length import without_padding
from shared.errors import InputError
from shared.records import Ranking, Row, rounded

DEPTH = 100  # documents kept a query; MAP@100 is the deepest metric
CUTOFFS = [1, 3, 5, 10]
SIMILARITIES_AT_ONCE = 10**8  # of all queries to some passages: 0.4 GB, and where many tie three times as much
WITHOUT_SPACES = r"\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"  # Thai to Chinese


def make_evaluator(
    rows: list[Row], corpus: dict[str, str], batch_size: int, keep_rankings: bool
) -> InformationRetrievalEvaluator:
    """Each row's anchor is a query, its document the one relevant passage, and the whole corpus is searched.

    Called with a model, it returns the metrics as `<similarity>_ndcg@10` and so on. `keep_rankings` is for
    `search_with_encoder`.
    """
    evaluator = InformationRetrievalEvaluator(
        queries={row["id"]: row["anchor"] for row in rows},
        corpus=corpus,
        relevant_docs={row["id"]: {row["document_id"]} for row in rows},
        mrr_at_k=[10],
        ndcg_at_k=[10],
        accuracy_at_k=CUTOFFS,
        precision_recall_at_k=CUTOFFS,
        map_at_k=[DEPTH],
        corpus_chunk_size=min(50_000, max(1_000, SIMILARITIES_AT_ONCE // len(rows))),
        batch_size=batch_size,
        show_progress_bar=True,
        write_csv=False,
        write_predictions=keep_rankings,
    )
    evaluator.embed_inputs = partial(embed_inputs, evaluator.embed_inputs)
    return evaluator


def embed_inputs(
    embed: Callable[..., torch.Tensor],
    model: SentenceTransformer,
    texts: Sequence[str],
    pool: dict[str, Any] | None = None,
    **options: Any,
) -> torch.Tensor:
    """The evaluator's own, without padding in this process (others, where there are any, pad their part).

    Of each distinct text once, so that copies of a passage tie whatever else is encoded beside them (of those that the
    evaluator hands on at a time, most often all).
    """
    places = {text: place for place, text in enumerate(dict.fromkeys(texts))}
    with nullcontext() if pool else without_padding(model):
        embeddings = embed(model, list(places), pool=pool, **options)
    return embeddings if len(places) == len(texts) else embeddings[[places[text] for text in texts]]


def search_with_encoder(
    evaluator: InformationRetrievalEvaluator, model: SentenceTransformer, devices: list[str]
) -> list[Ranking]:
    """For each query its `DEPTH` best documents; equal scores in the order of the corpus ids.

    With `devices`, a process on each encodes its part of the texts; without, the model's own device does.
    """
    evaluator = copy.copy(evaluator)
    pool = model.start_multi_process_pool(devices) if devices else None
    evaluator.embed_inputs = partial(evaluator.embed_inputs, pool=pool)
    try:
        with TemporaryDirectory() as folder:
            evaluator(model, output_path=folder)
            (predictions,) = Path(folder).glob("*_predictions_*.jsonl")
            return [json.loads(line) for line in predictions.read_text(encoding="utf-8").split("\n") if line]
    finally:
        if pool:
            model.stop_multi_process_pool(pool)


def search_with_bm25(evaluator: InformationRetrievalEvaluator) -> list[Ranking]:
    """The same by BM25 (Lucene's variant, k1 1.5, b 0.75, English stop words and stemmer): no weights, no training.

    A document that shares no word with the query is not retrieved, so a ranking may be shorter than `DEPTH`.
    """
    import bm25s
    import Stemmer

    options = {"token_pattern": word_pattern(), "stopwords": "en", "stemmer": Stemmer.Stemmer("english")}
    index = bm25s.BM25(method="lucene", k1=1.5, b=0.75)
    corpus_tokens = bm25s.tokenize(evaluator.corpus, **options)
    if not corpus_tokens.vocab:
        raise InputError("bm25 finds no word to search for in the passages; take another models.reference")
    index.index(corpus_tokens)
    query_tokens = bm25s.tokenize(evaluator.queries, return_ids=False, show_progress=False, **options)
    id_order = evaluator.get_corpus_id_ranks().numpy()
    rankings = []
    for id, query, tokens in zip(
        evaluator.queries_ids, evaluator.queries, tqdm(query_tokens, desc="BM25", unit="query"), strict=True
    ):
        scores = index.get_scores(tokens) if tokens else np.zeros(len(evaluator.corpus))
        found = np.flatnonzero(scores)
        best = found[np.lexsort((id_order[found], -scores[found]))][:DEPTH]
        results = [{"corpus_id": evaluator.corpus_ids[i], "score": float(scores[i])} for i in best]
        rankings.append({"query_id": id, "query": query, "results": results})
    return rankings


def word_pattern() -> str:
    """What BM25 counts as a word.

    Words of one letter or digit count, which bm25s leaves out by itself: hepatitis B is not hepatitis C. (But what
    follows an apostrophe.) In scripts without spaces, each two neighbouring characters are a word (as Lucene's
    CJKAnalyzer has it), and one that stands alone.
    """
    spaced, unspaced = rf"[^\W{WITHOUT_SPACES}]", f"[{WITHOUT_SPACES}]"
    word = rf"(?<!{spaced})(?:{spaced}{{2,}}|(?<!{spaced}['’]){spaced})(?!{spaced})"
    pair_or_lone = f"{unspaced}{{2}}|(?<!{unspaced}){unspaced}(?!{unspaced})"
    return f"(?=({word}|{pair_or_lone}))"  # a look ahead takes no text, so pairs may overlap


def mean_scores(rankings: list[Ranking], rows: list[Row]) -> dict[str, float]:
    """The evaluator's metrics, `ndcg@10` and so on, of the searches for these rows, in the same order."""
    evaluator = make_evaluator(rows, {}, 1, keep_rankings=False)
    by_name = evaluator.compute_metrics([ranking["results"] for ranking in rankings])
    return {name.replace("@k", f"@{k}"): rounded(score) for name, by_k in by_name.items() for k, score in by_k.items()}
