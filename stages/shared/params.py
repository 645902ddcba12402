"""params.yaml, read once and checked whole: every name, type and range, before any work is done.

The YAML is read by ruamel.yaml, since `dvc exp run -S train.learning_rate=3e-5` writes `3e-05`, which is a float
in YAML 1.2 (ruamel.yaml, and DVC itself) and a string to PyYAML.
"""

import difflib
import re
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from shared.errors import InputError

ROOT = Path(__file__).resolve().parents[2]
PARAMS_FILE = ROOT / "params.yaml"


class Settings(BaseModel):
    """A section of a YAML file: unknown names are refused and nothing is converted ("3" is no number)."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


SettingsType = TypeVar("SettingsType", bound=Settings)
Metric = Literal["ndcg@10", "mrr@10", "map@100", "accuracy@1", "accuracy@3", "accuracy@5", "accuracy@10"]
Seed = Annotated[int, Field(ge=0, le=2**32 - 1)]


class PrepareParams(Settings):
    card: Annotated[str, Field(min_length=1)]
    merge_identical_passages: bool
    drop_empty_rows: bool
    validation_fraction: Annotated[float, Field(gt=0, lt=1)]
    test_fraction: Annotated[float, Field(gt=0, lt=1)]
    near_duplicate_similarity: Annotated[float, Field(gt=0, le=1)]
    seed: Seed


def check_model_name(name: str) -> str:
    """See `shared.sources.model_folder`, which turns the name into a folder."""
    if name == "bm25" or name.startswith(("./", "/")) or (name.startswith("package:") and name != "package:"):
        return name
    repository, _, revision = name.partition("@")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository) or name.startswith("."):
        raise ValueError("a model is named org/name@revision, package:NAME, ./path or /path (the reference also bm25)")
    if not revision:
        raise ValueError(f"a Hub model needs a revision: {repository}@COMMIT (or, not repeatable, {repository}@main)")
    return name


def check_trainable(name: str) -> str:
    if name == "bm25":
        raise ValueError("bm25 has no weights to fine-tune; it can be models.reference")
    return name


ModelName = Annotated[str, AfterValidator(check_model_name)]


class ModelsParams(Settings):
    base: Annotated[ModelName, AfterValidator(check_trainable)]
    reference: ModelName


def check_minimum_gain(gain: Any) -> Any:
    number = isinstance(gain, int | float) and not isinstance(gain, bool)
    if gain != "off" and not (number and -1 <= gain <= 1):
        raise ValueError("should be off, or a number from -1 to 1")
    return gain


class EvaluateParams(Settings):
    primary_metric: Metric
    minimum_gain: Annotated[float | Literal["off"], BeforeValidator(check_minimum_gain)]
    batch_size: Annotated[int, Field(ge=1, le=65536)]


def check_dropout(share: Any) -> Any:
    number = isinstance(share, int | float) and not isinstance(share, bool)
    if share != "model" and not (number and 0 <= share < 1):
        raise ValueError("should be model, or a number from 0 up to 1")
    return share


def check_distinct(seeds: list[int]) -> list[int]:
    if len(set(seeds)) < len(seeds):
        raise ValueError("each seed stands once")
    return seeds


class TrainParams(Settings):
    learning_rate: Annotated[float, Field(gt=0, lt=1)]
    epochs: Annotated[float, Field(gt=0, le=1000)]
    batch_size: Annotated[int, Field(ge=2, le=65536)]
    warmup: Annotated[float, Field(ge=0, lt=1)]
    symmetric: bool
    scale: Annotated[float, Field(gt=0, le=1000)]
    hardness: Annotated[float, Field(ge=0, le=1000)]
    gradient_share: Annotated[float, Field(gt=0, le=1)]
    dropout: Annotated[float | Literal["model"], BeforeValidator(check_dropout)]
    precision: Literal["auto", "fp32", "bf16", "fp16"]
    base_share: Annotated[float, Field(ge=0, lt=1)]
    evaluations: Annotated[int, Field(ge=1, le=1000)]
    checkpoints: Annotated[int, Field(ge=1, le=1000)]
    processes: Annotated[int, Field(ge=1, le=1024)]
    seeds: Annotated[list[Seed], Field(min_length=1), AfterValidator(check_distinct)]
    arguments: dict[str, Any]

    @model_validator(mode="after")
    def check_processes(self) -> "TrainParams":
        if self.batch_size % self.processes:
            raise ValueError(f"batch_size {self.batch_size} should be a multiple of processes {self.processes}")
        return self


class Params(Settings):
    prepare: PrepareParams
    models: ModelsParams
    evaluate: EvaluateParams
    train: TrainParams


def read_params() -> Params:
    """The whole of params.yaml. Raises InputError, which names the param and what it may be."""
    return check_settings(read_yaml(PARAMS_FILE), Params, PARAMS_FILE)


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file that holds a mapping. Raises InputError."""
    name = path.relative_to(ROOT)
    try:
        text = path.read_text(encoding="utf-8")
        if re.search("^<{7} ", text, re.MULTILINE):
            raise InputError(f"{name} holds a merge conflict; resolve it first (how: README, Share it)")
        settings = YAML(typ="safe", pure=True).load(text)
    except FileNotFoundError:
        raise InputError(f"{name} is missing; `git checkout -- {name}` brings it back") from None
    except (YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}:" if mark else ""
        raise InputError(f"{name} is not valid YAML:{line} {getattr(error, 'problem', None) or error}") from None
    if not isinstance(settings, dict):
        raise InputError(f"{name} must hold `name: value` lines; `git diff {name}` shows what has changed")
    return settings


def check_settings(settings: dict[str, Any], schema: type[SettingsType], path: Path) -> SettingsType:
    """The settings as `schema` has them; `path` is for errors. Raises InputError."""
    try:
        return schema.model_validate(settings)
    except ValidationError as error:
        raise InputError(f"{path.relative_to(ROOT)}: {describe(error, schema)}") from None


def describe(error: ValidationError, schema: type[Settings]) -> str:
    """The first thing that is wrong, in one line; and how many more there are."""
    # A mistyped name is both unknown and missing; the unknown one tells more.
    first, *others = sorted(error.errors(), key=lambda one: one["type"] != "extra_forbidden")
    where = ".".join(str(part) for part in first["loc"]) or "the file"
    if first["type"] == "extra_forbidden":
        what = f"{where} is unknown" + nearest(str(first["loc"][-1]), names_at(schema, first["loc"][:-1]))
    elif first["type"] == "missing":
        what = f"{where} is missing"
    else:
        message = re.sub("^(Value error, |(Input|String|Dictionary|List) should )", "", first["msg"])
        should = "" if first["type"] == "value_error" else "should "
        given = first["input"]
        value = "" if isinstance(given, dict | Settings) else " is empty" if given is None else f" is {given!r}"
        what = f"{where}{value}: {should}{message}"
    return what + (f" (and {len(others)} more)" if others else "")


def names_at(schema: type[Settings], location: tuple[int | str, ...]) -> list[str]:
    """The names that are valid in the section at `location`."""
    for part in location:
        field = schema.model_fields.get(str(part))
        if field is not None and isinstance(field.annotation, type) and issubclass(field.annotation, Settings):
            schema = field.annotation
    return list(schema.model_fields)


def nearest(name: str, valid: list[str]) -> str:
    """What may have been meant, as the end of an error message."""
    match = difflib.get_close_matches(name, valid, n=1, cutoff=0.5)
    return f"; did you mean {match[0]}?" if match else f"; valid names: {', '.join(sorted(valid))}"
