"""What a card without bf16 computes in fp16, emulated on the CPU: pytest tests/test_fp16.py"""

import math

import pytest
import torch
from torch.nn import functional as F

import run_record
import utils
from model import Config, NewsClassifier

CONFIG = Config(100, 512, 32, 2, 4, 64, dropout=0, attention_dropout=0, seq_classif_dropout=0)


@pytest.fixture
def batch():
    """Four rows of 30, 12, 3 and 1 tokens, padded to 30."""
    torch.manual_seed(1)
    input_ids = torch.randint(1, 100, (4, 30))
    mask = torch.arange(30) < torch.tensor([[30], [12], [3], [1]])
    return input_ids * mask, mask, torch.tensor([0, 1, 2, 3])


def gradients(model, batch, scaler, precision):
    """The loss, and the gradients as the optimizer gets them."""
    input_ids, mask, labels = batch
    optimizer = utils.make_optimizer(model, 1e-3)
    with utils.autocast(torch.device("cpu"), precision):
        logits = model(input_ids, mask).float()
    loss = F.cross_entropy(logits, labels)
    scaler.scale(loss).backward()
    # the sum of two ranks' scaled gradients must fit 16 bits where they are sent compressed
    assert max(p.grad.abs().max() for p in model.parameters()) < 65504 / 2
    scaler.unscale_(optimizer)
    grads = torch.cat([p.grad.flatten() for p in model.parameters()])
    model.zero_grad()
    return loss.item(), grads


@pytest.mark.parametrize("training", [True, False])  # attention is written out in training
def test_padding_is_masked_and_loss_and_gradients_are_those_of_fp32(batch, training):
    torch.manual_seed(0)
    model = NewsClassifier(CONFIG).train(training)
    off, on = (torch.amp.GradScaler("cpu", enabled=enabled) for enabled in (False, True))
    loss, expected = gradients(model, batch, off, "fp32")
    loss_16, found = gradients(model, batch, on, "fp16")
    assert on.get_scale() == 65536
    assert loss_16 == pytest.approx(loss, rel=1e-3)
    assert ((found - expected).norm() / expected.norm()) < 1e-2


def test_an_overflow_skips_the_step_and_is_no_reason_to_end_the_run(batch):
    torch.manual_seed(0)
    model = NewsClassifier(CONFIG)
    optimizer, scaler = utils.make_optimizer(model, 1e-3), torch.amp.GradScaler("cpu")
    before = [p.detach().clone() for p in model.parameters()]
    scaler.scale(model(*batch[:2]).sum()).backward()
    next(model.parameters()).grad[0, 0] = math.inf
    scaler.unscale_(optimizer)
    grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    scaler.step(optimizer)
    scaler.update()
    assert all(map(torch.equal, before, model.parameters()))
    assert scaler.get_scale() == 65536 / 2
    point = {"step": 1, "loss": 1.4, "lr": 1e-3, "grad_norm": grad_norm.item()}
    history, nowhere = {"curve": []}, run_record.TensorBoard(None, 0)
    run_record.log_point(history, nowhere, 10, scaler, point)
    assert history["curve"][0]["grad_norm"] is None  # JSON has no infinity
    unscaled = torch.amp.GradScaler("cpu", enabled=False)
    with pytest.raises(utils.UsageError, match="grad_norm is"):
        run_record.log_point(history, nowhere, 10, unscaled, point)
    hopeless = torch.amp.GradScaler("cpu", init_scale=2**-10)  # after 26 skipped steps
    with pytest.raises(utils.UsageError, match="grad_norm is"):
        run_record.log_point(history, nowhere, 10, hopeless, point)
    with pytest.raises(utils.UsageError, match="loss is nan"):
        run_record.log_point(history, nowhere, 10, scaler, point | {"loss": math.nan})
