"""What every agent of the registry, and the plug-ins of docs/PLUGINS.md, must keep to. B slots, T steps."""

from __future__ import annotations

import re

import pytest
import torch
from hrm_testing import MODES, ROOT, counting_core, small_core, small_puzzles, small_trainer

from agents import AGENTS, HaltingAgent, QHaltingAgent, View, decide, make_agent, view_of
from agents.halt_logit import HaltLogitAgent
from envs import CONTINUE, HALT, SlotEngine
from envs.previous import Previous
from hrm_rl.core import HRMCore
from hrm_rl.errors import UserError
from hrm_rl.evaluation import solve, trajectories, views

M, B, T = 6, 5, 14
PREVIOUS = Previous._fields


def documented() -> dict[str, type[HaltingAgent]]:
    """The agents that docs/PLUGINS.md shows, as classes."""
    found = {}
    for block in re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "PLUGINS.md").read_text(), re.DOTALL):
        space: dict = {}
        exec(block, space)
        found |= {n: v for n, v in space.items() if isinstance(v, type) and n != "HaltingAgent"}
    return found


class LeakyAgent(HaltingAgent):
    """Negative control: counts its slot's calls and never notices that an episode has ended."""

    def score(self, view):
        count = self.memory.get("count", torch.zeros(len(view.steps))) + 1
        self.keep("count", count)
        return (count % 4 == 3).float() - 0.5


PLUGINS = documented()
ALL = {**AGENTS, **PLUGINS}
TRAINABLE = [name for name in ALL if name != "oracle" and not name.startswith("sb3.")]  # those: tests/test_sb3.py
#: Thresholds at which an untrained core halts here and there.
LIVELY = {"confidence": {"tau": 0.55}, "confidence_min": {"tau": 0.38}, "entropy": {"tau": 1.1}, "margin": {"tau": 0.3},
          "stability": {"patience": 1}, "residual": {"tau": 0.4}, "residual_max": {"tau": 0.4}, "cosine": {"tau": 0.9},
          "kl": {"tau": 0.05}, "second_order": {"tau": 0.2}, "ConfidentAgent": {"threshold": 0.38},
          "PatientAgent": {"patience": 1}, "bce": {"bias": 0.0}, "act": {"bias": -1.0},
          "reinforce": {"bias": 0.0}}  # fmt: skip


def core() -> HRMCore:
    made = HRMCore(small_core(), torch.Generator().manual_seed(0)).eval()
    made.lm_head.weight.data.mul_(2)  # more decided answers than an untrained core's
    return made


def build(name: str) -> HaltingAgent:
    torch.manual_seed(2)
    agent_class = ALL.get(name, LeakyAgent)
    agent = make_agent(agent_class, core(), M, "shared_prefix", LIVELY.get(name))
    if isinstance(agent, QHaltingAgent):
        agent.q_head.weight.data.normal_()
        agent.q_head.bias.data = torch.tensor([-0.5, 0.0])
    if isinstance(agent, HaltLogitAgent):
        agent.head.weight.data.normal_()
    return agent


@pytest.fixture(scope="module")
def recorded() -> list[View]:
    """T steps of B slots with auto-reset, under actions that no agent has chosen; an oracle's channel beside."""
    with torch.no_grad():
        engine = SlotEngine(small_puzzles(12), core(), B, max_steps=M)
        engine.carry(PREVIOUS)
        engine.reset(torch.arange(B) * 7919)
        generator, seen = torch.Generator().manual_seed(1), []
        for _ in range(T):
            seen.append(view_of(engine.slots)._replace(is_correct=engine.slots.is_correct))
            engine.advance((torch.rand(B, generator=generator) > 0.3).long())
    ends = sum(int((view.steps == 1).sum()) for view in seen)
    assert ends > 2 * B
    return seen


def rows(view: View, index: torch.Tensor) -> View:
    return View(*(None if field is None else field[index] for field in view))


def shown(view: View, agent: HaltingAgent) -> View:
    """The view without what the agent has not asked for."""
    return view._replace(**{name: None for name in (*PREVIOUS, "is_correct") if name not in agent.sees})


def acts(agent: HaltingAgent, seen: list[View], index: torch.Tensor | None = None, explore=False) -> torch.Tensor:
    """(T, B) actions with an empty memory."""
    index = torch.arange(len(seen[0].steps)) if index is None else index
    with agent.fresh_memory(), torch.no_grad():
        return torch.stack(
            [decide(agent, shown(rows(v, index), agent), where="here", explore=explore)[0] for v in seen]
        )


@pytest.mark.parametrize("name", ALL)
def test_shapes_and_types(name, recorded):
    agent = build(name)
    actions = acts(agent, recorded)
    assert actions.shape == (T, B) and actions.dtype == torch.int64 and not actions.requires_grad
    assert set(actions.unique().tolist()) <= {HALT, CONTINUE}
    if agent.can_be_calibrated():
        assert agent.last_score.shape == (B,) and agent.last_score.dtype == torch.float32
        assert agent.last_score.isfinite().all()
    if name != "fixed":  # so that the tests below have something to compare (fixed halts at the budget)
        assert 0 < (actions == HALT).float().mean() < 1, name
    assert not agent.memory  # put back


def leaks(name: str, recorded: list[View]) -> bool:
    """Whether an episode goes otherwise in the stream of its slot than by itself from its first step on."""
    agent = build(name)
    together = acts(agent, recorded)
    for slot in range(B):
        begins = [t for t in range(T) if recorded[t].steps[slot] == 1]
        for first, end in zip(begins, [*begins[1:], T], strict=True):
            alone = acts(agent, recorded[first:end], torch.tensor([slot]))  # a batch of one
            if not torch.equal(alone[:, 0], together[first:end, slot]):
                return True
    return False


@pytest.mark.parametrize("name", ALL)
def test_nothing_of_the_episode_before_or_of_another_slot(name, recorded):
    assert not leaks(name, recorded)


def test_a_leak_is_noticed(recorded):
    """Negative control of the test above."""
    assert leaks("leaky", recorded)


@pytest.mark.parametrize("explore", [False, True])
@pytest.mark.parametrize("name", ALL)
def test_the_same_key_acts_the_same_in_any_batch(name, explore, recorded):
    agent = build(name)
    actions = acts(agent, recorded, explore=explore)
    assert torch.equal(acts(agent, recorded, explore=explore), actions)
    for index in (torch.randperm(B), torch.tensor([3]), torch.tensor([4, 4, 0, 2, 2, 2, 1])):
        assert torch.equal(acts(agent, recorded, index, explore), actions[:, index])


@pytest.mark.parametrize("name", ALL)
def test_all_halt_at_the_budget(name, recorded):
    agent = build(name)
    spent = [view._replace(steps=torch.full_like(view.steps, M)) for view in recorded[:2]]
    assert (acts(agent, spent) == HALT).all()


@pytest.mark.parametrize("name", [name for name, agent in ALL.items() if agent.can_be_calibrated()])
def test_thresholds_at_both_ends(name, recorded):
    """All halt at once, or none before the budget; between them more halts for a lower threshold."""
    agent = build(name)
    early = torch.stack([view.steps < M for view in recorded])
    halted = []
    for threshold in (float("-inf"), agent.threshold, float("inf")):
        agent.threshold = threshold
        halted.append(acts(agent, recorded) == HALT)
    assert halted[0].all() and not halted[2][early].any()
    assert (halted[1] <= halted[0]).all() and (halted[2] <= halted[1])[early].all()


@pytest.mark.parametrize("name", ALL)
def test_never_looks_at_the_answer(name):
    """Other answers beside the same puzzles change no wish; those of the oracle, the marked exception, they do."""
    puzzles = small_puzzles(12)
    swapped = puzzles.answers.roll(1, dims=1)
    wrong = type(puzzles)("sudoku", 4, puzzles.questions, swapped, puzzles.ratings, puzzles.sources, "swapped")
    made, agent = counting_core(puzzles, 2), build(name)
    if agent.learns:  # its head fits the small core
        made = core()
    before, after = (trajectories(made, agent, p, 4, 5).wish for p in (puzzles, wrong))
    assert torch.equal(before, after) != (name == "oracle")
    assert ("is_correct" in agent.sees) == (name == "oracle")


@pytest.mark.parametrize("name", ALL)
def test_solve_equals_trajectories(name):
    """Slots refilled in the middle, batches of one and more slots than puzzles: the same halts, puzzle by puzzle."""
    puzzles, agent = small_puzzles(11), build(name)
    run = trajectories(core(), agent, puzzles, M, batch_size=4)
    for batch_size in (1, 4, 16):
        solved = solve(core(), agent, puzzles, M, batch_size)
        assert torch.equal(solved.steps, run.halt_steps(M)), batch_size
    if agent.can_be_calibrated():
        assert run.scores.shape == (M, 11)
        over = run.scores > agent.threshold if agent.strict else run.scores >= agent.threshold
        assert torch.equal(over, run.wish)
    else:
        assert run.scores is None
    assert not agent.memory


@pytest.mark.parametrize("name", TRAINABLE)
def test_a_resumed_run_goes_on_number_for_number(name):
    def trainer():
        agent_class = ALL[name]
        learns = agent_class.learns
        return small_trainer(agent_class, LIVELY.get(name), objective="joint" if learns else "supervised")

    straight, stopped, resumed = trainer(), trainer(), trainer()
    for _ in range(7):
        straight.update()
    for _ in range(4):
        stopped.update()
    tensors, plain = stopped.state()
    resumed.load_state({n: t.clone() for n, t in tensors.items()}, {**plain, "step": stopped.step})
    assert set(resumed.agent.memory) == set(stopped.agent.memory)
    for _ in range(3):
        resumed.update()
    assert all(torch.equal(a, b) for a, b in zip(straight.trained.values(), resumed.trained.values(), strict=True))
    for one, other in zip(straight.envs.slots, resumed.envs.slots, strict=True):
        assert (one is None and other is None) or torch.equal(one, other)
    for key, held in straight.agent.memory.items():
        assert torch.equal(held, resumed.agent.memory[key])


class ThirdCall(HaltingAgent):
    """Halts at its third step, which it counts by itself."""

    threshold = 3.0

    def score(self, view):
        self.keep("calls", self.recall("calls", view, 0.0) + 1)
        return self.memory["calls"]


def test_without_its_memory_a_resumed_run_differs():
    """Negative control of the test above: what the checkpoint holds of the memory is what makes it go on alike."""
    straight = small_trainer(ThirdCall, objective="supervised")
    for _ in range(2):
        straight.update()
    tensors, plain = straight.state()
    straight.update()
    halted = []
    for names in (tensors, [n for n in tensors if not n.startswith("memory.")]):
        resumed = small_trainer(ThirdCall, objective="supervised")
        resumed.load_state({n: tensors[n].clone() for n in names}, {**plain, "step": 2})
        resumed.update()
        halted.append(torch.equal(resumed.envs.slots.steps, straight.envs.slots.steps))
    assert halted == [True, False]


@pytest.mark.parametrize("mode", MODES)
def test_evaluation_in_the_middle_of_training_leaves_the_memory_alone(mode):
    class Remembers(QHaltingAgent):
        def act(self, view, q_logits=None, explore=False):
            self.keep("calls", self.recall("calls", view, 0.0) + 1)
            return super().act(view, q_logits, explore)

    trainer = small_trainer(Remembers, bootstrap=mode)
    for _ in range(3):
        trainer.update()
    before = trainer.agent.memory["calls"].clone()
    trainer.evaluate(small_puzzles(3), 4)
    assert torch.equal(trainer.agent.memory["calls"], before)
    assert before.max() > 1


# --- what is shown, and where it comes from -------------------------------------------------------------------


def test_the_step_before_as_the_environment_shows_it():
    """z_H of a counting core holds the number of segments: one segment ago it is one less, also after auto-reset."""
    puzzles = small_puzzles(8)
    made = counting_core(puzzles, 2)
    engine = SlotEngine(puzzles, made, B, max_steps=4, augment=False)
    engine.carry(PREVIOUS)
    engine.reset(torch.arange(B))
    before, generator = None, torch.Generator().manual_seed(0)
    for step in range(12):
        slots = engine.slots
        assert torch.equal(slots.previous_z_H[:, 0, 0].long(), slots.steps - 1)
        first = slots.steps == 1
        assert (slots.previous_answer[first] == 0).all() and (slots.previous_logits[first] == 0).all()
        if before is not None:
            assert torch.equal(slots.previous_logits[~first], before.logits[~first])
            assert torch.equal(slots.previous_answer[~first], before.logits.argmax(-1)[~first])
        before = slots
        actions = (torch.rand(B, generator=generator) > 0.4).long()
        if step % 2:
            engine.lookahead(actions)
        engine.advance(actions)


def test_the_step_before_as_evaluation_shows_it():
    puzzles = small_puzzles(6)
    seen = []

    class Looks(HaltingAgent):
        sees = PREVIOUS

        def act(self, view, q_logits=None, explore=False):
            seen.append(view)
            return torch.where(view.steps >= 1 + view.key % 3, HALT, CONTINUE)

    made = counting_core(puzzles, 2)
    solve(made, Looks(), puzzles, 4, batch_size=2)
    trajectories(made, Looks(), puzzles, 4, batch_size=4)
    for view in seen:
        assert torch.equal(view.previous_z_H[:, 0, 0].long(), view.steps - 1)
        first = view.steps == 1
        assert (view.previous_answer[first] == 0).all() and (view.previous_logits[first] == 0).all()
        assert (view.previous_answer[~first] == view.previous_logits[~first].argmax(-1)).all()
        assert (view.previous_answer[~first] > 0).all()
        assert (view.tokens[:, None] == puzzles.questions.long()).all(-1).any(-1).all()
        assert view.is_correct is None


def test_nothing_is_carried_unasked():
    trainer = small_trainer()
    slots, view = trainer.envs.slots, trainer._decide(trainer.envs.slots)[0]
    for name in PREVIOUS:
        assert getattr(slots, name) is None and getattr(view, name) is None
        assert f"slots.{name}" not in trainer.state()[0]
    (first, *_) = views(core(), (), small_puzzles(2), 2, 2)
    assert all(getattr(first.view, name) is None for name in (*PREVIOUS, "is_correct"))


def test_training_refuses_the_oracle_and_unknown_wishes():
    with pytest.raises(UserError, match="OracleAgent cannot be trained with: it looks at the answer"):
        small_trainer(AGENTS["oracle"], objective="supervised")

    class Misspelt(HaltingAgent):
        sees = ("previous_zH",)

    with pytest.raises(UserError, match="did you mean 'previous_z_H'"):
        make_agent(Misspelt, core(), M, "none")


def test_memory_of_another_number_of_slots():
    agent = HaltingAgent()
    agent.keep("x", torch.zeros(3))
    view = View(None, None, torch.ones(4, dtype=torch.int64), None, None)
    with pytest.raises(UserError, match=r"memory 'x' is \(3,\), now \(4,\) is needed"):
        agent.recall("x", view, 0.0)
