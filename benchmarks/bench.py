"""Benchmark: this repo's training beside sentence-transformers' own trainer; same data, base model, machine and run.

Usage   python benchmarks/bench.py [--bases MODEL ...] [--seeds 42 43 44] [--data hpo-lay mondo] [--rounds 3]
        [--tables speed gain]   (`make bench`; of the last commit). Data: hpo-lay, mondo, uberon or a card of your own
Writes  benchmarks/{speed,gain}-<device>-<precision>.md, a section for each base and data, others stay as they are
        benchmarks/gain.jsonl: each training's scores, and what is there is not run again; models are thrown away

speed: pairs a second after the first tenth of the steps (or the first step), peak memory; a process for each setting.
gain: the published recipe by the library's trainer, its columns as published (the passage is taken as the query) and
mended, and params.yaml's by stages/train.py. All are scored on the test rows as final_eval does it. The published
recipe's fp16 wants a GPU: elsewhere it is fp32, and where the default is bf16, once more in bf16.
Delete gain.jsonl to begin anew.
"""

import argparse
import hashlib
import json
import math
import os
import platform
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from data import PARAMS, ROOT, prepare, rows_of
from ruamel.yaml import YAML
from tabulate import tabulate

from shared import records
from shared.errors import InputError
from shared.params import check_model_name, check_trainable
from shared.report import recipe_in_words
from shared.sources import model_folder

RUNS = ROOT / "benchmarks/gain.jsonl"
TRAIN = PARAMS.train
PAIRS, PAIRS_ON_A_GPU = 640, 3_200  # of one speed measurement: 20 and 100 steps of the published recipe
# The order of the columns; the first is taken as the query. The published notebook has them swapped.
SWAPPED = ["positive", "anchor"]
MENDED = ["anchor", "positive"]

# The published recipe; without a CUDA GPU in fp32.
STOCK = {
    "batch_size": 32,
    "chunks": False,
    "precision": "fp16",
    "dropout": "model",
    "keep_memory": False,
    "cudnn_attention": True,
    "gradient_share": 1.0,
    "learning_rate": 2e-5,
    "own_loss": False,
}
OURS = {
    "batch_size": TRAIN.batch_size,
    "chunks": True,
    "precision": TRAIN.precision,
    "dropout": TRAIN.dropout,
    "keep_memory": True,
    "cudnn_attention": False,
    "gradient_share": TRAIN.gradient_share,
    "learning_rate": TRAIN.learning_rate,
    "own_loss": True,
}
ALL = {"gradient_share": 1.0}
KEPT = {"precision": TRAIN.precision, "keep_memory": True}
LIBRARY = "sentence-transformers' trainer"
BATCH = f"+ batch {TRAIN.batch_size}"
REST = "no dropout, the default's loss and learning rate"
SPEED = {
    f"{LIBRARY}, published recipe": STOCK,
    f"{LIBRARY}, + bf16, freed memory kept": STOCK | KEPT,
    "+ hardly any padding, plain attention": STOCK | {"chunks": True},
    "+ bf16": STOCK | {"chunks": True, "precision": TRAIN.precision},
    "+ freed memory kept": STOCK | {"chunks": True} | KEPT,
    BATCH: STOCK | {"chunks": True, "batch_size": TRAIN.batch_size} | KEPT,
    f"+ {REST}": OURS | ALL,
    "+ backward for most of the gradient, at first: this repo's default": OURS,
    "the default without bf16": OURS | {"precision": "fp32"},
    f"{LIBRARY}, the default's params, freed memory kept": OURS | {"chunks": False},
}
# There freed memory is always kept.
SPEED_ON_A_GPU = {
    f"{LIBRARY}, published recipe": STOCK,
    f"{LIBRARY}, + bf16": STOCK | {"precision": TRAIN.precision},
    "+ chunks of like length": STOCK | {"chunks": True, "precision": TRAIN.precision},
    f"{BATCH}, {REST}": OURS | ALL | {"cudnn_attention": True},
    "+ attention not by cuDNN": OURS | ALL,
    "+ backward for most of the gradient, at first: this repo's default": OURS,
    "the default without bf16": OURS | {"precision": "fp32"},
    f"{LIBRARY}, the default's params": OURS | {"chunks": False, "cudnn_attention": True},
    f"{LIBRARY}, the default's params, attention not by cuDNN": OURS | {"chunks": False},
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
    # Of several, the library would divide a batch among all.
    os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0]
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # else what runs in a process of its own would go on
    with TemporaryDirectory() as folder:
        for base in arguments.bases:
            check_base(base)
        clones = []
        for base, card in product(arguments.bases, arguments.data):
            clones.append(Path(folder) / str(len(clones)))
            base_anywhere = str(ROOT / base) if base.startswith("./") else base
            changes = {"models.base": base_anywhere, "train.seeds": arguments.seeds, "train.processes": 1}
            prepare(clones[-1], card, changes)
            if "speed" in arguments.tables:
                check_rows(clones[-1])
        device, precision = device_and_precision()
        # Speed first: for the gain this process encodes texts, and a child counts its parent's peak memory as its own.
        tables = {
            "speed": (f"rounds {arguments.rounds}", lambda clone: speed(clone, device, precision, arguments.rounds)),
            "gain": (f"seeds {arguments.seeds}", lambda clone: gain(clone, device, precision, arguments.seeds)),
        }
        for name in [name for name in tables if name in arguments.tables]:
            repeated, measure = tables[name]
            for clone in clones:
                section = "\n\n".join([describe(clone, repeated), describe_data(clone), measure(clone)])
                write_section(ROOT / f"benchmarks/{name}-{device}-{precision}.md", section, heading(clone))
                print(section)


def check_base(name: str) -> None:
    """Raises InputError now, and not after hours."""
    try:
        check_trainable(check_model_name(name))
    except ValueError as error:
        raise InputError(f"--bases {name}: {error}") from None
    model_folder(name, "base")


def check_rows(clone: Path) -> None:
    """Raises InputError where speed cannot be measured."""
    rows, largest = rows_of(clone, "train"), max(own["batch_size"] for own in (STOCK, OURS))
    distinct = min(len({row[column] for row in rows}) for column in MENDED)
    if distinct < largest:
        raise InputError(
            f"{heading(clone)} speed is measured in batches of {largest} different pairs, and the training rows have"
            f" {distinct} different queries or passages; `--tables gain` does not need them"
        )


def device_and_precision() -> tuple[str, str]:
    """Where training runs here, and in what."""
    import torch

    from train import choose_precision, in_words

    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    return device.type, in_words(choose_precision(TRAIN.precision))


def describe(clone: Path, repeated: str) -> str:
    """What was measured, and on what; params.yaml's training, which need not be the one that the repo came with."""
    from shared import environment

    commit = subprocess.check_output(["git", "rev-parse", "--short", "HEAD"], cwd=clone, text=True).strip()
    here = environment.describe()
    machine = ", ".join(f"{name} {here[name]}" for name in ("device", "processor", "threads", "torch"))
    default = f"Default: {recipe_in_words(TRAIN)}."
    return f"<!-- Written by benchmarks/bench.py: commit {commit}, {repeated}, {machine}. {default} -->"


def describe_data(clone: Path) -> str:
    """Name and size of the data, with the tokens that its texts have, and the base model."""
    from shared import encoders

    rows = rows_of(clone, "train")
    model, _ = encoders.loaded(base_model(clone), base_name(clone), seed=0)
    lengths = [sorted(map(len, encoders.token_ids(model, [row[column] for row in rows]))) for column in MENDED]
    tokens = [
        f"tokens a {name} {np.mean(own):.0f} (99%: {own[int(0.99 * len(own))]})"
        for name, own in zip(("query", "passage"), lengths, strict=True)
        if own
    ]
    return f"{heading(clone)} {', '.join([f'{len(rows):,} training pairs', *tokens])}"


def heading(clone: Path) -> str:
    card = json.loads((clone / "metrics/data.json").read_text())["card"]
    return f"**{card}**, {base_name(clone).replace(f'{ROOT}/', './')}:"


def write_section(path: Path, section: str, heading: str) -> None:
    """Put it in the place of the one with this heading, or at the end."""
    sections = re.split(r"\n+(?=<!-- Written by)", path.read_text().rstrip()) if path.exists() else []
    place = next((place for place, own in enumerate(sections) if heading in own), len(sections))
    sections[place : place + 1] = [section]
    records.write_text(path, "\n\n".join(sections) + "\n")


def base_name(clone: Path) -> str:
    return YAML(typ="safe").load(clone / "params.yaml")["models"]["base"]


def base_model(clone: Path) -> Path:
    return model_folder(base_name(clone), "base")


def speed(clone: Path, device: str, precision: str, rounds: int) -> str:
    """The table of pairs a second and peak memory, as ratios to the first row; of the rounds' speeds the median."""
    settings, pairs = (SPEED, PAIRS) if device == "cpu" else (SPEED_ON_A_GPU, PAIRS_ON_A_GPU)
    settings = {name: setting for name, setting in settings.items() if precision != "fp32" or "bf16" not in name}
    fixed = {"columns": MENDED, "pairs": pairs, "seed": 42, "epochs": 1, "model": None}
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
                f"{np.median(ratios):.2f}" + (f" ({ratios.min():.2f} to {ratios.max():.2f})" if rounds > 1 else ""),
                f"{memory[name].max() / memory[first].max():.2f}",
                f"{np.median(speeds[name]):.0f}",
                f"{memory[name].max() / 1e9:.1f} GB",
            ]
        )
    headers = ["trained by", "speed", "peak memory", "pairs/s here", "here"]
    return tabulate(rows, headers, "github", disable_numparse=True)


def gain(clone: Path, device: str, precision: str, seeds: list[int]) -> str:
    """The table of what each recipe gains on the test rows, and of its wall time as a ratio to the first row.

    One seed after the other, since a machine is not as fast at every hour.
    """
    from shared import significance
    from shared.groups import group_ids

    published, ours = "published recipe", "this repo's default"
    of_first_seed = {f"{published}, columns mended (first seed)": STOCK | {"columns": MENDED}}
    if device == "cpu" and precision != "fp32":
        same_precision = STOCK | {"columns": SWAPPED, "precision": precision}
        of_first_seed[f"{published}, in {precision} as the default (first seed)"] = same_precision
    recipes = {published: STOCK | {"columns": SWAPPED}, **of_first_seed, ours: None}
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in recipes}
    for seed in seeds:
        for name, setting in recipes.items():
            if seed == seeds[0] or name not in of_first_seed:
                runs[name].append(trained(clone, setting, seed))

    test, near_duplicates = rows_of(clone, "test"), {row["id"] for row in rows_of(clone, "near_duplicates")}
    groups = np.array(group_ids(test))
    unseen = np.array([row["id"] not in near_duplicates for row in test])
    unseen_groups = significance.groups_of_some(groups, unseen)
    base = query_scores(clone, base_model(clone))[None]
    scores = {name: np.array([run["scores"] for run in own]) for name, own in runs.items()}
    rows = [["base", f"{base.mean():.4f}", *[""] * 6]]
    for name, own in scores.items():
        is_other, stock = name != published, scores[published][: len(own)]
        left = [one[:, unseen] for one in (own, stock, base)]
        cells = [
            f"{own.mean():.4f}" + (f" (sd {own.mean(axis=1).std(ddof=1):.4f})" if len(own) > 1 else ""),
            with_interval(significance.compare(own, base, groups)),
            times(own, stock, base, groups) if is_other else "",
            "" if unseen_groups is None else f"{left[0].mean() - left[2].mean():+.4f}",
            times(*left, unseen_groups) if is_other and unseen_groups is not None else "",
            with_interval(significance.compare(own, stock, groups)) if is_other else "",
            f"{mean_seconds(runs[name]) / mean_seconds(runs[published][: len(own)]):.2f}",
        ]
        rows.append([name, *cells])
    gains = ["gain over base (95%)", "times (95%)", "without near-duplicates", "times (95%)"]
    headers = ["recipe", "NDCG@10", *gains, "over published (95%)", "wall time"]
    return tabulate(rows, headers, "github", disable_numparse=True)


def times(own: np.ndarray, stock: np.ndarray, base: np.ndarray, groups: np.ndarray) -> str:
    """The gain over the base as a multiple of the published recipe's, with its 95% bootstrap interval over groups.

    The seeds are held fixed. A published gain that may be none bounds no multiple of it (Fieller 1954, JRSS B 16:175).
    """
    from shared import significance

    own_sums, stock_sums = (significance.group_sums((one - base).mean(axis=0)[None], groups)[0] for one in (own, stock))
    if significance.compare(stock, base, groups).low <= 0:
        return "unbounded"
    low, high = significance.draw(
        (own_sums, stock_sums), lambda one, other, axis: one.sum(axis) / other.sum(axis), True
    )
    return f"{own_sums.sum() / stock_sums.sum():.2f} ({low:.2f} to {high:.2f})"


def mean_seconds(runs: list[dict[str, Any]]) -> float:
    return np.mean([run["seconds"] for run in runs])


def trained(clone: Path, setting: dict[str, Any] | None, seed: int) -> dict[str, Any]:
    """The test queries' scores and the wall time: by the library's trainer with this setting, or else by this repo."""
    key = fingerprint(clone, setting, seed)
    written = RUNS.read_text() if RUNS.exists() else ""
    known = [json.loads(line) for line in written.splitlines() if line.endswith("}")]  # a cut may leave half a line
    if found := [run for run in known if run["key"] == key]:
        return found[0]
    model = clone / (f"models/finetuned/{seed}" if setting is None else "models/published")
    began = time.time()
    if setting is None:
        subprocess.run([sys.executable, "stages/train.py", str(seed)], cwd=clone, check=True)
    else:
        run_one(clone, **setting, pairs=None, seed=seed, epochs=1, model=str(model))
    seconds = time.time() - began
    run = {"key": key, "seconds": seconds, "scores": query_scores(clone, model).tolist()}
    shutil.rmtree(model)
    with RUNS.open("a") as file:
        file.write(("\n" if written and not written.endswith("\n") else "") + json.dumps(run) + "\n")
    return run


def fingerprint(clone: Path, setting: dict[str, Any] | None, seed: int) -> str:
    """Names all that a run depends on: code, params, data, base model, machine, versions."""
    from shared import environment
    from train import hashes

    params = YAML(typ="safe").load(clone / "params.yaml")
    del params["train"]["seeds"]
    measured = ["stages", "benchmarks/bench.py"]
    parts = [
        subprocess.check_output(["git", "ls-tree", "HEAD", *measured], cwd=clone, text=True),
        [(clone / f"data/prepared/{split}.jsonl").read_text() for split in ("train", "validation", "corpus", "test")],
        [params, hashes(base_model(clone)), environment.describe(), platform.node(), setting, seed],
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def with_interval(comparison: Any) -> str:
    return f"{comparison.gain:+.4f} ({comparison.low:+.4f} to {comparison.high:+.4f})"


def query_scores(clone: Path, model: Path) -> np.ndarray:
    """NDCG@10 of each test query, shape (queries,)."""
    from shared import encoders, retrieval
    from shared.scores import ranks_of, score

    test = rows_of(clone, "test")
    corpus = {row["id"]: row["text"] for row in rows_of(clone, "corpus")}
    evaluator = retrieval.make_evaluator(test, corpus, 64, keep_rankings=True)
    rankings = retrieval.search_with_encoder(evaluator, encoders.load_encoder(model, str(model)), [])
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
    own_loss: bool,
    epochs: float,
    pairs: int | None,
    seed: int,
    model: str | None,
) -> dict[str, float]:
    """By the library's trainer, with its own loss or with this repo's; nothing is evaluated in between.

    A base model's own prompts are used in training as they are in scoring, which the library leaves to its user.
    """
    import torch
    from datasets import Dataset
    from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
    from sentence_transformers.base.sampler import BatchSamplers
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
    from transformers import TrainerCallback

    from shared import by_length, encoders
    from shared.loss import ChunkedRankingLoss
    from train import ROUTES, autocast, choose_precision, loss_options, prompts, set_dropout

    if keep_memory:
        encoders.keep_freed_memory()
    encoder, _ = encoders.loaded(base_model(Path(clone)), base_name(Path(clone)), seed=0)
    encoders.name_document_prompt(encoder)
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
        prompts=prompts(encoder) or None,
        router_mapping=ROUTES,
        disable_tqdm=False,
    )
    options = loss_options(TRAIN, encoder) if own_loss else {}
    if chunks:
        loss = ChunkedRankingLoss(
            encoder,
            autocast(arguments, encoder.device),
            **by_length.chunk_shape(encoder, arguments.bf16),
            gradient_share=gradient_share,
            **options,
        )
    else:
        loss = MultipleNegativesRankingLoss(encoder, **options)
    times: dict[int, float] = {}

    class Clock(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            times[0] = time.perf_counter()

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
    (first, begun), (last, ended) = list(times.items())[-2:]
    memory = (
        torch.cuda.max_memory_allocated()
        if torch.cuda.is_available()
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)  # KiB
    )
    return {"pairs_a_second": (last - first) * batch_size / (ended - begun), "memory": memory}


if __name__ == "__main__":
    try:
        main()
    except (InputError, subprocess.CalledProcessError) as error:  # of the latter the reason stands above
        sys.exit(f"bench.py: {error}")
    except KeyboardInterrupt:
        sys.exit(
            f"bench.py: interrupted; the same command measures speed anew (`--tables gain`: not at all) and goes on"
            f" after the trainings in {RUNS.relative_to(ROOT)}"
        )
