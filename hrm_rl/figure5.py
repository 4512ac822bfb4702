"""Figure 5 of the HRM paper: adaptive computation against a fixed number of segments, and more segments at inference.

Source: HRM, arXiv:2506.21734, figure 5. (a) mean segments used by ACT against a fixed M; (b) accuracy of ACT against a
fixed M; (c) accuracy of models trained with a budget M_max when they may use more of it at inference.

A point is what one trained run does on the test puzzles within one budget: the agent halts by itself, at the budget at
the latest. All runs are tested on the same puzzles, so intervals are over seeds and puzzles, crossed
(`study/statistics.py`). The paper draws lines without intervals and says so of no number of seeds.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from hrm_rl.errors import UserError
from hrm_rl.study.results import RunResult
from hrm_rl.study.statistics import Interval, PuzzleDraws, accuracy_difference, accuracy_interval, mean_interval

FORMAT = "hrm_rl.figure5.v1"
MARGIN = 0.02  # accuracies closer than this are the same for the claims; wider than the spread of seeds of one recipe
FLAT = 0.25  # compute counts as flat if mean segments grow by less than this share of what the budget grew by


@dataclass(frozen=True)
class Point:
    """One run within one budget. N puzzles."""

    kind: str  # act: the agent learned to halt; detached: and its loss did not reach the core; fixed: it halts at M
    trained: int  # M_max of training
    budget: int  # M_max of this test
    seed: int
    right: Tensor  # (N,) bool, the answer at the halt
    steps: Tensor  # (N,) int64, the segment of the halt


@dataclass(frozen=True)
class Row:
    """All seeds of one kind, trained budget and tested budget."""

    kind: str
    trained: int
    budget: int
    seeds: int
    accuracy: Interval
    mean_steps: Interval


@dataclass(frozen=True)
class Claim:
    """A statement of the paper about figure 5, and what was measured."""

    paper: str
    measured: str
    verdict: str  # held, did not hold, undecided


# --- what a run does ------------------------------------------------------------------------------------------


def measure(run: Path, budgets: Sequence[int], limit: int = 0, device: str = "auto", progress=None) -> list[Point]:
    """Points of one finished run of hrm_rl.train at its own budget and at `budgets`; kept beside it, for the next time.

    limit: at most this many test puzzles, 0 takes those the run was reported on. UserError for a run that is not
    finished or a folder that is none.
    """
    import yaml

    from hrm_rl.core.io import find_model

    try:
        config = yaml.safe_load((run / "config.yaml").read_text())
        trained, seed, agent = int(config["max_steps"]), int(config["seed"]), str(config["agent"])
        report = json.loads((run / "report.json").read_text())
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError) as error:
        raise UserError(f"{run}: not a finished run of hrm_rl.train ({error})") from error
    if agent.rpartition(".")[2] in ("fixed", "FixedAgent"):
        kind = "fixed"
    else:
        kind = "act" if config.get("q_to_core", True) else "detached"
    wanted = [trained] if kind == "fixed" else sorted({trained, *budgets})
    model = find_model(run)
    about = json.dumps({"model": model.parent.name, "test": report["test_sha256"], "limit": limit, "budgets": wanted})
    path = run / "figure5.safetensors"
    held = _read(path, about)
    if held is None:
        held = _run(model, config, wanted, limit, device, progress)
        from hrm_rl.checkpoint import write_atomically

        write_atomically(path, save(held, {"format": FORMAT, "about": about}))
    return [
        Point(kind, trained, b, seed, held[f"{b}.right"].bool(), held[f"{b}.steps"].long()) for b in wanted
    ]


def _read(path: Path, about: str) -> dict[str, Tensor] | None:
    """What was measured before, if it is about the same model, puzzles and budgets."""
    try:
        with safe_open(path, framework="pt") as file:
            if (file.metadata() or {}).get("about") != about:
                return None
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError):
        return None


def _run(model: Path, config: dict, budgets: Sequence[int], limit: int, device: str, progress) -> dict[str, Tensor]:
    from hrm_rl import evaluation
    from hrm_rl.config import task_of_env
    from hrm_rl.core.io import load_core
    from hrm_rl.devices import pick_device, pick_dtype
    from hrm_rl.evaluate import in_dtype, load_agent, task_of, which_agent
    from hrm_rl.trainer import user_puzzles

    where = pick_device(device)
    loaded = load_core(model, kind=config["core"]["kind"])
    core = in_dtype(loaded.core, pick_dtype("auto", where)).to(where)
    count = limit or config.get("test_limit") or None
    task, side = task_of(loaded, task_of_env(config["env"]))  # of its own configuration, so a task of the user's too
    puzzles = user_puzzles(config.get("test_data"), side, "test", count, task)
    name, arguments = which_agent(config["agent"], loaded)
    agent = load_agent(name, arguments, loaded, core, budgets[-1]).to(where)
    run = evaluation.trajectories(core, agent, puzzles, budgets[-1], 128, where, progress=progress)
    found = {}
    for budget in budgets:
        steps = run.halt_steps(budget)
        found[f"{budget}.right"], found[f"{budget}.steps"] = run.at(steps)[0].contiguous(), steps.int()
    return found


# --- the table ------------------------------------------------------------------------------------------------


def rows(points: Iterable[Point], resamples: int = 2000) -> list[Row]:
    """One row a (kind, trained budget, tested budget), in that order."""
    groups: dict[tuple[str, int, int], list[Point]] = {}
    for point in points:
        groups.setdefault((point.kind, point.trained, point.budget), []).append(point)
    draws = PuzzleDraws(resamples)
    found = []
    for key, held in sorted(groups.items()):
        runs = _as_runs(held)
        accuracy = accuracy_interval(runs, draws) or Interval(float(held[0].right.double().mean()))
        steps = mean_interval([np.array([[p.steps.double().mean().item() for p in held]])], resamples=resamples)[0]
        found.append(Row(*key, len(held), accuracy, steps))
    return found


def _as_runs(points: Sequence[Point]) -> list[RunResult]:
    """As the statistics of studies take them. All points are about the same puzzles."""
    return [
        RunResult(
            f"{p.kind} {p.trained} {p.budget}", p.seed, "finished", right=p.right, steps=p.steps, puzzles="test",
            metrics={"accuracy": p.right.double().mean()[None]},
        )
        for p in sorted(points, key=lambda p: p.seed)
    ]  # fmt: skip


def to_csv(table: Sequence[Row]) -> str:
    """The table, one line a row."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["kind", "trained_max_steps", "test_max_steps", "seeds", "exact_accuracy", "accuracy_low",
                     "accuracy_high", "mean_steps", "steps_low", "steps_high"])  # fmt: skip
    for row in table:
        numbers = (row.accuracy.value, row.accuracy.low, row.accuracy.high, row.mean_steps.value, row.mean_steps.low,
                   row.mean_steps.high)  # fmt: skip
        writer.writerow([row.kind, row.trained, row.budget, row.seeds, *(f"{x:.4f}" for x in numbers)])
    return out.getvalue()


def text(table: Sequence[Row]) -> str:
    """The table for a terminal."""
    lines = [f"{'run':<10}{'trained':>8}{'tested':>8}{'seeds':>7}{'exact':>9}{'95 % interval':>20}{'mean steps':>12}"]
    for r in table:
        interval = f"{r.accuracy.low:.1%} to {r.accuracy.high:.1%}" if r.accuracy.known else "-"
        lines.append(f"{r.kind:<10}{r.trained:>8}{r.budget:>8}{r.seeds:>7}{r.accuracy.value:>9.1%}{interval:>20}"
                     f"{r.mean_steps.value:>12.2f}")  # fmt: skip
    return "\n".join(lines)


# --- the paper's statements -----------------------------------------------------------------------------------


def claims(points: Sequence[Point], resamples: int = 2000) -> list[Claim]:
    """Whether the shape of the paper's figure 5 holds: compute, accuracy, and gains beyond the trained budget."""
    return [_compute_is_flat(points), *_as_accurate(points, resamples), *_gains_beyond(points, resamples),
            *_without_q_loss(points, resamples)]  # fmt: skip


def _own(points: Sequence[Point], kind: str) -> dict[int, list[Point]]:
    """Trained budget -> the points at that very budget."""
    found: dict[int, list[Point]] = {}
    for p in points:
        if p.kind == kind and p.budget == p.trained:
            found.setdefault(p.trained, []).append(p)
    return dict(sorted(found.items()))


def _compute_is_flat(points: Sequence[Point]) -> Claim:
    paper = "(a) ACT keeps the mean number of segments low and stable as M_max grows"
    own = _own(points, "act")
    if len(own) < 2:
        return Claim(paper, "fewer than two budgets were trained", "undecided")
    means = {m: [p.steps.double().mean().item() for p in held] for m, held in own.items()}
    first, last = min(own), max(own)
    growth = [np.mean(means[m]) for m in (first, last)]
    share = (growth[1] - growth[0]) / (last - first)
    said = ", ".join(f"M_max {m}: {np.mean(v):.2f}" for m, v in means.items())
    verdict = "held" if share <= FLAT else "did not hold"
    return Claim(paper, f"mean segments {said}: they grow by {share:.0%} of what M_max grows by", verdict)


def _as_accurate(points: Sequence[Point], resamples: int) -> list[Claim]:
    return [_not_worse(f"(b) ACT with M_max = {m} is about as accurate as {m} fixed segments", act, fixed, resamples)
            for m, act, fixed in _pairs(points, "act")]  # fmt: skip


def _without_q_loss(points: Sequence[Point], resamples: int) -> list[Claim]:
    """Not in the paper: whether it is the Q-loss in the core that costs accuracy."""
    return [_not_worse(f"(b') ... with the Q-loss kept out of the core, M_max = {m}", act, fixed, resamples)
            for m, act, fixed in _pairs(points, "detached")]  # fmt: skip


def _pairs(points: Sequence[Point], kind: str) -> list[tuple[int, list[Point], list[Point]]]:
    """(M, the runs of that kind trained with it, the fixed ones) for every M that both have."""
    own, fixed = _own(points, kind), _own(points, "fixed")
    return [(m, own[m], fixed[m]) for m in sorted(own.keys() & fixed.keys())]


def _not_worse(paper: str, act: Sequence[Point], fixed: Sequence[Point], resamples: int) -> Claim:
    apart = accuracy_difference(_as_runs(act), _as_runs(fixed), PuzzleDraws(resamples))
    if apart is None:
        return Claim(paper, "fewer than two seeds", "undecided")
    said = f"ACT minus fixed {apart.value:+.1%} (95 % interval {apart.low:+.1%} to {apart.high:+.1%})"
    if apart.low >= -MARGIN:
        return Claim(paper, said, "held")
    return Claim(paper, said, "did not hold" if apart.high < 0 else "undecided")


def _gains_beyond(points: Sequence[Point], resamples: int) -> list[Claim]:
    own, draws, found = _own(points, "act"), PuzzleDraws(resamples), []
    for m, held in own.items():
        beyond = sorted({p.budget for p in points if p.kind == "act" and p.trained == m and p.budget > m})
        if not beyond:
            continue
        paper = f"(c) a model trained with M_max = {m} goes on gaining when it may use more segments"
        most = [p for p in points if p.kind == "act" and p.trained == m and p.budget == beyond[-1]]
        gain = _same_runs_gain(most, held, draws)
        if gain is None:
            found.append(Claim(paper, "fewer than two seeds", "undecided"))
            continue
        said = f"at {beyond[-1]} against {m} segments {gain.value:+.1%} ({gain.low:+.1%} to {gain.high:+.1%})"
        verdict = "held" if gain.low > 0 else "did not hold" if gain.high <= MARGIN else "undecided"
        found.append(Claim(paper, said, verdict))
    return found


def _same_runs_gain(more: Sequence[Point], less: Sequence[Point], draws: PuzzleDraws) -> Interval | None:
    """Mean gain of the same trained runs at a larger budget: paired over runs as well as over puzzles.

    Each puzzle's gain (-1, 0, 1) becomes two outcomes whose difference it is; seeds are drawn once for both.
    """
    first, second = _as_runs(more), _as_runs(less)
    if len(first) < 2 or [r.seed for r in first] != [r.seed for r in second]:
        return None
    draws.prepare([*first, *second])
    drawn = draws.of_arm(first, 0) - draws.of_arm(second, 0)  # the same stream: the same seeds
    low, high = np.percentile(drawn, [2.5, 97.5])
    value = np.mean([a.final("accuracy") - b.final("accuracy") for a, b in zip(first, second, strict=True)])
    return Interval(float(value), float(low), float(high))


# --- the figure -----------------------------------------------------------------------------------------------


def figure(path: Path, table: Sequence[Row], note: str) -> None:
    """Three panels, (a) to (c), into `path` (PNG), with 95 % intervals; `note` says what they are of."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from hrm_rl.checkpoint import write_atomically

    made = Figure(figsize=(14, 4.4), layout="constrained")
    FigureCanvasAgg(made)
    made.suptitle(note, fontsize=10)
    compute, accuracy, scaling = made.subplots(1, 3)
    budgets = sorted({r.trained for r in table})
    for kind, style, label in (("act", "o-", "ACT (learned halt)"), ("fixed", "s--", "fixed M"),
                               ("detached", "D:", "ACT, Q-loss kept out of the core")):  # fmt: skip
        own = [r for r in table if r.kind == kind and r.budget == r.trained]
        _line(compute, own, "mean_steps", style, label)
        _line(accuracy, own, "accuracy", style, label)
    for color, m in enumerate(budgets):
        own = [r for r in table if r.kind == "act" and r.trained == m]
        _line(scaling, own, "accuracy", "o-", f"trained with M_max = {m}", f"C{color + 2}")
        scaling.axvline(m, color=f"C{color + 2}", lw=0.8, ls=":")
    for axes, title, y in ((compute, "(a) compute", "mean segments used"), (accuracy, "(b) accuracy", "exact accuracy"),
                           (scaling, "(c) more segments at inference", "exact accuracy")):  # fmt: skip
        x = "M_max at inference" if axes is scaling else "M (fixed) or M_max (ACT)"
        axes.set(title=title, xlabel=x, ylabel=y)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.grid(alpha=0.25)
        axes.legend(fontsize=8)
    compute.set_ylim(0, None)
    image = io.BytesIO()
    made.savefig(image, format="png", dpi=110)
    write_atomically(path, image.getvalue())


def _line(axes, own: Sequence[Row], name: str, style: str, label: str, color: str | None = None) -> None:
    if not own:
        return
    held = [getattr(r, name) for r in own]
    low, high = ([abs(i.value - (getattr(i, end) if i.known else i.value)) for i in held] for end in ("low", "high"))
    seeds = sorted({r.seeds for r in own})
    count = f"{seeds[0]}" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
    axes.errorbar([r.budget for r in own], [i.value for i in held], yerr=[low, high], fmt=style, capsize=3, color=color,
                  ms=5, label=f"{label}, {count} seed{'s' if seeds[-1] > 1 else ''}")  # fmt: skip


def write(out: Path, points: Sequence[Point], note: str) -> tuple[list[Row], list[Claim]]:
    """fig5.png, fig5.csv and fig5.json into `out`; returns what they hold. OSError passes through."""
    from hrm_rl.checkpoint import write_atomically

    table, said = rows(points), claims(points)
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(out / "fig5.csv", to_csv(table).encode())
    plain = {"note": note, "puzzles": len(points[0].right), "claims": [vars(c) for c in said],
             "rows": [vars(r) | {"accuracy": _plain(r.accuracy), "mean_steps": _plain(r.mean_steps)}
                      for r in table]}  # fmt: skip
    write_atomically(out / "fig5.json", (json.dumps(plain, indent=1, allow_nan=False) + "\n").encode())
    figure(out / "fig5.png", table, note)
    return table, said


def _plain(interval: Interval) -> dict[str, float | None]:
    """As JSON has it, which knows no NaN."""
    return {name: value if np.isfinite(value) else None for name, value in vars(interval).items()}


def check_same_puzzles(points: Sequence[Point]) -> None:
    """UserError unless all points are about the same number of puzzles (those of one test set)."""
    counts = {len(p.right) for p in points}
    if len(counts) > 1:
        raise UserError(f"figure 5: the runs were tested on different numbers of puzzles ({sorted(counts)})")
    if not torch.stack([p.steps.amax() <= p.budget for p in points]).all():
        raise UserError("figure 5: a run used more segments than its budget")


# --- the command ----------------------------------------------------------------------------------------------


def command(argv: Sequence[str]) -> int:
    """Figure 5 of the paper: trains what is missing, then draws ACT against fixed segments, with a table."""
    import sys
    import time

    from tqdm import tqdm

    from hrm_rl import ablate, cli
    from hrm_rl.devices import describe, pick_device
    from hrm_rl.study import spec

    parser = cli.make_parser("python -m hrm_rl.figures fig5", command.__doc__, config=False)
    parser.add_argument("study", nargs="?", type=str, default="figure5",
                        help="Study of the runs: figure5 (two CPU cores, 50 minutes), figure5_gpu (the full public "
                        "set) or a YAML file of kind train.")  # fmt: skip
    parser.add_argument("--out", type=str, default="", help="Folder of the study; nothing: studies/NAME.")
    parser.add_argument("--seeds", type=int, default=0, help="Runs an arm; 0 is the study's own number.")
    parser.add_argument("--beyond", type=list[int], default=[16, 32],
                        help="Budgets at inference beside the trained one.")  # fmt: skip
    parser.add_argument("--limit", type=int, default=0, help="At most this many test puzzles; 0 takes all.")
    parser.add_argument("--workers", type=int, default=0, help="Runs at a time; 0 is one a core.")
    parser.add_argument("--device", type=str, default="auto", help="auto, cpu or cuda.")
    options = cli.parse(parser, argv)
    for name, values, high in (("beyond", options.beyond, 10_000), ("limit", [options.limit], 1 << 30)):
        if any(not (0 if name == "limit" else 1) <= value <= high for value in values):
            raise UserError(f"--{name} must be between {0 if name == 'limit' else 1} and {high}, not {values}")
    study = spec.load_study(spec.find_study(options.study))
    if study.kind != "train":
        raise UserError(f"{study.path}: figure 5 needs a study of kind train, this one is of kind {study.kind}")
    out = Path(options.out or Path("studies") / Path(options.study).stem).expanduser()
    words = [options.study, "--out", str(out), "--device", options.device]
    words += [word for name in ("seeds", "workers") if options[name] for word in (f"--{name}", str(options[name]))]
    code = ablate.main(words)
    if code:
        return code
    runs = sorted(path.parent for path in (out / "runs").glob("*/report.json"))
    points = []
    for run in tqdm(runs, unit="run", desc="test puzzles", disable=None, file=sys.stderr, leave=False):
        points += measure(run, options.beyond, options.limit, options.device)
    if not points:
        raise UserError(f"{out}: holds no finished run to draw")
    check_same_puzzles(points)
    machine = describe(pick_device(options.device))
    note = f"{Path(options.study).stem}: {len(points[0].right):,} test puzzles, 95 % intervals over seeds and puzzles"
    table, said = write(out, points, f"{note}\n{machine}, {time.strftime('%Y-%m-%d')}")
    print("\n" + text(table) + "\n")
    for claim in said:
        print(f"{claim.verdict:<13} {claim.paper}\n{'':<13} {claim.measured}")
    lost = sorted(path.parent.name for path in (out / "runs").glob("*/result.safetensors")
                  if path.parent not in runs)  # fmt: skip
    if lost:
        print(f"\nnot in the figure, since they diverged or failed: {', '.join(lost)}")
    few = min(row.seeds for row in table)
    if few < 5:
        print(f"\n{few} seed{'s' * (few != 1)}: intervals over so few cover too little, see hrm_rl/study/statistics.py")
    print(f"\nfigure: {out / 'fig5.png'}, table: {out / 'fig5.csv'} and fig5.json")
    return 0
