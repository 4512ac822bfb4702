"""Many runs on this process, a pool of processes or Ray: what finishes is on disk at once, what fails is a result.

A task is a function by its import path and plain arguments; it returns the results of one run or of a batch of runs.
Whatever happens to it (an error, a worker that is killed), the sweep goes on: a batch is tried again in halves, and a
single run that fails is a result with its reason. Only this process writes results, one file a task, atomically, so
that a sweep can be killed at any moment and loses nothing but the tasks it was at.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import os
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent import futures
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from hrm_rl.errors import UserError
from hrm_rl.study.results import RunResult, load_results, save_results

Run = tuple[str, int]  # name of the arm, seed
Tick = Callable[[float], None]  # told updates done since it was told before
CONNECT_SECONDS = 20.0  # for Ray to answer


@dataclass(frozen=True)
class Task:
    """What a worker does in one piece.

    Args:
        function: "package.module:name"; called with the arguments by name, and with `progress` where it takes that
            and runs in this process. Returns a RunResult for each of `runs`.
        arguments: Plain values, which can be pickled.
        runs: The (arm, seed) pairs that it gives, in its order.
        file: Where its results go, relative to the folder of the runs.
        updates: Learner-updates that it does, over all its runs.
        changes: Of each arm, for the record of a run that fails.
        split: Makes smaller tasks of one that failed; None for one that cannot be split.
    """

    function: str
    arguments: Mapping[str, Any]
    runs: tuple[Run, ...]
    file: str
    updates: float
    changes: Mapping[str, dict] = field(default_factory=dict)
    split: Callable[[Task], Sequence[Task]] | None = None


@dataclass(frozen=True)
class Outcome:
    """What became of a task: its results, or why there are none (in one line) and the traceback."""

    results: list[RunResult] | None
    reason: str = ""
    trace: str = ""


class Stopped(KeyboardInterrupt):
    """SIGINT or SIGTERM: the sweep leaves at once. `number` is the signal's."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.number = number


@contextlib.contextmanager
def stopping() -> Iterator[None]:
    """Raise Stopped where SIGINT or SIGTERM arrives; handlers are put back afterwards."""

    def stop(number, frame):
        raise Stopped(number)

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def call(function: str, arguments: Mapping[str, Any], runs: Sequence[Run], tick: Tick | None = None) -> Outcome:
    """Do a task here. Every error but a wish to stop becomes an Outcome without results."""
    try:
        module, _, name = function.partition(":")
        found = getattr(importlib.import_module(module), name)
        extra = {"progress": tick} if tick is not None and "progress" in inspect.signature(found).parameters else {}
        results = found(**arguments, **extra)
        gave = [(result.arm, result.seed) for result in results]
        if gave != list(runs):
            raise RuntimeError(f"{function} gave the results of other runs than it was asked for: {gave[:3]} ...")
        return Outcome(results)
    except Exception as error:
        return Outcome(None, in_one_line(error), traceback.format_exc())


def in_one_line(error: BaseException) -> str:
    """An error as the reason of a failed run."""
    text = " ".join(str(error).split())
    if isinstance(error, MemoryError):
        return f"out of memory ({text})" if text else "out of memory"
    said = text if isinstance(error, UserError) else f"{type(error).__name__}: {text}" if text else type(error).__name__
    return said if len(said) <= 500 else said[:497] + "..."


# --- where tasks run ------------------------------------------------------------------------------------------


class Workers(Protocol):
    """Where tasks run. `start` while there is room, then `finished` waits for at least one."""

    words: str  # "2 processes of 1 thread"

    def room(self) -> bool: ...
    def start(self, task: Task) -> None: ...
    def finished(self, tick: Tick, idle: Callable[[], None]) -> list[tuple[Task, Outcome]]: ...
    def close(self) -> None: ...


class Here:
    """One task at a time, in this process."""

    def __init__(self):
        import torch

        self.words = f"this process ({torch.get_num_threads()} thread{'s' * (torch.get_num_threads() != 1)})"
        self.task: Task | None = None

    def room(self) -> bool:
        return self.task is None

    def start(self, task: Task) -> None:
        self.task = task

    def finished(self, tick: Tick, idle: Callable[[], None]) -> list[tuple[Task, Outcome]]:
        task, self.task = self.task, None
        return [(task, call(task.function, task.arguments, task.runs, tick))]

    def close(self) -> None:
        pass


class Pool:
    """Processes on this machine, each with its share of the threads.

    Every worker is a pool of one, so that a worker that dies takes no task with it but its own. They are started
    afresh (spawn), so that nothing of this process's threads or of its GPU is in them. They end when this process
    ends, however that comes about.
    """

    def __init__(self, size: int, threads: int):
        self.words = f"{size} process{'es' * (size != 1)} of {threads} thread{'s' * (threads != 1)}"
        self.threads = threads
        self.idle: list[_Worker] = []
        self.left = size  # workers that are not started yet
        self.busy: dict[futures.Future, tuple[_Worker, Task]] = {}

    def room(self) -> bool:
        return bool(self.idle) or self.left > 0

    def start(self, task: Task) -> None:
        if not self.idle:
            self.idle.append(_Worker(self.threads))
            self.left -= 1
        worker = self.idle.pop()
        try:
            future = worker.submit(task)
        except BrokenProcessPool:  # it died while it had nothing to do
            worker.close()
            worker = _Worker(self.threads)
            future = worker.submit(task)
        self.busy[future] = worker, task

    def finished(self, tick: Tick, idle: Callable[[], None]) -> list[tuple[Task, Outcome]]:
        done: set[futures.Future] = set()
        while not done:
            done = futures.wait(self.busy, timeout=1.0, return_when=futures.FIRST_COMPLETED).done
            idle()
        found = []
        for future in done:
            worker, task = self.busy.pop(future)
            try:
                outcome = future.result()
                self.idle.append(worker)
            except BrokenProcessPool:
                worker.close()
                self.left += 1
                outcome = Outcome(None, "its process was killed (by the system, where memory ran out)")
            except Exception as error:  # what it returned cannot be sent
                self.idle.append(worker)
                outcome = Outcome(None, in_one_line(error), traceback.format_exc())
            found.append((task, outcome))
        return found

    def close(self) -> None:
        for worker in [*self.idle, *(worker for worker, _ in self.busy.values())]:
            worker.close()
        self.idle, self.busy = [], {}


class _Worker:
    """One process, and the pipe whose end is its end."""

    def __init__(self, threads: int):
        import multiprocessing

        context = multiprocessing.get_context("spawn")
        theirs, self.pipe = context.Pipe(duplex=False)
        self.executor = futures.ProcessPoolExecutor(1, context, _begin_worker, (theirs, threads))
        self.theirs = theirs  # kept until the process has it

    def submit(self, task: Task) -> futures.Future:
        # The process is made here. Ctrl-C reaches the whole group: it is for this process alone.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            return self.executor.submit(call, task.function, dict(task.arguments), task.runs)
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})

    def close(self) -> None:
        """End the process at once, whatever it does."""
        self.pipe.close()
        self.theirs.close()
        self.executor.shutdown(wait=False, cancel_futures=True)


def _begin_worker(pipe, threads: int) -> None:
    """In the worker: leave when the pipe's other end closes, which it does however the parent ends.

    It leaves at once and cleans nothing up. So its progress bars get a lock of this process alone: tqdm's own is a
    semaphore of the system, left behind, of which Python warned when the sweep was done.
    """
    from tqdm import tqdm

    tqdm.set_lock(threading.RLock())

    def leave_with_parent() -> None:
        with contextlib.suppress(EOFError, OSError):
            pipe.recv()
        os._exit(1)

    threading.Thread(target=leave_with_parent, daemon=True).start()
    _set_threads(threads)


def _set_threads(threads: int) -> None:
    import torch

    from hrm_rl import cli

    cli.keep_freed_memory()
    torch.set_num_threads(threads)


class RayWorkers:
    """Ray: `local` starts one on this machine with `size` workers, `auto` or an address joins one that runs.

    All machines must see the study's folder and the cache of recordings under the same paths, and have hrm_rl
    installed. UserError where Ray is not installed or does not answer within `CONNECT_SECONDS`.
    """

    def __init__(self, address: str, size: int, threads: int):
        self.ray = _import_ray()
        self.threads = threads
        self.temporary = None
        if address == "local":
            # A short path: sockets lie in it, whose names may have 107 bytes.
            self.temporary = tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True)
            where = {"include_dashboard": False, "_temp_dir": self.temporary.name}
            self._connect(address, address="local", num_cpus=size * threads, **where)
            self.size = size
        else:
            _check_answers(address)
            self._connect(address, address=address)
            self.size = max(1, int(self.ray.cluster_resources().get("CPU", 1)) // threads)
        self.remote = self.ray.remote(num_cpus=threads, max_retries=0)(_in_ray)
        self.busy: dict[Any, Task] = {}
        self.words = f"Ray ({address}): {self.size} worker{'s' * (self.size != 1)} of {threads} thread" + (
            "s" * (threads != 1)
        )

    def _connect(self, said: str, **how: Any) -> None:
        """ray.init. To join one is given up after `CONNECT_SECONDS`: it can wait for minutes, and takes no limit.

        A Ray of our own is started by this very thread: its processes end with the thread that they come from.
        """
        import logging

        ended: list[BaseException | None] = []

        def connect() -> None:
            try:
                self.ray.init(logging_level=logging.CRITICAL, log_to_driver=False, **how)
                ended.append(None)
            except BaseException as error:  # told to the caller below
                ended.append(error)

        if said != "local":
            thread = threading.Thread(target=connect, daemon=True)
            with _silence():  # here, not in the thread: one that is given up must not move the streams of all later
                thread.start()
                thread.join(CONNECT_SECONDS)
        else:
            kept = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
            with _silence():
                connect()
            for number, handler in kept.items():  # Ray takes SIGTERM for itself
                signal.signal(number, handler)
        if not ended:
            raise UserError(f"--ray-address {said}: Ray does not answer within {CONNECT_SECONDS:g} seconds")
        if isinstance(ended[0], KeyboardInterrupt):
            raise ended[0]
        if ended[0] is not None:
            raise UserError(f"--ray-address {said}: Ray cannot be reached ({in_one_line(ended[0])})") from ended[0]

    def room(self) -> bool:
        return len(self.busy) < self.size

    def start(self, task: Task) -> None:
        reference = self.remote.remote(task.function, dict(task.arguments), task.runs, self.threads, list(sys.path))
        self.busy[reference] = task

    def finished(self, tick: Tick, idle: Callable[[], None]) -> list[tuple[Task, Outcome]]:
        done: list = []
        while not done:
            done, _ = self.ray.wait(list(self.busy), num_returns=1, timeout=1.0)
            idle()
        found = []
        for reference in done:
            task = self.busy.pop(reference)
            try:
                outcome = self.ray.get(reference)
            except self.ray.exceptions.RayError as error:
                outcome = Outcome(None, _why_lost(error), str(error))
            found.append((task, outcome))
        return found

    def close(self) -> None:
        for reference in self.busy:
            with contextlib.suppress(Exception):
                self.ray.cancel(reference, force=True)
        self.busy = {}
        with _silence():
            self.ray.shutdown()
        if self.temporary is not None:
            self.temporary.cleanup()


def _in_ray(function: str, arguments: dict, runs: Sequence[Run], threads: int, path: Sequence[str]) -> Outcome:
    sys.path += [folder for folder in path if folder not in sys.path]
    _set_threads(threads)
    return call(function, arguments, runs)


def _why_lost(error: Exception) -> str:
    name = type(error).__name__
    if name == "OutOfMemoryError":
        return "its worker was killed by Ray: out of memory"
    if name in ("WorkerCrashedError", "NodeDiedError", "RayActorError", "ActorDiedError"):
        return "its Ray worker died (killed by the system, where memory ran out)"
    return in_one_line(error)


def _import_ray():
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is sent anywhere
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # else a warning on machines without a GPU
    try:
        import ray
    except ImportError as error:
        raise UserError('--ray-address: Ray is not installed; pip install "hrm_rl[ray]"') from error
    return ray


def _check_answers(address: str) -> None:
    """UserError where HOST:PORT takes no connection. `auto` looks the address up itself."""
    if address == "auto":
        return
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not colon or not host or not port.isdecimal() or not 0 < int(port) < 1 << 16:
        raise UserError(f"--ray-address must be local, auto or HOST:PORT, not {address!r}")
    try:
        socket.create_connection((host, int(port)), timeout=CONNECT_SECONDS).close()
    except OSError as error:
        raise UserError(f"--ray-address {address}: nothing answers there ({error.strerror or error})") from error


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Keep what Ray says while it starts and ends off the terminal: it writes to the loggers and to sys.stderr."""
    with open(os.devnull, "w") as nothing, contextlib.redirect_stderr(nothing), contextlib.redirect_stdout(nothing):
        yield


# --- the sweep ------------------------------------------------------------------------------------------------


def sweep(tasks: Iterable[Task], workers: Workers, runs: Path, told: Told) -> None:
    """Do all tasks and write each one's results below `runs` as it ends. OSError (a full disk) passes through."""
    ahead, running = deque(tasks), 0
    while ahead or running:
        while ahead and workers.room():
            workers.start(ahead.popleft())
            running += 1
        for task, outcome in workers.finished(told.tick, told.idle):
            running -= 1
            if outcome.results is None and len(task.runs) > 1 and task.split is not None:
                told.again(task)
                ahead.extendleft(reversed(task.split(task)))
                continue
            results = outcome.results
            if results is None:
                results = failed(task, outcome.reason)
                _note_failure(runs, task, outcome)
            save_results(runs / task.file, results)
            told.done(task, results)


def failed(task: Task, reason: str) -> list[RunResult]:
    """The results of a task that gave none."""
    return [RunResult(arm, seed, "failed", reason, changes=task.changes.get(arm, {})) for arm, seed in task.runs]


def _note_failure(runs: Path, task: Task, outcome: Outcome) -> None:
    """Keep the traceback for whoever looks for the cause."""
    with contextlib.suppress(OSError), open(runs.parent / "failures.log", "a", encoding="utf-8") as file:
        names = ", ".join(f"{arm} seed {seed}" for arm, seed in task.runs)
        file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {names}: {outcome.reason}\n{outcome.trace}\n")


def halves(task: Task, make: Callable[[Sequence[Run]], Task]) -> list[Task]:
    """Two tasks of half the runs each."""
    middle = len(task.runs) // 2
    return [make(task.runs[:middle]), make(task.runs[middle:])]


_RANK = {"failed": 0, "diverged": 1, "finished": 2}


def results_in(runs: Path, notice: Callable[[str], None]) -> dict[Run, RunResult]:
    """Every result below `runs`; of two of one run the finished one. A damaged file is a notice and no result."""
    found: dict[Run, RunResult] = {}
    for path in sorted([*runs.glob("*.safetensors"), *runs.glob("*/result.safetensors")]):
        try:
            results = load_results(path)
        except UserError as error:
            notice(f"{error}; its runs are done again")
            continue
        for result in results:
            key = (result.arm, result.seed)
            if key not in found or _RANK[result.status] >= _RANK[found[key].status]:
                found[key] = result
    return found


def clear_staging(runs: Path) -> None:
    """Remove what a process that was killed had begun to write. Only the owner of the folder may."""
    for pattern in (".*.safetensors.*", "*/.*.safetensors.*"):
        for path in runs.glob(pattern):
            path.unlink(missing_ok=True)


# --- what is shown --------------------------------------------------------------------------------------------


class Told:
    """One bar on a terminal, a quiet line every ten seconds elsewhere.

    total, before: runs of the study, and how many of them were there already. unstable: whether a run is (shown as a
    count); failures among those before are counted as well.
    """

    def __init__(self, tasks: Sequence[Task], total: int, before: Iterable[RunResult],
                 unstable: Callable[[RunResult], bool]):  # fmt: skip
        from tqdm import tqdm

        before = list(before)
        self.total, self.finished = total, len(before)
        self.unstable_of = unstable
        self.failed = sum(run.status == "failed" for run in before)
        self.unstable = sum(map(unstable, before))
        self.all = sum(task.updates for task in tasks)
        self.done_updates = self.in_work = 0.0
        self.began = self.last = time.monotonic()
        self.bar = tqdm(
            total=round(self.all), unit="upd", unit_scale=True, disable=None, dynamic_ncols=True, file=sys.stderr
        )
        self._show(False)

    def tick(self, updates: float) -> None:
        """The task in work (one at a time, in this process) did some more."""
        self.in_work += updates
        self._show(False)

    def idle(self) -> None:
        """Time passes."""
        self._show(False)

    def again(self, task: Task) -> None:
        """A task failed and is tried again in parts."""
        self.in_work = 0.0

    def done(self, task: Task, results: Sequence[RunResult]) -> None:
        self.in_work = 0.0
        self.done_updates += task.updates
        self.finished += len(results)
        self.failed += sum(run.status == "failed" for run in results)
        self.unstable += sum(map(self.unstable_of, results))
        self._show(self.finished >= self.total)

    def _show(self, now: bool) -> None:
        updates = self.done_updates + self.in_work
        if not self.bar.disable:
            self.bar.set_description_str(f"runs {self.finished}/{self.total}", refresh=False)
            self.bar.set_postfix_str(f"failed {self.failed} unstable {self.unstable}", refresh=False)
            self.bar.update(round(updates) - self.bar.n)
            return
        clock = time.monotonic()
        if now or clock - self.last >= 10:
            self.last = clock
            rate = updates / max(clock - self.began, 1e-9)
            left = f"{_clock((self.all - updates) / rate)} left" if updates else "time left unknown"
            print(f"runs {self.finished}/{self.total}  failed {self.failed}  unstable {self.unstable}  "
                  f"learner-updates/s {rate:,.0f}  {left}", flush=True)  # fmt: skip

    def close(self) -> None:
        self.bar.close()


def _clock(seconds: float) -> str:
    return f"{int(seconds // 60)}:{int(seconds % 60):02d}"


def fewer_runs(task: Task, runs: Sequence[Run], file: str) -> Task:
    """The task of some of its runs, which its function takes by that name."""
    share, arguments = len(runs) / len(task.runs), {**task.arguments, "runs": list(runs)}
    return replace(task, runs=tuple(runs), arguments=arguments, file=file, updates=task.updates * share)
