"""The published experiment, as the README gives it, against a server that speaks the Hub's API (clients unpatched)."""

import json
import re

import pyarrow
import pyarrow.parquet
import pytest

from conftest import ROOT
from hub_server import HubServer, Repository

DATA_COMMIT = "8a84590" + "0" * 33
MPNET = ("sentence-transformers/all-mpnet-base-v2", "e8c3b32edf5434bc2275fc9bab85f82640a19130")
BGE = ("BAAI/bge-base-en-v1.5", "a5beb1e3e68b9ab74eb54cfd186867f64f240e1a")
README = """\
---
configs:
- config_name: question-answer-passages
  data_files:
  - {split: train, path: question-answer-passages/train-*}
  - {split: test, path: question-answer-passages/test-*}
---
"""


def published_command() -> list[str]:
    """The README's `dvc exp run` for the published experiment, as words."""
    (block,) = re.findall(r"```bash\n(dvc exp run [^`]*prepare\.card=bioasq[^`]*)```", (ROOT / "README.md").read_text())
    return block.replace("\\\n", " ").split()


@pytest.fixture(scope="module")
def hub(static_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub")
    (folder / "question-answer-passages").mkdir()
    (folder / "README.md").write_text(README)
    rows = [
        {"question": f"What is known of item {i}?", "answer": f"Item {i} is like {i // 2}.", "id": i, "passages": [i]}
        for i in range(120)
    ]
    rows[119]["answer"] = rows[0]["answer"]  # the same answer under two ids, one in train and one in test
    rows[118]["id"] = rows[0]["id"]  # the same id in train and in test
    for split, part in (("train", rows[:90]), ("test", rows[90:])):
        table = pyarrow.Table.from_pylist(part)
        pyarrow.parquet.write_table(table, folder / f"question-answer-passages/{split}-00000-of-00001.parquet")
    server = HubServer(
        [
            Repository("datasets", "enelpol/rag-mini-bioasq", DATA_COMMIT, folder),
            Repository("models", *MPNET, static_model),
            Repository("models", *BGE, static_model),
        ]
    )
    yield server
    server.shutdown()


@pytest.fixture(scope="module")
def repo(make_repo):
    return make_repo()


def on(hub_url: str) -> dict[str, str]:
    return {"HF_ENDPOINT": hub_url, "HF_HUB_OFFLINE": "0"}


def test_the_published_experiment(repo, hub):
    result = repo.run(*published_command(), **on(hub.url))
    assert "final_eval" in result.stdout
    data = json.loads((repo.folder / "metrics/data.json").read_text())
    assert data["revision"] == DATA_COMMIT
    assert data["rows"] == {"train": 81, "validation": 9, "test": 30}
    assert data["passages"] == 120  # the published protocol: one document a row, and none lost to a clash of ids
    assert data["overlap"]["train_test"]["passages"] + data["overlap"]["validation_test"]["passages"] == 1
    report = (repo.folder / "metrics/report.md").read_text()
    assert "@".join(MPNET) in report
    assert "@".join(BGE) in report
    assert any(MPNET[1] in request and "model.safetensors" in request for request in hub.requests)
    # Everything has been downloaded once, at pinned revisions: a later run of a stage needs no Hub.
    repo.run("python", "stages/baseline_eval.py", "base", HF_HUB_OFFLINE="1")


@pytest.mark.parametrize("env", [on("http://127.0.0.1:9"), {"HF_HUB_OFFLINE": "1"}], ids=["no network", "offline"])
def test_no_other_revision_of_the_data_stands_in_for_a_pinned_one(repo, hub, env):
    card = repo.folder / "data/cards/bioasq.yaml"
    before = card.read_text()
    repo.set(**{"prepare.card": "bioasq"})
    repo.run("python", "stages/prepare.py", **on(hub.url))
    card.write_text(before.replace("revision: main", f"revision: {DATA_COMMIT}"))
    repo.run("python", "stages/prepare.py", **env)  # it is in the cache
    card.write_text(before.replace("revision: main", f"revision: {'a' * 40}"))
    message = stage_error(repo, {"prepare.card": "bioasq"}, env)
    card.write_text(before)
    assert f"the cache holds another revision than {'a' * 40}" in message


def test_a_part_of_a_model_in_the_cache_is_not_taken_for_the_whole(make_repo, hub, small_bert):
    folder = small_bert.parent / "transformer"
    hub.repositories["models", "someone/plain"] = Repository("models", "someone/plain", "c" * 40, folder)
    params = {"models.base": f"someone/plain@{'c' * 40}"}
    repo = make_repo(**params)
    get = "from huggingface_hub import hf_hub_download as get; get('someone/plain', '{}', revision='c' * 40)"
    for name in ("config.json", "model.safetensors"):
        repo.run("python", "-c", get.format(name), **on(hub.url))
    message = stage_error(repo, params, {"HF_HUB_OFFLINE": "1"})
    assert "the cache may hold a part of it only; run once with the Hub in reach" in message
    for env in (on(hub.url), {"HF_HUB_OFFLINE": "1"}):
        repo.run("python", "stages/baseline_eval.py", "base", **env)


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({"prepare.card": "bioasq"}, ["no such revision"]),
        ({"models.base": "sentence-transformers/all-mpnet-base-v2@v9"}, ["all-mpnet-base-v2@v9", "no such revision"]),
        ({"models.base": "nobody/nothing@main"}, ["nobody/nothing@main is not on the Hub"]),
    ],
)
def test_what_the_hub_does_not_have(make_repo, hub, params, words):
    repo = make_repo(**params)
    card = repo.folder / "data/cards/bioasq.yaml"
    card.write_text(card.read_text().replace("revision: main", f"revision: {'a' * 40}"))
    message = stage_error(repo, params, on(hub.url))
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    ("file", "words"), [("own.py", "needs code of its own to load"), ("train.pkl", "No (supported) data files found")]
)
def test_a_data_set_that_needs_code_or_pickles(make_repo, hub, tmp_path, file, words):
    (tmp_path / file).write_text("raise SystemExit")
    hub.repositories["datasets", "someone/own"] = Repository("datasets", "someone/own", DATA_COMMIT, tmp_path)
    repo = make_repo(**{"prepare.card": "bioasq"})
    card = repo.folder / "data/cards/bioasq.yaml"
    lines = card.read_text().replace("enelpol/rag-mini-bioasq", "someone/own").splitlines(keepends=True)
    card.write_text("".join(line for line in lines if not line.startswith("config:")))
    message = stage_error(repo, {"prepare.card": "bioasq"}, on(hub.url))
    assert "data set someone/own@main" in message
    assert words in message


@pytest.mark.parametrize("env", [on("http://127.0.0.1:9"), {"HF_HUB_OFFLINE": "1"}], ids=["no network", "offline"])
@pytest.mark.parametrize(
    "params",
    [{"prepare.card": "bioasq"}, {"prepare.card": "pinned"}, {"models.base": "nobody/nothing@main"}],
    ids=["data", "data at a commit", "model"],
)
def test_a_hub_out_of_reach(make_repo, params, env):
    repo = make_repo(**params)
    card = (repo.folder / "data/cards/bioasq.yaml").read_text()
    (repo.folder / "data/cards/pinned.yaml").write_text(card.replace("revision: main", f"revision: {DATA_COMMIT}"))
    message = stage_error(repo, params, env)
    assert "cannot be reached" in message
    assert "The default experiment needs no Hub" in message


def stage_error(repo, params: dict, env: dict[str, str]) -> str:
    if "prepare.card" in params:
        command = ["python", "stages/prepare.py"]
    else:
        repo.run("python", "stages/prepare.py")
        command = ["python", "stages/baseline_eval.py", "base"]
    result = repo.run(*command, check=False, **env)
    assert result.returncode != 0
    assert "Traceback" not in result.stderr
    message = result.stderr.rpartition(".py: ")[2].strip()
    assert len(message.splitlines()) <= 2, message
    return message
