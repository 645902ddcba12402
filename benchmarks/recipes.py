"""What each part of the recipe gives: train with one thing changed, and compare on validation rows.

Usage   python benchmarks/recipes.py [--base MODEL] [--seeds 42 43 44] [--data hpo-lay mondo uberon]
        [--recipes NAME ...]   (`make recipes`)
Writes  benchmarks/recipes.jsonl: each score, and what is there is not run again; benchmarks/recipes.md: the tables

A loop of its own around the pipeline's batches and loss, since most of what is tried here is not in the pipeline; for
base models without prompts. Delete recipes.jsonl to begin anew.
"""

import argparse
import copy
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import data
import numpy as np
import torch
from accelerate.utils import convert_outputs_to_fp32, send_to_device
from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, mine_hard_negatives
from sentence_transformers.base.sampler import NoDuplicatesBatchSampler
from sentence_transformers.sentence_transformer.data_collator import SentenceTransformerDataCollator
from sentence_transformers.sentence_transformer.losses import MatryoshkaLoss
from sentence_transformers.util import cos_sim
from tabulate import tabulate
from tqdm import tqdm
from transformers import get_scheduler

from shared import encoders, retrieval
from shared.by_length import chunk_shape
from shared.errors import run
from shared.loss import ChunkedRankingLoss
from shared.sources import model_folder
from train import SYMMETRIC, choose_precision, mixed, set_dropout

SCORES = data.ROOT / "benchmarks/recipes.jsonl"
TABLE = data.ROOT / "benchmarks/recipes.md"
# Three in ten of the rows that are not test: a tenth is too few to tell recipes apart.
VALIDATION = {"prepare.validation_fraction": 0.3}
TOKENS = 64  # to which texts are cut: a recipe is no better for long ones, and a comparison of many takes half the time


@dataclass(frozen=True)
class Recipe:
    """Params of params.yaml, and what was tried beside them; without changes, the recipe to start from."""

    learning_rate: float = 1.5e-4
    epochs: float = 2
    batch_size: int = 128
    hardness: float = 5.0
    gradient_share: float = 1.0
    warmup: float = 0.1
    dropout: float | str = 0.0
    scale: float = 20.0
    directions: dict[str, Any] = field(default_factory=lambda: SYMMETRIC)
    weight_decay: float = 0.0
    schedule: str = "linear"
    margin: float = 0.0  # by which a right passage is to be nearer than a wrong one, in cosine
    mask: str = ""  # which in-batch negatives are left out, by the base model's similarities
    alike: int = 0  # rows of a batch that lie near each other, by the base model
    negatives: str = ""  # by what one hard negative for each pair is found
    matryoshka: bool = False
    frozen_words: bool = False
    beta2: float = 0.999  # AdamW's
    muon: float = 0.0  # learning rate of the matrices of the layers, by Muon in place of AdamW
    block: int = 0  # rows that Muon makes orthogonal at once, or columns of a wide matrix; 0: the whole matrix
    lowest: float = 1.0  # share of the learning rate at the word vectors; each layer above has the same factor more
    columns: tuple[str, str] = ("anchor", "positive")


START = "to start from: 2 epochs at 1.5e-4, batch 128, hardness 5, symmetric"
GTE = {"directions": ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")}
DEFAULT = {"epochs": 4, "gradient_share": 0.95}
RECIPES = {
    START: Recipe(),
    "published": Recipe(2e-5, 1, 32, 0.0, dropout="model", directions={}, columns=("positive", "anchor")),
    "hardness: 0": Recipe(hardness=0.0),
    "hardness: 9": Recipe(hardness=9.0),
    "learning_rate: 5e-5": Recipe(learning_rate=5e-5),
    "learning_rate: 1e-4": Recipe(learning_rate=1e-4),
    "learning_rate: 2e-4": Recipe(learning_rate=2e-4),
    "learning_rate: 3e-4": Recipe(learning_rate=3e-4),
    "epochs: 1": Recipe(epochs=1),
    "epochs: 3": Recipe(epochs=3),
    "epochs: 3, learning_rate: 1e-4": Recipe(epochs=3, learning_rate=1e-4),
    "epochs: 4, gradient_share: 0.95": Recipe(**DEFAULT),
    "epochs: 4, gradient_share: 0.95, learning_rate: 2e-4": Recipe(2e-4, **DEFAULT),
    "epochs: 4, gradient_share: 0.95, adam_beta2: 0.95": Recipe(**DEFAULT, beta2=0.95),
    "epochs: 4, gradient_share: 0.95, Muon at 8e-4": Recipe(**DEFAULT, muon=8e-4),
    "epochs: 4, gradient_share: 0.95, Muon by blocks of 64 at 3e-4": Recipe(**DEFAULT, muon=3e-4, block=64),
    "epochs: 4, gradient_share: 0.95, Muon by blocks of 64 at 4e-4": Recipe(**DEFAULT, muon=4e-4, block=64),
    "epochs: 4, gradient_share: 0.95, Muon by blocks of 64 at 5e-4": Recipe(**DEFAULT, muon=5e-4, block=64),
    "epochs: 4, gradient_share: 0.95, Muon by blocks of 64 at 8e-4": Recipe(**DEFAULT, muon=8e-4, block=64),
    "epochs: 4, gradient_share: 0.95, a margin of 0.1": Recipe(**DEFAULT, margin=0.1),
    "epochs: 5": Recipe(epochs=5),
    "epochs: 5, gradient_share: 0.95": Recipe(epochs=5, gradient_share=0.95),
    "epochs: 5, gradient_share: 0.85": Recipe(epochs=5, gradient_share=0.85),
    "epochs: 6, gradient_share: 0.7": Recipe(epochs=6, gradient_share=0.7),
    "batch_size: 64": Recipe(batch_size=64),
    "batch_size: 64, learning_rate: 1e-4": Recipe(batch_size=64, learning_rate=1e-4),
    "batch_size: 256": Recipe(batch_size=256),
    "batch_size: 256, learning_rate: 2e-4": Recipe(batch_size=256, learning_rate=2e-4),
    "scale: 10": Recipe(scale=10.0),
    "scale: 40": Recipe(scale=40.0),
    "symmetric: false": Recipe(directions={}),
    "all four directions (GTE's loss)": Recipe(directions=GTE),
    "dropout: model": Recipe(dropout="model"),
    "a hard negative each, by the base model, pairs without one left out": Recipe(negatives="dense"),
    "a hard negative each, by BM25": Recipe(negatives="bm25"),
    "near-duplicates of the passage no negatives": Recipe(mask="near-duplicates"),
    "passages nearer than the right one no negatives (as GIST)": Recipe(mask="gist"),
    "batches of groups of ten that are alike, near-duplicates no negatives": Recipe(mask="near-duplicates", alike=16),
    "batches of groups of 75 that are alike, near-duplicates no negatives": Recipe(mask="near-duplicates", alike=128),
    "word embeddings frozen": Recipe(frozen_words=True),
    "Matryoshka (all, 1/2, 1/4 of the dimensions)": Recipe(matryoshka=True),
    "weight decay 0.1": Recipe(weight_decay=0.1),
    "cosine schedule": Recipe(schedule="cosine"),
    "Muon for the layers' matrices, at 6e-4": Recipe(muon=6e-4),
    "Muon for the layers' matrices, at 8e-4": Recipe(muon=8e-4),
    "learning_rate: 3e-4 at the top, falling to a quarter at the word vectors": Recipe(3e-4, lowest=0.25),
}
LATE = "weights averaged over the last third of the steps"
BASE = "the base model"
BASE_SHARES = (0.0, 0.2, 0.4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", default=data.PARAMS.models.base)
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 43, 44])
    parser.add_argument("--data", nargs="+", default=data.CARDS)
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=list(RECIPES))
    arguments = parser.parse_args()
    base = Path(arguments.base).name
    with TemporaryDirectory() as folder:
        for name in arguments.data:
            data.prepare(Path(folder) / name, name, VALIDATION)
        for recipe in dict.fromkeys([START, *arguments.recipes]):  # to which the others are changes
            for seed in arguments.seeds:
                for name in arguments.data:
                    if (base, name, recipe, seed) not in read_scores():
                        scores = train(Path(folder) / name, arguments.base, recipe, seed)
                        lines = [json.dumps([base, name, own, seed, by_share]) for own, by_share in scores.items()]
                        print(*lines, sep="\n", flush=True)
                        with SCORES.open("a") as file:
                            file.write("\n".join(lines) + "\n")
                        write_tables()
    print(TABLE.read_text())


def read_scores() -> dict[tuple[str, str, str, int], list[float]]:
    """NDCG@10 on validation rows by base model, data, recipe and seed."""
    written = SCORES.read_text().splitlines() if SCORES.exists() else []
    lines = [line for line in written if line.endswith("]")]  # a cut may leave half a line
    return {(base, name, recipe, seed): score for base, name, recipe, seed, score in map(json.loads, lines)}


def train(clone: Path, base_model: str, name: str, seed: int) -> dict[str, list[float]]:
    """NDCG@10 on validation rows of the trained model; for START, also of the base model and of averages."""
    recipe = RECIPES[name]
    corpus = {row["id"]: row["text"] for row in data.rows_of(clone, "corpus")}
    evaluator = retrieval.make_evaluator(data.rows_of(clone, "validation"), corpus, 256, keep_rankings=False)
    model = encoders.load_encoder(model_folder(base_model, "base"), base_model)
    model.max_seq_length = TOKENS
    in_bf16 = choose_precision("auto")["bf16"]
    precision = torch.autocast(model.device.type, torch.bfloat16, enabled=in_bf16)
    evaluator.embed_inputs = convert_outputs_to_fp32(precision(evaluator.embed_inputs))
    rows = Dataset.from_list(data.rows_of(clone, "train")).select_columns(list(recipe.columns))
    if recipe.negatives:
        rows = with_hard_negatives(rows, model, recipe.negatives)
    base = weights_of(model)
    scores = {BASE: [score(model, evaluator)]} if name == START else {}
    guide = {column: encode(model, rows[column], precision) for column in ("anchor", "positive")} if recipe.mask else {}

    torch.manual_seed(seed)
    set_dropout(model, recipe.dropout)
    similarity = MaskedSimilarity(recipe.margin)
    loss = ChunkedRankingLoss(
        model,
        precision,
        **chunk_shape(model, in_bf16),
        gradient_share=recipe.gradient_share,
        scale=recipe.scale,
        similarity_fct=similarity,
        hardness_mode="in_batch_negatives",
        hardness_strength=recipe.hardness,
        **recipe.directions,
    )
    sizes = [model.get_embedding_dimension() // part for part in (1, 2, 4)]
    step_loss = MatryoshkaLoss(model, loss, sizes) if recipe.matryoshka else loss
    if recipe.frozen_words:
        model.transformers_model.get_input_embeddings().requires_grad_(False)
    collate = SentenceTransformerDataCollator(model.preprocess)
    sampler = NoDuplicatesBatchSampler(rows, recipe.batch_size, False, generator=torch.Generator(), seed=seed)
    steps = int(np.ceil(recipe.epochs * len(sampler)))
    optimizers = optimizers_of(model, recipe)
    warmup = int(np.ceil(recipe.warmup * steps))
    schedules = [get_scheduler(recipe.schedule, optimizer, warmup, steps) for optimizer in optimizers]
    late, taken, done = {}, 0, 0
    progress = tqdm(total=steps, desc=f"{clone.name}, {name}, seed {seed}")
    model.train()
    for epoch in range(int(np.ceil(recipe.epochs))):
        sampler.set_epoch(epoch)
        dice = np.random.default_rng([seed, epoch])
        batches = alike_batches(guide["positive"].cpu().numpy(), recipe, dice) if recipe.alike else sampler
        for places in islice(batches, steps - done):
            batch = send_to_device(collate([rows[one] for one in places]), model.device)
            columns, labels = SentenceTransformerTrainer.collect_features(None, batch)
            if recipe.mask:
                similarity.left_out = left_out(recipe.mask, guide["anchor"][places], guide["positive"][places])
            step_loss(columns, labels).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer, schedule in zip(optimizers, schedules, strict=True):
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
            progress.update()
            done += 1
            if name == START and done > 2 * steps / 3:
                taken += 1
                late = mixed(late, weights_of(model), 1 / taken) if late else weights_of(model)
    progress.close()
    trained = weights_of(model)
    for own, weights in {name: trained, LATE: late}.items():
        scores[own] = []
        for share in BASE_SHARES if weights else ():
            model.load_state_dict(mixed(weights, base, share))
            scores[own].append(score(model, evaluator))
    return {own: one for own, one in scores.items() if one}


def optimizers_of(model: SentenceTransformer, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """AdamW, and Muon (Jordan et al. 2024, at the scale of AdamW's updates) for the layers' matrices if asked."""
    transformer = model.transformers_model
    linear = [module for module in transformer.modules() if recipe.muon and isinstance(module, torch.nn.Linear)]
    matrices = dict.fromkeys(module.weight for module in linear)  # a set in order
    # From the bottom up; only the names of BERT, MPNet and their like are known here.
    parts = [transformer.embeddings, *transformer.encoder.layer] if recipe.lowest < 1 else []
    shares = {
        weight: recipe.lowest ** (1 - place / (len(parts) - 1))
        for place, part in enumerate(parts)
        for weight in part.parameters()
    }
    groups = [
        {"params": [weight], "lr": recipe.learning_rate * shares.get(weight, 1.0)}
        for weight in model.parameters()
        if weight not in matrices
    ]
    options = {"betas": (0.9, recipe.beta2), "weight_decay": recipe.weight_decay, "fused": True}
    optimizers: list[torch.optim.Optimizer] = [torch.optim.AdamW(groups, **options)]
    if matrices:
        optimizers.append(Muon(matrices, recipe.muon, recipe.block))
    return optimizers


class Muon(torch.optim.Optimizer):
    """torch.optim.Muon with a momentum of 0.95 and no weight decay, of whole matrices or by blocks; in float32.

    torch's multiplies in bf16, for which a processor without it takes many times as long. Of blocks, Kimi K3
    (2026) takes one for each attention head.
    """

    def __init__(self, matrices: Iterable[torch.nn.Parameter], lr: float, block: int) -> None:
        super().__init__(matrices, {"lr": lr})
        self.block = block

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            for weight in (weight for weight in group["params"] if weight.grad is not None):
                average = self.state[weight].setdefault("average", torch.zeros_like(weight))
                average.lerp_(weight.grad, 0.05)
                step = weight.grad.lerp(average, 0.95)
                longer = int(step.shape[1] > step.shape[0])
                blocks = step.split(self.block or step.shape[longer], longer)
                step = torch.cat([orthogonal(block) * max(block.shape) ** 0.5 for block in blocks], longer)
                weight.sub_(step, alpha=0.2 * group["lr"])


def orthogonal(matrix: torch.Tensor) -> torch.Tensor:
    """U V' of a matrix U S V', by Jordan et al.'s five iterations: singular values come to lie in 0.7 to 1.2."""
    wide = matrix if len(matrix) <= matrix.shape[1] else matrix.T
    own = wide / wide.norm().clamp(min=1e-7)
    for _ in range(5):
        squares = own @ own.T
        own = 3.4445 * own + (-4.7750 * squares + 2.0315 * squares @ squares) @ own
    return own if wide.shape == matrix.shape else own.T


class MaskedSimilarity:
    """Cosine, of a query and its passage less the margin; minus infinity where `left_out` (rows, rows): passages of the
    batch that are no negatives of a query.
    """

    left_out: torch.Tensor | None = None

    def __init__(self, margin: float) -> None:
        self.margin = margin

    def __call__(self, queries: torch.Tensor, passages: torch.Tensor) -> torch.Tensor:
        similarity = cos_sim(queries, passages)
        similarity = similarity - self.margin * torch.eye(*similarity.shape, device=similarity.device)
        return similarity if self.left_out is None else similarity.masked_fill(self.left_out, -torch.inf)


def left_out(mask: str, queries: torch.Tensor, passages: torch.Tensor) -> torch.Tensor:
    if mask == "gist":
        similarity = queries @ passages.T
        result = similarity > similarity.diagonal()[:, None]
    else:
        result = passages @ passages.T > 0.9
    return result.fill_diagonal_(False)


def alike_batches(passages: np.ndarray, recipe: Recipe, dice: np.random.Generator) -> Iterator[list[int]]:
    """Batches of groups of rows whose passages, (rows, dimensions), are near each other: they are hard negatives."""

    def halved(rows: np.ndarray) -> list[np.ndarray]:
        if len(rows) <= recipe.alike:
            return [rows]
        one, other = passages[dice.choice(rows, 2, replace=False)]
        in_order = rows[np.argsort(passages[rows] @ (one - other))]
        return [group for half in np.array_split(in_order, 2) for group in halved(half)]

    groups = halved(np.arange(len(passages)))
    rows = np.concatenate([groups[place] for place in dice.permutation(len(groups))])
    for batch in np.array_split(rows, range(recipe.batch_size, len(rows), recipe.batch_size)):
        yield batch.tolist()


def with_hard_negatives(rows: Dataset, model: SentenceTransformer, by: str) -> Dataset:
    """With a third column: the best found passage that scores at least 5% below the right one."""
    if by == "dense":
        return mine_hard_negatives(
            rows, model, range_max=50, relative_margin=0.05, num_negatives=1, output_format="n-tuple"
        )
    passages = list(dict.fromkeys(rows["positive"]))
    numbered = [{"id": str(i), "anchor": row["anchor"], "document_id": "0"} for i, row in enumerate(rows)]
    evaluator = retrieval.make_evaluator(numbered, {str(i): text for i, text in enumerate(passages)}, 64, True)
    rankings = retrieval.search_with_bm25(evaluator)
    dice = np.random.default_rng(0)
    found = []
    for row, ranking in zip(rows, rankings, strict=True):
        texts = {passages[int(one["corpus_id"])]: one["score"] for one in ranking["results"]}
        limit = 0.95 * texts.get(row["positive"], np.inf)
        found.append(
            next((t for t, s in texts.items() if s < limit and t != row["positive"]), None)
            or str(dice.choice(passages))
        )
    return rows.add_column("negative", found)


def encode(model: SentenceTransformer, texts: list[str], precision: torch.autocast) -> torch.Tensor:
    with precision:
        return model.encode(list(texts), convert_to_tensor=True, normalize_embeddings=True).float()


def score(model: SentenceTransformer, evaluator: Any) -> float:
    return round(evaluator(model)[f"{model.similarity_fn_name}_ndcg@10"], 4)


def weights_of(model: SentenceTransformer) -> dict[str, torch.Tensor]:
    return copy.deepcopy(model.state_dict())


def write_tables() -> None:
    """Of each recipe the mean gain over the base model, by data and by the share of the base mixed into it."""
    scores = read_scores()
    sections = [
        "<!-- Written by `make recipes`. -->",
        f"Gain in NDCG@10 on validation rows over the base model, with 0 to {BASE_SHARES[-1]:g} of the base model's"
        f" weights mixed into the trained ones. Texts are cut to {TOKENS} tokens.",
    ]
    for base in dict.fromkeys(base for base, *_ in scores):
        sections += table({tuple(key): own for (own_base, *key), own in scores.items() if own_base == base}, base)
    TABLE.write_text("\n\n".join(sections) + "\n")


def table(scores: dict[tuple[str, str, int], list[float]], base: str) -> list[str]:
    before = {name: own[0] for (name, recipe, _), own in scores.items() if recipe == BASE}
    rows, spreads = [], []
    for recipe in [name for name in (*RECIPES, LATE) if any(other == name for _, other, _ in scores)]:
        seeds, cells = [], []
        for name in before:
            own = [gains for (own_name, other, _), gains in scores.items() if (own_name, other) == (name, recipe)]
            gains = np.array(own).reshape(-1, len(BASE_SHARES)) - before[name]  # seeds x shares
            seeds.append(str(len(own)))
            cells += [f"{gain:+.4f}" for gain in gains.mean(axis=0)] if own else [""] * len(BASE_SHARES)
            spreads += list(gains.std(axis=0, ddof=1)) if len(own) > 1 else []
        rows.append([recipe, ", ".join(seeds), *cells])
    headers = ["recipe", "seeds by data", *(f"{name}, {share:g}" for name in before for share in BASE_SHARES)]
    bases = ", ".join(f"{name} {own:.4f}" for name, own in before.items())
    spread = f"{np.mean(spreads):.4f} on average, {np.max(spreads):.4f} at most" if spreads else "unknown"
    return [
        f"**{base}**, before training: {bases}. Standard deviation over the seeds: {spread}.",
        tabulate(rows, headers, "github", disable_numparse=True),
    ]


if __name__ == "__main__":
    run(main)
