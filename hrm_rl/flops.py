"""How much arithmetic a core is: the matrix products of a segment and of a training update.

A product of (m, k) with (k, n) is 2 m k n floating-point operations; nothing else is counted (norms, rotations,
softmax, losses and the optimiser are a per cent or two, and a figure of utilisation should not be flattered by them).
Work done twice to save memory, as attention's backward pass does, counts once.

What one call of a core's networks takes is what `torch.utils.flop_counter.FlopCounterMode` sees in it on shapes alone,
so that every core is counted by the same rule; segments and updates are put together from calls by hand. Tests hold
the calls against arithmetic on paper, and segments and updates against the same counter over the real thing.

With core.gradient=implicit a segment is a solver, which calls the networks as often as its numbers ask for, forward and
backward: nothing is counted then, and whoever asks is refused.

Letters: B slots, P prefix positions, S tokens, T = P + S, D hidden size, V token values. All counts are for one slot;
a sample is one slot's segment in one training update.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from agents.q_targets import HALTED_SHARE
from hrm_rl.core import CoreConfig, build_core
from hrm_rl.errors import UserError


@dataclass(frozen=True)
class SegmentFlops:
    """The parts of one segment of one slot, forward."""

    prefix: int  # the calls without gradient: with the 1-step gradient, every one but the last of each network
    tail: int  # those with gradient, and the output head

    @property
    def forward(self) -> int:
        return self.prefix + self.tail


def countable(config: CoreConfig) -> bool:
    """Whether the calls of a segment are known without its numbers; all counts below raise UserError where not."""
    return config.gradient != "implicit"


def check_countable(config: CoreConfig) -> None:
    """UserError where `countable` says no."""
    if not countable(config):
        raise UserError("core.gradient=implicit: a solver runs the segment, whose calls depend on its numbers, so that "
                        "its arithmetic cannot be counted")  # fmt: skip


@lru_cache(maxsize=64)
def call_flops(config: CoreConfig) -> tuple[tuple[str, ...], dict[str, int], int]:
    """(the calls of a segment, what each name among them takes, how many of them run without gradient).

    Nothing is computed: the core is built of shapes, without values. UserError where they are not `countable`.
    """
    check_countable(config)
    with torch.device("meta"), torch.no_grad(), sdpa_kernel(SDPBackend.MATH):  # the form that the counter sees through
        core = build_core(replace(config, dtype="float32"))
        inputs = core.inputs(torch.zeros(1, config.seq_len, dtype=torch.long))
        taken = {}
        for which in dict.fromkeys(core.calls):
            with FlopCounterMode(display=False) as counter:
                core.call(which, *core.initial_state(1), inputs)
            taken[which] = counter.get_total_flops()
    return core.calls, taken, core.without_gradient


def segment_flops(config: CoreConfig) -> SegmentFlops:
    """One segment: its calls, those that carry gradient in the tail with the output head."""
    calls, taken, without = call_flops(config)
    head = 2 * (config.prefix_len + config.seq_len) * config.hidden_size * config.vocab_size
    prefix, tail = (sum(taken[which] for which in part) for part in (calls[:without], calls[without:]))
    return SegmentFlops(prefix, tail + head)


@dataclass(frozen=True)
class UpdateFlops:
    """The parts of one training update, for one slot."""

    segment: int  # the segment itself, forward
    ahead: int  # what the bootstrap target costs on top of it
    backward: int  # through the tail: twice as much again; 0 where the core is frozen
    q_head: int  # every call of the Q-head and its backward pass

    @property
    def total(self) -> int:
        return self.segment + self.ahead + self.backward + self.q_head


def update_flops(
    config: CoreConfig, bootstrap: str, objective: str = "joint", *, max_steps: int = 16, q_to_core: bool = True,
    has_q_head: bool = True,
) -> UpdateFlops:  # fmt: skip
    """One slot's share of `Trainer.update` in its steady state.

    objective: joint, supervised (the Q-head is read but not trained) or q (the core is frozen). has_q_head: whether
    the agent has one at all (FixedAgent does not). Raises ValueError for an unknown bootstrap or objective.
    """
    if bootstrap not in _AHEAD:
        raise ValueError(f"unknown bootstrap {bootstrap!r}; choose one of {', '.join(_AHEAD)}")
    if objective not in ("joint", "supervised", "q"):
        raise ValueError(f"unknown objective {objective!r}; choose joint, supervised or q")
    segment = segment_flops(config)
    learns_q, learns_core = has_q_head and objective != "supervised", objective != "q"
    looks_ahead = learns_q and (max_steps > 1 or bootstrap == "next_observation")
    ahead = sum(getattr(segment, part) for part in _AHEAD[bootstrap]) if looks_ahead else 0
    if bootstrap == "shared_prefix_all" and looks_ahead:
        ahead += segment.forward // HALTED_SHARE
    head = 2 * config.hidden_size * 2
    calls = int(has_q_head)  # the decision
    if learns_q:
        calls += 1  # the gradient of the head's weights
        # next_observation learns from the state of the decision before, which is scored again and has no gradient.
        calls += int(learns_core and q_to_core and bootstrap != "next_observation")  # the gradient of z_H
        calls += int(bootstrap == "next_observation")
        calls += int(looks_ahead and bootstrap != "none")  # the target
    return UpdateFlops(segment.forward, ahead, 2 * segment.tail if learns_core else 0, calls * head)


#: What each bootstrap mode runs beside the segment itself.
_AHEAD: dict[str, tuple[str, ...]] = {
    "extra_forward": ("prefix", "tail"), "shared_prefix": ("tail",), "shared_prefix_all": ("tail",),
    "next_observation": (), "none": (),
}  # fmt: skip


def published_flops(config: CoreConfig) -> int:
    """One sample of the released training step: the segment, one more for the target, and the backward pass."""
    return update_flops(config, "extra_forward").total


def muon_flops(shapes: Iterable[tuple[int, int]], steps: int = 5) -> int:
    """Newton-Schulz iterations of one Muon step over matrices (m, n), for the whole batch at once.

    Each iteration multiplies X X^T, its square, and the sum of both by X, with X the wide way round.
    """
    total = 0
    for shape in shapes:
        m, n = sorted(shape)
        total += steps * (2 * m * m * n + 2 * m**3 + 2 * m * m * n)
    return total
