"""Live runs of a study: one (arm, seed) is one run of `hrm_rl.train`, in a folder of its own, measured on the way.

    runs/ARM-sSEED/
        config.yaml, metrics.jsonl, tensorboard/, checkpoints/   as hrm_rl.train writes them
        measures/00000150.safetensors                            what was measured at update 150
        result.safetensors                                       the RunResult; with it the run is done
        report.json, training.png                                kind: train

A run that was stopped goes on from its newest checkpoint, which is written right after each measurement; without a
whole one it starts anew. Both give the numbers of a run that was never stopped. What a run prints is in logs/.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import shutil
import signal
import time
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from hrm_rl import evaluation, recorded, scoring
from hrm_rl.checkpoint import list_checkpoints, load_newest, lock_run, write_atomically
from hrm_rl.errors import NonFiniteError, UserError
from hrm_rl.parallel import ALONE
from hrm_rl.study.results import RunResult
from hrm_rl.study.spec import Study, find_agent_class, train_settings
from hrm_rl.study.sweep import Run, Task
from hrm_rl.train import _make_trainer, _Session
from hrm_rl.trainer import Trainer

FORMAT = "hrm_rl.measures.v1"
_BATCH = 256  # probe puzzles in work at once
_WAIT = 30.0  # seconds for a process that was killed to let go of its run


def tasks(
    study: Study, runs: Sequence[Run], out: Path, device: str, again: Collection[Run] = ()
) -> list[Task]:
    """A task for each run. again: those that failed, to be begun anew."""
    arms = {arm.name: arm for arm in study.arms}
    found = []
    for name, seed in runs:
        folder = run_name(name, seed)
        arguments = {
            "out": str(out.absolute()), "folder": folder, "name": name, "seed": seed, "values": arms[name].values,
            "changes": arms[name].changes, "kind": study.kind, "updates": study.updates,
            "checkpoints": study.checkpoints, "probe": study.probe.count, "device": device,
            "fresh": (name, seed) in again,
        }  # fmt: skip
        file = f"{folder}/result.safetensors"
        found.append(Task("hrm_rl.study.joint:run", arguments, ((name, seed),), file, study.updates,
                          {name: arms[name].changes}))  # fmt: skip
    return found


def run_name(arm: str, seed: int) -> str:
    """The folder of a run: readable, and no two arms share one."""
    plain = re.sub(r"[^A-Za-z0-9=.,+-]+", "_", arm).lstrip(".")
    if plain != arm or len(plain) > 120:
        plain = f"{plain[:100]}-{hashlib.sha256(arm.encode()).hexdigest()[:8]}"
    return f"{plain}-s{seed}"


def run(
    out: str, folder: str, name: str, seed: int, values: dict[str, Any], changes: dict[str, Any], kind: str,
    updates: int, checkpoints: int, probe: int, device: str, fresh: bool,
) -> list[RunResult]:  # fmt: skip
    """Train one (arm, seed) to its end, or on to it. What is not finite any more is a result (diverged)."""
    began = time.perf_counter()
    runs, logs = Path(out) / "runs", Path(out) / "logs"
    for path in (runs, logs):
        path.mkdir(parents=True, exist_ok=True)
    every = max(1, updates // checkpoints)
    log_every = max(n for n in range(1, min(every, 50) + 1) if every % n == 0)
    own = {"seed": seed, "total_steps": updates, "out": str(runs), "name": folder, "device": device,
           "log_every": log_every, "eval_every": every, "checkpoint_every": every}  # fmt: skip
    config, agent, arguments = train_settings(values, **own)
    status, reason = "finished", ""
    with contextlib.ExitStack() as stack:
        log = stack.enter_context(open(logs / f"{folder}.log", "a", encoding="utf-8"))
        stack.enter_context(contextlib.redirect_stdout(log))
        stack.enter_context(contextlib.redirect_stderr(log))
        session = StudySession(began, stack, kind, probe)
        try:
            session.go(config, find_agent_class(agent), arguments, fresh)
        except UserError as error:
            lost = error if isinstance(error, NonFiniteError) else error.__cause__  # of what hrm_rl.train says of it
            if not isinstance(lost, NonFiniteError):
                raise
            status, reason = "diverged", str(lost)
    found = read_measures(runs / folder / "measures")
    ends = session.ends if status == "finished" else {}
    live = config.objective != "q"
    return [RunResult(name, seed, status, reason, session.seconds, **found, **ends, live=live, changes=changes)]


class StudySession(_Session):
    """A run of hrm_rl.train that is measured in place of being evaluated, and stops for no signal of its own."""

    def __init__(self, began: float, stack: contextlib.ExitStack, kind: str, probe: int):
        super().__init__(began, stack, ALONE)
        self.kind, self.count = kind, probe
        self.ends: dict[str, Any] = {}  # right, steps, puzzles of the RunResult, once the run is done
        self.seconds = 0.0  # of training up to the last measurement, over all sittings
        self.handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}  # the sweep's

    def go(self, config, agent_class: type, arguments: dict, fresh: bool) -> None:
        """From the newest checkpoint of the run's folder, or from the start."""
        folder = Path(config.out) / config.name
        if folder.exists():
            with _held(folder):
                if not fresh and list_checkpoints(folder) and self._resumed(folder, config, agent_class, arguments):
                    return
                shutil.rmtree(folder)
        self.start(config, agent_class, arguments)

    def _resumed(self, folder: Path, config, agent_class: type, arguments: dict) -> bool:
        """Go on from the newest checkpoint; False where it is damaged."""
        from hrm_rl.devices import repeatable
        from hrm_rl.metrics import MetricsWriter

        try:
            path, tensors, state = load_newest(folder)
        except UserError as error:
            print(f"begun anew: {error}")
            return False
        self.stack.enter_context(repeatable(config.deterministic, config.device))
        trainer = _make_trainer(config, agent_class, arguments, self.ranks)
        trainer.load_state(tensors, state)
        print(f"resuming {folder} at update {trainer.step}")
        self.run = folder
        self._train(trainer, MetricsWriter(folder, state["metrics_position"], trainer.step))
        return True

    # --- what is different from hrm_rl.train ------------------------------------------------------------------

    def _catch_signals(self) -> None:
        pass  # the sweep does, and whoever is killed goes on from a checkpoint

    def _train(self, trainer: Trainer, writer) -> int:
        if trainer.step == 0:
            self._measure(trainer)
        return super()._train(trainer, writer)

    def _evaluate(self, trainer: Trainer) -> dict[str, float]:
        metrics = self._measure(trainer)
        return {f"eval/{tag}": metrics[name] for tag, name in
                (("exact_accuracy", "accuracy"), ("mean_steps", "mean_steps"))}  # fmt: skip

    def _report(self, trainer: Trainer) -> None:
        for number, handler in self.handlers.items():  # which the end of training has replaced
            signal.signal(number, handler)
        if self.kind == "train":
            self.count = 0  # the end is measured on every test puzzle
        self._measure(trainer)  # once more where it falls on a checkpoint: for what is kept of the end alone
        if self.kind == "train":
            super()._report(trainer)

    def _probe(self, trainer: Trainer):
        puzzles = trainer.test_puzzles
        return puzzles if not self.count else puzzles.select(torch.arange(min(self.count, len(puzzles))))

    def _measure(self, trainer: Trainer) -> dict[str, float]:
        """Measure the trainer as it is and keep that."""
        folder, puzzles = self.run / "measures", self._probe(trainer)
        self.seconds = trainer.elapsed
        if self.kind == "joint":
            from hrm_rl.study.live_measures import measure_live

            live = measure_live(trainer, puzzles, _previous(folder, trainer.step))
            metrics, by_step, q_logits, right, steps = live
        else:
            metrics, by_step, right, steps = measure_halting(trainer, puzzles)
            q_logits = None
        write_measures(folder / f"{trainer.step:08d}.safetensors", metrics, by_step, q_logits)
        about = hashlib.sha256((puzzles.sha256 + recorded.weights_sha256(trainer.core)).encode()).hexdigest()
        self.ends = {"right": right.cpu(), "steps": steps.cpu(), "puzzles": about}
        return metrics


@contextlib.contextmanager
def _held(folder: Path) -> Iterator[None]:
    """Hold a run's lock; the worker of a sweep that was killed a moment ago may still have it, so wait for it."""
    until = time.monotonic() + _WAIT
    while True:
        try:
            handle = lock_run(folder)
            break
        except UserError:
            if time.monotonic() > until:
                raise
            time.sleep(0.2)
    with handle:
        yield


def measure_halting(trainer: Trainer, puzzles) -> tuple[dict[str, float], dict[str, Tensor], Tensor, Tensor]:
    """(metrics, by step (M,), right (N,), steps (N,)) of any agent: what its halting comes to.

    By the evaluation weights; in large batches, so not compiled.
    """
    M = trainer.config.max_steps
    with trainer.evaluation_weights():
        found = evaluation.trajectories(
            trainer.core, trainer.agent, puzzles, M, min(len(puzzles), _BATCH), trainer.device
        )
    steps = found.halt_steps(M)
    right = found.at(steps)[0]
    metrics = {"accuracy": right.double().mean().item(), "mean_steps": steps.double().mean().item(),
               "regret": scoring.regret(found.exact, steps, trainer.config.ponder_cost)}  # fmt: skip
    return metrics, {"accuracy": found.exact.double().mean(-1)}, right, steps


# --- what was measured, on disk -------------------------------------------------------------------------------


def write_measures(path: Path, metrics: dict[str, float], by_step: dict[str, Tensor], q_logits: Tensor | None) -> None:
    """One checkpoint's measures, atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {"metrics": torch.tensor([float(v) for v in metrics.values()], dtype=torch.float64)}
    if by_step:
        tensors["by_step"] = torch.stack([value.detach().double().cpu() for value in by_step.values()])
    if q_logits is not None:
        tensors["q_logits"] = q_logits.detach().float().cpu().contiguous()
    names = json.dumps({"metrics": list(metrics), "by_step": list(by_step)})
    write_atomically(path, save(tensors, {"format": FORMAT, "names": names}))


def read_measures(folder: Path) -> dict[str, Any]:
    """updates (C,), metrics name -> (C,) and by_step name -> (C, M) of a run, as RunResult has them.

    What was not measured at a checkpoint is NaN there. UserError for a damaged file.
    """
    rows = [_read_measures(path) for path in sorted(folder.glob("*.safetensors"))]
    updates = torch.tensor([int(path.stem) for path in sorted(folder.glob("*.safetensors"))], dtype=torch.int64)

    def series(kind: str) -> dict[str, Tensor]:
        names = dict.fromkeys(name for row in rows for name in row[kind])
        found = {}
        for name in names:
            shape = next(row[kind][name] for row in rows if name in row[kind])
            nothing = torch.full_like(shape, float("nan"))
            found[name] = torch.stack([row[kind].get(name, nothing) for row in rows])
        return found

    return {"updates": updates, "metrics": series("metrics"), "by_step": series("by_step")}


def _read_measures(path: Path) -> dict[str, Any]:
    try:
        with safe_open(path, framework="pt") as file:
            names = json.loads(file.metadata()["names"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        found = {kind: dict(zip(names[kind], tensors.get(kind, ()), strict=True)) for kind in names}
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: damaged measures of a run ({error})") from error
    return found | {"q_logits": tensors.get("q_logits")}


def _previous(folder: Path, step: int) -> Tensor | None:
    """The Q-logits of the checkpoint before update `step`, where there are any."""
    before = [path for path in sorted(folder.glob("*.safetensors")) if int(path.stem) < step]
    return _read_measures(before[-1])["q_logits"] if before else None
