"""The data contract of data/prepared/, and files and folders that are written whole or not at all.

train.jsonl, validation.jsonl, test.jsonl: rows {"id", "anchor", "positive", "document_id"}; anchor is the query's text,
positive the passage that answers it. corpus.jsonl: rows {"id", "text"}, every passage of every split.
"""

import csv
import io
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from shared.errors import InputError
from shared.params import ROOT

PREPARED = ROOT / "data/prepared"
METRICS = ROOT / "metrics"
RANKINGS = ROOT / "data/rankings"
CURVES = METRICS / "curves"  # of training: <seed>/{loss,validation}.csv
ENVIRONMENT = METRICS / "environment"  # <stage>.json, as shared.environment describes it
FINETUNED = ROOT / "models/finetuned"  # one model a seed: <seed>/
ROW_FIELDS = ("id", "anchor", "positive", "document_id")
DOCUMENT_FIELDS = ("id", "text")
NEAR_DUPLICATE_FIELDS = ("id", "column", "text", "similarity", "other_id", "other_text")
RANKING_FIELDS = ("query_id", "query", "results")

Row = dict[str, str]
Ranking = dict[str, Any]  # {"query_id", "query", "results": [{"corpus_id", "score"}, ...]}, best first


def read_split(split: str) -> list[Row]:
    """The rows of data/prepared/<split>.jsonl. Raises InputError."""
    return read_jsonl(PREPARED / f"{split}.jsonl", ROW_FIELDS)


def read_corpus() -> dict[str, str]:
    """Document id → text of every passage, in the file's order. Raises InputError."""
    return {row["id"]: row["text"] for row in read_jsonl(PREPARED / "corpus.jsonl", DOCUMENT_FIELDS)}


def read_ranking(model: Literal["base", "reference"]) -> list[Ranking]:
    """data/rankings/<model>.jsonl. Raises InputError."""
    return read_jsonl(RANKINGS / f"{model}.jsonl", RANKING_FIELDS, stage="baseline_eval")


def read_near_duplicates() -> set[str]:
    """Ids of the test rows that data/prepared/near_duplicates.jsonl lists. Raises InputError."""
    path = PREPARED / "near_duplicates.jsonl"
    return {row["id"] for row in read_jsonl(path, NEAR_DUPLICATE_FIELDS, may_be_empty=True)}


def read_jsonl(
    path: Path, fields: tuple[str, ...], stage: str = "prepare", may_be_empty: bool = False
) -> list[dict[str, Any]]:
    name = path.relative_to(ROOT)
    try:
        with path.open(encoding="utf-8") as lines:
            rows = [json.loads(line) for line in lines]
        if not (rows or may_be_empty) or any(tuple(row) != fields for row in rows):
            raise ValueError
    except FileNotFoundError:
        raise InputError(f"{name} is missing; `dvc repro {stage}` writes it") from None
    except (ValueError, TypeError):
        raise InputError(f"{name} is damaged; `dvc repro --force {stage}` writes it anew") from None
    return rows


def read_metrics(name: str) -> dict[str, Any]:
    """metrics/<name>.json. Raises InputError."""
    path = METRICS / f"{name}.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        raise InputError(f"metrics/{name}.json is missing or damaged; `dvc repro` writes it anew") from None


def rounded(value: float) -> float:
    """To six digits: far below what any test set resolves, far above float noise."""
    return round(float(value), 6)


def write_text(path: Path, text: str) -> None:
    """Write the file whole or not at all: under a temporary name, then renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())  # else a power cut may leave an empty file under the final name
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, ensure_ascii=False, indent=2) + "\n")


def write_csv(path: Path, header: list[str], rows: Iterable[Iterable[Any]]) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    write_text(path, text.getvalue())


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """An empty folder to fill, which takes the place of `folder` in the end, whole or not at all."""
    temporary, old = (folder.with_name(f"{folder.name}.{ending}") for ending in ("tmp", "old.tmp"))
    try:
        remove(temporary, old)
        temporary.mkdir(parents=True)
        yield temporary
        for path in temporary.rglob("*"):
            if path.is_file():
                with path.open("rb") as file:
                    os.fsync(file.fileno())  # see write_text
        if folder.exists():
            folder.rename(old)  # a rename leaves nothing half-removed under the final name
        temporary.rename(folder)
    finally:
        remove(temporary, old)


def remove(*folders: Path) -> None:
    for folder in folders:
        if folder.exists():
            shutil.rmtree(folder)
