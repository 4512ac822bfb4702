"""Q-only studies: the recordings of a frozen core, and batches of learners that train on them together.

The core runs once, in the process of the command; whoever trains a batch reads the recording from the cache.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch

from agents.arm import Arm
from hrm_rl.study.results import RunResult
from hrm_rl.study.spec import PuzzleSource, Study
from hrm_rl.study.sweep import Run, Task, fewer_runs, halves
from hrm_rl.tasks import PuzzleSet


def puzzles_of(study: Study) -> tuple[PuzzleSet, PuzzleSet]:
    """(to learn from, to measure on). UserError for what cannot be read."""
    return _puzzles(study.train, study.size, "train"), _puzzles(study.probe, study.size, "test")


def _puzzles(source: PuzzleSource, size: int, split: str) -> PuzzleSet:
    """Of the training puzzles `count` at random, always the same ones; of the test puzzles as many as compare takes."""
    from hrm_rl.trainer import user_puzzles

    puzzles = user_puzzles(source.data, size, split, source.count or None if split == "test" else None)
    if split == "test" or not 0 < source.count < len(puzzles):
        return puzzles
    order = torch.randperm(len(puzzles), generator=torch.Generator().manual_seed(0))
    return puzzles.select(order[: source.count].sort().values)


def record(study: Study, device: str, cache: Path, notice: Callable[[str], None], quiet: bool = False) -> tuple:
    """The trajectories (to learn from, to measure on), from the cache or with a progress bar unless `quiet`."""
    from tqdm import tqdm

    from hrm_rl.study.trajectories import load_trajectories

    found = []
    look = {"unit": "puzzle", "disable": quiet or None, "file": sys.stderr, "leave": False}
    for name, puzzles in zip(("training puzzles", "probe puzzles"), puzzles_of(study), strict=True):
        with tqdm(total=len(puzzles), desc=name, **look) as bar:
            found.append(load_trajectories(study.core, puzzles, study.max_steps, device, cache, notice, bar.update))
    return tuple(found)


@lru_cache(maxsize=2)
def _recorded(core: str | None, size: int, max_steps: int, train: PuzzleSource, probe: PuzzleSource, device: str,
              cache: str) -> tuple:  # fmt: skip
    study = Study("", "q_only", size=size, core=core, max_steps=max_steps, train=train, probe=probe)
    return record(study, device, Path(cache), lambda line: None, quiet=True)


def tasks(study: Study, runs: Sequence[Run], width: int, device: str, cache: Path) -> list[Task]:
    """Batches of learners that train together, of the runs that are asked for. width: of the q-token.

    The batches are those of the whole study, whatever is done of it already: a sweep that was stopped goes on with the
    batches it would have had, and so with the same numbers. Where others train together (seeds added later, some arms
    alone, failed runs again, a batch in halves) a learner draws the same still, since its random streams are its own,
    but sums over another batch may be rounded in another way, and an arm that is unstable enlarges such differences.
    """
    from hrm_rl.study.learners import groups

    arms = {arm.name: arm for arm in study.arms}
    wanted = set(runs)
    everyone = [(arm.name, arm.arm, seed) for arm, seed in study.runs]
    found = []
    for group in groups(everyone, width):
        chosen = [(name, seed) for name, _, seed in group if (name, seed) in wanted]
        if not chosen:
            continue
        changes = {name: arms[name].changes for name, _ in chosen}
        arguments = {
            "runs": chosen, "arms": {name: arms[name].values for name in changes}, "changes": changes,
            "core": study.core, "size": study.size, "max_steps": study.max_steps,
            "train": (study.train.data, study.train.count), "probe": (study.probe.data, study.probe.count),
            "updates": study.updates, "checkpoints": study.checkpoints, "device": device, "cache": str(cache),
        }  # fmt: skip
        task = Task("hrm_rl.study.q_only:train_batch", arguments, tuple(chosen), _file(chosen),
                    float(study.updates * len(chosen)), changes, _split)  # fmt: skip
        found.append(task)
    return found


def _split(task: Task) -> list[Task]:
    return halves(task, partial(_part, task))


def _part(task: Task, runs: Sequence[Run]) -> Task:
    return fewer_runs(task, runs, _file(runs))


def _file(runs: Sequence[Run]) -> str:
    """A batch's file, named by its runs."""
    return f"batch-{hashlib.sha256(repr(list(runs)).encode()).hexdigest()[:16]}.safetensors"


def train_batch(
    runs: Sequence[Run], arms: dict[str, dict[str, Any]], changes: dict[str, dict[str, Any]], core: str | None,
    size: int, max_steps: int, train: tuple, probe: tuple, updates: int, checkpoints: int, device: str, cache: str,
    progress: Callable[[float], None] | None = None,
) -> list[RunResult]:  # fmt: skip
    """The task: learners of one shape, trained together; results in the order of `runs`."""
    from hrm_rl.study.learners import train_group

    data, measured = _recorded(core, size, max_steps, PuzzleSource(*train), PuzzleSource(*probe), device, cache)
    built = {name: Arm(**values) for name, values in arms.items()}
    group = [(name, built[name], seed) for name, seed in runs]
    results = train_group(group, data, measured, updates, checkpoints + 1, device, progress)  # and the one at update 0
    return [replace(result, changes=changes[result.arm]) for result in results]
