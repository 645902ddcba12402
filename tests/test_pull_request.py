"""What a reviewer gets: the comment from Git alone, posted once and then updated, by the workflow's own commands."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from conftest import ROOT
from gate import gain_in_words
from shared import params, records, status
from shared.errors import InputError

OTHERS = [
    {"id": 1, "login": "a-person", "body": "<!-- result of the pipeline --> I quote it"},
    {"id": 2, "login": "github-actions[bot]", "body": "another workflow's comment"},
]


@pytest.fixture(scope="module")
def repo(make_repo):
    """main holds a run, the branch `slower` another, and `origin` is at GitHub."""
    repo = make_repo()
    repo.run("dvc", "repro")
    repo.commit("first run")
    repo.run("git", "switch", "--quiet", "--create", "slower")
    repo.run("dvc", "exp", "run", "-S", "train.learning_rate=3e-3")
    repo.commit("a lower learning rate")
    repo.run("git", "remote", "add", "origin", "https://user:SECRET@github.com/org/name.git")
    return repo


@pytest.fixture(scope="module")
def clone(repo, tmp_path_factory):
    """What a runner has: the branch and main, one commit each, with no data and no models."""
    folder = tmp_path_factory.mktemp("runner") / "clone"
    source = f"file://{repo.folder}"
    repo.run("git", "clone", "--quiet", "--depth", "1", "--branch", "slower", source, str(folder))
    repo.run("git", "fetch", "--quiet", "--depth", "1", "origin", "main:main", cwd=folder)
    repo.run("git", "remote", "set-url", "origin", "https://user:SECRET@github.com/org/name.git", cwd=folder)
    return folder


def comment(repo, folder: Path, *target: str) -> str:
    return repo.run("python", "stages/pull_request.py", *target, cwd=folder).stdout


def test_the_comment_says_what_changed(repo, clone):
    text = comment(repo, clone)
    against, _, head = text.partition("## Fine-tuned against")
    report = (repo.folder / "metrics/report.md").read_text()
    assert re.search(r"\*\*The fine-tuned model is .+\*\*", head)[0] in report
    assert re.search(r"\*\*This branch's fine-tuned model is worse than `main`'s by 0\.\d+ NDCG@10 \(95%", against)
    assert re.search(r"fine-tuned +\| 0\.\d{4} → 0\.\d{4} \([+-]0\.\d{4}\)", against)
    assert re.search(r"train\.learning_rate` +\| 0\.05 +\| 0\.003", against)
    assert "Environment of baseline_eval@base, baseline_eval@reference, final_eval, train@42: the same." in against
    assert re.search(r"gain\.json` .*`over_base\.ndcg@10\.gain`", text)
    assert "\n\n## How sure\n\n| gain of" in text
    assert "SECRET" not in text
    assert len(text) < 65_536  # GitHub's limit of a comment


def test_its_pictures_are_of_both_commits(repo, clone):
    shown = re.findall(r'src="(.+?)"', comment(repo, clone))
    commits = [repo.run("git", "rev-parse", name).stdout.strip() for name in ("main", "slower")]
    for commit in commits:
        assert f"https://github.com/org/name/raw/{commit}/metrics/plots/scores.svg" in shown
    for url in shown:
        commit, path = re.fullmatch(r"https://github.com/org/name/raw/([0-9a-f]{40})/(.+)", url).groups()
        assert repo.run("git", "show", f"{commit}:{path}").stdout.startswith("<?xml")


def test_make_report_prints_the_comment_that_ci_posts(repo, clone):
    assert comment(repo, repo.folder, "main") == comment(repo, clone, "main")


def test_another_environment_is_named(repo, clone):
    path = clone / "metrics/environment/train@42.json"
    here = json.loads(path.read_text())
    path.write_text(json.dumps(here | {"device": "NVIDIA H100"}))
    assert f"Environment: train@42: device `{here['device']}` → `NVIDIA H100`." in comment(repo, clone)
    path.write_text(json.dumps(here, indent=2) + "\n")


def test_a_branch_without_effect(repo, clone):
    text = comment(repo, clone, "slower")
    assert "ranks every query's passage as `slower`'s does" in text
    assert "No param differs" in text
    assert "→" not in text.partition("## Fine-tuned against")[0]


def test_two_seeds_of_one_recipe_are_no_difference(repo, clone):
    """main has seed 42; what is compared is seed 43 of the same learning rate."""
    repo.run("git", "switch", "--quiet", "--detach", "main")
    repo.run("dvc", "exp", "run", "-S", "train.seeds=[43]")
    text = comment(repo, repo.folder)
    repo.run("git", "reset", "--quiet", "--hard")
    repo.run("git", "clean", "--quiet", "--force", "-d", "metrics")
    repo.run("git", "switch", "--quiet", "slower")
    repo.run("dvc", "checkout", "--force")
    assert "**This branch's fine-tuned model and `main`'s: no difference that 687 queries can show" in text


def test_a_result_of_another_state_is_named_in_the_comment(repo, clone):
    path = clone / "params.yaml"
    before = path.read_text()
    path.write_text(before.replace("epochs: 4", "epochs: 3"))
    text = comment(repo, clone)
    words = "of its last run** (`dvc repro`): params.yaml: train.epochs: changed since train@42"
    assert words in text
    path.write_text(before)
    assert "not of this state" not in comment(repo, clone)


@pytest.mark.parametrize(
    ("file", "old", "new", "words"),
    [
        ("params.yaml", "epochs: 4", "epochs: 3", "params.yaml: train.epochs: changed since train@42, final_eval"),
        ("params.yaml", "  - 42", "  - 42\n  - 43", "train.seeds: changed since final_eval"),
        ("stages/prepare.py", '"""Prepare', '"""Prepared', "stages/prepare.py: changed since prepare"),
        ("dvc.yaml", "train.py ${item}", "train.py  ${item}", "dvc.yaml (changed command): changed since train@42"),
        ("metrics/gain.json", '"gain": 0.', '"gain": 0.9', "metrics/gain.json: changed since final_eval"),
        ("metrics/report.md", "better", "best", "metrics/report.md: changed since final_eval"),
        ("metrics/new.json", "", "{}", "metrics/new.json: no stage writes it"),
        ("data/cards/hpo-lay.yaml", "licence:", "licence: ", "data/cards/hpo-lay.yaml: changed since final_eval"),
        ("requirements.txt", "torch==2", "torch==3", "torch 2"),
    ],
)
def test_the_gate_names_what_does_not_belong_together(repo, clone, file, old, new, words):
    path = clone / file
    path.write_text(path.read_text().replace(old, new, 1) if path.exists() else new)
    result = repo.run("python", "stages/gate.py", cwd=clone, check=False)
    repo.run("git", "clean", "--quiet", "--force", cwd=clone)
    repo.run("git", "checkout", "--quiet", ".", cwd=clone)
    assert result.returncode == 1
    assert words in result.stdout
    assert "the result is not of this state, as listed above" in result.stderr


def test_an_empty_folder_is_no_other_model(repo, clone):
    """A failed experiment leaves one in a clone without data."""
    folder = clone / "models/finetuned"
    folder.mkdir()
    empty = repo.run("python", "stages/gate.py", cwd=clone, check=False)
    (folder / "other").touch()
    other = repo.run("python", "stages/gate.py", cwd=clone, check=False)
    shutil.rmtree(folder)
    assert empty.returncode == 0
    assert "models/finetuned: changed since final_eval" in other.stdout


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("train.learning_rate", 0.004, r"metrics/report.md: does not say .*learning rate 0\.004"),
        ("evaluate.primary_metric", "mrr@10", r"metrics/gain.json: .* of another evaluate.primary_metric than mrr@10"),
    ],
)
def test_the_gate_names_params_that_were_committed_without_a_run(repo, name, value, words):
    repo.set(**{name: value})
    repo.run("dvc", "commit", "--force")
    result = repo.run("python", "stages/gate.py", check=False)
    repo.run("git", "checkout", "--quiet", ".")
    assert result.returncode == 1
    assert re.search(words, result.stdout)


def test_versions_are_compared_however_a_package_is_spelt(tmp_path, monkeypatch):
    (tmp_path / "requirements.txt").write_text("pystemmer==3.1.0\nscikit-learn==1.9.1\n")
    (tmp_path / "final_eval.json").write_text('{"PyStemmer": "3.0.0", "scikit_learn": "1.9.1"}')
    monkeypatch.setattr(status, "ROOT", tmp_path)
    monkeypatch.setattr(records, "ENVIRONMENT", tmp_path)
    monkeypatch.setattr(records, "read_metrics", lambda name: json.loads((tmp_path / "final_eval.json").read_text()))
    (found,) = status.other_versions()
    assert found.endswith("final_eval.json: PyStemmer 3.0.0, and requirements.txt asks for 3.1.0")


def test_a_section_of_params_is_no_folder_of_that_name(tmp_path, monkeypatch):
    (tmp_path / "models/local/base").mkdir(parents=True)
    (tmp_path / "models/local/base/own.dvc").write_text("outs:\n- md5: 0123456789abcdef.dir\n  path: own\n")
    monkeypatch.setattr(status, "ROOT", tmp_path)
    said = {"final_eval": [{"changed deps": {"params.yaml": {"models": "modified"}}}]}
    monkeypatch.setattr(status, "dvc", lambda *_: json.dumps(said))
    assert status.changes({}) == ["params.yaml: models: changed since final_eval"]


@pytest.mark.parametrize("known", ["md5: 0123456789abcdef.dir", "hash: md5"])  # as of `dvc import-url --no-download`
def test_a_folder_of_which_a_part_is_unknown_cannot_be_checked(tmp_path, monkeypatch, capsys, known):
    (tmp_path / "data").mkdir()
    (tmp_path / "data/own.csv.dvc").write_text(f"outs:\n- {known}\n  path: own.csv\n")
    for module in (status, params):
        monkeypatch.setattr(module, "ROOT", tmp_path)
    assert status.is_elsewhere("data", "modified", {"data": {"md5": "0123456789abcdef.dir"}})
    assert capsys.readouterr().err.startswith("note: data cannot be checked here")


def test_the_gate_names_a_lock_put_together_of_two_runs(repo, clone):
    path = clone / "dvc.lock"
    lock = yaml.safe_load(path.read_text())
    items = {item["path"]: item for stage in ("train@42", "final_eval") for item in lock["stages"][stage]["deps"]}
    items["data/rankings/base.jsonl"]["md5"] = "f" * 32  # data and models are not here: dvc status has nothing to say
    items["data/prepared/near_duplicates.jsonl"]["md5"] = "f" * 32
    items["models/finetuned"]["size"] += 1
    path.write_text(yaml.safe_dump(lock))
    result = repo.run("python", "stages/gate.py", cwd=clone, check=False)
    path.write_text("<<<<<<< HEAD\n" + yaml.safe_dump(lock))
    conflict = repo.run("python", "stages/gate.py", cwd=clone, check=False)
    repo.run("git", "checkout", "--quiet", ".", cwd=clone)
    assert result.stdout.splitlines() == [
        "dvc.lock: data/rankings/base.jsonl of final_eval is not that of baseline_eval@base",
        "dvc.lock: data/prepared of prepare is not what other stages saw in it",
        "dvc.lock: models/finetuned of final_eval is not what other stages saw in it",
    ]
    assert conflict.stderr.startswith("gate.py: dvc.lock holds a merge conflict; resolve it first")


def test_a_damaged_table_of_ranks(repo, clone):
    path = clone / "metrics/ranks.csv"
    before = path.read_text()
    path.write_text("")
    result = repo.run("python", "stages/pull_request.py", cwd=clone, check=False)
    assert result.returncode == 1
    assert "metrics/ranks.csv is damaged; `git checkout metrics`" in result.stderr
    assert "Traceback" not in result.stderr
    path.write_text(before)


def test_other_data_are_not_compared(repo, clone):
    lock = clone / "dvc.lock"
    before = lock.read_text()
    md5 = dict(re.findall(r"data/prepared/(train|validation|test).jsonl\n +hash: md5\n +md5: (\w+)", before))
    lock.write_text(before.replace(md5["test"], "f" * 32))
    text = comment(repo, clone)
    assert "**The test rows or the passages to search differ**" in text
    assert "→" not in text.partition("## Fine-tuned against")[0]
    for split in ("train", "validation"):  # other rows to learn from may be what the branch is about
        lock.write_text(before.replace(md5[split], "f" * 32))
        assert "model is worse than `main`'s" in comment(repo, clone)
    lock.write_text(before)


def test_a_near_duplicate_of_either_training_is_one(repo, clone):
    def without(text: str) -> str:
        return re.search(r"Without near-duplicates of .+?\)\.", text)[0]

    path = clone / "metrics/ranks.csv"
    before, said = path.read_text(), without(comment(repo, clone))
    path.write_text(re.sub(r"^([^,]+,\d+),1,", r"\1,0,", before, flags=re.MULTILINE))
    assert path.read_text() != before
    assert without(comment(repo, clone)) == said
    path.write_text(before)


def test_a_target_that_git_does_not_know(repo, clone):
    result = repo.run("python", "stages/pull_request.py", "absent", cwd=clone, check=False)
    assert result.returncode == 1
    assert "Git knows no revision absent" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_reader_that_stops_early(repo, clone):
    assert repo.run("bash", "-c", "python stages/pull_request.py | true", cwd=clone).stderr == ""


@pytest.mark.parametrize(("minimum", "passes"), [("off", True), (-1, True), (0.0, True), (0.9, False)])
def test_the_gate(repo, minimum, passes):
    repo.set(**{"evaluate.minimum_gain": minimum})
    result = repo.run("python", "stages/gate.py", check=False)
    assert (result.returncode == 0) == passes, result.stderr
    assert passes or re.search(r"95% from \+0\.\d+, and evaluate.minimum_gain asks for more than \+0.9", result.stderr)
    assert "Running" not in repo.run("dvc", "repro", "--dry").stdout  # it is no reason to run anything again
    repo.run("git", "checkout", "--quiet", "params.yaml")


@pytest.mark.parametrize(
    ("file", "old", "new", "words"),
    [
        ("base.json", r'"ndcg@10": 0\.', '"ndcg@10": 0.9', r"metrics/base\.json: ndcg@10 is 0\.9"),
        (
            "gain.json",
            r'"effective_groups": \d+',
            '"effective_groups": 9',
            r"metrics/gain\.json: effective_groups is 9",
        ),
        ("gain.json", r'"low": (-?)0\.', r'"low": \g<1>0.9', r"metrics/gain\.json: over_base low is -?0\.9"),
    ],
)
def test_the_gate_recomputes_what_it_asks_of(repo, file, old, new, words):
    """Though dvc.lock and metrics/ agree, as after `dvc commit --force` of a file that was edited."""
    path = repo.folder / "metrics" / file
    path.write_text(re.sub(old, new, path.read_text(), count=1))
    repo.run("dvc", "commit", "--force")
    result = repo.run("python", "stages/gate.py", check=False)
    assert result.returncode == 1
    assert re.search(rf"{words}.*, and metrics/ranks\.csv gives ", result.stdout)
    repo.run("git", "checkout", "--quiet", ".")


def test_the_gate_wants_enough_groups():
    gains = {"test": {"effective_groups": 30}, "over_base": {"mrr@10": {"gain": 0.2, "low": 0.1}}}
    assert "more than evaluate.minimum_gain, +0" in gain_in_words(gains, "mrr@10", 0.0)
    gains["test"]["effective_groups"] = 29
    with pytest.raises(InputError, match="weigh as few as 29 groups"):
        gain_in_words(gains, "mrr@10", 0.0)


def test_the_workflow_posts_one_comment_and_updates_it(repo, clone, tmp_path):
    steps = yaml.safe_load((ROOT / ".github/workflows/pull-request.yml").read_text())["jobs"]["result"]["steps"]
    scripts = {step["name"]: step["run"] for step in steps if "name" in step}
    comments, gh, summary = tmp_path / "comments.json", tmp_path / "gh", tmp_path / "summary.md"
    comments.write_text(json.dumps(OTHERS))
    gh.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{ROOT}/tests/stand_in_gh.py" "$@"\n')
    gh.chmod(0o755)
    runner = {
        "PATH": f"{tmp_path}:{Path(sys.executable).parent}:/usr/local/bin:/usr/bin:/bin",
        "TARGET": "main",
        "NUMBER": "7",
        "GITHUB_SERVER_URL": "https://github.com",
        "GITHUB_REPOSITORY": "org/name",
        "GITHUB_STEP_SUMMARY": str(summary),
        "COMMENTS": str(comments),
    }

    def step(name: str) -> None:
        script = scripts[name].replace('git fetch --depth 1 origin "$TARGET:$TARGET"\n', "")  # the clone has main
        subprocess.run(["bash", "-e", "-c", script], cwd=clone, env=runner, check=True)

    step("Write the comment")
    text = (clone / "comment.md").read_text()
    assert summary.read_text() == text == comment(repo, clone)
    step("Post it")
    assert json.loads(comments.read_text())[:2] == OTHERS
    assert json.loads(comments.read_text())[2]["body"] == text
    (clone / "comment.md").write_text(text + "\nafter another push\n")
    step("Post it")
    assert [one["body"] for one in json.loads(comments.read_text())[2:]] == [text + "\nafter another push\n"]
