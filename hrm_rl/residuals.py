"""Does a core converge as the theory of its gradient assumes? Forward residuals over the inner steps, and the 1-step
gradient beside the one it stands for: `python -m hrm_rl.figures residuals` and `gradient`.

Source: HRM, arXiv:2506.21734: section 2.2 assumes that z_L comes to a fixed point of f_L within a high-level cycle, and
z_H to one of the whole; Figure 3 shows forward residuals of the two.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from hrm_rl import cli
from hrm_rl.core import RecurrentCore, State
from hrm_rl.errors import UserError
from hrm_rl.tasks import PuzzleSet

QUARTILES = (0.25, 0.5, 0.75)


class Residuals(NamedTuple):
    """What each call of a network changed. M segments of C calls each, N puzzles."""

    network: tuple[str, ...]  # (C,) the core's own names of its calls
    z_H: Tensor  # (M * C, N) |new - old| / |new| over a puzzle's positions; NaN where the call leaves z_H as it is
    z_L: Tensor  # the same for z_L
    exact: Tensor  # (N,) bool, whole answer right after the last segment


@torch.no_grad()
def forward_residuals(core: RecurrentCore, puzzles: PuzzleSet, segments: int, batch_size: int = 64) -> Residuals:
    """|f(z) - z| / |f(z)| at every call of `segments` segments, from the initial state; on the core's device.

    The calls are the core's own cycles, whatever gradient it is configured with. They are forward residuals proper: a
    call of f_L takes z_L to f_L(z_L, ...), so its change says how far z_L was from a fixed point.
    """
    device = next(core.parameters()).device
    changes: dict[str, list[Tensor]] = {"z_H": [], "z_L": []}
    exact = []
    for first in range(0, len(puzzles), batch_size):
        part = puzzles.select(torch.arange(first, min(first + batch_size, len(puzzles))))
        tokens, answers = part.questions.to(device).long(), part.answers.to(device).long()
        inputs, state = core.inputs(tokens), core.initial_state(len(part))
        rows: dict[str, list[Tensor]] = {"z_H": [], "z_L": []}
        for which in core.calls * segments:
            new = core.run((which,), state, inputs)
            for name, before, after in zip(rows, state, new, strict=True):
                rows[name].append(_change(before, after))
            state = new
        for name, found in rows.items():
            changes[name].append(torch.stack(found).cpu())
        answer = core.lm_head(state.z_H)[:, core.prefix_len :].argmax(-1)
        exact.append(((answer == answers) | (answers == 0)).all(-1).cpu())
    return Residuals(core.calls, *(torch.cat(parts, dim=1) for parts in changes.values()), torch.cat(exact))


def _change(before: Tensor, after: Tensor) -> Tensor:
    """(B,) |after - before| / |after|; NaN where it is the very same tensor."""
    after_flat = after.float().flatten(1)
    if after is before:
        return torch.full_like(after_flat[:, 0], float("nan"))
    return (after_flat - before.float().flatten(1)).norm(dim=1) / after_flat.norm(dim=1).clamp(min=1e-12)


def table(found: Residuals) -> list[dict]:
    """A row for every call and state it changes: quartiles over the solved and over the unsolved puzzles."""
    rows = []
    for step in range(len(found.z_H)):
        segment, call = divmod(step, len(found.network))
        for state in ("z_H", "z_L"):
            values = getattr(found, state)[step]
            if values.isnan().all():
                continue
            row = {"segment": segment + 1, "call": call + 1, "network": found.network[call], "state": state}
            for group, members in (("solved", found.exact), ("unsolved", ~found.exact)):
                row[group] = _quartiles(values[members])
            rows.append(row)
    return rows


def _quartiles(values: Tensor) -> list[float] | None:
    return torch.quantile(values, torch.tensor(QUARTILES)).tolist() if len(values) else None


def draw(path: Path, rows: list[dict], calls: int, counts: dict[str, int], title: str) -> None:
    """PNG: residuals of z_L and z_H at every call, median and quartiles; solved puzzles left, the others right."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    segments = max(row["segment"] for row in rows)
    figure = Figure(figsize=(11, 4), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=10)
    for axes, (group, count) in zip(figure.subplots(1, 2, sharey=True), counts.items(), strict=True):
        for state, color, style in (("z_L", "#2c6fbb", ".-"), ("z_H", "#c0392b", "o-")):
            points = [(r["segment"] - 1 + (r["call"] - 0.5) / calls, *r[group]) for r in rows
                      if r["state"] == state and r[group]]  # fmt: skip
            if not points:
                continue
            x, low, middle, high = zip(*points, strict=True)
            axes.plot(x, middle, style, color=color, ms=4, lw=1, label=f"{state}: median and quartiles")
            axes.fill_between(x, low, high, color=color, alpha=0.15, lw=0)
            axes.legend(fontsize=8)
        for edge in range(1, segments):
            axes.axvline(edge, color="0.85", lw=0.6, zorder=0)
        axes.set(yscale="log", xlim=(0, segments), xlabel="segment", title=f"{count} {group} puzzles")
        axes.grid(axis="y", alpha=0.25)
    figure.axes[0].set_ylabel("|f(z) - z| / |f(z)|")
    figure.savefig(path, dpi=100)


# --- the commands -------------------------------------------------------------------------------------------


def _parser(name: str, description: str, puzzles: int):
    parser = cli.make_parser(f"python -m hrm_rl.figures {name}", description, config=False)
    parser.add_argument("run", nargs="?", type=str, default=None, metavar="RUN",
                        help="Run folder, checkpoint folder, model file, or checkpoint of the released HRM; "
                        "nothing: the core that ships.")  # fmt: skip
    parser.add_argument("--core_kind", type=str, default="",
                        help="Import path of the core's class, where it is your own (docs/CORES.md).")  # fmt: skip
    parser.add_argument("--task", type=str, default="auto",
                        help="What the puzzles are (sudoku, maze, ... or an import path); auto: what the core was "
                        "trained on.")  # fmt: skip
    parser.add_argument("--puzzles", type=int, default=puzzles, help="Test puzzles to measure on.")
    parser.add_argument("--data", type=str, default="",
                        help=".csv, .csv.gz or hf://owner/name; nothing: the shipped test set.")  # fmt: skip
    parser.add_argument("--max_steps", type=int, default=16, help="Segments.")
    parser.add_argument("--device", type=str, default="auto", help="auto, cpu or cuda.")
    parser.add_argument("--dtype", type=Literal["float32", "bfloat16"], default="float32",
                        help="What to compute in; bfloat16 cannot tell residuals below a few thousandths.")  # fmt: skip
    return parser


def _load(options) -> tuple[RecurrentCore, PuzzleSet, dict]:
    """The core, the puzzles and where the numbers come from."""
    from hrm_rl.devices import describe, pick_device
    from hrm_rl.evaluate import in_dtype, load_asked, task_of
    from hrm_rl.trainer import user_puzzles

    for name, high in (("puzzles", 1 << 20), ("max_steps", 10_000)):
        if not 1 <= options[name] <= high:
            raise UserError(f"--{name} must be between 1 and {high}, not {options[name]}")
    device = pick_device(options.device)
    loaded = load_asked(options.run, options.core_kind, options.task)
    core = in_dtype(loaded.core, options.dtype).to(device)
    task, side = task_of(loaded, options.task)
    puzzles = user_puzzles(options.data or None, side, "test", options.puzzles, task)
    about = {"model": Path(loaded.source).name if options.run is None else loaded.source, "core": core.config.kind,
             "calls": list(core.calls), "dtype": options.dtype, "test": puzzles.name, "puzzles": len(puzzles),
             "machine": describe(device), "date": time.strftime("%Y-%m-%d")}  # fmt: skip
    return core, puzzles, about


def residuals_command(argv: Sequence[str]) -> int:
    """Forward residuals of z_L and z_H over the inner steps, as a figure and as numbers."""
    from hrm_rl.checkpoint import write_atomically
    from hrm_rl.tasks.csv_io import check_target

    parser = _parser("residuals", residuals_command.__doc__, 200)
    parser.add_argument("--out", type=str, default="residuals.png",
                        help="The picture (.png); the numbers go beside it (.json).")  # fmt: skip
    options = cli.parse(parser, argv)
    out = Path(options.out).expanduser()
    if out.suffix != ".png":
        raise UserError(f"--out must end in .png, not {options.out!r}")
    check_target(out)
    core, puzzles, about = _load(options)
    found = forward_residuals(core, puzzles, options.max_steps)
    rows = table(found)
    solved = int(found.exact.sum())
    counts = {"solved": solved, "unsolved": len(puzzles) - solved}
    numbers = about | {"segments": options.max_steps, **counts, "quartiles": QUARTILES, "rows": rows}
    title = f"Forward residuals of {about['model']} ({about['core']}, {options.dtype}), {puzzles.name}"
    draw(out, rows, len(core.calls), counts, title)
    write_atomically(out.with_suffix(".json"), (json.dumps(numbers, indent=1) + "\n").encode())
    print("median |f(z) - z| / |f(z)|, last call on each state in the segment\nsegment  " + "  ".join(
        f"{state} {group:8}" for group in counts for state in ("z_L", "z_H")))  # fmt: skip
    for segment in sorted({1, 2, 4, 8, options.max_steps} & set(range(1, options.max_steps + 1))):
        last = {row["state"]: row for row in rows if row["segment"] == segment}  # later calls win
        cells = [last[state][group] if state in last else None for group in counts for state in ("z_L", "z_H")]
        print(f"{segment:7}  " + "  ".join("-".rjust(12) if c is None else f"{c[1]:12.4f}" for c in cells))
    print(f"figure: {out}, numbers: {out.with_suffix('.json')}")
    return 0


def gradient_command(argv: Sequence[str]) -> int:
    """Cosine of the 1-step gradient to the implicit one and to backpropagation through the whole segment."""
    from tqdm import tqdm

    from hrm_rl.checkpoint import write_atomically
    from hrm_rl.measure import gradient_cosines
    from hrm_rl.tasks.csv_io import check_target

    parser = _parser("gradient", gradient_command.__doc__, 16)
    parser.add_argument("--solver", type=Literal["anderson", "iterate"], default="anderson",
                        help="As core.solver.")  # fmt: skip
    parser.add_argument("--solver_tol", type=float, default=1e-2, help="Relative residual to solve to.")
    parser.add_argument("--solver_steps", type=int, default=60, help="Evaluations at most.")
    parser.add_argument("--solver_window", type=int, default=60,
                        help="Iterates that anderson mixes; as many as steps: GMRES in the backward pass.")  # fmt: skip
    parser.add_argument("--out", type=str, default="", help="Write the numbers as JSON to this file as well.")
    options = cli.parse(parser, argv)
    out = Path(options.out).expanduser() if options.out else None
    if out is not None:
        check_target(out)
    core, puzzles, about = _load(options)
    solver = {name: options[name] for name in ("solver", "solver_tol", "solver_steps", "solver_window")}
    device = next(core.parameters()).device
    tokens, answers = puzzles.questions.to(device).long(), puzzles.answers.to(device).long()
    segments = sorted({1, 2, 4, 8, 16, options.max_steps} & set(range(1, options.max_steps + 1)))
    rows, state = [], core.initial_state(len(puzzles))
    advance: Callable[[State], State] = lambda z: core.run(core.calls, z, core.inputs(tokens))  # noqa: E731
    for segment in tqdm(range(1, options.max_steps + 1), unit="segment", disable=None, file=sys.stderr):
        if segment in segments:
            try:
                rows.append({"segment": segment, **gradient_cosines(core, tokens, answers, state, **solver)})
            except ValueError as error:  # a setting of the solver that is out of range
                raise UserError(str(error)) from error
        with torch.no_grad():
            state = advance(state)
    print(gradient_table(rows))
    if out is not None:
        content = about | solver | {"rows": rows}
        write_atomically(out, (json.dumps(content, indent=1) + "\n").encode())
    return 0


def gradient_table(rows: list[dict]) -> str:
    """The rows of `gradient_cosines` by segment, as text."""
    lines = ["cosine of the 1-step gradient to      where the segment ends        where the solver ends",
             "segment   whole segment    implicit  |f(z)-z|  solve missed    implicit  |f(z)-z|  solve missed"]
    for row in rows:
        parts = [f"{row['segment']:7}   {row['cosine_full']:13.3f}"]
        for where in ("", "_solved"):
            cosine, forward, solve, missed = (row[f"{n}{where}"] for n in ("cosine", "forward", "backward", "missed"))
            parts.append(f"    {cosine:8.3f}  {forward:8.4f}  {solve:5.3f} {missed:5.0%}")
        lines.append("".join(parts))
    return "\n".join(lines)
