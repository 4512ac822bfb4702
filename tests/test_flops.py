"""The arithmetic that is reported against PyTorch's own counter over the real thing, and against numbers on paper."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from hrm_testing import MODES, small_core, small_trainer
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from agents import FixedAgent, QHaltingAgent
from agents.q_targets import BOOTSTRAPS
from hrm_rl.core import CORES, CoreConfig, build_core
from hrm_rl.errors import UserError
from hrm_rl.flops import call_flops, countable, muon_flops, published_flops, segment_flops, update_flops

SLOTS = 4  # of `small_trainer`


def counted(function, *arguments) -> int:
    """Floating-point operations of the matrix products in a call, by PyTorch's counter.

    Attention goes by its plain form, which the counter sees on a CPU and which recomputes nothing.
    """
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        function(*arguments)
    return counter.get_total_flops()


def test_a_block_on_paper():
    # 82 positions of 128 features, SwiGLU 512 wide: 8 D^2 + 6 D inner + 4 T D a position.
    core = CoreConfig(L_layers=1, H_layers=3)
    block = 82 * (8 * 128**2 + 6 * 128 * 512 + 4 * 82 * 128)
    assert call_flops(core) == (("L", "L", "H", "L", "L", "H"), {"L": block, "H": 3 * block}, 4)
    # Over positions: 128 columns of 82, 256 wide.
    assert call_flops(replace(core, token_mixing="mlp"))[1]["L"] == 128 * 6 * 82 * 256 + 82 * 6 * 128 * 512
    grid = 82 * (4 * 128**2 + 6 * 128 * 512 + 2 * 82 * 128)
    assert call_flops(replace(core, token_mixing="grid"))[1]["L"] == grid
    gate = 82 * 2 * 128 * 256
    assert call_flops(replace(core, kind="gated_hrm"))[1] == {"L": block + gate, "H": 3 * block + gate}


def test_the_blocks_of_every_kind_on_paper():
    """Blocks run in a segment, and with gradient in it, for 2 layers a level and 2 cycles of 3."""
    core = CoreConfig(H_cycles=2, L_cycles=3, inner_multiple=16)
    (block,) = {flops // 2 for flops in call_flops(core)[1].values()}
    head = 2 * 82 * 128 * 11
    gates = 82 * 2 * 128 * 256
    wanted = {
        "hrm": (16, 4, 0), "gated_hrm": (16, 4, gates), "trm": (16, 8, 0), "recurrent_transformer": (16, 4, 0),
        "direct_transformer": (4, 4, 0),
    }  # fmt: skip
    assert set(wanted) == set(CORES)
    for kind, (blocks, reached, gate) in wanted.items():
        found = segment_flops(replace(core, kind=kind))
        calls = blocks // 2
        assert (found.forward, found.tail) == (blocks * block + calls * gate + head, reached * block + 2 * gate + head)


def test_the_published_step_is_that_of_the_paper():
    # 27 M parameters, 4 + 4 layers, two cycles of two: 35.8 GFLOP a sample without attention's own products.
    core = CoreConfig(hidden_size=512, num_heads=8, H_layers=4, L_layers=4, puzzle_emb_ndim=512)
    scores = 40 * 2 * 2 * 82 * 82 * 512  # 24 block calls in a segment, 8 of them in the tail: 24 + 24 + 2 * 8 = 64
    layers = 64 * 82 * (8 * 512**2 + 6 * 512 * 1536)
    head = 4 * 2 * 82 * 512 * 11
    assert published_flops(core) == layers + scores // 40 * 64 + head + 4 * 2 * 512 * 2
    assert published_flops(core) / 1e9 == pytest.approx(36.7, abs=0.1)


@pytest.mark.parametrize("kind", CORES)
@pytest.mark.parametrize("mixing", ["attention", "mlp", "grid"])
@pytest.mark.parametrize("cycles", [(1, 1), (2, 3)])
def test_a_segment_counts_what_pytorch_counts(kind, mixing, cycles):
    config = small_core(kind=kind, token_mixing=mixing, H_cycles=cycles[0], L_cycles=cycles[1], H_layers=2)
    core = build_core(config, torch.Generator().manual_seed(0))
    tokens, state = torch.ones(3, 16, dtype=torch.long), core.initial_state(3)
    expected = segment_flops(config)
    assert counted(core.prefix, tokens, state) == 3 * expected.prefix
    assert counted(core.tail, tokens, state) == 3 * expected.tail
    assert expected.forward == expected.prefix + expected.tail > 0


def update_of(core: CoreConfig, bootstrap: str, objective: str, agent=QHaltingAgent, **changes) -> tuple[int, int]:
    """(counted by PyTorch, expected) for one update in its steady state."""
    made = build_core(core, torch.Generator().manual_seed(0))
    trainer = small_trainer(agent, core=made, bootstrap=bootstrap, objective=objective, **changes)
    with sdpa_kernel(SDPBackend.MATH):  # the graph whose backward pass is counted is made here
        trainer.update()  # next_observation has nothing to learn from before
    c = trainer.config
    expected = update_flops(c.core, bootstrap, objective, max_steps=c.max_steps, q_to_core=c.q_to_core,
                            has_q_head=agent is QHaltingAgent)  # fmt: skip
    return counted(trainer.update), SLOTS * expected.total


@pytest.mark.parametrize("bootstrap", MODES)
@pytest.mark.parametrize("objective", ["joint", "supervised", "q"])
@pytest.mark.parametrize("mixing", ["attention", "mlp", "grid"])
def test_an_update_counts_what_pytorch_counts(mixing, objective, bootstrap):
    got, expected = update_of(small_core(token_mixing=mixing), bootstrap, objective)
    assert got == expected


@pytest.mark.parametrize("gradient", ["auto", "one_step", "last_k", "full"])
@pytest.mark.parametrize("kind", CORES)
def test_an_update_of_every_core_and_reach(kind, gradient):
    got, expected = update_of(small_core(kind=kind, gradient=gradient, gradient_k=3), "shared_prefix", "joint")
    assert got == expected


@pytest.mark.parametrize("bootstrap", MODES)
@pytest.mark.parametrize("budget", [1, 4])
def test_an_update_with_other_switches(bootstrap, budget):
    got, expected = update_of(small_core(), bootstrap, "joint", q_to_core=False, max_steps=budget)
    assert got == expected
    got, expected = update_of(small_core(), bootstrap, "supervised", FixedAgent, max_steps=budget)
    assert got == expected


def test_the_counts_differ_where_they_should():
    core = small_core()
    extra, shared, both, after, none = (update_flops(core, b).total for b in BOOTSTRAPS)
    assert extra - shared == segment_flops(core).prefix
    assert both - shared == segment_flops(core).forward / 4
    assert shared - after > 0.9 * segment_flops(core).tail  # the head is scored once more there
    assert none < after < shared < extra
    assert update_flops(core, "none", "q").backward == 0
    for wrong in (("lookahead", "joint"), ("none", "both")):
        with pytest.raises(ValueError, match=re.escape(repr(wrong[0] if wrong[0] == "lookahead" else wrong[1]))):
            update_flops(core, *wrong)


def test_a_solver_is_not_counted():
    """Its calls depend on the numbers: PyTorch counts another arithmetic where only the tolerance is another one."""
    config = small_core(gradient="implicit", solver="iterate", H_cycles=2, L_cycles=3)
    counts = set()
    for tol in (0.5, 1e-6):
        core = build_core(replace(config, solver_tol=tol), torch.Generator().manual_seed(0))
        counts.add(counted(core.prefix, torch.ones(3, 16, dtype=torch.long), core.initial_state(3)))
    assert len(counts) == 2
    assert countable(replace(config, gradient="full")) and not countable(config)
    for count in (call_flops, segment_flops, published_flops, lambda core: update_flops(core, "none")):
        count(replace(config, gradient="one_step"))
        with pytest.raises(UserError, match="core.gradient=implicit: a solver runs the segment"):
            count(config)


def test_muon_counts_what_pytorch_counts():
    matrix = torch.nn.Parameter(torch.randn(24, 16))
    wide = torch.nn.Parameter(torch.randn(8, 40))
    optimizer = torch.optim.Muon([matrix, wide])
    for parameter in (matrix, wide):
        parameter.grad = torch.randn_like(parameter)
    assert counted(optimizer.step) == muon_flops([(24, 16), (8, 40)])
