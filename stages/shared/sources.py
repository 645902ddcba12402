"""Where data and models come from: a path, an installed package, the Hub; and what to say when they cannot be had."""

import importlib.metadata
import json
import os
import re
from pathlib import Path
from typing import Any, Literal

from shared.errors import InputError, causes
from shared.params import ROOT

WATCHED_MODELS = ROOT / "models/local"  # its folders base and reference are dependencies in dvc.yaml
# A repository on the Hub holds the same weights in many formats. Only safetensors is loaded: pickles run code.
HUB_FILES = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.txt", "*.model", "*.codes", "*.jinja"]
HUB_EXCLUDED = ["onnx/*", "openvino/*"]
# Where a link leads that DVC itself made, with a cache outside the repo.
DVC_CACHE = re.compile("/files/md5/[0-9a-f]{2}/[0-9a-f]{30}$")
HUB_UNREACHABLE = {
    "ConnectionError",
    "ConnectError",
    "ConnectTimeout",
    "ReadTimeout",
    "TimeoutError",
    "LocalEntryNotFoundError",
    "OfflineModeIsEnabled",
    "OfflineModeIsEnabledError",
    "ProxyError",
    "gaierror",
}


def resolve_path(name: str, watched: Path) -> Path:
    """A path from a card or a param: absolute, or inside the repo. Says so where DVC does not see the file change."""
    path = Path(os.path.normpath(ROOT / name))
    target = path.resolve()  # of links too, since a link may come with somebody's branch
    if not (Path(name).is_absolute() or target.is_relative_to(ROOT) or DVC_CACHE.search(target.as_posix())):
        raise InputError(f"{name} leaves the repo, to {target}; give an absolute path if that is meant")
    if not path.is_relative_to(watched):
        folder = watched.relative_to(ROOT)
        print(f"note: DVC does not watch {name}; put it under {folder}/, or `dvc repro --force` when it changes")
    return path


def installed(package: str) -> importlib.metadata.Distribution:
    """The installed package, without importing it. Raises InputError."""
    try:
        return importlib.metadata.distribution(package)
    except importlib.metadata.PackageNotFoundError:
        raise InputError(f"the package {package} is not installed; check the name, or install it") from None


def model_folder(name: str, role: Literal["base", "reference"]) -> Path:
    """Where the model's files are; those of a Hub model are downloaded. `name` is as params.yaml explains it.

    Raises InputError, also for a folder that holds no model, or no weights as safetensors.
    """
    if name.startswith("package:"):
        folder = packaged_model(name.removeprefix("package:"))
    elif name.startswith(("./", "/")):
        folder = resolve_path(name, WATCHED_MODELS / role)
        if not folder.is_dir():
            raise InputError(
                f"{name} is no folder. A Hub model is named org/name@revision; your own comes to another clone by"
                "\n`dvc add`, git commit and `dvc push`, and there `dvc pull`"
            )
    else:
        folder = hub_model(name)
    check_model(folder, name)
    return folder


def check_model(folder: Path, name: str) -> None:
    """Raises InputError where the folder cannot be a model; reads no weights. `name` is for errors."""
    if not any((folder / file).is_file() for file in ("modules.json", "config.json")):
        raise InputError(f"{name} is no model: {folder} holds neither modules.json nor config.json")
    if (folder / "adapter_config.json").is_file():
        raise InputError(f"{name} is an adapter; merge it into its model first (`merge_and_unload` of peft)")
    kind = setting(folder / "config_sentence_transformers.json", "model_type") or "SentenceTransformer"
    if not (folder / "modules.json").is_file() and "ForSequenceClassification" in str(
        setting(folder / "config.json", "architectures")
    ):
        kind = "CrossEncoder"
    if kind != "SentenceTransformer":
        raise InputError(f"{name} is a {kind}; what is needed is a SentenceTransformer, which makes a text one vector")
    pickled = [path for path in folder.rglob("pytorch_model.bin") if not any(path.parent.glob("*.safetensors"))]
    if pickled or not any(folder.rglob("*.safetensors")):
        raise InputError(f"{name} has weights that are not safetensors in {folder}; others may run code: convert them")
    if needs_code(folder):
        raise InputError(f"{name} needs code of its own to load, which is never run; take another model")


def setting(file: Path, name: str) -> Any:
    """What the JSON file says; None where it does not, or cannot be read, of which loading tells."""
    try:
        return json.loads(file.read_text(encoding="utf-8")).get(name)
    except (OSError, ValueError, AttributeError):
        return None


def needs_code(folder: Path) -> bool:
    """Whether modules.json names a class that sentence-transformers or torch does not have."""
    try:
        modules = json.loads((folder / "modules.json").read_text(encoding="utf-8"))
        dense = [folder / module["path"] / "config.json" for module in modules if module["type"].endswith(".Dense")]
        # For an activation of another origin the library would take tanh, and not say so but in its log.
        activations = [json.loads(path.read_text(encoding="utf-8"))["activation_function"] for path in dense]
        return not all(
            [module["type"].startswith("sentence_transformers.") for module in modules]
            + [activation.startswith("torch.") for activation in activations]
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False  # there is none, or it is damaged, of which loading tells


def packaged_model(package: str) -> Path:
    """The folder inside an installed package that holds modules.json. Nothing of the package is imported."""
    files = installed(package).files or []
    folders = [Path(file.locate()).parent for file in files if file.name == "modules.json"]
    if not folders:
        raise InputError(f"the package {package} carries no sentence-transformers model (no modules.json)")
    return folders[0]


def hub_model(name: str) -> Path:
    from huggingface_hub import get_cached_repo_tree, snapshot_download  # half a second that others need not pay

    repository, _, revision = name.partition("@")
    try:
        folder = Path(
            snapshot_download(repository, revision=revision, allow_patterns=HUB_FILES, ignore_patterns=HUB_EXCLUDED)
        )
        if not (folder / "modules.json").is_file():
            # Offline, what another program has cached of it may pass for the whole: the listing of all tells.
            get_cached_repo_tree(repository, revision=revision)
        return folder
    except Exception as error:
        raise hub_error(error, "model", name) from error


def hub_error(error: Exception, kind: str, name: str) -> InputError:
    """What went wrong at the Hub, and what to do."""
    names = {type(link).__name__ for link in causes(error)}
    if "CachedRepoTreeNotFoundError" in names:
        return InputError(f"{kind} {name}: the cache may hold a part of it only; run once with the Hub in reach")
    if "GatedRepoError" in names or any("is a gated dataset" in str(link) for link in causes(error)):
        return InputError(f"{kind} {name} is gated: accept its terms on its page, then log in with `hf auth login`")
    if "RevisionNotFoundError" in names:
        return InputError(f"{kind} {name}: there is no such revision; take a commit, tag or branch from its page")
    if any("scripts are no longer supported" in str(link) for link in causes(error)):
        return InputError(f"{kind} {name} needs code of its own to load, which is never run; convert it to Parquet")
    if names & {"RepositoryNotFoundError", "DatasetNotFoundError", "HFValidationError"}:
        return InputError(f"{kind} {name} is not on the Hub, or is private: check the name, or `hf auth login`")
    if names & HUB_UNREACHABLE:
        return InputError(
            f"{kind} {name}: the Hub cannot be reached; check the network, HF_ENDPOINT and HF_HUB_OFFLINE."
            "\nThe default experiment needs no Hub: `git checkout params.yaml dvc.lock metrics`, then `dvc repro`"
        )
    return InputError(f"{kind} {name} could not be loaded: {first_line(error)}")


def first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
