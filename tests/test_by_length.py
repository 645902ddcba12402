"""Texts in chunks of like length have the library's embeddings, and a batch its loss and gradients."""

import random
from contextlib import nullcontext
from functools import partial
from itertools import accumulate, pairwise

import pytest
import torch
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer
from sentence_transformers.sentence_transformer.data_collator import SentenceTransformerDataCollator
from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from sentence_transformers.sentence_transformer.modules import LSTM, Dense, Pooling
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModel

from shared.by_length import (
    SWITCHABLE_MODELS,
    attention_within_texts,
    chunk_shape,
    fitting_attention,
    in_chunks,
    rounded_up,
    split,
    takes_end_to_end,
    without_padding,
)
from shared.loss import ChunkedRankingLoss, steep
from shared.retrieval import make_evaluator
from train import SYMMETRIC, set_dropout

HARDNESS = SYMMETRIC | {"hardness_mode": "in_batch_negatives", "hardness_strength": 5.0}
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
SIZES = dict.fromkeys(["bert", "roberta", "xlm-roberta", "mpnet"], SMALL)
SIZES |= {"distilbert": {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64}}
WORDS = ["fever", "heart", "liver", "of", "the", "acute", "upper", "tooth", "absent", "skin", "bone", "weakness"]


def random_rows(seed: int, count: int) -> list[dict[str, str]]:
    """Pairs of one word to three hundred, most of them short."""
    dice = random.Random(seed)
    lengths = [[min(300, int(1 + dice.expovariate(1 / mean))) for mean in (5, 40)] for _ in range(count)]
    return [
        {
            name: " ".join(dice.choices(WORDS, k=length))
            for name, length in zip(("anchor", "positive"), pair, strict=True)
        }
        for pair in lengths
    ]


def loss_and_gradients(model, loss, rows, prompts=None):
    """As the trainer has them."""
    features, labels = features_of(model, rows, prompts)
    model.zero_grad()
    value = loss(features, labels)
    value.backward()
    return value.item(), {name: w.grad for name, w in model.named_parameters() if w.grad is not None}


def features_of(model, rows, prompts=None):
    batch = SentenceTransformerDataCollator(model.preprocess, prompts=prompts)(rows)
    return SentenceTransformerTrainer.collect_features(None, batch)


def distance(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    """Norm of the difference of all gradients, as a share of the norm of theirs."""
    assert ours.keys() == theirs.keys()
    ours, theirs = (torch.cat([own[name].flatten() for name in sorted(own)]) for own in (ours, theirs))
    return ((ours - theirs).norm() / theirs.norm()).item()


def random_model(small_bert, kind):
    """Of this architecture, with the tokenizer and pooling of `small_bert`."""
    padding = {} if kind == "mpnet" else {"pad_token_id": 0}
    model = SentenceTransformer(str(small_bert), device="cpu")
    torch.manual_seed(0)
    model[0].model = AutoModel.from_config(AutoConfig.for_model(kind, vocab_size=30_522, **padding, **SIZES[kind]))
    return model


@pytest.fixture(scope="module", params=[torch.float64, torch.float32], ids=["float64", "float32"])
def model(request, small_bert):
    model = SentenceTransformer(str(small_bert), device="cpu").to(request.param)
    set_dropout(model, 0.0)
    return model.train()


def check_same_as_the_librarys(model, rows, prompts, options):
    loss, gradients = loss_and_gradients(model, MultipleNegativesRankingLoss(model, **options), rows, prompts)
    rounding = 1e-12 if next(model.parameters()).dtype == torch.float64 else 1e-6
    for multiple in (1, 8, None):
        ours = ChunkedRankingLoss(model, nullcontext(), chunk_tokens=256, multiple=multiple, **options)
        columns, _ = features_of(model, rows, prompts)
        chunks, _ = in_chunks(columns, list(range(len(rows) * len(columns))), 256, multiple)
        assert len(chunks) > 8
        our_loss, our_gradients = loss_and_gradients(model, ours, rows, prompts)
        assert our_loss == pytest.approx(loss, rel=rounding)
        assert distance(our_gradients, gradients) < 10 * rounding


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("options", [{}, SYMMETRIC, HARDNESS], ids=["one way", "symmetric", "hardness"])
@pytest.mark.parametrize("prompts", [{}, {"anchor": "query: ", "positive": "passage: "}], ids=["", "prompts"])
def test_loss_and_gradients_are_the_librarys(model, seed, options, prompts):
    check_same_as_the_librarys(model, random_rows(seed, 48), prompts, options)


def test_of_texts_that_are_padded_on_the_left_too(model, monkeypatch):
    monkeypatch.setattr(model.tokenizer, "padding_side", "left")
    # BERT numbers positions from the left, padding included: without their vectors it does not matter.
    positions = model.transformers_model.embeddings.position_embeddings.weight
    monkeypatch.setattr(positions, "data", torch.zeros_like(positions))
    monkeypatch.setattr(positions, "requires_grad", False)
    check_same_as_the_librarys(model, random_rows(0, 48), {}, {})


def test_of_hard_negatives_and_prompts_that_the_pooling_leaves_out_too(model, monkeypatch):
    monkeypatch.setattr(model[1], "include_prompt", False)
    negatives = random_rows(1, 24)
    rows = [own | {"negative": other["positive"]} for own, other in zip(random_rows(0, 24), negatives, strict=True)]
    prompts = {"anchor": "acute heart of the skin: ", "positive": "bone: ", "negative": "bone: "}
    check_same_as_the_librarys(model, rows, prompts, {})


def test_in_bf16_gradients_are_off_by_less_than_one_rounding(small_bert):
    model = SentenceTransformer(str(small_bert), device="cpu").train()
    set_dropout(model, 0.0)
    rows = random_rows(0, 48)
    _, exact = loss_and_gradients(model, MultipleNegativesRankingLoss(model), rows)
    for multiple, share in ((1, 1.0), (8, 1.0), (None, 1.0), (None, 1 - 1e-9)):
        bf16 = torch.autocast("cpu", torch.bfloat16)
        loss = ChunkedRankingLoss(model, bf16, chunk_tokens=256, multiple=multiple, gradient_share=share)
        _, gradients = loss_and_gradients(model, loss, rows)
        assert 1e-5 < distance(gradients, exact) < 2**-8


@pytest.mark.parametrize("multiple", [1, None])
@pytest.mark.parametrize("share", [0.5, 0.9, 1 - 1e-9])
def test_a_share_of_the_gradient_is_that_of_the_fewest_texts_that_have_it(model, share, multiple):
    rows, texts = random_rows(0, 24), 48

    class OfTheFewest(MultipleNegativesRankingLoss):
        def compute_loss_from_embeddings(self, embeddings, labels):
            joined = torch.cat(embeddings).detach().requires_grad_()
            loss = super().compute_loss_from_embeddings(list(joined.chunk(2)), labels)
            loss.backward()
            squares = joined.grad.norm(dim=1) ** 2
            enough = (n for n in range(1, texts) if squares.topk(n).values.sum() >= share * squares.sum() - 1e-9)
            fewest = next(enough, texts)
            self.kept = torch.zeros(texts, 1).index_fill(0, squares.topk(fewest).indices, 1.0)
            return (torch.cat(embeddings) * joined.grad * self.kept).sum()

    theirs = OfTheFewest(model, **HARDNESS)
    _, expected = loss_and_gradients(model, theirs, rows)
    ours = ChunkedRankingLoss(
        model, nullcontext(), chunk_tokens=256, multiple=multiple, gradient_share=share, **HARDNESS
    )
    loss, gradients = loss_and_gradients(model, ours, rows)
    exact, _ = loss_and_gradients(model, MultipleNegativesRankingLoss(model, **HARDNESS), rows)
    assert loss == pytest.approx(exact, rel=1e-6)
    assert (theirs.kept.sum() < texts) == (share < 0.99)
    assert distance(gradients, expected) < 1e-5


def test_each_process_keeps_its_own_of_the_texts_that_all_keep_and_one_at_least():
    squares = torch.tensor([0.5, 9.0, 0.2, 3.0, 0.1, 0.3])
    one, other = squares[:4], squares[4:]
    assert steep(squares, squares, 0.9).tolist() == [1, 3]
    assert (steep(one, squares, 0.9).tolist(), steep(other, squares, 0.9).tolist()) == ([1, 3], [1])
    assert steep(torch.zeros(3), torch.zeros(3), 0.9).tolist() == [0, 1, 2]
    nan = torch.full((3,), torch.nan)
    assert steep(nan, nan, 0.9).tolist() == [0, 1, 2]


@pytest.mark.parametrize("in_bf16", [False, True])
def test_chunks_are_those_of_the_precision_and_the_model(small_bert, static_model, in_bf16):
    narrow, static = (SentenceTransformer(str(folder), device="cpu") for folder in (small_bert, static_model))
    wide = SentenceTransformer(modules=[*narrow, Dense(32, 768)], device="cpu")
    lstm = SentenceTransformer(modules=[narrow[0], LSTM(32, 16), Pooling(32)], device="cpu")
    pooled_within = SentenceTransformer(modules=[narrow[0]], device="cpu")
    pooled_within_wide = SentenceTransformer(modules=[narrow[0], Dense(32, 768)], device="cpu")
    few_lengths = 8 if in_bf16 else 1
    expected = {narrow: None, wide: None, static: 1, lstm: few_lengths}
    expected |= {pooled_within: few_lengths, pooled_within_wide: 1}
    for model, multiple in expected.items():
        assert chunk_shape(model, in_bf16)["multiple"] == (1 if torch.accelerator.is_available() else multiple)


@pytest.mark.parametrize("pooling", ["mean", "cls", "lasttoken"])
@pytest.mark.parametrize("kind", [*sorted(SWITCHABLE_MODELS), "mpnet"])
def test_texts_of_each_of_these_models_lie_end_to_end(small_bert, kind, pooling):
    model = random_model(small_bert, kind)
    model[1].pooling_mode = pooling
    assert takes_end_to_end(model)
    set_dropout(model.to(torch.float64).train(), 0.0)
    rows = random_rows(0, 24)
    loss, gradients = loss_and_gradients(model, MultipleNegativesRankingLoss(model), rows)
    ours = ChunkedRankingLoss(model, nullcontext(), chunk_tokens=256, multiple=None)
    our_loss, our_gradients = loss_and_gradients(model, ours, rows)
    assert our_loss == pytest.approx(loss, rel=1e-12)
    assert distance(our_gradients, gradients) < 1e-10
    (_, padded), (_, end_to_end) = (
        loss_and_gradients(model, ChunkedRankingLoss(model, nullcontext(), multiple=multiple, gradient_share=0.9), rows)
        for multiple in (1, None)
    )
    assert distance(end_to_end, padded) < 1e-10
    assert loss_and_gradients(model, MultipleNegativesRankingLoss(model), rows)[0] == loss  # nothing of ours is left


@pytest.mark.parametrize("kind", [*sorted(SWITCHABLE_MODELS), "mpnet"])
def test_texts_that_are_encoded_again_take_no_product_again_but_with_dropout(small_bert, kind):
    model = random_model(small_bert, kind).train()
    rows = random_rows(0, 24)

    def products(share, dropout):
        set_dropout(model, dropout)
        loss = ChunkedRankingLoss(model, nullcontext(), multiple=None, gradient_share=share)
        with FlopCounterMode(display=False) as counter:
            loss_and_gradients(model, loss, rows)
        return counter.get_total_flops()

    of_all = 1 - 1e-9
    # But attention's. All of them again would be 4/3.
    assert products(of_all, 0.0) < 1.2 * products(1.0, 0.0)
    assert products(of_all, 0.1) > 1.3 * products(1.0, 0.1)


@pytest.mark.parametrize("kind", ["bert", "mpnet"])
def test_attention_has_the_models_dropout_in_training(small_bert, kind):
    model = random_model(small_bert, kind)
    set_dropout(model, 0.0)
    for name, module in model.named_modules():
        if name.endswith(("self.dropout", "attn.dropout")):
            module.p = 0.5
    columns, _ = features_of(model, random_rows(0, 4))
    loss = ChunkedRankingLoss(model, nullcontext(), multiple=None)
    for training in (True, False):
        model.train(training)
        one, other = (loss.encode(columns, torch.arange(8)) for _ in range(2))
        assert torch.equal(one, other) != training


@pytest.mark.parametrize("kind", [*sorted(SWITCHABLE_MODELS), "mpnet"])
def test_encode_without_padding_gives_the_librarys_embeddings_for_less(small_bert, kind, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    model = random_model(small_bert, kind).to(torch.float64).eval()
    texts = ["", *(row["positive"] for row in random_rows(0, 47))]

    def encoded():
        with FlopCounterMode(display=False) as counter:
            embeddings = model.encode(texts, prompt="passage: ", convert_to_tensor=True)
        return embeddings, counter.get_total_flops()

    expected, padded = encoded()
    with without_padding(model):
        embeddings, unpadded = encoded()
    assert torch.allclose(embeddings, expected, rtol=0, atol=1e-12)
    assert unpadded < 0.8 * padded
    again, as_before = encoded()
    assert torch.equal(again, expected)
    assert as_before == padded


def test_encode_is_the_librarys_where_training_pads_too(small_bert, static_model, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    model, static = (SentenceTransformer(str(folder), device="cpu") for folder in (small_bert, static_model))
    for own in (model, static):
        with without_padding(own):
            assert ("forward" in vars(own)) == (own is model)


def test_what_scores_a_model_pads_nothing(small_bert, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    model = SentenceTransformer(str(small_bert), device="cpu")
    rows = [row | {"id": str(i), "document_id": str(i)} for i, row in enumerate(random_rows(0, 48))]
    corpus = {row["id"]: row["positive"] for row in rows}

    def encoded_by(evaluator):
        with FlopCounterMode(display=False) as counter:
            evaluator(model)
        return counter.get_total_flops()

    ours, theirs = (make_evaluator(rows, corpus, 64, keep_rankings=False) for _ in range(2))
    theirs.embed_inputs = partial(InformationRetrievalEvaluator.embed_inputs, theirs)
    assert encoded_by(ours) < 0.8 * encoded_by(theirs)


def test_encode_is_afterwards_what_it_was(small_bert):
    model = SentenceTransformer(str(small_bert), device="cpu")
    model.forward = around_it = partial(model.forward)  # as accelerate puts its own around a model's
    with without_padding(model), without_padding(model):
        model.encode(["fever"])
    assert model.forward is around_it


@pytest.mark.parametrize(("kind", "options"), [("modernbert", {}), ("bert", {"is_decoder": True})])
def test_models_that_attend_to_a_part_of_a_text_are_padded(small_bert, kind, options):
    model = SentenceTransformer(str(small_bert), device="cpu")
    model[0].model = AutoModel.from_config(AutoConfig.for_model(kind, **SMALL, **options))
    assert not takes_end_to_end(model)


def test_a_batch_with_a_text_of_no_tokens_is_padded(small_bert):
    model = SentenceTransformer(str(small_bert), device="cpu").train()
    model[1].pooling_mode = "lasttoken"
    set_dropout(model, 0.0)
    columns, _ = features_of(model, random_rows(0, 8))
    columns[1]["attention_mask"][3] = 0
    texts = torch.arange(16)
    padded, ours = (
        ChunkedRankingLoss(model, nullcontext(), multiple=multiple).encode(columns, texts) for multiple in (1, None)
    )
    assert torch.equal(padded, ours)


@pytest.mark.parametrize("with_bias", [False, True])
def test_attention_is_that_of_each_text_alone(with_bias):
    lengths = [600, 512, 7, 7, 7, 1]
    ends = torch.tensor([0, *accumulate(lengths)])
    query, key, value = torch.randn(3, 1, 2, sum(lengths), 4, dtype=torch.float64, generator=torch.manual_seed(0))
    bias = torch.randn(2, 1, 600, 600, dtype=torch.float64, generator=torch.manual_seed(1)) * with_bias
    options = {"cu_seq_lens_q": ends, "scaling": 0.3, "bias": bias if with_bias else None}
    attended, _ = attention_within_texts(None, query, key, value, None, **options)
    for start, end in pairwise(ends.tolist()):
        q, k, v = (tensor[:, :, start:end] for tensor in (query, key, value))
        of_positions = bias[:, 0, : end - start, : end - start]
        alone = torch.softmax(0.3 * q @ k.transpose(2, 3) + of_positions, dim=-1) @ v
        assert torch.allclose(attended[:, start:end], alone.transpose(1, 2))
    dropped, _ = attention_within_texts(None, query, key, value, None, **options, dropout=1 - 1e-9)
    assert not dropped.any()


def test_static_word_vectors_train_the_same(static_model):
    model = SentenceTransformer(str(static_model), device="cpu")
    rows = random_rows(0, 16)
    loss, gradients = loss_and_gradients(model, MultipleNegativesRankingLoss(model), rows)
    ours = ChunkedRankingLoss(model, nullcontext(), gradient_share=0.5)
    our_loss, our_gradients = loss_and_gradients(model, ours, rows)
    assert our_loss == loss
    assert all(torch.equal(our_gradients[name], gradient) for name, gradient in gradients.items())


@pytest.mark.parametrize("multiple", [1, 8])
def test_chunks_hold_each_text_once_and_little_padding(multiple):
    dice = random.Random(0)
    lengths = {text: dice.randint(1, 250) for text in range(256)}
    chunks = list(split(lengths, 512, multiple))
    assert sorted(text for chunk in chunks for text in chunk) == list(range(256))
    padded = [len(chunk) * rounded_up(max(lengths[text] for text in chunk), multiple) for chunk in chunks]
    assert max(padded) <= 512
    assert sum(padded) < 1.1 * sum(lengths.values())
    assert list(split({0: 3, 1: 900}, 512, multiple)) == [[1], [0]]


def test_chunks_hold_the_texts_that_are_kept_whole_and_places_find_them(small_bert):
    model = SentenceTransformer(str(small_bert), device="cpu")
    columns, _ = features_of(model, random_rows(0, 48))
    tokens = [row[mask.bool()].tolist() for own in columns for row, mask in pairs_of(own)]
    for texts in (list(range(96)), [1, 5, 40, 47, 48, 95], [90]):
        chunks, places = in_chunks(columns, texts, 256, 8)
        encoded = [row[mask.bool()].tolist() for chunk in chunks for row, mask in pairs_of(chunk)]
        assert len(encoded) == len(texts)
        assert [encoded[place] for place in places] == [tokens[text] for text in texts]
        chunks, places = in_chunks(columns, texts, 256, None)
        encoded = [
            chunk["input_ids"][0, start:end].tolist()
            for chunk in chunks
            for start, end in pairwise(chunk["cu_seq_lens_q"])
        ]
        assert [encoded[place] for place in places] == [tokens[text] for text in texts]
        assert all(chunk["input_ids"].numel() <= 256 or len(chunk["cu_seq_lens_q"]) == 2 for chunk in chunks)


def pairs_of(features):
    return zip(features["input_ids"], features["attention_mask"], strict=True)


def test_attention_is_plain_on_a_cpu_up_to_a_length_and_as_before_afterwards(small_bert):
    model = SentenceTransformer(str(small_bert), device="cpu")
    config = model.transformers_model.config
    for tokens, expected in ((512, "eager"), (513, "sdpa")):
        columns = [{"attention_mask": torch.ones(1, 4)}, {"attention_mask": torch.ones(1, tokens)}]
        with fitting_attention(model, columns, multiple=1):
            assert config._attn_implementation == expected
        assert config._attn_implementation == "sdpa"


@pytest.mark.parametrize("multiple", [1, None])
@pytest.mark.parametrize("share", [0.9, 1.0])
def test_with_gradient_checkpointing_gradients_are_the_same(small_bert, share, multiple):
    model = SentenceTransformer(str(small_bert), device="cpu").train()
    set_dropout(model, 0.0)
    loss = ChunkedRankingLoss(model, nullcontext(), multiple=multiple, gradient_share=share)
    rows = random_rows(0, 16)
    _, expected = loss_and_gradients(model, loss, rows)
    model.transformers_model.activation_checkpointing_enable()
    _, gradients = loss_and_gradients(model, loss, rows)
    assert distance(gradients, expected) < 1e-5


def test_chunks_of_multiples_have_few_shapes(small_bert):
    model = SentenceTransformer(str(small_bert), device="cpu")
    shapes = set()
    for seed in range(10):
        columns, _ = features_of(model, random_rows(seed, 48))
        chunks, _ = in_chunks(columns, list(range(96)), 512, 8)
        shapes |= {chunk["input_ids"].shape for chunk in chunks}
    whole = [(rows, length) for rows, length in shapes if length % 8 == 0 and rows == 512 // length]
    assert len(whole) > 10
    assert len(shapes) - len(whole) <= 30  # of each batch the last chunk of a column, and its longest text


def test_dropout_is_set_for_all_layers_and_the_models_own_is_kept(small_bert):
    model = SentenceTransformer(str(small_bert), device="cpu").train()
    features = model.preprocess(["chronic fever of the skin"])
    embed = lambda: model(dict(features))["sentence_embedding"]  # noqa: E731
    set_dropout(model, "model")
    assert not torch.equal(embed(), embed())
    set_dropout(model, 0.0)
    assert torch.equal(embed(), embed())


@pytest.mark.parametrize("kind", [*sorted(SWITCHABLE_MODELS), "mpnet"])
def test_a_text_that_holds_the_padding_token_is_encoded_as_by_the_library(small_bert, kind, monkeypatch):
    """RoBERTa's and MPNet's positions pass over it."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    model = random_model(small_bert, kind).to(torch.float64).eval()
    padding = model.tokenizer.convert_ids_to_tokens(model.transformers_model.config.pad_token_id)
    texts = [f"acute {padding} pain in the {padding} heart", "a broken bone of the upper hand"]
    expected = model.encode(texts, convert_to_tensor=True)
    with without_padding(model):
        assert torch.allclose(model.encode(texts, convert_to_tensor=True), expected, rtol=0, atol=1e-12)
