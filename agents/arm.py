"""One arm of a study: every switch of the Q-learner, with the default that is HRM's own rule.

The same names are settings of the learners on recordings (`study/learners.py`) and arguments of the agent of live runs
(`agents/q_variant.py`).
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from hrm_rl.errors import UserError
from hrm_rl.settings import check_settings


@dataclass(frozen=True)
class Arm:
    """Every switch of a Q-learner for halting. The defaults are HRM's rule: no target network, no replay.

    Args:
        target: Weights that value the next segment: none (today's), polyak (a running average, tau), hard (a copy made
            every `period` updates), last_layer (today's features under such a copy of the last linear layer,
            iS-QL, arXiv:2506.04398; the same as hard where the head is linear).
        tau: Share of today's weights that the running average takes at each update (target=polyak).
        period: Updates between two copies (target=hard, last_layer).
        replay: What an update learns from: none (the slots' present transitions), fifo (drawn from the last
            `replay_size` transitions), uniform (drawn from all transitions there are, whatever was visited).
        replay_size: Transitions that are kept (replay=fifo).
        backup: Value of CONTINUE: max (HRM), double (two heads, each valued by the other: van Hasselt, 2010), sarsa,
            mc (the episode's own return), lambda (the lambda-return, arXiv:2407.04811).
        lam: Weight of the longer return (backup=lambda).
        loss: bce (on logits, HRM), mse_values (squared error of sigmoid(q_logits)), mse_logits (the logits are the
            values, without bound, as in DQN).
        head: linear (HRM), or mlp: one hidden layer of `head_width`, normalised as `head_norm` says, SiLU.
        head_width: Width of the hidden layer.
        head_norm: Norm of the hidden layer before its nonlinearity: none, rmsnorm, layernorm. A linear head has it on
            its input.
        optimizer: adamw, adam (decay in the gradient), sgd, adam_atan2 (a = b = 1, decoupled decay).
        lr: Learning rate, constant.
        weight_decay: Weight decay.
        num_envs: Slots that run side by side: the batch size.
        epsilon: Probability of an exploration floor (HRM's M_min).
        exploration: Draw the floor at every step (the released code) or once an episode (the paper).
        gamma: Discount of each segment.
        ponder_cost: Price of every CONTINUE, in the targets.
        q_bias: Where both outputs start.
    """

    target: Literal["none", "polyak", "hard", "last_layer"] = "none"
    tau: float = 0.01
    period: int = 100
    replay: Literal["none", "fifo", "uniform"] = "none"
    replay_size: int = 10_000
    backup: Literal["max", "double", "sarsa", "mc", "lambda"] = "max"
    lam: float = 0.65
    loss: Literal["bce", "mse_values", "mse_logits"] = "bce"
    head: Literal["linear", "mlp"] = "linear"
    head_width: int = 128
    head_norm: Literal["none", "rmsnorm", "layernorm"] = "none"
    optimizer: Literal["adamw", "adam", "sgd", "adam_atan2"] = "adamw"
    lr: float = 1e-3
    weight_decay: float = 0.1
    num_envs: int = 32
    epsilon: float = 0.1
    exploration: Literal["per_step", "per_episode"] = "per_step"
    gamma: float = 1.0
    ponder_cost: float = 0.0
    q_bias: float = -5.0

    def __post_init__(self) -> None:
        ranges = {
            "tau": (0, 1), "period": (1, 1 << 30), "replay_size": (1, 1 << 26), "lam": (0, 1),
            "head_width": (1, 1 << 14), "lr": (0, 1e6), "weight_decay": (0, 1e6), "num_envs": (1, 1 << 16),
            "epsilon": (0, 1), "gamma": (0, 1), "ponder_cost": (0, 1), "q_bias": (-1e6, 1e6),
        }  # fmt: skip
        for name, (low, high) in ranges.items():
            value = getattr(self, name)
            if not (low <= value <= high and math.isfinite(value)):  # so that NaN is out as well
                raise UserError(f"{name} must be between {low:g} and {high:g}, not {value}")

    @classmethod
    def from_values(cls, values: dict[str, Any]) -> Arm:
        """From plain values as YAML gives them. UserError names an unknown field or value and the valid ones."""
        check_settings(cls, values, "arm")
        return cls(**{n: float(v) if isinstance(getattr(cls, n), float) else v for n, v in values.items()})

    def changes(self) -> dict[str, Any]:
        """The fields that differ from the defaults, in their order."""
        return {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}

    def to_values(self) -> dict[str, Any]:
        """Plain values of all fields; `from_values` reads them back."""
        return asdict(self)
