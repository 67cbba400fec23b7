"""The model against transformers' own: pytest tests/test_model.py"""

import json
import shutil
from dataclasses import asdict, replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from model import (
    PACKAGED_MODULE,
    Config,
    Dropout,
    ModelError,
    NewsClassifier,
    find_backbone,
    load_backbone,
    packaged_backbone,
)

TINY = Config(
    vocab_size=100, max_position_embeddings=40, dim=32, n_layers=3, n_heads=4, hidden_dim=64
)


@pytest.fixture
def batch():
    """Three rows of 12, 7 and 1 tokens, padded to 12."""
    torch.manual_seed(1)
    input_ids = torch.randint(1, 100, (3, 12))
    mask = torch.arange(12) < torch.tensor([[12], [7], [1]])
    return input_ids * mask, mask


def theirs(config):
    from transformers import DistilBertConfig, DistilBertForSequenceClassification

    return DistilBertForSequenceClassification(DistilBertConfig(**asdict(config))).eval()


def test_the_state_dict_loads_strictly_into_transformers_and_gives_the_same_logits(batch):
    torch.manual_seed(0)
    ours = NewsClassifier(TINY).eval()
    other = theirs(TINY)
    other.load_state_dict(ours.state_dict(), strict=True)
    expected = other(*batch).logits
    assert ours(*batch).shape == (3, 4)
    torch.testing.assert_close(ours(*batch), expected, atol=1e-6, rtol=1e-5)


def test_computing_only_the_first_token_of_the_last_layer_changes_no_gradient(batch):
    torch.manual_seed(0)
    ours = NewsClassifier(TINY).eval()  # without dropout, whose masks have other shapes
    ours(*batch).square().sum().backward()
    short = [p.grad.clone() for p in ours.parameters()]
    ours.zero_grad()
    full = ours.distilbert(*batch)[:, 0]
    ours.classifier(torch.relu(ours.pre_classifier(full))).square().sum().backward()
    for grad, p in zip(short, ours.parameters(), strict=True):
        torch.testing.assert_close(grad, p.grad, atol=1e-6, rtol=1e-4)


def test_training_and_inference_attention_are_the_same_function(batch):
    torch.manual_seed(0)
    ours = NewsClassifier(replace(TINY, dropout=0, attention_dropout=0, seq_classif_dropout=0))
    torch.testing.assert_close(ours.train()(*batch), ours.eval()(*batch), atol=1e-6, rtol=1e-5)


def test_dropout_drops_p_of_the_elements_and_keeps_the_mean():
    torch.manual_seed(0)
    drop = Dropout(0.1)
    y = drop(torch.ones(1000, 1001))
    # 1,001,000 draws: the standard error of the share is sqrt(0.1 * 0.9 / 1001000) = 0.0003
    assert abs((y == 0).float().mean().item() - 0.1) < 0.0015
    assert abs(y.mean().item() - 1) < 0.0015
    assert y.unique().tolist() == pytest.approx([0, 1 / 0.9], rel=1e-4)
    assert torch.equal(drop.eval()(y), y)


def test_dropout_masks_gradients_like_values():
    torch.manual_seed(0)
    x = torch.ones(7, 5, requires_grad=True)  # 35 elements: not a multiple of four
    y = Dropout(0.5)(x)
    y.sum().backward()
    assert torch.equal(x.grad, y.detach())


def test_the_packaged_backbone_equals_bert_on_unpadded_positions():
    pytest.importorskip(PACKAGED_MODULE)
    from transformers import BertConfig, BertModel

    folder = packaged_backbone()
    config = BertConfig(**json.loads((folder / "config.json").read_text()))
    bert = BertModel(config, add_pooling_layer=False).eval()
    weights = load_file(folder / "model.safetensors")
    weights = {name: value for name, value in weights.items() if not name.startswith("pooler")}
    bert.load_state_dict(weights, strict=False)
    ours = load_backbone(folder).eval()
    torch.manual_seed(0)
    input_ids = torch.randint(1000, 30000, (3, 20))
    mask = torch.arange(20) < torch.tensor([[20], [11], [3]])
    with torch.inference_mode():
        expected = bert(input_ids, attention_mask=mask.long()).last_hidden_state
        found = ours.distilbert(input_ids, mask)
    assert (found - expected)[mask].abs().max() < 1e-5


def test_a_backbone_gets_the_head_of_its_seed(tiny_backbone):
    heads = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        heads.append(load_backbone(tiny_backbone).classifier.weight)
    assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2])


# Backbone folders as other tools write them


SHAPES = {
    "bert": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    | {"intermediate_size": 64, "layer_norm_eps": 1e-3},
    "distilbert": {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64},
}


def make_original(kind):
    """A small BERT or DistilBERT of transformers; its weights are exact in 16 bits, too."""
    from transformers import AutoConfig, AutoModel

    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, vocab_size=100, max_position_embeddings=40, **SHAPES[kind])
    original = AutoModel.from_config(config).eval()
    with torch.no_grad():
        for p in original.parameters():
            p.copy_((p + 0.1 * torch.randn_like(p)).bfloat16())
    return original


def as_first_released(weights, prefix):
    """With all that bert-base-uncased and others hold beside what is read, in 16 bits."""
    weights = {prefix + name: value.bfloat16() for name, value in weights.items()}
    for new, old in (("LayerNorm.weight", "LayerNorm.gamma"), ("LayerNorm.bias", "LayerNorm.beta")):
        weights = {name.replace(new, old): value for name, value in weights.items()}
    weights[f"{prefix}embeddings.position_ids"] = torch.arange(40)[None]
    return weights | {"cls.predictions.bias": torch.ones(100), "my_head.weight": torch.ones(7, 32)}


FORMS = {  # how a folder may hold the weights: (original, folder, kind) -> None
    "safetensors": lambda model, f, kind: model.save_pretrained(f),
    "shards": lambda model, f, kind: model.save_pretrained(f, max_shard_size="20KB"),
    "torch.save": lambda model, f, kind: torch.save(model.state_dict(), f / "pytorch_model.bin"),
    "as first released": lambda model, f, kind: save_file(
        as_first_released(model.state_dict(), f"{kind}."), f / "model.safetensors"
    ),
    "no prefix": lambda model, f, kind: save_file(
        as_first_released(model.state_dict(), ""), f / "model.safetensors"
    ),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", SHAPES)
def test_a_folder_loads_as_in_transformers(kind, form, tiny_backbone, batch, tmp_path):
    from transformers import AutoModel

    original = make_original(kind)
    original.config.save_pretrained(tmp_path)
    shutil.copy(tiny_backbone / "tokenizer.json", tmp_path)
    FORMS[form](original, tmp_path, kind)
    loaded = AutoModel.from_pretrained(tmp_path, dtype=torch.float32).eval()
    edit_config(tmp_path, n_heads=4.0)  # as some tools write 4
    ours = load_backbone(tmp_path).eval()
    input_ids, mask = batch
    with torch.inference_mode():
        found = ours.distilbert(input_ids, mask)[mask]
        for model in (original, loaded):
            expected = model(input_ids, attention_mask=mask.long()).last_hidden_state[mask]
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert {p.dtype for p in ours.parameters()} == {torch.float32}


# Backbone folders that must be refused


def edit_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def edit_weights(folder, change):
    """Saves the weights with one tensor changed, or without it where `change` gives None."""
    weights = load_file(folder / "model.safetensors")
    name = "distilbert.transformer.layer.1.ffn.lin1.weight"
    weights[name] = change(weights[name].clone())
    weights = {name: value for name, value in weights.items() if value is not None}
    save_file(weights, folder / "model.safetensors")


def only_bin(folder, content):
    (folder / "model.safetensors").unlink()
    torch.save(content, folder / "pytorch_model.bin")


def lose_a_shard(folder):
    (folder / "model.safetensors").unlink()
    make_original("distilbert").save_pretrained(folder, max_shard_size="20KB")
    (folder / "model-00002-of-00005.safetensors").unlink()


def without_tokenizer(folder):
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.txt").unlink(missing_ok=True)
    (folder / "tokenizer_config.json").write_text("{}")


def write_weights(folder, content):
    (folder / "model.safetensors").write_bytes(content)


def truncate(folder):
    write_weights(folder, (folder / "model.safetensors").read_bytes()[:-1])


LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"
BROKEN = {  # what is wrong -> (how it is made, a word that the message must hold)
    "activation": (lambda f: edit_config(f, activation="relu"), "relu"),
    "BERT's key": (lambda f: edit_config(f, hidden_act="gelu_new"), "gelu_new"),
    "epsilon": (lambda f: edit_config(f, layer_norm_eps=1e-5), "layer_norm_eps"),
    "positions": (lambda f: edit_config(f, position_embedding_type="relative_key"), "relative_key"),
    "decoder": (lambda f: edit_config(f, is_decoder=True), "is_decoder"),
    "pruned heads": (lambda f: edit_config(f, pruned_heads={"0": [1]}), "pruned_heads"),
    "family": (lambda f: edit_config(f, model_type="roberta"), "roberta"),
    "adapter": (lambda f: (f / "adapter_config.json").write_text("{}"), "merge_and_unload"),
    "heads": (lambda f: edit_config(f, n_heads=5), "5 attention heads"),
    "dropout": (lambda f: edit_config(f, dropout=1.0), "dropout is 1.0"),
    "layers": (lambda f: edit_config(f, n_layers=1), "config.json"),
    "type": (lambda f: edit_config(f, dim="wide"), "dim is 'wide'"),
    "fraction": (lambda f: edit_config(f, n_layers=2.5), "n_layers is 2.5"),
    "no JSON": (lambda f: (f / "config.json").write_text("{"), "config.json"),
    "no config": (lambda f: (f / "config.json").unlink(), "config.json"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "model.safetensors"),
    "no tokenizer": (without_tokenizer, "tokenizer.json or vocab.txt"),
    "no shard": (lose_a_shard, "model-00002-of-00005.safetensors"),
    "truncated": (truncate, "model.safetensors"),
    "LFS": (lambda f: write_weights(f, LFS_POINTER), "git lfs pull"),
    "pickle": (lambda f: only_bin(f, {"model": Dropout(0.1)}), "pytorch_model.bin"),
    "nested": (lambda f: only_bin(f, {"state_dict": {}}), "word_embeddings"),
    "NaN": (lambda f: edit_weights(f, lambda t: t.fill_(float("nan"))), "layer.1.ffn.lin1"),
    "int8": (lambda f: edit_weights(f, lambda t: t.to(torch.int8)), "int8"),
    "missing": (lambda f: edit_weights(f, lambda t: None), "layer.1.ffn.lin1"),
    "shape": (lambda f: edit_weights(f, lambda t: t[:-1].clone()), "layer.1.ffn.lin1"),
}


@pytest.mark.parametrize("broken", BROKEN)
def test_a_broken_folder_is_refused_in_one_line_that_names_it(broken, tiny_backbone, tmp_path):
    folder = tmp_path / "backbone"
    shutil.copytree(tiny_backbone, folder)
    make, word = BROKEN[broken]
    make(folder)
    with pytest.raises(ModelError) as refused:
        load_backbone(find_backbone(str(folder))[0])
    message = str(refused.value)
    assert str(folder) in message and word in message and "\n" not in message
    if broken in ("family", "adapter"):  # before all rows are tokenized
        with pytest.raises(ModelError):
            find_backbone(str(folder))


def test_a_file_that_cannot_be_read_is_refused_in_one_line(tiny_backbone, monkeypatch):
    def denied(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.read_text", denied)
    with pytest.raises(ModelError, match="^[^\n]*Permission denied[^\n]*$"):
        load_backbone(tiny_backbone)


def test_a_folder_that_may_not_be_entered_is_named_as_such(tiny_backbone, monkeypatch):
    monkeypatch.setattr("os.access", lambda *args: False)  # root may enter any
    with pytest.raises(ModelError, match=f"{tiny_backbone} .* permission denied"):
        find_backbone(str(tiny_backbone))


def test_the_word_of_token_id_0_is_trained_and_padding_is_not():
    """[PAD] is id 0 in most vocabularies, not in all."""
    model = NewsClassifier(TINY)
    words = model.distilbert.embeddings.word_embeddings.weight
    input_ids, mask = torch.tensor([[5, 0, 7, 9, 9]]), torch.tensor([[1, 1, 1, 0, 0]])
    model(input_ids, mask).sum().backward()
    assert words.grad.any(1).nonzero().ravel().tolist() == [0, 5, 7]


@pytest.mark.parametrize(
    "choice", ["./nowhere", "/a/b/c", "~/x", "pyproject.toml", "a" * 300 + "/"]
)
def test_a_choice_that_is_no_folder_is_refused_in_one_line(choice):
    with pytest.raises(ModelError, match="^[^\n]+$"):
        find_backbone(choice)


def test_tokens_and_token_ids_must_fit_the_embeddings(tiny_backbone):
    config = load_backbone(tiny_backbone).config
    positions, words = config.max_position_embeddings, config.vocab_size
    load_backbone(tiny_backbone, max_length=positions, vocab_size=words)
    with pytest.raises(ModelError, match=f"--max-length {positions} or less"):
        load_backbone(tiny_backbone, max_length=positions + 1)
    with pytest.raises(ModelError, match=f"token id {words}, .* {words} word embeddings"):
        load_backbone(tiny_backbone, vocab_size=words + 1)
