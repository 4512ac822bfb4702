"""Agents learned with the core: targets and losses worked out by hand, fixed points on a counting core, gradients.

B slots, M steps. On the counting core the linear head sees the one-hot step only, so that it is a table whose
fixed point under each learner's rule is known in closed form.
"""

from __future__ import annotations

import pytest
import torch
from hrm_testing import NoWaiting, counting_core, small_puzzles, small_trainer
from hypothesis import given, settings
from hypothesis import strategies as st

from agents import AGENTS, AgentLoss, Transition, View, returns
from agents import halting_distributions as dist
from envs.actions import CONTINUE, HALT
from hrm_rl.checkpoint import load_checkpoint, save_checkpoint
from hrm_rl.errors import UserError
from hrm_rl.losses import supervised_loss

M = 4
Q_LEARNERS = ("mc", "lambda", "sarsa")
LEARNERS = (*Q_LEARNERS, "bce", "act", "ponder", "reinforce")
EITHER = torch.tensor([[True, True, True, True], [True, True, False, False]])  # rows of 4 and of 2 steps


# --- returns by hand ------------------------------------------------------------------------------------------


ROLLOUT = dict(
    rewards=torch.tensor([[0.0, 1.0, 0.0, 0.0, 0.0]]), next_values=torch.tensor([[0.4, 0.9, 0.2, 0.6, 0.8]]),
    ended=torch.tensor([[False, True, False, False, False]]),
)  # fmt: skip


def two_episodes(**changes) -> torch.Tensor:
    """Returns of a rollout that holds one episode of two steps (reward 1) and the first three of another."""
    return returns.lambda_returns(**ROLLOUT | changes, lam=0.5)[0]


def test_lambda_returns_do_not_cross_the_end_of_an_episode():
    wanted = torch.tensor([0.5 * 1 + 0.5 * 0.4, 1.0, 0.0, 0.5 * 0.8 + 0.5 * 0.6, 0.8])
    wanted[2] = 0.5 * wanted[3] + 0.5 * 0.2
    torch.testing.assert_close(two_episodes(), wanted)
    # What follows the end, however different, changes nothing before it ...
    other = ROLLOUT["next_values"].clone()
    other[0, 1:] = 0.1
    assert torch.equal(two_episodes(next_values=other)[:2], two_episodes()[:2])
    # ... and (negative control) it does where the end is not told.
    blind = torch.zeros_like(ROLLOUT["ended"])
    crossed = two_episodes(next_values=other, ended=blind)[:2]
    assert ((crossed - two_episodes(ended=blind)[:2]).abs() > 0.05).all() and crossed[1] > 1


@pytest.mark.parametrize(("lam", "wanted"), [(1.0, [1.0, 1.0, 1.0]), (0.0, [0.3, 0.6, 1.0]), (0.5, [0.55, 0.8, 1.0])])
def test_lambda_goes_from_one_step_to_monte_carlo(lam, wanted):
    got = returns.lambda_returns(
        torch.tensor([[0.0, 0.0, 1.0]]), torch.tensor([[0.3, 0.6, 0.0]]), torch.tensor([[False, False, True]]), lam
    )
    torch.testing.assert_close(got, torch.tensor([wanted]))


def test_targets_of_returns_carry_no_gradient():
    q_logits = torch.randn(2, 3, 2, requires_grad=True)
    values = returns.greedy_next_values(q_logits)
    assert torch.equal(values[:, :2], q_logits.sigmoid().amax(-1)[:, 1:]) and (values[:, 2] == 0).all()
    made = returns.lambda_returns(q_logits[..., 0], q_logits[..., 1], torch.zeros(2, 3, dtype=torch.bool), 0.5)
    taken = returns.sarsa_target(q_logits[:, 0], torch.tensor([HALT, CONTINUE]))
    assert torch.equal(taken, torch.stack((q_logits[0, 0, 0], q_logits[1, 0, 1])).sigmoid())
    assert not (values.requires_grad or made.requires_grad or taken.requires_grad)


# --- halting distributions by hand ------------------------------------------------------------------------------


def logits_of(*probabilities) -> torch.Tensor:
    return torch.tensor(probabilities).logit()


def test_ponder_distribution_by_hand():
    p, log_p = dist.ponder_distribution(logits_of([0.5, 0.25, 0.9, 0.1]).expand(2, 4), EITHER)
    torch.testing.assert_close(p, torch.tensor([[0.5, 0.125, 0.3375, 0.0375], [0.5, 0.5, 0.0, 0.0]]))
    torch.testing.assert_close(log_p[EITHER], p[EITHER].log())
    prior = dist.log_prior("geometric", 4, 0.5)
    torch.testing.assert_close(prior.exp(), torch.tensor([8.0, 4.0, 2.0, 1.0]) / 15)
    assert torch.equal(dist.log_prior("uniform", 4, 0.5).exp(), torch.full((4,), 0.25))
    by_hand = 0.5 * torch.tensor(0.5 * 15 / 8).log() + 0.5 * torch.tensor(0.5 * 15 / 4).log()
    torch.testing.assert_close(dist.kl_to_prior(dist.HaltingDistribution(p, log_p), prior)[1], by_hand)
    at_prior = dist.ponder_distribution(prior_hazards(prior.exp())[None], EITHER[:1])
    assert dist.kl_to_prior(at_prior, prior).abs() < 1e-6
    assert dist.kl_to_prior(at_prior, dist.log_prior("uniform", 4, 0.5)) > 0.1
    with pytest.raises(ValueError, match="geometric or uniform"):
        dist.log_prior("flat", 4, 0.5)


def prior_hazards(p: torch.Tensor) -> torch.Tensor:
    """Logits of the hazards of a distribution (M,)."""
    left = p.flip(0).cumsum(0).flip(0)
    return (p / left).clamp(1e-6, 1 - 1e-6).logit()


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-60, 60), min_size=1, max_size=8), st.integers(1, 8))
def test_distributions_are_distributions(halt_logits, length):
    halt_logits = torch.tensor([halt_logits], requires_grad=True)
    ran = torch.arange(halt_logits.shape[1])[None] < length
    p = dist.ponder_distribution(halt_logits, ran)
    act = dist.act_distribution(halt_logits, ran)
    kl = dist.kl_to_prior(p, dist.log_prior("geometric", ran.shape[1], 0.2))
    assert p.p.sum().item() == pytest.approx(1, abs=1e-5) and (p.p >= 0).all() and (act.p >= 0).all()
    assert act.p.sum() >= 1 - 1e-5 and kl >= -1e-5
    assert not p.p[~ran].any() and not act.p[~ran].any()
    (gradient,) = torch.autograd.grad((p.p + act.p).sum() + kl.sum() + act.ponder.sum(), halt_logits)
    assert gradient.isfinite().all() and not gradient[~ran].any()


def test_act_distribution_by_hand():
    halt_logits = logits_of([0.25, 0.5, 0.125, 0.9], [0.75, 0.5, 0.125, 0.9]).requires_grad_()
    p, ponder = dist.act_distribution(halt_logits, EITHER)
    torch.testing.assert_close(p, torch.tensor([[0.25, 0.5, 0.125, 0.125], [0.75, 0.25, 0.0, 0.0]]))
    torch.testing.assert_close(ponder, torch.tensor([4.125, 2.25]))
    ponder.sum().backward()  # d(N + R)/dh = -1 before the last step (Graves, equation 13), 0 at it
    h = halt_logits.detach().sigmoid()
    wanted = -(h * (1 - h)) * torch.tensor([[1.0, 1.0, 1.0, 0.0], [1.0, 0.0, 0.0, 0.0]])
    torch.testing.assert_close(halt_logits.grad, wanted)


def test_policy_gradients_are_those_of_the_expected_reward():
    """Every episode weighted with its probability, and the sum over all halts: both are the exact gradient."""
    halt_logits, rewards = logits_of([0.3, 0.6, 0.2]).requires_grad_(), torch.tensor([[0.0, 1.0, 0.5]])
    everything = torch.ones(1, 3, dtype=torch.bool)
    p = dist.ponder_distribution(halt_logits, everything)
    (wanted,) = torch.autograd.grad(-(p.p * rewards).sum(), halt_logits, retain_graph=True)
    sampled, any_baseline = torch.zeros(()), torch.tensor([0.4])
    for last in range(3):
        ran = torch.arange(3)[None] <= last
        log_policy = dist.log_policy(halt_logits, ran, torch.tensor([last == 2]))
        assert log_policy.item() == pytest.approx(p.log_p[0, last].item(), abs=1e-6)
        share = p.p[0, last].detach()
        sampled = sampled + share * dist.reinforce_loss(log_policy, rewards[:, last], any_baseline)
    for loss in (sampled.sum(), dist.all_episodes_loss(p, rewards).sum()):
        torch.testing.assert_close(torch.autograd.grad(loss, halt_logits, retain_graph=True)[0], wanted)
    unforced = dist.log_policy(halt_logits, everything, torch.tensor([False]))  # negative control: a forced halt counts
    assert abs(unforced.item() - p.log_p[0, 2].item()) > 1


def test_baseline_and_reward_carry_no_gradient():
    baseline = torch.tensor([0.5], requires_grad=True)
    log_policy = torch.tensor([-1.0], requires_grad=True)
    dist.reinforce_loss(log_policy, torch.tensor([1.0]), baseline).sum().backward()
    assert baseline.grad is None and log_policy.grad.item() == -0.5
    assert dist.entropy(torch.zeros(1, 2), torch.tensor([[True, False]])).item() == pytest.approx(0.6931, abs=1e-4)


# --- fixed points on the counting core ----------------------------------------------------------------------------


def table_agent(name: str, stop: int = M) -> type:
    """The agent with a table in place of its head; Q-learners halt at step `stop` whatever they think."""

    class Table(AGENTS[name]):
        @staticmethod
        def seen(z_H):
            return torch.cat((torch.zeros_like(z_H[..., :1]), z_H[..., 1:]), dim=-1)

        def scores(self, z_H):
            return super().scores(self.seen(z_H))

        def halt_logits(self, z_H):
            return super().halt_logits(self.seen(z_H))

        def act(self, view, q_logits=None, explore=False):
            wish = super().act(view, q_logits, explore)
            return torch.where(view.steps >= stop, HALT, CONTINUE) if name in (*Q_LEARNERS, "bce") else wish

    return Table


def learned(name: str, right: tuple[int, int], stop=M, updates=160, lr=0.15, prepare=None, **more):
    """(2, M) or (M,) probabilities that the table holds after training, and the trainer."""
    puzzles = small_puzzles(8)
    trainer = small_trainer(
        table_agent(name, stop), more, puzzles, counting_core(puzzles, *right), objective="q", augment=False,
        num_envs=16, max_steps=M, optim={"lr": lr, "weight_decay": 0.0, "beta1": 0.8},
    )  # fmt: skip
    head = trainer.agent.q_head if name in Q_LEARNERS else trainer.agent.head
    head.bias.requires_grad_(False)
    if prepare:
        prepare(trainer.agent)
    for _ in range(updates):
        trainer.update()
    table = (head.weight.detach()[:, 2 : M + 2] + head.bias[:, None]).sigmoid()
    return (table if name in Q_LEARNERS else table[0]), trainer


def q_fixed_point(right: tuple[int, int], lam: float) -> torch.Tensor:
    """(2, M): the values under lambda-returns of the policy that never halts before the budget."""
    halt = [float(right[0] <= m <= right[1]) for m in range(1, M + 1)]
    go, later = [halt[-1]], halt[-1]
    for m in range(M - 2, -1, -1):
        later = lam * later + (1 - lam) * max(halt[m + 1], go[0])
        go.insert(0, later)
    return torch.tensor([halt, go])


def off_by(table: torch.Tensor, wanted: torch.Tensor) -> float:
    return (table - wanted).abs().max().item()


@pytest.mark.parametrize(
    ("name", "lam", "arguments"),
    [("mc", 1.0, {}), ("lambda", 0.5, {"lam": 0.5}), ("lambda", 0.0, {"lam": 0.0}), ("sarsa", 1.0, {})],
)
def test_fixed_point_of_the_values(name, lam, arguments):
    """SARSA's is Monte-Carlo's: both are the values of the policy itself. Right in segment 3 alone."""
    table, _ = learned(name, (3, 3), q_bias=0.0, **arguments)
    assert off_by(table, q_fixed_point((3, 3), lam)) < 0.04, table
    others = {0.0, 0.5, 1.0} - {lam}  # negative control: each fixed point is another one
    assert all(off_by(table, q_fixed_point((3, 3), other)) > 0.4 for other in others)


def test_sarsa_with_the_greedy_target_is_another(monkeypatch):
    """Negative control: the best action in place of the one taken gives Q-learning's values."""
    monkeypatch.setattr(returns, "sarsa_target", lambda q, actions, *more: q.detach().amax(-1).sigmoid())
    table, _ = learned("sarsa", (3, 3), q_bias=0.0)
    assert off_by(table, q_fixed_point((3, 3), 0.0)) < 0.04 and off_by(table, q_fixed_point((3, 3), 1.0)) > 0.9


@pytest.mark.parametrize("name", Q_LEARNERS)
def test_values_follow_the_policy(name):
    """Halting at 2, where the answer is right, CONTINUE at 1 is worth 1; what is never reached stays as it was."""
    table, _ = learned(name, (2, 2), stop=2, q_bias=-1.0, updates=120)
    assert off_by(table[:, 0], torch.tensor([0.0, 1.0])) < 0.04 and table[0, 1] > 0.96
    untouched = torch.tensor(-1.0).sigmoid()
    assert (table[:, 2:] - untouched).abs().max() < 1e-6 and table[1, 1] == untouched


def test_fixed_point_of_halt_only():
    table, _ = learned("bce", (2, 3), bias=0.0)
    assert off_by(table, torch.tensor([0.0, 1.0, 1.0, 0.0])) < 0.04
    wrong, _ = learned("bce", (2, 3), bias=0.0, weight=0.0, updates=5)  # negative control: nothing learned
    assert off_by(wrong, torch.full((M,), 0.5)) < 1e-6


@pytest.mark.parametrize("prior", ["geometric", "uniform"])
def test_fixed_point_of_pondering(prior):
    """The minimum of sum p_m L_m + beta KL(p || prior) is p_m ~ prior_m exp(-L_m / beta)."""
    beta, wrong = 0.5, torch.tensor([1.0, 1.0, 0.0, 1.0])
    hazards, trainer = learned(
        "ponder", (3, 3), lr=0.05, bias=0.0, prior=prior, prior_lambda=0.4, beta=beta, rest=0.0, updates=300
    )
    got = dist.ponder_distribution(hazards.logit()[None], torch.ones(1, M, dtype=torch.bool)).p[0]

    def closed_form(kind, beta):
        return (dist.log_prior(kind, M, 0.4) - wrong / beta).softmax(0)

    assert off_by(got, closed_form(prior, beta)) < 0.02
    other = {"geometric": "uniform", "uniform": "geometric"}[prior]
    assert off_by(got, closed_form(other, beta)) > 0.1 and off_by(got, closed_form(prior, 1e6)) > 0.1  # controls
    # At evaluation halts are drawn from that very p, or taken where its CDF passes one half.
    agent, count = trainer.agent, 4000
    halted = halts_of(agent, count)
    shares = torch.bincount(halted, minlength=M + 1)[1:] / count
    assert off_by(shares, got) < 0.03
    agent.sampled, agent.threshold = False, 0.5
    assert (halts_of(agent, 8) == int((got.cumsum(0) <= 0.5).sum()) + 1).all()


def halts_of(agent, count: int) -> torch.Tensor:
    """(count,) step at which each of `count` keys halts on the counting core's states."""
    halted, going = torch.zeros(count, dtype=torch.int64), torch.ones(count, dtype=torch.bool)
    with agent.fresh_memory():
        for m in range(1, M + 1):
            state = torch.zeros(count, 1, 10)
            state[:, 0, 1 + m] = 1
            steps = torch.full((count,), m)
            actions = agent.act(View(state, None, steps, steps > 0, torch.arange(count)))
            halted[going & (actions == HALT)] = m
            going &= actions == CONTINUE
    return halted


@pytest.mark.parametrize("right_from", [1, 3])
def test_fixed_point_of_act(right_from):
    """Halting pays where the answer is right: h is 0 before that segment and makes up the 1 there."""
    _, trainer = learned("act", (right_from, M), bias=-1.0, tau=0.02, lr=0.3)
    assert (halts_of(trainer.agent, 2) == right_from).all()


def test_act_with_a_cost_above_the_loss():
    """Negative control of the test above: nothing is worth a second segment."""
    _, dear = learned("act", (3, M), bias=-1.0, tau=2.0, lr=0.3, updates=100)
    assert (halts_of(dear.agent, 2) == 1).all()


@pytest.mark.parametrize("episodes", ["sampled", "all"])
def test_fixed_point_of_reinforce(episodes):
    policy, trainer = learned("reinforce", (2, 2), bias=0.0, entropy=0.0, episodes=episodes)
    assert policy[0] < 0.05 and policy[1] > 0.95
    assert (halts_of(trainer.agent, 2) == 2).all()
    never, _ = learned("reinforce", (9, 9), bias=0.0, entropy=0.0, episodes=episodes, updates=60)  # control: no reward
    assert off_by(never[:2], torch.full((2,), 0.5)) < 0.2


def test_the_baseline_learns_the_expected_reward_of_the_policy():
    """A gate fixed at one half, right in segment 2 alone: that is where a quarter of the episodes halt."""
    _, trainer = learned(
        "reinforce", (2, 2), bias=0.0, lr=0.02, updates=120, prepare=lambda a: a.head.requires_grad_(False)
    )
    state, held = torch.zeros(1, 1, 10), []
    state[..., 0] = state[..., 2] = 1  # segment 1
    for _ in range(200):  # Adam hovers around the mean
        trainer.update()
        held.append(trainer.agent.baseline(state).item())
    assert sum(held) / len(held) == pytest.approx(0.25, abs=0.06)


# --- one slot, one episode after another ------------------------------------------------------------------------


def transitions(lengths: list[int], seed: int) -> list[Transition]:
    """A slot's decisions over episodes of these lengths, right at their ends, with states of their own."""
    generator, made = torch.Generator().manual_seed(seed), []
    for number, length in enumerate(lengths):
        for m in range(1, length + 1):
            z_H = torch.randn(1, 17, 16, generator=torch.Generator().manual_seed(100 * number + m + seed))
            view = View(z_H, None, torch.tensor([m]), torch.tensor([True]), torch.randint(9, (1,), generator=generator))
            last, cost = torch.tensor([m == length]), torch.rand(1, generator=generator)
            made.append(Transition(view, None, torch.where(last, HALT, CONTINUE), last, None, last, cost))
    return made


def loss_of(agent, transition: Transition) -> float:
    q_logits = agent.scores(transition.view.z_H)
    got = agent.loss(transition._replace(q_logits=q_logits))
    return got.total.item() if isinstance(got, AgentLoss) else (got.halt + got.cont).sum().item()


def lively(name: str):
    agent = AGENTS[name](small_trainer().core, M)
    for parameter in agent.parameters():
        parameter.data.normal_(generator=torch.Generator().manual_seed(1))
    return agent


@pytest.mark.parametrize("name", LEARNERS)
def test_two_episodes_in_one_rollout(name, monkeypatch):
    """The second episode of a slot costs what it costs by itself; only then is the first one forgotten."""
    both, agent = transitions([3, 2], seed=5), lively(name)
    together = [loss_of(agent, t) for t in both]
    alone = lively(name)
    apart = [loss_of(alone, t) for t in both[3:]]
    assert together[3:] == apart and any(apart)
    if name in ("mc", "lambda"):  # negative control: an agent that is told of no end reads the next puzzle
        own = returns.lambda_returns

        def told_of_no_end(rewards, next_values, ended, *more):
            return own(rewards, next_values, torch.zeros_like(ended), *more)

        monkeypatch.setattr(returns, "lambda_returns", told_of_no_end)
        assert [loss_of(lively(name), t) for t in both[3:]] != apart
    if name not in ("bce", "sarsa"):  # nothing is learned from an episode that is not over
        on = [loss_of(alone, t) for t in transitions([3], seed=7)[:2]]
        only_halt = name in Q_LEARNERS
        assert all(value > 0 for value in on) if only_halt else on == [0.0, 0.0]


@pytest.mark.parametrize("name", LEARNERS)
def test_padding_trains_nothing(name):
    agent = lively(name)
    for t in transitions([3], seed=5):
        assert loss_of(agent, t._replace(view=t.view._replace(valid=torch.tensor([False])))) == 0


# --- gradients, checkpoints, the device -------------------------------------------------------------------------


REACHES = {"mc": True, "lambda": True, "sarsa": True, "bce": True, "act": False, "ponder": False, "reinforce": True}


@pytest.mark.parametrize("q_to_core", [True, False])
@pytest.mark.parametrize("name", LEARNERS)
def test_which_parameters_move(name, q_to_core):
    """The agent's loss alone (supervised_weight 0), joint and on a frozen core."""
    arguments = {"bias": 0.0} if name not in Q_LEARNERS else {"q_bias": 0.0}
    for objective in ("joint", "q"):
        torch.manual_seed(0)
        trainer = small_trainer(AGENTS[name], arguments, objective=objective, q_to_core=q_to_core, max_steps=3,
                                supervised_weight=0.0, optim={"weight_decay": 0.0})  # fmt: skip
        for parameter in trainer.agent.parameters():
            parameter.data.normal_()
        before = {n: p.detach().clone() for n, p in trainer.core.named_parameters()}
        heads = {n: p.detach().clone() for n, p in trainer.agent.named_parameters()}
        for _ in range(4):
            trainer.update()
        moved = any(not torch.equal(p, before[n]) for n, p in trainer.core.named_parameters())
        assert moved == (objective == "joint" and q_to_core and REACHES[name])
        assert all(not torch.equal(p, heads[n]) for n, p in trainer.agent.named_parameters())


@pytest.mark.parametrize("objective", ["joint", "q"])
@pytest.mark.parametrize("name", LEARNERS)
def test_resume_is_exact(tmp_path, name, objective):
    """Six updates straight against three (in mid-episode), a checkpoint, and three more; without memory it differs."""
    arguments = {"q_bias": 0.0} if name in Q_LEARNERS else {"bias": -1.0}

    def made():
        return small_trainer(AGENTS[name], arguments, objective=objective, optim={"ema": 0.9})

    straight, first = made(), made()
    for _ in range(6):
        straight.update()
    for _ in range(3):
        first.update()
    tensors, plain = first.state()
    path = save_checkpoint(tmp_path, first.step, first.model(), tensors, plain)
    differs = []
    for forget in (False, True):
        second = made()
        tensors, plain = load_checkpoint(path)
        second.load_state({n: t for n, t in tensors.items() if not (forget and n.startswith("memory."))}, plain)
        for _ in range(3):
            second.update()
        wanted, got = straight.state()[0], second.state()[0]
        differs.append(any(not torch.equal(wanted[n], got[n]) for n in wanted if n in got))
    assert differs == [False, name != "bce"]  # which remembers nothing


@pytest.mark.parametrize("name", LEARNERS)
def test_no_loss_waits_for_the_device(name):
    trainer = small_trainer(AGENTS[name], {})
    own = trainer.agent.loss

    def watched(transition):
        with NoWaiting():
            return own(transition)

    trainer.agent.loss = watched
    for _ in range(5):
        trainer.update()
    with pytest.raises(AssertionError, match="_local_scalar_dense waits"), NoWaiting():  # negative control
        torch.ones(()).item()
    with pytest.raises(AssertionError, match="waits"), NoWaiting():
        torch.ones(3)[torch.tensor([True, False, True])]


@pytest.mark.parametrize("name", LEARNERS)
def test_a_budget_of_one_segment(name):
    trainer = small_trainer(AGENTS[name], {}, max_steps=1)
    for _ in range(2):
        trainer.update()
    assert trainer.sums.take()["steps"] == 2 * 4


def test_the_transition_holds_the_supervised_loss_of_every_slot():
    for objective in ("joint", "q"):
        trainer = small_trainer(AGENTS["ponder"], {}, objective=objective)
        seen, own = [], trainer.agent.loss
        trainer.agent.loss = lambda transition, seen=seen, own=own: seen.append(transition) or own(transition)
        slots = trainer.envs.slots
        wanted = supervised_loss(slots.logits, slots.labels, "softmax").detach()
        trainer.update()
        (transition,) = seen
        if objective == "q":
            assert transition.supervised is None
        else:
            assert torch.equal(transition.supervised, wanted) and not transition.supervised.requires_grad


def test_the_loss_to_learn_from_can_be_chosen():
    kept = []
    for choice in ("supervised", "error"):
        trainer = small_trainer(AGENTS["act"], {"learn_from": choice})
        trainer.update()
        kept.append(trainer.agent.memory["losses"][:, 0])
    assert not torch.equal(*kept) and set(kept[1].tolist()) <= {0.0, 1.0}


@pytest.mark.parametrize(
    ("name", "arguments", "said"),
    [("lambda", {"lam": 1.5}, "agent.lam must be between 0 and 1"), ("act", {"epsilon": 0.0}, "agent.epsilon"),
     ("act", {"tau": -1.0}, "agent.tau must be at least 0"), ("ponder", {"beta": float("nan")}, "agent.beta"),
     ("ponder", {"prior_lambda": 1.0}, "agent.prior_lambda"), ("ponder", {"prior": "flat"}, "geometric or uniform"),
     ("reinforce", {"rule": "best"}, "greedy or sample"), ("bce", {"epsilon": 2.0}, "agent.epsilon")],
)  # fmt: skip
def test_bad_arguments(name, arguments, said):
    with pytest.raises(UserError, match=said):
        AGENTS[name](small_trainer().core, M, **arguments)
