"""How much arithmetic HRM is: the matrix products of a segment and of a training update, counted by hand.

A product of (m, k) with (k, n) is 2 m k n floating-point operations; nothing else is counted (norms, rotations,
softmax, losses and the optimiser are a per cent or two, and a figure of utilisation should not be flattered by
them). Work done twice to save memory, as attention's backward pass does, counts once. Tests hold these functions
against `torch.utils.flop_counter.FlopCounterMode`.

Letters: B slots, P prefix positions, S tokens, T = P + S, D hidden size, V token values. All counts are for one
slot; a sample is one slot's segment in one training update.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from hrm_rl.core.config import CoreConfig
from hrm_rl.core.layers import swiglu_width


@dataclass(frozen=True)
class SegmentFlops:
    """The parts of one segment of one slot, forward."""

    prefix: int  # every call of f_L and f_H but the last of each
    tail: int  # the last call of each, and the output head

    @property
    def forward(self) -> int:
        return self.prefix + self.tail


def block_flops(config: CoreConfig) -> int:
    """One block on one slot: token mixing and the position-wise SwiGLU."""
    D, T = config.hidden_size, config.prefix_len + config.seq_len
    return _mixing_flops(config, D, T) + _swiglu_flops(T, D, swiglu_width(D, config.expansion, config.inner_multiple))


def _mixing_flops(config: CoreConfig, D: int, T: int) -> int:
    if config.token_mixing == "attention":
        return 2 * T * D * 4 * D + 2 * 2 * T * T * D  # q, k, v, o; scores and their mixture
    if config.token_mixing == "mlp":
        return _swiglu_flops(D, T, swiglu_width(T, config.expansion, config.inner_multiple))
    return 2 * T * D * 2 * D + 2 * T * T * D  # v, o; the mixture


def _swiglu_flops(rows: int, width: int, inner: int) -> int:
    """gate and up (width -> 2 inner), then down (inner -> width), on `rows` rows."""
    return 2 * rows * 3 * width * inner


def segment_flops(config: CoreConfig) -> SegmentFlops:
    """One segment: N T calls of f_L and N of f_H, the last of each in the tail with the output head."""
    block, T = block_flops(config), config.prefix_len + config.seq_len
    L, H = config.L_layers * block, config.H_layers * block
    calls_L, calls_H = config.H_cycles * config.L_cycles, config.H_cycles
    head = 2 * T * config.hidden_size * config.vocab_size
    return SegmentFlops(prefix=(calls_L - 1) * L + (calls_H - 1) * H, tail=L + H + head)


@dataclass(frozen=True)
class UpdateFlops:
    """The parts of one training update, for one slot."""

    segment: int  # the segment itself, forward
    ahead: int  # what the bootstrap target costs on top of it
    backward: int  # through the tail (the 1-step gradient); 0 where the core is frozen
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
    "extra_forward": ("prefix", "tail"), "shared_prefix": ("tail",), "next_observation": (), "none": (),
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
