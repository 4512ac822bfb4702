"""Figures of a study as SVG images that hold everything they need and follow the reader's light or dark scheme.

Matplotlib draws with the light colours; each is then replaced by a CSS variable that has a dark value as well. Every
figure says how many seeds it shows, each seed is drawn, and a run without a result is drawn as a cross, never left out.
"""

from __future__ import annotations

import base64
import math
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from hrm_rl.study.results import RunResult
from hrm_rl.study.statistics import FEW, ArmSummary, Interval

# name -> (light, dark). The light ones differ from each other: they are what is replaced.
COLORS = {
    "ink": ("#1f2430", "#e6e8ee"), "muted": ("#6b7280", "#9aa3b2"), "grid": ("#d8dce3", "#3a4150"),
    "base": ("#4b5563", "#c3cad6"), "s0": ("#0068a8", "#5ab4f0"), "s1": ("#c4520a", "#ff9a52"),
    "s2": ("#00805e", "#37d3a0"), "s3": ("#96407d", "#e598cb"),
}  # fmt: skip
SERIES = ("s0", "s1", "s2", "s3")
_LARGEST = 1e30  # what is drawn of a value that exploded
_DPI = 96


@dataclass(frozen=True)
class Image:
    """An image for an HTML page, with its size in CSS pixels."""

    uri: str
    width: int
    height: int
    alt: str

    def svg(self) -> bytes:
        """The image as a file of its own."""
        return base64.b64decode(self.uri.partition(",")[2])


def forest(
    summaries: Sequence[ArmSummary], metric: str, baseline: ArmSummary | None, title: str, share: bool,
    difference: bool = False,
) -> Image:  # fmt: skip
    """One row an arm: every seed a dot, the mean with its interval, the baseline's interval as a band.

    share: the metric is a share, shown in percent. difference: everything minus the baseline's mean, with the interval
    of the difference; the baseline is the line at 0.
    """
    scale = 100 if share else 1
    if difference:
        summaries = [_minus(s, metric, baseline) for s in summaries if baseline is None or s.arm != baseline.arm]
        baseline = None
    label = f"{metric}{' minus the baseline' * difference}{', points' if difference and share else ', %' * share}"

    def draw(axes) -> None:
        _style(axes)
        if baseline is not None and metric in baseline.metrics:
            mean = baseline.metrics[metric].mean
            if mean.known:
                axes.axvspan(scale * _cut(mean.low), scale * _cut(mean.high), color=_c("grid"), lw=0, zorder=0)
            if math.isfinite(mean.value):
                axes.axvline(scale * _cut(mean.value), color=_c("muted"), lw=1, zorder=1)
        for row, summary in enumerate(summaries):
            _forest_row(axes, row, summary, metric, baseline, scale)
        axes.set_ylim(len(summaries) - 0.4, -0.6)
        axes.set_yticks(range(len(summaries)), [shortened(s.arm, 32) for s in summaries])
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="y", visible=False)
        _scale(axes, "x", [scale * v for s in summaries if metric in s.metrics for v in s.metrics[metric].finals])
        axes.set_xlabel(f"{label} at the last checkpoint")
        if difference:
            axes.axvline(0, color=_c("muted"), lw=1, zorder=1)
        for row, summary in enumerate(summaries):
            axes.text(1.02, row, seeds_of(summary, metric), fontsize=8, color=_c("muted"), va="center",
                      transform=axes.get_yaxis_transform())  # fmt: skip

    longest = max((len(shortened(s.arm, 32)) for s in summaries), default=0)
    return _render(draw, 7.4, 0.6 + 0.27 * max(2, len(summaries)), title, (0.3 + 0.08 * longest, 1.6, 0.5, 0.1))


def _minus(summary: ArmSummary, metric: str, baseline: ArmSummary | None) -> ArmSummary:
    """A summary of one metric with the baseline's mean taken off, and the interval of the difference."""
    found = summary.metrics.get(metric)
    if found is None or baseline is None or metric not in baseline.metrics:
        return replace(summary, metrics={})
    zero = baseline.metrics[metric].mean.value
    finals = tuple(value - zero for value in found.finals)
    return replace(summary, metrics={metric: replace(found, finals=finals, mean=found.difference)})


def _forest_row(axes, row: int, summary: ArmSummary, metric: str, baseline: ArmSummary | None, scale: float) -> None:
    found = summary.metrics.get(metric)
    if found is None or not found.measured:
        axes.text(0.5, row, "no run has a value", color=_c("muted"), ha="center", va="center", fontsize=8,
                  transform=axes.get_yaxis_transform())  # fmt: skip
        return
    color = _c("base") if baseline is not None and summary.arm == baseline.arm else _c("s0")
    values = np.array([_cut(v) for v in found.finals]) * scale
    axes.plot(values, np.full(len(values), row + 0.18), "o", ms=3.2, color=color, alpha=0.45, mew=0, zorder=2)
    mean = found.mean
    if mean.known:
        axes.plot([scale * _cut(mean.low), scale * _cut(mean.high)], [row - 0.12] * 2, color=color, lw=2.2, zorder=3)
    axes.plot([scale * _cut(mean.value)], [row - 0.12], "D", ms=5, color=color, zorder=4)


def seeds_of(summary: ArmSummary, metric: str) -> str:
    """How many seeds, how many of them without a value, and whether that is too few."""
    runs, found = len(summary.seeds), summary.metrics.get(metric)
    words = f"{runs} seed{'s' * (runs != 1)}"
    if found is not None and found.measured < runs:
        words += f", {runs - found.measured} without"
    return words + (" (few)" if summary.few else "")


def curves(arms: Sequence[tuple[str, str, Sequence[RunResult]]], metric: str, label: str) -> Image:
    """One metric over the updates. arms: (name, colour name, runs); every seed thin, their mean thick; a cross where a
    run that diverged or failed was last seen."""
    def draw(axes) -> None:
        _style(axes)
        drawn: list[float] = []
        for _, color, runs in arms:
            series = [_series(run, metric) for run in runs]
            for run, (updates, values) in zip(runs, series, strict=True):
                axes.plot(updates, values, color=_c(color), lw=0.6, alpha=0.35)
                seen = np.isfinite(values)
                if run.status != "finished" and seen.any():
                    last = int(seen.nonzero()[0][-1])
                    axes.plot([updates[last]], [values[last]], "x", ms=5, mew=1.4, color=_c(color), zorder=5)
                drawn += values[seen].tolist()
            updates, mean = _mean_curve(series)
            axes.plot(updates, mean, color=_c(color), lw=2, zorder=4)
        if not drawn:
            axes.text(0.5, 0.5, "no value", color=_c("muted"), ha="center", transform=axes.transAxes)
        _scale(axes, "y", drawn)
        axes.set_xlabel("updates")
        axes.set_title(f"{label}\n{seeds_in_words([len(runs) for _, _, runs in arms])}", fontsize=8.5, color=_c("ink"))

    names = ", ".join(name for name, _, _ in arms)
    return _render(draw, 3.5, 2.5, f"{label} over the updates: {names}")


def bias_by_step(name: str, runs: Sequence[RunResult], halt: str, proceed: str) -> Image:
    """Signed bias of both actions by segment at the last checkpoint with values; `halt` and `proceed` name them."""
    def draw(axes) -> None:
        _style(axes)
        axes.axhline(0, color=_c("muted"), lw=1)
        drawn: list[float] = []
        for color, metric, action in (("s0", halt, "HALT"), ("s1", proceed, "CONTINUE")):
            rows = [row for row in (_last_row(run, metric) for run in runs) if row is not None]
            for row in rows:
                axes.plot(np.arange(1, len(row) + 1), row, color=_c(color), lw=0.6, alpha=0.35)
                drawn += row[np.isfinite(row)].tolist()
            if rows and len({len(row) for row in rows}) == 1:
                axes.plot(np.arange(1, len(rows[0]) + 1), _nanmean(np.stack(rows)), color=_c(color), lw=2, label=action)
        if drawn:
            axes.legend(fontsize=7, frameon=False, labelcolor=_c("ink"))
        else:
            axes.text(0.5, 0.5, "no value", color=_c("muted"), ha="center", transform=axes.transAxes)
        _scale(axes, "y", drawn)
        axes.set(xlabel="segment", ylabel="Q minus the optimum")
        axes.set_title(f"{shortened(name, 40)}\n{seeds_in_words([len(runs)])}", fontsize=8.5, color=_c("ink"))

    return _render(draw, 3.5, 2.6, f"bias of Q by segment and action: {name}")


def accuracy_against_compute(
    arms: Sequence[tuple[str, tuple[Sequence[float], Sequence[float]], float, Interval]], label: str
) -> Image:  # fmt: skip
    """arms: (name, (MFLOP, accuracy) of every fixed number of segments, MFLOP and accuracy of the learned halt).

    A line for fixed numbers of segments, a diamond with its interval for the learned halt; the first arm is the
    baseline.
    """
    def draw(axes) -> None:
        _style(axes)
        styles = ("-", "--", ":")
        for i, (name, (flops, accuracy), at, interval) in enumerate(arms):
            color = _c("base" if i == 0 else SERIES[(i - 1) % len(SERIES)])
            style = styles[0 if i == 0 else (i - 1) // len(SERIES) % len(styles)]
            axes.plot(flops, [100 * a for a in accuracy], style, color=color, lw=1.2, alpha=0.8,
                      label=shortened(name, 32))  # fmt: skip
            if math.isfinite(at) and math.isfinite(interval.value):
                if interval.known:
                    axes.plot([at] * 2, [100 * interval.low, 100 * interval.high], color=color, lw=1.6, zorder=4)
                axes.plot([at], [100 * interval.value], "D", ms=6, color=color, zorder=5)
        axes.set(xlabel="MFLOP a puzzle", ylim=(-2, 102))
        axes.set_title(label, fontsize=8.5, color=_c("ink"))
        if arms:
            axes.legend(fontsize=8, frameon=False, labelcolor=_c("ink"), loc="center left", bbox_to_anchor=(1.01, 0.5))

    names = ", ".join(name for name, *_ in arms)
    return _render(draw, 8.2, 3.4, f"accuracy against arithmetic: {names}", (0.5, 2.9, 0.5, 0.4))


def seeds_in_words(counts: Sequence[int]) -> str:
    """ "10 seeds an arm", "3 to 10 seeds an arm (fewer than 5: no intervals to trust)"."""
    low, high = min(counts, default=0), max(counts, default=0)
    words = f"{low} seed{'s' * (low != 1)}" if low == high else f"{low} to {high} seeds"
    return words + (" an arm" if len(counts) > 1 else "") + (f", fewer than {FEW}" if low < FEW else "")


def shortened(text: str, most: int) -> str:
    """One line of printable characters, cut in the middle where it is long."""
    text = re.sub(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]", "\N{REPLACEMENT CHARACTER}", text)
    return text if len(text) <= most else f"{text[: most - most // 3 - 1]}…{text[-(most // 3):]}"


# --- what the figures are made of -----------------------------------------------------------------------------


def _series(run: RunResult, metric: str) -> tuple[np.ndarray, np.ndarray]:
    """(C,) updates and values, NaN where there is none."""
    values = run.metrics.get(metric)
    updates = run.updates.numpy()
    if values is None or len(values) != len(updates):
        return updates, np.full(len(updates), np.nan)
    found = values.double().numpy()
    return updates, np.where(np.isfinite(found), np.clip(found, -_LARGEST, _LARGEST), np.nan)


def _mean_curve(series: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """Mean over the runs that have a value, at every update that any run has."""
    updates = np.unique(np.concatenate([at for at, _ in series])) if series else np.zeros(0)
    table = np.full((len(series), len(updates)), np.nan)
    for row, (at, values) in zip(table, series, strict=True):
        row[np.searchsorted(updates, at)] = values
    return updates, _nanmean(table)


def _nanmean(table: np.ndarray) -> np.ndarray:
    """Mean over rows (R, C) -> (C,), NaN where no row has a value."""
    seen = np.isfinite(table)
    count = seen.sum(0)
    return np.where(count, np.where(seen, table, 0).sum(0) / np.maximum(count, 1), np.nan)


def _last_row(run: RunResult, metric: str) -> np.ndarray | None:
    """(M,) at the last checkpoint with any finite value; None where there is none."""
    table = run.by_step.get(metric)
    if table is None:
        return None
    found = table.double().numpy()
    seen = np.isfinite(found).any(-1)
    if not seen.any():
        return None
    row = found[int(seen.nonzero()[0][-1])]
    return np.where(np.isfinite(row), np.clip(row, -_LARGEST, _LARGEST), np.nan)


def _cut(value: float) -> float:
    return math.nan if math.isnan(value) else max(-_LARGEST, min(_LARGEST, value))


def _scale(axes, which: str, values: Sequence[float]) -> None:
    """A symmetric logarithm where a few values would flatten all others."""
    sizes = np.abs([v for v in values if math.isfinite(v) and v])
    if len(sizes) and sizes.max() > 100 * np.median(sizes):
        middle = float(np.median(sizes))
        getattr(axes, f"set_{which}scale")("symlog", linthresh=max(middle, 1e-12))
        axis = getattr(axes, f"{which}axis")
        axis.set_major_locator(_few_decades(middle, float(sizes.max())))
        axis.set_major_formatter("{x:g}")  # Matplotlib's own is mathematics, which names of arms must never be


def _few_decades(linear: float, largest: float):
    from matplotlib.ticker import FixedLocator

    low, high = math.ceil(math.log10(linear)), math.ceil(math.log10(min(largest, _LARGEST)))
    steps = 10.0 ** np.arange(low, high + 1, max(1, (high - low) // 3))
    return FixedLocator([*(-steps[::-1]), 0, *steps])


def _c(name: str) -> str:
    return COLORS[name][0]


def _style(axes) -> None:
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(_c("muted"))
    axes.grid(color=_c("grid"), lw=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(colors=_c("ink"), labelsize=8, length=2)
    axes.xaxis.label.set(color=_c("muted"), size=8)
    axes.yaxis.label.set(color=_c("muted"), size=8)


_THEME = (
    "<style>svg{"
    + "".join(f"--{name}:{light};" for name, (light, _) in COLORS.items())
    + "}@media (prefers-color-scheme:dark){svg{"
    + "".join(f"--{name}:{dark};" for name, (_, dark) in COLORS.items())
    + "}}text{font-family:system-ui,sans-serif!important}</style>"
)
_RC = {"svg.fonttype": "none", "svg.hashsalt": "hrm_rl", "text.parse_math": False, "axes.unicode_minus": False,
       "path.simplify": True, "axes.formatter.useoffset": False}  # fmt: skip


def _render(
    draw: Callable, width: float, height: float, alt: str, margins: tuple[float, ...] = (0.65, 0.12, 0.5, 0.45)
) -> Image:
    """Draw on one pair of axes of width x height inches, transparent, and return the image.

    margins: left, right, bottom and top of the axes in inches. Matplotlib could find them, at several times the time.
    """
    import io

    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_RC), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # glyphs that Matplotlib's own font lacks: the reader's may not
        figure = Figure(figsize=(width, height), facecolor="none")
        FigureCanvasSVG(figure)
        left, right, bottom, top = margins
        axes = figure.add_axes((left / width, bottom / height, (width - left - right) / width,
                                (height - bottom - top) / height))  # fmt: skip
        axes.set_facecolor("none")
        draw(axes)
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={key: None for key in ("Creator", "Date", "Format", "Type")})
    text = file.getvalue()
    names = {light: name for name, (light, _) in COLORS.items()}
    text = re.sub(r": (#[0-9a-f]{6})\b", lambda m: f": var(--{names[m[1]]})" if m[1] in names else m[0], text)
    start = text.index("<svg")
    head, body = text[start:].split(">", 1)
    head = re.sub(r'(width|height)="[\d.]+pt"', "", head) + f' width="{width * _DPI:g}" height="{height * _DPI:g}"'
    encoded = base64.b64encode(f"{head}>{_THEME}{body}".encode()).decode()
    return Image(f"data:image/svg+xml;base64,{encoded}", round(width * _DPI), round(height * _DPI), alt)
