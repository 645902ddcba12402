"""The benchmark compares this training with the library's own trainer, on a user's own data and model too."""

import json
import re
import shutil

import numpy as np
import pytest

from conftest import ROOT


@pytest.fixture(scope="module")
def repo(make_repo, small_bert):
    """With a card, its data and a model that are not committed."""
    repo = make_repo()
    shutil.copytree(small_bert, repo.folder / "models/local/base/own")
    pairs = [{"question": f"what is term{i}", "answer": f"term{i} is thing{i * 7}"} for i in range(200)]
    (repo.folder / "data/raw/own.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    (repo.folder / "data/cards/own.yaml").write_text(
        "title: Own\nsource: files\npath: data/raw/own.jsonl\n"
        "columns: {anchor: question, positive: answer}\nlicence: CC0\ncitation: none\n"
    )
    return repo


def test_the_gain_on_own_data_stands_beside_the_published_recipe(repo):
    bench = "benchmarks/bench.py --tables gain --seeds 42 --data own --bases ./models/local/base/own"
    others = {path: path.read_text() for path in repo.folder.glob("benchmarks/gain-cpu-*.md")}
    printed = repo.run("python", *bench.split()).stdout
    (table,) = (path for path in others if "**own**" in path.read_text())
    written = table.read_text()
    section = re.search(
        r"<!-- Written by [^\n]+\n\n\*\*own\*\*, \./models/local/base/own: 1\d\d training pairs.+", written, re.DOTALL
    )[0]
    assert section in printed
    assert written.startswith(others[table].rstrip())
    ndcg = {name: float(mean) for name, mean in re.findall(r"^\| (.+?) +\| (\d\.\d{4})", printed, re.MULTILINE)}
    stock = [name for name in ndcg if name.startswith("published recipe")]
    assert stock[:2] == ["published recipe", "published recipe, columns mended (first seed)"]
    assert ("in bf16" in " ".join(stock)) == ("bf16" in table.name)  # else its wall time would be of two precisions
    assert list(ndcg) == ["base", *stock, "this repo's default"]
    assert ndcg["base"] < ndcg["this repo's default"]

    runs = repo.folder / "benchmarks/gain.jsonl"
    kept = runs.read_text().splitlines(keepends=True)
    runs.write_text("".join(kept[:-1]))  # as if it had been stopped in the last training
    repo.run("python", *bench.split())
    assert runs.read_text().splitlines(keepends=True)[:-1] == kept[:-1]
    assert table.read_text().count("**own**") == 1
    before = runs.read_text()
    repo.run("python", *bench.split())
    assert runs.read_text() == before


def test_the_multiple_of_a_gain_has_an_interval_unless_that_gain_may_be_none(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import bench

    draw = np.random.default_rng(0)
    base, groups = np.full((1, 400), 0.2), np.arange(400)
    stock, own = (base + draw.normal(mean, 0.2, (3, 400)) for mean in (0.1, 0.3))
    ratio, low, high = map(
        float, re.fullmatch(r"(.+) \((.+) to (.+)\)", bench.times(own, stock, base, groups)).groups()
    )
    assert ratio == pytest.approx(3, rel=0.2)
    # By the delta method, of means of three seeds: 0.2 / sqrt(3 * 400) a mean.
    spread = 0.2 / 1200**0.5 / 0.1 * (1 + 3**2) ** 0.5
    assert (high - low) / (2 * 1.96 * spread) == pytest.approx(1, abs=0.2)
    assert bench.times(own, base + draw.normal(0, 0.2, (1, 400)), base, groups) == "unbounded"


@pytest.mark.parametrize("benchmark", ["bench", "recipes"])
def test_an_unknown_card_is_named_without_a_traceback(repo, benchmark):
    wrong = repo.run("python", f"benchmarks/{benchmark}.py", "--data", "unknown", check=False)
    assert wrong.returncode == 1
    assert "there is no data/cards/unknown.yaml" in wrong.stderr
    assert "Traceback" not in wrong.stderr
