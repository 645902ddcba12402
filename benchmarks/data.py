"""The data sets of the benchmarks, prepared by the pipeline's own stage in a clone of the last commit."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
from ruamel.yaml import YAML

ROOT = Path(__file__).resolve().parents[1]
# Where the base model finds less and where it finds more; short passages and long ones.
CARDS = ["hpo-lay", "mondo"]
MIN_WORDS, ROWS = 10, 2_000  # of the MONDO definitions: 60 tokens on average, 200 at the 99th percentile


def prepare(clone: Path, card: str, changes: dict[str, object]) -> None:
    """Clone the last commit, change params by their dotted names, and run its stage `prepare`."""
    measured = ["stages", "params.yaml", "benchmarks/*.py"]
    if subprocess.check_output(["git", "status", "--porcelain", "--", *measured], cwd=ROOT):
        sys.exit(f"{', '.join(measured)} are not those of the last commit, which is measured; commit them first")
    subprocess.run(["git", "clone", "--quiet", ROOT, clone], check=True)
    if card == "mondo":
        write_mondo(clone)
    yaml, path = YAML(), clone / "params.yaml"
    params = yaml.load(path)
    for name, value in {"prepare.card": card, **changes}.items():
        section, key = name.split(".")
        params[section][key] = value
    yaml.dump(params, path)
    subprocess.run([sys.executable, "stages/prepare.py"], cwd=clone, check=True)


def write_mondo(clone: Path) -> None:
    """Disease names → definitions of some length, as a data card and its file."""
    import cellxgene_ontology_guide
    import zstandard

    folder = Path(cellxgene_ontology_guide.__file__).parent / "data"
    newest = max(folder.glob("MONDO-ontology-*.json.zst"))
    terms = json.loads(zstandard.ZstdDecompressor().stream_reader(newest.read_bytes()).read())
    pairs = [
        {"name": term["label"], "definition": term["description"]}
        for _, term in sorted(terms.items())
        if not term.get("deprecated") and len(term.get("description", "").split()) >= MIN_WORDS
    ]
    chosen = np.random.default_rng(0).permutation(len(pairs))[:ROWS]
    with (clone / "data/raw/mondo.jsonl").open("w") as file:
        file.writelines(json.dumps(pairs[place]) + "\n" for place in sorted(chosen))
    (clone / "data/cards/mondo.yaml").write_text(
        "title: MONDO disease names → definitions\nsource: files\npath: data/raw/mondo.jsonl\n"
        "columns: {anchor: name, positive: definition}\n"
        "licence: CC BY 4.0\ncitation: Vasilevsky et al. (2022), Mondo\n"
    )


def rows_of(clone: Path, name: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (clone / f"data/prepared/{name}.jsonl").read_text().splitlines()]
