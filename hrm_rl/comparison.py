"""The honest table: what every halting rule is worth on the same test puzzles, and what differs between them.

`hrm_rl.compare` is the command. N puzzles, M segments. docs/COMPARE.md explains every column in a sentence.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from agents import HaltingAgent, SignalAgent
from agents.advantage import AdvantageAgent
from agents.fixed import FixedAgent
from agents.oracle import OracleAgent
from agents.residual import ResidualAgent
from agents.stability import StabilityAgent
from agents.trm import TRMAgent
from hrm_rl import calibration, scoring
from hrm_rl.calibration import Choice
from hrm_rl.errors import UserError
from hrm_rl.evaluation import Solved
from hrm_rl.recorded import Recording, Wishes, halted


@dataclass(frozen=True)
class Target:
    """How thresholds are chosen on the validation puzzles (`hrm_rl.calibration`)."""

    calibrate: str = "drop"  # drop, steps, risk or none
    drop: float = 0.005  # of drop: how much exact accuracy may be given up for fewer steps
    reference: str = "best"  # of drop: against the rule's own best threshold, or against the full budget
    mean_steps: float = 0.0  # of steps
    delta: float = 0.02  # of risk: the accuracy lost against the full budget
    alpha: float = 0.05  # of risk: the chance that more is lost
    bound: calibration.Bound = "binomial"

    @property
    def words(self) -> str:
        """In a sentence, with the guarantee named."""
        if self.calibrate == "none":
            return "none: every rule has the threshold it was given"
        if self.calibrate == "steps":
            return f"mean steps closest to {self.mean_steps:g} on the validation puzzles"
        if self.calibrate == "drop":
            than = "its own best threshold" if self.reference == "best" else "the full budget"
            return f"fewest steps within {self.drop:.1%} of the accuracy of {than} (a point estimate, no guarantee)"
        return (
            f"P(accuracy lost against the full budget > {self.delta:.1%}) <= {self.alpha:g} over the draw of the "
            f"validation puzzles: Learn-then-Test, fixed sequence, {self.bound} p-values"
        )


def choose(scores: Tensor, exact: Tensor, target: Target, strict: bool = False) -> Choice:
    """The threshold of a score (M, N) on validation puzzles with exact (M, N), as `target` says."""
    if target.calibrate == "risk":
        return calibration.for_risk(scores, exact, target.delta, target.alpha, target.bound, strict)
    found = calibration.curve(scores, exact, calibration.candidates(scores), strict)
    if target.calibrate == "steps":
        return calibration.for_steps(found, target.mean_steps)
    reference = None if target.reference == "best" else float(exact[-1].double().mean())
    return calibration.for_drop(found, target.drop, reference)


def check_solvable(validation: Recording, name: str) -> None:
    """UserError where no puzzle is ever right, so that every threshold is as good as any other."""
    if not bool(validation.exact.any()):
        M, N = validation.exact.shape
        raise UserError(f"{name}: the core solves none of these {N} validation puzzles within {M} segments, so no "
                        "threshold can be chosen on them")  # fmt: skip


def check_score(label: str, agent: HaltingAgent, wishes: Wishes) -> None:
    """UserError unless the agent halts exactly where its score reaches its threshold."""
    how = f"write {label}@own to run it as it is"
    if wishes.scores is None:
        raise UserError(f"agent {label} has no score, so it cannot be calibrated; {how}")
    over = wishes.scores > agent.threshold if agent.strict else wishes.scores >= agent.threshold
    if not torch.equal(over, wishes.wish):
        raise UserError(f"agent {label} does not halt where its score reaches its threshold, so it cannot be "
                        f"calibrated; {how}")  # fmt: skip


def setting_of(agent: HaltingAgent) -> str:
    """The threshold as the flag that sets it, in its own unit: "tau=0.0312"."""
    threshold = float(agent.threshold)
    if not np.isfinite(threshold):
        return "never early" if threshold > 0 else "at once"
    if isinstance(agent, (FixedAgent, StabilityAgent)):  # whole numbers: k - 0.5 and k are the same rule
        return f"{'k' if isinstance(agent, FixedAgent) else 'patience'}={int(np.ceil(threshold))}"
    if isinstance(agent, AdvantageAgent):
        return f"cost={-threshold:.4g}"
    if isinstance(agent, SignalAgent):
        return f"tau={threshold * _direction(agent):.4g}"
    return f"{'tau' if isinstance(agent, TRMAgent) else 'threshold'}={threshold:.4g}"


def _direction(agent: SignalAgent) -> int:
    from agents import SIGNALS

    return SIGNALS[agent.signal].direction


@dataclass(frozen=True)
class Entry:
    """One line of the table, before its numbers."""

    label: str
    agent: HaltingAgent
    wishes: Wishes  # on the test puzzles
    steps: Tensor  # (N,) int64, its halts on the test puzzles
    choice: Choice | None  # on the validation puzzles; None where the threshold was not chosen there
    setting: str
    solved: Solved | None = None  # halting for real, timed

    @property
    def is_oracle(self) -> bool:
        return isinstance(self.agent, OracleAgent)

    @property
    def is_residual(self) -> bool:
        return isinstance(self.agent, ResidualAgent)


def row_of(entry: Entry, test: Recording, ponder_cost: float, flops: int | None) -> dict:
    """The numbers of one rule. flops: of one segment of one puzzle; None where they are not known."""
    found, N = halted(test, entry.steps), len(entry.steps)
    wishes, choice, solved = entry.wishes, entry.choice, entry.solved
    mean_steps = float(entry.steps.double().mean())
    oracle = float(test.exact.any(dim=0).double().mean())
    exact = float(found.exact.double().mean())
    row = {
        "agent": entry.label, "setting": entry.setting, "learned": bool(entry.agent.learns),
        "oracle": entry.is_oracle, "exact_accuracy": exact, "mean_steps": mean_steps,
        "p95_steps": int(np.percentile(entry.steps.numpy(), 95, method="inverted_cdf")),
        "lost_to_oracle": oracle - exact, "regret": scoring.regret(test.exact, entry.steps, ponder_cost),
        "auroc": None if wishes.scores is None else scoring.auroc(wishes.scores, test.exact),
        "brier": None if wishes.q_halt is None else scoring.brier(wishes.q_halt, test.exact),
        "ece": None if wishes.q_halt is None else scoring.ece(wishes.q_halt, test.exact),
        "segments": int(entry.steps.sum()),
        "gflop_per_puzzle": None if flops is None else flops * mean_steps / 1e9,
        "puzzles_per_second": None, "seconds": None, "segments_run": None, "live_differs": None,
        "threshold": _finite(entry.agent.threshold) if wishes.scores is not None else None,
        "validation_exact_accuracy": choice and choice.accuracy, "validation_mean_steps": choice and choice.mean_steps,
        "note": choice.note if choice else "", "curve": _curve(wishes, test, entry.agent),
    }  # fmt: skip
    if solved is not None:
        differs = (solved.steps != found.steps) | (solved.exact != found.exact)
        row |= {"puzzles_per_second": N / solved.seconds, "seconds": solved.seconds,
                "segments_run": solved.segments_run, "live_differs": int(differs.sum())}  # fmt: skip
    return row


def _finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def _curve(wishes: Wishes, test: Recording, agent: HaltingAgent) -> list[dict]:
    """What every threshold would have given on the test puzzles: for the figure, never for a choice."""
    if wishes.scores is None:
        return []
    found = calibration.curve(wishes.scores, test.exact, calibration.candidates(wishes.scores, 60), agent.strict)
    return [
        {"threshold": t, "mean_steps": s, "exact_accuracy": a}
        for t, s, a in zip(found.thresholds.tolist(), found.mean_steps.tolist(), found.accuracy.tolist(), strict=True)
    ]


@dataclass(frozen=True)
class Compared:
    """Everything about a comparison that is not the machine's."""

    rows: list[dict]
    fixed_steps: list[dict]
    differences: list[dict]  # one for every agent, against fixed and against the baseline, in every group
    verdicts: list[str]  # whether learned agents beat the residual rule, in words
    baseline: str
    residual: str


def compare(
    entries: Sequence[Entry], test: Recording, groups: dict[str, Tensor], baseline: str, ponder_cost: float,
    flops: int | None = None, resamples: int = 2000,
) -> Compared:  # fmt: skip
    """The table of `entries`, all on the puzzles of `test`. groups: name -> (N,) bool; one of the entries is a
    residual rule and one is called `baseline`."""
    rows = [row_of(entry, test, ponder_cost, flops) for entry in entries]
    right = {entry.label: halted(test, entry.steps).exact.double() for entry in entries}
    steps = {entry.label: entry.steps.double() for entry in entries}
    worth = {label: scoring.returns(right[label], steps[label], ponder_cost) for label in right}
    fixed = {label: scoring.mixed_fixed(test.exact, float(steps[label].mean())) for label in right}
    residual = next(entry.label for entry in entries if entry.is_residual)
    labels, differences = list(right), []
    everything = {"all": torch.ones(test.exact.shape[1], dtype=torch.bool)}
    for group, mask in {**everything, **groups}.items():
        against = {
            ("exact_accuracy", "fixed at the same mean steps"): (right, fixed),
            ("exact_accuracy", baseline): (right, {label: right[baseline] for label in labels}),
            ("mean_steps", baseline): (steps, {label: steps[baseline] for label in labels}),
        }
        if group == "all":
            against["return", residual] = (worth, {label: worth[residual] for label in labels})
        for (what, other), (one, two) in against.items():
            found = scoring.paired_differences(
                [one[label][mask] for label in labels], [two[label][mask] for label in labels], resamples=resamples
            )
            differences += [
                {"agent": label, "against": other, "of": what, "group": group, "puzzles": int(mask.sum()),
                 "mean": d.mean, "low": d.low, "high": d.high}
                for label, d in zip(labels, found, strict=True)
            ]  # fmt: skip
    fixed_steps = [
        {"steps": m + 1, "exact_accuracy": float(exact.double().mean())} for m, exact in enumerate(test.exact)
    ]
    verdicts = [
        verdict(entry.label, residual, _find(differences, entry.label, "return", residual), ponder_cost)
        for entry in entries
        if entry.agent.learns
    ]
    return Compared(rows, fixed_steps, differences, verdicts, baseline, residual)


def _find(differences: Sequence[dict], agent: str, of: str, against: str, group: str = "all") -> dict:
    wanted = (agent, of, against, group)
    return next(d for d in differences if (d["agent"], d["of"], d["against"], d["group"]) == wanted)


def verdict(label: str, residual: str, difference: dict, ponder_cost: float) -> str:
    """Whether a learned agent beats the residual rule: by its return, with the whole interval above 0."""
    said = "beats" if difference["low"] > 0 else "does not beat"
    interval = f"{difference['mean']:+.4f} [{difference['low']:+.4f}, {difference['high']:+.4f}]"
    return f"{label} {said} {residual}: return {interval} (1 if right, less {ponder_cost:g} for each further segment)"


# --- text -----------------------------------------------------------------------------------------------------


def table(compared: Compared, ponder_cost: float) -> str:
    """The table as text, one line a rule, then the differences, then what learned agents are worth."""
    width = max(len("agent"), *(len(row["agent"]) for row in compared.rows))
    setting = max(len("setting"), *(len(row["setting"]) for row in compared.rows))
    lines = [f"{'agent':<{width}}  {'setting':<{setting}}{'exact':>7}{'steps':>7}{'p95':>4}{'lost':>7}{'regret':>8}"
             f"{'AUROC':>7}{'Brier':>7}{'ECE':>7}{'GFLOP':>7}{'puzzles/s':>10}"]  # fmt: skip
    for row in compared.rows:
        lines.append(
            f"{row['agent']:<{width}}  {row['setting']:<{setting}}{row['exact_accuracy']:>7.1%}"
            f"{row['mean_steps']:>7.2f}{row['p95_steps']:>4}{row['lost_to_oracle']:>7.1%}{row['regret']:>8.4f}"
            + _cell(row["auroc"], 7, ".3f") + _cell(row["brier"], 7, ".4f") + _cell(row["ece"], 7, ".4f")
            + _cell(row["gflop_per_puzzle"], 7, ".3f") + _cell(row["puzzles_per_second"], 10, ".1f")
        )  # fmt: skip
    lines.append(f"regret with a cost of {ponder_cost:g} for each further segment; AUROC, Brier and ECE over all "
                 "segments; - where there is none")  # fmt: skip
    timed = [row for row in compared.rows if row["live_differs"] is not None]
    if timed:
        differs = sum(row["live_differs"] for row in timed)
        lines.append("puzzles/s: wall-clock of halting for real, once; halts and answers differ from the recording in "
                     f"{differs} cases")  # fmt: skip
    against = f"against {compared.baseline}"
    lines += ["", f"{'exact accuracy, points':<{width + 24}}{'against fixed, same mean steps':>32}{against:>28}"]
    for row in compared.rows:
        cells = [_find(compared.differences, row["agent"], "exact_accuracy", other)
                 for other in ("fixed at the same mean steps", compared.baseline)]  # fmt: skip
        lines.append(f"{row['agent']:<{width + 24}}{_interval(cells[0]):>32}{_interval(cells[1]):>28}")
    lines.append("mean [95 % bootstrap interval, paired over puzzles]; by difficulty in compare.json")
    lines += ["", *compared.verdicts]
    lines += [f"{row['agent']}: {row['note']}" for row in compared.rows if row["note"]]
    return "\n".join(lines)


def _cell(value: float | None, width: int, form: str) -> str:
    return f"{'-':>{width}}" if value is None else f"{value:>{width}{form}}"


def _interval(d: dict) -> str:
    return f"{100 * d['mean']:+.1f} [{100 * d['low']:+.1f}, {100 * d['high']:+.1f}]"


def as_csv(compared: Compared) -> bytes:
    """One line a rule: the table, and the differences of exact accuracy with their intervals."""
    lines = []
    for row in compared.rows:
        line = {name: value for name, value in row.items() if name != "curve"}
        for d in compared.differences:
            if d["agent"] == row["agent"] and d["group"] == "all":
                name = f"{d['of']} minus {d['against']}"
                line |= {name: d["mean"], f"{name} low": d["low"], f"{name} high": d["high"]}
        lines.append(line)
    stream = io.StringIO()
    writer = csv.DictWriter(stream, list(lines[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return stream.getvalue().encode()


def with_threshold(agent: HaltingAgent, entry: Entry, threshold: float) -> Entry:
    """The entry with its agent's threshold set and its halts on the test puzzles read off its scores."""
    agent.threshold = threshold
    return replace(entry, steps=entry.wishes.steps(threshold, agent.strict), setting=setting_of(agent))
