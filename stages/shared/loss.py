"""In-batch negatives without the padding: the library's loss, over a batch that is encoded in chunks of like length.

The loss needs the embeddings of all texts of a batch at once, the encoder does not.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from sentence_transformers.util import all_gather

from shared.by_length import CHUNK_TOKENS, embed, lengths_of, longest_first, shape_for


class ChunkedRankingLoss(MultipleNegativesRankingLoss):
    """MultipleNegativesRankingLoss, of which the encoder runs on chunks of texts of like length.

    With a `gradient_share` of 1 its gradients are the library's, up to rounding: in bf16 they were 1.4% (48 MONDO
    pairs) and 1.2% (HPO) off those of float32, the library's 4.9 and 2.5%. A `multiple` of None is for models of which
    `takes_end_to_end` is true.

    With a smaller one the encoder goes backward only for the texts that have this share of the squared gradient at the
    embeddings, as few as do: at 0.95 a quarter of them, late in training. Which they are is known once all are encoded,
    so those are encoded again (as in GradCache, Gao et al. 2021; the idea is Selective-Backprop's, Jiang et al. 2019).
    Where texts lie end to end, linear layers then take their outputs from the first time, which made a step of MiniLM 7
    to 17%, one of mpnet 15 to 20% shorter in fp32, and MiniLM's no longer or shorter in bf16. With dropout, the second
    time it draws anew, and nothing is taken.
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
        _, multiple = shape_for(model, columns, self.chunk_tokens, self.multiple)
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
        with self.precision:  # one (autocast) around all chunks, so that each weight is rounded once
            return embed(model, self.model, columns, texts.tolist(), self.chunk_tokens, self.multiple)

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
