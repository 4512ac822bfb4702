"""Evaluation: every puzzle counted exactly once, at its own halt.

Two ways to the same numbers. `trajectories` runs every puzzle through all segments once and reads off what
any budget would have given; `solve` halts for real, and a slot that halts takes the next puzzle, so that its
wall-clock follows the compute that halting saves. Letters: N puzzles, M segments, B slots, S tokens.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from agents.base import HaltingAgent, View
from agents.checks import decide, raise_fault
from envs.actions import HALT
from envs.previous import Previous, choose
from hrm_rl import rng
from hrm_rl.core.base import CoreOutput, State
from hrm_rl.frontier import gap_closed
from hrm_rl.tasks import PuzzleSet

Segment = Callable[[Tensor, State], CoreOutput]
_KEY = 0x4556414C  # key of the agents' randomness in evaluation: a puzzle's index folded into it


@dataclass(frozen=True)
class Trajectories:
    """What every puzzle did in segments 1..M, on the CPU. Row m - 1 is segment m."""

    exact: Tensor  # (M, N) bool, whole answer right
    token: Tensor  # (M, N) float32, share of right cells
    wish: Tensor  # (M, N) bool, the agent says HALT
    q_logits: Tensor | None  # (M, N, 2) float32, None for an agent without values
    seconds: float  # wall-clock of the core and the agent
    scores: Tensor | None = None  # (M, N) float32, None for an agent without `score`

    def halt_steps(self, max_steps: int) -> Tensor:
        """(N,) int64: first segment at which the agent halts, at most `max_steps`."""
        wish = self.wish[:max_steps].clone()
        wish[max_steps - 1] = True
        return wish.int().argmax(dim=0) + 1

    def at(self, steps: Tensor) -> tuple[Tensor, Tensor]:
        """(exact, token), (N,) each, read at segment `steps` (N,)."""
        row = (steps - 1)[None]
        return self.exact.gather(0, row)[0], self.token.gather(0, row)[0]


def _score(logits: Tensor, answers: Tensor) -> tuple[Tensor, Tensor]:
    """(exact, token) of logits (B, S, V) against answers (B, S), padding (0) left out; (B,) each."""
    scored = answers > 0
    right = ((logits.argmax(-1) == answers) & scored).sum(-1)
    cells = scored.sum(-1)
    return (right == cells) & (cells > 0), right.float() / cells.clamp(min=1)


def episode_keys(index: Tensor) -> Tensor:
    """(B,) int64: the random keys that agents draw from in evaluation, of the puzzles at index (B,)."""
    return rng.fold(torch.full_like(index, _KEY), index)


def _view(
    output: CoreOutput, steps: Tensor, tokens: Tensor, answers: Tensor, index: Tensor, previous: Previous,
    sees: Collection[str], open_token: int,
) -> View:  # fmt: skip
    """What an agent sees: index (B,) of the puzzles, tokens and answers (B, S); an answer for an oracle alone."""
    key = episode_keys(index)
    is_correct = _score(output.logits, answers)[0] if "is_correct" in sees else None
    valid = (answers > 0).any(-1)
    free = None if open_token == 1 else tokens == open_token
    return View(output.state.z_H, output.logits, steps, valid, key, tokens, *previous, is_correct, free)


class Segmented(NamedTuple):
    """One segment of one batch of puzzles, as `views` gives it."""

    first: int  # index of the first puzzle; row i is puzzle first + i
    count: int  # rows that count: those behind them repeat the last puzzle
    step: int  # 1..max_steps; a new batch begins at 1
    view: View
    exact: Tensor  # (B,) bool, whole answer right
    token: Tensor  # (B,) float32, share of right cells


@torch.no_grad()
def views(
    core: nn.Module, sees: Collection[str], puzzles: PuzzleSet, max_steps: int, batch_size: int = 256,
    device: str | torch.device = "cpu", segment: Segment | None = None,
) -> Iterator[Segmented]:  # fmt: skip
    """Every puzzle through `max_steps` segments, batch by batch: what agents that ask for `sees` are shown.

    The last batch is filled up with repeats so that shapes stay fixed. `segment` replaces the core's call; without it
    a batch is never larger than all puzzles.
    """
    segment, batch_size = segment or core, batch_size if segment else min(batch_size, len(puzzles))
    for first in range(0, len(puzzles), batch_size):
        index = torch.arange(first, first + batch_size).clamp(max=len(puzzles) - 1)
        questions = puzzles.questions[index.to(puzzles.questions.device)].to(device).long()
        answers = puzzles.answers[index.to(puzzles.answers.device)].to(device).long()
        state, index = _first_state(core, batch_size), index.to(device)
        previous = Previous.none_yet(sees, state.z_H, questions, puzzles.vocab_size)
        for step in range(1, max_steps + 1):
            output = segment(questions, state)
            state = output.state
            steps = torch.full_like(index, step)
            view = _view(output, steps, questions, answers, index, previous, sees, puzzles.rules.open_token)
            count = min(batch_size, len(puzzles) - first)
            yield Segmented(first, count, step, view, *_score(output.logits, answers))
            previous = Previous.left_by(sees, state.z_H, output.logits)


@torch.no_grad()
def trajectories(
    core: nn.Module, agent: HaltingAgent, puzzles: PuzzleSet, max_steps: int, batch_size: int = 256,
    device: str | torch.device = "cpu", segment: Segment | None = None, progress: Callable[[int], None] | None = None,
) -> Trajectories:  # fmt: skip
    """Run every puzzle through `max_steps` segments. `segment` replaces the core's call (a compiled one).

    The agent starts with an empty memory and has its own back afterwards. UserError if what it returns is unsound.
    """
    agent_max = _set_max_steps(agent, max_steps + 1)  # so that only wishes count, not the budget
    parts: list[Tensor] = []
    q_parts: list[Tensor] = []
    s_parts: list[Tensor] = []
    began = time.perf_counter()
    try:
        with agent.fresh_memory():
            rows, q_rows, s_rows, faults = [], [], [], []
            for first, count, step, view, *scored in views(
                core, agent.sees, puzzles, max_steps, batch_size, device, segment
            ):
                q_logits = agent.scores(view.z_H)
                actions, fault = decide(agent, view, q_logits, where=f"step {step} of puzzles {first} and on")
                rows.append(torch.stack((*(x.float() for x in scored), (actions == HALT).float())))
                faults += [] if fault is None else [fault]
                if q_logits is not None:
                    q_rows.append(q_logits)
                if agent.last_score is not None:
                    s_rows.append(agent.last_score)
                if step < max_steps:
                    continue
                parts.append(torch.stack(rows)[:, :, :count].cpu())
                for into, held in ((q_parts, q_rows), (s_parts, s_rows)):
                    if held:
                        into.append(torch.stack(held)[:, :count].float().cpu())
                if faults:
                    raise_fault(agent, torch.stack(faults).amax(), f"puzzles {first} and on")
                rows, q_rows, s_rows, faults = [], [], [], []
                if progress:
                    progress(count)
    finally:
        _set_max_steps(agent, agent_max)
    joined = torch.cat(parts, dim=-1)
    return Trajectories(
        exact=joined[:, 0] > 0.5, token=joined[:, 1], wish=joined[:, 2] > 0.5,
        q_logits=torch.cat(q_parts, dim=1) if q_parts else None, seconds=time.perf_counter() - began,
        scores=torch.cat(s_parts, dim=1) if s_parts else None,
    )  # fmt: skip


@dataclass(frozen=True)
class Solved:
    """One line a puzzle, in the order of the puzzle set."""

    exact: Tensor  # (N,) bool
    token: Tensor  # (N,) float32
    steps: Tensor  # (N,) int64, segments used
    answers: Tensor  # (N, S) uint8, the tokens answered
    seconds: float
    segments_run: int  # slots summed over core calls, idle slots included: what the wall-clock paid for


@torch.no_grad()
def solve(
    core: nn.Module, agent: HaltingAgent, puzzles: PuzzleSet, max_steps: int, batch_size: int = 256,
    device: str | torch.device = "cpu", segment: Segment | None = None,
) -> Solved:  # fmt: skip
    """Halt for real: a slot that halts takes the next puzzle in the next core call.

    `segment` replaces the core's call (a compiled one) and sees one shape only: `batch_size` slots; without it there
    are never more slots than puzzles. Once no puzzle waits and half of the slots are idle, those still busy move
    together into half as many slots, and again, which the core itself runs. What a puzzle gets does not depend on its
    slot nor on how many there are (but for rounding).

    The agent starts with an empty memory and has its own back afterwards. UserError if what it returns is unsound.
    """
    segment, batch_size = segment or core, batch_size if segment else min(batch_size, len(puzzles))
    agent_max = _set_max_steps(agent, max_steps)
    total, slots = len(puzzles), batch_size
    questions, answers = puzzles.questions.to(device).long(), puzzles.answers.to(device).long()
    exact = torch.zeros(total, dtype=torch.bool)
    token, steps_used = torch.zeros(total), torch.zeros(total, dtype=torch.int64)
    given = torch.zeros_like(puzzles.answers, device="cpu")
    index = torch.arange(slots, device=device).clamp(max=total - 1)
    waiting, calls, segments_run = min(slots, total), 0, 0
    state, steps = _first_state(core, slots), torch.zeros(slots, dtype=torch.int64, device=device)
    vocab, open_token = puzzles.vocab_size, puzzles.rules.open_token
    previous = Previous.none_yet(agent.sees, state.z_H, questions[index], vocab)
    busy = torch.arange(slots, device=device) < total
    began = time.perf_counter()
    try:
        with agent.fresh_memory():
            while True:
                tokens = questions[index]
                output = (segment if slots == batch_size else core)(tokens, state)
                calls, segments_run, steps = calls + 1, segments_run + slots, steps + 1
                view = _view(output, steps, tokens, answers[index], index, previous, agent.sees, open_token)
                actions, fault = decide(agent, view, where=f"call {calls}")
                ends = busy & ((actions == HALT) | (steps >= max_steps))
                state = output.state
                previous = Previous.left_by(agent.sees, state.z_H, output.logits)
                ended = ends.nonzero()[:, 0]
                raise_fault(agent, fault, f"call {calls}")
                if not len(ended):
                    continue
                where = index[ended].cpu()
                right, share = _score(output.logits[ended], answers[index[ended]])
                exact[where], token[where], steps_used[where] = right.cpu(), share.cpu(), steps[ended].cpu()
                given[where] = output.logits[ended].argmax(-1).to(torch.uint8).cpu()
                fresh = torch.arange(waiting, waiting + len(ended), device=device)
                waiting = min(total, waiting + len(ended))
                busy[ended] = fresh < total
                still_busy = int(busy.sum())
                if not still_busy:
                    break
                index[ended] = fresh.clamp(max=total - 1)
                steps = steps.masked_fill(ends, 0)  # not in place: an agent may have kept the view's
                initial = _first_state(core, slots)
                previous = Previous.none_yet(agent.sees, initial.z_H, questions[index], vocab).where(ends, previous)
                state = State(*(choose(ends, z0, z) for z0, z in zip(initial, state, strict=True)))
                fewer = _slots_needed(slots, still_busy)
                if fewer < slots:
                    kept = busy.int().argsort(descending=True, stable=True)[:fewer]
                    slots, index, steps, busy = fewer, index[kept], steps[kept], busy[kept]
                    state = State(*(z[kept] for z in state))
                    previous = Previous(*(None if held is None else held[kept] for held in previous))
                    agent.memory.select(kept)
    finally:
        _set_max_steps(agent, agent_max)
    return Solved(exact, token, steps_used, given, time.perf_counter() - began, segments_run)


def _slots_needed(slots: int, busy: int) -> int:
    """`slots`, halved (rounded up) for as long as `busy` of them fit."""
    while slots > 1 and (slots + 1) // 2 >= busy:
        slots = (slots + 1) // 2
    return slots


def _first_state(core: nn.Module, batch_size: int) -> State:
    """The initial state, copied out so that a compiled segment sees the same strides in every call."""
    return State(*(z.contiguous() for z in core.initial_state(batch_size)))


def _set_max_steps(agent: HaltingAgent, max_steps: int | None) -> int | None:
    """Give the agent another budget for a while; returns the one it had (None where it has none)."""
    had = getattr(agent, "max_steps", None)
    if had is not None and max_steps is not None:
        agent.max_steps = max_steps
    return had


def report(run: Trajectories, budgets: Sequence[int], solved: Solved | None = None) -> dict:
    """The table behind report.json: accuracy at the learned halt for every budget, and at fixed steps.

    Rates are puzzles a second: of `solved` (real halting) at the largest budget of `budgets` where given,
    otherwise what the trajectories' segments a second would allow. `gap_closed`: the share of the gap between the
    fixed steps and the oracle within that budget (`hrm_rl.frontier`), None where there is none.
    """
    segments, count = run.exact.shape
    per_second = segments * count / run.seconds
    learned = []
    for budget in budgets:
        steps = run.halt_steps(budget)
        exact, token = run.at(steps)
        row = {
            "max_steps": budget, "exact_accuracy": exact.float().mean().item(), "token_accuracy": token.mean().item(),
            "mean_steps": steps.float().mean().item(),
        }  # fmt: skip
        row["puzzles_per_second"] = per_second / row["mean_steps"]
        if run.q_logits is not None:
            q_halt = run.q_logits[:, :, 0].gather(0, (steps - 1)[None])[0]
            row["q_halt_accuracy"] = ((q_halt >= 0) == exact).float().mean().item()
        learned.append(row)
    if solved is not None:
        learned[-1]["puzzles_per_second"] = count / solved.seconds
    fixed = [
        {
            "steps": m, "exact_accuracy": run.exact[m - 1].float().mean().item(),
            "token_accuracy": run.token[m - 1].mean().item(), "puzzles_per_second": per_second / m,
        }
        for m in range(1, segments + 1)
    ]  # fmt: skip
    for budget, row in zip(budgets, learned, strict=True):
        oracle = run.exact[:budget].any(dim=0).float().mean().item()
        curve = [at["exact_accuracy"] for at in fixed[:budget]]
        closed = gap_closed(row["exact_accuracy"], row["mean_steps"], curve, oracle)
        row |= {"oracle_accuracy": oracle, "gap_closed": None if math.isnan(closed) else closed}
    result = {"puzzles": count, "learned_halt": learned, "fixed_steps": fixed}
    if run.q_logits is not None:
        result["q_values_by_step"] = _q_by_step(run)
    return result


def _q_by_step(run: Trajectories) -> list[dict]:
    """Mean Q-values of right and of wrong answers, and how many there are, segment by segment."""
    values, rows = run.q_logits.sigmoid(), []
    for m in range(run.exact.shape[0]):
        row = {"step": m + 1}
        for name, mask in (("right", run.exact[m]), ("wrong", ~run.exact[m])):
            mean = values[m][mask].mean(dim=0).tolist() if mask.any() else [None, None]
            row[name] = {"count": int(mask.sum()), "q_halt": mean[0], "q_continue": mean[1]}
        rows.append(row)
    return rows


def table(result: dict, name: str, agent: str = "learned") -> str:
    """The report as text, one line a row; `agent` is what the rows of its halting are called."""
    lines = [f"{result['puzzles']} test puzzles ({name})"]
    lines.append(f"{'halt':<26}{'exact':>8}{'token':>8}{'steps':>8}{'puzzles/s':>11}")
    for row in result["learned_halt"]:
        label = f"{agent}, at most {row['max_steps']}"
        lines.append(_line(label, row, row["mean_steps"]))
    lines += [_line(f"fixed at {row['steps']}", row, row["steps"]) for row in result["fixed_steps"]]
    lines.append("puzzles/s: timed in the last row of the agent, elsewhere segments a second divided by steps")
    return "\n".join(lines)


def _line(label: str, row: dict, steps: float) -> str:
    return (
        f"{label:<26}{row['exact_accuracy']:>8.1%}{row['token_accuracy']:>8.1%}{steps:>8.2f}"
        f"{row['puzzles_per_second']:>11.1f}"
    )
