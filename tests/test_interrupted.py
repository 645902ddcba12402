"""A run that is stopped at any moment leaves nothing half-written, and goes on to the same bytes."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time

import pytest
from filelock import FileLock

from conftest import ROOT

TRIALS = {"kill": 8, "kill later": 6, "interrupt": 2, "disk full": 4}


@pytest.fixture(scope="module")
def repo(make_repo, small_bert):
    # Dropout, so that a run that goes on needs the random state of the one that was cut.
    recipe = {"train.epochs": 20, "train.batch_size": 8, "train.learning_rate": 0.001, "train.dropout": "model"}
    recipe |= {"train.evaluations": 3, "train.checkpoints": 8}
    repo = make_repo(**{"models.base": str(small_bert), "prepare.card": "own-files"} | recipe)
    repo.run("python", "stages/prepare.py")
    return repo


@pytest.fixture(scope="module")
def run_trials(repo):
    """A function that runs trials (see stopped_runs.py) one by one, all in one process that has its imports done."""
    process = subprocess.Popen(
        [sys.executable, ROOT / "tests/stopped_runs.py"],
        cwd=repo.folder,
        env=repo.environment(OMP_NUM_THREADS="1"),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )

    def run(how: str, at: float, damage: str | None = None) -> dict:
        process.stdin.write(json.dumps({"how": how, "at": at, "damage": damage}) + "\n")
        process.stdin.flush()
        return json.loads(process.stdout.readline())

    yield run
    process.kill()


@pytest.fixture(scope="module")
def undisturbed(run_trials):
    first, trial = run_trials("let it be", 0), run_trials("let it be", 0)  # the second is no slower than those to come
    assert first["code"] == trial["code"] == 0
    assert first["final"] == trial["final"]
    assert trial["final"] == trial["left"]
    assert not trial["leftovers"]
    return trial


def moments(how: str, undisturbed: dict) -> list[float]:
    """One at random from each of equal parts of a run: file operations, or seconds."""
    count = TRIALS[how]
    if how == "kill later":
        # Not in the first quarter, before the model is loaded: half of the trials are to find a checkpoint.
        parts = [(1 + 3 * random.uniform(i, i + 1) / count) / 4 for i in range(count)]
        return [part * undisturbed["seconds"] for part in parts]
    operations = undisturbed["operations"]
    last = operations.rindex("+") + 1 if how == "disk full" else len(operations)
    return [random.randint(i * last // count + 1, (i + 1) * last // count) for i in range(count)]


@pytest.mark.parametrize("how", TRIALS)
def test_a_stopped_training_leaves_nothing_half_written_and_ends_with_the_same_bytes(how, run_trials, undisturbed):
    resumed = 0
    for at in moments(how, undisturbed):
        trial = run_trials(how, at)
        where = f"{how} at {at} of {len(undisturbed['operations'])}\n{trial['log'][-2000:]}"
        assert trial["code"] != 0 or how == "kill later", where  # which may come too late
        assert trial["left"].items() <= undisturbed["final"].items(), where
        models = {name for name in undisturbed["final"] if name.startswith("models/")}
        assert models & trial["left"].keys() in (models, set()), where
        assert trial["final_code"] == 0, where
        assert trial["final"] == undisturbed["final"], where
        assert not trial["leftovers"], where
        resumed += "going on from" in trial["log"]
    assert resumed >= TRIALS[how] // 2


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.pt", "trainer_state.json"])
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(file, run_trials, undisturbed):
    trial = run_trials("kill", len(undisturbed["operations"]) * 3 // 4, file)
    assert trial["checkpoints"] >= 2
    damaged = re.findall(r"checkpoint-(\d+) is damaged", trial["log"])
    (source,) = re.findall(r"going on from \S+checkpoint-(\d+)", trial["log"])
    assert int(source) < min(map(int, damaged))
    assert trial["final"] == undisturbed["final"]


def test_a_run_goes_on_from_a_checkpoint_before_its_first_evaluation(repo, run_trials, undisturbed):
    repo.set(**{"train.evaluations": 1})
    trial = run_trials("kill", len(undisturbed["operations"]) // 2)
    repo.set(**{"train.evaluations": 3})
    assert "going on from" in trial["log"]
    assert trial["final_code"] == 0
    assert trial["final"].keys() == undisturbed["final"].keys()


def test_a_model_is_trained_by_one_process_at_a_time(repo):
    (repo.folder / "models/scratch").mkdir(exist_ok=True)
    with FileLock(repo.folder / "models/scratch/seed-42.lock"):
        second = repo.run("python", "stages/train.py", "42", check=False)
    assert "another process is training seed 42 here" in second.stderr
    assert "Traceback" not in second.stderr


def test_two_clones_give_the_same_bytes_though_one_is_stopped_and_all_else_differs(make_repo, tmp_path):
    """Path, home, time zone, language, hash seed and file modes differ; one clone is killed, and then interrupted."""
    steady, stopped = (make_repo(**{"prepare.card": "own-files"}) for _ in range(2))
    begin = time.monotonic()
    steady.run("dvc", "repro", PYTHONHASHSEED="0", TZ="UTC", LC_ALL="C")
    duration = time.monotonic() - begin
    other = {"PYTHONHASHSEED": "7", "TZ": "Asia/Kathmandu", "LC_ALL": "C.UTF-8", "HOME": str(tmp_path), "USER": "other"}
    for stop in (signal.SIGKILL, signal.SIGINT):
        process = subprocess.Popen(
            ["dvc", "repro"],
            cwd=stopped.folder,
            env=stopped.environment(**other),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        time.sleep(random.uniform(0, duration))
        os.killpg(process.pid, stop)
        process.wait()
    stopped.run("bash", "-c", "umask 077; exec dvc repro", **other)
    assert tracked(stopped) == tracked(steady)

    for one, env in ((steady, {"PYTHONHASHSEED": "0"}), (stopped, other)):
        one.set(**{"prepare.card": "hpo-lay"})  # whose source has sets in it
        one.run("python", "stages/prepare.py", **env)
    assert prepared(stopped) == prepared(steady)


def prepared(repo) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (repo.folder / "data/prepared").iterdir()}


def tracked(repo) -> dict[str, bytes]:
    """What a run writes for Git."""
    paths = [repo.folder / "dvc.lock", *(repo.folder / "metrics").rglob("*")]
    return {str(path.relative_to(repo.folder)): path.read_bytes() for path in paths if path.is_file()}
