"""Publishing: what arrives on a server that speaks the Hub's API (client unpatched), and what is refused before it."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from huggingface_hub import ModelCard
from ruamel.yaml import YAML

import publish
from conftest import default_params
from hub_server import HubServer
from shared import cards, records
from shared.ranks import RankTable

NAME = "org/name"
MODEL = "models/finetuned/42"
WRITER, READER = "hf_WriterSecret", "hf_ReaderSecret"
TITLE = 'A "title": of `code`, <b>HTML</b> | [links](x)\n---\n# and a *heading*'


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    server = HubServer([], tmp_path_factory.mktemp("published"), {WRITER: "write", READER: "read"})
    yield server
    server.shutdown()


@pytest.fixture(scope="module")
def repo(make_repo):
    """A committed run."""
    repo = make_repo(
        **{"prepare.card": "own-files", "prepare.test_fraction": 0.4, "prepare.near_duplicate_similarity": 0.85}
    )
    rows = [f"What is known of item {i}?,Item {i} is like {i // 2}." for i in range(120)]
    (repo.folder / "data/raw/faq.csv").write_text("\n".join(["question,answer", *rows]))
    path = repo.folder / "data/cards/own-files.yaml"
    card = YAML().load(path)
    YAML().dump(card | {"title": TITLE, "citation": "$x$ <script>\n\n# c_d_e"}, path)
    repo.run("dvc", "repro")
    repo.commit("run")
    repo.run("git", "remote", "add", "origin", "https://user:SECRET@example.com/org/repo.git")
    return repo


def run(repo, hub_url: str, *arguments: str, token: str = "", name: str = NAME, licence: str = "apache-2.0", **env):
    """Large files by LFS, unless `env` says otherwise."""
    settings = {"HF_ENDPOINT": hub_url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": token}
    command = ["python", "stages/publish.py", name, "--licence", licence, *arguments]
    result = repo.run(*command, check=False, **settings | env)
    secrets = ["SECRET", WRITER, READER, *filter(None, [token])]
    assert not [secret for secret in secrets if secret in result.stdout + result.stderr]
    return result


def refusal(result) -> str:
    assert result.returncode == 1, result.stdout + result.stderr
    assert "Traceback" not in result.stderr
    message = result.stderr.rpartition("publish.py: ")[2].strip()
    assert len(message.splitlines()) <= 2, message
    return message


@pytest.fixture(scope="module")
def published(repo, hub):
    """What a dry run showed, what the first publishing printed, and the repository that it made."""
    dry = run(repo, hub.url, "--dry-run")
    assert dry.returncode == 0, dry.stderr
    assert hub.requests == []
    result = run(repo, hub.url, token=WRITER)
    assert result.returncode == 0, result.stderr
    return SimpleNamespace(dry=dry.stdout, output=result.stdout, repository=hub.repositories["models", NAME])


def card_of(published) -> ModelCard:
    return ModelCard((published.repository.folder / "README.md").read_text())


def test_the_model_and_the_card_arrive(repo, hub, published):
    there = published.repository
    assert published.output == f"{NAME}: published as {hub.url}/{NAME}/commit/{there.commit}\n"
    assert there.private
    for name in there.files():
        if name != "README.md":
            assert (there.folder / name).read_bytes() == (repo.folder / MODEL / name).read_bytes()
    assert there.files() == sorted(["README.md", *names_in(repo.folder / MODEL)])
    assert [request.split()[0] for request in hub.requests if "large-files" in request] == ["PUT"]  # the weights


def names_in(folder: Path) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]


def test_a_dry_run_shows_what_would_go(published):
    listed, _, card = published.dry.partition("\n\nREADME.md:\n\n")
    assert card == (published.repository.folder / "README.md").read_text()
    sizes = {name: (published.repository.folder / name).stat().st_size for name in published.repository.files()}
    lines = re.findall(r"^ *([\d,]+)  (.+)$", listed, re.MULTILINE)
    assert {name: int(size.replace(",", "")) for size, name in lines} == sizes


def test_the_card_holds_the_metrics(repo, published):
    data = card_of(published).data
    metrics, gain = (json.loads((repo.folder / f"metrics/{name}.json").read_text()) for name in ("finetuned", "gain"))
    measured = json.loads((repo.folder / "metrics/data.json").read_text())
    results = {result.metric_type: result for result in data.eval_results}
    assert list(results) == ["ndcg@10", "mrr@10", "accuracy@1", "accuracy@10"]
    for name, result in results.items():
        assert result.metric_value == metrics[name]
        assert result.metric_args["low"] <= metrics[name] <= result.metric_args["high"]
        assert result.metric_args["confidence_level"] == 0.95
    one = results["ndcg@10"]
    assert (one.metric_name, one.dataset_split, one.dataset_revision) == ("NDCG@10", "test", measured["revision"])
    assert one.dataset_name == " ".join(TITLE.split())
    assert (data.license, data.library_name, data.pipeline_tag) == (
        "apache-2.0",
        "sentence-transformers",
        "sentence-similarity",
    )
    assert data.base_model is data.datasets is None  # neither is from the Hub
    # The verdict and the table are those of the report, but for the base model, which is a folder of this machine.
    report = (repo.folder / "metrics/report.md").read_text()
    (verdict,) = re.findall(r"^\*\*The fine-tuned model.+$", report, re.MULTILINE)
    assert verdict in card_of(published).text
    low, high = (f"{one.metric_args[end]:.3f}" for end in ("low", "high"))
    assert re.search(rf"^\| fine-tuned +\| .+{low} to {high}", report, re.MULTILINE)
    assert re.search(rf"^\| fine-tuned +\| a model of .+{low} to {high}", card_of(published).text, re.MULTILINE)
    assert f"{gain['test']['queries']} test queries in {gain['test']['groups']} groups" in card_of(published).text


def test_the_card_says_how_to_repeat_it_and_nothing_of_the_machine(repo, published):
    text = card_of(published).text
    commit = repo.run("git", "rev-parse", "HEAD").stdout.strip()
    assert f"git clone https://example.com/org/repo.git repository\ncd repository\ngit checkout {commit}\nmake" in text
    lock = YAML().load(repo.folder / "dvc.lock")["stages"]["train@42"]["outs"]
    assert next(out["md5"] for out in lock if out["path"] == MODEL) in text
    assert repo.run("sha256sum", "dvc.lock").stdout.split()[0] in text
    assert str(repo.folder.parent) not in text
    assert not re.search(r"/tmp|/home|/root|user:|@example", text)


def test_texts_of_users_stay_texts(published):
    text = card_of(published).text
    assert re.findall(r"^#+ .+", text, re.MULTILINE) == [
        "# name",
        "## How to use",
        "## What it was made of",
        "## How to repeat it",
    ]
    assert r'A "title": of \`code\`, \<b\>HTML\</b\> \| \[links\](x) --- \# and a \*heading\*.' in text
    assert not re.search(r"(?<!\\)<", text)


def test_a_second_time_nothing_changes(repo, hub, published):
    (repo.folder / "README.md").write_text("a change that is none of the run's\n")
    repo.commit("typo")
    before = len(hub.requests)
    result = run(repo, hub.url, token=WRITER)
    assert result.stdout == f"{NAME}: already there: nothing changed\n"
    assert hub.repositories["models", NAME].commit == published.repository.commit
    assert not any("/commit/" in request or request.startswith("PUT") for request in hub.requests[before:])


def test_by_xet_and_with_the_token_of_a_login_the_same_arrives(repo, hub, published, tmp_path):
    """The client's defaults. The server knows the weights by their hash, and has them from the first publishing."""
    before = len(hub.requests)
    (tmp_path / "token").write_text(WRITER)
    login = {"HF_TOKEN_PATH": str(tmp_path / "token")}
    result = run(repo, hub.url, name="org/xet", HF_HUB_DISABLE_XET="0", **login)
    there = hub.repositories["models", "org/xet"]
    assert f"org/xet: published as {hub.url}/org/xet/commit/{there.commit}" in result.stdout
    assert (there.folder / "model.safetensors").read_bytes() == (repo.folder / MODEL / "model.safetensors").read_bytes()
    assert list((hub.published / ".xet").rglob("default.*"))
    assert not any("large-files" in request or ".git/info/lfs" in request for request in hub.requests[before:])


def test_what_else_the_repository_holds_stays(repo, hub, published):
    (published.repository.folder / "notes.txt").write_text("mine")
    result = run(repo, hub.url, "--public", token=WRITER, licence="mit")
    assert "published as" in result.stdout
    assert hub.repositories["models", NAME].private
    assert (published.repository.folder / "notes.txt").read_text() == "mine"
    assert card_of(published).data.license == "mit"


def test_how_to_use_it_runs(repo, hub, published, tmp_path):
    (code,) = re.findall(r"```python\n(.+?)```", card_of(published).text, re.DOTALL)
    env = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_TOKEN": READER, "HF_HOME": str(tmp_path)}
    assert re.match(r"tensor\(\[\[.+, .+\]\]\)", repo.run("python", "-c", code, **env).stdout)
    (weights,) = tmp_path.rglob("model.safetensors")
    assert weights.read_bytes() == (repo.folder / MODEL / "model.safetensors").read_bytes()


def test_a_changed_model(repo, hub):
    weights, sent = repo.folder / MODEL / "model.safetensors", len(hub.requests)
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    message = refusal(run(repo, hub.url, token=WRITER))
    assert f"{MODEL} is not the model that dvc.lock names" in message
    (remedy,) = re.findall(r"`(dvc checkout .+?)`", message)
    repo.run(*remedy.split())
    assert weights.read_bytes() == content
    assert len(hub.requests) == sent


def test_a_file_too_many_or_too_few(repo, monkeypatch):
    monkeypatch.setattr(records, "FINETUNED", (repo.folder / MODEL).parent)
    lock, folder = YAML().load(repo.folder / "dvc.lock"), repo.folder / MODEL
    publish.check_model(42, publish.model_files(42), lock)
    (folder / "extra.txt").write_text("")
    with pytest.raises(publish.InputError, match="not the model"):
        publish.check_model(42, publish.model_files(42), lock)
    (folder / "modules.json").rename(folder / "extra.txt")
    with pytest.raises(publish.InputError, match="not the model"):
        publish.check_model(42, publish.model_files(42), lock)
    (folder / "extra.txt").rename(folder / "modules.json")


def test_no_model(repo, hub):
    folder = repo.folder / MODEL
    folder.rename(folder.with_name("elsewhere"))
    assert "`dvc pull`" in refusal(run(repo, hub.url, token=WRITER))
    folder.with_name("elsewhere").rename(folder)


def test_another_state_of_the_code_or_params(repo, hub):
    sent = len(hub.requests)
    repo.set(**{"train.epochs": 7})
    repo.commit("params alone")
    message = refusal(run(repo, hub.url, token=WRITER))
    assert "not of this state: params.yaml: train.epochs: changed since train@42, final_eval.\n`dvc repro`" in message
    repo.run("git", "reset", "--quiet", "--hard", "HEAD~")
    assert len(hub.requests) == sent


def test_a_run_that_is_not_committed(repo, hub):
    sent, head = len(hub.requests), repo.run("git", "rev-parse", "HEAD").stdout.strip()
    repo.run("git", "rm", "--quiet", "--cached", "metrics/gain.json", "dvc.lock")
    repo.run("git", "commit", "--quiet", "--message", "without the run")
    message = refusal(run(repo, hub.url, token=WRITER))
    assert "dvc.lock is not committed (and 1 more); `git commit` first" in message
    repo.run("git", "reset", "--quiet", head)
    assert len(hub.requests) == sent


@pytest.mark.parametrize(
    ("token", "words"),
    [
        ("", "log in with `hf auth login`, or set HF_TOKEN"),
        ("hf_Unknown", "does not let this token write to org/name (401)"),
        (READER, "does not let this token write to org/name (403)"),
        ("hf_Dämaged", "a character that none has"),
    ],
    ids=["none", "unknown", "reader", "damaged"],
)
def test_tokens_that_cannot_write(repo, hub, token, words):
    assert words in refusal(run(repo, hub.url, token=token))


def test_a_hub_out_of_reach(repo):
    assert "the Hub cannot be reached" in refusal(run(repo, "http://127.0.0.1:9", token=WRITER))


def test_a_licence_that_the_hub_does_not_know(repo, hub):
    result = run(repo, hub.url, "--public", token=WRITER, name="org/other", licence="unheard-of")
    assert '"license" must be one of' in refusal(result)
    assert ("models", "org/other") not in hub.repositories


@pytest.mark.parametrize(
    ("name", "licence", "words"),
    [
        (NAME, "", "it has to be named, such as apache-2.0"),
        (NAME, "Apache-2.0", "'Apache-2.0' is none of the Hub's ids"),
        ("", "mit", "which repository? `make publish TO="),
        ("alone", "mit", "'alone' is no repository"),
        ("a/b/c", "mit", "'a/b/c' is no repository"),
    ],
)
def test_arguments(name, licence, words):
    card = cards.read_card("own-files")
    with pytest.raises(publish.InputError) as error:
        publish.check_arguments(name, licence, card)
    assert words in str(error.value)
    assert licence == "mit" or str(error.value).endswith("of the data it is: CC0")


def test_validation_chooses_the_seed(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "METRICS", tmp_path)
    for seed, score in ((42, 0.5), (43, 0.7), (44, 0.7)):
        records.write_json(tmp_path / f"train/{seed}.json", {"validation": score})
    records.write_json(tmp_path / "gain.json", {"seeds": {"42": 0.6, "43": 0.4, "44": 0.5, "mean": 0.5, "sd": 0.1}})
    assert publish.choose_seed(None, [42, 43, 44]) == 43
    assert publish.choose_seed(44, [42, 43, 44]) == 44
    with pytest.raises(publish.InputError, match="has no 45"):
        publish.choose_seed(45, [42, 43, 44])
    params = default_params()
    several = params.model_copy(update={"train": params.train.model_copy(update={"seeds": [42, 43, 44]})})
    words = publish.seeds_in_words(several, 43)
    assert "This is seed 43; validation NDCG@10 by seed: 42 0.5000, 43 0.7000, 44 0.7000." in words
    assert "mean of all seeds on the test is 0.5000 (standard deviation 0.1000)" in words


def test_data_and_base_of_the_hub_are_linked():
    params, card = default_params(), cards.read_card("bioasq")
    base = params.models.model_copy(update={"base": "org/base@abc"})
    groups, ranks = np.arange(3), np.array([1.0, 2.0, np.inf])
    table = RankTable(groups, groups > 0, ranks, ranks, {"42": ranks})
    own = {"card": "bioasq", "revision": "0123"}
    text = publish.front_matter(NAME, "mit", 42, params.model_copy(update={"models": base}), card, own, table)
    data = ModelCard(f"---\n{text}\n---\n").data
    assert (data.base_model, data.datasets) == ("org/base", ["enelpol/rag-mini-bioasq"])
    result = data.eval_results[-1]
    assert (result.dataset_type, result.dataset_config) == ("enelpol/rag-mini-bioasq", "question-answer-passages")
    assert (result.metric_type, result.metric_value) == ("accuracy@10", 0.666667)


@pytest.mark.parametrize(
    ("origin", "clone"),
    [
        ("https://github.com/org/name.git", "https://github.com/org/name.git"),
        ("https://user:pa55@github.com/org/name", "https://github.com/org/name"),
        ("git@github.com:org/name.git", "https://github.com/org/name.git"),
        ("ssh://git@gitlab.com/org/name.git", "https://gitlab.com/org/name.git"),
        ("https://user:p@ss@github.com/org/name", None),
        ("https://github.com/org/name?private_token=x", None),
        ("ssh://git@gitlab.com:22/org/name.git", None),
        ("/home/me/name", None),
        ("file:///home/me/name", None),
        ("me@laptop:name", None),
        (None, None),
    ],
)
def test_where_to_clone_from(origin, clone, monkeypatch):
    own_files = ""
    monkeypatch.setattr(publish.status, "git", lambda command, *_: origin if command == "remote" else own_files)
    words = publish.repeat_in_words("abc")
    assert re.findall("git clone (.+) repository", words) == ([clone] if clone else [])
    assert clone or words.startswith("In the repository that it was made in:\n")
    assert "dvc pull" not in words
    own_files = "data/raw/mine.csv.dvc\n"
    assert "xargs -0 .venv/bin/dvc pull\nmake" in publish.repeat_in_words("abc")


def test_no_token_is_left_anywhere(repo, published):
    """After all tests above."""
    for folder in (repo.folder.parent, published.repository.folder):
        files = [path for path in folder.rglob("*") if path.is_file() and path.name != Path(__file__).name]
        assert not [path for path in files if WRITER.encode() in path.read_bytes()]
