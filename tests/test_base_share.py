"""A share of the base model's weights is mixed into the trained ones if validation prefers that."""

import json

import pytest
import torch
from safetensors.torch import load_file


@pytest.fixture(scope="module")
def repo(make_repo):
    repo = make_repo(**{"train.epochs": 0.25})
    repo.run("python", "stages/prepare.py")
    return repo


def weights(folder) -> torch.Tensor:
    (file,) = folder.rglob("*.safetensors")
    (values,) = load_file(file).values()
    return values


def train(repo, **params) -> tuple[dict, torch.Tensor]:
    repo.set(**{f"train.{name}": value for name, value in params.items()})
    repo.run("python", "stages/train.py", "42")
    return json.loads((repo.folder / "metrics/train/42.json").read_text()), weights(repo.folder / "models/finetuned/42")


@pytest.mark.parametrize(("learning_rate", "preferred"), [(0.005, 0.0), (0.9, 0.5)], ids=["learns", "forgets"])
def test_the_mixture_that_validation_prefers_becomes_the_model(repo, static_model, learning_rate, preferred):
    alone, trained = train(repo, learning_rate=learning_rate, base_share=0.0)
    tried, chosen = train(repo, learning_rate=learning_rate, base_share=0.5)
    assert not torch.allclose(trained, weights(static_model), atol=1e-4)
    assert tried["base_share"] == preferred
    if preferred:
        assert tried["validation"] > alone["validation"]
        assert torch.allclose(chosen, (trained + weights(static_model)) / 2, atol=1e-6)
    else:
        assert tried == alone
        assert torch.equal(chosen, trained)
