"""Stacked Q-learners: each is the live agent, alone or among others, and reaches the fixed points that are known.

L learners, E slots, M segments, N puzzles, D width of the q-token.
"""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from agents import QHaltingAgent, exploration, q_targets
from agents.arm import Arm
from agents.base import Transition, View
from agents.lambda_return import LambdaAgent
from agents.monte_carlo import MonteCarloAgent
from agents.sarsa import SarsaAgent
from envs.actions import CONTINUE, HALT
from hrm_rl import rng
from hrm_rl.core.q_head import QHead
from hrm_rl.errors import UserError
from hrm_rl.study.heads import Heads, normalised
from hrm_rl.study.learners import check, groups, shared_by, train, train_group
from hrm_rl.study.slots import Fifo, Slots
from hrm_rl.study.stack import Stack, setting_of
from hrm_rl.study.stacked_optim import StackedOptimizer
from hrm_rl.study.trajectories import Trajectories

M, N, D = 5, 30, 8


def _data(seed: int = 0, M: int = M, N: int = N, D: int = D) -> Trajectories:
    """Trajectories whose q-token says something of the answer."""
    draw = torch.Generator().manual_seed(seed)
    correct = torch.rand(M, N, generator=draw) < torch.linspace(0.2, 0.8, M)[:, None]
    q_token = torch.randn(M, N, D, generator=draw)
    q_token[..., 0] += 2 * correct
    return Trajectories(q_token, correct)


def _named(correct: list[list[int]]) -> Trajectories:
    """Puzzles given column by column, their q-token naming segment and puzzle: a linear head is a table."""
    right = torch.tensor(correct).T.bool()
    M, N = right.shape
    return Trajectories(torch.eye(M * N).view(M, N, M * N), right)


def _measure(q_logits: Tensor, correct: Tensor, gamma, ponder_cost, loss, previous=None):
    """In place of hrm_rl.study.measures.measure: what tests look at."""
    L, M = q_logits.shape[:2]
    mean = q_logits.double().flatten(1).mean(1)
    drift = torch.zeros(L).double() if previous is None else (q_logits - previous).double().flatten(1).abs().mean(1)
    return {"mean_logit": mean, "drift": drift}, {"q_halt": q_logits[..., 0].double().mean(2)}


def _run(arms: list[Arm], seeds: list[int], data: Trajectories, updates: int) -> tuple[Stack, Tensor]:
    """(stack after its updates, (updates, L, E) rows visited)."""
    stack = Stack(arms, seeds, data, "cpu")
    rows = []
    for _ in range(updates):
        rows.append(stack.slots.row)
        stack.update()
    return stack, torch.stack(rows)


def _learned(arm: Arm, data: Trajectories, updates: int, seed: int = 0) -> Tensor:
    """(M, N, 2) what a learner holds its rows to be worth."""
    stack, _ = _run([arm], [seed], data, updates)
    return q_targets.q_values(stack.q_logits_of(data, slice(None))[0], arm.loss).detach()


# --- alone or among others ------------------------------------------------------------------------------------

KINDS = {
    "max": Arm(), "mlp": Arm(head="mlp", head_width=12), "double": Arm(backup="double", target="polyak"),
    "double mlp": Arm(backup="double", head="mlp", head_width=6, head_norm="layernorm"),
    "sarsa": Arm(backup="sarsa", exploration="per_episode"), "lambda": Arm(backup="lambda", target="hard", period=7),
    "fifo": Arm(replay="fifo", replay_size=100), "uniform": Arm(replay="uniform"),
    "mse": Arm(loss="mse_values", head_norm="rmsnorm"), "atan2": Arm(optimizer="adam_atan2"),
    "last layer": Arm(head="mlp", head_width=6, head_norm="rmsnorm", target="last_layer", period=5),
}  # fmt: skip


def _slow(*rest):
    return pytest.param(*rest, marks=pytest.mark.slow)


@pytest.mark.parametrize("kind", [k if k in ("max", "lambda", "fifo") else _slow(k) for k in KINDS])
def test_batched_equals_alone(kind):
    base = replace(KINDS[kind], lr=1e-2, epsilon=0.3, q_bias=-1.0, num_envs=8)
    arms = [replace(base, gamma=0.9), replace(base, epsilon=0.0, ponder_cost=0.1, exploration="per_episode"),
            replace(base, lr=3e-3, weight_decay=0.0, q_bias=0.0, tau=0.3, lam=0.2, replay_size=31)]  # fmt: skip
    arms, seeds, data = sorted(arms, key=setting_of), [3, 4, 3], _data()
    updates = 200 if kind == "max" else 60
    stack, rows = _run(arms, seeds, data, updates)
    for i in range(3):
        alone, own = _run([arms[i]], [seeds[i]], data, updates)
        assert torch.equal(own[:, 0], rows[:, i])
        for name, parameter in alone.parameters.items():
            torch.testing.assert_close(parameter[0], stack.parameters[name][i], atol=1e-5, rtol=1e-5)
    other, own = _run([arms[0]], [7], data, 30)
    early, _ = _run([arms[0]], [seeds[0]], data, 30)
    assert not torch.equal(own[:, 0], rows[:30, 0]), "another seed draws other puzzles"
    assert (other.parameters["out.weight"] - early.parameters["out.weight"]).abs().max() > 1e-3


def test_one_seed_draws_the_same_under_every_arm():
    """Slots see the same puzzle in the same episode, however long their episodes are."""
    data = _data()
    seen = []
    for arm in (Arm(num_envs=4, q_bias=0.0, lr=0.1), Arm(num_envs=4, epsilon=1.0, gamma=0.5, optimizer="sgd")):
        stack = Stack([arm], [5], data, "cpu")
        drawn = {}
        for _ in range(60):
            for slot in range(4):
                drawn[slot, int(stack.slots.episode[0, slot])] = int(stack.slots.puzzle[0, slot])
            stack.update()
        seen.append((drawn, int(stack.slots.episode.sum())))
    (one, ended_one), (two, ended_two) = seen
    common = one.keys() & two.keys()
    assert len(common) > 20 and all(one[key] == two[key] for key in common)
    assert ended_one != ended_two  # the arms do differ


# --- the live agent -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("backup", "agent_class", "arguments"), [
    ("max", QHaltingAgent, {"bootstrap": "shared_prefix"}), ("max", QHaltingAgent, {"bootstrap": "next_observation"}),
    ("sarsa", SarsaAgent, {}), ("lambda", LambdaAgent, {"lam": 0.65}), ("mc", MonteCarloAgent, {}),
])  # fmt: skip
def test_equals_the_live_agent(backup, agent_class, arguments):
    """Loss and gradient of the agent on the same transitions, update by update."""
    data, arm = _data(), Arm(num_envs=16, lr=5e-2, q_bias=0.0, epsilon=0.3, backup=backup)
    agent = agent_class(SimpleNamespace(hidden_size=D), M, epsilon=0.3, q_bias=0.0, **arguments)
    stack = Stack([arm], [2], data, "cpu")
    kinds = set()
    for _ in range(40):
        with torch.no_grad():
            agent.q_head.weight.copy_(stack.parameters["out.weight"][0])
            agent.q_head.bias.copy_(stack.parameters["out.bias"][0])
        slots = stack.slots
        steps, puzzle, key = slots.steps[0].clone(), slots.puzzle[0].clone(), slots.episode_key[0].clone()
        view = View(data.q_token[steps - 1, puzzle][:, None], None, steps, torch.ones(16, dtype=torch.bool), key)
        q_logits = agent.scores(view.z_H)
        actions = agent.act(view, q_logits.detach(), explore=True)
        losses, _ = stack._learn()
        grad_weight, grad_bias = torch.autograd.grad(losses.sum(), list(stack.parameters.values()))
        continued = slots.steps[0] > 1
        assert torch.equal(actions == CONTINUE, continued), "the same decisions, floors included"
        next_z_H = data.q_token[slots.steps[0] - 1, slots.puzzle[0]][:, None]
        is_correct = data.correct[steps - 1, puzzle]
        q = agent.loss(Transition(view, q_logits, actions, is_correct, next_z_H, actions == HALT))
        loss = (0.5 * q.halt.sum() + 0.5 * q.cont.sum()) / 16
        want_weight, want_bias = torch.autograd.grad(loss, [agent.q_head.weight, agent.q_head.bias])
        torch.testing.assert_close(losses[0], loss, atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(grad_weight[0], want_weight, atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(grad_bias[0], want_bias, atol=1e-6, rtol=1e-6)
        stack.optimizer.step((grad_weight, grad_bias))
        stack.updates += 1
        kinds |= {"on" if c else "limit" if s == M else "halt" for c, s in zip(continued, steps.tolist(), strict=True)}
    assert kinds == {"on", "limit", "halt"}


def test_heads_are_the_layers_they_are_said_to_be():
    x, bias = torch.randn(2, 7, D), torch.tensor([-5.0, 1.0])
    linear = Heads.of(Arm(), D)
    parameters = linear.start([0, 1], bias)
    parameters["out.weight"].normal_()
    for i in range(2):
        head = QHead(D)
        head.load_state_dict({"weight": parameters["out.weight"][i], "bias": parameters["out.bias"][i]})
        torch.testing.assert_close(linear.q_logits(parameters, x)[i, :, 0], head(x[i][:, None]))
    for arm in (Arm(head="mlp", head_width=6, head_norm="layernorm"), Arm(head="mlp", head_width=6, backup="double")):
        heads = Heads.of(arm, D)
        parameters = heads.start([0, 1], bias)
        torch.testing.assert_close(heads.q_logits(parameters, x), bias.view(2, 1, 1, 1).expand(2, 7, heads.count, 2))
        parameters["out.weight"].normal_()
        parameters["hidden.bias"].normal_()
        assert sum(p[0].numel() for p in parameters.values()) == heads.numbers
        found = heads.q_logits(parameters, x)
        for i in range(2):
            for h in range(heads.count):
                units, outputs = slice(6 * h, 6 * h + 6), slice(2 * h, 2 * h + 2)
                z = x[i] @ parameters["hidden.weight"][i, units].T + parameters["hidden.bias"][i, units]
                z = nn.LayerNorm(6, elementwise_affine=False)(z) if arm.head_norm == "layernorm" else z
                want = nn.SiLU()(z) @ parameters["out.weight"][i, outputs].T + parameters["out.bias"][i, outputs]
                torch.testing.assert_close(found[i, :, h], want, atol=1e-5, rtol=1e-5)
    size = normalised(x, "rmsnorm").square().mean(-1)
    torch.testing.assert_close(size, torch.ones_like(size), atol=1e-3, rtol=1e-3)
    with pytest.raises(ValueError, match="choose none, rmsnorm or layernorm"):
        normalised(x, "batchnorm")


# --- known answers --------------------------------------------------------------------------------------------

#: right all along; only at the end; never; only in the middle
FOUR = [[1, 1, 1], [0, 0, 1], [0, 0, 0], [0, 1, 0]]
QUICK = {"optimizer": "adam", "lr": 0.05, "weight_decay": 0.0, "q_bias": 0.0, "num_envs": 32, "epsilon": 0.5}


@pytest.mark.parametrize("switches", [
    {"replay": "uniform"}, {"replay": "uniform", "backup": "double"}, {}, _slow({"replay": "fifo", "replay_size": 256}),
    _slow({"backup": "double"}), _slow({"target": "polyak", "tau": 0.1}), _slow({"target": "hard", "period": 20}),
    {"replay": "uniform", "loss": "mse_values"}, {"replay": "uniform", "loss": "mse_logits", "lr": 0.02},
], ids=str)  # fmt: skip
def test_max_and_double_reach_the_optimum(switches):
    data = _named(FOUR)
    q = _learned(Arm(**QUICK | {"gamma": 0.9} | switches), data, 500)
    halt = torch.tensor(FOUR).T.float()
    cont = torch.tensor([[0.9, 0.81, 0.0, 0.9], [0.9, 0.9, 0.0, 0.0], [1.0, 1.0, 0.0, 0.0]])
    assert (q[..., 0] - halt).abs().max() < 0.06
    assert (q[..., 1] - cont).abs().max() < 0.06, q[..., 1]
    wrong = torch.tensor([[1.0, 1.0, 0.0, 1.0], [1.0, 1.0, 0.0, 0.0], [1.0, 1.0, 0.0, 0.0]])  # without the discount
    assert (q[..., 1] - wrong).abs().max() > 0.12


@pytest.mark.slow
def test_ponder_cost_is_in_the_target():
    arm = Arm(**QUICK | {"replay": "uniform", "loss": "mse_logits", "ponder_cost": 0.2, "lr": 0.02})
    q = _learned(arm, _named(FOUR), 500)
    cont = torch.tensor([[0.8, 0.6, -0.2, 0.8], [0.8, 0.8, -0.2, -0.2], [1.0, 1.0, 0.0, 0.0]])
    assert (q[..., 1] - cont).abs().max() < 0.06
    free = _learned(replace(arm, ponder_cost=0.0), _named(FOUR), 500)
    assert (free[..., 1] - cont).abs().max() > 0.15


@pytest.mark.slow
@pytest.mark.parametrize(("backup", "lam", "value"), [
    ("max", 0.65, 1.0), ("sarsa", 0.65, 0.5), ("mc", 0.65, 0.5), ("lambda", 0.5, 0.75),
    _slow("double", 0.65, 1.0), _slow("lambda", 0.0, 1.0), _slow("lambda", 1.0, 0.5),
])  # fmt: skip
def test_each_backup_values_what_it_should(backup, lam, value):
    """Right in the middle alone, with a floor of 2 or 3 in every episode: half of them cannot halt in time.

    So going on at first is worth 1/2 to those who value what is done, 1 to those who value the best that could be, and
    lam 1/2 + (1 - lam) to the lambda-return: each value is the negative control of the others.
    """
    settings = {"epsilon": 1.0, "exploration": "per_episode", "num_envs": 128, "lr": 0.02, "lam": lam}
    q = _learned(Arm(**QUICK | settings | {"backup": backup}), _named([[0, 1, 0]] * 2), 500)
    assert (q[0, :, 1] - value).abs().max() < 0.08, q[0, :, 1]
    assert (q[..., 0] - torch.tensor([0.0, 1.0, 0.0])[:, None]).abs().max() < 0.05
    assert q[1:, :, 1].max() < 0.05  # from there on nothing can be earned by going on


@pytest.mark.slow
def test_episodes_know_gamma_and_cost():
    """One way only, right at the end alone: the return of step m is -c - gamma c - ... + gamma^(M - m)."""
    settings = {"loss": "mse_logits", "gamma": 0.9, "ponder_cost": 0.1, "epsilon": 1.0, "lr": 0.02}
    want = torch.tensor([-0.1 - 0.09 + 0.81, -0.1 + 0.9, 1.0])
    for backup in ("mc", "lambda", "sarsa"):
        q = _learned(Arm(**QUICK | settings | {"backup": backup}), _named([[0, 0, 1]]), 400)
        assert (q[:, 0, 1] - want).abs().max() < 0.03, (backup, q[:, 0, 1])


# --- target networks, replay, double ---------------------------------------------------------------------------


def test_target_networks_that_follow_at_once_are_none():
    data = _data()
    plain, _ = _run([Arm(lr=1e-2, head="mlp", head_width=6)], [1], data, 50)
    at_once = ({"target": "polyak", "tau": 1.0}, {"target": "hard", "period": 1}, {"target": "last_layer", "period": 1})
    for same in at_once:
        stack, _ = _run([Arm(lr=1e-2, head="mlp", head_width=6, **same)], [1], data, 50)
        for name, parameter in stack.parameters.items():
            torch.testing.assert_close(parameter, plain.parameters[name], atol=1e-6, rtol=1e-6)
    slow, _ = _run([Arm(lr=1e-2, head="mlp", head_width=6, target="hard", period=40)], [1], data, 50)
    assert (slow.parameters["out.weight"] - plain.parameters["out.weight"]).abs().max() > 1e-4


def test_target_networks_hold_what_they_should():
    data = _data()
    arms = [Arm(lr=1e-2, head="mlp", head_width=6, target="hard", period=p) for p in (3, 4)]
    stack = Stack(arms, [1, 1], data, "cpu")
    history = []
    for _ in range(10):
        stack.update()
        history.append(stack.parameters["out.weight"].detach().clone())
    assert torch.equal(stack.target.held["out.weight"][0], history[8][0])
    assert torch.equal(stack.target.held["out.weight"][1], history[7][1])
    assert not torch.equal(history[8], history[9])
    last = Stack([replace(arms[0], target="last_layer")], [1], data, "cpu")
    assert set(last.target.held) == {"out.weight", "out.bias"} and len(stack.target.held) == 4
    polyak = Stack([Arm(lr=1e-2, target="polyak", tau=0.25)], [1], data, "cpu")
    before = polyak.parameters["out.bias"].detach().clone()
    polyak.update()
    want = before + 0.25 * (polyak.parameters["out.bias"].detach() - before)
    torch.testing.assert_close(polyak.target.held["out.bias"], want)


def test_a_target_that_never_moves_is_what_is_learned():
    arm = Arm(**QUICK | {"replay": "uniform", "target": "hard", "period": 10_000, "q_bias": -1.0})
    q = _learned(arm, _named(FOUR), 500)
    assert (q[:2, :, 1] - torch.sigmoid(torch.tensor(-1.0))).abs().max() < 0.03


def test_fifo_keeps_the_last():
    fifo = Fifo(torch.tensor([6, 8]), 2)
    for first in range(0, 20, 2):
        rows = torch.tensor([[first, first + 1]] * 2)
        fifo.add(rows, rows % 2 == 0)
    u = torch.linspace(0, 1 - 1e-9, 200, dtype=torch.float64).expand(2, -1)
    row, continued = fifo.draw(u)
    assert set(row[0].tolist()) == set(range(14, 20)) and set(row[1].tolist()) == set(range(12, 20))
    assert torch.equal(continued, row % 2 == 0)
    young = Fifo(torch.tensor([100]), 2)
    young.add(torch.tensor([[4, 5]]), torch.tensor([[True, False]]))
    assert set(young.draw(u[:1])[0].flatten().tolist()) == {4, 5}, "nothing that was never written"


def test_double_moves_one_head_and_values_by_the_other():
    data = _named([[0, 0, 1]])
    stack = Stack([Arm(backup="double", num_envs=1, optimizer="sgd", lr=0.1, replay="uniform")], [0], data, "cpu")
    with torch.no_grad():
        stack.parameters["out.bias"].zero_()
        stack.parameters["out.weight"][0, :, 1] = torch.tensor([2.0, -1.0, -3.0, 3.0])  # segment 2: H C, H C
    moved = set()
    for _ in range(30):
        losses, q = stack._learn()
        (grad,) = torch.autograd.grad(losses.sum(), [q], retain_graph=True)
        stack.updates += 1
        heads = grad[0, 0].abs().sum(-1) > 0
        assert heads.sum() == 1
        moved.add(int(heads.int().argmax()))
    assert moved == {0, 1}
    q_logits, x_next = stack._q_logits(stack.table[None, :1]), stack.table[None, 1:2]  # from segment 1 to 2
    found = set()
    for _ in range(20):
        zero = torch.zeros(1, 1, dtype=torch.long)
        loss = stack._bootstrapped(q_logits, x_next, zero, zero == 0, zero > 0)
        found.add(round(loss.item(), 5))
        stack.updates += 1
    halt = torch.log(torch.tensor(2.0))  # at logit 0, whatever the target is, as is the other
    assert found == {round(float(halt), 5)}
    with torch.no_grad():
        stack.parameters["out.bias"][0] = torch.tensor([0.0, 1.0, 0.0, 1.0])  # so that the target is seen
    found, q_logits = set(), stack._q_logits(stack.table[None, :1])
    for _ in range(20):
        loss = stack._bootstrapped(q_logits, x_next, zero, zero == 0, zero > 0)
        found.add(round(loss.item(), 4))
        stack.updates += 1
    bce = nn.functional.binary_cross_entropy_with_logits
    # the first picks HALT (2 > 0), valued by the second at -3; the second picks CONTINUE, valued by the first at 0
    want = {round(float(0.5 * halt + 0.5 * bce(torch.tensor(1.0), torch.tensor(v).sigmoid())), 4) for v in (-3.0, 0.0)}
    assert found == want


# --- slots ----------------------------------------------------------------------------------------------------


def test_floors_and_halts_are_the_agents_own():
    epsilon = torch.tensor([0.3, 0.9, 0.5]).double()
    slots = Slots(torch.tensor([1, 2, 3]), 6, (M, N), epsilon, [True, False, True])
    for _ in range(12):
        for i in range(3):
            want = exploration.floor(slots.episode_key[i], slots.steps[i], M, float(epsilon[i]), i != 1)
            assert torch.equal(slots.floor()[i], want)
        q_logits = torch.randn(3, 6, 2)
        ended = slots.ends(q_logits)
        assert torch.equal(ended, (slots.steps >= M) | ((q_logits[..., 0] > q_logits[..., 1]) &
                                                       (slots.steps >= slots.floor())))  # fmt: skip
        before, steps = slots.puzzle.clone(), slots.steps.clone()
        slots.move(ended)
        assert torch.equal(slots.steps, torch.where(ended, 1, steps + 1))
        assert torch.equal(slots.puzzle[~ended], before[~ended])
    assert torch.equal(slots.episode_key, rng.fold(slots.key, slots.episode))


def test_puzzles_are_drawn_evenly():
    slots = Slots(torch.tensor([1]), 1000, (1, 10), torch.zeros(1).double(), [True])
    counts = torch.zeros(10)
    for _ in range(10):
        counts += torch.bincount(slots.puzzle[0], minlength=10)
        slots.move(torch.ones(1, 1000, dtype=torch.bool))
    assert (counts - 1000).abs().max() < 150  # five standard deviations of 30


# --- optimisers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["adamw", "adam", "sgd", "adam_atan2"])
def test_stacked_optimizers_are_the_libraries_own(optimizer):
    from adam_atan2_pytorch import AdamAtan2

    arms = [Arm(optimizer=optimizer, lr=lr, weight_decay=wd) for lr, wd in ((0.01, 0.0), (0.1, 0.5), (0.1, 0.5))]
    whole = {"a": torch.randn(3, 4, 2), "b": torch.randn(3, 5)}
    apart = [[nn.Parameter(p[i].clone()) for p in whole.values()] for i in range(3)]
    settings = {"lr": 0.1, "weight_decay": 0.5, "betas": (0.9, 0.95)}
    build = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam, "sgd": torch.optim.SGD, "adam_atan2": AdamAtan2}
    single = []
    for arm, parts in zip(arms, apart, strict=True):
        own = settings | {"lr": arm.lr, "weight_decay": arm.weight_decay}
        own |= {"a": 1.0, "b": 1.0} if optimizer == "adam_atan2" else {}
        own.pop("betas") if optimizer == "sgd" else None
        single.append(build[optimizer](parts, **own))
    stacked = StackedOptimizer(whole, [setting_of(arm) for arm in arms])
    for _ in range(5):
        gradients = [torch.randn_like(p) for p in whole.values()]
        stacked.step(gradients)
        for i in range(3):
            for part, gradient in zip(apart[i], gradients, strict=True):
                part.grad = gradient[i]
            single[i].step()
    for i in range(3):
        for part, p in zip(apart[i], whole.values(), strict=True):
            torch.testing.assert_close(p[i], part.detach(), atol=1e-6, rtol=1e-5)


# --- a learner that blows up ------------------------------------------------------------------------------------


def test_a_diverged_learner_is_a_result_and_disturbs_nobody():
    data, probe = _data(), _data(1)
    wild = Arm(loss="mse_logits", optimizer="sgd", lr=1e4, weight_decay=0.0, num_envs=4)
    tame = replace(wild, lr=1e-2)
    calm = train_group([("a", tame, 0), ("b", tame, 1), ("c", tame, 2)], data, probe, 60, 7, measure=_measure)
    mixed = train_group([("a", tame, 0), ("b", wild, 1), ("c", tame, 2)], data, probe, 60, 7, measure=_measure)
    assert [run.status for run in mixed] == ["finished", "diverged", "finished"]
    assert [run.status for run in calm] == ["finished"] * 3
    for i in (0, 2):
        for name, series in calm[i].metrics.items():
            assert torch.equal(series.nan_to_num(-1), mixed[i].metrics[name].nan_to_num(-1)), name
    died = int(mixed[1].reason.split()[-2])
    assert 0 < died < 60
    series = mixed[1].metrics["mean_logit"]
    assert torch.equal(series.isnan(), mixed[1].updates >= died)
    assert (mixed[1].steps == M).all() and torch.equal(mixed[1].right, probe.correct[-1])


# --- train and groups -------------------------------------------------------------------------------------------


def test_train_returns_every_run_in_order():
    data, probe = _data(), _data(1)
    arms = [("wide", Arm(num_envs=8)), ("standard", Arm(num_envs=4)), ("slow", Arm(num_envs=4, lr=1e-5))]
    told = []
    runs = train(arms, [3, 1], data, probe, 50, 6, progress=told.append, measure=_measure)
    assert [(run.arm, run.seed) for run in runs] == [(name, seed) for name, _ in arms for seed in (3, 1)]
    assert sum(told) == 50 * 6
    for run in runs:
        assert run.updates.tolist() == [0, 10, 20, 30, 40, 50] and run.puzzles == probe.key
        assert run.metrics["mean_logit"].shape == (6,) and run.by_step["q_halt"].shape == (6, M)
        assert run.metrics["mean_logit"][0] == -5 and run.metrics["grad_norm"][1:].min() > 0
        assert run.metrics["grad_norm"][0].isnan() and run.right.shape == run.steps.shape == (N,)
        assert {"param_inf_norm", "param_bound_ratio", "effective_rank", "dormant"} <= run.metrics.keys()
    assert runs[4].changes == {"lr": 1e-5, "num_envs": 4}
    assert all(run.live is False for run in runs)
    moved = [abs(float(run.metrics["mean_logit"][-1]) + 5) for run in runs]
    assert moved[4] < moved[2] / 10  # the arms are not mixed up
    again = train(arms[1:2], [1], data, probe, 50, 6, measure=_measure)[0]
    torch.testing.assert_close(again.metrics["mean_logit"], runs[3].metrics["mean_logit"], atol=1e-5, rtol=1e-5)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.sampled_from([
    Arm(), Arm(lr=1e-2), Arm(num_envs=1), Arm(head="mlp"), Arm(head_width=3), Arm(backup="mc"), Arm(backup="lambda"),
    Arm(target="hard"), Arm(target="last_layer"), Arm(head="mlp", target="last_layer"), Arm(num_envs=1024),
]), min_size=1, max_size=8), st.integers(1, 40))  # fmt: skip
def test_groups_hold_everyone_once(arms, seeds):
    everyone = [(f"arm {i}", arm, seed) for i, arm in enumerate(arms) for seed in range(seeds)]
    found = groups(everyone)
    assert sorted((m.name, m.seed) for group in found for m in group) == sorted((n, s) for n, _, s in everyone)
    assert all(len({shared_by(m.arm) for m in group}) == 1 for group in found)
    assert groups(everyone) == found


def test_groups_are_few_where_only_numbers_differ():
    arms = [Arm(lr=lr, weight_decay=wd, gamma=g, optimizer=o) for lr in (1e-3, 1e-2) for wd in (0.0, 1.0)
            for g in (0.9, 1.0) for o in ("adamw", "sgd")]  # fmt: skip
    assert len(groups([(str(i), arm, seed) for i, arm in enumerate(arms) for seed in range(10)])) == 1
    assert len(groups([("many", Arm(head="mlp"), seed) for seed in range(500)])) > 3


@pytest.mark.parametrize(("arm", "said"), [
    (Arm(backup="mc", replay="fifo"), "backup=mc learns from the episode at hand: it needs replay=none, not fifo"),
    (Arm(backup="sarsa", replay="uniform"), "backup=sarsa .* replay=none, not uniform"),
    (Arm(backup="mc", target="hard"), "backup=mc .* target=none, not hard"),
    (Arm(replay="fifo", replay_size=8), "replay_size=8 must hold the num_envs=32"),
    (Arm(optimizer="adam_atan2", lr=0.0), "optimizer=adam_atan2 needs lr above 0"),
])  # fmt: skip
def test_what_means_nothing_is_refused(arm, said):
    with pytest.raises(UserError, match=said):
        check(arm)
    with pytest.raises(UserError, match=f"arm odd: {said}"):
        groups([("odd", arm, 0)])


def test_bad_input_is_named():
    data, arm = _data(), Arm()
    with pytest.raises(UserError, match="arms a and b cannot train together"):
        train_group([("a", arm, 0), ("b", Arm(num_envs=2), 0)], data, data, 10, 2)
    with pytest.raises(UserError, match="probe: 5 segments of width 4, not 5 of 8"):
        train_group([("a", arm, 0)], data, _data(D=4), 10, 2)
    with pytest.raises(UserError, match="checkpoints=12 must be between 2 and updates"):
        train_group([("a", arm, 0)], data, data, 10, 12)
    with pytest.raises(UserError, match="arm a, seed 0: there twice"):
        groups([("a", arm, 0), ("a", arm, 0)])
    with pytest.raises(UserError, match="do not fit each other"):
        Trajectories(torch.zeros(2, 3, 4), torch.zeros(2, 2, dtype=torch.bool))
    with pytest.raises(UserError, match="must be float32 and correct bool"):
        Trajectories(torch.zeros(2, 3, 4).half(), torch.zeros(2, 3, dtype=torch.bool))
    with pytest.raises(UserError, match="not finite"):
        Trajectories(torch.full((2, 3, 4), torch.nan), torch.zeros(2, 3, dtype=torch.bool))
    assert _data().key == _data().key != _data(1).key


# --- recordings and speed ---------------------------------------------------------------------------------------


def test_trajectories_are_what_the_core_that_ships_does(tmp_path):
    from hrm_rl.core.io import load_core
    from hrm_rl.study.trajectories import load_trajectories
    from hrm_rl.tasks import load_puzzles

    puzzles = load_puzzles("sudoku-9", 9, "test", limit=6)
    told = []
    made = load_trajectories(None, puzzles, 4, folder=tmp_path, progress=told.append, dtype="float32")
    assert sum(told) == 6 and made.q_token.shape[:2] == (4, 6)
    held = load_core(None).core
    core = type(held)(replace(held.config, dtype="float32"))
    core.load_state_dict(held.state_dict())
    state, tokens = core.initial_state(6), puzzles.questions.long()
    for m in range(4):
        with torch.no_grad():
            state, logits = core(tokens, state)
        torch.testing.assert_close(made.q_token[m], state.z_H[:, 0].float(), atol=1e-3, rtol=1e-3)
        assert torch.equal(made.correct[m], (logits.argmax(-1) == puzzles.answers.long()).all(1))
    read = load_trajectories(None, puzzles, 4, folder=tmp_path, progress=told.append, dtype="float32")
    assert sum(told) == 6 and read.key == made.key and torch.equal(read.q_token, made.q_token)


@pytest.mark.slow
def test_speed_prints_a_table(capsys):
    from hrm_rl.study import speed

    sizes = {"width": 8, "num_envs": 4, "learners": 4, "updates": 10, "repeats": 1, "seconds": 0.02, "device": "cpu"}
    assert speed.main([word for name, value in sizes.items() for word in (f"--{name}", str(value))]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6 and [line.split()[0] for line in lines[2:]] == ["linear", "linear", "mlp", "mlp"]
    assert "ours, 4 in a batch" in lines[2] and "stable-baselines3" in lines[3]
