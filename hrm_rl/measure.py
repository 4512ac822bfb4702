"""What is measured in an update: running sums on the device, and what needs a look at logged updates only."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from agents import Transition
from agents.q_targets import QLosses
from envs import Slots
from hrm_rl.metrics import Sums


@torch.no_grad()
def record(sums: Sums, slots: Slots, transition: Transition, losses: dict[str, Tensor], q: QLosses | None) -> None:
    """Add one update to the running sums; never waits for the device.

    losses: scalars by tag ("loss/...", and "agent/..." for the parts of an agent's own loss), not weighted but for
    the total.
    """
    add, B = sums.add, slots.steps.shape[0]
    add("updates", torch.ones((), device=slots.steps.device))
    for tag, value in losses.items():
        add(tag, value)
    ended = transition.ended & slots.valid
    add("episodes", ended.sum())
    add("exact", (slots.is_correct & ended).sum())
    add("token", (slots.token_accuracy * ended).sum())
    add("steps", (slots.steps * ended).sum())
    if transition.q_logits is not None:
        size = transition.q_logits.detach().float().abs()
        add("logit", size.mean())
        sums.largest("logit_max", size.max())
        agrees = (transition.q_logits[:, 0] >= 0) == slots.is_correct
        add("q_agrees", (agrees & ended).sum())
    if q is not None:
        add("loss/q_halt", q.halt.sum() / B)
        add("loss/q_continue", q.cont.sum() / B)
        add("td_halt", q.td_error_halt.abs().sum() / B)
        add("td_continue", q.td_error_continue.abs().sum())
        add("td_continue_count", q.has_continue.sum())


def averages(taken: dict[str, float]) -> dict[str, float]:
    """Metrics by tag from the sums that `Sums.take` returned."""
    updates, episodes = taken["updates"], taken["episodes"]
    values = {tag: value / updates for tag, value in taken.items() if tag.startswith(("loss/", "agent/"))}
    values["halt/episodes"] = episodes
    if episodes:
        values["halt/exact_accuracy"] = taken["exact"] / episodes
        values["halt/token_accuracy"] = taken["token"] / episodes
        values["halt/mean_steps"] = taken["steps"] / episodes
        if "q_agrees" in taken:
            values["halt/q_halt_accuracy"] = taken["q_agrees"] / episodes
    if "logit" in taken:
        values["q/mean_abs_logit"] = taken["logit"] / updates
        values["q/max_abs_logit"] = taken["logit_max"]
    if "td_halt" in taken:
        values["q/td_error_halt"] = taken["td_halt"] / updates
        if taken["td_continue_count"]:
            values["q/td_error_continue"] = taken["td_continue"] / taken["td_continue_count"]
    return values


def gradient_norms(trained: dict[str, nn.Parameter]) -> dict[str, float]:
    """L2 norm of the gradient of each part of the model (waits for the device)."""
    parts: dict[str, list[Tensor]] = {}
    for name, parameter in trained.items():
        if parameter.grad is not None:
            parts.setdefault(_part(name), []).append(parameter.grad.norm())
    return {f"grad/{part}": torch.linalg.vector_norm(torch.stack(norms)).item() for part, norms in parts.items()}


def residuals(slots: Slots, previous: tuple[Tensor, Tensor]) -> dict[str, float]:
    """How far z_H and z_L moved in this segment, relative to where they are: mean over episodes that went on.

    previous: (z_H, z_L) of the same slots one segment ago, (B, P + S, D) each.
    """
    goes_on = slots.steps > 1
    if not bool(goes_on.any()):
        return {}
    values = {}
    for name, now, before in zip(("z_H", "z_L"), (slots.z_H, slots.z_L), previous, strict=True):
        now, before = now.detach().float().flatten(1), before.float().flatten(1)
        ratio = (now - before).norm(dim=1) / now.norm(dim=1).clamp(min=1e-12)
        values[f"state/residual_{name}"] = ratio[goes_on].mean().item()
    return values


def _part(name: str) -> str:
    """Which part of the model a parameter belongs to."""
    if name.startswith("agent."):
        return "q_head"
    if name.startswith("core.H_level"):
        return "core_H"
    return "core_L" if name.startswith("core.L_level") else "core_other"
