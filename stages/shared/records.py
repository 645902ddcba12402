"""The data contract of data/prepared/, and files that are written whole or not at all.

train.jsonl, validation.jsonl, test.jsonl: rows {"id", "anchor", "positive", "document_id"}; anchor is the query's text,
positive the passage that answers it. corpus.jsonl: rows {"id", "text"}, every passage of every split.
"""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from shared.errors import InputError
from shared.params import ROOT

PREPARED = ROOT / "data/prepared"
METRICS = ROOT / "metrics"
RANKINGS = ROOT / "data/rankings"
FINETUNED = ROOT / "models/finetuned"
ROW_FIELDS = ("id", "anchor", "positive", "document_id")
DOCUMENT_FIELDS = ("id", "text")
DIGITS = 6  # of a metric; far below what any test set resolves, far above float noise

Row = dict[str, str]


def read_split(split: str) -> list[Row]:
    """The rows of data/prepared/<split>.jsonl. Raises InputError."""
    return read_jsonl(PREPARED / f"{split}.jsonl", ROW_FIELDS)


def read_corpus() -> dict[str, str]:
    """Document id → text of every passage, in the file's order. Raises InputError."""
    return {row["id"]: row["text"] for row in read_jsonl(PREPARED / "corpus.jsonl", DOCUMENT_FIELDS)}


def read_jsonl(path: Path, fields: tuple[str, ...]) -> list[Row]:
    name = path.relative_to(ROOT)
    try:
        with path.open(encoding="utf-8") as lines:
            rows = [json.loads(line) for line in lines]
        if not rows or any(tuple(row) != fields for row in rows):
            raise ValueError
    except FileNotFoundError:
        raise InputError(f"{name} is missing; `dvc repro prepare` writes it") from None
    except (ValueError, TypeError):
        raise InputError(f"{name} is damaged; `dvc repro --force prepare` writes it anew") from None
    return rows


def read_metrics(name: str) -> dict[str, Any]:
    """metrics/<name>.json. Raises InputError."""
    path = METRICS / f"{name}.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        raise InputError(f"metrics/{name}.json is missing or damaged; `dvc repro` writes it anew") from None


def write_text(path: Path, text: str) -> None:
    """Write the file whole or not at all: under a temporary name, then renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.write_text(text, encoding="utf-8", newline="\n")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, ensure_ascii=False, indent=2) + "\n")


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
