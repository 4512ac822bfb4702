"""What a study measures of Q-learners at a checkpoint, as pure functions of Q-logits, trajectories and parameters.

Letters: L learners, M segments, N puzzles, U units of a hidden layer, K rows of features. METRICS and BY_STEP say every
metric in one sentence. Metrics are float64 on the device of their input, one value a learner; a learner whose numbers
are not finite has NaN throughout and touches no other. Values are `q_targets.q_values` of the logits: in (0, 1), or the
logits themselves for loss=mse_logits. At the budget there is no choice, so what is about choices or about bootstrapped
targets (gap, flips, drift, TD errors) leaves the last segment out; with M = 1 it is NaN.

Sources, beside those named at each function: bias against the exact optimum instead of against a Monte-Carlo estimate
as in Double DQN (arXiv:1509.06461); values beyond what the process can pay: "soft divergence", van Hasselt et
al., arXiv:1812.02648.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from agents import q_targets
from hrm_rl.optim import linf_bound
from hrm_rl.study import exact

SATURATED = 8.0  # |logit| beyond which sigmoid'(x) < 4e-4: what is wrong there is hardly unlearned
BINS = 15  # of the expected calibration error, as in `hrm_rl.scoring`
SRANK_DELTA = 0.01  # arXiv:2010.14498
DORMANT_TAU = 0.025  # arXiv:2302.12902
_BOUNDED = ("adamw", "adam_atan2")  # whose decay bounds every parameter, whatever its shape
_CHUNK = 64  # learners measured at a time: bounds the memory, and keeps the work in a processor's cache


class Metric(NamedTuple):
    """One row of the table of metrics."""

    meaning: str  # one sentence
    better: str  # "higher", "lower", or "none" where neither is
    unit: str


METRICS: dict[str, Metric] = {
    "accuracy": Metric("Share of puzzles whose answer is right at the greedy halt.", "higher", "share"),
    "mean_steps": Metric("Segments used per puzzle until the greedy halt.", "none", "segments"),
    "mean_return": Metric("Return of an episode under the greedy policy, under the arm's own gamma and ponder cost, "
                          "mean over puzzles.", "higher", "return"),
    "regret": Metric("Best return that any halting has on a puzzle minus that of the greedy policy, under the arm's "
                     "own gamma and ponder cost, mean over puzzles.", "lower", "return"),
    "frontier_area": Metric("Accuracy averaged over all budgets of mean steps from 1 to M, as the threshold on q_halt "
                            "- q_continue sweeps over everything.", "higher", "share"),
    "frontier_gap": Metric("Where the frontier area lies between that of fixed numbers of segments (0) and the best "
                           "possible one on these puzzles (1).", "higher", "share"),
    "auroc": Metric("Chance that q_halt is larger for a right answer than for a wrong one, over all puzzles and "
                    "segments.", "higher", "share"),
    "brier": Metric("Mean squared difference between the value of HALT (cut to [0, 1]) and being right, over all "
                    "puzzles and segments.", "lower", "squared probability"),
    "ece": Metric("Expected calibration error of the value of HALT (cut to [0, 1]), 15 bins, over all puzzles and "
                  "segments.", "lower", "probability"),
    "bias_halt": Metric("Value of HALT minus its exact value, mean over puzzles and segments.", "none", "return"),
    "bias_continue": Metric("Value of CONTINUE minus the exact optimum, mean over puzzles and segments.", "none",
                            "return"),
    "abs_bias_halt": Metric("Absolute difference between the value of HALT and its exact value, mean over puzzles and "
                            "segments.", "lower", "return"),
    "abs_bias_continue": Metric("Absolute difference between the value of CONTINUE and the exact optimum, mean over "
                                "puzzles and segments.", "lower", "return"),
    "policy_bias_continue": Metric("Value of CONTINUE minus its exact value under the learner's own greedy policy, "
                                   "mean over puzzles and segments.", "none", "return"),
    "abs_policy_bias_continue": Metric("Absolute difference between the value of CONTINUE and its exact value under "
                                       "the learner's own greedy policy, mean over puzzles and segments.", "lower",
                                       "return"),
    "td_error_p50": Metric("Median of |G_continue - value of CONTINUE|, G by the one-step max backup of the learner's "
                           "own values, over puzzles and segments before the last.", "lower", "return"),
    "td_error_p90": Metric("90 % quantile of the same.", "lower", "return"),
    "td_error_p99": Metric("99 % quantile of the same.", "lower", "return"),
    "logit_mean_abs": Metric("Mean |Q-logit| over puzzles, segments and both actions.", "none", "logit"),
    "logit_max_abs": Metric("Largest |Q-logit| over puzzles, segments and both actions.", "none", "logit"),
    "value_max_abs": Metric("Largest |value|; no return is above 1, so more is soft divergence.", "none", "return"),
    "saturated": Metric("Share of Q-logits with |logit| > 8, where a sigmoid hardly learns.", "none", "share"),
    "target_drift": Metric("Mean |G_continue now - G_continue at the checkpoint before| on the probe puzzles: how far "
                           "the bootstrapped targets moved.", "lower", "return"),
    "gap": Metric("Mean q_halt - q_continue, in logits, over puzzles and segments before the last.", "none", "logit"),
    "sign_flips": Metric("Share of (puzzle, segment before the last) whose greedy action changed since the checkpoint "
                         "before.", "lower", "share"),
    "effective_rank": Metric("Singular values that make up 99 % of their sum, of the features that the last layer "
                             "reads (srank, delta 0.01).", "none", "directions"),
    "dormant": Metric("Share of these features whose mean size is at most 0.025 of the layer's mean.", "lower",
                      "share"),
    "param_inf_norm": Metric("Largest |parameter| that the optimiser moves.", "none", "weight"),
    "param_bound_ratio": Metric("The same, divided by the bound that optimiser and weight decay imply; nothing where "
                                "they imply none.", "none", "ratio"),
    "grad_norm": Metric("L2 norm of the gradient of the whole loss, before clipping.", "none", "norm"),
    "grad_norm_supervised": Metric("L2 norm of the supervised loss's gradient on the core (live runs).", "none",
                                   "norm"),
    "grad_norm_q": Metric("L2 norm of the Q-loss's gradient on all that it trains: the head, and the core where it "
                          "reaches that (live runs).", "none", "norm"),
    "grad_cosine": Metric("Cosine of the supervised and the Q-gradient on the core; nothing where one of them does not "
                          "reach it (live runs).", "none", "cosine"),
}  # fmt: skip

BY_STEP: dict[str, str] = {
    "bias_halt": "Value of HALT minus its exact value, mean over puzzles.",
    "bias_continue": "Value of CONTINUE minus the exact optimum, mean over puzzles.",
    "abs_bias_halt": "Absolute difference of the same, mean over puzzles.",
    "abs_bias_continue": "Absolute difference of the same, mean over puzzles.",
    "policy_bias_continue": "Value of CONTINUE minus its exact value under the learner's greedy policy, mean.",
    "abs_policy_bias_continue": "Absolute difference of the same, mean over puzzles.",
    "q_halt": "Mean value of HALT.",
    "q_continue": "Mean value of CONTINUE.",
    "accuracy": "Share of puzzles whose answer is right after this segment, whoever halts.",
    "halts": "Share of puzzles whose greedy halt is at this segment.",
}

Measured = tuple[dict[str, Tensor], dict[str, Tensor]]


def measure(
    q_logits: Tensor, correct: Tensor, gamma: float | Tensor = 1.0, ponder_cost: float | Tensor = 0.0,
    loss: str | Sequence[str] = "bce", previous: Tensor | None = None, wish: Tensor | None = None,
) -> Measured:  # fmt: skip
    """All that follows from Q-logits and trajectories: (metrics, each (L,); by step, each (L, M)).

    q_logits (L, M, N, 2) on the probe puzzles; correct (M, N) bool; gamma, ponder_cost numbers or (L,); loss one for
    all or one for each learner (`q_targets.Loss`); previous (L, M, N, 2): the Q-logits at the checkpoint before, None
    at the first one (what compares with it is NaN then). wish (L, M, N) bool: where the policy halts, None for
    q_halt > q_continue, strictly, as HRM does.
    """
    L, device = len(q_logits), q_logits.device
    gamma, ponder_cost = (
        torch.as_tensor(x, dtype=torch.float64, device=device).expand(L) for x in (gamma, ponder_cost)
    )
    kinds = [loss] * L if isinstance(loss, str) else list(loss)
    parts = []
    for first in range(0, L, _CHUNK):
        at = slice(first, first + _CHUNK)
        rows = [None if x is None else x[at] for x in (previous, wish)]
        parts.append(_measure(q_logits[at], correct, gamma[at], ponder_cost[at], kinds[at], *rows))
    return tuple({name: torch.cat([part[i][name] for part in parts]) for name in parts[0][i]} for i in (0, 1))


def measure_halting(
    wish: Tensor, correct: Tensor, gamma: float | Tensor = 1.0, ponder_cost: float | Tensor = 0.0
) -> Measured:
    """The metrics of a policy that has no values: wish (L, M, N) bool, where it halts; the others are left out."""
    steps = exact.halt_steps(wish)
    row = (steps - 1)[:, None]
    right = correct.expand(len(wish), -1, -1).gather(1, row)[:, 0]
    earned = exact.policy_return(correct, wish, gamma, ponder_cost).mean(-1)
    best = exact.best_return(correct, gamma, ponder_cost).mean(-1)
    metrics = {"accuracy": right.double().mean(-1), "mean_steps": steps.double().mean(-1), "mean_return": earned,
               "regret": best - earned}  # fmt: skip
    halts = torch.zeros(wish.shape, dtype=torch.float64, device=wish.device).scatter_(1, row, 1.0)
    accuracy = correct.double().mean(-1).expand(len(wish), -1).clone()
    return metrics, {"accuracy": accuracy, "halts": halts.mean(-1)}


def _measure(q_logits, correct, gamma, ponder_cost, kinds, previous, wish) -> Measured:
    sound = q_logits.isfinite().flatten(1).all(-1)
    q_logits = q_logits.where(sound[:, None, None, None], 0.0)
    unbounded = torch.tensor([kind == "mse_logits" for kind in kinds], device=q_logits.device)
    values = _values(q_logits, unbounded)
    gap = q_logits[..., 0].double() - q_logits[..., 1].double()  # (L, M, N)
    greedy = gap > 0
    wish = greedy if wish is None else wish
    metrics, by_step = measure_halting(wish, correct, gamma, ponder_cost)
    area = _swept_area(gap, correct)
    fixed, best = exact.fixed_area(correct), exact.best_area(correct)
    metrics |= {"frontier_area": area, "frontier_gap": (area - fixed) / (best - fixed if best > fixed else math.nan)}
    metrics |= _calibration(q_logits[..., 0], values[..., 0], correct)

    truth = exact.optimal_values(correct, gamma, ponder_cost)
    followed = exact.policy_values(correct, wish, gamma, ponder_cost)[..., 1]
    bias = {"bias_halt": values[..., 0] - truth[..., 0], "bias_continue": values[..., 1] - truth[..., 1],
            "policy_bias_continue": values[..., 1] - followed}  # fmt: skip
    for name, apart in bias.items():
        for held, part in ((name, apart), (f"abs_{name}", apart.abs())):
            by_step[held] = part.mean(-1)
            metrics[held] = by_step[held].mean(-1)
    by_step |= {"q_halt": values[..., 0].mean(-1), "q_continue": values[..., 1].mean(-1)}

    target = _targets(q_logits, unbounded, gamma, ponder_cost)
    error = (target - values[:, :-1, :, 1]).abs().flatten(1).float()
    quantiles = torch.tensor([0.5, 0.9, 0.99], device=error.device)
    found = error.quantile(quantiles, dim=1).double() if error.shape[1] else error.new_full((3, len(error)), math.nan)
    metrics |= dict(zip(("td_error_p50", "td_error_p90", "td_error_p99"), found, strict=True))
    size = q_logits.abs().flatten(1)
    metrics |= {
        "logit_mean_abs": size.mean(-1, dtype=torch.float64), "logit_max_abs": size.amax(-1).double(),
        "value_max_abs": values.abs().flatten(1).amax(-1),
        "saturated": (size > SATURATED).mean(-1, dtype=torch.float64), "gap": gap[:, :-1].flatten(1).mean(-1),
    }  # fmt: skip
    compared = torch.full_like(metrics["gap"], math.nan)
    metrics |= {"target_drift": compared, "sign_flips": compared}
    if previous is not None:
        known = previous.isfinite().flatten(1).all(-1)
        previous = previous.where(known[:, None, None, None], 0.0)
        before = _targets(previous, unbounded, gamma, ponder_cost)
        flips = (greedy != (previous[..., 0].double() - previous[..., 1].double() > 0))[:, :-1].flatten(1)
        metrics["target_drift"] = (target - before).abs().flatten(1).mean(-1).where(known, math.nan)
        metrics["sign_flips"] = flips.mean(-1, dtype=torch.float64).where(known, math.nan)
    metrics = {name: metrics[name].where(sound, math.nan) for name in METRICS if name in metrics}
    return metrics, {name: by_step[name].where(sound[:, None], math.nan) for name in BY_STEP}


def _values(q_logits: Tensor, unbounded: Tensor) -> Tensor:
    """Values in float64, (L, ..., 2): the logits themselves for learners that are unbounded (L,) bool."""
    wide = q_logits.double()
    return torch.where(unbounded.view(-1, *[1] * (wide.ndim - 1)), wide, wide.sigmoid())


def _targets(q_logits: Tensor, unbounded: Tensor, gamma: Tensor, ponder_cost: Tensor) -> Tensor:
    """Bootstrapped value of CONTINUE at segments 1..M - 1, the one-step max backup: (L, M - 1, N) float64.

    At the budget the target is the reward itself, whatever the learner's values (`q_targets.grounded_target`), so that
    the last segment has none.
    """
    following = q_logits[:, 1:]
    found = following.new_zeros(following.shape[:-1], dtype=torch.float64)
    never = torch.zeros((), dtype=torch.bool, device=q_logits.device)
    for loss, mine in (("mse_logits", unbounded), ("bce", ~unbounded)):
        rows = mine.nonzero()[:, 0]
        if len(rows):
            each = (x[rows, None, None] for x in (gamma, ponder_cost))
            found[rows] = q_targets.continue_target(following[rows], never, *each, loss=loss).double()
    return found


# --- ranks and calibration --------------------------------------------------------------------------------------


def _curve_area(scores: Tensor, dx: Tensor, dy: Tensor, y0: Tensor) -> Tensor:
    """Area under the curve that a threshold sweeps out as it rises past every score, without division.

    scores, dx, dy (L, K): what passing each score adds to x and to y; y0 (L,) where y begins. Equal scores are passed
    at once, along a straight line. Returns (L,).
    """
    scores, order = scores.sort(dim=-1)
    x, y = (d.expand_as(order).gather(-1, order).cumsum(-1) for d in (dx, dy))
    y = y + y0[:, None]
    last = torch.ones_like(order, dtype=torch.bool)  # the last of a run of equal scores: a corner of the curve
    last[:, :-1] = scores[:, 1:] != scores[:, :-1]
    # The corner before each: index into the curve with its beginning put in front.
    index = torch.arange(1, scores.shape[1] + 1, device=scores.device) * last
    before = torch.cat((torch.zeros_like(index[:, :1]), index[:, :-1]), dim=-1).cummax(dim=-1).values
    x, y = torch.cat((torch.zeros_like(x[:, :1]), x), dim=-1), torch.cat((y0[:, None], y), dim=-1)
    strips = (x[:, 1:] - x.gather(-1, before)) * (y[:, 1:] + y.gather(-1, before)) / 2
    return (strips * last).sum(-1)


def _swept_area(gap: Tensor, correct: Tensor) -> Tensor:
    """Accuracy averaged over mean steps 1..M, where a puzzle halts at its first segment with gap > threshold: (L,).

    gap (L, M, N), correct (M, N) bool. Every threshold counts; between two neighbours the curve is what choosing one of
    them by chance gives. As the threshold passes the largest gap so far of segment m < M, that puzzle's halt moves from
    m to m + 1, so one sort gives the whole curve. NaN for M = 1.
    """
    segments, count = correct.shape
    if segments == 1:
        return gap.new_full((len(gap),), math.nan)
    so_far = gap[:, :-1].cummax(dim=1).values.flatten(1)
    right = correct.double()
    gained = (right[1:] - right[:-1]).flatten()[None] / count
    area = _curve_area(so_far, torch.full_like(gained, 1 / count), gained, right[0].mean().expand(len(gap)))
    return area / (segments - 1)


def auroc(scores: Tensor, right: Tensor) -> Tensor:
    """`hrm_rl.scoring.auroc` of many at once: scores (L, K), right (K,) bool -> (L,), NaN where there is no pair."""
    right = right.double()
    wins = _curve_area(scores, right[None], 1 - right[None], scores.new_zeros(len(scores), dtype=torch.float64))
    pairs = right.sum() * (1 - right).sum()
    return wins / torch.where(pairs > 0, pairs, math.nan)


def _calibration(q_halt: Tensor, value: Tensor, correct: Tensor) -> dict[str, Tensor]:
    """AUROC, Brier score and expected calibration error over all puzzles and segments, q_halt and value (L, M, N)."""
    right = correct.flatten()
    p = value.flatten(1).clamp(0, 1)
    apart = right.double() - p
    bins = p.new_zeros(len(p), BINS).scatter_add_(1, (p * BINS).long().clamp(max=BINS - 1), apart)
    return {"auroc": auroc(q_halt.flatten(1), right), "brier": apart.square().mean(-1),
            "ece": bins.abs().sum(-1) / p.shape[1]}  # fmt: skip


# --- parameters and features ------------------------------------------------------------------------------------


def parameter_measures(
    parameters: Mapping[str, Tensor], optimizer: str | Sequence[str], weight_decay: float | Sequence[float]
) -> dict[str, Tensor]:
    """param_inf_norm and param_bound_ratio, (L,) each, of stacked parameters (L, ...).

    The bound is `hrm_rl.optim.linf_bound` for a steady gradient: 1 / decay for AdamW, pi / (4 decay) for Adam-atan2.
    The ratio is NaN without decay, for adam (its decay is part of the gradient, and rescaled with it), for sgd and for
    muon (which bounds the spectral norm).
    """
    largest = torch.stack([p.detach().double().abs().flatten(1).amax(-1) for p in parameters.values()]).amax(0)
    L = len(largest)
    names = [optimizer] * L if isinstance(optimizer, str) else list(optimizer)
    decays = torch.as_tensor(weight_decay, dtype=torch.float64).expand(L).tolist()
    bounds = [linf_bound(name, decay, steady=True) if name in _BOUNDED and decay > 0 else math.nan
              for name, decay in zip(names, decays, strict=True)]  # fmt: skip
    largest = largest.where(largest.isfinite(), math.nan)
    return {"param_inf_norm": largest, "param_bound_ratio": largest / largest.new_tensor(bounds)}


def feature_measures(features: Tensor, rows: int = 512) -> dict[str, Tensor]:
    """effective_rank and dormant, (L,) each, of features (L, K, U), what the last layer reads: a hidden layer after its
    nonlinearity, or the q-token for a linear head. At most `rows` of the K, evenly spaced, are looked at.

    effective_rank: srank = the least k whose k largest singular values make up 1 - delta of the sum of all, delta =
    0.01 (arXiv:2010.14498), by way of the eigenvalues of F^T F in float64.
    dormant: share of the units with mean |f_i| <= tau * mean over the layer, tau = 0.025 (arXiv:2302.12902); a layer
    that is 0 throughout is all dormant.
    """
    if features.shape[1] > rows:
        kept = torch.linspace(0, features.shape[1] - 1, rows, device=features.device).round().long()
        features = features[:, kept]
    wide = features.double()
    sound = wide.isfinite().flatten(1).all(-1)
    wide = wide.where(sound[:, None, None], 0.0)
    size = wide.abs().mean(1)
    dormant = (size <= DORMANT_TAU * size.mean(-1, keepdim=True)).mean(-1, dtype=torch.float64)
    if features.shape[1] < features.shape[2]:
        wide = wide.mT  # the smaller Gram matrix has the same eigenvalues, but for zeros
    singular = torch.linalg.eigvalsh(wide.mT @ wide).clamp(min=0).sqrt().flip(-1)
    held = singular.cumsum(-1)
    rank = (held < (1 - SRANK_DELTA) * held[:, -1:]).sum(-1) + 1.0
    rank = torch.where(held[:, -1] > 0, rank, 0.0).double()
    return {"effective_rank": rank.where(sound, math.nan), "dormant": dormant.where(sound, math.nan)}


def head_measures(
    features: Tensor, parameters: Mapping[str, Tensor], optimizer: str | Sequence[str],
    weight_decay: float | Sequence[float],
) -> dict[str, Tensor]:  # fmt: skip
    """`parameter_measures` and `feature_measures` together, (L,) each.

    features (L, K, U), or (K, U) where all learners read the same (a linear head's q-token): looked at once then.
    """
    found = parameter_measures(parameters, optimizer, weight_decay)
    L = len(found["param_inf_norm"])
    shared = features.ndim == 2
    seen = feature_measures(features[None] if shared else features)
    return found | {name: value.to(found["param_inf_norm"].device).expand(L) for name, value in seen.items()}
