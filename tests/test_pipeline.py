"""The real dvc.yaml and data from end to end, in a copy of the repo, with a model that trains in seconds."""

import csv
import hashlib
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import ir_measures
import pytest

ALL_STAGES = ["prepare", "baseline_eval@base", "baseline_eval@reference", "train", "final_eval"]


@pytest.fixture(scope="module")
def repo(make_repo):
    """The copy, run once from end to end and committed."""
    repo = make_repo()
    assert sorted(stages_run(repo, "dvc", "repro")) == sorted(ALL_STAGES)
    repo.commit("first run")
    return repo


def stages_run(repo, *command: str) -> list[str]:
    """The stages whose commands DVC started, in order."""
    return re.findall(r"Running stage '(.+)'", repo.run(*command).stdout)


def read(repo, name: str):
    return json.loads((repo.folder / "metrics" / name).read_text())


def rows(repo, name: str) -> list[dict]:
    return [json.loads(line) for line in (repo.folder / "data" / name).read_text().splitlines()]


def digest(folder: Path) -> str:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return hashlib.sha256(b"".join(path.name.encode() + path.read_bytes() for path in files)).hexdigest()


def test_training_gains_and_the_gain_is_the_difference(repo):
    base, finetuned, gain = read(repo, "base.json"), read(repo, "finetuned.json"), read(repo, "gain.json")
    validation = list(csv.DictReader((repo.folder / "metrics/curves/validation.csv").open()))
    assert max(float(row["ndcg@10"]) for row in validation[1:]) > float(validation[0]["ndcg@10"])
    assert base.keys() == finetuned.keys() == gain.keys() >= {"accuracy@1", "recall@10", "ndcg@10", "mrr@10", "map@100"}
    for metric in base:
        assert gain[metric]["absolute"] == pytest.approx(finetuned[metric] - base[metric], abs=1e-6)
    report = (repo.folder / "metrics/report.md").read_text()
    assert f"{finetuned['ndcg@10']:.4f}" in report
    assert f"{read(repo, 'reference.json')['ndcg@10']:.4f}" in report


@pytest.mark.parametrize("model", ["base", "reference", "finetuned"])
def test_an_independent_scorer_agrees(repo, model):
    qrels = [ir_measures.Qrel(row["id"], row["document_id"], 1) for row in rows(repo, "prepared/test.jsonl")]
    run = [
        ir_measures.ScoredDoc(ranking["query_id"], result["corpus_id"], -place)
        for ranking in rows(repo, f"rankings/{model}.jsonl")
        for place, result in enumerate(ranking["results"])
    ]
    measures = {
        "ndcg@10": ir_measures.nDCG @ 10,
        "mrr@10": ir_measures.RR @ 10,
        "map@100": ir_measures.AP @ 100,
        "accuracy@3": ir_measures.Success @ 3,
        "precision@5": ir_measures.P @ 5,
        "recall@10": ir_measures.R @ 10,
    }
    theirs = ir_measures.calc_aggregate(measures.values(), qrels, run)
    ours = read(repo, f"{model}.json")
    for name, measure in measures.items():
        assert ours[name] == pytest.approx(theirs[measure], abs=1e-6), name


def test_a_second_repro_does_nothing(repo):
    assert stages_run(repo, "dvc", "repro") == []


def test_a_changed_param_reruns_what_depends_on_it_and_shows_in_every_comparison(repo):
    assert stages_run(repo, "dvc", "exp", "run", "-S", "train.learning_rate=3e-2") == ["train", "final_eval"]
    diff = json.loads(repo.run("dvc", "metrics", "diff", "--json").stdout)
    assert diff["metrics/gain.json"]["ndcg@10.absolute"]["diff"] != 0
    assert "metrics/finetuned.json" in diff
    assert "metrics/base.json" not in diff
    params = json.loads(repo.run("dvc", "params", "diff", "--json").stdout)
    assert params["params.yaml"]["train.learning_rate"]["new"] == pytest.approx(0.03)
    assert "train.learning_rate" in repo.run("dvc", "exp", "show", "--csv").stdout
    repo.run("dvc", "plots", "show")
    page = (repo.folder / "dvc_plots/index.html").read_text()
    assert "Training loss" in page
    assert "validation rows" in page
    repo.run("git", "checkout", "--quiet", ".")
    repo.run("dvc", "checkout", "--force")


def test_a_changed_reference_scores_no_other_baseline(repo, static_model):
    shutil.copytree(static_model, repo.folder / "models/local/reference", dirs_exist_ok=True)
    ran = stages_run(repo, "dvc", "exp", "run", "-S", "models.reference=./models/local/reference")
    assert ran == ["baseline_eval@reference", "final_eval"]
    assert read(repo, "reference.json") == read(repo, "base.json")
    repo.run("git", "checkout", "--quiet", ".")
    repo.run("dvc", "checkout", "--force")


def test_a_clone_without_data_shows_results_and_differences(repo, tmp_path):
    clone = tmp_path / "clone"
    repo.run("git", "clone", "--quiet", str(repo.folder), str(clone))
    shown = json.loads(repo.run("dvc", "metrics", "show", "--json", cwd=clone).stdout)
    assert shown[""]["data"]["metrics/finetuned.json"]["data"] == read(repo, "finetuned.json")
    gain = json.loads((clone / "metrics/gain.json").read_text())
    gain["ndcg@10"]["absolute"] = 0.5
    (clone / "metrics/gain.json").write_text(json.dumps(gain))
    assert "0.5" in repo.run("dvc", "metrics", "diff", "--md", cwd=clone).stdout
    assert "train.learning_rate" in repo.run("dvc", "exp", "show", "--csv", cwd=clone).stdout
    repo.run("dvc", "plots", "show", cwd=clone)
    assert "Training loss" in (clone / "dvc_plots/index.html").read_text()


def test_the_same_params_give_the_same_bytes_from_any_folder(repo, tmp_path):
    before = digest(repo.folder / "models/finetuned"), digest(repo.folder / "metrics")
    for script in (["train.py"], ["baseline_eval.py", "base"], ["final_eval.py"]):
        repo.run("python", str(repo.folder / "stages" / script[0]), *script[1:], cwd=tmp_path)
    assert (digest(repo.folder / "models/finetuned"), digest(repo.folder / "metrics")) == before


def test_a_killed_training_goes_on_and_ends_with_the_same_bytes(make_repo):
    repo = make_repo(
        **{"prepare.card": "own-files", "train.epochs": 300, "train.batch_size": 8, "train.evaluations": 12}
    )
    repo.run("python", "stages/prepare.py")
    (repo.folder / "data/prepared/test.jsonl").unlink()  # training never looks at test rows
    training = repo.run("python", "stages/train.py")
    assert "usually expected at index" not in training.stderr  # the library's warning where the query is not first
    undisturbed = digest(repo.folder / "models/finetuned"), digest(repo.folder / "metrics/curves")
    shutil.rmtree(repo.folder / "models/finetuned")
    shutil.rmtree(repo.folder / "models/scratch")

    training = subprocess.Popen(
        [sys.executable, "stages/train.py"], cwd=repo.folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    while training.poll() is None and not list(repo.folder.glob("models/scratch/*/checkpoint-*/trainer_state.json")):
        time.sleep(0.05)
    training.send_signal(signal.SIGKILL)
    training.wait()
    assert not (repo.folder / "models/finetuned").exists()

    assert "going on from" in repo.run("python", "stages/train.py").stdout
    assert (digest(repo.folder / "models/finetuned"), digest(repo.folder / "metrics/curves")) == undisturbed
    assert not list(repo.folder.glob("models/scratch/*/checkpoint-*"))
