"""The supervised losses: golden values, known answers, extreme arguments."""

from __future__ import annotations

import pytest
import torch
from hrm_testing import close, golden, relative
from hypothesis import given, settings
from hypothesis import strategies as st

from hrm_rl.losses import IGNORE, log_stablemax, supervised_loss, token_losses


def test_stablemax_values_as_released():
    wanted = golden("stablemax")
    logits = wanted["logits"]
    close(log_stablemax(logits), wanted["log_stablemax"], 1e-12, "log_stablemax")
    close(token_losses(logits[:, None], wanted["labels"][:, None], "stablemax")[:, 0], wanted["ce"], 1e-12, "ce")


def test_stablemax_gradients_as_released():
    wanted = golden("stablemax")
    logits = wanted["logits"].clone().requires_grad_()
    token_losses(logits[:, None], wanted["labels"][:, None], "stablemax").sum().backward()
    scale = wanted["ce_grad"].abs().amax(dim=-1, keepdim=True).clamp(min=1e-300)
    close(logits.grad / scale, wanted["ce_grad"] / scale, 1e-9, "gradient")


def test_stablemax_has_no_nan_at_one_in_float32():
    """1 / (1 - x + 1e-30)^2 of the branch not taken is infinite at x = 1, and 0 * inf is NaN."""
    wanted = golden("stablemax")
    rows = [82, 84, 90, 91]
    assert (wanted["logits"][rows] == 1).any(dim=-1).all()
    logits = wanted["logits"].float().requires_grad_()
    token_losses(logits[:, None], wanted["labels"][:, None], "stablemax").sum().backward()
    assert torch.isfinite(logits.grad).all()
    scale = wanted["ce_grad"].abs().amax(dim=-1, keepdim=True).clamp(min=1e-30)
    close(logits.grad / scale, wanted["ce_grad"] / scale, 1e-5, "float32 gradient")


def test_the_careless_gradient_is_nan_there():
    """Negative control: both branches differentiated in float32."""
    x = torch.ones(1, requires_grad=True)
    torch.where(x >= 0, x + 1, 1 / (1 - x + 1e-30)).sum().backward()
    assert not torch.isfinite(x.grad).all()


@pytest.mark.parametrize("case", ["a", "b"])
def test_cells_and_sums_as_released(case):
    w = golden("loss_tiny")
    logits, labels = w[f"{case}.logits"], w[f"{case}.labels"]
    close(token_losses(logits, labels, "stablemax"), w[f"{case}.stablemax_ce"], 1e-6, "stablemax per cell")
    close(token_losses(logits, labels, "softmax"), w[f"{case}.softmax_ce"], 1e-6, "softmax per cell")
    relative(supervised_loss(logits, labels, "stablemax").sum(), w[f"{case}.lm_loss"], 1e-6, "lm_loss")
    relative(supervised_loss(logits, labels, "softmax").sum(), w[f"{case}.softmax.lm_loss"], 1e-6, "softmax lm_loss")


def test_sum_in_place_of_mean_is_seen():
    """Negative control: summing over a puzzle's cells gives another loss."""
    w = golden("loss_tiny")
    with pytest.raises(AssertionError):
        relative(token_losses(w["a.logits"], w["a.labels"], "stablemax").sum(), w["a.lm_loss"], 1e-3)


@pytest.mark.parametrize("kind", ["stablemax", "softmax"])
def test_mean_over_supervised_tokens(kind):
    """By hand: equal logits over V values give log V in every labelled cell, however many there are."""
    labels = torch.tensor([[0, 1, 2, 3], [1, IGNORE, IGNORE, IGNORE], [IGNORE] * 4])
    loss = supervised_loss(torch.zeros(3, 4, 5), labels, kind)
    close(loss.double(), torch.tensor([5.0, 5.0, 1.0]).double().log(), 1e-6)


def test_ignored_cells_carry_no_gradient():
    logits = torch.randn(2, 3, 4, requires_grad=True)
    labels = torch.tensor([[0, IGNORE, 1], [IGNORE] * 3])
    supervised_loss(logits, labels, "stablemax").sum().backward()
    assert logits.grad[0, 1].eq(0).all() and logits.grad[1].eq(0).all() and logits.grad[0, 0].ne(0).any()


def test_unknown_loss():
    with pytest.raises(ValueError, match="stablemax or softmax"):
        supervised_loss(torch.zeros(1, 1, 2), torch.zeros(1, 1, dtype=torch.long), "hinge")


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(-1e30, 1e30), min_size=2, max_size=12))
def test_stablemax_is_a_distribution(values):
    """Probabilities sum to 1, keep the order of the logits, and are finite whatever is put in."""
    logits = torch.tensor(values, dtype=torch.float64)
    log_p = log_stablemax(logits)
    assert torch.isfinite(log_p).all()
    assert abs(log_p.exp().sum().item() - 1) < 1e-9
    order = logits.argsort()
    assert (log_p[order].diff() >= -1e-12).all()
