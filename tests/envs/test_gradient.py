"""What a trainer leans on: one core call a step, gradient of one segment, lookahead, no waiting."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from envs import CONTINUE, HALT, SudokuHaltVectorEnv
from hrm_rl.core import CoreOutput, State

SLOTS = 4


def make(puzzles, core, **kwargs) -> SudokuHaltVectorEnv:
    env = SudokuHaltVectorEnv(SLOTS, data=puzzles, core=core, max_steps=3, tensors="torch", **kwargs)
    env.reset(seed=5)
    return env


def actions_of(step: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(step)
    return torch.randint(2, (SLOTS,), generator=generator)


class CallCounter:
    """Stands in for run_prefix and run_tail and counts."""

    def __init__(self, env: SudokuHaltVectorEnv):
        self.prefix = self.tail = 0
        self.run_prefix, self.run_tail = env.engine.run_prefix, env.engine.run_tail
        env.engine.run_prefix, env.engine.run_tail = self.call_prefix, self.call_tail

    def call_prefix(self, tokens, state):
        self.prefix += 1
        return self.run_prefix(tokens, state)

    def call_tail(self, tokens, state):
        self.tail += 1
        return self.run_tail(tokens, state)


def test_one_segment_a_step(puzzles, core):
    env = make(puzzles, core)
    calls = CallCounter(env)
    for step in range(6):
        env.step(actions_of(step))
    assert (calls.prefix, calls.tail) == (6, 6)
    env.reset()
    assert (calls.prefix, calls.tail) == (7, 7)


def test_lookahead_keeps_the_prefix(puzzles, core):
    env = make(puzzles, core)
    calls = CallCounter(env)
    for step in range(6):
        actions = actions_of(step)
        env.lookahead(actions)
        env.step(actions)
    assert (calls.prefix, calls.tail) == (6, 12)


def test_a_core_without_a_prefix_runs_its_whole_segment_ahead(puzzles, counting):
    core = counting(2)
    env = make(puzzles, core)
    actions = actions_of(0)
    ahead = env.lookahead(actions)
    env.step(actions)
    assert core.calls == 3
    assert torch.equal(ahead.logits, env.slots.logits)


def test_lookahead_changes_nothing_but_the_work(puzzles, core):
    """Bit for bit, with the slots that have just halted already on their new puzzles."""
    plain, looking = make(puzzles, core), make(puzzles, core)
    for env in (plain, looking):
        env.engine.carry(("previous_z_H", "previous_answer", "previous_logits"))
        env.reset(seed=0)
    for step in range(8):
        actions = actions_of(step)
        standing = looking.slots
        ahead = looking.lookahead(actions)
        assert looking.slots is standing
        expected, got = plain.step(actions.clone()), looking.step(actions)
        for name, value in ahead._asdict().items():
            assert not value.requires_grad, name
            assert torch.equal(value, getattr(plain.slots, name)), name
        for mine, theirs in zip(plain.slots, looking.slots, strict=True):
            assert torch.equal(mine, theirs)
        assert torch.equal(expected[0], got[0]) and torch.equal(expected[1], got[1])


def test_after_an_update_only_the_prefix_is_old(puzzles, core):
    """The tail after a lookahead runs with the new weights, from the prefix of the old ones."""
    env = make(puzzles, core)
    actions = actions_of(0)
    ahead = env.lookahead(actions)
    with torch.no_grad():
        core.lm_head.weight.neg_()
    env.step(actions)
    torch.testing.assert_close(env.slots.logits, -ahead.logits)
    torch.testing.assert_close(env.slots.z_H, ahead.z_H)


def test_lookahead_insists_on_the_same_actions(puzzles, core):
    env = make(puzzles, core)
    actions = actions_of(0)
    env.lookahead(actions)
    with pytest.raises(RuntimeError, match="very tensor"):
        env.step(actions.clone())
    with pytest.raises(RuntimeError, match="prepared"):
        env.state_dict()
    env.step(actions)
    env.step(actions.clone())  # nothing is kept any more
    env.lookahead(actions)
    env.reset()  # which drops what was prepared
    env.step(actions.clone())


def test_lookahead_in_numpy_form(puzzles, core):
    env = SudokuHaltVectorEnv(SLOTS, data=puzzles, core=core)
    env.reset(seed=5)
    actions = actions_of(0).numpy()
    ahead = env.lookahead(actions)
    with pytest.raises(RuntimeError, match="very tensor"):
        env.step(actions.copy())
    env.step(actions)
    assert torch.equal(ahead.z_H, env.slots.z_H)


def test_gradient_flows_through_the_last_segment_and_only_it(puzzles, core):
    env = make(puzzles, core)
    for step in range(3):
        start = env.engine.state_dict()
        env.step(actions_of(step))
    assert start["z_H"].grad_fn is None
    env.slots.z_H[:, 0].float().square().sum().backward()
    through_env = {name: p.grad.clone() for name, p in core.named_parameters() if p.grad is not None}
    assert {"H_level", "L_level", "embed_tokens"} <= {name.split(".")[0] for name in through_env}
    assert "lm_head.weight" not in through_env  # the Q-token does not pass the output head
    # By hand: the same segment from the same state, cut off from everything before it.
    core.zero_grad()
    state = env.engine.state_dict()
    output = core.tail(state["tokens"], State(state["z_H"], state["z_L"]))
    output.state.z_H[:, 0].float().square().sum().backward()
    for name, gradient in through_env.items():
        torch.testing.assert_close(gradient, core.get_parameter(name).grad, msg=name)


def test_observations_carry_the_gradient(puzzles, core):
    env = make(puzzles, core, observation="q_token")
    obs, *_ = env.step(actions_of(0))
    obs.sum().backward()
    assert core.H_level.layers[0].mlp.down_proj.weight.grad.abs().sum() > 0


class OneParameter(torch.nn.Module):
    """z grows by `w` a segment, all of it differentiable: dz/dw counts the segments the gradient crosses."""

    num_positions, hidden_size = 16, 1

    def __init__(self):
        super().__init__()
        self.w = torch.nn.Parameter(torch.tensor(1.0))

    def initial_state(self, batch_size):
        zero = torch.zeros(batch_size, 16, 1)
        return State(zero, zero)

    def forward(self, tokens, state):
        z = state.z_H + self.w
        return CoreOutput(State(z, z), z.expand(-1, -1, 6))


def test_gradient_crosses_one_segment_of_a_core_without_prefix(puzzles):
    core = OneParameter()
    env = make(puzzles, core)
    go_on = torch.full((SLOTS,), CONTINUE)
    for segments in (2, 3):
        env.lookahead(go_on)
        env.step(go_on)
        z = env.slots.z_H[0, 0, 0]
        assert z.item() == segments  # the value went through all segments, the gradient through one
        assert torch.autograd.grad(z, core.w)[0].item() == 1.0


def test_gradient_is_off_where_it_is_not_wanted(puzzles, core):
    env = make(puzzles, core)
    with torch.no_grad():
        env.step(actions_of(0))
    assert not env.slots.logits.requires_grad
    arrays = SudokuHaltVectorEnv(SLOTS, data=puzzles, core=core)
    arrays.reset(seed=5)
    arrays.step(actions_of(0).numpy())
    assert not arrays.slots.logits.requires_grad


def test_an_optimiser_step_between_segments(puzzles, core):
    """The loop of a trainer: no graph outlives its segment, so backward never meets a changed weight."""
    env = make(puzzles, core)
    optimiser = torch.optim.SGD(core.parameters(), lr=0.1)
    before = core.lm_head.weight.detach().clone()
    for step in range(4):
        slots, actions = env.slots, actions_of(step)
        env.lookahead(actions)
        loss = torch.nn.functional.cross_entropy(slots.logits.flatten(0, 1), slots.labels.flatten())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        env.step(actions)
    assert not torch.equal(before, core.lm_head.weight)


class NoWaiting(TorchDispatchMode):
    """Fails on every operation that needs a tensor's value on the host."""

    WAITING = ("_local_scalar_dense", "nonzero", "item", "is_nonzero", "masked_select", "equal")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().split("::")[1].split(".")[0]
        assert name not in self.WAITING and not name.startswith("_unique"), f"{name} waits for the device"
        if name.startswith("index") and len(args) > 1 and isinstance(args[1], (list, tuple)):
            kinds = {index.dtype for index in args[1] if index is not None}
            assert not kinds & {torch.bool, torch.uint8}, "an index that is a mask waits for the device"
        return func(*args, **(kwargs or {}))


@pytest.fixture
def no_waiting(monkeypatch):
    """NoWaiting, and no tensor made of Python or numpy values either (on a GPU that is a copy that waits)."""

    def refuse(*args, **kwargs):
        raise AssertionError("a tensor made from host values waits for the device")

    @contextlib.contextmanager
    def watch():
        with monkeypatch.context() as patch, NoWaiting():
            for name in ("tensor", "as_tensor", "from_numpy", "asarray"):
                patch.setattr(torch, name, refuse)
            yield

    return watch


@pytest.mark.parametrize("augment", [True, False])
def test_step_never_waits_for_the_device(puzzles, core, no_waiting, augment):
    env = make(puzzles, core, augment=augment)
    halt, go_on = torch.full((SLOTS,), HALT), torch.full((SLOTS,), CONTINUE)
    with no_waiting():
        for actions in (halt, go_on, go_on, go_on):
            env.lookahead(actions)
            env.step(actions)
            env.step(go_on)


@pytest.mark.parametrize(
    "waits",
    [
        lambda x: x.sum().item(),
        lambda x: bool(x[0] > 0),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: torch.tensor([1, 2]),
    ],
)
def test_the_watch_sees_what_waits(no_waiting, waits):
    """The negative control of the test above."""
    x = torch.arange(3)
    with pytest.raises(AssertionError, match="waits"), no_waiting():
        waits(x)


@pytest.mark.gpu
def test_step_never_waits_for_a_gpu(puzzles, core):
    env = make(puzzles, core.to("cuda"), device="cuda")
    chosen = [torch.full((SLOTS,), action, device="cuda") for action in (HALT, CONTINUE, CONTINUE)]
    torch.cuda.set_sync_debug_mode("error")
    try:
        for actions in chosen:
            env.lookahead(actions)
            env.step(actions)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_halt_in_every_slot(puzzles, core):
    env = make(puzzles, core)
    for episode in range(3):
        assert env.slots.episode.tolist() == [episode] * SLOTS
        env.step(torch.full((SLOTS,), HALT))
