"""Evaluation: each puzzle once, at its own halt; `solve` and `trajectories` give the same numbers. N puzzles."""

from __future__ import annotations

import pytest
import torch
from hrm_testing import counting_core, small_core, small_puzzles
from hypothesis import given, settings
from hypothesis import strategies as st

from agents import FixedAgent, HaltingAgent, QHaltingAgent
from envs.actions import CONTINUE, HALT
from hrm_rl.core import HRMCore
from hrm_rl.evaluation import Trajectories, report, solve, table, trajectories


def restless(max_steps: int = 4) -> tuple[HRMCore, QHaltingAgent]:
    """An untrained core with a random Q-head: puzzles halt at all sorts of steps."""
    core = HRMCore(small_core(), torch.Generator().manual_seed(0)).eval()
    agent = QHaltingAgent(core, max_steps, epsilon=1.0, q_bias=0.0)
    agent.q_head.weight.data.normal_(generator=torch.Generator().manual_seed(2))
    agent.q_head.bias.data = torch.tensor([-1.0, 0.0])
    return core, agent


class HaltAtClue(HaltingAgent):
    """Halts at a step that depends on the puzzle alone (through its key), for cores that say nothing."""

    def act(self, view, q_logits=None, explore=False):
        return torch.where(view.steps >= 1 + view.key % 5, HALT, CONTINUE)


@pytest.mark.parametrize("batch_size", [1, 5, 23, 64])
def test_solve_equals_trajectories_puzzle_by_puzzle(batch_size):
    core, agent = restless()
    puzzles = small_puzzles(23)
    run = trajectories(core, agent, puzzles, 6, batch_size=7)
    for budget in (1, 3, 4, 6):
        solved = solve(core, agent, puzzles, budget, batch_size)
        steps = run.halt_steps(budget)
        exact, token = run.at(steps)
        assert torch.equal(solved.steps, steps), budget
        assert torch.equal(solved.exact, exact)
        assert torch.allclose(solved.token, token)
    assert len(set(run.halt_steps(6).tolist())) >= 3, "the puzzles halt too much alike to show anything"


def test_trajectories_do_not_depend_on_the_batch_size():
    core, agent = restless()
    puzzles = small_puzzles(23)
    runs = [trajectories(core, agent, puzzles, 4, batch_size=b) for b in (1, 8, 23, 50)]
    for run in runs[1:]:
        assert run.exact.shape == (4, 23)
        assert torch.equal(run.wish, runs[0].wish) and torch.equal(run.exact, runs[0].exact)
        assert torch.allclose(run.q_logits, runs[0].q_logits, atol=1e-5)
        assert torch.allclose(run.token, runs[0].token)


def test_answers_are_those_of_the_halt():
    core, agent = restless()
    puzzles = small_puzzles(9)
    solved = solve(core, agent, puzzles, 4, batch_size=2)
    for i in range(len(puzzles)):
        tokens = puzzles.questions[i : i + 1].long()
        state = core.initial_state(1)
        for _ in range(int(solved.steps[i])):
            state, logits = core(tokens, state)
        assert torch.equal(logits.argmax(-1)[0].to(torch.uint8), solved.answers[i])


@pytest.mark.parametrize(("right_from", "k"), [(2, 2), (2, 1), (3, 4), (9, 4)])
def test_known_answers(right_from, k):
    puzzles = small_puzzles(10)
    core = counting_core(puzzles, right_from)
    agent = FixedAgent(4, k)
    run = trajectories(core, agent, puzzles, 4, batch_size=4)
    assert run.exact.float().mean(1).tolist() == [float(m >= right_from) for m in range(1, 5)]
    solved = solve(core, agent, puzzles, 4, batch_size=4)
    assert solved.steps.tolist() == [k] * 10
    assert solved.exact.tolist() == [k >= right_from] * 10
    answers = solved.answers == puzzles.answers
    assert answers.all() if k >= right_from else not answers.any()
    assert run.q_logits is None


def test_each_puzzle_is_counted_once():
    """An early puzzle is never run again to fill a slot in place of a later one, however they halt."""
    puzzles = small_puzzles(17)
    core = counting_core(puzzles, 1)
    seen = []
    own = core.forward

    def forward(tokens, state):
        first = state.z_H[:, 0, 0] == 0
        seen.extend(tuple(row) for row in tokens[first].tolist())
        return own(tokens, state)

    core.forward = forward
    agent = HaltAtClue()
    solved = solve(core, agent, puzzles, 5, batch_size=4)
    assert (solved.steps > 0).all() and len(set(solved.steps.tolist())) >= 3
    began = [seen.count(tuple(row)) for row in puzzles.questions.tolist()]
    assert began[:-1] == [1] * 16  # the last one also fills slots that have nothing left to do
    run = trajectories(counting_core(puzzles, 1), agent, puzzles, 5, batch_size=4)
    assert torch.equal(solved.steps, run.halt_steps(5))


def test_halting_saves_core_calls():
    puzzles = small_puzzles(16)
    for k in (1, 4):
        core = counting_core(puzzles, 1)
        solved = solve(core, FixedAgent(4, k), puzzles, 4, batch_size=4)
        assert core.calls == 4 * k and solved.segments_run == 16 * k


def test_budgets_beyond_training():
    """A larger budget is a longer look at the same puzzles: earlier rows stay, the agent's own budget comes back."""
    core, agent = restless(max_steps=2)
    puzzles = small_puzzles(12)
    short, long = (trajectories(core, agent, puzzles, m, batch_size=12) for m in (2, 12))
    assert torch.equal(short.exact, long.exact[:2]) and torch.equal(short.wish, long.wish[:2])
    assert agent.max_steps == 2
    assert long.halt_steps(12).max() > 2
    solved = solve(core, agent, puzzles, 12, batch_size=12)
    assert torch.equal(solved.steps, long.halt_steps(12)) and agent.max_steps == 2


def test_the_budget_comes_back_after_an_error():
    core, agent = restless(max_steps=2)

    def broken(tokens, state):
        raise RuntimeError("broken")

    for run in (trajectories, solve):
        with pytest.raises(RuntimeError, match="broken"):
            run(core, agent, small_puzzles(4), 8, segment=broken)
        assert agent.max_steps == 2


def test_padding_never_counts_as_right():
    puzzles = small_puzzles(3, padding=2)
    core = counting_core(puzzles, 1)
    run = trajectories(core, FixedAgent(2), puzzles, 2, batch_size=5)
    assert run.exact[0].tolist() == [True] * 3 + [False] * 2


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_halt_steps_are_the_first_wish(data):
    segments, count = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 5))
    row = st.lists(st.booleans(), min_size=count, max_size=count)
    rows = data.draw(st.lists(row, min_size=segments, max_size=segments))
    wish = torch.tensor(rows)
    run = Trajectories(wish, wish.float(), wish, None, 1.0)
    budget = data.draw(st.integers(1, segments))
    expected = [next((m for m in range(1, budget) if rows[m - 1][i]), budget) for i in range(count)]
    assert run.halt_steps(budget).tolist() == expected
    assert torch.equal(run.wish, torch.tensor(rows))  # not written into
    exact, token = run.at(run.halt_steps(budget))
    assert exact.tolist() == [rows[m - 1][i] for i, m in enumerate(expected)]
    assert torch.equal(exact.float(), token)


def test_report_by_hand():
    exact = torch.tensor([[True, False, False], [True, True, False], [False, True, True]])
    wish = torch.tensor([[True, False, False], [True, True, False], [True, True, False]])
    q_logits = torch.zeros(3, 3, 2)
    q_logits[:, :, 0] = torch.tensor([[2.0, -1.0, -1.0], [1.0, -1.0, -1.0], [0.0, 3.0, -1.0]])
    run = Trajectories(exact, exact.float() / 2, wish, q_logits, seconds=1.5)
    result = report(run, [1, 2, 3])
    assert [row["mean_steps"] for row in result["learned_halt"]] == pytest.approx([1.0, 5 / 3, 2.0])
    assert [row["exact_accuracy"] for row in result["learned_halt"]] == pytest.approx([1 / 3, 2 / 3, 1.0])
    assert [row["token_accuracy"] for row in result["learned_halt"]] == pytest.approx([1 / 6, 1 / 3, 1 / 2])
    # q_halt >= 0 agrees with being right: all at step 1; at their halt, puzzle 2 never (q_halt -1, right at 3).
    assert [row["q_halt_accuracy"] for row in result["learned_halt"]] == pytest.approx([1.0, 2 / 3, 1 / 3])
    assert [row["exact_accuracy"] for row in result["fixed_steps"]] == pytest.approx([1 / 3, 2 / 3, 2 / 3])
    assert result["puzzles"] == 3 and result["learned_halt"][0]["puzzles_per_second"] == pytest.approx(9 / 1.5)
    assert result["fixed_steps"][2]["puzzles_per_second"] == pytest.approx(2.0)
    # Oracle: 1, 2, 3 of 3 puzzles within 1, 2, 3 segments; fixed steps at 1, 5/3, 2 mean steps: 1/3, 5/9, 2/3.
    assert [row["oracle_accuracy"] for row in result["learned_halt"]] == pytest.approx([1 / 3, 2 / 3, 1.0])
    assert result["learned_halt"][0]["gap_closed"] is None
    assert [row["gap_closed"] for row in result["learned_halt"][1:]] == pytest.approx([1.0, 1.0])
    first = result["q_values_by_step"][0]
    assert first["right"]["count"] == 1 and first["wrong"]["count"] == 2
    assert first["right"]["q_halt"] == pytest.approx(torch.tensor(2.0).sigmoid().item())
    text = table(result, "by hand")
    assert "learned, at most 3" in text and "fixed at 3" in text and len(text.splitlines()) == 2 + 3 + 3 + 1


def test_report_of_real_halting():
    core, agent = restless()
    puzzles = small_puzzles(9)
    solved = solve(core, agent, puzzles, 4, 3)
    result = report(trajectories(core, agent, puzzles, 4, 3), [2, 4], solved)
    last = result["learned_halt"][-1]
    assert last["puzzles_per_second"] == pytest.approx(9 / solved.seconds)
    assert last["mean_steps"] == pytest.approx(solved.steps.float().mean().item())
    assert last["exact_accuracy"] == pytest.approx(solved.exact.float().mean().item())


def test_the_tail_is_compacted():
    """A compiled segment sees one shape; slots without work are not run; nobody's answer depends on any of it."""
    puzzles = small_puzzles(17)
    core, shapes = counting_core(puzzles, 2), []

    class UpTo(FixedAgent):
        """Halts at a step of the puzzle's own: 1 to 6."""

        def act(self, view, q_logits=None, explore=False):
            own = view.tokens.sum(-1) % 6 + 1
            return torch.where(view.steps >= own, 0, 1)

    def segment(tokens, state):
        shapes.append(len(tokens))
        return core(tokens, state)

    runs = {slots: solve(core, UpTo(6), puzzles, 6, slots, segment=segment) for slots in (8, 1, 3, 64)}
    assert set(shapes) == {8, 1, 3, 64}
    one = runs.pop(1)
    assert one.segments_run == int(one.steps.sum()) and len(one.steps.unique()) > 3
    for slots, run in runs.items():
        for name in ("exact", "token", "steps", "answers"):
            assert torch.equal(getattr(run, name), getattr(one, name)), (slots, name)
        assert run.segments_run < 6 * max(slots, len(puzzles))
    assert runs[64].segments_run < 64 + 2 * int(one.steps.sum())


def test_slots_needed():
    from hrm_rl.evaluation import _slots_needed

    assert [_slots_needed(8, busy) for busy in (8, 5, 4, 3, 2, 1)] == [8, 8, 4, 4, 2, 1]
    assert _slots_needed(5, 3) == 3 and _slots_needed(1, 1) == 1 and _slots_needed(64, 3) == 4
