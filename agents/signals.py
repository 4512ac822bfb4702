"""What halting rules look at, as pure functions of tensors, and the table of signals made of them.

A rule without learning is `signal + direction + threshold`: SIGNALS holds the first two. Letters: B slots,
T = P + S positions, D hidden size, S tokens, V token values. "Free" cells are those the puzzle leaves blank; a
puzzle without one is settled (certainty 1, uncertainty 0).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from agents.base import View
from agents.memory import Memory

PADDING, BLANK = 0, 1  # tokens, as in hrm_rl.tasks.sudoku; of other tasks View.free tells
_EPS = 1e-8


# --- of one answer, cell by cell ----------------------------------------------------------------------------


def top_probability(logits: Tensor) -> Tensor:
    """(B, S, V) -> (B, S): largest softmax probability of each cell."""
    return logits.float().softmax(-1).amax(-1)


def top_margin(logits: Tensor) -> Tensor:
    """(B, S, V) -> (B, S): largest minus second largest softmax probability of each cell."""
    first, second = logits.float().softmax(-1).topk(2, dim=-1).values.unbind(-1)
    return first - second


def cell_entropy(logits: Tensor) -> Tensor:
    """(B, S, V) -> (B, S): entropy of each cell's softmax, in nats."""
    log_p = logits.float().log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1)


def cell_kl(logits: Tensor, previous_logits: Tensor) -> Tensor:
    """KL(p_m || p_{m-1}) of each cell's softmax, in nats: (B, S, V) twice -> (B, S)."""
    log_p, log_q = logits.float().log_softmax(-1), previous_logits.float().log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1).clamp(min=0)  # rounding can go below


def cell_mean(values: Tensor, free: Tensor, settled: float) -> Tensor:
    """Mean over the free cells: values (B, S), free (B, S) bool -> (B,); `settled` where none is free."""
    mean = (values * free).sum(-1) / free.sum(-1).clamp(min=1)
    return mean.masked_fill(~free.any(-1), settled)


def cell_min(values: Tensor, free: Tensor, settled: float) -> Tensor:
    """Smallest of the free cells: values (B, S), free (B, S) bool -> (B,); `settled` where none is free."""
    return values.masked_fill(~free, float("inf")).amin(-1).masked_fill(~free.any(-1), settled)


def unchanged_for(answer: Tensor, previous_answer: Tensor, free: Tensor, steps: Tensor, count: Tensor) -> Tensor:
    """How many segments in a row the answer has not changed in any free cell: (B,) float32.

    answer, previous_answer (B, S); free (B, S) bool; steps (B,), 0 comes out at step 1; count (B,) is what this
    function gave one step before.
    """
    same = ((answer == previous_answer) | ~free).all(-1) & (steps > 1)
    return torch.where(same, count + 1, torch.zeros_like(count))


# --- of the state -------------------------------------------------------------------------------------------


def step_size(z: Tensor, previous_z: Tensor, used: Tensor) -> Tensor:
    """|z_m - z_{m-1}|_2 / |z_m|_2 of each slot: z, previous_z (B, T, D), used (B, T) bool positions -> (B,)."""
    moved = _norm(z.float() - previous_z.float(), used)
    return moved / (_norm(z.float(), used) + _EPS)


def largest_step(z: Tensor, previous_z: Tensor, used: Tensor) -> Tensor:
    """max|z_m - z_{m-1}| / (max|z_m| + 1e-8) of each slot (FPRM): shapes as in `step_size`."""
    now, before = _used(z.float(), used), _used(previous_z.float(), used)
    return (now - before).abs().amax((1, 2)) / (now.abs().amax((1, 2)) + _EPS)


def cosine_similarity(z: Tensor, previous_z: Tensor, used: Tensor) -> Tensor:
    """Cosine between the whole states z_m and z_{m-1} of each slot: shapes as in `step_size`; in [-1, 1]."""
    now, before = _used(z.float(), used), _used(previous_z.float(), used)
    return (now * before).sum((1, 2)) / (_norm(now, used) * _norm(before, used) + _EPS)


def change_of_step(size: Tensor, previous_size: Tensor) -> Tensor:
    """|s_m - s_{m-1}| of relative step sizes, (B,) twice -> (B,): how far from settling into even steps."""
    return (size - previous_size).abs()


def _used(z: Tensor, used: Tensor) -> Tensor:
    return z * used[..., None]


def _norm(z: Tensor, used: Tensor) -> Tensor:
    return _used(z, used).square().sum((1, 2)).sqrt()


# --- of a view ----------------------------------------------------------------------------------------------


def free_cells(view: View) -> Tensor:
    """(B, S) bool: the cells the puzzle leaves blank. Padding is not one of them."""
    return view.tokens == BLANK if view.free is None else view.free


def used_positions(view: View) -> Tensor:
    """(B, T) bool: the positions in front of the tokens and the tokens that are not padding."""
    front = view.z_H.shape[1] - view.tokens.shape[1]
    return torch.nn.functional.pad(view.tokens != PADDING, (front, 0), value=True)


@dataclass(frozen=True)
class Signal:
    """One number a slot and step: `compute(view, memory) -> (B,) float32`, to be called once a step.

    `direction` is 1 where larger means readier to halt and -1 where smaller does, so that `score` is always
    larger = readier. `sees` says what the view must show, `unit` what a threshold is measured in.
    """

    compute: Callable[[View, Memory], Tensor]
    direction: int
    unit: str
    sees: tuple[str, ...] = ()

    def score(self, view: View, memory: Memory) -> Tensor:
        """(B,) float32, larger = readier to halt."""
        return self.direction * self.compute(view, memory)


def _unchanged(view: View, memory: Memory) -> Tensor:
    held = memory.recall("unchanged", view.steps, 0.0)
    count = unchanged_for(view.logits.argmax(-1), view.previous_answer, free_cells(view), view.steps, held)
    memory.keep("unchanged", count)
    return count


def _second_order(view: View, memory: Memory) -> Tensor:
    size = step_size(view.z_H, view.previous_z_H, used_positions(view))
    before = memory.recall("step_size", view.steps, 0.0)
    memory.keep("step_size", size)
    return change_of_step(size, before)


def _of_cells(function: Callable[[Tensor], Tensor], pool: Callable[..., Tensor], settled: float):
    return lambda view, memory: pool(function(view.logits), free_cells(view), settled)


def _of_states(function: Callable[..., Tensor]):
    return lambda view, memory: function(view.z_H, view.previous_z_H, used_positions(view))


def _kl(view: View, memory: Memory) -> Tensor:
    return cell_mean(cell_kl(view.logits, view.previous_logits), free_cells(view), 0.0)


#: Signals by name: all of them can be computed, and calibrated, in one pass over the segments.
SIGNALS: dict[str, Signal] = {
    "confidence": Signal(_of_cells(top_probability, cell_mean, 1.0), 1, "probability"),
    "confidence_min": Signal(_of_cells(top_probability, cell_min, 1.0), 1, "probability"),
    "entropy": Signal(_of_cells(cell_entropy, cell_mean, 0.0), -1, "nats"),
    "margin": Signal(_of_cells(top_margin, cell_mean, 1.0), 1, "probability"),
    "stability": Signal(_unchanged, 1, "segments", ("previous_answer",)),
    "residual": Signal(_of_states(step_size), -1, "share of |z_H|", ("previous_z_H",)),
    "residual_max": Signal(_of_states(largest_step), -1, "share of max |z_H|", ("previous_z_H",)),
    "cosine": Signal(_of_states(cosine_similarity), 1, "cosine", ("previous_z_H",)),
    "kl": Signal(_kl, -1, "nats", ("previous_logits",)),
    "second_order": Signal(_second_order, -1, "share of |z_H|", ("previous_z_H",)),
}
