"""The real dvc.yaml and data from end to end, in a copy of the repo, with a model that trains in seconds."""

import csv
import hashlib
import json
import re
import shutil
import xml.etree.ElementTree
from pathlib import Path
from typing import get_args

import ir_measures
import pytest
import torch
import yaml

from conftest import default_params, stages_run
from shared.encoders import load_encoder
from shared.params import Metric
from shared.report import PICTURES, chosen_in_words
from shared.retrieval import make_evaluator

ALL_STAGES = ["prepare", "baseline_eval@base", "baseline_eval@reference", "train@42", "final_eval"]


@pytest.fixture(scope="module")
def repo(make_repo):
    """The copy, run once from end to end and committed."""
    repo = make_repo()
    assert sorted(stages_run(repo, "dvc", "repro")) == sorted(ALL_STAGES)
    repo.commit("first run")
    return repo


def read(repo, name: str):
    return json.loads((repo.folder / "metrics" / name).read_text())


def rows(repo, name: str) -> list[dict]:
    return [json.loads(line) for line in (repo.folder / "data" / name).read_text().splitlines()]


def digest(folder: Path) -> str:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return hashlib.sha256(b"".join(path.name.encode() + path.read_bytes() for path in files)).hexdigest()


def test_training_gains_and_the_gain_is_the_difference(repo):
    base, finetuned, gain = read(repo, "base.json"), read(repo, "finetuned.json"), read(repo, "gain.json")
    validation = list(csv.DictReader((repo.folder / "metrics/curves/42/validation.csv").open()))
    before, after = read(repo, "validation/base.json")["ndcg@10"], max(float(row["score"]) for row in validation)
    assert before < after <= read(repo, "train/42.json")["validation"]
    # Chosen in training's precision, here scored in float32.
    assert gain["validation"]["after"] == pytest.approx(read(repo, "train/42.json")["validation"], abs=0.01)
    assert gain["validation"]["before"] == before
    assert base.keys() == finetuned.keys() >= {"accuracy@1", "recall@10", "ndcg@10", "mrr@10", "map@100"}
    over_base = gain["over_base"]
    assert set(over_base["secondary"]) == set(get_args(Metric)) - {"ndcg@10"}
    for metric, one in (over_base["secondary"] | {"ndcg@10": over_base["ndcg@10"]}).items():
        assert one["gain"] == pytest.approx(finetuned[metric] - base[metric], abs=2e-6)
        assert one["low"] < one["gain"] < one["high"]
    report = (repo.folder / "metrics/report.md").read_text()
    assert f"{finetuned['ndcg@10']:.4f}" in report
    assert f"{read(repo, 'reference.json')['ndcg@10']:.4f}" in report


@pytest.mark.parametrize("model", ["base", "reference", "finetuned"])
def test_an_independent_scorer_agrees(repo, model):
    qrels = [ir_measures.Qrel(row["id"], row["document_id"], 1) for row in rows(repo, "prepared/test.jsonl")]
    run = [
        ir_measures.ScoredDoc(ranking["query_id"], result["corpus_id"], -place)
        for ranking in rows(repo, f"rankings/{'finetuned/42' if model == 'finetuned' else model}.jsonl")
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


def test_the_base_is_scored_on_validation_rows_as_by_a_search_for_them_alone(repo, static_model):
    corpus = {row["id"]: row["text"] for row in rows(repo, "prepared/corpus.jsonl")}
    evaluator = make_evaluator(rows(repo, "prepared/validation.jsonl"), corpus, 64, keep_rankings=False)
    alone = evaluator(load_encoder(static_model, "static"))
    scores = {name.rsplit("_", 1)[-1]: score for name, score in alone.items()}
    assert read(repo, "validation/base.json") == pytest.approx(scores, abs=1e-6)


def test_the_test_is_also_scored_without_near_duplicates_and_one_document_a_row(repo):
    data, over_base = read(repo, "data.json"), read(repo, "gain.json")["over_base"]
    assert over_base["queries"].keys() == {"wins", "ties", "losses"}
    assert sum(over_base["queries"].values()) == data["rows"]["test"]
    unseen = over_base["without_near_duplicates"]
    assert unseen["queries"] == data["rows"]["test"] - data["near_duplicates"]["rows"]
    assert 0 < over_base["one_document_a_row"]["after"] < read(repo, "finetuned.json")["ndcg@10"]
    report = (repo.folder / "metrics/report.md").read_text()
    together = over_base["near_duplicates_together"]
    assert together["groups"] < read(repo, "gain.json")["test"]["groups"]
    assert together["gain"] == over_base["ndcg@10"]["gain"]
    for view in ("without_near_duplicates", "near_duplicates_together", "one_document_a_row"):
        one, other = over_base[view], read(repo, "gain.json")["over_reference"][view]
        scores = rf"{one['before']:.4f} +\| {other['before']:.4f} +\| {one['after']:.4f}"
        assert re.search(rf"{scores} +\| \{one['gain']:+.3f} \(.+?\) +\| \{other['gain']:+.3f}", report)
    over_reference = read(repo, "gain.json")["over_reference"]["without_near_duplicates"]
    assert "without them {gain:+.3f} ({low:+.3f} to {high:+.3f}).".format(**over_reference) in report


def test_the_report_tells_what_groups_and_repeated_texts_do(repo):
    report, test = (repo.folder / "metrics/report.md").read_text(), read(repo, "gain.json")["test"]
    groups = {row["group"] for row in csv.DictReader((repo.folder / "metrics/ranks.csv").open())}
    assert test["groups"] == len(groups)
    assert 0.5 * test["groups"] < test["effective_groups"] < test["groups"]
    assert f"as much as {test['effective_groups']} of one size" in report
    assert f"group of rows that share texts has {read(repo, 'data.json')['largest_group']}." in report
    chosen = read(repo, "train/42.json")
    assert chosen["left_out_at_least"] == 0
    params = default_params().train
    assert chosen_in_words(params, {42: chosen}) in report
    several = chosen_in_words(params.model_copy(update={"evaluations": 3}), {42: chosen | {"left_out_at_least": 2}})
    assert several.startswith("The best of 3 steps on validation rows, with 0 or 0.2 of the base")
    assert "leaves out 2 training rows or more" in several
    alone = chosen_in_words(params.model_copy(update={"base_share": 0.0}), {42: chosen})
    assert alone == f"The last step: step {chosen['step']} (seed 42, {chosen['precision']})."


def test_the_report_shows_queries_with_what_was_found_first(repo):
    report = (repo.folder / "metrics/report.md").read_text()
    examples = re.findall(r"\d\. rank (\d+|over 100) → (\d+|over 100): `(.+)`\n   - right: `(.+?)…?`", report)
    assert len(examples) == 10
    passages = {row["anchor"]: row["positive"] for row in rows(repo, "prepared/test.jsonl")}
    for before, after, query, passage in examples[:5]:
        assert passages[query].startswith(passage)
        assert before == "over 100" or int(after) < int(before)
    for before, after, query, passage in examples[5:]:
        assert passages[query].startswith(passage)
        assert after == "over 100" or int(after) > int(before)
    first = {ranking["query"]: ranking["results"][0]["corpus_id"] for ranking in rows(repo, "rankings/base.jsonl")}
    corpus = {row["id"]: row["text"] for row in rows(repo, "prepared/corpus.jsonl")}
    shown = re.search(r"first by base: `(.+?)…?`", report)[1]
    query_that_gained_most = examples[0][2]
    assert corpus[first[query_that_gained_most]].startswith(shown)


def test_pictures_are_whole_and_follow_the_readers_theme(repo):
    assert {path.stem for path in (repo.folder / "metrics/plots").iterdir()} == set(PICTURES)
    for name in PICTURES:
        picture = (repo.folder / f"metrics/plots/{name}.svg").read_text()
        assert xml.etree.ElementTree.fromstring(picture).tag == "{http://www.w3.org/2000/svg}svg"
        assert "prefers-color-scheme: dark" in picture
        assert "var(" not in picture  # viewers without CSS variables would draw it black on black
        assert f"plots/{name}.svg" in (repo.folder / "metrics/report.md").read_text()


def test_a_second_repro_does_nothing(repo):
    assert stages_run(repo, "dvc", "repro") == []


def test_a_changed_param_reruns_what_depends_on_it_and_shows_in_every_comparison(repo):
    assert stages_run(repo, "dvc", "exp", "run", "-S", "train.learning_rate=3e-2") == ["train@42", "final_eval"]
    diff = json.loads(repo.run("dvc", "metrics", "diff", "--json").stdout)
    assert diff["metrics/gain.json"]["over_base.ndcg@10.gain"]["diff"] != 0
    assert "metrics/finetuned.json" in diff
    assert "metrics/base.json" not in diff
    params = json.loads(repo.run("dvc", "params", "diff", "--json").stdout)
    assert params["params.yaml"]["train.learning_rate"]["new"] == pytest.approx(0.03)
    assert "train.learning_rate" in repo.run("dvc", "exp", "show", "--csv").stdout
    repo.run("dvc", "plots", "diff", "HEAD")
    page = (repo.folder / "dvc_plots/index.html").read_text()
    assert "Training loss" in page
    assert "validation rows" in page
    for name in PICTURES:
        assert {f"static/HEAD_metrics_plots_{name}.svg", f"static/workspace_metrics_plots_{name}.svg"} <= set(
            re.findall(r'src="(.+?)"', page)
        )
    repo.run("git", "checkout", "--quiet", ".")
    repo.run("dvc", "checkout", "--force")


def test_a_seed_added_trains_that_one_only_and_a_seed_removed_leaves_no_trace(repo):
    lock, metrics = final_eval_lock(repo), digest(repo.folder / "metrics")
    one = read(repo, "finetuned.json")
    assert stages_run(repo, "dvc", "exp", "run", "-S", "train.seeds=[42,43]") == ["train@43", "final_eval"]
    seeds, both = read(repo, "gain.json")["seeds"], read(repo, "finetuned.json")
    assert seeds["42"] == one["ndcg@10"] != seeds["43"]
    assert seeds["mean"] == both["ndcg@10"] == pytest.approx((seeds["42"] + seeds["43"]) / 2, abs=1e-6)
    assert seeds["sd"] == pytest.approx(abs(seeds["42"] - seeds["43"]) / 2**0.5, abs=1e-6)
    assert f"43 {seeds['43']:.4f}" in (repo.folder / "metrics/report.md").read_text()
    repo.set(**{"train.seeds": [42]})
    assert stages_run(repo, "dvc", "repro") == ["final_eval"]
    assert (final_eval_lock(repo), digest(repo.folder / "metrics")) == (lock, metrics)
    repo.run("git", "checkout", "--quiet", ".")
    repo.run("dvc", "checkout", "--force")


def final_eval_lock(repo) -> dict:
    return yaml.safe_load((repo.folder / "dvc.lock").read_text())["stages"]["final_eval"]


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
    gain["over_base"]["ndcg@10"]["gain"] = 0.5
    (clone / "metrics/gain.json").write_text(json.dumps(gain))
    assert "0.5" in repo.run("dvc", "metrics", "diff", "--md", cwd=clone).stdout
    assert "train.learning_rate" in repo.run("dvc", "exp", "show", "--csv", cwd=clone).stdout
    repo.run("dvc", "plots", "show", cwd=clone)
    assert "Training loss" in (clone / "dvc_plots/index.html").read_text()


def test_the_same_params_give_the_same_bytes_from_any_folder(repo, tmp_path):
    before = digest(repo.folder / "models/finetuned"), digest(repo.folder / "metrics")
    for script in (["train.py", "42"], ["baseline_eval.py", "base"], ["final_eval.py"]):
        repo.run("python", str(repo.folder / "stages" / script[0]), *script[1:], cwd=tmp_path)
    assert (digest(repo.folder / "models/finetuned"), digest(repo.folder / "metrics")) == before


@pytest.mark.skipif(torch.accelerator.is_available(), reason="training is not on the processor")
def test_where_torch_is_held_to_avx2_no_bf16_is_recorded_or_used(repo):
    code = "import shared.environment, train; print(shared.environment.describe(), train.choose_precision('auto'))"
    run = repo.run("python", "-c", code, PYTHONPATH="stages", ATEN_CPU_CAPABILITY="avx2")
    assert "'bf16': False" in run.stdout
    assert "BF16" not in run.stdout
