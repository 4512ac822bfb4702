"""Ensembles over one core: K relabelled copies of each puzzle, and one of their answers.

Sources: `first`, the copy that halts first wins (arXiv:2601.19085, there over restarts, here over symmetries of the
puzzle); `best`, the copy with the highest q_halt at its own halt wins (after PTRM, arXiv:2605.19943, which draws noise
in z where we draw a symmetry). Letters: N puzzles, K copies, M segments, S tokens.

Copy 0 is the puzzle as it is, the others are shown in a random symmetry (digits, bands, rows, stacks, columns,
transpose); an answer is mapped back before it is compared. Compute is counted as used: `segments` is summed over all
K copies, each up to the segment in which the ensemble has no more use for it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from agents.base import HaltingAgent
from agents.checks import decide, raise_fault
from envs.actions import HALT
from hrm_rl import rng
from hrm_rl.errors import UserError
from hrm_rl.evaluation import Segment, views
from hrm_rl.tasks import PuzzleSet, get_task

Rule = Literal["first", "best"]
RULES: tuple[str, ...] = get_args(Rule)
MOST_COPIES = 1024
_SYMMETRY = 0x454E534D  # purpose of the copies' draws, apart from every other use of a key


@dataclass(frozen=True)
class EnsembleRun:
    """One line a puzzle, in the order of the puzzle set; on the CPU."""

    exact: Tensor  # (N,) bool, the chosen answer is right in every cell
    token: Tensor  # (N,) float32, its share of right cells
    answers: Tensor  # (N, S) uint8, the chosen answer, mapped back to the puzzle as it stands
    copy: Tensor  # (N,) int64, the copy it is from
    steps: Tensor  # (N,) int64, segments until the answer stood, one after another: the latency
    segments: Tensor  # (N,) int64, segments of all K copies together: the compute


def relabelled(puzzles: PuzzleSet, copies: int, seed: int = 0) -> tuple[PuzzleSet, Tensor]:
    """(copies * N puzzles, keys (copies * N,) int64): row k * N + i is copy k of puzzle i; copy 0 is as it stands."""
    total = len(puzzles)
    index = torch.arange(copies * total)
    keys = rng.fold(rng.fold(torch.full_like(index, _SYMMETRY), seed), index)
    own = puzzles.to("cpu")
    questions, answers = own.questions.repeat(copies, 1), own.answers.repeat(copies, 1)
    moved = get_task(puzzles.task, puzzles.side).augment(keys[total:], questions[total:], answers[total:])
    for whole, part in zip((questions, answers), moved, strict=True):
        whole[total:] = part.to(whole.dtype)
    return replace(
        own, questions=questions, answers=answers, ratings=own.ratings.repeat(copies), sources=own.sources * copies,
        name=f"{puzzles.name}, {copies} copies", sha256="",
    ), keys  # fmt: skip


@torch.no_grad()
def solve_ensemble(
    core: nn.Module, agent: HaltingAgent, puzzles: PuzzleSet, max_steps: int, rule: Rule, copies: int,
    batch_size: int = 256, device: str | torch.device = "cpu", segment: Segment | None = None, seed: int = 0,
) -> EnsembleRun:  # fmt: skip
    """Let `agent` (built for this `max_steps`) halt on every copy and choose one answer a puzzle.

    A copy's worth is its q_halt at its own halt, the agent's score where it has no Q-values. first: the copy that halts
    at the earliest segment (among several the one of the highest worth), and that many segments are run in each of the
    K. best: the copy of the highest worth; every copy runs to its halt. Ties go to the lowest copy.
    `seed` fixes the symmetries. UserError for a rule the agent cannot serve.
    """
    if rule not in RULES:
        raise UserError(f"ensemble must be one of {', '.join(RULES)}, not {rule!r}")
    if not 1 <= copies <= MOST_COPIES:
        raise UserError(f"copies must be between 1 and {MOST_COPIES}, not {copies}")
    shown, keys = relabelled(puzzles, copies, seed)
    halts, value, answers = _watch(core, agent, shown, max_steps, batch_size, device, segment)
    total, row = len(puzzles), torch.arange(len(puzzles))
    if value is None and rule == "best" and copies > 1:
        raise UserError(f"ensemble best needs an agent with Q-values or a score; {type(agent).__name__} has neither")
    halted = (halts.int().argmax(0) + 1).view(copies, total)  # (K, N): each copy's own step
    at_halt = torch.zeros(copies, total)
    if value is not None:
        at_halt = value.gather(0, halted.view(1, -1) - 1).view(copies, total)
    if rule == "first":
        steps = halted.amin(0)
        worth = at_halt.masked_fill(halted > steps, float("-inf"))
        chosen = _first_largest(worth, halted == steps)
        segments = copies * steps
    else:
        chosen = _first_largest(at_halt, torch.ones_like(halted, dtype=torch.bool))
        steps, segments = halted.amax(0), halted.sum(0)
    source = chosen * total + row
    answer = answers[halted[chosen, row] - 1, source].long()
    task = get_task(puzzles.task, puzzles.side)
    answer = torch.where((chosen > 0)[:, None], task.restore(keys[source], answer), answer)
    wanted = puzzles.answers.cpu().long()
    scored = wanted > 0
    right, cells = ((answer == wanted) & scored).sum(-1), scored.sum(-1)
    return EnsembleRun(
        exact=(right == cells) & (cells > 0), token=right.float() / cells.clamp(min=1), answers=answer.to(torch.uint8),
        copy=chosen, steps=steps, segments=segments,
    )  # fmt: skip


def _first_largest(worth: Tensor, candidates: Tensor) -> Tensor:
    """(K, N) float, (K, N) bool -> (N,) int64: the first candidate of the largest worth (NaN counts as the least)."""
    worth = worth.nan_to_num(float("-inf"), float("inf"), float("-inf"))
    best = worth.masked_fill(~candidates, float("-inf")).amax(0)
    return (candidates & (worth == best)).int().argmax(0)


def _watch(
    core: nn.Module, agent: HaltingAgent, puzzles: PuzzleSet, max_steps: int, batch_size: int,
    device: str | torch.device, segment: Segment | None,
) -> tuple[Tensor, Tensor | None, Tensor]:  # fmt: skip
    """(halts (M, R) bool, the last row True; q_halt or score (M, R) float32, or None; answers (M, R, S)); R rows."""
    halts = torch.zeros(max_steps, len(puzzles), dtype=torch.bool)
    answers = torch.zeros(max_steps, *puzzles.questions.shape, dtype=torch.uint8)
    value: Tensor | None = None
    with agent.fresh_memory():
        for first, count, step, view, *_ in views(core, agent.sees, puzzles, max_steps, batch_size, device, segment):
            where = f"step {step} of copies {first} and on"
            q_logits = agent.scores(view.z_H)
            actions, fault = decide(agent, view, q_logits, where=where)
            raise_fault(agent, fault, where)
            here = slice(first, first + count)
            halts[step - 1, here] = (actions == HALT)[:count].cpu()
            answers[step - 1, here] = view.logits[:count].argmax(-1).to(torch.uint8).cpu()
            worth = agent.last_score if q_logits is None else q_logits[:, 0]
            if worth is not None:
                value = torch.zeros(halts.shape) if value is None else value
                value[step - 1, here] = worth[:count].float().cpu()
    halts[-1] = True
    return halts, value, answers


def ensemble_report(run: EnsembleRun, rule: str, copies: int) -> dict:
    """What report.json holds of it: accuracy, latency in segments, and compute in segments of all copies."""
    return {
        "rule": rule, "copies": copies, "exact_accuracy": run.exact.float().mean().item(),
        "token_accuracy": run.token.mean().item(), "mean_steps": run.steps.float().mean().item(),
        "mean_segments": run.segments.float().mean().item(),
    }  # fmt: skip


def ensemble_line(row: dict) -> str:
    """That as a line of text under the table of `hrm_rl.evaluation`."""
    label = f"ensemble {row['rule']} of {row['copies']}"
    return (
        f"{label:<26}{row['exact_accuracy']:>8.1%}{row['token_accuracy']:>8.1%}{row['mean_steps']:>8.2f}"
        f"  {row['mean_segments']:.2f} segments a puzzle, all copies counted"
    )
