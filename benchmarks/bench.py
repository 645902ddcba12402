"""Benchmark: this repo's training beside sentence-transformers' own trainer; same data, base model, machine and run.

Usage   python benchmarks/bench.py [--bases MODEL ...] [--seeds 42 43 44] [--data hpo-lay mondo] [--rounds 3]
        [--tables speed gain]   (`make bench`; of the last commit). Data: hpo-lay, mondo, uberon or a card of your own
Writes  benchmarks/{speed,gain}-<device>-<precision>.md, in the precision that `auto` takes here; models are thrown away

speed: pairs a second after the first tenth of the steps (or the first step), peak memory; a process for each setting.
gain: the published recipe by the library's trainer, its columns as published (the passage is taken as the query) and
mended, and the default of params.yaml by stages/train.py. All are scored on the test rows as final_eval does it.
"""

import argparse
import json
import math
import os
import resource
import subprocess
import sys
import time
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from data import ROOT, prepare, rows_of
from ruamel.yaml import YAML
from tabulate import tabulate

sys.path.insert(0, str(ROOT / "stages"))
from shared.errors import InputError
from shared.params import read_params

PARAMS = read_params()
TRAIN = PARAMS.train
PAIRS, PAIRS_ON_A_GPU = 640, 3_200  # of one speed measurement: 20 and 100 steps of the published recipe
# The order of the columns; the first is taken as the query. The published notebook has them swapped.
SWAPPED = ["positive", "anchor"]
MENDED = ["anchor", "positive"]

# The published recipe. Its fp16 wants a GPU: elsewhere it is fp32.
STOCK = {
    "batch_size": 32,
    "chunks": False,
    "precision": "fp16",
    "dropout": "model",
    "keep_memory": False,
    "cudnn_attention": True,
    "gradient_share": 1.0,
}
OURS = {
    "batch_size": TRAIN.batch_size,
    "chunks": True,
    "precision": "auto",
    "dropout": TRAIN.dropout,
    "keep_memory": True,
    "cudnn_attention": False,
    "gradient_share": TRAIN.gradient_share,
}
ALL = {"gradient_share": 1.0}
KEPT = {"precision": "auto", "keep_memory": True}
LIBRARY = "sentence-transformers' trainer"
BATCH = f"+ batch {TRAIN.batch_size}"
SPEED = {
    f"{LIBRARY}, published recipe": STOCK,
    f"{LIBRARY}, + bf16, freed memory kept": STOCK | KEPT,
    "+ hardly any padding, plain attention": STOCK | {"chunks": True},
    "+ bf16": STOCK | {"chunks": True, "precision": "auto"},
    "+ freed memory kept": STOCK | {"chunks": True} | KEPT,
    BATCH: STOCK | {"chunks": True, "batch_size": TRAIN.batch_size} | KEPT,
    "+ no dropout": OURS | ALL,
    "+ backward for most of the gradient, at first: this repo's default": OURS,
    "the default without bf16": OURS | {"precision": "fp32"},
    f"{LIBRARY}, the default's params, freed memory kept": OURS | {"chunks": False},
}
# There freed memory is always kept.
SPEED_ON_A_GPU = {
    f"{LIBRARY}, published recipe": STOCK,
    f"{LIBRARY}, + bf16": STOCK | {"precision": "auto"},
    "+ chunks of like length": STOCK | {"chunks": True, "precision": "auto"},
    f"{BATCH}, no dropout": OURS | ALL | {"cudnn_attention": True},
    "+ attention not by cuDNN": OURS | ALL,
    "+ backward for most of the gradient, at first: this repo's default": OURS,
    "the default without bf16": OURS | {"precision": "fp32"},
    f"{LIBRARY}, the default's params": OURS | {"chunks": False, "cudnn_attention": True},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bases", nargs="+", default=[PARAMS.models.base])
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 43, 44])
    parser.add_argument("--data", nargs="+", default=["hpo-lay", "mondo"])
    parser.add_argument("--rounds", type=int, default=3, help="of all speed measurements, one after the other")
    parser.add_argument("--tables", nargs="+", choices=("speed", "gain"), default=("speed", "gain"))
    parser.add_argument("--one", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(train_one(**arguments.one)))
        return
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")  # of several, the library would divide a batch among all
    with TemporaryDirectory() as folder:
        clones = []
        for base, card in product(arguments.bases, arguments.data):
            clones.append(Path(folder) / str(len(clones)))
            prepare(clones[-1], card, {"models.base": base, "train.seeds": arguments.seeds})
        device, precision = device_and_precision()
        # Speed first: for the gain this process encodes texts, and a child counts its parent's peak memory as its own.
        tables = {
            "speed": (f"{arguments.rounds} rounds", lambda clone: speed(clone, device, precision, arguments.rounds)),
            "gain": (f"seeds {arguments.seeds}", lambda clone: gain(clone, arguments.seeds)),
        }
        for name in [name for name in tables if name in arguments.tables]:
            repeated, measure = tables[name]
            sections = [describe(clones[0], repeated)]
            for clone in clones:
                sections += [describe_data(clone), measure(clone)]
                text = "\n\n".join(sections) + "\n"
                (ROOT / f"benchmarks/{name}-{device}-{precision}.md").write_text(text)
            print(text)


def device_and_precision() -> tuple[str, str]:
    """Where, and in what `train.precision: auto`, training runs here."""
    import torch

    from train import choose_precision

    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    return device.type, next((name for name, chosen in choose_precision("auto").items() if chosen), "fp32")


def describe(clone: Path, repeated: str) -> str:
    """What was measured, and on what."""
    from shared import environment

    commit = subprocess.check_output(["git", "rev-parse", "--short", "HEAD"], cwd=clone, text=True).strip()
    here = environment.describe()
    machine = ", ".join(f"{name} {here[name]}" for name in ("device", "processor", "threads", "torch"))
    return f"<!-- Written by benchmarks/bench.py: commit {commit}, {repeated}, {machine}. -->"


def describe_data(clone: Path) -> str:
    """Name and size of the data, with the tokens that its texts have, and the base model."""
    from transformers import AutoTokenizer

    rows = rows_of(clone, "train")
    tokenizer = AutoTokenizer.from_pretrained(base_model(clone))
    lengths = [sorted(map(len, tokenizer([row[column] for row in rows])["input_ids"])) for column in MENDED]
    query, passage = (f"{np.mean(own):.0f} (99%: {own[int(0.99 * len(own))]})" for own in lengths)
    card = json.loads((clone / "metrics/data.json").read_text())["card"]
    base = Path(base_name(clone)).name
    return f"**{card}**, {base}: {len(rows):,} training pairs, tokens a query {query}, a passage {passage}"


def base_name(clone: Path) -> str:
    return YAML(typ="safe").load(clone / "params.yaml")["models"]["base"]


def base_model(clone: Path) -> str:
    from shared.sources import model_folder

    return str(model_folder(base_name(clone), "base"))


def speed(clone: Path, device: str, precision: str, rounds: int) -> str:
    """The table of pairs a second and peak memory, as ratios to the first row; of the rounds' speeds the median."""
    settings, pairs = (SPEED, PAIRS) if device == "cpu" else (SPEED_ON_A_GPU, PAIRS_ON_A_GPU)
    settings = {name: setting for name, setting in settings.items() if precision != "fp32" or "bf16" not in name}
    fixed = {"columns": MENDED, "pairs": pairs, "seed": 42, "learning_rate": 2e-5, "epochs": 1, "model": None}
    measured: list[dict[str, dict[str, float]]] = []
    # One round after the other, since a machine is not as fast at every minute.
    for count in range(1, rounds + 1):
        measured.append({})
        for name, setting in settings.items():
            measured[-1][name] = run_one(clone, **setting, **fixed)
            print(f"round {count}, {name}: {measured[-1][name]['pairs_a_second']:.1f} pairs/s", file=sys.stderr)
    speeds, memory = (
        {name: np.array([own[name][measure] for own in measured]) for name in settings}
        for measure in ("pairs_a_second", "memory")
    )
    first = next(iter(settings))
    rows = []
    for name in settings:
        ratios = speeds[name] / speeds[first]
        rows.append(
            [
                name,
                f"{np.median(ratios):.2f} ({ratios.min():.2f} to {ratios.max():.2f})",
                f"{memory[name].max() / memory[first].max():.2f}",
                f"{np.median(speeds[name]):.0f}",
                f"{memory[name].max() / 1e9:.1f} GB",
            ]
        )
    headers = ["trained by", "speed", "peak memory", "pairs/s here", "here"]
    return tabulate(rows, headers, "github", disable_numparse=True)


def gain(clone: Path, seeds: list[int]) -> str:
    """The table of what each recipe gains on the test rows, and of its wall time as a ratio to the first row."""
    from shared import significance
    from shared.groups import group_ids

    folders: dict[str, list[str]] = {"base": [base_model(clone)]}
    seconds: dict[str, list[float]] = {}
    published, mended = "published recipe", "published recipe, columns mended (first seed)"
    for name, columns, own_seeds in ((published, SWAPPED, seeds), (mended, MENDED, seeds[:1])):
        for seed in own_seeds:
            model = str(clone / f"models/{columns[0]}-{seed}")
            began = time.time()
            run_one(clone, **STOCK, columns=columns, pairs=None, seed=seed, learning_rate=2e-5, epochs=1, model=model)
            seconds.setdefault(name, []).append(time.time() - began)
            folders.setdefault(name, []).append(model)
    name = "this repo's default"
    for seed in seeds:
        began = time.time()
        subprocess.run([sys.executable, "stages/train.py", str(seed)], cwd=clone, check=True)
        seconds.setdefault(name, []).append(time.time() - began)
        folders.setdefault(name, []).append(str(clone / f"models/finetuned/{seed}"))

    scores = {name: np.stack([query_scores(clone, folder) for folder in own]) for name, own in folders.items()}
    groups = np.array(group_ids(rows_of(clone, "test")))
    base, stock = scores["base"], scores[published]
    rows = []
    for name, own in scores.items():
        if name == "base":
            rows.append([name, f"{own.mean():.4f}", "", "", "", ""])
            continue
        published_gain = stock[: len(own)].mean() - base.mean()
        over_base = significance.compare(own, base, groups)
        over_stock = significance.compare(own, stock[: len(own)], groups)
        rows.append(
            [
                name,
                f"{own.mean():.4f}" + (f" (sd {own.mean(axis=1).std(ddof=1):.4f})" if len(own) > 1 else ""),
                with_interval(over_base),
                f"{over_base.gain / published_gain:.2f}",
                "" if name == published else with_interval(over_stock),
                f"{np.mean(seconds[name]) / np.mean(seconds[published]):.2f}",
            ]
        )
    headers = ["recipe", "NDCG@10", "gain over base (95%)", "times", "over published (95%)", "wall time"]
    return tabulate(rows, headers, "github", disable_numparse=True)


def with_interval(comparison: Any) -> str:
    return f"{comparison.gain:+.4f} ({comparison.low:+.4f} to {comparison.high:+.4f})"


def query_scores(clone: Path, model: str) -> np.ndarray:
    """NDCG@10 of each test query, shape (queries,)."""
    from shared import encoders, retrieval
    from shared.scores import ranks_of, score

    test = rows_of(clone, "test")
    corpus = {row["id"]: row["text"] for row in rows_of(clone, "corpus")}
    evaluator = retrieval.make_evaluator(test, corpus, 64, keep_rankings=True)
    rankings = retrieval.search_with_encoder(evaluator, encoders.load_encoder(Path(model), model), [])
    return score("ndcg@10", ranks_of(rankings, test))


def run_one(clone: Path, **setting: Any) -> dict[str, float]:
    command = [sys.executable, clone / "benchmarks/bench.py", "--one", json.dumps(setting | {"clone": str(clone)})]
    printed = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    return json.loads(printed.splitlines()[-1])


def train_one(
    clone: str,
    columns: list[str],
    chunks: bool,
    precision: str,
    dropout: float | str,
    keep_memory: bool,
    cudnn_attention: bool,
    gradient_share: float,
    batch_size: int,
    learning_rate: float,
    epochs: float,
    pairs: int | None,
    seed: int,
    model: str | None,
) -> dict[str, float]:
    """By the library's trainer, with its own loss or with this repo's; nothing is evaluated in between."""
    import torch
    from datasets import Dataset
    from sentence_transformers import (
        SentenceTransformer,
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
    )
    from sentence_transformers.base.sampler import BatchSamplers
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
    from transformers import TrainerCallback

    from shared import by_length, encoders
    from shared.loss import ChunkedRankingLoss
    from train import autocast, choose_precision, set_dropout

    if keep_memory:
        encoders.keep_freed_memory()
    encoder = SentenceTransformer(base_model(Path(clone)))
    torch.backends.cuda.enable_cudnn_sdp(cudnn_attention)
    set_dropout(encoder, dropout)
    rows = [{column: row[column] for column in columns} for row in rows_of(Path(clone), "train")]
    if precision == "fp16" and not torch.cuda.is_available():
        precision = "fp32"
    arguments = SentenceTransformerTrainingArguments(
        output_dir=f"{clone}/models/scratch/bench",
        num_train_epochs=epochs,
        max_steps=math.ceil(pairs / batch_size) if pairs else -1,
        dataloader_drop_last=pairs is not None,
        per_device_train_batch_size=batch_size,
        learning_rate=learning_rate,
        warmup_steps=0.1,
        **choose_precision(precision),
        use_cpu=not torch.accelerator.is_available(),
        batch_sampler=BatchSamplers.NO_DUPLICATES,
        save_strategy="no",
        seed=seed,
        disable_tqdm=False,
    )
    if chunks:
        loss = ChunkedRankingLoss(
            encoder,
            autocast(arguments, encoder.device),
            **by_length.chunk_shape(encoder, arguments.bf16),
            gradient_share=gradient_share,
        )
    else:
        loss = MultipleNegativesRankingLoss(encoder)
    times: dict[int, float] = {}

    class Clock(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step in (math.ceil(state.max_steps / 10), state.max_steps):
                if torch.accelerator.is_available():
                    torch.accelerator.synchronize()
                times[state.global_step] = time.perf_counter()

    SentenceTransformerTrainer(
        model=encoder,
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        loss=loss,
        callbacks=[Clock()],
    ).train()
    if model:
        encoder.save_pretrained(model, create_model_card=False)
    (first, begun), (last, ended) = times.items()
    memory = (
        torch.cuda.max_memory_allocated()
        if torch.cuda.is_available()
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB
    )
    return {"pairs_a_second": (last - first) * batch_size / (ended - begun), "memory": memory}


if __name__ == "__main__":
    try:
        main()
    except (InputError, subprocess.CalledProcessError) as error:  # of the latter the reason stands above
        sys.exit(f"bench.py: {error}")
