"""The README's recipes for several people, machines and experiments: the commands as typed, on the real dvc.yaml."""

import hashlib
import json
import re
import shutil
from pathlib import Path

import boto3
import pytest
from moto.server import ThreadedMotoServer

from conftest import ROOT, Repo, stages_run

RESOLVE = """\
git checkout HEAD -- dvc.lock metrics && dvc repro
# Then, once README.md has the report's new head and no conflict:
git add params.yaml README.md dvc.lock metrics && git commit --no-edit"""
SHARE_CACHE = (
    "dvc cache dir --local {cache} && dvc config --local cache.shared group && dvc config --local cache.type {link}"
)
MODEL = "models/finetuned/42/model.safetensors"
OUTPUTS = ("data/prepared", "data/rankings", "models/finetuned", "data/raw", "models/local/base")


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def repo(make_repo, static_model, cache, tmp_path_factory):
    """One person's clone, with data and base model of one's own and a shared cache: run once, committed and pushed."""
    learns = {"prepare.validation_fraction": 0.5, "train.batch_size": 4, "train.epochs": 5}
    repo = make_repo(**{"prepare.card": "mine", "models.base": "./models/local/base/mine"} | learns)
    share_cache(repo, cache)
    card = (repo.folder / "data/cards/own-files.yaml").read_text()
    (repo.folder / "data/cards/mine.yaml").write_text(card.replace("faq.csv", "mine.csv"))
    shutil.copy(repo.folder / "data/raw/faq.csv", repo.folder / "data/raw/mine.csv")
    shutil.copytree(static_model, repo.folder / "models/local/base/mine")
    repo.run("dvc", "add", "data/raw/mine.csv", "models/local/base/mine")
    assert len(stages_run(repo, "dvc", "repro")) == 5
    repo.run("dvc", "remote", "add", "--force", "--default", "storage", str(tmp_path_factory.mktemp("storage")))
    repo.commit("first run")
    repo.run("dvc", "push")
    origin = str(tmp_path_factory.mktemp("origin"))
    repo.run("git", "clone", "--quiet", "--bare", ".", origin)
    repo.run("git", "remote", "add", "origin", origin)
    return repo


@pytest.fixture(scope="module")
def other(repo, tmp_path_factory):
    """Another person's clone, with a cache of its own, that has pulled."""
    other = clone(repo, tmp_path_factory.mktemp("other") / "repo")
    assert contents(other) == {}
    other.run("python", "stages/gate.py")
    (other.folder / "data/raw/faq.csv").write_text("question,answer\n")
    changed = other.run("python", "stages/gate.py", check=False).stdout
    assert changed == "data/raw: changed since prepare\n"  # though a part of that folder is not here
    other.run("git", "checkout", "--quiet", ".")
    other.run("dvc", "pull")
    return other


@pytest.fixture(scope="module")
def sweep(repo) -> dict[str, dict]:
    """Two queued experiments, run; by their names. The second has the params of the last commit."""
    before = contents(repo)
    repo.run("dvc", "exp", "run", "--queue", "--name", "rate", "-S", "train.learning_rate=0.01,0.05")
    assert stages_run(repo, "dvc", "exp", "run", "--run-all") == ["train@42", "final_eval"]
    assert_untouched(repo, before)
    return {name: data for name, data in experiments(repo).items() if name.startswith("rate")}


@pytest.fixture(scope="module")
def apart(repo) -> dict:
    """An experiment that was run in a temporary folder."""
    before = contents(repo)
    command = ["dvc", "exp", "run", "--temp", "--name", "apart", "-S", "prepare.near_duplicate_similarity=0.6"]
    assert stages_run(repo, *command) == ["prepare", "final_eval"]
    assert_untouched(repo, before)
    return experiments(repo)["apart"]


def clone(repo: Repo, folder: Path, *options: str) -> Repo:
    origin = repo.run("git", "remote", "get-url", "origin").stdout.strip()
    repo.run("git", "clone", "--quiet", *options, origin, str(folder))
    return Repo(folder)


def share_cache(repo: Repo, cache: Path, link: str = "symlink") -> None:
    repo.run("bash", "-c", SHARE_CACHE.format(cache=cache, link=link))


def contents(repo: Repo) -> dict[str, str]:
    """The digest of each file of data and models that Git does not hold."""
    files = [path for output in OUTPUTS for path in sorted((repo.folder / output).rglob("*")) if path.is_file()]
    return {
        str(path.relative_to(repo.folder)): hashlib.md5(path.read_bytes()).hexdigest()
        for path in files
        if path.name not in (".gitignore", "faq.csv") and path.suffix != ".dvc"
    }


def experiments(repo: Repo) -> dict[str, dict]:
    """What `dvc exp show` knows of the last commit's experiments, by name."""
    shown = json.loads(repo.run("dvc", "exp", "show", "--json").stdout)
    return {one["name"]: one["revs"][0]["data"] for row in shown for one in row.get("experiments") or []}


def validation(experiment: dict) -> float:
    return experiment["metrics"]["metrics/gain.json"]["data"]["validation"]["after"]


def assert_untouched(repo: Repo, before: dict[str, str]) -> None:
    assert repo.run("git", "status", "--porcelain").stdout == ""
    assert contents(repo) == before


def assert_nothing_to_do(repo: Repo) -> None:
    before = repo.run("git", "status", "--porcelain").stdout
    assert stages_run(repo, "dvc", "repro") == []
    assert repo.run("git", "status", "--porcelain").stdout == before


def test_experiments_are_shown_side_by_side_by_their_validation_score(repo, sweep):
    (repo.folder / ".venv/bin").mkdir(parents=True, exist_ok=True)
    (repo.folder / ".venv/bin/.installed").touch()
    shown = repo.run("make", "--silent", "experiments").stdout
    assert "validation.after" in shown
    best_first = sorted(sweep, key=lambda name: validation(sweep[name]), reverse=True)
    assert re.findall(r"\[(rate-\d)\]", shown) == best_first


def test_a_clone_pulls_data_and_model_and_has_nothing_to_run(repo, other):
    assert contents(other) == contents(repo)
    assert {"data/raw/mine.csv", "models/local/base/mine/model.safetensors", "data/prepared/test.jsonl", MODEL} < set(
        contents(other)
    )
    assert_nothing_to_do(other)
    assert_untouched(other, contents(repo))


def test_an_s3_bucket_is_a_remote_and_git_holds_no_credentials(repo, other, tmp_path):
    account = {"AWS_ACCESS_KEY_ID": "someones-key", "AWS_SECRET_ACCESS_KEY": "someones-secret"}
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        endpoint = "http://{}:{}".format(*server.get_host_and_port())
        by_argument = {name.lower(): value for name, value in account.items()}
        boto3.client("s3", endpoint_url=endpoint, region_name="us-east-1", **by_argument).create_bucket(
            Bucket="loopback"
        )
        other.run("git", "switch", "--quiet", "--create", "bucket")
        other.run("dvc", "remote", "add", "--default", "bucket", "s3://loopback/retrieval")
        other.run("dvc", "remote", "modify", "bucket", "endpointurl", endpoint)
        other.run("dvc", "push", **account)
        other.commit("bucket")
        other.run("git", "push", "--quiet", "origin", "bucket")
        third = clone(repo, tmp_path / "third", "--branch", "bucket")
        third.run("dvc", "pull", **account)
    finally:
        server.stop()
        other.run("git", "switch", "--quiet", "main")
    assert contents(third) == contents(repo)
    assert_nothing_to_do(third)
    assert_untouched(third, contents(repo))
    found = third.run(
        "git", "grep", "--name-only", "-e", "s3://loopback", "-e", "someones", "HEAD", "--", ":!tests"
    ).stdout
    assert found == "HEAD:.dvc/config\n"
    assert "someones" not in (third.folder / ".dvc/config").read_text()


def test_a_queue_runs_a_sweep_and_leaves_the_workspace_alone(sweep):
    rates = {name: one["params"]["params.yaml"]["data"]["train"]["learning_rate"] for name, one in sweep.items()}
    assert rates == {"rate-1": 0.01, "rate-2": 0.05}
    assert validation(sweep["rate-1"]) != validation(sweep["rate-2"])


def test_a_run_in_a_temporary_folder_is_an_experiment(apart):
    assert apart["params"]["params.yaml"]["data"]["prepare"]["near_duplicate_similarity"] == 0.6
    assert validation(apart) > 0


def test_an_experiment_travels_to_another_clone(repo, other, sweep):
    repo.run("dvc", "exp", "push", "origin", "rate-1")
    before = contents(other)
    other.run("dvc", "exp", "pull", "origin", "rate-1")
    other.run("dvc", "exp", "apply", "rate-1")
    gain = json.loads((other.folder / "metrics/gain.json").read_text())
    assert gain["validation"]["after"] == validation(sweep["rate-1"])
    assert contents(other).keys() == before.keys()
    assert contents(other)[MODEL] != before[MODEL]
    assert_nothing_to_do(other)


def test_one_line_resolves_a_conflict_in_dvc_lock(repo, cache, sweep, apart, tmp_path):
    for experiment in ("rate-1", "apart"):
        repo.run("dvc", "exp", "branch", experiment, f"by-{experiment}")
        repo.run("git", "push", "--quiet", "origin", f"by-{experiment}")
    merged, fresh = (clone(repo, tmp_path / name) for name in ("merged", "fresh"))
    for one in (merged, fresh):
        share_cache(one, cache)

    merged.run("git", "switch", "--quiet", "by-rate-1")
    merged.run("dvc", "checkout")
    merge = merged.run("git", "merge", "origin/by-apart", check=False)
    assert "CONFLICT (content): Merge conflict in dvc.lock" in merge.stdout
    assert "params.yaml" not in merged.run("git", "diff", "--name-only", "--diff-filter=U").stdout
    refused = merged.run("dvc", "repro", check=False)
    assert refused.returncode != 0
    assert "<<<<<<< HEAD" in refused.stdout + refused.stderr
    assert stages_run(merged, "bash", "-ec", RESOLVE) == ["final_eval"]
    assert_nothing_to_do(merged)

    fresh.run("dvc", "checkout")
    fresh.set(**{"train.learning_rate": 0.01, "prepare.near_duplicate_similarity": 0.6})
    assert stages_run(fresh, "dvc", "repro") == ["final_eval"]
    fresh.run("git", "add", "--all")
    assert contents(fresh) == contents(merged)
    assert fresh.run("git", "write-tree").stdout == merged.run("git", "rev-parse", "HEAD^{tree}").stdout


def test_clones_share_a_cache_and_its_files_stay_whole(repo, cache, tmp_path):
    second = clone(repo, tmp_path / "second")
    share_cache(second, cache, "hardlink")
    second.run("dvc", "checkout")
    before = contents(repo)
    assert contents(second) == before
    assert (repo.folder / MODEL).is_symlink()
    assert (second.folder / MODEL).stat().st_nlink > 1
    assert_nothing_to_do(second)

    second.set(**{"prepare.seed": 7})
    assert stages_run(second, "dvc", "repro", "prepare") == ["prepare"]
    repo.set(**{"prepare.seed": 7})
    assert stages_run(repo, "dvc", "repro", "prepare") == []  # the second clone's run is in the cache, too
    for one in (second, repo):
        assert contents(one)["data/prepared/test.jsonl"] != before["data/prepared/test.jsonl"]
        one.run("git", "checkout", "--quiet", ".")
        one.run("dvc", "checkout")
        assert_untouched(one, before)
    for path in (cache / "files/md5").glob("??/*"):
        assert hashlib.md5(path.read_bytes()).hexdigest() == path.parent.name + path.name.removesuffix(".dir")
        assert path.stat().st_mode & 0o777 == 0o444


def test_the_readme_has_the_recipes_that_are_tried_here():
    readme = (ROOT / "README.md").read_text()
    assert RESOLVE in readme
    assert SHARE_CACHE.format(cache="/srv/dvc-cache", link="reflink,symlink") in readme
