"""Run a training again and again, stop it in its tracks, and let it go on: what is left, and what it ends with.

Usage   python stopped_runs.py < TRIALS   (in the repo's folder; one JSON object a line in, one a line out)

A trial is {"how", "at", "damage"}: `how` is "kill", "interrupt" or "disk full", `at` the number of the file operation
at which it happens; or "kill later", `at` a number of seconds. `damage` is a file of the newest checkpoint to be
damaged then, or null. All runs are forks of this process, which has imported the libraries once.
"""

import errno
import hashlib
import json
import os
import runpy
import shutil
import signal
import sys
import time
from pathlib import Path

ROOT = Path.cwd()
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
LOG = ROOT / "trial.log"


def main() -> None:
    import datasets  # noqa: F401
    import sentence_transformers.sentence_transformer.losses  # noqa: F401
    import torch  # noqa: F401
    import transformers.trainer  # noqa: F401

    for line in sys.stdin:
        print(json.dumps(try_once(**json.loads(line))), flush=True)


def try_once(how: str, at: float, damage: str | None) -> dict:
    for name in ("models/finetuned", "models/scratch", "metrics/curves", "metrics/train", "metrics/environment"):
        shutil.rmtree(ROOT / name, ignore_errors=True)
    begin = time.monotonic()
    code, operations, _ = train(how, at)
    seconds = time.monotonic() - begin
    left = outputs()
    checkpoints = sorted(ROOT.glob("models/scratch/*/checkpoint-*/seal.json"), key=lambda seal: seal.stat().st_mtime)
    if damage and checkpoints:
        file = checkpoints[-1].with_name(damage)
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    final_code, _, log = train("let it be", at)
    return {
        "code": code,
        "operations": operations,
        "seconds": seconds,
        "left": left,
        "checkpoints": len(checkpoints),
        "final_code": final_code,
        "final": outputs(),
        "log": log,
        "leftovers": [str(path) for path in ROOT.rglob("*.tmp")] + [str(p) for p in ROOT.rglob("checkpoint-*")],
    }


def outputs() -> dict[str, str]:
    """The hash of each file that training has written, the files of temporary folders aside."""
    paths = [path for name in ("models/finetuned", "metrics") for path in (ROOT / name).rglob("*") if path.is_file()]
    whole = (path for path in paths if ".tmp" not in str(path))
    return {str(path.relative_to(ROOT)): hashlib.sha256(path.read_bytes()).hexdigest() for path in whole}


def train(how: str, at: float) -> tuple[int, str, str]:
    """Exit code (negative: the signal), file operations ("+" where it takes space, else "."), and what it printed."""
    counted, written = os.pipe()
    child = os.fork()
    if child == 0:
        log = os.open(LOG, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        stop_at(how, at, written)
        sys.argv = ["stages/train.py", "42"]
        sys.path.insert(0, str(ROOT / "stages"))
        signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            runpy.run_path("stages/train.py", run_name="__main__")
        except SystemExit as stop:
            sys.stdout.flush()
            print(stop.code, file=sys.stderr, flush=True)
            os._exit(stop.code if isinstance(stop.code, int) else 1)
        sys.stdout.flush()
        os._exit(0)
    os.close(written)
    if how == "kill later":
        time.sleep(at)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    with os.fdopen(counted) as pipe:
        operations = pipe.read()
    return os.waitstatus_to_exitcode(status), operations, LOG.read_text(errors="replace")


def stop_at(how: str, at: float, counter: int) -> None:
    """Count this process's changes of files in the repo, one byte into `counter` each, and stop at number `at`.

    What Rust (safetensors) and C++ (torch.save) write is not seen: "kill later" is for that.
    """
    count = 0

    def hook(event: str, arguments: tuple) -> None:
        nonlocal count
        if event == "open":
            path, _, flags = arguments
            adds = True
            if not flags & WRITES:
                return
        elif event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.chmod"):
            path, adds = arguments[0], event == "os.mkdir"
        else:
            return
        if isinstance(path, int) or (os.path.isabs(os.fspath(path)) and not os.fsdecode(path).startswith(str(ROOT))):
            return
        count += 1
        os.write(counter, b"+" if adds else b".")
        if count == at and how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif count == at and how == "interrupt":
            os.kill(os.getpid(), signal.SIGINT)
        elif count >= at and adds and how == "disk full":
            raise OSError(errno.ENOSPC, "No space left on device")

    sys.addaudithook(hook)


if __name__ == "__main__":
    main()
