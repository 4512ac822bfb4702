"""What an agent gives back is looked at in one place, for training and evaluation alike.

Shape, type and device are known to the host. Whether the values are sound is asked at once on a CPU; elsewhere
it is a number on the device that the caller reads when it waits for the device anyhow.
"""

from __future__ import annotations

import inspect
import traceback
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from envs.actions import CONTINUE, HALT
from hrm_rl.errors import NonFiniteError, UserError

if TYPE_CHECKING:
    from agents.base import HaltingAgent, View

_NAN, _ACTION = 1, 2  # what `decide` may find wrong with the values


class _BadOutput(UserError):
    """Says what was wrong and not yet where."""


def decide(
    agent: HaltingAgent, view: View, q_logits: Tensor | None = None, *, where: str, explore: bool = False
) -> tuple[Tensor, Tensor | None]:
    """(actions (B,) int64, fault): `agent.act`, checked. `where` ("update 3") goes into the message.

    fault () int64 is None on a CPU, where a fault is raised at once; hand it to `raise_fault` elsewhere.
    UserError names the agent, `where` and what was expected.
    """
    try:
        if q_logits is not None:
            _check("scores()", q_logits, (*view.steps.shape, 2), None, view)
        agent.last_score = None
        actions = _act(agent, view, q_logits, explore, where)
        _check("act()", actions, tuple(view.steps.shape), torch.int64, view)
    except _BadOutput as error:
        raise UserError(f"agent {type(agent).__name__}, {where}: {error}") from None
    fault = ((actions != HALT) & (actions != CONTINUE)).any() * _ACTION
    if agent.last_score is not None:
        fault = torch.maximum(fault, agent.last_score.isnan().any() * _NAN)
    if view.steps.device.type != "cpu":
        return actions, fault
    raise_fault(agent, fault, where)
    return actions, None


def _act(agent: HaltingAgent, view: View, q_logits: Tensor | None, explore: bool, where: str) -> object:
    """What `act` returns; a mistake in it is told with its place (the traceback is the cause: --debug shows it)."""
    try:
        return agent.act(view, q_logits, explore)
    except (UserError, MemoryError):
        raise
    except Exception as error:  # a plug-in may fail in any way
        if "out of memory" in str(error) or "can't allocate memory" in str(error):
            raise
        own = inspect.getsourcefile(type(agent))
        frames = traceback.extract_tb(error.__traceback__)
        frame = next((f for f in reversed(frames) if f.filename == own), frames[-1])
        unseen = [name for name, value in view._asdict().items() if value is None and f".{name}" in (frame.line or "")]
        hint = f"; name {unseen[0]!r} in its `sees`" if unseen else ""
        place = f"{frame.filename}:{frame.lineno}"
        raise UserError(
            f"agent {type(agent).__name__}, {where}: {type(error).__name__} at {place} ({error}){hint}"
        ) from error


def check_score(view: View, score: Tensor) -> Tensor:
    """The score of `HaltingAgent.act`, if its shape, type and device are right."""
    _check("score()", score, tuple(view.steps.shape), torch.float32, view)
    return score


def raise_fault(agent: HaltingAgent, fault: Tensor | int | None, where: str) -> None:
    """UserError if `decide` found something, NonFiniteError where it is a NaN (waits for the device)."""
    code = int(fault) if fault is not None else 0
    if code == _NAN:
        said = f"agent {type(agent).__name__}, {where}"
        raise NonFiniteError(f"{said}: score() must return numbers, but there is a NaN in it")
    if code == _ACTION:
        wanted = f"HALT ({HALT}) and CONTINUE ({CONTINUE})"
        raise UserError(f"agent {type(agent).__name__}, {where}: act() must return {wanted} only, but there is another")


def _check(who: str, value: object, shape: tuple[int, ...], dtype: torch.dtype | None, view: View) -> None:
    if not isinstance(value, Tensor):
        raise _BadOutput(f"{who} must return a tensor {shape}, not {type(value).__name__}")
    if tuple(value.shape) != shape:
        raise _BadOutput(f"{who} must return a tensor {shape}, not {tuple(value.shape)}")
    if dtype is not None and value.dtype != dtype:
        raise _BadOutput(f"{who} must return {dtype}, not {value.dtype}")
    if value.device != view.steps.device:
        raise _BadOutput(f"{who} must return a tensor on {view.steps.device}, not on {value.device}")
