"""Data cards (data/cards/*.yaml), and the raw rows of the source that a card names."""

import csv
import hashlib
import json
import re
import sys
import warnings
from collections import Counter
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import AfterValidator, BeforeValidator, Field

from shared.errors import InputError
from shared.params import ROOT, Settings, check_settings, nearest, read_yaml
from shared.sources import first_line, hub_error, installed, resolve_path

CARDS = ROOT / "data/cards"
WATCHED_DATA = ROOT / "data/raw"  # the one folder of users' files that dvc.yaml declares as a dependency
Text = Annotated[str, Field(min_length=1)]
Split = Literal["train", "validation", "test"]


def check_one_or_splits(parts: Any) -> Any:
    one = isinstance(parts, str) and parts
    several = isinstance(parts, dict) and {"train", "test"} <= parts.keys() <= {"train", "validation", "test"}
    if not one and not several:
        raise ValueError("should be one name, or {train: NAME, test: NAME} (and validation) for splits of its own")
    return parts


OneOrSplits = Annotated[str | dict[Split, str], BeforeValidator(check_one_or_splits)]


def check_dataset(name: str) -> str:
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name):  # a path: the library would read that folder
        raise ValueError("a data set on the Hub is named org/name")
    return name


class Columns(Settings):
    """The source's own names for our columns. Without an id, rows are numbered."""

    anchor: Text
    positive: Text
    id: Text | None = None


class Card(Settings):
    title: Text
    licence: Text
    citation: Text
    url: Text | None = None
    # Rows are dropped where more than this share of the query's words stands in the passage. 1: none is.
    max_word_overlap: Annotated[float, Field(ge=0, le=1)] = 1.0


class HubCard(Card):
    """A data set on the Hub; `split` is one of its splits, to be divided, or a mapping from our splits to its own."""

    source: Literal["hub"]
    dataset: Annotated[str, AfterValidator(check_dataset)]
    config: Text | None = None
    revision: Text
    split: OneOrSplits
    columns: Columns


class FilesCard(Card):
    """One's own JSONL, JSON, CSV or Parquet; `path` is one file, to be divided, or a mapping from split to file."""

    source: Literal["files"]
    path: OneOrSplits
    columns: Columns


class OboCard(Card):
    """An ontology in OBO format inside a Python package: synonyms of one type → the definition of their term."""

    source: Literal["obo"]
    package: Text
    file: Text
    revision: Text
    synonym_type: Text


SOURCES = {"hub": HubCard, "files": FilesCard, "obo": OboCard}


class Part(NamedTuple):
    """Raw rows as the source has them, in its order. `split` is None where the card leaves the division to prepare."""

    split: Split | None
    origin: str  # for error messages: a file, or a data set's split
    rows: list[dict[str, Any]]


class Source(NamedTuple):
    parts: list[Part]
    columns: Columns
    revision: str  # what the card's revision resolved to


def read_card(name: str) -> HubCard | FilesCard | OboCard:
    """data/cards/<name>.yaml. Raises InputError, which lists the cards that there are."""
    path = CARDS / f"{name}.yaml"
    known = sorted(card.stem for card in CARDS.glob("*.yaml"))
    if name not in known:
        raise InputError(f"params.yaml: prepare.card: there is no data/cards/{name}.yaml{nearest(name, known)}")
    settings = read_yaml(path)
    source = settings.get("source")
    if not isinstance(source, str) or source not in SOURCES:
        raise InputError(f"data/cards/{name}.yaml: source is {source!r}: should be one of {', '.join(SOURCES)}")
    return check_settings(settings, SOURCES[source], path)


def load(card: HubCard | FilesCard | OboCard) -> Source:
    """All raw rows of the card's source. Raises InputError."""
    loaders = {"hub": load_hub, "files": load_files, "obo": load_obo}
    return loaders[card.source](card)


def by_split(value: str | dict[Split, str]) -> list[tuple[Split | None, str]]:
    return [(None, value)] if isinstance(value, str) else list(value.items())


# --- the Hub ---


def load_hub(card: HubCard) -> Source:
    from datasets import load_dataset  # two seconds of imports that other sources need not pay

    if Path(card.dataset).exists():
        raise InputError(f"{card.dataset} is a folder here and not on the Hub; for files of your own, `source: files`")
    revision = resolve_revision(card)
    parts = []
    for split, name in by_split(card.split):
        try:
            data = load_dataset(card.dataset, card.config, split=name, revision=revision)
        except Exception as error:
            raise hub_error(error, "data set", f"{card.dataset}@{card.revision}") from error
        # Where the Hub is out of reach, the library takes the newest revision in its cache for any.
        if any(Path(file["filename"]).parent.name != revision for file in data.cache_files):
            raise InputError(
                f"data set {card.dataset}: the Hub cannot be reached, and the cache holds another revision than"
                f" {revision}; run once with the Hub in reach"
            )
        parts.append(Part(split, f"{card.dataset} ({name})", data.to_list()))
    return Source(parts, card.columns, revision)


def resolve_revision(card: HubCard) -> str:
    """The commit that the card's revision (a branch, a tag or a commit) stands for now."""
    from huggingface_hub import HfApi

    if re.fullmatch("[0-9a-f]{40}", card.revision):
        return card.revision  # a commit stands for itself; not asking keeps a downloaded data set usable offline
    try:
        return HfApi().dataset_info(card.dataset, revision=card.revision).sha
    except Exception as error:
        raise hub_error(error, "data set", f"{card.dataset}@{card.revision}") from error


# --- one's own files ---


def load_files(card: FilesCard) -> Source:
    paths = [(split, name, resolve_path(name, WATCHED_DATA)) for split, name in by_split(card.path)]
    parts = [Part(split, name, read_rows(name, path)) for split, name, path in paths]
    content = hashlib.sha256(b"".join(path.read_bytes() for _, _, path in paths))
    return Source(parts, card.columns, revision=f"sha256:{content.hexdigest()}")


def read_rows(name: str, path: Path) -> list[dict[str, Any]]:
    """The rows of one file, whose ending says what it is. Raises InputError."""
    readers = {".jsonl": read_jsonl, ".json": read_json, ".csv": read_csv, ".parquet": read_parquet}
    if path.suffix not in readers:
        raise InputError(f"{name}: the ending {path.suffix or '(none)'} is none of {', '.join(readers)}")
    try:
        rows = readers[path.suffix](path)
    except FileNotFoundError:
        raise InputError(f"{name} does not exist; put it there, or correct `path` in the data card") from None
    except IsADirectoryError:
        raise InputError(f"{name} is a folder; `path` in the data card names a file") from None
    except PermissionError:
        raise
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise InputError(f"{name} is not UTF-8 (it holds the byte {byte:#04x}); save it as UTF-8") from None
    except (ValueError, OSError, RecursionError) as error:  # pyarrow: OSError where a block is damaged
        raise InputError(f"{name} is no valid {path.suffix[1:]} file: {first_line(error)}") from None
    if not all(isinstance(row, dict) for row in rows):
        raise InputError(f"{name} is no list of rows: each row must be an object such as {{'question': …}}")
    return rows


def read_jsonl(path: Path) -> list[Any]:
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), start=1):
        try:
            if line.strip():
                rows.append(json.loads(line))
        except ValueError as error:
            raise ValueError(f"line {number}: {error}".replace("line 1 column", "column")) from None
    return rows


def read_json(path: Path) -> list[Any]:
    rows = json.loads(path.read_text(encoding="utf-8-sig"))
    if not isinstance(rows, list):
        raise ValueError("it must hold a list of rows")
    return rows


def read_csv(path: Path) -> list[dict[str, Any]]:
    csv.field_size_limit(sys.maxsize)  # the default refuses texts over 128 KiB
    with path.open(encoding="utf-8-sig", newline="") as lines:
        reader = csv.DictReader(lines, strict=True)
        try:
            rows = list(reader)
        except csv.Error as error:
            raise ValueError(f"line {reader.reader.line_num}: {error}") from None
    names = reader.fieldnames or []
    if len(names) == 1:
        raise ValueError(f"its first line, {names[0]!r:.60}, has no comma, which divides columns")
    if twice := [name for name, count in Counter(names).items() if name and count > 1]:
        raise ValueError(f"its first line names {twice[0]!r} twice")
    for number, row in enumerate(rows, start=1):
        if None in row:
            raise ValueError(f"row {number} has more cells than the header has names")
    return rows


def read_parquet(path: Path) -> list[dict[str, Any]]:
    import pyarrow.parquet  # half a second that other formats need not pay

    return pyarrow.parquet.read_table(path).to_pylist()


# --- an ontology inside a Python package ---


def load_obo(card: OboCard) -> Source:
    import pronto

    files = {str(file): Path(file.locate()) for file in installed(card.package).files or []}
    path = files.get(card.file)
    if path is None or not path.is_file():
        raise InputError(f"the package {card.package} carries no {card.file}; install the version in requirements.txt")
    try:
        with warnings.catch_warnings(action="ignore"):  # pronto warns about cross-references that are not used here
            ontology = pronto.Ontology(path, encoding="utf-8")
    except Exception as error:
        raise InputError(f"{card.file} of the package {card.package} is no ontology: {first_line(error)}") from error
    release = ontology.metadata.data_version
    if release != card.revision:
        raise InputError(
            f"the package {card.package} holds {release}, and the data card asks for {card.revision};"
            " install the version in requirements.txt, or change the card"
        )
    rows = [
        {"id": f"{term.id}/{number}", "anchor": synonym, "positive": str(term.definition)}
        for term in sorted(ontology.terms(), key=lambda term: term.id)
        if term.definition and not term.obsolete
        for number, synonym in enumerate(synonyms_of_type(term, card.synonym_type), start=1)
    ]
    if not rows:
        known = sorted(synonym_type.id for synonym_type in ontology.synonym_types())
        raise InputError(f"{card.file}: no synonym is of type {card.synonym_type!r}{nearest(card.synonym_type, known)}")
    return Source([Part(None, card.file, rows)], Columns(anchor="anchor", positive="positive", id="id"), release)


def synonyms_of_type(term: Any, synonym_type: str) -> list[str]:
    """Sorted, since pronto keeps them in a set, whose order changes from run to run."""
    return sorted({s.description for s in term.synonyms if s.type is not None and s.type.id == synonym_type})
