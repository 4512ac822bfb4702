"""Training updates replayed as one CUDA graph: no work for the host but to start it.

An update, as `Trainer` runs it, ends with the segment whose losses the next update takes, so the gradient's graph is
alive between two updates. Replayed updates are therefore turned round: first the segment, then what is learned from it.

    Trainer:   learn 1 | segment 2, learn 2 | segment 3, learn 3 | ...          (the bars: nothing carries gradient)

Between the bars a few tensors are all that goes on from one update to the next (`Trainer.carried`). They get fixed
addresses; a graph reads them there, runs the update and writes them back. Random numbers need no care: they are
functions of keys, which are carried as well (`hrm_rl.rng`). What is left to the host: the learning rate (written to the
device before a replay), the optimisers that cannot be captured (all but AdamW), the running average, and the counters.
Updates that are logged, and the ones right before them, are run in the ordinary way.

Off a GPU there is nothing to capture. The same class then runs the same body at every "replay" (a rehearsal), which is
how the tests see on a CPU that the turned updates give the numbers of the ordinary ones, from fixed addresses.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from hrm_rl.errors import UserError
from hrm_rl.optim import is_capturable

if TYPE_CHECKING:
    from hrm_rl.trainer import Trainer

WARM_UP = 5  # ordinary updates before a capture: compiling, the optimisers' state, the first of everything


def check(trainer: Trainer) -> None:
    """UserError where updates of this trainer cannot be replayed, saying why."""
    core = getattr(trainer.core, "config", None)
    reason = ""
    if trainer.device.type != "cuda":
        reason = f"it needs a GPU, not {trainer.device.type}"
    elif trainer.ranks.world > 1:
        reason = "it replays one process, not several ranks"
    elif not trainer.agent.capturable:
        reason = f"agent {type(trainer.agent).__name__} decides on the host (its class does not say capturable = True)"
    elif getattr(core, "gradient", "") == "implicit":
        reason = "a solver's steps depend on its numbers (core.gradient=implicit)"
    if reason:
        raise UserError(f"cuda_graph=on: {reason}")


class Replayed:
    """Runs the updates of a trainer from a graph where it can.

    Attributes: pending (whether the segment after the last update is still to be run), replays (updates replayed).
    """

    def __init__(self, trainer: Trainer):
        self.trainer = trainer
        self.pending = False
        self.replays = 0
        self._warm = 0  # ordinary updates since the last capture was thrown away
        self._held: list[Tensor] | None = None  # what is carried, at its fixed addresses
        self._form: _Form | None = None
        self._graph: torch.cuda.CUDAGraph | None = None
        self._gradients: list[Tensor | None] = []  # where a replay leaves them
        self._inside = [o for o in trainer.optimizers if is_capturable(o)]
        self._outside = [o for o in trainer.optimizers if not is_capturable(o)]
        self._stream = torch.cuda.Stream(trainer.device) if trainer.device.type == "cuda" else None

    def update(self, detailed: bool, before_detailed: bool) -> dict[str, float]:
        """As `Trainer.update`, but for the segment at its end, which `settle` or the next update runs."""
        with self.on_stream():
            # A line takes the sums away: what is carried has its form again after one more ordinary update.
            whole = self._held is not None or bool(self.trainer.sums.values)
            if detailed or before_detailed or not self.pending or self._warm < WARM_UP or not whole:
                return self._ordinary(detailed, before_detailed)
            if self._held is None:
                self._capture()
            self._replay()
            return {}

    def settle(self) -> None:
        """Run the segment that is still to be run: from here on the trainer is where ordinary updates leave it."""
        if self.pending:
            with self.on_stream():
                self.trainer.next_segment()
            self.pending = False

    @contextlib.contextmanager
    def on_stream(self) -> Iterator[None]:
        """Where all of it runs, also what is not replayed: a backward pass runs on its forward pass's stream."""
        if self._stream is None:
            yield
            return
        before = torch.cuda.current_stream(self.trainer.device)
        self._stream.wait_stream(before)
        with torch.cuda.stream(self._stream):
            yield
        before.wait_stream(self._stream)

    # --- in the ordinary way ------------------------------------------------------------------------------------

    def _ordinary(self, detailed: bool, before_detailed: bool) -> dict[str, float]:
        t = self.trainer
        if self.pending:
            t.next_segment()
        t.before_update()
        details = t.learn(detailed, before_detailed)
        for optimizer in t.optimizers:
            optimizer.step()
        t.after_update()
        self.pending, self._warm = True, self._warm + 1
        if self._held is not None:
            self._into_place()
        return details

    @torch.no_grad()
    def _into_place(self) -> None:
        """Write what is carried now to the fixed addresses; where it has another form, a new capture is due."""
        leaves, form = _taken_apart(self.trainer.carried())
        if form != self._form:
            self._held, self._graph, self._warm = None, None, 0
            return
        _write(self._held, leaves)
        self.trainer.carry_on(_put_together(self._held, form))

    # --- replayed -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _capture(self) -> None:
        t = self.trainer
        leaves, self._form = _taken_apart(t.carried())
        self._held = [leaf.clone() for leaf in leaves]
        t.carry_on(_put_together(self._held, self._form))
        if self._stream is None:
            return
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, stream=self._stream):  # recorded, not run
            self._body()
        self._gradients = [p.grad for p in t.trained.values()]

    def _body(self) -> None:
        """Segment, decision, losses, gradients, and the steps of what can be captured; back to the fixed addresses."""
        t = self.trainer
        with torch.enable_grad():
            t.next_segment()
            t.learn()
        for optimizer in self._inside:
            optimizer.step()
        with torch.no_grad():
            leaves, form = _taken_apart(t.carried())
            if form != self._form:
                raise RuntimeError(f"what an update carries has changed: {self._form} has become {form}")
            _write(self._held, leaves)
            t.carry_on(_put_together(self._held, form))

    def _replay(self) -> None:
        t = self.trainer
        if not t.sums.values:  # they were read, and begin anew
            t.sums.values = _put_together(self._held, self._form)["sums"]
            torch._foreach_zero_(list(t.sums.values.values()))
        t.before_update()
        if self._graph is None:
            self._body()
        else:
            self._graph.replay()
            for parameter, gradient in zip(t.trained.values(), self._gradients, strict=True):
                parameter.grad = gradient
        for optimizer in self._outside:
            optimizer.step()
        t.after_update()
        self.replays += 1


class _Form(NamedTuple):
    """How tensors are held together."""

    spec: pytree.TreeSpec
    there: tuple[bool, ...]  # False for a None among the leaves


def _taken_apart(carried: dict) -> tuple[list[Tensor], _Form]:
    leaves, spec = pytree.tree_flatten(carried)
    there = tuple(leaf is not None for leaf in leaves)
    return [leaf for leaf in leaves if leaf is not None], _Form(spec, there)


def _put_together(tensors: list[Tensor], form: _Form) -> dict:
    left = iter(tensors)
    return pytree.tree_unflatten([next(left) if there else None for there in form.there], form.spec)


def _write(places: list[Tensor], values: list[Tensor]) -> None:
    """Each value to its place. A value may live in another's place: it is read before anything is written."""
    own = {place.untyped_storage().data_ptr() for place in places}
    values = [
        value.clone() if value is not place and value.untyped_storage().data_ptr() in own else value
        for place, value in zip(places, values, strict=True)
    ]
    for place, value in zip(places, values, strict=True):
        if value is not place:
            place.copy_(value)
