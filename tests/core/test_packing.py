"""Packed weights (`hrm_rl/core/packing.py`) give the products of plain ones, and are forgotten when weights change."""

from __future__ import annotations

import platform
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hrm_rl.core import HRMCore, packing
from hrm_rl.core.layers import Linear
from hrm_rl.devices import can_compile
from tests.support.hrm_testing import MODES, lively_trainer, small_core, tiny_config

CPU, MANY = torch.device("cpu"), 10_000
SETTINGS = {"hidden_size": 128, "num_heads": 4, "puzzle_emb_ndim": 128, "dtype": "float32"}
PACKS = packing.prepare(HRMCore(tiny_config(**SETTINGS)), MANY, CPU)
can_pack = pytest.mark.skipif(not PACKS, reason=f"no packed weights on {platform.machine()}")


def linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return torch.ops.hrm_rl.linear(x, weight)


def large_trainer(bootstrap: str, compile: str = "off", **optim):
    """Its AdamW does not tell apart tiny gradients by their sign, which rounding decides."""
    core = HRMCore(small_core(**SETTINGS), torch.Generator().manual_seed(0))
    return lively_trainer(bootstrap=bootstrap, core=core, compile=compile, optim={"lr": 1e-3, "eps": 1e-3, **optim})


def weights(trainer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainer.trained.items()}


# --- the operator -------------------------------------------------------------------------------------------


def test_the_operator_is_what_pytorch_asks_of_one():
    x, weight = torch.randn(2, 3, 5, requires_grad=True), torch.randn(4, 5, requires_grad=True)
    torch.library.opcheck(torch.ops.hrm_rl.linear, (x, weight))
    assert torch.autograd.gradcheck(linear, (x.double(), weight.double()))


@can_pack
@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(1, 7), min_size=1, max_size=3), st.integers(1, 150), st.integers(1, 300),
       st.integers(0, 99))
def test_a_packed_product_is_as_exact_as_a_plain_one(shape, inputs, outputs, seed):
    g = torch.Generator().manual_seed(seed)
    x, weight = (torch.randn(*size, inputs, generator=g, requires_grad=True) for size in (shape, [outputs]))
    gradient = torch.randn(*shape, outputs, generator=g)
    with packing.kept():
        results = [linear(x, weight), *torch.autograd.grad(linear(x, weight), (x, weight), gradient)]
    def in_float64(of):
        x64, weight64 = of(x.double()), of(weight.double())
        exact = torch.nn.functional.linear(x64, weight64)
        return [exact, *torch.autograd.grad(exact, (x64, weight64), of(gradient.double()))]

    sizes = in_float64(torch.abs)  # sums of the magnitudes of what is added: the unit of rounding errors
    for result, right, size in zip(results, in_float64(torch.clone), sizes, strict=True):
        assert result.shape == right.shape and result.dtype == torch.float32
        assert ((result - right).abs() <= torch.minimum(4e-7 * size, 2e-5 + 1e-5 * right.abs())).all()


@can_pack
def test_packed_weights_last_until_they_are_forgotten():
    x, weight = torch.ones(1, 3), torch.ones(2, 3)
    with packing.kept():
        assert linear(x, weight).tolist() == [[3, 3]]
        weight.fill_(2)
        assert linear(x, weight).tolist() == [[3, 3]]  # why `forget` has to be called
        packing.forget()
        assert linear(x, weight).tolist() == [[6, 6]]
        weight.fill_(3)
        with packing.kept():
            assert linear(x, weight).tolist() == [[9, 9]]
        assert linear(x, weight).tolist() == [[6, 6]]
        with ThreadPoolExecutor(1) as other:
            assert other.submit(linear, x, weight).result().tolist() == [[9, 9]]
    assert linear(x, weight).tolist() == [[9, 9]]  # outside nothing is kept
    with pytest.raises(ZeroDivisionError), packing.kept():
        linear(x, weight)
        raise ZeroDivisionError
    weight.data.fill_(4)
    assert linear(x, weight).tolist() == [[12, 12]]
    packing.forget()  # does no harm there


# --- the layers of a core -----------------------------------------------------------------------------------


@can_pack
@pytest.mark.parametrize(("change", "slots", "device"), [
    ({"dtype": "bfloat16"}, MANY, CPU), ({"hidden_size": 96, "num_heads": 4}, MANY, CPU), ({}, 16, CPU),
    ({}, MANY, torch.device("meta")),
])  # fmt: skip
def test_only_where_it_was_measured_to_be_faster(change, slots, device):
    core = HRMCore(tiny_config(**SETTINGS))
    layers = [module for module in core.modules() if isinstance(module, Linear)]
    assert layers and packing.prepare(core, MANY, CPU) and all(layer.packs_weight for layer in layers)
    assert not packing.prepare(HRMCore(tiny_config(**SETTINGS | change)), slots, device)
    assert not packing.prepare(core, MANY, torch.device("meta")) and not any(layer.packs_weight for layer in layers)
    assert not packing.prepare(torch.nn.Linear(128, 128), MANY, CPU)


@can_pack
@pytest.mark.parametrize("gradient", ["auto", "full"])
def test_a_segment_and_its_gradient(gradient):
    core = HRMCore(tiny_config(**SETTINGS, gradient=gradient), torch.Generator().manual_seed(0))
    tokens = torch.randint(1, 6, (3, 16), generator=torch.Generator().manual_seed(1))

    def outcome() -> list[torch.Tensor]:
        output = core(tokens, core.initial_state(3))
        learned = torch.autograd.grad(output.logits.square().sum(), tuple(core.H_level.parameters()))
        return [output.state.z_H, output.logits, *learned]

    plain = outcome()
    packing.prepare(core, MANY, CPU)
    outside = outcome()
    with packing.kept():
        packed = outcome()
    assert any(not torch.equal(a, b) for a, b in zip(plain, packed, strict=True))  # else nothing was packed
    for a, b, c in zip(plain, outside, packed, strict=True):
        assert torch.equal(a, b)
        assert torch.allclose(a, c, rtol=1e-4, atol=1e-4 * a.abs().max().item())


# --- training -----------------------------------------------------------------------------------------------


@pytest.fixture
def few_slots(monkeypatch):
    """A trainer packs its weights however few slots it has."""
    monkeypatch.setattr(packing, "SMALLEST_STATE", 0)


@can_pack
@pytest.mark.usefixtures("few_slots")
@pytest.mark.parametrize("bootstrap", MODES)
def test_updates_learn_what_those_without_packed_weights_learn(bootstrap, monkeypatch):
    def learned() -> dict[str, torch.Tensor]:
        trainer = large_trainer(bootstrap, ema=0.9)
        for _ in range(4):
            trainer.update()
        return weights(trainer)

    packed = learned()
    monkeypatch.setattr(packing, "prepare", lambda *_: False)
    plain = learned()
    assert any(not torch.equal(plain[name], packed[name]) for name in plain)
    assert all(torch.allclose(plain[name], packed[name], atol=1e-4) for name in plain)


@can_pack
@pytest.mark.usefixtures("few_slots")
def test_weights_that_were_not_forgotten_would_be_seen(monkeypatch):
    """The control of the test before: without `forget`, a segment runs with the weights before the update."""
    def state(forgets: bool) -> torch.Tensor:
        trainer = large_trainer("shared_prefix")
        if not forgets:
            monkeypatch.setattr(packing, "forget", lambda: None)
        trainer.update()
        return trainer.envs.slots.z_H.detach()

    assert not torch.allclose(state(True), state(False), atol=1e-3)


@can_pack
@pytest.mark.usefixtures("few_slots")
def test_weights_changed_between_updates_count():
    runs = []
    for changes in (False, True):
        trainer = large_trainer("extra_forward")
        trainer.update()
        if changes:
            trainer.core.H_level.layers[0].mlp.down_proj.weight.data.neg_()  # which no version counter sees
        trainer.update()
        runs.append(trainer.envs.slots.z_H.detach())
    assert not torch.allclose(*runs, atol=1e-2)


@can_pack
@pytest.mark.usefixtures("few_slots")
@pytest.mark.parametrize("bootstrap", MODES)
def test_a_resumed_run_goes_on_number_for_number(bootstrap):
    trainer, resumed = large_trainer(bootstrap), large_trainer(bootstrap)
    for updates in (0, 3):
        for _ in range(updates):
            trainer.update()
        tensors, state = trainer.state()
        resumed.load_state({name: tensor.clone() for name, tensor in tensors.items()}, state | {"step": trainer.step})
        slots, same = trainer.envs.slots, resumed.envs.slots
        assert torch.equal(slots.z_H, same.z_H) and torch.equal(slots.logits, same.logits)
    for _ in range(2):
        trainer.update()
        resumed.update()
    assert all(torch.equal(value, weights(resumed)[name]) for name, value in weights(trainer).items())


@can_pack
@pytest.mark.slow
@pytest.mark.usefixtures("few_slots")
def test_compiled_updates_use_packed_weights_too():
    if not can_compile(CPU):
        pytest.skip("no C++ compiler")
    runs = []
    for compile in ("off", "on"):
        trainer = large_trainer("shared_prefix", compile)
        for _ in range(3):
            trainer.update()
        assert trainer.compiled == (compile == "on")
        runs.append(weights(trainer))
    assert all(torch.allclose(runs[0][name], runs[1][name], atol=1e-4) for name in runs[0])
