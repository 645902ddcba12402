"""Several processes train one model, and several devices encode for one evaluation, with the result of one."""

import csv
import json
import os
import signal
import socket
import subprocess
import sys
import time

import psutil
import pytest

from shared import encoders, retrieval

ROWS = [{"id": str(i), "anchor": f"question {i}", "document_id": str(i)} for i in range(40)]
CORPUS = {str(i): f"answer {i}" for i in range(400)}


@pytest.fixture(scope="module")
def repo(make_repo):
    repo = make_repo(**{"train.epochs": 0.25})
    repo.run("python", "stages/prepare.py")
    return repo


@pytest.fixture(scope="module")
def of_one_process(repo):
    repo.run("python", "stages/train.py", "42")
    return result(repo)


def result(repo) -> tuple[list[tuple[int, float]], dict]:
    """The points of the loss curve, and what validation chose."""
    with (repo.folder / "metrics/curves/42/loss.csv").open() as lines:
        loss = [(int(row["step"]), float(row["loss"])) for row in csv.DictReader(lines)]
    return loss, json.loads((repo.folder / "metrics/train/42.json").read_text())


def check_same(several, one):
    """The same batches with the same negatives give the same loss; what differs is dropout and rounding."""
    (loss, chosen), (loss_of_one, chosen_of_one) = several, one
    for (step, value), (step_of_one, value_of_one) in zip(loss[:10], loss_of_one[:10], strict=True):
        assert step == step_of_one
        assert value == pytest.approx(value_of_one, rel=0.01)
    assert chosen["validation"] == pytest.approx(chosen_of_one["validation"], abs=0.01)


def test_two_processes_train_as_one_does_and_end_together(repo, of_one_process):
    repo.set(**{"train.processes": 2})
    repo.run("python", "stages/train.py", "42")
    check_same(result(repo), of_one_process)
    weights, undisturbed = repo.folder / "models/finetuned/42/model.safetensors", result(repo)
    before = weights.read_bytes()

    weights.unlink()
    command, quiet = [sys.executable, "stages/train.py", "42"], subprocess.DEVNULL
    first = subprocess.Popen(command, cwd=repo.folder, stdout=quiet, stderr=quiet, start_new_session=True)
    while first.poll() is None and not list(repo.folder.glob("models/scratch/*/checkpoint-*/seal.json")):
        time.sleep(0.05)
    workers = psutil.Process(first.pid).children(recursive=True)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    gone, alive = psutil.wait_procs(workers, timeout=10)
    assert len(gone) >= 2
    assert not alive
    assert "going on from" in repo.run("python", "stages/train.py", "42").stdout
    assert (weights.read_bytes(), result(repo)) == (before, undisturbed)
    assert not list(repo.folder.glob("models/scratch/*/checkpoint-*"))


def test_two_processes_train_a_transformer_as_one_does(make_repo, small_bert):
    """Each has its own number of chunks a step."""
    fast = {"train.epochs": 0.25, "train.batch_size": 64, "train.learning_rate": 0.001, "train.precision": "fp32"}
    repo = make_repo(**{"models.base": str(small_bert)} | fast)
    repo.run("python", "stages/prepare.py")
    results = []
    for processes in (1, 2):
        repo.set(**{"train.processes": processes})
        repo.run("python", "stages/train.py", "42")
        results.append(result(repo))
    check_same(*reversed(results))


def test_two_hosts_train_as_one_process_does(repo, of_one_process):
    repo.set(**{"train.processes": 2})
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    launch = "accelerate launch --multi_gpu --num_machines 2 --num_processes 2 --main_process_ip 127.0.0.1"
    hosts = [
        subprocess.Popen(
            [*launch.split(), "--main_process_port", port, "--machine_rank", rank, "stages/train.py", "42"],
            cwd=repo.folder,
            env=repo.environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for rank in ("0", "1")
    ]
    assert [host.wait(timeout=200) for host in hosts] == [0, 0]
    check_same(result(repo), of_one_process)


def test_as_many_processes_as_params_yaml_says(repo):
    repo.set(**{"train.processes": 1})
    wrong = repo.run("python", "stages/train.py", "42", check=False, WORLD_SIZE="2")
    assert "train.processes is 1, and 2 were started" in wrong.stderr
    repo.set(**{"train.processes": 3})
    wrong = repo.run("python", "stages/train.py", "42", check=False)
    assert "train: batch_size 16 should be a multiple of processes 3" in wrong.stderr


def test_several_processes_with_too_few_pairs_for_a_batch_say_so(repo):
    repo.set(**{"train.processes": 2, "train.batch_size": 4096})
    wrong = repo.run("python", "stages/train.py", "42", check=False)
    assert wrong.stderr.count("train.batch_size is 4096, and") == 1
    assert "Traceback" not in wrong.stderr


def test_a_pool_of_devices_finds_what_one_device_finds(static_model):
    evaluator = retrieval.make_evaluator(ROWS, CORPUS, 64, keep_rankings=True)
    model = encoders.load_encoder(static_model, "static")
    alone, pooled = (retrieval.search_with_encoder(evaluator, model, devices) for devices in ([], ["cpu", "cpu"]))
    assert retrieval.mean_scores(pooled, ROWS) == retrieval.mean_scores(alone, ROWS)
    assert [ranking["query_id"] for ranking in pooled] == [ranking["query_id"] for ranking in alone]
    for own, others in zip(pooled, alone, strict=True):
        scores, other_scores = ([result["score"] for result in one["results"]] for one in (own, others))
        assert scores == pytest.approx(other_scores, abs=1e-5)
