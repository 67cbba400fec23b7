"""The model against transformers' own: pytest tests/test_model.py"""

import json
from dataclasses import replace

import pytest
import torch

from model import PACKAGED_MODULE, Config, Dropout, NewsClassifier, load_backbone, packaged_backbone

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

    return DistilBertForSequenceClassification(
        DistilBertConfig(
            vocab_size=config.vocab_size,
            max_position_embeddings=config.max_position_embeddings,
            dim=config.dim,
            n_layers=config.n_layers,
            n_heads=config.n_heads,
            hidden_dim=config.hidden_dim,
            num_labels=4,
        )
    ).eval()


def test_the_state_dict_loads_strictly_into_transformers_and_gives_the_same_logits(batch):
    torch.manual_seed(0)
    ours = NewsClassifier(TINY).eval()
    other = theirs(TINY)
    other.load_state_dict(ours.state_dict(), strict=True)
    expected = other(*batch).logits
    assert ours(*batch).shape == (3, 4)
    torch.testing.assert_close(ours(*batch), expected, atol=1e-6, rtol=1e-5)


def test_a_model_of_transformers_loads_strictly_here():
    NewsClassifier(TINY).load_state_dict(theirs(TINY).state_dict(), strict=True)


def test_computing_only_the_first_token_of_the_last_layer_changes_no_gradient(batch):
    torch.manual_seed(0)
    ours = NewsClassifier(TINY).eval()  # without dropout, whose masks have other shapes
    ours(*batch).square().sum().backward()
    short = [p.grad.clone() for p in ours.parameters()]
    ours.zero_grad()
    full = ours.distilbert(*batch)[:, 0]
    ours.classifier(torch.relu(ours.pre_classifier(full))).square().sum().backward()
    for one, other in zip(short, (p.grad for p in ours.parameters()), strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-4)


def test_training_and_inference_attention_are_the_same_function(batch):
    torch.manual_seed(0)
    ours = NewsClassifier(replace(TINY, dropout=0, attention_dropout=0, seq_classif_dropout=0))
    torch.testing.assert_close(ours.train()(*batch), ours.eval()(*batch), atol=1e-6, rtol=1e-5)


def test_padding_changes_no_logit(batch):
    torch.manual_seed(0)
    ours = NewsClassifier(TINY).eval()
    alone = ours(batch[0][1:2, :7], batch[1][1:2, :7])
    torch.testing.assert_close(ours(*batch)[1:2], alone, atol=1e-6, rtol=1e-5)


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
    from safetensors.torch import load_file
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


def test_the_packaged_backbone_loads_strictly_into_transformers():
    pytest.importorskip(PACKAGED_MODULE)
    ours = load_backbone(packaged_backbone()).eval()
    other = theirs(ours.config)
    other.load_state_dict(ours.state_dict(), strict=True)
    input_ids = torch.randint(1000, 30000, (2, 9))
    with torch.inference_mode():
        difference = ours(input_ids, torch.ones_like(input_ids)) - other(input_ids).logits
    assert difference.abs().max() < 1e-5


def test_a_backbone_gets_the_head_of_its_seed(tiny_backbone):
    heads = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        heads.append(load_backbone(tiny_backbone).classifier.weight)
    assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2])
