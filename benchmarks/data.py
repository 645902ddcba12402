"""The data sets of the benchmarks, prepared by the pipeline's own stage in a clone of the last commit."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
from ruamel.yaml import YAML

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "stages"))
from shared.errors import InputError
from shared.params import ROOT, read_params

try:
    PARAMS = read_params()
except InputError as error:
    sys.exit(str(error))
# Names → definitions of at least ten words, at most so many of them: ontology, rows, title, citation.
MIN_WORDS = 10
ONTOLOGIES = {
    "mondo": ("MONDO", 2_000, "MONDO disease names → definitions", "Vasilevsky et al. (2022), Mondo"),
    "uberon": ("UBERON", 5_000, "Uberon anatomy names → definitions", "Mungall et al. (2012), Uberon"),
}
# Where the base model finds less and where it finds more; short passages and long ones.
CARDS = ["hpo-lay", *ONTOLOGIES]


def prepare(clone: Path, card: str, changes: dict[str, object]) -> None:
    """Clone the last commit, change params by their dotted names, and run its stage `prepare` on this folder's data."""
    measured = ["stages", "params.yaml", "benchmarks/*.py"]
    if subprocess.check_output(["git", "status", "--porcelain", "--", *measured], cwd=ROOT):
        sys.exit(
            f"{', '.join(measured)} are not those of the last commit, which is measured: commit them, or bring"
            " params.yaml back (`git checkout params.yaml`) if its default is meant"
        )
    subprocess.run(["git", "clone", "--quiet", ROOT, clone], check=True)
    for own in ("data/cards", "data/raw"):  # of which Git may not have all
        shutil.copytree(ROOT / own, clone / own, dirs_exist_ok=True)
    if card in ONTOLOGIES:
        write_definitions(clone, card)
    yaml, path = YAML(), clone / "params.yaml"
    params = yaml.load(path)
    for name, value in {"prepare.card": card, **changes}.items():
        section, key = name.split(".")
        params[section][key] = value
    yaml.dump(params, path)
    if subprocess.run([sys.executable, "stages/prepare.py"], cwd=clone).returncode:
        sys.exit(1)  # it has said why


def write_definitions(clone: Path, card: str) -> None:
    """Names of an ontology's terms → their definitions, as a data card and its file."""
    try:
        import cellxgene_ontology_guide
        import zstandard
    except ImportError as error:
        sys.exit(f"the data {card} need {error.name}: `pip install --requirement benchmarks/requirements.txt`")

    ontology, rows, title, citation = ONTOLOGIES[card]
    folder = Path(cellxgene_ontology_guide.__file__).parent / "data"
    newest = max(folder.glob(f"{ontology}-ontology-*.json.zst"))
    terms = json.loads(zstandard.ZstdDecompressor().stream_reader(newest.read_bytes()).read())
    pairs = [
        {"name": term["label"], "definition": term["description"]}
        for _, term in sorted(terms.items())
        if not term.get("deprecated") and len(term.get("description", "").split()) >= MIN_WORDS
    ]
    chosen = np.random.default_rng(0).permutation(len(pairs))[:rows]
    with (clone / f"data/raw/{card}.jsonl").open("w") as file:
        file.writelines(json.dumps(pairs[place]) + "\n" for place in sorted(chosen))
    (clone / f"data/cards/{card}.yaml").write_text(
        f"title: {title}\nsource: files\npath: data/raw/{card}.jsonl\n"
        "columns: {anchor: name, positive: definition}\n"
        f"licence: CC BY 4.0\ncitation: {citation}\n"
    )


def rows_of(clone: Path, name: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (clone / f"data/prepared/{name}.jsonl").read_text().splitlines()]
