"""In-batch negatives without the padding: the library's loss, over a batch that is encoded in chunks of like length.

The library pads each column of a batch to its longest text: at 128 pairs three of four tokens computed are padding. The
loss needs the embeddings of all texts of a batch at once, the encoder does not.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer
from sentence_transformers.sentence_transformer.data_collator import SentenceTransformerDataCollator
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from torch.nn.functional import embedding

# Tokens of a chunk, padding included. On two cores 256 to 2,048 differ by less than the noise: smaller ones pad less,
# larger ones fill the processor better. A GPU needs more to be filled.
CPU_TOKENS, GPU_TOKENS = 512, 16_384


@dataclass
class ChunkedCollator(SentenceTransformerDataCollator):
    """Rows → chunks of each column's texts, tokenized.

    `label`, shape (columns, rows), is the place of each text among those of all chunks.
    """

    chunk_tokens: int = GPU_TOKENS if torch.accelerator.is_available() else CPU_TOKENS

    def __call__(self, rows: list[dict[str, str]]) -> dict[str, Any]:
        batch = super().__call__(rows)
        columns = list(rows[0])
        chunks, places = [], []
        for number, column in enumerate(columns):
            features = {name.removeprefix(f"{column}_"): batch[name] for name in batch if name.startswith(f"{column}_")}
            if "attention_mask" in features:
                lengths = features["attention_mask"].sum(dim=1).tolist()
                parts = list(split(lengths, self.chunk_tokens))
                chunks += [cut(features, torch.tensor(part)) for part in parts]
            else:  # nothing is padded: static word vectors, or texts that lie in one row
                parts = [range(len(rows))]
                chunks += [features]
            places += [number * len(rows) + row for part in parts for row in part]
        # The names by which the trainer knows which tensors go together.
        named = {f"chunk{n}_{name}": value for n, chunk in enumerate(chunks) for name, value in chunk.items()}
        return named | {"label": torch.tensor(places).argsort().view(len(columns), len(rows))}


def split(lengths: list[int], tokens: int) -> Iterator[list[int]]:
    """Places of texts, short ones first, in chunks of at most `tokens` once padded (or of one text)."""
    chunk: list[int] = []
    for place in sorted(range(len(lengths)), key=lengths.__getitem__):
        if chunk and lengths[place] * (len(chunk) + 1) > tokens:
            yield chunk
            chunk = []
        chunk.append(place)
    yield chunk


def cut(features: dict[str, Any], rows: torch.Tensor) -> dict[str, Any]:
    """These rows, without the positions at which all of them are padded."""
    mask = features["attention_mask"]
    used = mask[rows].any(dim=0)
    own = dict(features)
    for name, value in features.items():
        if isinstance(value, torch.Tensor) and name != "prompt_length" and len(value) == len(mask):
            own[name] = value[rows][:, used] if value.shape == mask.shape else value[rows]
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

    Each lookup's gradient is as large as the vocabulary. One a chunk, and not one a batch, made a step of MiniLM on two
    cores 3 (fp32) to 14% (bf16) longer.
    """
    try:
        table = model.transformers_model.get_input_embeddings()
    except (AttributeError, NotImplementedError):  # no transformer, or one that does not read words
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

    def training_step(self, model: torch.nn.Module, inputs: dict[str, Any], *arguments: Any) -> torch.Tensor:
        # Plain attention keeps length x length weights: for long texts the fused one.
        longest = max(value.shape[-1] for name, value in inputs.items() if name.endswith("_input_ids"))
        on_cpu = self.model.device.type == "cpu" and self.model.transformers_model is not None
        with plain_attention(self.model) if on_cpu and longest <= CPU_TOKENS else nullcontext():
            return super().training_step(model, inputs, *arguments)
