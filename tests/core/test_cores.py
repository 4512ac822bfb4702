"""What is special about each core, against its definition written out again, and by numbers on paper."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hrm_testing import small_core, small_puzzles
from hypothesis import given, settings
from hypothesis import strategies as st

from hrm_rl.config import small_core as default_core
from hrm_rl.core import CoreConfig, State, build_core
from hrm_rl.core.gated_hrm import Gate
from hrm_rl.core.recurrent_transformer import depth_and_calls

MIXINGS = ("attention", "mlp", "grid")


def make(kind: str, **changes):
    return build_core(small_core(kind=kind, **changes), torch.Generator().manual_seed(0))


def tokens() -> torch.Tensor:
    return small_puzzles(3).questions.long()


def state_of(core, seed=7) -> State:
    z = torch.randn(2, 3, core.num_positions, core.hidden_size, generator=torch.Generator().manual_seed(seed))
    return State(*z.unbind())


def parameters(config: CoreConfig) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in build_core(config).parameters())


def test_parameters_at_the_default_sizes():
    sizes = default_core()
    of = {kind: parameters(replace(sizes, kind=kind)) for kind in
          ("hrm", "recurrent_transformer", "direct_transformer", "trm", "gated_hrm")}  # fmt: skip
    D, inner, heads = 96, 128, 6
    block = 2 * D * D + 12 * heads + 3 * D * inner
    other = 11 * D + D + 11 * D  # tokens, the puzzle's identifier, the output head
    assert of["hrm"] == of["recurrent_transformer"] == of["direct_transformer"] == 2 * block + other
    assert of["trm"] == block + other
    assert of["gated_hrm"] == of["hrm"] + 4 * D * D + 2 * D


# --- recurrent_transformer ------------------------------------------------------------------------------------

SIZE = st.integers(1, 6)


@settings(max_examples=200, deadline=None)
@given(SIZE, SIZE, SIZE, SIZE)
def test_as_many_blocks_a_segment_as_hrm(H_cycles, L_cycles, H_layers, L_layers):
    config = CoreConfig(H_cycles=H_cycles, L_cycles=L_cycles, H_layers=H_layers, L_layers=L_layers)
    blocks, calls = depth_and_calls(config)
    run_by_hrm = sum(L_layers if which == "L" else H_layers for which in [*"L" * L_cycles, "H"] * H_cycles)
    assert blocks * calls == run_by_hrm and blocks <= L_layers + H_layers
    assert not any(run_by_hrm % b == 0 for b in range(blocks + 1, L_layers + H_layers + 1))
    if H_layers == L_layers and H_cycles * (L_cycles + 1) % 2 == 0:
        assert blocks == H_layers + L_layers


def test_the_recurrent_transformer_is_its_network_again_and_again():
    core = make("recurrent_transformer", H_layers=2, L_layers=2)
    assert (len(core.net.layers), len(core.calls)) == (4, 3)  # 2 (2 2 + 2) = 12 blocks
    state = state_of(core)
    inputs = core.inputs(tokens())
    z = state.z_H
    for _ in range(3):
        z = core.net(z + inputs.injection, inputs.rope, inputs.bias)
    output = core(tokens(), state)
    assert torch.equal(output.state.z_H, z) and torch.equal(output.state.z_L, state.z_L)
    assert torch.equal(output.logits, core.lm_head(z)[:, core.prefix_len :])


# --- direct_transformer ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["direct_transformer", "hrm", "recurrent_transformer", "trm", "gated_hrm"])
def test_a_second_segment_gives_the_same_answer_only_without_recurrence(kind):
    core = make(kind)
    first = core(tokens(), core.initial_state(3))
    second, elsewhere = core(tokens(), first.state), core(tokens(), state_of(core))
    ignored = kind == "direct_transformer"
    assert torch.equal(first.logits, second.logits) == torch.equal(first.logits, elsewhere.logits) == ignored
    assert torch.equal(first.state.z_H, elsewhere.state.z_H) == ignored


# --- trm ------------------------------------------------------------------------------------------------------


def published_trm(core, x, y, z, n: int, T: int):
    """TRM's pseudocode (arXiv:2510.04871) on our network: (y, z, logits)."""

    def net(*inputs):
        return core.L_level(sum(inputs[1:], inputs[0]), rope, bias)

    def latent_recursion(x, y, z):
        for _ in range(n):
            z = net(x, y, z)
        return net(y, z), z

    x, rope, bias = x
    with torch.no_grad():
        for _ in range(T - 1):
            y, z = latent_recursion(x, y, z)
    y, z = latent_recursion(x, y, z)
    return y, z, core.lm_head(y)[:, core.prefix_len :]


@pytest.mark.parametrize("mixing", MIXINGS)
@pytest.mark.parametrize(("n", "T"), [(2, 2), (6, 3), (1, 1)])
def test_trm_is_its_pseudocode_with_its_gradient(n, T, mixing):
    core = make("trm", L_cycles=n, H_cycles=T, L_layers=2, token_mixing=mixing)
    assert not any("H_level" in name for name, _ in core.named_parameters())
    state = state_of(core)
    target = torch.randn(3, 16, 6, generator=torch.Generator().manual_seed(2))

    def gradients(logits):
        core.zero_grad()
        (logits * target).sum().backward()
        return torch.cat([p.grad.flatten() for p in core.parameters()])

    y, z, logits = published_trm(core, core.inputs(tokens()), *state, n, T)
    ours = core(tokens(), state)
    for got, wanted in ((ours.logits, logits), (ours.state.z_H, y), (ours.state.z_L, z)):
        torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)
    wanted, got = gradients(logits), gradients(ours.logits)
    torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-4)
    one_step = make("trm", L_cycles=n, H_cycles=T, L_layers=2, token_mixing=mixing, gradient="one_step")
    one_step.load_state_dict(core.state_dict())
    (one_step(tokens(), state).logits * target).sum().backward()
    other = torch.cat([p.grad.flatten() for p in one_step.parameters()])
    assert torch.allclose(other, wanted, atol=1e-4, rtol=1e-4) == (n == 1)  # the control: it is another gradient
    asked = make("trm", L_cycles=n, H_cycles=T, gradient="last_k", gradient_k=n + 1)
    assert asked.without_gradient == core.without_gradient == (T - 1) * (n + 1)


# --- gated_hrm ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mixing", MIXINGS)
def test_untrained_a_gated_hrm_is_hrm(mixing):
    hrm, gated = make("hrm", token_mixing=mixing), make("gated_hrm", token_mixing=mixing)
    assert all(torch.equal(value, gated.state_dict()[name]) for name, value in hrm.state_dict().items())
    state = other = hrm.initial_state(3)
    for _ in range(3):
        one, two = hrm(tokens(), state), gated(tokens(), other)
        assert torch.equal(one.logits, two.logits)
        state, other = one.state.detach(), two.state.detach()
    with torch.no_grad():
        gated.L_gate.weight.normal_(std=0.3, generator=torch.Generator().manual_seed(1))
    assert (hrm(tokens(), state).logits - gated(tokens(), state).logits).abs().max() > 1e-3


def test_a_gate_on_paper():
    gate, state, injection = Gate(2), torch.tensor([[1.0, 2.0]]), torch.tensor([[10.0, -4.0]])
    assert gate(state, injection).tolist() == [[11.0, -2.0]]
    with torch.no_grad():
        gate.bias.copy_(torch.tensor([50.0, -50.0]))
    assert gate(state, injection).tolist() == [[2.0, -8.0]]  # twice the state, twice the injection
    with torch.no_grad():
        gate.bias.zero_()
        gate.weight[0, 3] = -math.log(3) / 4  # reads the injection's second feature, which is -4
    merged = gate(state, injection)[0]
    assert merged[0].item() == pytest.approx(2 * (0.75 * 1 + 0.25 * 10)) and merged[1].item() == -2.0
