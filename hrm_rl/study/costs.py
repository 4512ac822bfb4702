"""What the arms of a study of whole trainings (`kind: train`) reach and what that costs: a table and a figure of both.

Arithmetic is counted as in `hrm_rl.flops`: the matrix products of a segment times the segments that a puzzle takes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from hrm_rl.errors import UserError
from hrm_rl.study.info import StudyInfo
from hrm_rl.study.results import RunResult
from hrm_rl.study.statistics import ArmSummary, Interval, by_arm, summarise

MEGA = 1e6


@dataclass(frozen=True)
class Cost:
    """Of an arm, whatever it learns."""

    parameters: int  # of the core
    segment: float  # floating-point operations of one segment of one puzzle, forward; NaN: not known beforehand


@dataclass(frozen=True)
class CostRow:
    """All seeds of an arm at the end of their training."""

    arm: str
    accuracy: Interval  # at the learned halt, over seeds and puzzles
    finals: tuple[float, ...]  # every seed's accuracy, NaN of a run that diverged or failed (which counts as 0 above)
    mean_steps: Interval
    parameters: int  # 0 where the core cannot be built
    flops_per_segment: float  # of one puzzle, forward; NaN where a solver decides
    seconds: tuple[float, ...]  # of training, every seed's

    @property
    def flops(self) -> float:
        """Of a puzzle up to its learned halt; NaN where no run has one, or a segment's are not known."""
        return self.flops_per_segment * self.mean_steps.value


def cost_of(values: Mapping[str, Any]) -> Cost:
    """Parameters and arithmetic of an arm by its settings. UserError as training would raise it."""
    from hrm_rl.core import build_core
    from hrm_rl.core.io import load_core
    from hrm_rl.flops import countable, segment_flops
    from hrm_rl.study.spec import train_settings

    config, _, _ = train_settings(values)
    core = config.core
    if not config.from_scratch:
        core = load_core(config.init_core, "cpu", size=config.size, task=config.task).core.config
    with torch.device("meta"):
        built = build_core(replace(core, dtype="float32"))
    parameters = sum(p.numel() for p in built.parameters())
    return Cost(parameters, segment_flops(core).forward if countable(core) else math.nan)


def cost_rows(info: StudyInfo, results: Sequence[RunResult]) -> list[CostRow]:
    """One row an arm that has a run, in the study's order. An arm that cannot be built has no numbers."""
    summaries, runs = summarise(results, info.baseline, {"accuracy": 1}), by_arm(info.in_order(results))
    return [_row(arm, held, summaries[arm], info.arms[arm]) for arm, held in runs.items() if arm in info.arms]


def _row(arm: str, runs: Sequence[RunResult], summary: ArmSummary, values: Mapping[str, Any]) -> CostRow:
    finals = tuple(run.final("accuracy") if run.status == "finished" else math.nan for run in runs)
    found = summary.metrics if any(map(math.isfinite, finals)) else {}
    accuracy, steps = (found[name].mean if name in found else Interval(math.nan) for name in ("accuracy", "mean_steps"))
    try:
        cost = cost_of(values)
    except UserError:  # its runs have failed of the same
        cost = Cost(0, math.nan)
    return CostRow(arm, accuracy, finals, steps, cost.parameters, cost.segment, tuple(run.seconds for run in runs))


def text(rows: Sequence[CostRow]) -> str:
    """The table for a terminal: one line an arm."""
    width = max(len("arm"), *(len(row.arm) for row in rows))
    spread = max(len("each seed"), *(6 * len(row.finals) - 1 for row in rows))
    lines = [f"{'arm':<{width}}  {'accuracy':>22}  {'each seed':<{spread}}  {'steps':>5}  {'parameters':>11}  "
             f"{'MFLOP/puzzle':>12}  {'minutes':>12}"]  # fmt: skip
    for row in rows:
        lines.append(
            f"{row.arm:<{width}}  {in_percent(row.accuracy):>22}  {each(row.finals):<{spread}}  "
            f"{_number(row.mean_steps.value, '.2f'):>5}  {row.parameters or '-':>11{',' if row.parameters else ''}}  "
            f"{_number(row.flops / MEGA, ',.0f'):>12}  {minutes(row):>12}"
        )
    lines.append(
        "accuracy at the learned halt with a 95 % interval over seeds and puzzles, then each seed's; MFLOP: matrix "
        "products of a puzzle\nup to its halt; minutes of training, from the fastest to the slowest seed"
    )
    if any(math.isnan(value) for row in rows for value in row.finals):
        lines.append("lost: the run diverged or failed; it counts as 0 in its arm's accuracy")
    return "\n".join(lines)


def _number(value: float, form: str) -> str:
    return "-" if math.isnan(value) else f"{value:{form}}"


def in_percent(interval: Interval) -> str:
    """ "95.5% [94.3%, 96.6%]"; the interval only where it is known."""
    if math.isnan(interval.value):
        return "-"
    bounds = f" [{interval.low:.1%}, {interval.high:.1%}]" if interval.known else ""
    return f"{interval.value:.1%}{bounds}"


def each(finals: Sequence[float]) -> str:
    """Every seed's accuracy in percent, in the order of seeds; lost: the run diverged or failed."""
    return " ".join(f"{100 * value:5.1f}" if math.isfinite(value) else " lost" for value in finals)


def minutes(row: CostRow) -> str:
    """The range over seeds."""
    low, high = min(row.seconds) / 60, max(row.seconds) / 60
    return f"{low:.1f}" if f"{low:.1f}" == f"{high:.1f}" else f"{low:.1f} to {high:.1f}"


def step_curves(runs: Sequence[RunResult], segment: float) -> tuple[list[float], list[float]]:
    """(MFLOP, accuracy) of halting every puzzle at segment 1, 2, ..., mean over the runs that were measured."""
    held = [run.by_step["accuracy"][-1].double() for run in runs if len(run.by_step.get("accuracy", ()))]
    if not held or len({len(row) for row in held}) > 1:
        return [], []
    mean = torch.stack(held).mean(0)
    return [segment * (m + 1) / MEGA for m in range(len(mean))], mean.tolist()
