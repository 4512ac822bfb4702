"""Figures of a run: how it trained, and what its Q-values know."""

from __future__ import annotations

from pathlib import Path

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
