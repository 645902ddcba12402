"""A batch encoded in chunks of like length has the loss and the gradients of the library's own trainer."""

import random
from contextlib import nullcontext

import pytest
import torch
from datasets import Dataset
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer.data_collator import SentenceTransformerDataCollator
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from sentence_transformers.sentence_transformer.modules import Dense

from shared.by_length import ChunkedCollator, ChunkedRankingLoss, ChunkedTrainer, chunk_shape, rounded_up, split
from train import SYMMETRIC, set_dropout

HARDNESS = SYMMETRIC | {"hardness_mode": "in_batch_negatives", "hardness_strength": 5.0}
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


def loss_and_gradients(model, collator, loss, rows):
    """As the trainer has them."""
    features, labels = SentenceTransformerTrainer.collect_features(None, collator(rows))
    model.zero_grad()
    value = loss(features, labels)
    value.backward()
    return value.item(), {name: w.grad for name, w in model.named_parameters() if w.grad is not None}, features


def distance(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    """Norm of the difference of all gradients, as a share of the norm of theirs."""
    assert ours.keys() == theirs.keys()
    ours, theirs = (torch.cat([own[name].flatten() for name in sorted(own)]) for own in (ours, theirs))
    return ((ours - theirs).norm() / theirs.norm()).item()


@pytest.fixture(scope="module", params=[torch.float64, torch.float32], ids=["float64", "float32"])
def model(request, small_bert):
    model = SentenceTransformer(str(small_bert), device="cpu").to(request.param)
    set_dropout(model, 0.0)
    return model.train()


def check_same_as_the_librarys(model, rows, prompts, options):
    theirs = SentenceTransformerDataCollator(model.preprocess, prompts=prompts)
    loss, gradients, _ = loss_and_gradients(model, theirs, MultipleNegativesRankingLoss(model, **options), rows)
    rounding = 1e-12 if next(model.parameters()).dtype == torch.float64 else 1e-6
    for multiple in (1, 8):
        ours = ChunkedCollator(model.preprocess, prompts=prompts, chunk_tokens=256, multiple=multiple)
        our_loss, our_gradients, chunks = loss_and_gradients(
            model, ours, ChunkedRankingLoss(model, nullcontext(), **options), rows
        )
        assert len(chunks) > 8
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
    theirs = SentenceTransformerDataCollator(model.preprocess)
    _, exact, _ = loss_and_gradients(model, theirs, MultipleNegativesRankingLoss(model), rows)
    loss = ChunkedRankingLoss(model, torch.autocast("cpu", torch.bfloat16))
    for shape in ({"chunk_tokens": 256}, {"chunk_tokens": 256, "multiple": 8}):
        ours = ChunkedCollator(model.preprocess, **shape)
        _, gradients, _ = loss_and_gradients(model, ours, loss, rows)
        assert 1e-5 < distance(gradients, exact) < 2**-8


@pytest.mark.parametrize("in_bf16", [False, True])
def test_the_trainer_takes_the_chunks_of_its_precision_and_model(small_bert, static_model, tmp_path, in_bf16):
    arguments = SentenceTransformerTrainingArguments(str(tmp_path), bf16=in_bf16, use_cpu=True, report_to="none")
    narrow, static = (SentenceTransformer(str(folder), device="cpu") for folder in (small_bert, static_model))
    wide = SentenceTransformer(modules=[*narrow, Dense(32, 768)], device="cpu")
    for model, rounds_up in ((narrow, in_bf16), (static, False), (wide, False)):
        rows = Dataset.from_list(random_rows(0, 8))
        collator = ChunkedTrainer(model, arguments, rows, loss=ChunkedRankingLoss(model, nullcontext())).data_collator
        expected = chunk_shape(model, in_bf16)
        assert (collator.chunk_tokens, collator.multiple) == (expected["chunk_tokens"], expected["multiple"])
        assert (collator.multiple > 1) == (rounds_up and not torch.accelerator.is_available())


def test_static_word_vectors_train_the_same(static_model):
    model = SentenceTransformer(str(static_model), device="cpu")
    rows = random_rows(0, 16)
    theirs = SentenceTransformerDataCollator(model.preprocess)
    loss, gradients, _ = loss_and_gradients(model, theirs, MultipleNegativesRankingLoss(model), rows)
    ours = ChunkedRankingLoss(model, nullcontext())
    our_loss, our_gradients, _ = loss_and_gradients(model, ChunkedCollator(model.preprocess), ours, rows)
    assert our_loss == loss
    assert all(torch.equal(our_gradients[name], gradient) for name, gradient in gradients.items())


@pytest.mark.parametrize("multiple", [1, 8])
def test_chunks_hold_each_text_once_and_little_padding(multiple):
    dice = random.Random(0)
    lengths = [dice.randint(1, 250) for _ in range(256)]
    chunks = list(split(lengths, 512, multiple))
    assert sorted(place for chunk in chunks for place in chunk) == list(range(256))
    padded = [len(chunk) * rounded_up(max(lengths[place] for place in chunk), multiple) for chunk in chunks]
    assert max(padded) <= 512
    assert sum(padded) < 1.1 * sum(lengths)
    assert list(split([3, 900], 512, multiple)) == [[1], [0]]


def test_chunks_of_multiples_have_few_shapes(small_bert):
    model = SentenceTransformer(str(small_bert), device="cpu")
    collator = ChunkedCollator(model.preprocess, chunk_tokens=512, multiple=8)
    shapes = set()
    for seed in range(10):
        batch = collator(random_rows(seed, 48))
        shapes |= {value.shape for name, value in batch.items() if name.endswith("input_ids")}
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
