"""Where data and models come from: a path, an installed package, the Hub; and what to say when they cannot be had."""

import importlib.metadata
from pathlib import Path

from shared.errors import InputError, causes
from shared.params import ROOT

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
    path = Path(name) if Path(name).is_absolute() else (ROOT / name).resolve()
    if not Path(name).is_absolute() and not path.is_relative_to(ROOT):
        raise InputError(f"{name} leaves the repo; give an absolute path if that is meant")
    if not path.is_relative_to(watched):
        folder = watched.relative_to(ROOT)
        print(f"note: DVC does not watch {name}; put it under {folder}/, or `dvc repro --force` when it changes")
    return path


def installed(package: str) -> importlib.metadata.Distribution:
    """The installed package, without importing it. Raises InputError."""
    try:
        return importlib.metadata.distribution(package)
    except importlib.metadata.PackageNotFoundError:
        raise InputError(
            f"the package {package} is not installed; `pip install {package}`, or check the name"
        ) from None


def hub_error(error: Exception, kind: str, name: str, default: str) -> InputError:
    """What went wrong at the Hub, and what to do; `default` is the setting that needs no Hub."""
    names = {type(link).__name__ for link in causes(error)}
    if "GatedRepoError" in names:
        return InputError(f"{kind} {name} is gated: accept its terms on its page, then log in with `hf auth login`")
    if "RevisionNotFoundError" in names:
        return InputError(f"{kind} {name}: there is no such revision; take a commit, tag or branch from its page")
    if names & {"RepositoryNotFoundError", "DatasetNotFoundError", "HFValidationError"}:
        return InputError(f"{kind} {name} is not on the Hub, or is private: check the name, or `hf auth login`")
    if names & HUB_UNREACHABLE:
        return InputError(
            f"{kind} {name}: the Hub cannot be reached. Check the network and HF_ENDPOINT, HF_HUB_OFFLINE;"
            f"\nwhat needs no Hub: dvc exp run {default}"
        )
    return InputError(f"{kind} {name} could not be loaded: {first_line(error)}")


def first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
