"""The report of a study: one HTML file that needs nothing beside it, no network either.

It begins with one sentence to quote and the verdict on each claim of the paper; the arms, their curves, the biases, the
metrics against the baseline, stability run by run, the meaning of every metric and where it all comes from follow.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hrm_rl.checkpoint import write_atomically
from hrm_rl.study import costs, plots
from hrm_rl.study.info import StudyInfo
from hrm_rl.study.page import Cell, escape, figure, folded, key, number, number_cell, page, table, text_cell
from hrm_rl.study.results import RunResult
from hrm_rl.study.statistics import FEW, ArmSummary, Interval, MetricSummary, by_arm, metric_names, summarise
from hrm_rl.study.verdicts import MARGINS, RARE, Verdict, bracket, default_judge, verdicts

REPORT, COMPUTE = "report.html", "compute.svg"
CURVES = {  # metrics drawn over the updates, and how the figure calls them
    "accuracy": "accuracy", "regret": "regret", "target_drift": "target drift", "logit_mean_abs": "mean |logit|",
    "bias_continue": "bias of CONTINUE",
}  # fmt: skip
_FIELDS_OF = {"tau": "target", "period": "target", "replay_size": "replay", "lam": "backup", "head_width": "head",
              "head_norm": "head", "exploration": "epsilon"}  # fmt: skip
SEVERAL = "several settings"  # title of the arms that differ in three or more, or two where there are many groups
_NAMES = {  # of the sections
    "costs": "Accuracy and cost", "verdicts": "Verdicts", "arms": "Arms", "curves": "Learning curves",
    "bias": "Bias by step", "metrics": "All metrics", "stability": "Stability", "glossary": "Glossary",
    "source": "Provenance",
}  # fmt: skip
_PER_FOREST = 14
_WORST_ARMS = 5  # beside the baseline, whose bias is shown by step
_MOST_RUNS = 200  # of unstable ones that are listed
_STRONG = 3.0  # standard deviations over seeds at which a cell has its full colour


@dataclass(frozen=True)
class _Report:
    """All that the sections are made of."""

    info: StudyInfo
    runs: list[RunResult]
    arms: dict[str, list[RunResult]]
    summaries: dict[str, ArmSummary]
    judged: dict[int, Any]  # place in `runs` -> verdict on that run
    verdicts: list[Verdict]
    metrics: Mapping[str, Sequence[str]]  # name -> (sentence, better side, unit)

    @property
    def baseline(self) -> ArmSummary | None:
        return self.summaries.get(self.info.baseline)

    def stability(self, arm: str) -> list[Any]:
        """Verdicts on an arm's runs, in the order of their seeds."""
        return [self.judged[i] for i, run in enumerate(self.runs) if run.arm == arm]

    def unstable(self, arm: str) -> int:
        return sum(found.unstable for found in self.stability(arm))

    def could_judge(self, arm: str) -> int:
        """Runs of an arm whose stability could be judged; one that failed could not."""
        return sum(found.judged for found in self.stability(arm))

    def is_share(self, metric: str) -> bool:
        return metric in self.metrics and self.metrics[metric][2] == "share"


def write_report(
    out_folder: Path, info: StudyInfo, results: Sequence[RunResult], judge: Callable[[RunResult], Any] | None = None,
    metrics: Mapping[str, Sequence[str]] | None = None,
) -> Path:  # fmt: skip
    """Write report.html into `out_folder`, whole or not at all, and return its path. OSError passes through.

    Of a study of whole trainings (`kind: train`) compute.svg as well, its figure of accuracy against arithmetic.

    judge: run -> verdict on its stability (`hrm_rl.study.stability.verdict` if None). metrics: name -> (sentence,
    "higher", "lower" or "none" for what is better, unit) (`hrm_rl.study.measures.METRICS` if None); a metric of a run
    that is not in it is shown without a better side. The order of `results` does not matter.
    """
    out_folder.mkdir(parents=True, exist_ok=True)
    path = out_folder / REPORT
    write_atomically(path, render(info, results, judge, metrics).encode("utf-8", "replace"))
    if info.kind == "train" and results:
        runs = info.in_order(results)
        drawn = _cost_figure(by_arm(runs), costs.cost_rows(info, runs))
        write_atomically(out_folder / COMPUTE, drawn.svg())
    return path


def render(
    info: StudyInfo, results: Sequence[RunResult], judge: Callable[[RunResult], Any] | None = None,
    metrics: Mapping[str, Sequence[str]] | None = None,
) -> str:  # fmt: skip
    """The HTML of `write_report`."""
    report = _gather(info, results, judge or default_judge(), _known_metrics() if metrics is None else metrics)
    return page(info.title, _head(report) + "".join(section(report) for section in _sections(info).values()))


def _sections(info: StudyInfo) -> dict[str, Callable[[_Report], str]]:
    """What a study of its kind is told in: anchor -> section. Whole trainings are about what is reached at which cost.
    """
    if info.kind == "train":
        return {"costs": _cost_section, "arms": _arm_section, "curves": _curve_section, "metrics": _heat_section,
                "glossary": _glossary_section, "source": _provenance_section}  # fmt: skip
    return {"verdicts": _verdict_section, "arms": _arm_section, "curves": _curve_section, "bias": _bias_section,
            "metrics": _heat_section, "stability": _stability_section, "glossary": _glossary_section,
            "source": _provenance_section}  # fmt: skip


def _gather(
    info: StudyInfo, results: Sequence[RunResult], judge: Callable[[RunResult], Any],
    metrics: Mapping[str, Sequence[str]],
) -> _Report:  # fmt: skip
    runs = info.in_order(results)
    way = {name: {"higher": 1, "lower": -1}.get(row[1], 0) for name, row in metrics.items()}
    judged = {i: judge(run) for i, run in enumerate(runs)}
    summaries = summarise(runs, info.baseline, way)
    return _Report(info, runs, by_arm(runs), summaries, judged, verdicts(info, runs, judge), metrics)


def _known_metrics() -> Mapping[str, Sequence[str]]:
    from hrm_rl.study.measures import METRICS

    return METRICS


# --- the head -------------------------------------------------------------------------------------------------


def _headline(report: _Report) -> str:
    if report.info.kind == "train" and report.runs:
        return _accuracy_headline(report)
    bad = {arm: (report.unstable(arm), report.could_judge(arm)) for arm in report.arms if report.unstable(arm)}
    worst = sorted(bad, key=lambda arm: -bad[arm][0] / bad[arm][1])
    named = ", ".join(f"{arm} in {bad[arm][0]} of {bad[arm][1]} runs" for arm in worst[:4])
    more = f" and {len(worst) - 4} more" if len(worst) > 4 else ""
    arms = f"{len(report.arms)} arm{'s' * (len(report.arms) != 1)}"
    if not report.arms:
        return "No run of this study has a result yet."
    if not any(report.could_judge(arm) for arm in report.arms):
        return f"All {len(report.runs)} runs of {arms} failed, and nothing can be said about them."
    first = f"{len(bad)} of {arms} {'was' if len(bad) == 1 else 'were'} unstable in at least one run ({named}{more})" \
        if bad else f"No run of {arms} was unstable"  # fmt: skip
    base = report.baseline
    if base is None:
        return f"{first}; the baseline {report.info.baseline} has no run."
    accuracy = base.metrics.get("accuracy")
    held = f"solved {percent(accuracy.mean)} of the puzzles" if accuracy and accuracy.measured else "has no accuracy"
    runs, judged = f"{len(base.seeds)} seed{'s' * (len(base.seeds) != 1)}", report.could_judge(base.arm)
    name = "the baseline" if base.arm == "baseline" else f"the baseline {base.arm}"
    return f"{first}; {name} {held} over {runs} and was unstable in {report.unstable(base.arm)} of {judged} runs."


def _accuracy_headline(report: _Report) -> str:
    """Which arm solved most, and what the baseline did."""
    solved = {arm: s.metrics["accuracy"].mean for arm, s in report.summaries.items()
              if s.metrics.get("accuracy") and math.isfinite(s.metrics["accuracy"].mean.value)}  # fmt: skip
    if not solved:
        return f"None of the {len(report.runs)} runs has an accuracy."
    best = max(solved, key=lambda arm: solved[arm].value)
    first = f"{best} solved most of {len(solved)} arm{'s' * (len(solved) != 1)}: {percent(solved[best])} of the puzzles"
    base = report.info.baseline
    return first + (f"; the baseline {percent(solved[base])}." if base in solved and base != best else ".")


def percent(interval: Interval) -> str:
    return f"{100 * interval.value:.1f} % {bracket(interval, '.1f', 100)}" if math.isfinite(interval.value) else "–"


def _head(report: _Report) -> str:
    info = report.info
    parts = [f"<h1>{escape(info.title)}</h1>"]
    if info.question:
        parts.append(f"<p>{escape(info.question)}</p>")
    parts.append(f"<blockquote>{escape(_headline(report))}</blockquote>")
    parts += [f'<p class="note">{escape(note)}</p>' for note in _warnings(report)]
    links = "".join(f"<a href=#{anchor}>{_NAMES[anchor]}</a>" for anchor in _sections(info))
    parts.append(f"<nav>{links}</nav>")
    return "".join(parts)


def _warnings(report: _Report) -> list[str]:
    """What a reader has to know before the numbers, in words."""
    notes = []
    if len(report.runs) < report.info.planned:
        notes.append(f"This study is not finished: {len(report.runs)} of {report.info.planned} planned runs are here.")
    few = [s for s in report.summaries.values() if s.few]
    if few:
        seeds = sorted({len(s.seeds) for s in few})
        arms = len(report.summaries)
        which = "All arms have" if len(few) == arms else f"{len(few)} of {arms} arms have"
        counts = " or ".join(map(str, seeds))
        notes.append(f"{which} fewer than {FEW} seeds ({counts}): their intervals are too narrow to be trusted, and no "
                     "claim is decided on them.")  # fmt: skip
    ends = Counter(run.status for run in report.runs)
    lost = [f"{ends[end]} {end}" for end in ("diverged", "failed") if ends[end]]
    if lost:
        notes.append(f"Of {len(report.runs)} runs {' and '.join(lost)}. They count: their accuracy is 0, other metrics "
                     "have no value for them (how many have one is said wherever some have not).")  # fmt: skip
    return notes


# --- verdicts -------------------------------------------------------------------------------------------------


def _verdict_section(report: _Report) -> str:
    rows = []
    for verdict in report.verdicts:
        badge = f'<span class="badge {verdict.outcome.replace(" ", "-")}">{escape(verdict.outcome)}</span>'
        detail = escape(verdict.measured)
        if len(verdict.contrasts) > 3:
            items = "".join(f"<li>{escape(contrast.in_words())}</li>" for contrast in verdict.contrasts)
            detail += folded(f"all {len(verdict.contrasts)} contrasts", f"<ul>{items}</ul>")
        rows.append([
            Cell(f"{escape(verdict.claim)}<br><span class=small>{escape(verdict.statement)}</span>", verdict.claim,
                 kind="name"),
            Cell(badge, verdict.outcome), text_cell(verdict.reason, "text"),
            Cell(detail, verdict.measured, kind="text"),
        ])  # fmt: skip
    points = f"{100 * MARGINS['accuracy']:g} point{'s' * (MARGINS['accuracy'] != 0.01)}"
    rule = (
        "Each verdict follows a fixed rule over arms that differ in one switch only. A gain counts if it is over its "
        f"margin ({points} of accuracy, {MARGINS['regret']:g} of regret, or any surely smaller share of unstable runs) "
        "and its interval, corrected for the number of comparisons, lies above 0. That something is not needed takes "
        f"95 % intervals that leave no room for such a gain (for unstable runs: for one of {MARGINS['unstable']:.0%}), "
        f"and a baseline that is not unstable in more than {RARE:.0%} of its runs. Square brackets are 95 % intervals."
    )  # fmt: skip
    claims = table(("claim of the paper", "verdict", "why", "what was measured"), rows, sortable=False)
    return (f'<h2 id="verdicts">What the paper claims, and what was measured</h2>{claims}<p class=small>{escape(rule)} '
            "Paper: HRM, arXiv:2506.21734, ACT section.</p>")  # fmt: skip


# --- accuracy and cost ----------------------------------------------------------------------------------------


def _cost_section(report: _Report) -> str:
    head = '<h2 id="costs">Accuracy and cost</h2>'
    held = costs.cost_rows(report.info, report.runs)
    if not held:
        return head + "<p>No run was measured.</p>"
    rows = [[
        text_cell(row.arm, "name"), number_cell(len(row.finals)), _share(row.accuracy.value),
        _bracket_cell(row.accuracy, 100, ".1f"), text_cell(costs.each(row.finals)),
        number_cell(row.mean_steps.value, number(row.mean_steps.value, ".2f")),
        number_cell(row.parameters or math.nan, f"{row.parameters:,}" if row.parameters else None),
        number_cell(row.flops, number(row.flops / costs.MEGA, ",.0f")),
        number_cell(max(row.seconds), costs.minutes(row)),
    ] for row in held]  # fmt: skip
    heads = ("arm", "seeds", "accuracy, %", "95 % interval", "each seed, %", "mean segments", "parameters",
             "MFLOP a puzzle", "minutes of training")  # fmt: skip
    note = (
        "Accuracy at the learned halt on all test puzzles, intervals over seeds and puzzles. MFLOP: the matrix "
        "products of one puzzle up to its halt, forward. Lines: every puzzle halted at segment 1, 2, ..., mean over "
        "seeds."
    )
    image = figure(_cost_figure(report.arms, held), big=True)
    return f"{head}{table(heads, rows)}{image}<p class=small>{escape(note)}</p>"


def _cost_figure(arms: Mapping[str, Sequence[RunResult]], rows: Sequence[costs.CostRow]) -> plots.Image:
    drawn = [(row.arm, costs.step_curves(arms[row.arm], row.flops_per_segment), row.flops / costs.MEGA, row.accuracy)
             for row in rows]  # fmt: skip
    return plots.accuracy_against_compute(
        drawn, "exact accuracy, %: halted at the learned segment (diamond) and at any fixed one (line)"
    )


# --- arms -----------------------------------------------------------------------------------------------------


def groups(info: StudyInfo, arms: Mapping[str, Sequence[RunResult]]) -> dict[str, list[str]]:
    """What differs from the baseline -> arms, in the study's order; arms without a difference are left out.

    Settings that only tune another one count as that one. Where that makes more than ten groups, those of several
    settings are one.
    """
    found: dict[str, list[str]] = {}
    for arm, runs in arms.items():
        if arm == info.baseline:
            continue
        short = [name.rsplit(".", 1)[-1] for name in info.changes(arm, runs)]
        names = list(dict.fromkeys(_FIELDS_OF.get(name, name) for name in short))
        title = " and ".join(names) if len(names) < 3 else SEVERAL
        found.setdefault(title or "nothing but the name", []).append(arm)
    if len(found) > 10:
        merged: dict[str, list[str]] = {}
        for name, members in found.items():
            merged.setdefault(SEVERAL if " and " in name else name, []).extend(members)
        found = merged
    return found


def pages(members: Sequence[str], most: int) -> list[list[str]]:
    """Members in pages of about the same length, at most `most` each."""
    count = max(1, math.ceil(len(members) / most))
    return [list(part) for part in np.array_split(np.array(members, dtype=object), count)]


def _titled(report: _Report, most: int) -> list[tuple[str, list[str]]]:
    """(title, arms) of every page of figures; the baseline alone where there is nothing else."""
    found = []
    for name, members in groups(report.info, report.arms).items():
        parts = pages(members, most)
        titles = [name] if len(parts) == 1 else [f"{name} ({i} of {len(parts)})" for i in range(1, len(parts) + 1)]
        found += list(zip(titles, parts, strict=True))
    return found or [("baseline", [])]


def _arm_section(report: _Report) -> str:
    parts = ['<h2 id="arms">Arms</h2>']
    if not report.arms:
        return "".join(parts) + "<p>None.</p>"
    parts.append("<p class=small>Every dot is a seed, the diamond their mean, the bar its 95 % interval, the grey band "
                 "the baseline's. Intervals are over seeds, those of accuracy over puzzles as well. Much of their "
                 "width is the choice of puzzles, which all arms share: compare arms by the difference, paired over "
                 "puzzles where it can be.</p>")  # fmt: skip
    base = [report.baseline] if report.baseline else []
    for i, (title, members) in enumerate(_titled(report, _PER_FOREST)):
        shown = base + [report.summaries[arm] for arm in members]
        drawn = [plots.forest(shown, metric, report.baseline, f"{metric} of {title}", report.is_share(metric), minus)
                 for metric, minus in (("accuracy", False), ("accuracy", True), ("regret", False))
                 if any(metric in s.metrics for s in shown) and not (minus and len(shown) < 2)]  # fmt: skip
        images = "".join(figure(image, big=True) for image in drawn)
        parts.append(folded(f"{title}: {len(members)} arm{'s' * (len(members) != 1)} and the baseline", images, i < 3))
    parts.append(_arm_table(report))
    return "".join(parts)


def _arm_table(report: _Report) -> str:
    heads = (
        "arm", "what differs", "seeds", "accuracy", "95 % interval", "worst seed", "worst fifth", "IQM",
        "against baseline", "95 % interval", "P(better)", "95 % interval", "regret", "every seed's accuracy",
    )  # fmt: skip
    rows = []
    for arm, summary in report.summaries.items():
        accuracy = summary.metrics.get("accuracy") or _nothing(len(summary.seeds))
        regret = summary.metrics.get("regret") or _nothing(len(summary.seeds))
        difference, chance = accuracy.difference, accuracy.improvement
        changes = report.info.changes(arm, report.arms[arm])
        counted = f"{len(summary.seeds)}{' (few)' if summary.few else ''}"
        gain = number(100 * difference.value, "+.1f") + (" paired" if accuracy.paired else "")
        rows.append([
            text_cell(arm, "name"),
            text_cell(", ".join(f"{name}={value}" for name, value in changes.items()) or "–"),
            number_cell(len(summary.seeds), counted), _share(accuracy.mean.value),
            _bracket_cell(accuracy.mean, 100, ".1f"), _share(accuracy.worst), _share(accuracy.cvar),
            _share(accuracy.iqm.value), number_cell(difference.value, gain),
            _bracket_cell(difference, 100, "+.1f"), number_cell(chance.value, number(chance.value, ".2f")),
            _bracket_cell(chance, 1, ".2f"),
            number_cell(regret.mean.value, number(regret.mean.value) + _missing(regret)),
            Cell(folded("show", escape(", ".join(number(100 * v, ".1f") for v in accuracy.finals))), str(arm)),
        ])  # fmt: skip
    note = (
        "Accuracy in percent at the last checkpoint. Worst fifth (CVaR): mean of the worst 20 % of the seeds, one at "
        "least. IQM: mean of the middle half of the seeds; it hides rare failures, so read it beside the worst seed. "
        "Against baseline in points, paired over puzzles where both arms have the same core. P(better): chance that a "
        "run of the arm is more accurate than one of the baseline, ties half (arXiv:2108.13264). Intervals of this "
        "table are not corrected for the number of arms: of 100 arms that differ in nothing, 5 to 10 would seem to."
    )
    return f"<h3>Every arm</h3>{table(heads, rows)}<p class=small>{escape(note)}</p>"


def _nothing(runs: int) -> MetricSummary:
    """A metric that no run has."""
    none = Interval(math.nan)
    return MetricSummary((math.nan,) * runs, 0, none, math.nan, math.nan, none, none, False, none)


def _share(value: float) -> Cell:
    return number_cell(value, number(100 * value, ".1f"))


def _bracket_cell(interval: Interval, scale: float, form: str) -> Cell:
    """An interval, sorted by its low end."""
    return number_cell(interval.low, bracket(interval, form, scale) if interval.known else "–")


def _missing(found: MetricSummary) -> str:
    """How many runs have a value, where some have not."""
    runs = len(found.finals)
    return f" ({found.measured} of {runs})" if found.measured < runs else ""


# --- curves and biases ----------------------------------------------------------------------------------------


def _curve_section(report: _Report) -> str:
    parts = ['<h2 id="curves">Learning curves</h2>']
    shown = [metric for metric in CURVES if any(metric in run.metrics for run in report.runs)]
    if not shown:
        return "".join(parts) + "<p>No run was measured.</p>"
    parts.append("<p class=small>Every seed thin, the mean over the runs that have a value thick; a cross is where a "
                 "run that diverged or failed was last measured. Axes are logarithmic where a few values would flatten "
                 "all others.</p>")  # fmt: skip
    base = [(report.info.baseline, "base")] if report.info.baseline in report.arms else []
    for i, (title, members) in enumerate(_titled(report, len(plots.SERIES))):
        arms = base + list(zip(members, plots.SERIES, strict=False))
        legend = "".join(key(color, f"{arm} ({plots.seeds_of(report.summaries[arm], '')})") for arm, color in arms)
        drawn = [(arm, color, report.arms[arm]) for arm, color in arms]
        images = "".join(figure(plots.curves(drawn, metric, CURVES[metric])) for metric in shown)
        parts.append(folded(title, f'<p>{legend}</p><div class="figs">{images}</div>', i < 1))
    return "".join(parts)


def worst_arms(report: _Report, most: int = _WORST_ARMS) -> list[str]:
    """Arms to look at: by share of unstable runs, then by mean accuracy; the baseline is not among them."""
    def badness(arm: str) -> tuple[float, float]:
        accuracy = report.summaries[arm].metrics.get("accuracy")
        mean = accuracy.mean.value if accuracy else math.nan
        return -report.unstable(arm) / max(1, report.could_judge(arm)), mean if math.isfinite(mean) else -1.0

    return sorted((arm for arm in report.arms if arm != report.info.baseline), key=badness)[:most]


def _bias_section(report: _Report) -> str:
    parts = ['<h2 id="bias">Bias by step and action</h2>']
    base = [report.info.baseline] if report.info.baseline in report.arms else []
    arms = [arm for arm in base + worst_arms(report) if any("bias_continue" in run.by_step for run in report.arms[arm])]
    if not arms:
        return "".join(parts) + "<p>Nothing was measured by segment.</p>"
    images = "".join(figure(plots.bias_by_step(arm, report.arms[arm], "bias_halt", "bias_continue")) for arm in arms)
    parts.append("<p class=small>Q minus the exact optimum, mean over puzzles, signed: above 0 it promises too much. "
                 "The baseline and the worst arms (by unstable runs, then accuracy), at the last checkpoint that has a "
                 f'value.</p><div class="figs">{images}</div>')  # fmt: skip
    return "".join(parts)


# --- all metrics ----------------------------------------------------------------------------------------------


def _heat_section(report: _Report) -> str:
    names = [*(n for n in report.metrics if n in metric_names(report.runs)),
             *(n for n in metric_names(report.runs) if n not in report.metrics)]  # fmt: skip
    head = '<h2 id="metrics">All metrics against the baseline</h2>'
    if not names:
        return head + "<p>No run was measured.</p>"
    rows = []
    for arm, summary in report.summaries.items():
        row = [text_cell(f"{arm} ({len(summary.seeds)})", "name")]
        for name in names:
            found = summary.metrics[name] if name in summary.metrics else _nothing(len(summary.seeds))
            shown = number(found.mean.value) + _missing(found)
            row.append(number_cell(found.mean.value, shown, _shade(report, name, found)))
        rows.append(row)
    text = (
        "Mean over seeds at the last checkpoint; behind each arm its number of seeds. Blue is better than the baseline "
        "and orange worse; full colour is three standard deviations over the baseline's and the arm's seeds. Without "
        "colour: the interval of the difference holds 0, or neither side is better. About one cell of twenty has a "
        "colour by chance."
    )
    return f"{head}<p class=small>{escape(text)}</p>{table(('arm (seeds)', *names), rows)}"


def _shade(report: _Report, name: str, found: MetricSummary) -> float:
    """-1 (worse) to 1 (better): the difference from the baseline in standard deviations, if its interval excludes 0."""
    way = {"higher": 1, "lower": -1}.get(report.metrics[name][1], 0) if name in report.metrics else 0
    if not way or report.baseline is None or not found.difference.excludes(0):
        return 0.0
    other = report.baseline.metrics.get(name)
    sides = [np.array(side.finals) for side in (found, other) if side is not None]
    with np.errstate(over="ignore"):  # of values that exploded
        variances = [side[np.isfinite(side)].var() for side in sides if np.isfinite(side).any()]
    spread = math.sqrt(np.mean(variances)) if variances else 0.0
    size = min(1.0, abs(found.difference.value) / (_STRONG * spread)) if spread > 0 else 1.0
    return math.copysign(max(size, 0.15), way * found.difference.value)


# --- stability ------------------------------------------------------------------------------------------------


def _stability_section(report: _Report) -> str:
    rows = []
    for arm, summary in report.summaries.items():
        found = report.stability(arm)
        collapses = [s.collapse_update for s in found if s.collapse_update is not None]
        reasons = Counter(_kind_of(reason) for s in found for reason in s.reasons)
        rows.append([
            text_cell(arm, "name"), number_cell(len(found), f"{len(found)}{' (few)' if summary.few else ''}"),
            number_cell(report.unstable(arm), f"{report.unstable(arm)} of {report.could_judge(arm)}"),
            *(number_cell(count) for count in (summary.finished, summary.diverged, summary.failed)),
            number_cell(min(collapses, default=math.nan), f"update {min(collapses)}" if collapses else "–"),
            _mean_share([s.peak_accuracy for s in found]), _mean_share([s.final_accuracy for s in found]),
            text_cell("; ".join(f"{reason} ({count})" for reason, count in reasons.most_common(4)) or "–", "text"),
        ])  # fmt: skip
    listed = [(run, report.judged[i]) for i, run in enumerate(report.runs)
              if report.judged[i].unstable or run.status != "finished"]  # fmt: skip
    runs = ""
    if listed:
        cells = [[text_cell(run.arm, "name"), number_cell(run.seed, str(run.seed)), text_cell(run.status),
                  number_cell(s.collapse_update if s.collapse_update is not None else math.nan),
                  _share(_float(s.peak_accuracy)), _share(_float(s.final_accuracy)),
                  text_cell("; ".join([*s.reasons, *([run.reason] if run.reason else [])]), "text")]
                 for run, s in listed[:_MOST_RUNS]]  # fmt: skip
        more = f" (the first {_MOST_RUNS})" if len(listed) > _MOST_RUNS else ""
        heads = ("arm", "seed", "status", "collapse at update", "peak accuracy", "final accuracy", "why")
        runs = folded(f"{len(listed)} runs that were unstable or did not finish{more}", table(heads, cells))
    note = ("Peak and final accuracy in percent, mean over the runs that have one, as measured: a run that diverged is "
            "not 0 here. Unstable: of the runs that could be judged, which one that failed cannot. First collapse: the "
            "earliest of the arm's runs.")  # fmt: skip
    arms = table(("arm", "runs", "unstable", "finished", "diverged", "failed", "first collapse", "peak accuracy",
                  "final accuracy", "why"), rows)  # fmt: skip
    return f'<h2 id="stability">Stability</h2>{arms}<p class=small>{escape(note)}</p>{runs}'


def _kind_of(reason: str) -> str:
    """A reason without its numbers, so that those of ten seeds are counted as one."""
    words = reason.split(":")[0].split()
    return " ".join(word for word in words if not any(c.isdigit() for c in word)) or reason


def _float(value: float | None) -> float:
    return math.nan if value is None else float(value)


def _mean_share(values: Sequence[float | None]) -> Cell:
    known = [float(v) for v in values if v is not None and math.isfinite(v)]
    return _share(sum(known) / len(known) if known else math.nan)


# --- glossary and provenance ----------------------------------------------------------------------------------


def _glossary_section(report: _Report) -> str:
    rows = []
    for name in metric_names(report.runs):
        sentence, better, unit = report.metrics.get(name, ("Not described.", "none", ""))
        side = f"; {better} is better" if better in ("higher", "lower") else ""
        about = f"<span class=small>({escape(unit)}{side})</span>"
        rows.append(f"<dt>{escape(name)}</dt><dd>{escape(sentence)} {about}</dd>")
    return f'<h2 id="glossary">What the metrics mean</h2><dl>{"".join(rows)}</dl>'


def _provenance_section(report: _Report) -> str:
    info = report.info
    seeds = sorted({run.seed for run in report.runs})
    whole = len(seeds) > 2 and seeds == list(range(seeds[0], seeds[-1] + 1))
    named = f"{seeds[0]} to {seeds[-1]}" if whole else ", ".join(map(str, seeds[:50]))
    cores = sorted({run.puzzles for run in report.runs if run.puzzles})
    rows = {
        "command": info.command, "date": info.date, "machine": info.machine, "torch": info.torch, **info.versions,
        "kind of study": info.kind, "baseline": info.baseline, "arms": len(report.arms),
        "runs": f"{len(report.runs)} of {info.planned} planned", "seeds": named, "updates of a run": info.updates,
        "puzzles measured on": info.puzzles, "training in all": f"{sum(r.seconds for r in report.runs):.0f} s",
        "core and puzzles (SHA-256)": ", ".join(cores[:5]) + (f" and {len(cores) - 5} more" if len(cores) > 5 else ""),
    }  # fmt: skip
    cells = [[text_cell(name), text_cell(value, "text")] for name, value in rows.items()]
    facts = table(("", ""), cells, sortable=False)
    settings = info.arms.get(info.baseline, {})
    base = table(("setting", "value"), [[text_cell(n), text_cell(v)] for n, v in settings.items()], sortable=False)
    return f'<h2 id="source">Where this comes from</h2>{facts}{folded("all settings of the baseline", base)}'
