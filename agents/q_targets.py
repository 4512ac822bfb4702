"""HRM's halting targets as pure functions of tensors: no model, no configuration, no hidden state.

Source: HRM, arXiv:2506.21734, section 2.2 (adaptive computation time), and the released code.
Letters: B slots. Logits and probabilities never share a name: q_logits (B, 2) are in the order (HALT,
CONTINUE), q_values = sigmoid(q_logits).

The bootstrap modes differ only in where the next segment's q_logits come from and for which slots there
is a continue target (DESIGN, section 4):

- extra_forward     one more segment from the detached state with today's weights; every slot
- shared_prefix     a gradient-free run of the segment that comes next; slots that continue, or are at the budget
- shared_prefix_all the same, and one more segment of slots that halt before the budget, of a quarter of all slots at
                    most: nearly every slot has a target, as with extra_forward, at a fraction of its price
- next_observation  the next observation the environment returned; likewise
- none              no continue target at all (TRM, arXiv:2510.04871)
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Bootstrap = Literal["extra_forward", "shared_prefix", "shared_prefix_all", "next_observation", "none"]
BOOTSTRAPS: tuple[str, ...] = ("extra_forward", "shared_prefix", "shared_prefix_all", "next_observation", "none")
Loss = Literal["bce", "mse_values", "mse_logits"]
HALTED_SHARE = 4  # shared_prefix_all looks ahead of one slot in so many (rounded up) that halt before the budget


def q_values(q_logits: Tensor, loss: Loss = "bce") -> Tensor:
    """What the head's outputs are worth: sigmoid(q_logits), or the outputs themselves where loss is mse_logits.

    mse_logits is Q-learning as DQN has it, values without bound; the other two keep them in (0, 1) as HRM does.
    Any shape; float32 without a change of gradient.
    """
    return q_logits.float() if loss == "mse_logits" else q_logits.float().sigmoid()


def element_losses(q_logits: Tensor, targets: Tensor, loss: Loss = "bce") -> Tensor:
    """Loss of each element, of the shape of both: binary cross entropy on logits (HRM; a target is cut to [0, 1]), or
    half the squared error of `q_values`. Raises ValueError for an unknown loss."""
    if loss == "bce":
        return F.binary_cross_entropy_with_logits(q_logits.float(), targets.clamp(0, 1), reduction="none")
    if loss in ("mse_values", "mse_logits"):
        return 0.5 * (q_values(q_logits, loss) - targets).square()
    raise ValueError(f"unknown loss {loss!r}; choose bce, mse_values or mse_logits")


def halt_target(is_correct: Tensor) -> Tensor:
    """Value of HALT: the reward itself. is_correct (B,) bool -> (B,) float32, 1 where the answer is right."""
    return is_correct.detach().float()


def continue_target(
    next_q_logits: Tensor, at_limit: Tensor, gamma: float | Tensor = 1.0, ponder_cost: float | Tensor = 0.0,
    chosen_by: Tensor | None = None, loss: Loss = "bce",
) -> Tensor:  # fmt: skip
    """Bootstrapped value of CONTINUE: the best that the next segment promises, -ponder_cost + gamma * max Q'.

    next_q_logits (..., 2) of segment m + 1; at_limit (...) bool, whether m >= max_steps: from there halting
    is the only move left; gamma and ponder_cost broadcast against (...) (1 and 0 in the paper). chosen_by (..., 2):
    q_logits that pick the action which next_q_logits values (Double DQN, arXiv:1509.06461, equation 4); None: the same.
    Returns (...), in [0, 1] for gamma = 1 and no cost unless loss is mse_logits, without gradient.
    """
    values = q_values(next_q_logits.detach(), loss)
    by = next_q_logits if chosen_by is None else chosen_by
    halts_next = at_limit | (by[..., 0] >= by[..., 1]).detach()
    return gamma * torch.where(halts_next, values[..., 0], values[..., 1]) - ponder_cost


def grounded_target(bootstrapped: Tensor, is_correct: Tensor, at_limit: Tensor) -> Tensor:
    """Continue target of the modes that read the segment which really comes next: known at the budget.

    There CONTINUE counts as HALT and earns is_correct (DESIGN, section 3), so nothing is bootstrapped. Without
    this, Q(max_steps, CONTINUE) is never trained though the target one step before reads it, and the values of
    puzzles that are never solved float (docs/LAB_NOTES.md, 2026-11-21: a run whose halting collapsed).
    bootstrapped (B,) in [0, 1]; is_correct, at_limit (B,) bool. Returns (B,) without gradient.
    """
    return torch.where(at_limit, halt_target(is_correct), bootstrapped.detach())


def continue_mask(bootstrap: str, continued: Tensor, at_limit: Tensor) -> Tensor:
    """Slots that have a continue target: (B,) bool from `continued`, `at_limit` (B,) bool.

    `extra_forward` looks one segment ahead of every slot, also of those that halt, as released; the modes
    that read the segment which really comes next have one where the episode goes on and, known without a
    look ahead, at the budget (`grounded_target`). Raises ValueError for an unknown mode.
    """
    if bootstrap == "extra_forward":
        return torch.ones_like(continued)
    if bootstrap in ("shared_prefix", "shared_prefix_all", "next_observation"):
        return continued | at_limit
    if bootstrap == "none":
        return torch.zeros_like(continued)
    raise ValueError(f"unknown bootstrap {bootstrap!r}; choose one of {', '.join(BOOTSTRAPS)}")


def one_step_targets(
    bootstrap: str, next_q_logits: Tensor | None, is_correct: Tensor, at_limit: Tensor, ended: Tensor,
    gamma: float = 1.0, ponder_cost: float = 0.0, chosen_by: Tensor | None = None, loss: Loss = "bce",
    looked: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(target (B,) float32 without gradient, has_target (B,) bool) of CONTINUE, as the bootstrap mode has it.

    next_q_logits (B, 2) of the segment bootstrapped from; None where there is none (bootstrap=none, or a budget of
    one segment). is_correct, at_limit, ended (B,) bool; looked (B,) bool: slots that halt and whose next_q_logits are
    of their own puzzle all the same (shared_prefix_all); the rest as for `continue_target`.
    """
    if next_q_logits is None:
        return torch.zeros_like(is_correct, dtype=torch.float32), torch.zeros_like(ended)
    target = continue_target(next_q_logits, at_limit, gamma, ponder_cost, chosen_by, loss)
    if bootstrap != "extra_forward":
        target = grounded_target(target, is_correct, at_limit)
    has_target = continue_mask(bootstrap, ~ended, at_limit)
    return target, has_target if looked is None else has_target | looked


class QLosses(NamedTuple):
    """Losses of both actions (binary cross entropies unless said otherwise) and the TD errors. B slots; masked slots
    hold 0. Values are `q_values`."""

    halt: Tensor  # (B,) BCE(q_halt, G_halt)
    cont: Tensor  # (B,) BCE(q_continue, G_continue)
    td_error_halt: Tensor  # (B,) G_halt - value of HALT, no gradient
    td_error_continue: Tensor  # (B,) G_continue - value of CONTINUE, no gradient
    has_continue: Tensor  # (B,) bool, slots that have a continue target (padding has none)


def q_losses(
    q_logits: Tensor, target_halt: Tensor, target_continue: Tensor, valid: Tensor, has_continue: Tensor,
    loss: Loss = "bce",
) -> QLosses:  # fmt: skip
    """The Q-objective per slot, in the released scale once summed and divided by B.

    q_logits (B, 2) with gradient; target_halt, target_continue (B,) without; valid (B,) bool leaves out
    padding (the released code counts a padded row as a right answer and trains q_halt on it: here the
    mask says no); has_continue (B,) bool as `continue_mask` gives it; loss as for `element_losses`. The TD errors are
    those of the targets as they are, also where the cross entropy cuts them to [0, 1].
    """
    q_halt, q_continue = q_logits.float().unbind(dim=-1)
    on_halt, on_continue = valid.float(), (valid & has_continue).float()
    values = q_values(q_logits.detach(), loss)
    return QLosses(
        halt=element_losses(q_halt, target_halt, loss) * on_halt,
        cont=element_losses(q_continue, target_continue, loss) * on_continue,
        td_error_halt=(target_halt - values[:, 0]) * on_halt,
        td_error_continue=(target_continue - values[:, 1]) * on_continue,
        has_continue=valid & has_continue,
    )


def min_steps(u: Tensor, drawn: Tensor, epsilon: float) -> Tensor:
    """Exploration floor M_min: `drawn` where u < epsilon, else 1.

    u (B,) uniform in [0, 1); drawn (B,) int64 uniform in {2..max_steps}. Returns (B,) int64. (The released
    code writes 0 instead of 1 for "no floor": steps start at 1, so both mean the same.)
    """
    return torch.where(u < epsilon, drawn, torch.ones_like(drawn))


def halt_score(q_logits: Tensor, bootstrap: str) -> Tensor:
    """How much halting is ahead, (B, 2) -> (B,) float32: q_halt - q_continue, or q_halt without continue target."""
    q_halt, q_continue = q_logits.float().unbind(dim=-1)
    return q_halt if bootstrap == "none" else q_halt - q_continue


def wants_halt(q_logits: Tensor, bootstrap: str) -> Tensor:
    """Greedy choice, (B, 2) -> (B,) bool: q_halt > q_continue (strictly), or q_halt > 0 without continue target."""
    return halt_score(q_logits, bootstrap) > 0


def halts(wish: Tensor, steps: Tensor, floor: Tensor, max_steps: int) -> Tensor:
    """Halting in training: at the budget, or by `wish` once `steps` reaches the floor. All (B,)."""
    return (steps >= max_steps) | (wish & (steps >= floor))
