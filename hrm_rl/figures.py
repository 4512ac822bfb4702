"""Figures: of a run, of a comparison, and by name: `python -m hrm_rl.figures residuals RUN`."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path

from hrm_rl import cli
from hrm_rl.errors import UserError, nearest

#: Figures that are commands: name -> module:function(argv), whose docstring is what --help says of it.
COMMANDS = {
    "residuals": "hrm_rl.residuals:residuals_command",
    "gradient": "hrm_rl.residuals:gradient_command",
    "fig5": "hrm_rl.figure5:command",
}

RIGHT, WRONG, NEUTRAL = "#1b7f4d", "#c0392b", "#34495e"


def training_figure(path: Path, metrics: list[dict], result: dict, title: str) -> None:
    """Three panels into `path` (PNG): accuracy and mean steps over training; accuracy by halting step;
    Q-values of right and wrong answers by step. `metrics` are lines of metrics.jsonl, `result` a report."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    over_training, by_step, q_panel = figure.subplots(1, 3)
    _over_training(over_training, metrics)
    _by_step(by_step, result)
    _q_values(q_panel, result)
    figure.savefig(path, dpi=110)


def _series(metrics: list[dict], tag: str) -> tuple[list[int], list[float]]:
    rows = [(row["step"], row[tag]) for row in metrics if tag in row]
    return [row[0] for row in rows], [row[1] for row in rows]


def _over_training(axes, metrics: list[dict]) -> None:
    axes.plot(*_series(metrics, "halt/exact_accuracy"), color=RIGHT, label="exact accuracy at the halt, training")
    evaluated = _series(metrics, "eval/exact_accuracy")
    if evaluated[0]:
        axes.plot(*evaluated, "o", color=NEUTRAL, label="test puzzles, learned halt")
    axes.set(xlabel="updates", ylabel="exact accuracy", ylim=(-0.02, 1.02), title="training")
    steps = axes.twinx()
    steps.plot(*_series(metrics, "halt/mean_steps"), color="#e67e22", alpha=0.8, label="mean steps")
    steps.set(ylabel="mean steps", ylim=(0, None))
    handles = [*axes.get_lines(), *steps.get_lines()]
    axes.legend(handles, [line.get_label() for line in handles], fontsize=8, loc="lower right")


def _by_step(axes, result: dict) -> None:
    fixed = [(row["steps"], row["exact_accuracy"]) for row in result["fixed_steps"]]
    axes.plot(*zip(*fixed, strict=True), "o-", color=NEUTRAL, label="fixed steps")
    for row in result["learned_halt"]:
        axes.plot(row["mean_steps"], row["exact_accuracy"], "*", ms=14, color=RIGHT,
                  label=f"learned halt, at most {row['max_steps']}")  # fmt: skip
    axes.set(xlabel="segments used", ylabel="exact accuracy", ylim=(-0.02, 1.02), title="accuracy against compute")
    axes.legend(fontsize=8, loc="lower right")


def _q_values(axes, result: dict) -> None:
    rows = result.get("q_values_by_step")
    axes.set(xlabel="segment", ylabel="mean Q-value", ylim=(-0.02, 1.02), title="Q-values against correctness")
    if not rows:
        axes.text(0.5, 0.5, "this agent has no Q-values", ha="center", transform=axes.transAxes)
        return
    for kind, color in (("right", RIGHT), ("wrong", WRONG)):
        for action, style in (("q_halt", "-"), ("q_continue", "--")):
            points = [(r["step"], r[kind][action]) for r in rows if r[kind][action] is not None]
            if points:
                axes.plot(*zip(*points, strict=True), style, color=color, marker=".", label=f"{action}, answer {kind}")
    axes.legend(fontsize=8)


def frontier_figure(result: dict) -> bytes:
    """PNG of the accuracy-compute frontier of a comparison (`hrm_rl.compare`): the fixed-k curve, the oracle, every
    rule at its threshold and, thin, the curves that the thresholds of residual and the baseline sweep out."""
    import io

    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.5, 5.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    fixed = [(row["steps"], row["exact_accuracy"]) for row in result["fixed_steps"]]
    axes.plot(*zip(*fixed, strict=True), ".-", color=NEUTRAL, label="fixed k", zorder=1)
    for k, accuracy in fixed:
        axes.annotate(str(k), (k, accuracy), xytext=(0, -11), textcoords="offset points", fontsize=7, color=NEUTRAL,
                      ha="center")  # fmt: skip
    marks = "osD^v<>PXhp"
    for number, row in enumerate(result["agents"]):
        color, point = f"C{number % 10}", (row["mean_steps"], row["exact_accuracy"])
        if row["oracle"]:
            axes.plot(*point, "*", ms=16, color="#d4a017", label="oracle (upper bound)", zorder=4)
            continue
        axes.plot(*point, marks[number % len(marks)], color=color, ms=6, label=row["agent"], zorder=3)
        if row["agent"] in (result["residual"], result["baseline"]) and row["curve"]:
            axes.plot([p["mean_steps"] for p in row["curve"]], [p["exact_accuracy"] for p in row["curve"]],
                      color=color, lw=0.9, alpha=0.8, zorder=2, label=f"{row['agent']}, other thresholds")  # fmt: skip
    best = max([accuracy for _, accuracy in fixed] + [row["exact_accuracy"] for row in result["agents"]])
    axes.set(xlabel="mean segments per puzzle", ylabel="exact accuracy")
    axes.set_ylim(max(-0.02, best - 0.35), min(1.02, best + 0.03))
    held = [result[split]["puzzles"] for split in ("test", "validation")]
    axes.set_title(f"{held[0]} test puzzles, thresholds from {held[1]} others", fontsize=10)
    axes.grid(alpha=0.25)
    figure.legend(*axes.get_legend_handles_labels(), fontsize=8, loc="outside right upper")
    content = io.BytesIO()
    figure.savefig(content, dpi=110, format="png")
    return content.getvalue()


def main(argv: Sequence[str]) -> int:
    """The command that the first word names."""
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: python -m hrm_rl.figures NAME [RUN] [...]; --help after a name says more\n")
        for name in COMMANDS:
            print(f"  {name:10} {_command(name).__doc__.splitlines()[0]}")
        return 0 if argv else 2
    if argv[0] not in COMMANDS:
        raise UserError(f"unknown figure {argv[0]!r}{nearest(argv[0], COMMANDS)} (there are: {', '.join(COMMANDS)})")
    return _command(argv[0])(argv[1:])


def _command(name: str):
    module, function = COMMANDS[name].split(":")
    return getattr(importlib.import_module(module), function)


if __name__ == "__main__":
    cli.run(main)
