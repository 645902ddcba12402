"""Errors for people: one or two lines that say what is wrong, where, and what to do; no traceback; exit code 1."""

import errno
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
# safetensors (Rust) and torch.save (C++) report a full disk in words only, without an errno.
DISK_FULL_WORDS = re.compile(r"os error (28|122|27)\b|No space left|file write failed|unexpected pos \d")

# torch on a CPU, CUDA and MPS say so in words, too.
OUT_OF_MEMORY_WORDS = re.compile("out of memory|(can't|cannot) allocate memory", re.IGNORECASE)


class InputError(Exception):
    """Something that the person who started the run can mend; the message says what, where and how."""


def run(main: Callable[[], None]) -> None:
    """Run a stage's main(). What a person can mend ends in a short message; a bug keeps its traceback."""
    stage = Path(sys.argv[0]).name
    try:
        main()
    except InputError as error:
        sys.exit(f"{stage}: {printable(str(error))}")
    except KeyboardInterrupt:
        print(
            f"\n{stage}: interrupted; the same command goes on from here",
            file=sys.stderr,
        )
        sys.exit(130)  # 128 + SIGINT, what a shell expects
    except Exception as error:
        if any("shared memory" in str(link) for link in causes(error)):
            sys.exit(
                f"{stage}: /dev/shm is too small for the model that several GPUs share; in Docker, `--shm-size=8g`, or"
                " CUDA_VISIBLE_DEVICES=0 for one GPU"
            )
        if is_out_of_memory(error):
            sys.exit(
                f"{stage}: out of memory; where a model runs, lower train.batch_size or evaluate.batch_size, or take a"
                " smaller one"
            )
        if is_disk_full(error):
            sys.exit(f"{stage}: the disk is full; no file is half-written. Free some space, then `dvc repro`")
        if isinstance(error, PermissionError):
            sys.exit(f"{stage}: no permission to open {error.filename}; change its mode or owner, then `dvc repro`")
        raise


def printable(text: str) -> str:
    """Without control characters, which a terminal would obey: some of what an error quotes is of other people."""
    return "".join(character if character.isprintable() or character == "\n" else "\ufffd" for character in text)


def is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, ImportError):  # of a library that finds no room for its own variables
        return False
    return any(isinstance(link, MemoryError) or OUT_OF_MEMORY_WORDS.search(str(link)) for link in causes(error))


def is_disk_full(error: BaseException) -> bool:
    return any(getattr(link, "errno", None) in DISK_FULL or DISK_FULL_WORDS.search(str(link)) for link in causes(error))


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error itself and, from newest to oldest, those that led to it."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
