"""The Q-learner with every switch: HRM's rule by default, targets by hand, fixed points, what moves, what is kept.

B slots, M steps. On the counting core a linear head is a table whose fixed point is known in closed form.
"""

from __future__ import annotations

import inspect
import json
from dataclasses import fields

import pytest
import torch
from hrm_testing import NoWaiting, counting_core, small_puzzles, small_trainer

from agents import AGENTS, QHaltingAgent, Transition, View, make_agent, q_targets, replay, returns
from agents import q_variant as module
from agents.arm import Arm
from agents.memory import Memory
from agents.q_variant import DoubleHead, FeatureHead, QVariantAgent, frozen_copy
from agents.replay import at, filled, push
from envs.actions import CONTINUE, HALT
from hrm_rl import recorded
from hrm_rl.checkpoint import load_checkpoint, save_checkpoint
from hrm_rl.core.base import CoreOutput, State
from hrm_rl.core.io import load_core
from hrm_rl.core.q_head import QHead
from hrm_rl.errors import UserError
from hrm_rl.evaluate import load_agent, which_agent

M = 4
#: One of each switch, crossed somehow; each runs, resumes, is saved and loaded.
VARIANTS = {
    "polyak mlp": {"target": "polyak", "tau": 0.3, "head": "mlp", "head_width": 8, "head_norm": "rmsnorm"},
    "hard layernorm": {"target": "hard", "period": 4, "head_norm": "layernorm", "loss": "mse_logits"},
    "double last_layer mlp": {"backup": "double", "target": "last_layer", "period": 4, "head": "mlp", "head_width": 8},
    "double fifo": {"backup": "double", "replay": "fifo", "replay_size": 16, "loss": "mse_values"},
    "fifo hard": {"replay": "fifo", "replay_size": 12, "target": "hard", "period": 4, "gamma": 0.9},
    "sarsa fifo": {"backup": "sarsa", "replay": "fifo", "replay_size": 16, "ponder_cost": 0.1},
    "sarsa polyak": {"backup": "sarsa", "target": "polyak", "tau": 0.5},
    "lambda fifo": {"backup": "lambda", "replay": "fifo", "replay_size": 40, "target": "polyak"},
    "mc": {"backup": "mc", "gamma": 0.9, "head": "mlp", "head_width": 8},
}
RARER = ("hard layernorm", "fifo hard", "sarsa polyak", "mc")
EACH = [pytest.param(name, marks=pytest.mark.slow) if name in RARER else name for name in VARIANTS]


def agent_with(hidden_size: int = 3, max_steps: int = M, bootstrap: str = "shared_prefix", **arguments):
    """An agent on no core in particular."""
    core = torch.nn.Module()
    core.hidden_size = hidden_size
    return make_agent(QVariantAgent, core, max_steps, bootstrap, arguments)


# --- the defaults ---------------------------------------------------------------------------------------------


def test_arguments_are_those_of_an_arm():
    """Same names, same defaults; what is the run's own (optimiser, number of slots) is no argument."""
    held = {name: p.default for name, p in inspect.signature(QVariantAgent).parameters.items()}
    arm = {f.name: f.default for f in fields(Arm)}
    own = {"core", "max_steps", "bootstrap", "threshold"}
    assert set(arm) - set(held) == {"optimizer", "lr", "weight_decay", "num_envs"} and set(held) - set(arm) == own
    assert all(arm[name] == default for name, default in held.items() if name not in own)
    plain = {n: p.default for n, p in inspect.signature(QHaltingAgent).parameters.items()}
    assert all(held[name] == default for name, default in plain.items())


def weights_after(updates: int, agent, arguments: dict, **changes) -> dict[str, torch.Tensor]:
    """Core and Q-head after a small joint run that halts here and there."""
    trainer = small_trainer(agent, {"q_bias": 0.0, "epsilon": 0.5} | arguments, **changes)
    with torch.no_grad():
        head = trainer.agent.q_head
        head.weight.normal_(generator=torch.Generator().manual_seed(1))
    for _ in range(updates):
        trainer.update()
    return {name: p.detach() for name, p in trainer.trained.items()}


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("mode", ["extra_forward", *(
    pytest.param(mode, marks=pytest.mark.slow) for mode in q_targets.BOOTSTRAPS[1:])])  # fmt: skip
def test_the_defaults_are_the_rule_of_hrm(mode):
    wanted = weights_after(12, QHaltingAgent, {}, bootstrap=mode)
    assert same(weights_after(12, QVariantAgent, {}, bootstrap=mode), wanted)
    changed = {"loss": "mse_values"} if mode == "none" else {"target": "hard", "period": 3}  # negative control
    assert not same(weights_after(12, QVariantAgent, changed, bootstrap=mode), wanted)


@pytest.mark.parametrize("changed", [{"target": "polyak", "tau": 1.0}, {"target": "hard", "period": 1},
                                     {"target": "last_layer", "period": 1}])  # fmt: skip
def test_a_target_network_that_follows_at_once_is_none(changed):
    assert same(weights_after(10, QVariantAgent, changed), weights_after(10, QHaltingAgent, {}))


@pytest.mark.parametrize("backup", ["sarsa", "mc", "lambda"])
def test_backups_are_those_of_the_agents_of_that_name(backup):
    wanted = weights_after(12, AGENTS[backup], {})
    assert same(weights_after(12, QVariantAgent, {"backup": backup}), wanted)
    assert not same(weights_after(12, QVariantAgent, {"backup": backup, "loss": "mse_values"}), wanted)


# --- target networks by hand ----------------------------------------------------------------------------------


def decision(B: int = 2, D: int = 3, seed: int = 0, **changes) -> Transition:
    """One decision of B slots at step 2 of M, with the segment that comes next."""
    draw = torch.Generator().manual_seed(seed)
    z_H, next_z_H = torch.randn(2, B, 2, D, generator=draw)
    view = View(z_H, None, torch.full((B,), 2), torch.ones(B, dtype=torch.bool), torch.arange(B) + 100 * seed)
    right = torch.arange(B) % 2 == 0
    held = Transition(view, None, torch.full((B,), CONTINUE), right, next_z_H, torch.zeros(B, dtype=torch.bool))
    return held._replace(**changes)


def learn(agent, transition: Transition):
    """The agent's loss, as the trainer calls it."""
    return agent.loss(transition._replace(q_logits=agent.scores(transition.view.z_H)))


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [({"target": "polyak", "tau": 0.25}, [1.0, 1.25, 1.6875, 2.265625]),
     ({"target": "hard", "period": 2}, [1.0, 1.0, 3.0, 3.0]),
     ({"target": "last_layer", "period": 3}, [1.0, 1.0, 1.0, 4.0])],
)  # fmt: skip
def test_how_a_copy_of_the_head_moves(arguments, wanted):
    """The head's weights are 1, 2, 3, 4 at the four calls; the first copies them whole, whatever they were before."""
    agent, seen = agent_with(**arguments), []
    for value in (1.0, 2.0, 3.0, 4.0):
        agent.q_head.weight.data.fill_(value)
        learn(agent, decision())
        assert (agent.target.weight == agent.target.weight[0, 0]).all() and agent.q_head.weight[0, 0] == value
        seen.append(agent.target.weight[0, 0].item())
    assert seen == wanted and agent.updates == 4


def test_of_a_hidden_layer_only_the_last_one_is_held_back():
    """last_layer: today's features under old weights; hard: old features too."""
    for target, old in (("last_layer", False), ("hard", True)):
        agent = agent_with(target=target, period=100, head="mlp", head_width=4)
        learn(agent, decision())
        with torch.no_grad():
            for parameter in agent.q_head.parameters():
                parameter += 1
        learn(agent, decision())
        own, held = agent.q_head.state_dict(), agent.target.state_dict()
        assert {name for name in own if not torch.equal(own[name], held[name])} == (
            {"out.weight", "out.bias"} | ({"hidden.weight", "hidden.bias"} if old else set())
        )


def test_the_copy_values_the_next_segment():
    """Right numbers with the copy's weights; with today's (negative control) others."""
    agent, transition = agent_with(target="hard", period=10), decision()
    agent.q_head.weight.data.normal_(generator=torch.Generator().manual_seed(1))
    learn(agent, transition)
    before = frozen_copy(agent.q_head)
    agent.q_head.weight.data.normal_(generator=torch.Generator().manual_seed(2))
    got = learn(agent, transition).td_error_continue
    value = agent.scores(transition.view.z_H).detach()[:, 1].sigmoid()
    assert torch.equal(got, before(transition.next_z_H).sigmoid().amax(-1) - value)
    assert not torch.allclose(got, agent.scores(transition.next_z_H).detach().sigmoid().amax(-1) - value)


@pytest.mark.parametrize("name", [name for name, held in VARIANTS.items() if "target" in held])
def test_no_optimiser_and_no_average_touches_a_copy(name):
    """It moves by its rule alone, though the optimiser decays and averages what it holds."""
    trainer = small_trainer(QVariantAgent, VARIANTS[name], optim={"ema": 0.9, "weight_decay": 1.0})
    copies = dict(trainer.agent.target.named_buffers())
    assert copies.keys() == dict(trainer.agent.q_head.named_parameters()).keys()
    assert not list(trainer.agent.target.parameters()) and not any("target" in n for n in trainer.trained | trainer.ema)
    held = {id(p) for optimizer in trainer.optimizers for group in optimizer.param_groups for p in group["params"]}
    assert not held & {id(value) for value in copies.values()}
    for _ in range(3):
        trainer.update()
    trainer.agent._move_target = lambda: None
    before = {n: value.clone() for n, value in copies.items()}
    heads = {n: p.detach().clone() for n, p in trainer.agent.q_head.named_parameters()}
    trainer.update()
    assert all(torch.equal(value, before[n]) and value.grad is None for n, value in copies.items())
    assert any(not torch.equal(p, heads[n]) for n, p in trainer.agent.q_head.named_parameters())  # the head did move
    assert all(n in dict(trainer.agent.state_dict()) for n in ("updates", *(f"target.{n}" for n in copies)))


# --- losses, heads, two heads ---------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["bce", "mse_values", "mse_logits"])
def test_losses_by_hand(loss):
    agent, transition = agent_with(loss=loss, gamma=0.5, ponder_cost=0.9, q_bias=0.3), decision()
    agent.q_head.weight.data.normal_(generator=torch.Generator().manual_seed(1))
    q, q_next = (agent.scores(z).detach() for z in (transition.view.z_H, transition.next_z_H))
    worth = (lambda x: x) if loss == "mse_logits" else torch.sigmoid
    target_halt, target = torch.tensor([1.0, 0.0]), 0.5 * worth(q_next).amax(-1) - 0.9
    got = learn(agent, transition)
    if loss == "bce":
        assert (target < 0).all()  # cut: all that BCE can say is that CONTINUE is worth nothing
        wanted = [-(target_halt * q[:, 0].sigmoid().log() + (1 - target_halt) * (-q[:, 0]).sigmoid().log()),
                  -(-q[:, 1]).sigmoid().log()]  # fmt: skip
    else:
        wanted = [0.5 * (worth(q[:, 0]) - target_halt) ** 2, 0.5 * (worth(q[:, 1]) - target) ** 2]
    torch.testing.assert_close(got.halt.detach(), wanted[0])
    torch.testing.assert_close(got.cont.detach(), wanted[1])
    torch.testing.assert_close(got.td_error_continue, target - worth(q[:, 1]))
    torch.testing.assert_close(got.td_error_halt, target_halt - worth(q[:, 0]))


def test_heads():
    z_H = torch.randn(5, 3, 8, generator=torch.Generator().manual_seed(0)) * 4 + 1
    assert type(agent_with(8).q_head) is QHead
    for arguments in ({"head": "mlp"}, {"head_norm": "rmsnorm"}, {"head": "mlp", "head_norm": "layernorm"}):
        head = agent_with(8, head_width=6, q_bias=-2.0, **arguments).q_head
        assert isinstance(head, FeatureHead) and (head(z_H) == -2).all()  # weights of the last layer start at 0
        assert head.features(z_H).shape == (5, 6 if "head" in arguments else 8)
        assert torch.equal(head(z_H), head(z_H[:, :1]))  # the first position alone: what a recording holds
    normed = agent_with(8, head_norm="rmsnorm").q_head.features(z_H)
    torch.testing.assert_close(normed.square().mean(-1), torch.ones(5), atol=1e-4, rtol=0)
    normed = agent_with(8, head_norm="layernorm").q_head.features(z_H)
    torch.testing.assert_close(normed.mean(-1), torch.zeros(5), atol=1e-5, rtol=0)
    torch.testing.assert_close(normed.var(-1, unbiased=False), torch.ones(5), atol=1e-4, rtol=0)
    wide = agent_with(64, head="mlp", head_width=256).q_head.hidden
    assert wide.weight.std().item() == pytest.approx(1 / 8, rel=0.03) and not wide.bias.any()
    mlp = agent_with(8, head="mlp", head_width=6, head_norm="rmsnorm").q_head
    x = mlp.hidden(z_H[:, 0])
    x = x / x.square().mean(-1, keepdim=True).sqrt()
    torch.testing.assert_close(mlp.features(z_H), x * x.sigmoid(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("target", ["none", "hard"])
def test_double_q_learning_by_hand(target):
    """The coin's head learns and chooses, the other one (or its copy) values; the other has no gradient."""
    agent, transition = agent_with(backup="double", target=target, period=10), decision(B=64)
    for part, seed in ((agent.q_head.a, 1), (agent.q_head.b, 2)):
        part.weight.data.normal_(generator=torch.Generator().manual_seed(seed))
    learn(agent, transition)
    old = frozen_copy(agent.q_head)
    if target == "hard":
        agent.q_head.a.weight.data.neg_()
    valuing = old if target == "hard" else agent.q_head
    got = learn(agent, transition)
    heads, z, z_next = agent.q_head, transition.view.z_H, transition.next_z_H
    torch.testing.assert_close(agent.scores(z), (heads.a(z) + heads.b(z)) / 2)
    wanted = []
    with torch.no_grad():
        for mine, chooses, values in ((heads.a, heads.a, valuing.b), (heads.b, heads.b, valuing.a)):
            best = chooses(z_next).argmax(-1, keepdim=True)
            wanted.append(values(z_next).sigmoid().gather(-1, best)[:, 0] - mine(z)[:, 1].sigmoid())
    is_a = torch.isclose(got.td_error_continue, wanted[0], atol=1e-6)
    is_b = torch.isclose(got.td_error_continue, wanted[1], atol=1e-6)
    assert (is_a ^ is_b).all() and 16 < is_a.sum() < 48
    (got.halt + got.cont)[is_a].sum().backward()
    assert heads.a.weight.grad.abs().sum() > 0 and not heads.b.weight.grad.any()


def test_where_values_are_no_logits_being_right_is_likely_from_one_half_on():
    q_logits = torch.tensor([[0.4, 0.0], [0.6, 0.0]])
    for loss, halts in (("mse_logits", [False, True]), ("bce", [True, True])):
        agent = agent_with(bootstrap="none", loss=loss)
        assert (agent.rule(q_logits) > agent.threshold).tolist() == halts
        assert (agent_with(loss=loss).rule(q_logits) > 0).tolist() == [True, True]  # against q_continue


# --- replay by hand -------------------------------------------------------------------------------------------


def test_a_ring_keeps_the_last_entries():
    memory = Memory()
    for t in range(7):
        push(memory, 3, x=torch.tensor([t, 10 * t]), y=torch.full((2, 2), float(t)))
        assert filled(memory).tolist() == [min(t + 1, 3)] * 2
    assert at(memory, "x", torch.tensor([0, 0])).tolist() == [6, 60]
    assert at(memory, "x", torch.tensor([[0, 1, 2], [2, 1, 0]])).tolist() == [[6, 5, 4], [40, 50, 60]]
    assert at(memory, "y", torch.tensor([[2], [0]])).tolist() == [[[4.0, 4.0]], [[6.0, 6.0]]]
    assert replay.size_of(memory) == 3 and replay.size_of(Memory()) is None


def stream(lengths: list[int], D: int = 3, B: int = 1, forced: bool = False) -> list[Transition]:
    """One slot after another in lockstep: episodes of these lengths, right at every second step."""
    made, draw = [], torch.Generator().manual_seed(7)
    for number, length in enumerate(lengths):
        for m in range(1, length + 1):
            z_H, next_z_H = torch.randn(2, B, 1, D, generator=draw)
            step = torch.full((B,), m)
            view = View(z_H, None, step, torch.ones(B, dtype=torch.bool), torch.arange(B) + 1000 * number)
            last = torch.full((B,), m == length and (m < 6 or forced))
            actions = torch.where(last, HALT, CONTINUE)
            made.append(Transition(view, None, actions, (step + number) % 2 == 0, next_z_H, last))
    return made


@pytest.mark.parametrize(("backup", "lam"), [("lambda", 0.5), ("mc", 1.0)])
def test_replayed_returns_are_those_of_the_episodes(backup, lam):
    """Whole episodes in the ring, one of them forced to halt, and one that has not ended: all returns by hand."""
    lengths = [2, 6, 3, 4]
    agent = agent_with(max_steps=6, backup=backup, lam=0.5, replay="fifo", replay_size=15, gamma=0.9, ponder_cost=0.05)
    agent.q_head.weight.data.normal_(generator=torch.Generator().manual_seed(1))
    steps = stream(lengths, forced=True)
    steps[-1] = steps[-1]._replace(ended=torch.tensor([False]))  # the last episode goes on
    for transition in steps:
        learn(agent, transition)
    ages = torch.arange(15).flip(0)  # in the order of time
    got = [agent._return(age[None]) for age in ages]
    first = 0
    for length in lengths[:3]:
        part = steps[first : first + length]
        q = torch.stack([agent.scores(t.view.z_H)[0] for t in part])[None]
        rewards = torch.full((1, length), -0.05)
        rewards[0, -1] = part[-1].is_correct.float()
        ended = torch.arange(length)[None] == length - 1
        wanted = returns.lambda_returns(rewards, returns.greedy_next_values(q), ended, lam, 0.9)[0]
        torch.testing.assert_close(torch.cat([got[first + i][0] for i in range(length)]), wanted)
        first += length
    assert [bool(known) for _, known in got] == [True] * 11 + [False] * 4


def test_replayed_sarsa_reads_the_action_that_was_taken():
    agent = agent_with(max_steps=6, backup="sarsa", replay="fifo", replay_size=12, gamma=0.9)
    agent.q_head.weight.data.normal_(generator=torch.Generator().manual_seed(1))
    steps = stream([2, 6, 3], forced=True)
    for transition in steps:
        learn(agent, transition)
    for i, age in enumerate(reversed(range(11))):
        target, known = agent._sarsa_target(torch.tensor([age]))
        assert bool(known) == (age > 0)
        if age and not steps[i].ended:
            taken = int(steps[i + 1].actions)
            wanted = 0.9 * agent.scores(steps[i + 1].view.z_H)[:, taken].sigmoid()
            torch.testing.assert_close(target, wanted.detach())


@pytest.mark.slow
@pytest.mark.parametrize("backup", ["max", "sarsa", "mc"])
def test_what_is_drawn_and_learned(backup, monkeypatch):
    """The loss is that of the drawn decision, every age is drawn, and a decision without a target trains HALT alone."""
    size = {"max": 5, "sarsa": 5, "mc": 12}[backup]
    agent = agent_with(max_steps=6, backup=backup, replay="fifo", replay_size=8 * size)
    agent.q_head.weight.data.normal_(generator=torch.Generator().manual_seed(1))
    ages, own = [], module.rng.integers
    monkeypatch.setattr(module.rng, "integers", lambda *a: ages.append(own(*a)) or ages[-1])
    steps = stream([6, 3, 2] * 20, B=8, forced=True)
    for i, transition in enumerate(steps):
        got = learn(agent, transition)
        assert (ages[-1] < min(i + 1, size)).all()
        drawn = [steps[i - int(age)] for age in ages[-1]]
        q = torch.stack([agent.scores(t.view.z_H)[slot] for slot, t in enumerate(drawn)])
        right = torch.stack([t.is_correct[slot] for slot, t in enumerate(drawn)])
        torch.testing.assert_close(got.td_error_halt, (right.float() - q[:, 0].sigmoid()).detach())
        for slot, (age, t) in enumerate(zip(ages[-1].tolist(), drawn, strict=True)):
            done = any(bool(later.ended[slot]) for later in steps[i - age : i + 1])
            known = {"max": True, "sarsa": age > 0, "mc": done}[backup]
            at_limit = bool(t.view.steps[slot] == 6)
            assert bool(got.has_continue[slot]) == (at_limit or (known and not bool(t.ended[slot])))
    shares = torch.bincount(torch.cat(ages[size:]), minlength=size) / torch.cat(ages[size:]).numel()
    assert (shares - 1 / size).abs().max() < 0.04


def test_padding_is_not_replayed():
    agent = agent_with(replay="fifo", replay_size=8)
    agent.q_head.weight.data.normal_()
    transition = decision()
    got = learn(agent, transition._replace(view=transition.view._replace(valid=torch.tensor([True, False]))))
    assert got.halt[0] > 0 and got.halt[1] == 0 and got.has_continue.tolist() == [True, False]


def test_a_ring_too_small_for_its_slots():
    for backup, needed in (("max", 2), ("sarsa", 4), ("lambda", 16)):
        small = agent_with(backup=backup, replay="fifo", replay_size=needed - 1)
        with pytest.raises(UserError, match=f"replay_size={needed - 1} is too small .* 2 slots: at least {needed}"):
            learn(small, decision())
        learn(agent_with(backup=backup, replay="fifo", replay_size=needed), decision())


# --- fixed points ---------------------------------------------------------------------------------------------


class HiddenCounter(torch.nn.Module):
    """A counting core that keeps its count in z_L, so that a head on z_H sees the one-hot step alone."""

    def __init__(self, core):
        super().__init__()
        self.core = core
        self.hidden_size, self.vocab_size, self.num_positions = core.hidden_size, core.vocab_size, core.num_positions

    def initial_state(self, batch_size: int) -> State:
        return self.core.initial_state(batch_size)

    def forward(self, tokens, state) -> CoreOutput:
        (z_H, z_L), logits = self.core(tokens, State(state.z_L, state.z_L))
        return CoreOutput(State(torch.cat((torch.zeros_like(z_H[..., :1]), z_H[..., 1:]), -1), z_L), logits)


class NeverHalts(QVariantAgent):
    """Goes on until the budget, so that every state is seen and the policy's own values are known."""

    def act(self, view, q_logits=None, explore=False):
        super().act(view, q_logits, explore)
        return torch.where(view.steps >= self.max_steps, HALT, CONTINUE)


RIGHT = (3, 4)  # segments whose answer is right
GAMMA, COST = 0.8, 0.1


def learned(arguments: dict, updates: int = 70, bootstrap: str = "shared_prefix") -> torch.Tensor:
    """(2, M) values of HALT and CONTINUE that the head has learned."""
    puzzles = small_puzzles(8)
    trainer = small_trainer(
        NeverHalts, {"q_bias": 0.0, "gamma": GAMMA, "ponder_cost": COST} | arguments, puzzles,
        HiddenCounter(counting_core(puzzles, *RIGHT)), objective="q", bootstrap=bootstrap, augment=False, num_envs=8,
        max_steps=M, total_steps=updates,
        optim={"lr": 0.4, "weight_decay": 0.0, "beta1": 0.8, "schedule": "cosine", "final_lr": 0.02},
    )  # fmt: skip
    for name, parameter in trainer.agent.named_parameters():
        if name.endswith("bias") and arguments.get("head") != "mlp":
            parameter.requires_grad_(False)  # a table: no entry moves another
    for _ in range(updates):
        trainer.update()
    z_H = torch.zeros(M, 1, 10)
    z_H[torch.arange(M), 0, torch.arange(M) + 2] = 1
    return q_targets.q_values(trainer.agent.scores(z_H).detach(), arguments.get("loss", "bce")).T


def fixed_point(lam: float, gamma: float = GAMMA, cost: float = COST) -> torch.Tensor:
    """(2, M) in closed form: lam 0 is the optimum (max, double), 1 the policy's own values (sarsa, mc)."""
    halt = [float(RIGHT[0] <= m <= RIGHT[1]) for m in range(1, M + 1)]
    go, later = [halt[-1]], halt[-1]  # CONTINUE counts as HALT at the budget
    for m in range(M - 2, -1, -1):
        later = gamma * (lam * later + (1 - lam) * max(halt[m + 1], go[0])) - cost
        go.insert(0, later)
    return torch.tensor([halt, go])


def off_by(table: torch.Tensor, wanted: torch.Tensor) -> float:
    return (table - wanted).abs().max().item()


FIFO = {"replay": "fifo", "replay_size": 160}
CASES = [
    ({}, 0.0), ({"backup": "double"}, 0.0), ({"loss": "mse_logits", "target": "hard", "period": 5}, 0.0), (FIFO, 0.0),
    ({"target": "last_layer", "period": 5, "head": "mlp", "head_width": 16}, 0.0),
    ({"backup": "sarsa", "target": "polyak", "tau": 0.3}, 1.0), ({"backup": "mc"}, 1.0),
    ({"backup": "lambda", "lam": 0.5} | FIFO, 0.5),
]  # fmt: skip
MORE = [
    ({"loss": "mse_logits"}, 0.0), ({"loss": "mse_values"}, 0.0), ({"target": "polyak", "tau": 0.2}, 0.0),
    ({"target": "hard", "period": 5}, 0.0), ({"head_norm": "rmsnorm"}, 0.0), ({"backup": "sarsa"}, 1.0),
    ({"backup": "double", "loss": "mse_logits", "target": "hard", "period": 5} | FIFO, 0.0),
    ({"backup": "sarsa", "target": "hard", "period": 5} | FIFO, 1.0), ({"backup": "mc"} | FIFO, 1.0),
    ({"backup": "lambda", "lam": 0.5, "target": "polyak", "tau": 0.2}, 0.5),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "lam"), [*CASES, *(pytest.param(*case, marks=pytest.mark.slow) for case in MORE)]
)
def test_fixed_points_with_discount_and_price(arguments, lam):
    """Negative controls: the fixed point without gamma, without the price and of another backup is another one."""
    table = learned(arguments)
    assert off_by(table, fixed_point(lam)) < 0.07, table
    others = [fixed_point(lam, gamma=1.0), fixed_point(lam, cost=0.0), *(fixed_point(x) for x in {0.0, 1.0} - {lam})]
    assert all(off_by(table, other) > 0.08 for other in others), table


def test_extra_forward_prices_the_segment_beyond_the_budget():
    """Its target at the budget is gamma * Q(M + 1, HALT) - price: that state is never trained and stays at 1/2."""
    table = learned({}, bootstrap="extra_forward")
    assert table[1, -1] == pytest.approx(GAMMA * 0.5 - COST, abs=0.04)
    assert learned({}, updates=20)[1, -1] > 0.8  # control: other modes know the answer there


def test_a_target_that_ignores_gamma_is_seen(monkeypatch):
    own = q_targets.continue_target
    monkeypatch.setattr(q_targets, "continue_target", lambda q, at_limit, gamma, *more: own(q, at_limit, 1.0, *more))
    table = learned({})
    assert off_by(table, fixed_point(0.0)) > 0.08 and off_by(table, fixed_point(0.0, gamma=1.0)) < 0.07


def test_below_zero_mse_goes_where_bce_stops():
    price = {"ponder_cost": 0.6, "gamma": 0.5}
    wanted = fixed_point(0.0, gamma=0.5, cost=0.6)[1, :3]
    assert (wanted < -0.05).all()
    assert off_by(learned({"loss": "mse_logits", **price})[1, :3], wanted) < 0.04
    assert off_by(learned({"loss": "bce", **price})[1, :3], torch.zeros(3)) < 0.05


# --- in a run -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "changes", "moves"),
    [({}, {}, True), ({}, {"q_to_core": False}, False), ({"replay": "fifo", "replay_size": 16}, {}, False),
     ({"backup": "double"}, {}, True), ({"backup": "lambda", "replay": "fifo", "replay_size": 40}, {}, False),
     ({"target": "polyak", "head": "mlp"}, {}, True), ({}, {"bootstrap": "next_observation"}, False)],
)  # fmt: skip
def test_whether_the_q_loss_reaches_the_core(arguments, changes, moves):
    trainer = small_trainer(QVariantAgent, {"q_bias": 0.0} | arguments, supervised_weight=0.0,
                            optim={"weight_decay": 0.0}, **changes)  # fmt: skip
    for parameter in trainer.agent.parameters():
        parameter.data.normal_()
    before = {n: p.detach().clone() for n, p in trainer.core.named_parameters()}
    heads = {n: p.detach().clone() for n, p in trainer.agent.named_parameters()}
    for _ in range(4):
        trainer.update()
    assert any(not torch.equal(p, before[n]) for n, p in trainer.core.named_parameters()) == moves
    assert all(not torch.equal(p, heads[n]) for n, p in trainer.agent.named_parameters())


@pytest.mark.slow
@pytest.mark.parametrize("name", EACH)
def test_a_run_is_resumed_number_for_number(tmp_path, name):
    """Through a checkpoint on disk, in mid-episode; without the copies or the ring (negative control) it differs."""
    bootstrap = "next_observation" if name == "fifo hard" else "shared_prefix"

    def made():
        return small_trainer(QVariantAgent, {"q_bias": 0.0} | VARIANTS[name], bootstrap=bootstrap, optim={"ema": 0.9})

    straight, first = made(), made()
    for _ in range(8):
        straight.update()
    for _ in range(5):
        first.update()
    tensors, plain = first.state()
    path = save_checkpoint(tmp_path, first.step, first.model(), tensors, plain)
    differs = []
    for forget in (False, True):
        second = made()
        tensors, plain = load_checkpoint(path)
        if forget:
            tensors = {n: t for n, t in tensors.items() if not n.startswith("memory.")}
            tensors |= {n: torch.full_like(t, 2) for n, t in tensors.items() if n.startswith("agent.target")}
        second.load_state(tensors, plain)
        for _ in range(3):
            second.update()
        wanted, got = straight.state()[0], second.state()[0]
        differs.append(any(not torch.equal(wanted[n], got[n]) for n in wanted))
        assert forget or wanted.keys() == got.keys()
    assert differs == [False, True]


@pytest.mark.parametrize("name", EACH)
def test_a_trained_run_is_evaluated_by_its_own_agent(tmp_path, name):
    """Weights, arguments and actions come back from the model file; the rule is read off a recording."""
    trainer = small_trainer(QVariantAgent, {"q_bias": 0.0} | VARIANTS[name])
    for parameter in trainer.agent.parameters():
        parameter.data.normal_(generator=torch.Generator().manual_seed(1))
    for _ in range(3):
        trainer.update()
    path = tmp_path / "model.safetensors"
    path.write_bytes(trainer.model())
    loaded = load_core(path)
    assert not any("replay" in held for held in loaded.agent_tensors)  # the ring stays in the checkpoint
    asked, arguments = which_agent("auto", loaded)
    agent = load_agent(asked, arguments, loaded, loaded.core, M)
    assert asked == "q_variant" and type(agent) is QVariantAgent and agent.arm == trainer.agent.arm
    puzzles = small_puzzles(12, seed=1)
    with torch.no_grad():
        state, _ = trainer.core(puzzles.questions.long(), trainer.core.initial_state(12))
    count = torch.arange(12)
    view = View(state.z_H, None, 1 + count % M, count >= 0, count)
    assert torch.equal(agent.act(view), trainer.agent.act(view))
    assert torch.equal(agent.last_score, trainer.agent.last_score) and len(agent.last_score.unique()) == 12
    assert torch.equal(agent.scores(state.z_H), agent.scores(state.z_H[:, :1])) and recorded.is_recordable(agent)
    with pytest.raises(UserError, match="train with this agent first"):
        load_agent("q_variant", arguments | {"head": "mlp", "head_width": 5}, loaded, loaded.core, M)


@pytest.mark.parametrize("name", EACH)
def test_no_update_waits_for_the_device(name):
    trainer = small_trainer(QVariantAgent, VARIANTS[name])
    own = trainer.agent.loss

    def watched(transition):
        with NoWaiting():
            return own(transition)

    trainer.agent.loss = watched
    for _ in range(4):
        trainer.update()


@pytest.mark.parametrize("arguments", [{}, {"replay": "fifo", "replay_size": 8}, {"loss": "mse_logits"}])
def test_without_a_continue_loss(arguments):
    """bootstrap=none, as TRM: only q_halt is learned."""
    trainer = small_trainer(QVariantAgent, arguments, bootstrap="none", optim={"weight_decay": 0.0})
    for _ in range(3):
        trainer.update()
    weight = trainer.agent.q_head.weight
    assert weight[0].abs().min() > 0 and not weight[1].any()


@pytest.mark.parametrize(
    ("arguments", "bootstrap", "said"),
    [({"replay": "uniform"}, "extra_forward", "replay=uniform draws from all transitions of a recording"),
     ({"target": "polyak"}, "none", "agent.target=polyak has no effect with bootstrap=none"),
     ({"backup": "mc"}, "none", "agent.backup=mc has no effect with bootstrap=none"),
     ({"gamma": 0.9}, "none", "agent.gamma=0.9 has no effect with bootstrap=none"),
     ({"ponder_cost": 0.1}, "none", "agent.ponder_cost=0.1 has no effect with bootstrap=none"),
     ({"target": "hard", "backup": "mc"}, "extra_forward", "target=hard has no effect with agent.backup=mc"),
     ({"tau": 1.5}, "extra_forward", "agent.tau must be between 0 and 1"),
     ({"period": 0}, "extra_forward", "agent.period must be between 1"),
     ({"gamma": float("nan")}, "extra_forward", "agent.gamma must be between 0 and 1"),
     ({"epsilon": 2.0}, "extra_forward", "agent.epsilon must be between 0 and 1"),
     ({"taget": "hard"}, "extra_forward", "did you mean 'target'"), ({}, "prefix", "bootstrap must be one of")],
)  # fmt: skip
def test_bad_arguments(arguments, bootstrap, said):
    with pytest.raises(UserError, match=said):
        agent_with(bootstrap=bootstrap, **arguments)


@pytest.mark.parametrize("name", ["target", "backup", "loss", "head", "head_norm"])
def test_an_unknown_value_lists_the_valid_ones(name):
    core = torch.nn.Module()
    core.hidden_size = 3
    with pytest.raises(UserError, match=rf"agent\.{name} must be .* or .*, not 'x'"):
        QVariantAgent(core, M, **{name: "x"})
    assert DoubleHead in (type(agent_with(backup="double").q_head),)


def test_the_words_of_the_command_line(tmp_path):
    """Text as flags give it, and the arguments that a run writes down."""
    words = {"target": "polyak", "tau": "0.5", "head_width": "7", "head": "mlp", "replay": "none", "gamma": "1"}
    agent = agent_with(**words)
    assert agent.arm == Arm(target="polyak", tau=0.5, head="mlp", head_width=7)
    assert json.loads(json.dumps(agent.arm.to_values()))["tau"] == 0.5
