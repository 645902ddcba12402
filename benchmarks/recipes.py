"""What each part of the default recipe gives: train with one param changed at a time, and compare on validation rows.

Usage   python benchmarks/recipes.py [--seeds 42 43 44] [--data hpo-lay mondo]   (`make recipes`; of the last commit)
Writes  benchmarks/recipes.md; what it trains is thrown away
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from bench import ROOT, prepare
from ruamel.yaml import YAML
from tabulate import tabulate

RESULTS = ROOT / "benchmarks/recipes.md"
VARIANTS = {
    "the default": {},
    "dropout: model": {"dropout": "model"},
    "symmetric: false": {"symmetric": False},
    "epochs: 1": {"epochs": 1},
    "learning_rate: 1e-4": {"learning_rate": 1e-4},
    "batch_size: 64": {"batch_size": 64},
    "scale: 40": {"scale": 40.0},
    "batch_size: 256": {"batch_size": 256},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 43, 44])
    parser.add_argument("--data", nargs="+", choices=["hpo-lay", "mondo"], default=["hpo-lay", "mondo"])
    arguments = parser.parse_args()
    gains: dict[str, dict[str, np.ndarray]] = {}  # data → variant → NDCG@10 on validation rows over the base, by seed
    for card in arguments.data:
        with TemporaryDirectory() as folder:
            clone = Path(folder) / "repo"
            prepare(clone, card, arguments.seeds)
            for name, changes in VARIANTS.items():
                own = np.array([validation_gain(clone, changes, seed) for seed in arguments.seeds])
                gains.setdefault(card, {})[name] = own
                write_table(gains, arguments.seeds)
    print(RESULTS.read_text())


def validation_gain(clone: Path, changes: dict[str, object], seed: int) -> float:
    yaml, path = YAML(), clone / "params.yaml"
    text = path.read_text()
    params = yaml.load(text)
    params["train"] |= {"evaluations": 1} | changes
    with path.open("w") as file:
        yaml.dump(params, file)
    subprocess.run([sys.executable, "stages/train.py", str(seed)], cwd=clone, check=True)
    path.write_text(text)
    scores = json.loads((clone / f"metrics/train/{seed}.json").read_text())
    return scores["after"] - scores["before"]


def write_table(gains: dict[str, dict[str, np.ndarray]], seeds: list[int]) -> None:
    rows = [[name, *(cell(own, name) for own in gains.values())] for name in VARIANTS]
    table = tabulate(rows, ["recipe", *gains], "github", disable_numparse=True)
    RESULTS.write_text(f"<!-- Written by `make recipes`, seeds {seeds}. -->\n\n{table}\n")


def cell(gains: dict[str, np.ndarray], name: str) -> str:
    """The mean gain over the base; for a variant, how much more or less it is than the default's."""
    if name not in gains:
        return ""
    difference = gains[name] - gains["the default"]
    return f"{gains[name].mean():+.4f}" + (f" ({difference.mean():+.4f})" if name != "the default" else "")


if __name__ == "__main__":
    main()
