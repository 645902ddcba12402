"""In-batch negatives without the padding: the library's loss, over a batch that is encoded in chunks of like length.

The library pads each column of a batch to its longest text: at 128 pairs three of four tokens computed are padding. The
loss needs the embeddings of all texts of a batch at once, the encoder does not.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer
from sentence_transformers.sentence_transformer.data_collator import SentenceTransformerDataCollator
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from torch.nn.functional import embedding

PLAIN_ATTENTION_TOKENS = 512  # of the longest text for which a CPU takes plain attention


def chunk_shape(model: SentenceTransformer, in_bf16: bool) -> dict[str, int]:
    """The tokens of a chunk, padding included, and what its length is a multiple of: what trains fastest.

    Small chunks pad less, large ones fill a GPU. A processor compiles a product in bf16 for its shape when it meets it
    (2 to 9 ms for one of MiniLM's that then takes 0.4 ms), so there few lengths are better than little padding. Not so
    with the longer products of wider models: of mpnet (768 dimensions) a step of short texts took a quarter less time
    with less padding, one of texts of 60 tokens as long. Nor without a transformer: an LSTM takes no padding of all
    texts.
    """
    if torch.accelerator.is_available():
        return {"chunk_tokens": 16_384, "multiple": 1}
    is_narrow = model.transformers_model is not None and (model.get_embedding_dimension() or 0) < 768
    return {"chunk_tokens": 1_024, "multiple": 8} if in_bf16 and is_narrow else {"chunk_tokens": 512, "multiple": 1}


@dataclass
class ChunkedCollator(SentenceTransformerDataCollator):
    """Rows → chunks of each column's texts, tokenized.

    `label`, shape (columns, rows), is the place of each text among those of all chunks.
    """

    chunk_tokens: int = 512
    multiple: int = 1

    def __call__(self, rows: list[dict[str, str]]) -> dict[str, Any]:
        batch = super().__call__(rows)
        columns = list(rows[0])
        chunks, places = [], []
        for number, column in enumerate(columns):
            features = {name.removeprefix(f"{column}_"): batch[name] for name in batch if name.startswith(f"{column}_")}
            if "attention_mask" in features:
                lengths = features["attention_mask"].sum(dim=1).tolist()
                parts = list(split(lengths, self.chunk_tokens, self.multiple))
                chunks += [cut(features, torch.tensor(part), self.multiple) for part in parts]
            else:  # nothing is padded: static word vectors, or texts that lie in one row
                parts = [range(len(rows))]
                chunks += [features]
            places += [number * len(rows) + row for part in parts for row in part]
        # The names by which the trainer knows which tensors go together.
        named = {f"chunk{n}_{name}": value for n, chunk in enumerate(chunks) for name, value in chunk.items()}
        return named | {"label": torch.tensor(places).argsort().view(len(columns), len(rows))}


def split(lengths: list[int], tokens: int, multiple: int) -> Iterator[list[int]]:
    """Places of texts in chunks of at most `tokens` once padded to a multiple (or of one text).

    Long texts first, so that the length of a chunk says how many it has, and there are few shapes.
    """
    places = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)
    while places:
        count = max(1, tokens // rounded_up(max(1, lengths[places[0]]), multiple))
        yield places[:count]
        places = places[count:]


def rounded_up(length: int, multiple: int) -> int:
    return length + -length % multiple


def cut(features: dict[str, Any], rows: torch.Tensor, multiple: int) -> dict[str, Any]:
    """These rows, of the positions at which all of them are padded only those that make up a multiple, if any do."""
    mask = features["attention_mask"]
    used = mask[rows].any(dim=0)
    length = rounded_up(max(1, int(used.sum())), multiple)
    kept = used.int().argsort(descending=True, stable=True)[:length].sort().values
    own = dict(features)
    for name, value in features.items():
        if isinstance(value, torch.Tensor) and len(value) == len(mask):
            own[name] = value[rows][:, kept] if value.shape == mask.shape else value[rows]
    return own


class ChunkedRankingLoss(MultipleNegativesRankingLoss):
    """MultipleNegativesRankingLoss of what `ChunkedCollator` gives: same loss, same gradients, up to rounding.

    In bf16 a chunk's gradients are rounded too: on 48 MONDO pairs they were 1.34% off those of float32, the library's
    1.31%.
    """

    def __init__(self, model: SentenceTransformer, precision: AbstractContextManager, **options: Any) -> None:
        super().__init__(model, **options)
        self.precision = precision

    def forward(self, sentence_features: list[dict[str, Any]], labels: torch.Tensor) -> torch.Tensor:
        # One `precision` (autocast) around all chunks, so that each weight is rounded once a batch.
        with self.precision, words_looked_up_once(extract_model_from_parallel(self.model), sentence_features):
            encoded = [self.model(chunk)["sentence_embedding"] for chunk in sentence_features]
        return self.compute_loss_from_embeddings(list(torch.cat(encoded)[labels]), labels)


def words_looked_up_once(model: SentenceTransformer, chunks: list[dict[str, Any]]) -> AbstractContextManager:
    """The context in which the model takes the chunks' word vectors from those of the whole batch, if it has any.

    Each lookup's gradient is as large as the vocabulary. One a chunk of 512 tokens, and not one a batch, made a step of
    MiniLM on two cores 3 (fp32) to 14% (bf16) longer.
    """
    transformer = model.transformers_model
    try:
        table = transformer.get_input_embeddings() if transformer else None
    except NotImplementedError:
        return nullcontext()
    if not isinstance(table, torch.nn.Embedding) or not all("input_ids" in chunk for chunk in chunks):
        return nullcontext()
    used = torch.cat([chunk["input_ids"].flatten() for chunk in chunks]).unique()
    used = used[used < table.num_embeddings]  # a router's other model may have more words
    words = table(used)
    return table.register_forward_hook(lambda _, ids, __: embedding(torch.searchsorted(used, *ids), words))


@contextmanager
def plain_attention(model: SentenceTransformer) -> Iterator[None]:
    """Torch's fused attention, on a CPU, goes backward on short texts several times slower than the plain one."""
    transformer = model.transformers_model
    usual = transformer.config._attn_implementation
    transformer.set_attn_implementation("eager")
    try:
        yield
    finally:
        transformer.set_attn_implementation(usual)


class ChunkedTrainer(SentenceTransformerTrainer):
    """The library's trainer for `ChunkedRankingLoss`."""

    data_collator_class = ChunkedCollator

    def get_data_collator(self, model: Any, args: Any, *arguments: Any, **options: Any) -> ChunkedCollator:
        collator = super().get_data_collator(model, args, *arguments, **options)
        return replace(collator, **chunk_shape(model, args.bf16))

    def training_step(self, model: torch.nn.Module, inputs: dict[str, Any], *arguments: Any) -> torch.Tensor:
        # Plain attention keeps length x length weights: for long texts the fused one.
        longest = max((value.shape[-1] for name, value in inputs.items() if name.endswith("_input_ids")), default=0)
        on_cpu = self.model.device.type == "cpu" and self.model.transformers_model is not None
        with plain_attention(self.model) if on_cpu and longest <= PLAIN_ATTENTION_TOKENS else nullcontext():
            return super().training_step(model, inputs, *arguments)
