"""What a study keeps of each run, and how it lies on disk: safetensors, written whole or not at all.

One file holds one run or a batch of runs that were trained together. K metrics, C checkpoints, M segments, N puzzles.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from hrm_rl.checkpoint import write_atomically
from hrm_rl.errors import UserError

FORMAT = "hrm_rl.results.v1"
Status = Literal["finished", "diverged", "failed"]


@dataclass(frozen=True)
class RunResult:
    """One (arm, seed). A run that diverged or failed is a result as well: `reason` says why, in one line."""

    arm: str  # name of the arm, unique in the study
    seed: int
    status: Status
    reason: str = ""
    seconds: float = 0.0  # of training, wall-clock, over all sittings; a batch's is split evenly among its runs
    updates: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))  # (C,) ascending, from 0 on
    metrics: dict[str, Tensor] = field(default_factory=dict)  # name -> (C,) float64, NaN where it is undefined
    by_step: dict[str, Tensor] = field(default_factory=dict)  # name -> (C, M) float64, NaN where it is undefined
    right: Tensor | None = None  # (N,) bool: the answer at the halt, at the last checkpoint
    steps: Tensor | None = None  # (N,) int64: the segment of the halt, at the last checkpoint
    puzzles: str = ""  # SHA-256 of what `right` is about (recording or puzzles and core): runs that share it are paired
    # The core was trained as well: what the values are held against moved during the run.
    live: bool = field(default=False, kw_only=True)
    changes: dict = field(default_factory=dict)  # the arm's settings that differ from the study's baseline, for tables

    def final(self, metric: str) -> float:
        """The last value of a metric; NaN where there is none."""
        series = self.metrics.get(metric)
        return float("nan") if series is None or not len(series) else float(series[-1])


def save_results(path: Path, results: Sequence[RunResult]) -> None:
    """Write runs to `path` atomically. OSError passes through."""
    tensors: dict[str, Tensor] = {}
    plain = []
    for i, run in enumerate(results):
        names = {"metrics": list(run.metrics), "by_step": list(run.by_step)}
        tensors[f"{i}.updates"] = run.updates
        for kind, held in (("metrics", run.metrics), ("by_step", run.by_step)):
            if held:
                tensors[f"{i}.{kind}"] = torch.stack([value.double() for value in held.values()])
        for name in ("right", "steps"):
            value = getattr(run, name)
            if value is not None:
                tensors[f"{i}.{name}"] = value.to(torch.bool if name == "right" else torch.int32)
        plain.append({
            "arm": run.arm, "seed": run.seed, "status": run.status, "reason": run.reason, "seconds": run.seconds,
            "puzzles": run.puzzles, "live": run.live, "changes": run.changes, **names,
        })  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    header = {"format": FORMAT, "runs": json.dumps(plain)}
    # Runs of a batch share tensors (their updates), which safetensors refuses: each run has its own on disk.
    write_atomically(path, save({name: value.cpu().contiguous().clone() for name, value in tensors.items()}, header))


def load_results(path: Path) -> list[RunResult]:
    """Read runs back. UserError for a file that is damaged or none of ours."""
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if header.get("format") != FORMAT:
            raise UserError(f"{path}: not the results of a study (format {header.get('format')!r})")
        found = []
        for i, plain in enumerate(json.loads(header["runs"])):
            # For a while on 2026-11-22 learners on recordings wrote their changes here by mistake; they were not live.
            plain["live"] = plain.get("live") is True
            for kind in ("metrics", "by_step"):
                names = plain[kind]
                plain[kind] = dict(zip(names, tensors[f"{i}.{kind}"], strict=True)) if names else {}
            steps = tensors.get(f"{i}.steps")
            held = {"right": tensors.get(f"{i}.right"), "steps": None if steps is None else steps.long()}
            found.append(RunResult(**plain, updates=tensors[f"{i}.updates"], **held))
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, UserError):
            raise
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path}: damaged results of a study ({reason})") from error
    return found
