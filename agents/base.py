"""What a halting agent is: it sees one batch of slots after a segment and says HALT or CONTINUE.

B slots, T = P + S positions, D hidden size, S tokens, V token values. docs/PLUGINS.md shows complete agents.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from agents.checks import check_score
from agents.memory import Memory
from agents.q_targets import QLosses
from envs.actions import CONTINUE, HALT
from envs.previous import Previous
from hrm_rl import rng
from hrm_rl.errors import UserError, nearest

if TYPE_CHECKING:
    from envs.slots import Slots

#: What an agent may ask for by `HaltingAgent.sees`; what it does not ask for is None in its View.
SEES: tuple[str, ...] = (*Previous._fields, "is_correct")


class View(NamedTuple):
    """All that an agent may look at when it decides. Never the answer (but for `is_correct`, see there)."""

    z_H: Tensor  # (B, T, D) high-level state after segment m; carries gradient in training
    logits: Tensor  # (B, S, V) scores of every token value, no gradient
    steps: Tensor  # (B,) int64, m: segments run in this episode, this one included; 1 is the first
    valid: Tensor  # (B,) bool, False for a padded slot
    key: Tensor  # (B,) int64, random key of the episode (hrm_rl.rng)
    tokens: Tensor | None = None  # (B, S) int64, the puzzle: 0 padding; Sudoku: 1 blank, digit d = d + 1
    previous_z_H: Tensor | None = None  # (B, T, D) after segment m - 1; at step 1 the core's initial state
    previous_answer: Tensor | None = None  # (B, S) int64 of segment m - 1; at step 1 all 0 (padding): none yet
    previous_logits: Tensor | None = None  # (B, S, V) float32 of segment m - 1; at step 1 all 0: uniform
    is_correct: Tensor | None = None  # (B,) bool, the oracle's channel: only evaluation fills it, training refuses
    free: Tensor | None = None  # (B, S) bool, cells whose answer the puzzle leaves open; None: those of token 1


class Transition(NamedTuple):
    """The one batch between rollout and learning: a decision and what came of it."""

    view: View
    q_logits: Tensor | None  # (B, 2) what the agent scored, with gradient; None for agents that do not score
    actions: Tensor  # (B,) int64, HALT or CONTINUE
    is_correct: Tensor  # (B,) bool, whether the whole answer is right at this segment
    next_z_H: Tensor | None  # (B, T, D) of the segment bootstrapped from, no gradient; None without bootstrap
    ended: Tensor  # (B,) bool, whether the episode ended here (a wish to go on past max_steps included)
    supervised: Tensor | None = None  # (B,) float32, each puzzle's supervised loss here, no gradient; None where the
    # core is not trained, and in the delayed transitions of bootstrap=next_observation
    looked: Tensor | None = None  # (B,) bool, slots that halt and whose next_z_H is of their own puzzle all the same;
    # None but with bootstrap=shared_prefix_all


class AgentLoss(NamedTuple):
    """What `loss` returns for an agent that is no Q-learner."""

    total: Tensor  # () with gradient: added to the run's loss as it is (sum over slots / B is the usual scale)
    parts: dict[str, Tensor]  # () each, what it is made of; logged as agent/NAME


class HaltingAgent(nn.Module):
    """Base of all agents: fixed rules, thresholds, learned ones. The least one defines is `score` or `act`.

    A subclass may take `core`, `max_steps` and `bootstrap` in its constructor; whoever builds it passes those it
    names. All else in the signature is a flag of the command line (`--agent.NAME value`).

    Args:
        max_steps: The budget: `act` halts there whatever the score. None leaves that to the environment.
        threshold: Halt where the score reaches this; None takes the class's own.
    """

    #: Whether the agent learns (has a `loss`).
    learns = False
    #: Whether `loss` reads `Transition.next_z_H`: the trainer gets it as `bootstrap` says. False saves that.
    bootstraps = True
    #: Whether `act` and `loss` are tensors from end to end (all they keep is in `memory`, nothing is read or counted by
    #: the host), so that updates can be replayed as a CUDA graph.
    capturable = False
    #: What it needs to see beside the rest, of `SEES`; callers carry only what is asked for.
    sees: tuple[str, ...] = ()
    #: Halt where score >= threshold (score > threshold where `strict`).
    threshold: float = 0.0
    strict = False
    max_steps: int | None = None
    #: (B,) what `score` gave in the latest `act`; None for agents without a score.
    last_score: Tensor | None = None

    def __init__(self, max_steps: int | None = None, threshold: float | None = None):
        super().__init__()
        self.max_steps = max_steps
        if threshold is not None:
            self.threshold = threshold
        self.memory = Memory()

    @classmethod
    def can_be_calibrated(cls) -> bool:
        """Whether the agent is a score and a threshold, so that the threshold can be set from data."""
        return cls.score is not HaltingAgent.score

    def scores(self, z_H: Tensor) -> Tensor | None:
        """(B, T, D) -> q_logits (B, 2) in the order (HALT, CONTINUE), or None for an agent without values."""
        return None

    def score(self, view: View) -> Tensor:
        """(B,) float32, larger = readier to halt. Called once a step; must not look at `threshold` or `max_steps`."""
        raise UserError(f"agent {type(self).__name__} defines no act() and no score()")

    def halts(self, view: View, score: Tensor) -> Tensor:
        """(B,) bool: the score (B,) is over the threshold, or the budget is spent."""
        over = score > self.threshold if self.strict else score >= self.threshold
        return over if self.max_steps is None else over | (view.steps >= self.max_steps)

    @torch.no_grad()
    def act(self, view: View, q_logits: Tensor | None = None, explore: bool = False) -> Tensor:
        """(B,) int64 of HALT and CONTINUE, once a step. `q_logits` saves a second pass where the caller has them.

        `explore` is true in training only; an agent that explores draws from `view.key` (hrm_rl.rng).
        """
        self.last_score = check_score(view, self.score(view))
        return torch.where(self.halts(view, self.last_score), HALT, CONTINUE)

    def loss(self, transition: Transition) -> QLosses | AgentLoss:
        """Losses of a decision; only agents with `learns` have one."""
        why = "sets learns = True but defines no loss()" if self.learns else "does not learn"
        raise UserError(f"agent {type(self).__name__} {why}")

    # --- memory ---------------------------------------------------------------------------------------------

    def recall(self, name: str, view: View, fresh: Tensor | float) -> Tensor:
        """What was kept under `name` at the last step; see `Memory.recall`."""
        return self.memory.recall(name, view.steps, fresh)

    def keep(self, name: str, value: Tensor) -> None:
        """Keep a tensor (B, ...) until the next step; see `Memory.keep`."""
        self.memory.keep(name, value)

    @contextlib.contextmanager
    def fresh_memory(self) -> Iterator[None]:
        """An empty memory for a while (another set of slots), then the old one again."""
        held, self.memory = self.memory, Memory()
        try:
            yield
        finally:
            self.memory = held


def view_of(slots: Slots, z_H: Tensor | None = None, open_token: int = 1) -> View:
    """What an agent sees of an environment's slots. `z_H` replaces theirs (a detached one).

    open_token: what stands in a puzzle where the answer is not given (`hrm_rl.tasks.Task`)."""
    return View(
        slots.z_H if z_H is None else z_H, slots.logits.detach(), slots.steps, slots.valid,
        rng.fold(slots.key, slots.episode), slots.tokens, slots.previous_z_H, slots.previous_answer,
        slots.previous_logits, free=None if open_token == 1 else slots.tokens == open_token,
    )  # fmt: skip


def check_sees(agent: type[HaltingAgent]) -> None:
    """UserError unless `sees` is a tuple of names that a View can show."""
    if isinstance(agent.sees, str) or any(name not in SEES for name in agent.sees):
        names = (agent.sees,) if isinstance(agent.sees, str) else agent.sees
        wrong = next((name for name in names if name not in SEES), None)
        hint = nearest(str(wrong), SEES) if wrong else "; a tuple is needed, as in sees = ('previous_z_H',)"
        raise UserError(f"agent {agent.__name__}: sees = {agent.sees!r}, may name {', '.join(SEES)}{hint}")
