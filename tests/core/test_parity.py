"""The core computes what the published implementation computes (golden vectors, see tests/golden/README.md)."""

from __future__ import annotations

import pytest
import torch
from hrm_testing import (
    FIRST_SEGMENT,
    close,
    golden,
    golden_text,
    released_model,
    tiny_config,
    tiny_model,
    within,
)

from hrm_rl.core import HRMCore
from hrm_rl.core.released import from_released, to_released


def check_segments(core, head, tokens, wanted, puzzle_ids=None) -> None:
    """Run as many segments as `wanted` holds from the initial state and compare all of them."""
    state = core.initial_state(len(tokens))
    for i in range(len(wanted["z_H"])):
        state, logits = core(tokens, state, puzzle_ids)
        q_logits, atol = head(state.z_H), FIRST_SEGMENT if i == 0 else 5e-5
        close(state.z_H, wanted["z_H"][i], atol, f"z_H of segment {i + 1}")
        close(state.z_L, wanted["z_L"][i], atol, f"z_L of segment {i + 1}")
        close(logits, wanted["logits"][i], atol, f"logits of segment {i + 1}")
        close(q_logits[:, 0], wanted["q_halt_logits"][i], atol, "q_halt")
        close(q_logits[:, 1], wanted["q_continue_logits"][i], atol, "q_continue")
        state = state.detach()


def test_six_segments():
    wanted = golden("forward_tiny")
    core, head = tiny_model()
    close(core.embed(wanted["inputs"], wanted["puzzle_identifiers"]), wanted["input_embeddings"], 1e-6, "embedding")
    check_segments(core, head, wanted["inputs"], wanted)


def test_evaluation_mode_changes_nothing():
    wanted = golden("forward_tiny")
    core, head = tiny_model()
    check_segments(core.eval(), head.eval(), wanted["inputs"], wanted)


def test_learned_positions():
    wanted = golden("learned_pos")
    core, head = released_model(within(wanted, "w."), positions="learned", L_cycles=3, H_layers=1, L_layers=1)
    close(core.embed(wanted["inputs"]), wanted["input_embeddings"], 1e-6, "embedding")
    check_segments(core, head, wanted["inputs"], wanted)


def test_without_puzzle_embedding_the_first_token_is_read():
    extras, inputs = golden("extras"), golden("forward_tiny")["inputs"]
    weights = golden("weights_tiny")
    del weights["inner.puzzle_emb.weights"]
    core, head = released_model(weights, puzzle_emb_ndim=0)
    assert core.num_positions == 16
    check_segments(core, head, inputs, within(extras, "nopuzzle."))


def test_two_puzzle_positions_and_several_identifiers():
    wanted = within(golden("extras"), "wide.")
    inputs, ids = golden("forward_tiny")["inputs"], wanted["puzzle_identifiers"]
    assert ids.unique().numel() == 3
    core, head = released_model(
        within(wanted, "w."), puzzle_emb_ndim=48, num_puzzle_identifiers=3, H_layers=1, L_layers=1
    )
    assert core.num_positions == 18
    close(core.embed(inputs, ids), wanted["input_embeddings"], 1e-6, "embedding")
    check_segments(core, head, inputs, wanted, ids)


@pytest.mark.parametrize("case", ["tiny", "learned"])
def test_level_calls_in_order(case):
    """Which level is called when inside a segment, and what each of the tiny model's calls returns."""
    if case == "tiny":
        order, wanted = golden_text("forward_detail", "level_order"), golden("forward_detail")["level_out"]
        core, _ = tiny_model()
    else:
        order, wanted = golden_text("learned_pos", "level_order"), None
        weights = within(golden("learned_pos"), "w.")
        core, _ = released_model(weights, positions="learned", L_cycles=3, H_layers=1, L_layers=1)
    seen, grads = [], []

    def note(name):
        def hook(module, args, output):
            seen.append((name, output))
            grads.append(torch.is_grad_enabled())

        return hook

    core.H_level.register_forward_hook(note("H"))
    core.L_level.register_forward_hook(note("L"))
    inputs = golden("forward_tiny")["inputs"]
    core(inputs, core.initial_state(len(inputs)))
    assert [name for name, _ in seen] == order
    assert grads == [False] * (len(order) - 2) + [True, True]  # the 1-step gradient
    if wanted is not None:
        for i, (name, output) in enumerate(seen):
            close(output[:2], wanted[i], FIRST_SEGMENT, f"call {i} ({name})")


def test_inside_the_first_block():
    wanted, inputs = golden("forward_detail"), golden("forward_tiny")["inputs"]
    core, _ = tiny_model()
    close(core.rope_cos, wanted["rope_cos"], 1e-6, "cos")
    close(core.rope_sin, wanted["rope_sin"], 1e-6, "sin")
    block, seen = core.L_level.layers[0], {}

    def keep(name, which):
        def hook(module, args, output):
            seen.setdefault(name, (args[0] if which == "in" else output)[0].detach())  # first call, sequence 0

        return hook

    for name, module, which in (
        ("block_in", block, "in"), ("block_out", block, "out"), ("qkv", block.self_attn.qkv_proj, "out"),
        ("attn_heads_out", block.self_attn.o_proj, "in"), ("attn_out", block.self_attn, "out"),
        ("mlp_in", block.mlp, "in"), ("gate_up", block.mlp.gate_up_proj, "out"),
        ("swiglu", block.mlp.down_proj, "in"), ("mlp_out", block.mlp, "out"),
    ):  # fmt: skip
        module.register_forward_hook(keep(name, which))
    core(inputs, core.initial_state(len(inputs)))
    for name, value in seen.items():
        close(value, wanted[f"L0.{name}"], FIRST_SEGMENT, name)
    assert len(seen) == 9


def test_weights_map_one_to_one_both_ways():
    weights = golden("weights_tiny")
    core, head = tiny_model()
    for prefix in ("inner.", "model.inner.", "_orig_mod.model.inner."):
        back = to_released(core.state_dict(), head.state_dict(), prefix)
        assert set(back) == {prefix + name.removeprefix("inner.") for name in weights}
        again_core, again_head = from_released(back)
        assert set(again_core) == set(core.state_dict()) and set(again_head) == {"weight", "bias"}
        for name, value in back.items():
            assert torch.equal(value, weights["inner." + name.removeprefix(prefix)])
    buffers = {"puzzle_emb.local_weights": torch.zeros(8, 32), "puzzle_emb.local_ids": torch.zeros(8)}
    assert from_released({f"inner.{n}": t for n, t in buffers.items()}) == ({}, {})
    with pytest.raises(KeyError, match="optimizer"):
        from_released({"optimizer.step": torch.zeros(1)})


def test_the_model_has_the_released_parameters():
    core, head = tiny_model()
    names = {name for name, _ in core.named_parameters()}
    assert len(names) + len(list(head.parameters())) == 20 + 1  # the puzzle embedding is a parameter of ours
    assert {name for name, _ in core.named_buffers()} == {"H_init", "L_init", "rope_cos", "rope_sin"}


# --- negative controls: each of these mistakes is seen by the checks above ----------------------------------


def swap_gate_and_up(core: HRMCore) -> None:
    for level in (core.H_level, core.L_level):
        for block in level.layers:
            weight = block.mlp.gate_up_proj.weight
            weight.data = torch.cat(tuple(reversed(weight.data.chunk(2))))


def mix_up_queries_and_keys(core: HRMCore) -> None:
    weight = core.L_level.layers[0].self_attn.qkv_proj.weight.data
    weight[:48] = weight[:48].roll(16, 0)


def shift_rotary_positions(core: HRMCore) -> None:
    core.rope_cos, core.rope_sin = core.rope_cos * 0 + 1, core.rope_sin * 0


def forget_the_scale(core: HRMCore) -> None:
    core.embed_scale = 1.0


def swap_initial_states(core: HRMCore) -> None:
    core.H_init, core.L_init = core.L_init.clone(), core.H_init.clone()


@pytest.mark.parametrize(
    "spoil",
    [swap_gate_and_up, mix_up_queries_and_keys, shift_rotary_positions, forget_the_scale, swap_initial_states],
)
def test_mistakes_are_seen(spoil):
    wanted = golden("forward_tiny")
    core, head = tiny_model()
    spoil(core)
    with pytest.raises(AssertionError, match="off by"):
        check_segments(core, head, wanted["inputs"], wanted)


@pytest.mark.parametrize("changes", [{"L_cycles": 1}, {"H_cycles": 1}, {"rope_theta": 100.0}, {"rms_norm_eps": 1e-2}])
def test_other_settings_give_other_values(changes):
    wanted = golden("forward_tiny")
    core, head = HRMCore(tiny_config(**changes)), tiny_model()[1]
    core.load_state_dict(tiny_model()[0].state_dict())
    with pytest.raises(AssertionError, match="off by"):
        check_segments(core, head, wanted["inputs"], wanted)
