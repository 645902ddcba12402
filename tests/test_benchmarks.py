"""The benchmark compares this training with the library's own trainer, on a user's own data and model too."""

import json
import re
import shutil

import pytest


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
    section = re.search(r"<!-- Written by [^\n]+\n\n\*\*own\*\*, own: 1\d\d training pairs.+", written, re.DOTALL)[0]
    assert section in printed
    assert written.startswith(others[table].rstrip())
    ndcg = {name: float(mean) for name, mean in re.findall(r"^\| (.+?) +\| (\d\.\d{4})", printed, re.MULTILINE)}
    published, mended = "published recipe", "published recipe, columns mended (first seed)"
    assert list(ndcg) == ["base", published, mended, "this repo's default"]
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


@pytest.mark.parametrize("benchmark", ["bench", "recipes"])
def test_an_unknown_card_is_named_without_a_traceback(repo, benchmark):
    wrong = repo.run("python", f"benchmarks/{benchmark}.py", "--data", "unknown", check=False)
    assert wrong.returncode == 1
    assert "there is no data/cards/unknown.yaml" in wrong.stderr
    assert "Traceback" not in wrong.stderr
