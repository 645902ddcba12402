"""Sentence encoders from a folder; `shared.sources.model_folder` turns a model's name into one."""

import ctypes
from collections.abc import Iterator
from pathlib import Path

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Transformer
from transformers import PreTrainedTokenizerBase
from transformers.tokenization_utils_base import LARGE_INTEGER

from shared.errors import InputError, is_out_of_memory
from shared.sources import first_line

ROLES = {"query": "query", "passage": "document"}  # → the library's names of their prompts
TOKENIZED_AT_ONCE = 1_000  # texts; of all at once, a million passages would take many GB
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # options of mallopt (malloc.h)


def devices() -> list[str]:
    """The GPUs that share the encoding of many texts; none where one device does it alone."""
    count = torch.cuda.device_count()
    return [f"cuda:{number}" for number in range(count)] if count > 1 else []


def load_encoder(folder: Path, name: str) -> SentenceTransformer:
    """The encoder on the best device there is, its weights in float32; `name` is for errors. Raises InputError."""
    keep_freed_memory()
    # cuDNN's attention prepares itself anew for each length of texts: 7 to 15 ms a layer on an H100.
    torch.backends.cuda.enable_cudnn_sdp(False)
    model, draws = loaded(folder, name, seed=0)
    if draws:
        # What the files lack is drawn, and the library goes on. Only a pooler may be, which no embedding passes.
        drawn = differing(model, loaded(folder, name, seed=1)[0])
        if lacks := [weights for weights in drawn if "pooler" not in weights]:
            raise InputError(
                f"{name} lacks {lacks[0]} (and {len(lacks) - 1} more weights), which would be random numbers:"
                " its files are not whole, or need code of their own, which is never run; take another model"
            )
    if not all(weights.isfinite().all() for weights in model.parameters()):
        raise InputError(f"{name} is damaged: it has weights that are no finite numbers")
    name_document_prompt(model)
    return model


def loaded(folder: Path, name: str, seed: int) -> tuple[SentenceTransformer, bool]:
    """The encoder, and whether random numbers were drawn for it, which come from the seed. Raises InputError."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        try:
            # transformers would take the precision that the file has, and half precision moves scores.
            model = SentenceTransformer(
                str(folder),
                trust_remote_code=False,
                local_files_only=True,
                model_kwargs={"use_safetensors": True, "dtype": torch.float32},
            )
        except Exception as error:
            if is_out_of_memory(error):
                raise
            if "trust_remote_code" in str(error):
                raise InputError(
                    f"{name} needs code of its own to load, which is never run; take another model"
                ) from error
            raise InputError(f"{name} is no model that sentence-transformers loads: {first_line(error)}") from error
        draws = not torch.equal(before, torch.get_rng_state())
    return model.float(), draws  # static word vectors come in the file's precision all the same


def differing(one: SentenceTransformer, other: SentenceTransformer) -> list[str]:
    weights = dict(other.named_parameters())
    return [name for name, own in one.named_parameters() if not torch.equal(own, weights[name])]


def name_document_prompt(model: SentenceTransformer) -> None:
    """Make a prompt that the model calls passage or corpus its document prompt.

    `encode_document` means to take them too, but finds an empty one by the name of document first, which
    sentence-transformers gives to each model that has none.
    """
    names = [name for name in ("document", "passage", "corpus") if model.prompts.get(name)]
    if names:
        model.prompts["document"] = model.prompts[names[0]]


def token_ids(model: SentenceTransformer, texts: list[str]) -> Iterator[list[int]]:
    """Each whole text's, before the model cuts it to `max_seq_length`; nothing without a tokenizer as BERT's."""
    if isinstance(model.tokenizer, PreTrainedTokenizerBase):
        for start in range(0, len(texts), TOKENIZED_AT_ONCE):
            some = texts[start : start + TOKENIZED_AT_ONCE]
            yield from model.tokenizer(some, truncation=False, verbose=False)["input_ids"]


def what_it_reads(model: SentenceTransformer, passages: list[str]) -> dict[str, str | int | float]:
    """The prompts before a query and a passage; of a transformer also how many passages are cut, to how many tokens,
    and the share of their tokens that it does not know (most, where they are in a language that it was not made for).

    Other models may have other tokens for queries, or no limit.
    """
    prompts = {f"{role} prompt": model.prompts.get(name) or "" for role, name in ROLES.items()}
    limit = model.max_seq_length if isinstance(model[0], Transformer) else None
    if not limit or limit >= LARGE_INTEGER:  # transformers' for a tokenizer that knows of no limit
        return prompts
    tokens = cut = unknown = 0
    for ids in token_ids(model, [prompts["passage prompt"] + text for text in passages]):
        tokens += len(ids)
        cut += len(ids) > limit
        unknown += ids.count(model.tokenizer.unk_token_id)
    if not tokens:
        return prompts
    return prompts | {"token limit": limit, "passages cut": cut, "unknown tokens": round(unknown / tokens, 4)}


def keep_freed_memory() -> None:
    """Have malloc keep what is freed: glibc's gives large blocks back to the system, so that on a CPU each step pays
    for the page faults of its activations anew (measured on two cores: 2 to 17% of a step).
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):  # glibc
        no_limit, never = -1, 0
        libc.mallopt(M_TRIM_THRESHOLD, no_limit)
        libc.mallopt(M_MMAP_MAX, never)
