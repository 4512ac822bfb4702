"""Learners that learn nothing but obey: for tests of who runs them, how they are stopped and what is kept.

Their results are a function of (arm, seed) alone. What an arm is told by its learning rate: 13 raises, 14 diverges,
15 kills its process, 16 sleeps for a minute.
"""

from __future__ import annotations

import os
import signal
import sys
import time
import types
import zlib
from collections.abc import Sequence

import torch

from agents.arm import Arm
from hrm_rl.errors import UserError
from hrm_rl.study.results import RunResult


def result(arm: str, seed: int, updates: int = 4, status: str = "finished", **more) -> RunResult:
    """A small result that is the same whenever it is asked for."""
    draw = torch.Generator().manual_seed(zlib.crc32(f"{arm}/{seed}".encode()))
    accuracy = torch.rand(3, generator=draw).double()
    return RunResult(
        arm, seed, status, updates=torch.tensor([0, updates // 2, updates]),
        metrics={"accuracy": accuracy, "regret": 1 - accuracy, "mean_steps": 1 + accuracy,
                 "logit_max_abs": accuracy, "target_drift": accuracy / 100},
        by_step={"q_halt": torch.rand(3, 4, generator=draw).double()}, right=torch.rand(20, generator=draw) < 0.5,
        steps=torch.randint(1, 5, (20,), generator=draw), puzzles="stand-in", **more,
    )  # fmt: skip


def work(runs: Sequence, seconds: float = 0.0, told: str = "", progress=None) -> list[RunResult]:
    """A task: a result for each of `runs` after a while. told: raise, kill, exit, wrong or memory."""
    from tqdm import tqdm

    half = seconds / 2
    with tqdm(total=1, disable=True):  # as a run of hrm_rl.train has one
        time.sleep(half)
    if progress is not None:
        progress(1)
    time.sleep(half)
    if told == "raise":
        raise RuntimeError("told to\nfail")
    if told == "memory":
        raise MemoryError
    if told == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if told == "exit":
        os._exit(7)
    return [result(arm, seed) for arm, seed in (runs[:-1] if told == "wrong" else runs)]


def pid(runs: Sequence) -> list[RunResult]:
    """A task that says where it ran, and on how many threads."""
    import dataclasses

    (run,) = runs
    said = f"{os.getpid()} {torch.get_num_threads()}"
    return [dataclasses.replace(result(*run), reason=said)]


# --- in place of hrm_rl.study.learners ------------------------------------------------------------------------


def check(arm: Arm) -> None:
    if arm.backup == "mc" and arm.replay == "uniform":
        raise UserError("backup=mc needs whole episodes, which replay=uniform does not keep")


def groups(everyone: Sequence, width: int) -> list[list]:
    """Batches of at most four learners with as many environments each."""
    sizes = dict.fromkeys(arm.num_envs for _, arm, _ in everyone)
    found = []
    for size in sizes:
        same = [run for run in everyone if run[1].num_envs == size]
        found += [same[i : i + 4] for i in range(0, len(same), 4)]
    return found


def train_group(group, data, probe, updates, checkpoints, device, progress=None) -> list[RunResult]:
    found = []
    for name, arm, seed in group:
        if arm.lr == 13:
            raise RuntimeError("unlucky")
        if arm.lr == 15:
            os.kill(os.getpid(), signal.SIGKILL)
        if arm.lr == 16:
            time.sleep(60)
        found.append(result(name, seed, updates, "diverged" if arm.lr == 14 else "finished",
                            reason="not finite" if arm.lr == 14 else ""))  # fmt: skip
        if progress is not None:
            progress(updates)
    return found


def learners() -> types.ModuleType:
    """The module that stands in."""
    module = types.ModuleType("hrm_rl.study.learners")
    module.check, module.groups, module.train_group = check, groups, train_group
    return module


def install(setitem=dict.__setitem__) -> None:
    """Put the learners in place, which need no recording; setitem: monkeypatch's, or for a process of its own."""
    from hrm_rl.study import q_only

    setitem(sys.modules, "hrm_rl.study.learners", learners())
    nothing = types.SimpleNamespace(q_token=torch.zeros(1, 1, 8))
    setitem(vars(q_only), "record", lambda *arguments: (nothing, nothing))
    setitem(vars(q_only), "_recorded", lambda *arguments: (None, None))
