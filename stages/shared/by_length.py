"""Texts encoded in chunks of like length, with little padding or none: in training, and wherever a model is scored.

The library pads the texts that it encodes at once to the longest of them: of a batch of 128 pairs in training, three of
four tokens computed are padding. Chunks of like length have little; and none is needed where texts can lie end to end
in one row, of which only attention has to know where one ends.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from itertools import accumulate, groupby, takewhile
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from torch.nn.functional import embedding, pad, scaled_dot_product_attention
from transformers import AttentionInterface, MPNetModel, PreTrainedModel

CHUNK_TOKENS = 512  # of a padded chunk, padding included
PLAIN_ATTENTION_TOKENS = 512  # of the longest text for which a CPU takes plain attention
WITHIN_TEXTS = "within_texts"  # our attention's name among the library's
# Every token attends to all of its text, and positions and attention come from outside.
SWITCHABLE_MODELS = {"bert", "distilbert", "roberta", "xlm-roberta"}


def chunk_shape(model: SentenceTransformer, in_bf16: bool) -> dict[str, int | None]:
    """The tokens of a chunk, padding included, and what its length is a multiple of: what is fastest in training.

    No multiple (None) is for texts end to end in one row, without padding: on a processor, in fp32, the forward pass
    took 0.62 to 0.88 (MiniLM) and 0.80 times (mpnet) as long as in padded chunks of 512 tokens, forward and backward
    0.63 to 0.90 and 0.73 to 0.77 times.

    Small chunks pad less, large ones fill a GPU. A processor compiles a product in bf16 for its shape when it meets it
    (2 to 9 ms for one of MiniLM's that then takes 0.4 ms). End to end, long rows are therefore the better ones: a step
    took 0.76 to 0.80 (MiniLM) and 0.71 to 0.78 times (mpnet) as long as padded, with rows of 2,048 tokens 0.83 to 0.86
    and 0.76 to 0.83. Padded, few lengths are better than little padding. Not so with the longer products of wider
    models: of mpnet (768 dimensions) a step of short texts took a quarter less time with less padding, one of texts of
    60 tokens as long. Nor without a transformer: an LSTM takes no padding of all texts.
    """
    if torch.accelerator.is_available():
        return {"chunk_tokens": 16_384, "multiple": 1}
    if takes_end_to_end(model):
        return {"chunk_tokens": 4_096 if in_bf16 else 2_048, "multiple": None}
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


@contextmanager
def without_padding(model: SentenceTransformer) -> Iterator[None]:
    """The context in which `model.encode`, of sentence embeddings, lays a batch's texts end to end where training does.

    They differ by rounding. (Where a BERT's tokenizer pads on the left, the library counts a text's positions from the
    padding on; here they are the text's own.) On two cores it took 0.69 to 0.85 (MiniLM) and 0.49 to 0.55 times (mpnet)
    as long in fp32, 0.74 to 0.91 and 0.42 to 0.57 times in bf16.
    """
    shape = chunk_shape(model, torch.is_autocast_enabled("cpu"))
    if shape["multiple"] is not None:
        yield
        return
    padded, own = model.forward, vars(model).get("forward")  # its own where accelerate has put one around the class's

    def forward(features: dict[str, Any], **options: Any) -> dict[str, Any]:
        if "attention_mask" not in features:
            return padded(features, **options)
        texts = range(len(features["attention_mask"]))
        return {"sentence_embedding": embed(model, partial(padded, **options), [features], texts, **shape)}

    model.forward = forward
    try:
        yield
    finally:
        del model.forward
        if own:
            model.forward = own


def embed(
    model: SentenceTransformer,
    run: Callable[[dict[str, Any]], dict[str, Any]],
    columns: list[dict[str, Any]],
    texts: Sequence[int],
    chunk_tokens: int,
    multiple: int | None,
) -> torch.Tensor:
    """Embeddings of these texts, shape (texts, dimensions); numbers, ascending, go on from column to column.

    `run` is the model, or what stands around it in training.
    """
    chunk_tokens, multiple = shape_for(model, columns, chunk_tokens, multiple)
    chunks, places = in_chunks(columns, texts, chunk_tokens, multiple)
    if multiple is None:
        # RoBERTa's and MPNet's first position is the number after that of its padding.
        first = 1 + getattr(model.transformers_model.base_model.embeddings, "padding_idx", -1)
        chunks = [chunk | {"position_ids": chunk["position_ids"] + first} for chunk in chunks]
    with fitting_attention(model, columns, multiple), words_looked_up_once(model, chunks):
        return torch.cat([run(dict(chunk))["sentence_embedding"] for chunk in chunks])[places]


def shape_for(
    model: SentenceTransformer, columns: list[dict[str, Any]], chunk_tokens: int, multiple: int | None
) -> tuple[int, int | None]:
    """This shape of chunks, but padded where this batch or model does not take texts end to end."""
    if multiple is None and (goes_forward_twice(model) or any(map(partial(has_odd_text, model), columns))):
        return CHUNK_TOKENS, 1
    return chunk_tokens, multiple


def has_odd_text(model: SentenceTransformer, features: dict[str, Any]) -> bool:
    """One without tokens; or, in RoBERTa and MPNet, with a padding token of its own, which positions do not count."""
    attended = features["attention_mask"].bool()
    padding = getattr(model.transformers_model.base_model.embeddings, "padding_idx", -1)
    return not attended.any(dim=1).all() or bool((attended & (features["input_ids"] == padding)).any())


def in_chunks(
    columns: list[dict[str, Any]], texts: Sequence[int], tokens: int, multiple: int | None
) -> tuple[list[dict[str, Any]], torch.Tensor]:
    """Tokenized texts in chunks of like length; and the place of each among those of all chunks, shape (texts,)."""
    chunks, order = [], []
    for features, lengths in zip(columns, lengths_of(columns), strict=True):
        for part in split({text: lengths[text] for text in texts if text in lengths}, tokens, multiple):
            rows = torch.tensor(part) - min(lengths)
            chunks.append(end_to_end(features, rows) if multiple is None else cut(features, rows, multiple))
            order += part
    return chunks, torch.tensor(order).argsort()


def lengths_of(columns: list[dict[str, Any]]) -> list[dict[int, int]]:
    """Tokens of each text by its number, which goes on from column to column."""
    lengths = [features["attention_mask"].sum(dim=1).tolist() for features in columns]
    firsts = accumulate(map(len, lengths[:-1]), initial=0)
    return [dict(enumerate(own, first)) for own, first in zip(lengths, firsts, strict=True)]


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
    if model.transformers_model is None or not torch.is_grad_enabled():
        return nullcontext()
    try:
        table = model.transformers_model.get_input_embeddings()
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
    # At least in float32: in bf16 a processor would compile the products of each length and number of texts.
    exact = torch.promote_types(query.dtype, torch.float32)
    parts = zip(*(tensor[0].to(exact).split(tokens, dim=1) for tensor in (query, key, value)), strict=True)
    attended = []
    with torch.autocast(query.device.type, enabled=False):
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
    return torch.cat(attended, dim=1).transpose(0, 1)[None].to(query.dtype), None


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

    hook = model[0].register_forward_pre_hook(lambda _, inputs: chunk.update(inputs[0]))
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
    """Gradient checkpointing: the second time in the backward pass, outside the contexts of `embed`."""
    return getattr(model.transformers_model, "is_activation_checkpointing", False)
