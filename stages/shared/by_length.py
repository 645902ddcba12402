"""In-batch negatives without the padding: the library's loss, over a batch that is encoded in chunks of like length.

The library pads each column of a batch to its longest text: at 128 pairs three of four tokens computed are padding. The
loss needs the embeddings of all texts of a batch at once, the encoder does not. Nor does it need padding where its
texts can lie end to end in one row, of which only attention has to know where one ends.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from itertools import accumulate, groupby, takewhile
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from sentence_transformers.util import all_gather
from torch.nn.functional import embedding, pad, scaled_dot_product_attention
from transformers import AttentionInterface, MPNetModel, PreTrainedModel

CHUNK_TOKENS = 512  # of a padded chunk, padding included
PLAIN_ATTENTION_TOKENS = 512  # of the longest text for which a CPU takes plain attention
WITHIN_TEXTS = "within_texts"  # our attention's name among the library's
# Every token attends to all of its text, and positions and attention come from outside.
SWITCHABLE_MODELS = {"bert", "distilbert", "roberta", "xlm-roberta"}


def chunk_shape(model: SentenceTransformer, in_bf16: bool) -> dict[str, int | None]:
    """The tokens of a chunk, padding included, and what its length is a multiple of: what trains fastest.

    No multiple (None) is for texts end to end in one row, without padding: on a processor, in fp32, the forward pass
    took 0.62 to 0.88 (MiniLM) and 0.80 times (mpnet) as long as in padded chunks of 512 tokens, forward and backward
    0.63 to 0.90 and 0.73 to 0.77 times. Not measured in bf16.

    Small chunks pad less, large ones fill a GPU. A processor compiles a product in bf16 for its shape when it meets it
    (2 to 9 ms for one of MiniLM's that then takes 0.4 ms), so there few lengths are better than little padding. Not so
    with the longer products of wider models: of mpnet (768 dimensions) a step of short texts took a quarter less time
    with less padding, one of texts of 60 tokens as long. Nor without a transformer: an LSTM takes no padding of all
    texts.
    """
    if torch.accelerator.is_available():
        return {"chunk_tokens": 16_384, "multiple": 1}
    if not in_bf16 and takes_end_to_end(model):
        return {"chunk_tokens": 2_048, "multiple": None}
    is_narrow = model.transformers_model is not None and (model.get_embedding_dimension() or 0) < 768
    if in_bf16 and is_narrow:
        return {"chunk_tokens": 1_024, "multiple": 8}
    return {"chunk_tokens": CHUNK_TOKENS, "multiple": 1}


def takes_end_to_end(model: SentenceTransformer) -> bool:
    encoder, *after = model
    if not isinstance(encoder, Transformer) or not any(isinstance(module, Pooling) for module in after[:1]):
        return False
    config = encoder.model.config
    if config.model_type in SWITCHABLE_MODELS and not getattr(config, "is_decoder", False):
        return encoder.model._can_set_attn_implementation()  # else it stays as it is, with a warning
    return is_mpnet(encoder.model)


def is_mpnet(transformer: PreTrainedModel) -> bool:
    return isinstance(getattr(transformer, "base_model", None), MPNetModel)


class ChunkedRankingLoss(MultipleNegativesRankingLoss):
    """MultipleNegativesRankingLoss, of which the encoder runs on chunks of texts of like length.

    With a `gradient_share` of 1 its gradients are the library's, up to rounding. In bf16 a chunk's gradients are
    rounded too: on 48 MONDO pairs they were 1.34% off those of float32, the library's 1.31%. A `multiple` of None is
    for models of which `takes_end_to_end` is true.

    With a smaller one the encoder goes backward only for the texts that have this share of the squared gradient at the
    embeddings, as few as do: at 0.95 a quarter of them, late in training. Which they are is known once all are encoded,
    so those are encoded again (as in GradCache, Gao et al. 2021; the idea is Selective-Backprop's, Jiang et al. 2019).
    Where texts lie end to end, linear layers then take their outputs from the first time, which made a step of MiniLM 7
    to 17%, one of mpnet 15 to 20% shorter. With dropout, the second time it draws anew, and nothing is taken.
    """

    def __init__(
        self,
        model: SentenceTransformer,
        precision: AbstractContextManager,
        *,
        chunk_tokens: int = CHUNK_TOKENS,
        multiple: int | None = 1,
        gradient_share: float = 1.0,
        **options: Any,
    ) -> None:
        super().__init__(model, **options)
        self.precision = precision
        self.chunk_tokens, self.multiple = chunk_tokens, multiple
        self.gradient_share = gradient_share

    def forward(self, sentence_features: list[dict[str, Any]], labels: torch.Tensor | None) -> torch.Tensor:
        columns = list(sentence_features)
        # Without a mask nothing is padded: static word vectors, or texts that lie in one row.
        if not all("attention_mask" in features for features in columns):
            return super().forward(columns, labels)
        texts = torch.arange(sum(len(features["attention_mask"]) for features in columns))
        if self.gradient_share == 1 or not torch.is_grad_enabled():
            return self.loss_of(self.encode(columns, texts), columns, labels)
        model = extract_model_from_parallel(self.model)
        _, multiple = self.shape_for(columns)
        is_repeatable = multiple is None and not draws_dropout(model)
        with torch.no_grad(), outputs_noted(linear_layers(model) if is_repeatable else []) as outputs:
            embeddings = self.encode(columns, texts)
        embeddings = embeddings.to(torch.promote_types(embeddings.dtype, torch.float32)).requires_grad_()
        loss = self.loss_of(embeddings, columns, labels)
        (gradient,) = torch.autograd.grad(loss, embeddings)
        squares = gradient.square().sum(dim=1)
        of_all_processes = all_gather(squares) if self.gather_across_devices else squares
        # On the CPU: a GPU's cumulative sum is not the same at each run.
        kept = steep(squares.cpu(), of_all_processes.cpu(), self.gradient_share)
        # The loss's value, and by the chain rule its gradient, through the kept texts.
        with outputs_known(outputs, tokens_end_to_end(columns, kept)) if is_repeatable else nullcontext():
            through = (self.encode(columns, kept) * gradient[kept]).sum()
        return loss.detach() + through - through.detach()

    def encode(self, columns: list[dict[str, Any]], texts: torch.Tensor) -> torch.Tensor:
        """Embeddings of these texts, shape (texts, dimensions); numbers, ascending, go on from column to column."""
        model = extract_model_from_parallel(self.model)
        tokens, multiple = self.shape_for(columns)
        chunks, places = in_chunks(columns, texts.tolist(), tokens, multiple)
        if multiple is None:
            # RoBERTa's and MPNet's first position is the number after that of its padding.
            first = 1 + getattr(model.transformers_model.base_model.embeddings, "padding_idx", -1)
            chunks = [chunk | {"position_ids": chunk["position_ids"] + first} for chunk in chunks]
        # One `precision` (autocast) around all chunks, so that each weight is rounded once.
        with self.precision, fitting_attention(model, columns, multiple), words_looked_up_once(model, chunks):
            return torch.cat([self.model(chunk)["sentence_embedding"] for chunk in chunks])[places]

    def shape_for(self, columns: list[dict[str, Any]]) -> tuple[int, int | None]:
        """Tokens of a chunk and the multiple: padded where this batch or model does not take texts end to end."""
        if self.multiple is None and (
            goes_forward_twice(extract_model_from_parallel(self.model))
            or not all(features["attention_mask"].any(dim=1).all() for features in columns)
        ):
            return CHUNK_TOKENS, 1
        return self.chunk_tokens, self.multiple

    def loss_of(self, embeddings: torch.Tensor, columns: list, labels: torch.Tensor | None) -> torch.Tensor:
        return self.compute_loss_from_embeddings(list(embeddings.chunk(len(columns))), labels)


def steep(squares: torch.Tensor, of_all_processes: torch.Tensor, share: float) -> torch.Tensor:
    """This process's texts, ascending, of the fewest that have `share` of the sum of all squares; one at least.

    `squares`: of each text's gradient, shape (texts,). Where one is not a number all are kept, and the trainer sees it.
    """
    ascending = of_all_processes.sort().values
    left_out = ascending[:-1].cumsum(dim=0) < (1 - share) * ascending.sum()
    least = torch.minimum(ascending[left_out.sum()], squares.max())
    return (~(squares < least)).nonzero().flatten()


def linear_layers(model: SentenceTransformer) -> list[torch.nn.Linear]:
    return [module for module in model.transformers_model.modules() if isinstance(module, torch.nn.Linear)]


def draws_dropout(model: SentenceTransformer) -> bool:
    return any(module.p for module in model.modules() if isinstance(module, torch.nn.Dropout))


@contextmanager
def outputs_noted(layers: list[torch.nn.Linear]) -> Iterator[dict[torch.nn.Linear, list[torch.Tensor]]]:
    """What these layers give for each chunk that is encoded meanwhile, shape (1, tokens, width)."""
    outputs: dict[torch.nn.Linear, list[torch.Tensor]] = {}

    def note(layer: torch.nn.Linear, _: tuple, output: torch.Tensor) -> None:
        if output.ndim == 3:  # a pooler's has one row a chunk, and nothing uses it
            outputs.setdefault(layer, []).append(output)

    hooks = [layer.register_forward_hook(note) for layer in layers]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def outputs_known(outputs: dict[torch.nn.Linear, list[torch.Tensor]], is_kept: torch.Tensor) -> Iterator[None]:
    """The layers take the kept tokens' outputs, in order, from those noted, of which the rest is freed.

    `is_kept`: of each token of all chunks, shape (tokens,).
    """

    def forward(layer: torch.nn.Linear, left: list[torch.Tensor], inputs: torch.Tensor) -> torch.Tensor:
        tokens = inputs.shape[1]
        output, left[0] = left[0].split([tokens, left[0].shape[1] - tokens], dim=1)
        return KnownOutput.apply(inputs, layer.weight, layer.bias, output)

    try:
        for layer, chunks in outputs.items():
            masks = is_kept.split([chunk.shape[1] for chunk in chunks])
            chunks[:] = [torch.cat([chunk[:, mask] for chunk, mask in zip(chunks, masks, strict=True)], dim=1)]
            layer.forward = partial(forward, layer, chunks)
        yield
    finally:
        for layer in outputs:
            vars(layer).pop("forward", None)


class KnownOutput(torch.autograd.Function):
    """A linear layer's output, which was computed before, with the layer's gradients."""

    @staticmethod
    def forward(
        ctx: Any, inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, output: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(inputs, weight)
        return output.detach()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        inputs, weight = ctx.saved_tensors
        of_inputs, of_weight, of_bias, _ = ctx.needs_input_grad
        rows = gradient.flatten(0, -2)
        # In the gradient's precision: autocast's, where there is any.
        return (
            gradient @ weight.to(gradient.dtype) if of_inputs else None,
            rows.T @ inputs.flatten(0, -2).to(gradient.dtype) if of_weight else None,
            rows.sum(dim=0) if of_bias else None,
            None,
        )


def tokens_end_to_end(columns: list[dict[str, Any]], kept: torch.Tensor) -> torch.Tensor:
    """Which tokens are the kept texts', shape (tokens,), where all texts lie end to end."""
    lengths = [(text, length) for own in lengths_of(columns) for text, length in longest_first(own)]
    texts, tokens = torch.tensor(lengths).unbind(dim=1)
    return torch.isin(texts, kept).repeat_interleave(tokens)


def in_chunks(
    columns: list[dict[str, Any]], texts: list[int], tokens: int, multiple: int | None
) -> tuple[list[dict[str, Any]], torch.Tensor]:
    """Tokenized texts in chunks of like length; and the place of each among those of all chunks, shape (texts,)."""
    chunks, order, first = [], [], 0
    for features, lengths in zip(columns, lengths_of(columns), strict=True):
        for part in split({text: lengths[text] for text in texts if text in lengths}, tokens, multiple):
            rows = torch.tensor(part) - first
            chunks.append(end_to_end(features, rows) if multiple is None else cut(features, rows, multiple))
            order += part
        first += len(lengths)
    return chunks, torch.tensor(order).argsort()


def lengths_of(columns: list[dict[str, Any]]) -> list[dict[int, int]]:
    """Tokens of each text by its number, which goes on from column to column."""
    lengths = [features["attention_mask"].sum(dim=1).tolist() for features in columns]
    firsts = accumulate(map(len, lengths), initial=0)
    return [dict(enumerate(own, first)) for own, first in zip(lengths, firsts, strict=False)]


def longest_first(lengths: dict[int, int]) -> list[tuple[int, int]]:
    return sorted(lengths.items(), key=lambda text: text[1], reverse=True)


def split(lengths: dict[int, int], tokens: int, multiple: int | None) -> Iterator[list[int]]:
    """Texts (keys of `lengths`) in chunks of at most `tokens` once padded to a multiple, if to any (or of one text).

    Long texts first, so that the length of a chunk says how many it has, and there are few shapes.
    """
    texts = longest_first(lengths)
    while texts:
        if multiple is None:
            totals = accumulate(length for _, length in texts)
            count = len(list(takewhile(lambda total: total <= tokens, totals)))
        else:
            count = tokens // rounded_up(max(1, texts[0][1]), multiple)
        yield [text for text, _ in texts[: max(1, count)]]
        texts = texts[max(1, count) :]


def rounded_up(length: int, multiple: int) -> int:
    return length + -length % multiple


def cut(features: dict[str, Any], rows: torch.Tensor, multiple: int) -> dict[str, Any]:
    """These rows, of the positions at which all of them are padded only those that make up a multiple, if any do."""
    mask = features["attention_mask"]
    used = mask[rows].any(dim=0)
    length = rounded_up(max(1, int(used.sum())), multiple)
    kept = used.int().argsort(descending=True, stable=True)[:length].sort().values
    return of_rows(features, rows, lambda tokens: tokens[:, kept])


def end_to_end(features: dict[str, Any], rows: torch.Tensor) -> dict[str, Any]:
    """These rows as one without padding, by the names that the library gives that where it has flash attention."""
    used = features["attention_mask"][rows].bool()
    own = of_rows(features, rows, lambda tokens: tokens[used][None])
    del own["attention_mask"]
    return own | {
        "position_ids": (used.cumsum(dim=1) - 1)[used][None],
        "cu_seq_lens_q": pad(used.sum(dim=1).cumsum(dim=0), (1, 0)),
    }


def of_rows(
    features: dict[str, Any], rows: torch.Tensor, of_tokens: Callable[[torch.Tensor], torch.Tensor]
) -> dict[str, Any]:
    """These rows of each tensor that has one a text, and `of_tokens` of those with a value for each token."""
    shape = features["attention_mask"].shape
    own = dict(features)
    for name, value in features.items():
        if isinstance(value, torch.Tensor) and len(value) == shape[0]:
            own[name] = of_tokens(value[rows]) if value.shape == shape else value[rows]
    return own


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


def fitting_attention(
    model: SentenceTransformer, columns: list[dict[str, Any]], multiple: int | None
) -> AbstractContextManager:
    """Attention within texts where they lie end to end; else, on a CPU, the plain one if texts are short.

    Torch's fused one goes backward on them several times slower. The plain one keeps length x length weights: long ones
    are left to the fused, as are all if the backward pass repeats the forward one, outside this context.
    """
    transformer = model.transformers_model
    if multiple is None:
        return mpnet_within_texts(model) if is_mpnet(transformer) else switched(transformer, WITHIN_TEXTS)
    longest = max(features["attention_mask"].shape[1] for features in columns)
    fits = model.device.type == "cpu" and longest <= PLAIN_ATTENTION_TOKENS
    if transformer is None or not fits or goes_forward_twice(model):
        return nullcontext()
    return switched(transformer, "eager")


@contextmanager
def switched(transformer: PreTrainedModel, attention: str) -> Iterator[None]:
    usual = transformer.config._attn_implementation
    transformer.set_attn_implementation(attention)
    try:
        yield
    finally:
        transformer.set_attn_implementation(usual)


@torch.compiler.disable  # it would compile for each list of lengths
def attention_within_texts(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: None,
    *,
    cu_seq_lens_q: torch.Tensor,
    scaling: float,
    dropout: float = 0.0,
    bias: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of texts end to end, those of a length at once; of shape (1, tokens, heads, size of a head).

    `query`, `key`, `value`: of shape (1, heads, tokens, size of a head). `cu_seq_lens_q`: where texts begin and end.
    `bias`: of positions, shape (heads, 1, longest, longest).
    """
    like = [(length, len(list(texts))) for length, texts in groupby(cu_seq_lens_q.diff().tolist())]
    tokens = [length * texts for length, texts in like]
    parts = zip(*(tensor[0].split(tokens, dim=1) for tensor in (query, key, value)), strict=True)
    attended = []
    for (length, texts), part in zip(like, parts, strict=True):
        q, k, v = (tensor.unflatten(1, (texts, length)) for tensor in part)
        of_positions = None if bias is None else bias[..., :length, :length]
        if length > PLAIN_ATTENTION_TOKENS:
            own = scaled_dot_product_attention(q, k, v, attn_mask=of_positions, dropout_p=dropout, scale=scaling)
        else:
            scores = q * scaling @ k.transpose(-1, -2)
            weights = (scores if bias is None else scores + of_positions).softmax(dim=-1)
            own = torch.dropout(weights, dropout, train=True) @ v
        attended.append(own.flatten(1, 2))
    return torch.cat(attended, dim=1).transpose(0, 1)[None], None


AttentionInterface.register(WITHIN_TEXTS, attention_within_texts)


@contextmanager
def mpnet_within_texts(model: SentenceTransformer) -> Iterator[None]:
    """MPNet's layers have their attention built in, and are not told where texts end: their `forward` is ours here.

    Its bias goes by how far two tokens are apart, so that a text's is the beginning of the longest's.
    """
    chunk: dict[str, Any] = {}
    encoder = model.transformers_model.base_model.encoder
    layers = [layer.attention.attn for layer in encoder.layer]
    bias_of = encoder.compute_position_bias

    def bias_of_longest(hidden: torch.Tensor) -> torch.Tensor:
        return bias_of(hidden[:, : chunk["cu_seq_lens_q"].diff().max()]).transpose(0, 1)

    def forward(layer: torch.nn.Module, hidden: torch.Tensor, _: None, bias: torch.Tensor, **__: Any) -> tuple:
        heads = layer.num_attention_heads
        query, key, value = (
            linear(hidden).unflatten(-1, (heads, -1)).transpose(1, 2) for linear in (layer.q, layer.k, layer.v)
        )
        attended, weights = attention_within_texts(
            layer,
            query,
            key,
            value,
            None,
            cu_seq_lens_q=chunk["cu_seq_lens_q"],
            scaling=layer.attention_head_size**-0.5,
            dropout=layer.dropout.p if layer.training else 0.0,
            bias=bias,
        )
        return layer.o(attended.flatten(2)), weights

    hook = model.register_forward_pre_hook(lambda _, inputs: chunk.update(inputs[0]))
    encoder.compute_position_bias = bias_of_longest
    for layer in layers:
        layer.forward = partial(forward, layer)
    try:
        yield
    finally:
        hook.remove()
        del encoder.compute_position_bias
        for layer in layers:
            del layer.forward


def goes_forward_twice(model: SentenceTransformer) -> bool:
    """Gradient checkpointing: the second time in the backward pass, outside the contexts of `encode`."""
    return getattr(model.transformers_model, "is_activation_checkpointing", False)
