"""The engine behind both forms of the environment: B slots, each with a puzzle in work.

Source: the carry and the halting rule of HRM (arXiv:2506.21734, ACT section), seen as a decision process.
Letters: B slots, S tokens, V token values, P prefix positions, D hidden size.

Everything is a tensor on one device and every choice is a `torch.where`, so a step never waits for the
device. What slot i works on in its episode e is a pure function of (key of the slot, e): nothing depends on
how many slots there are, and a checkpoint holds no generator.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import NamedTuple

import torch
from torch import Tensor, nn

from envs.actions import HALT
from envs.previous import Previous, choose
from hrm_rl import rng
from hrm_rl.core.base import CoreOutput, State
from hrm_rl.errors import UserError
from hrm_rl.tasks import PuzzleSet, get_task
from hrm_rl.tasks.reveal import reveal

IGNORE_LABEL = -100  # label of a cell that is not scored (padding)
_DRAW_PUZZLE, _DRAW_SYMMETRY, _DRAW_GIVENS = 1, 2, 3  # what a slot's key is folded with for each purpose


class Start(NamedTuple):
    """Slots as the tail of a segment finds them: everything but the answer."""

    tokens: Tensor  # (B, S) int64, the puzzle as the core sees it
    labels: Tensor  # (B, S) int64, the right answer; IGNORE_LABEL where a cell is padding
    z_H: Tensor  # (B, P + S, D)
    z_L: Tensor  # (B, P + S, D)
    steps: Tensor  # (B,) int64, segments run in this episode, the coming one included
    valid: Tensor  # (B,) bool, False where the whole row is padding
    puzzle: Tensor  # (B,) int64, index into the puzzle set
    episode: Tensor  # (B,) int64, episodes this slot has begun before this one
    key: Tensor  # (B,) int64, the slot's random key
    previous_z_H: Tensor | None = None  # what the segment before left (envs.previous); None unless carried
    previous_answer: Tensor | None = None
    previous_logits: Tensor | None = None


class Slots(NamedTuple):
    """Slots after a segment. In torch mode z_H, z_L and logits carry the gradient of this segment alone."""

    tokens: Tensor  # (B, S) int64, the puzzle as the core sees it
    labels: Tensor  # (B, S) int64, the right answer; IGNORE_LABEL where a cell is padding
    z_H: Tensor  # (B, P + S, D), what an agent observes
    z_L: Tensor  # (B, P + S, D)
    steps: Tensor  # (B,) int64, segments run in this episode, this one included
    valid: Tensor  # (B,) bool, False where the whole row is padding
    puzzle: Tensor  # (B,) int64, index into the puzzle set
    episode: Tensor  # (B,) int64, episodes this slot has begun before this one
    key: Tensor  # (B,) int64, the slot's random key
    previous_z_H: Tensor | None  # what the segment before left (envs.previous); None unless carried
    previous_answer: Tensor | None
    previous_logits: Tensor | None
    logits: Tensor  # (B, S, V), scores of every token value
    is_correct: Tensor  # (B,) bool, every scored cell right (never true for a row of padding)
    token_accuracy: Tensor  # (B,) float64, share of the scored cells that are right


class Verdict(NamedTuple):
    """What the actions earn in the segment they are taken in."""

    reward: Tensor  # (B,) float64
    terminated: Tensor  # (B,) bool
    forced_halt: Tensor  # (B,) bool, ended by the budget against the action


class SlotEngine:
    """Runs B slots through one core; the environments are thin faces of it.

    Args:
        puzzles: What the slots draw from, uniformly and with replacement.
        core: A `hrm_rl.core.Core` on `device`.
        num_slots: B.
        max_steps: Segments an episode may run (M_max).
        ponder_cost: Paid for every further segment.
        augment: Show each puzzle in a random symmetry.
        clues: (low, high): show more of the answer until a puzzle has a number of givens drawn from this range.
        device: Where everything lives.
        differentiable: Run the tail of each segment with gradient, where the caller has gradient enabled.

    Attributes:
        run_prefix: (tokens, State) -> State, the part of a segment without gradient.
        run_tail: (tokens, State) -> CoreOutput, the rest of it. A trainer may put compiled functions in both
            places. A core without `prefix` and `tail` (or one compiled as a whole) is all tail.
        carries: Fields of `Previous` that the slots carry from segment to segment (`carry`); none by default.
    """

    run_prefix: Callable[[Tensor, State], State]
    run_tail: Callable[[Tensor, State], CoreOutput]

    def __init__(
        self, puzzles: PuzzleSet, core: nn.Module, num_slots: int, *, max_steps: int,
        ponder_cost: float = 0.0, augment: bool = True, clues: tuple[int, int] | None = None,
        device: str | torch.device = "cpu", differentiable: bool = False,
    ):  # fmt: skip
        self.puzzles = puzzles.to(device)
        self.task = get_task(puzzles.task, puzzles.side)
        self.core = core
        self.num_slots = num_slots
        self.max_steps = max_steps
        self.ponder_cost = float(ponder_cost)
        self.augment = augment
        self.device = torch.device(device)
        self.differentiable = differentiable
        compiled = hasattr(core, "_orig_mod")  # its `prefix` would be the uncompiled one
        if hasattr(core, "prefix") and hasattr(core, "tail") and not compiled:
            self.run_prefix, self.run_tail = core.prefix, core.tail
        else:
            self.run_prefix, self.run_tail = _no_prefix, core
        # As tensors, because a Python number sent to the device on every step would wait for it.
        self._purposes = torch.tensor([[_DRAW_PUZZLE], [_DRAW_SYMMETRY], [_DRAW_GIVENS]], device=self.device)
        self.carries: tuple[str, ...] = ()
        self._clues: Tensor | None = None
        if clues is not None:
            self.set_clues(*clues)
        self._start: Start | None = None
        self._slots: Slots | None = None
        self._ahead: tuple[Tensor, Start] | None = None  # what `lookahead` has prepared, and for which actions

    def carry(self, names: Collection[str]) -> None:
        """From the next `reset` on, carry what the segment before left: names of fields of `Previous`."""
        self.carries = tuple(name for name in Previous._fields if name in names)

    def set_clues(self, low: int, high: int) -> None:
        """From the next episode on, show puzzles with `low` to `high` givens (those with more stay as they are).

        UserError where the task has no givens to show more of."""
        if not self.task.reveals:
            raise UserError(f"clues: the task {self.puzzles.task} has no givens to show more of")
        always = self.task.seq_len - self.task.cells  # tokens that no puzzle leaves open
        if self._clues is None:
            self._clues = torch.zeros(2, dtype=torch.int64, device=self.device)
        self._clues[0].fill_(low + always)
        self._clues[1].fill_(high + always)

    @property
    def slots(self) -> Slots:
        """The slots after the latest segment. RuntimeError before the first `reset`."""
        if self._slots is None:
            raise RuntimeError("the slots are empty: call reset() first")
        return self._slots

    def reset(self, key: Tensor | None = None, puzzle: Tensor | None = None, augment: bool | None = None) -> Slots:
        """Begin a new episode in every slot and run its first segment.

        key (B,) int64: new keys, counting episodes from 0 again; None keeps the keys and goes on to the next
        episode. puzzle (B,) int64 picks the puzzles instead of drawing them; augment overrides the
        engine's for these episodes only.
        """
        if key is None:
            key, episode = self.slots.key, self.slots.episode + 1
        else:
            episode = torch.zeros_like(key)
        with torch.no_grad():
            start = self._draw(key, episode, puzzle, self.augment if augment is None else augment)
            # Copied out, so that a compiled core sees the same strides here and in `advance`.
            start = start._replace(z_H=start.z_H.contiguous(), z_L=start.z_L.contiguous())
        return self._enter(self._prefix(start))

    def verdict(self, actions: Tensor) -> Verdict:
        """What actions (B,) of HALT and CONTINUE earn now. Runs no segment and changes nothing.

        CONTINUE at the budget counts as HALT: the answer is scored, so it is a termination.
        """
        slots = self.slots
        halts, at_limit = actions == HALT, slots.steps >= self.max_steps
        ended = halts | at_limit
        reward = torch.where(ended, slots.is_correct.double(), 0.0 - self.ponder_cost)
        return Verdict(reward, ended, at_limit & ~halts)

    def advance(self, actions: Tensor) -> Verdict:
        """Run one segment in every slot: the next one where the episode goes on, the first one of a new
        puzzle where it has ended. One call of the core.

        After `lookahead` it must be handed the very same tensor (RuntimeError otherwise) and runs the tail
        of the prepared segment only.
        """
        verdict = self.verdict(actions)
        if self._ahead is None:
            start = self._prefix(self._following(actions))
        else:
            looked_at, start = self._ahead
            if looked_at is not actions:
                raise RuntimeError("advance() needs the very tensor of actions that lookahead() was given")
        self._enter(start)
        return verdict

    def lookahead(self, actions: Tensor) -> Slots:
        """The slots that `advance(actions)` is about to return, without gradient; nothing moves.

        The part of the segment without gradient is kept for that `advance`. If the weights change in
        between, its prefix is one update old and its tail is not.
        """
        start = self._prefix(self._following(actions))
        self._ahead = actions, start
        with torch.no_grad():
            return self._tail(start)

    def held(self) -> tuple[Slots, Start | None]:
        """(slots, what `lookahead` has prepared), without gradient: all that the next `advance` reads."""
        slots = Slots(*(None if value is None else value.detach() for value in self.slots))
        return slots, None if self._ahead is None else self._ahead[1]

    def hold(self, slots: Slots, ahead: Start | None, actions: Tensor) -> None:
        """Go on from `held`, or from tensors like it; `actions` (B,): what `advance` will be handed.

        Until then there is no state to save.
        """
        self._slots, self._start = slots, None
        self._ahead = None if ahead is None else (actions, ahead)

    def state_dict(self) -> dict[str, Tensor | str]:
        """Everything the engine needs to go on exactly; take it between `advance` and `lookahead`.

        The state is the one the tail of the current segment started from, so that loading brings back the
        gradient too.
        """
        if self._ahead is not None:
            raise RuntimeError("state_dict() between lookahead() and advance() loses the prepared segment")
        if self._start is None:
            raise RuntimeError("the slots are empty: call reset() first")
        held = {name: value for name, value in self._start._asdict().items() if value is not None}
        tensors = {name: value.detach().clone() for name, value in held.items()}
        return {"puzzles": self.puzzles.sha256} | tensors

    def load_state_dict(self, state: dict[str, Tensor | str]) -> None:
        """Restore `state_dict()` and run the tail of its segment. Load the weights of the core first.

        Raises UserError if the state belongs to other puzzles or another number of slots.
        """
        fields = [name for name in Start._fields if name not in Previous._fields or name in self.carries]
        names = {"puzzles", *fields}
        if set(state) != names:
            raise UserError(f"state of the slots: has the fields {sorted(state)}, expected {sorted(names)}")
        if state["puzzles"] != self.puzzles.sha256:
            raise UserError(f"state of the slots: it was saved with other puzzles than {self.puzzles.name}")
        start = Start(**{name: state[name].to(self.device) for name in fields})
        expected = self.num_slots, self.puzzles.seq_len, self.core.num_positions, self.core.hidden_size
        held = *start.tokens.shape, *start.z_H.shape[1:]
        if held != expected:
            raise UserError(f"state of the slots: (slots, tokens, positions, width) {held}, expected {expected}")
        self._enter(start)

    def _enter(self, start: Start) -> Slots:
        with torch.set_grad_enabled(self.differentiable and torch.is_grad_enabled()):
            self._slots = self._tail(start)
        self._start, self._ahead = start, None
        return self._slots

    def _draw(self, key: Tensor, episode: Tensor, puzzle: Tensor | None, augment: bool) -> Start:
        """Fresh slots in their initial state. key, episode, puzzle: (B,) int64."""
        of_puzzle, of_symmetry, of_givens = rng.fold(rng.fold(key, episode), self._purposes)
        if puzzle is None:
            puzzle = rng.integers(of_puzzle, len(self.puzzles))
        tokens, answers = self.puzzles.questions[puzzle].long(), self.puzzles.answers[puzzle].long()
        if augment:
            tokens, answers = self.task.augment(of_symmetry, tokens, answers)
        if self._clues is not None:
            tokens = reveal(of_givens, tokens, answers, *self._clues, blank=self.task.open_token)
        padding = answers == 0
        labels = answers.masked_fill(padding, IGNORE_LABEL)
        z_H, z_L = self.core.initial_state(self.num_slots)  # expanded views, not copies
        previous = Previous.none_yet(self.carries, z_H, tokens, self.puzzles.vocab_size)
        return Start(tokens, labels, z_H, z_L, torch.ones_like(key), ~padding.all(-1), puzzle, episode, key, *previous)

    @torch.no_grad()
    def _following(self, actions: Tensor) -> Start:
        """The slots as the next segment finds them: new puzzles where the episode ends with `actions`."""
        slots, ended = self.slots, self.verdict(actions).terminated
        fresh = self._draw(slots.key, slots.episode + 1, None, self.augment)
        previous = Previous.left_by(self.carries, slots.z_H, slots.logits)
        going_on = Start(*slots[: len(Start._fields)])._replace(steps=slots.steps + 1, **previous._asdict())
        return Start(*(choose(ended, new, old) for new, old in zip(fresh, going_on, strict=True)))

    @torch.no_grad()
    def _prefix(self, start: Start) -> Start:
        z_H, z_L = self.run_prefix(start.tokens, State(start.z_H, start.z_L))
        return start._replace(z_H=z_H, z_L=z_L)

    def _tail(self, start: Start) -> Slots:
        (z_H, z_L), logits = self.run_tail(start.tokens, State(start.z_H, start.z_L))
        scored = start.labels != IGNORE_LABEL
        right = ((logits.argmax(-1) == start.labels) & scored).sum(-1)
        cells = scored.sum(-1)
        answer = logits, (right == cells) & start.valid, right.double() / cells.clamp(min=1)
        return Slots(*start._replace(z_H=z_H, z_L=z_L), *answer)


def _no_prefix(tokens: Tensor, state: State) -> State:
    return state

