"""Instruments of `hrm_rl.bench`: clocks, the machine's own speed, peak memory, and a guard over compiled code."""

from __future__ import annotations

import contextlib
import functools
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from hrm_rl.errors import UserError


def synchronise(device) -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(function: Callable[[], object], device, times: int = 1) -> float:
    """Wall-clock of `times` calls, with all of the device's work done at both ends."""
    synchronise(device)
    began = time.perf_counter()
    for _ in range(times):
        function()
    synchronise(device)
    return time.perf_counter() - began


def times_in(function: Callable[[], object], device, seconds: float) -> int:
    """How many calls take about `seconds`; at least one."""
    return max(1, round(seconds / max(seconds_of(function, device), 1e-9)))


class Peak:
    """Matrix products as fast as this machine does them: the best of a few sizes, in one dtype.

    By torch.mm; or, with `packed`, by oneDNN on a weight laid out for it beforehand, which some CPUs do faster
    (RuntimeError where this build of torch or this CPU cannot).
    """

    def __init__(self, dtype: str, device, sizes: Sequence[int] = (), packed: bool = False):
        import torch

        self.device, self.runs = device, []
        for size in sizes or ((4096, 8192, 16384) if device.type == "cuda" else (1024, 1536, 2048)):
            a, b = (torch.randn(size, size, device=device).to(getattr(torch, dtype)) for _ in range(2))
            if packed:
                b, linear = _pack(b, size), torch.ops.mkldnn._linear_pointwise
                run = functools.partial(linear, a, b, None, "none", [], "")
            else:
                run = functools.partial(torch.mm, a, b, out=torch.empty_like(a))
            self.runs.append((2 * size**3, run))
        self.measure()  # warms up

    def measure(self) -> float:
        """Floating-point operations a second, now."""
        return max(2 * flops / seconds_of(run, self.device, 2) for flops, run in self.runs)


def _pack(weight, rows: int):
    """A weight (out, in) in oneDNN's own layout for `rows` rows of input."""
    import torch

    try:
        return torch.ops.mkldnn._reorder_linear_weight(weight, rows)
    except (AttributeError, NotImplementedError) as error:
        raise RuntimeError("oneDNN packs no weights here") from error


def packed_peaks(dtypes: Sequence[str], device) -> dict[str, Peak]:
    """`Peak` of packed products for the dtypes that have one on this device."""
    peaks = {}
    for dtype in dtypes:
        with contextlib.suppress(RuntimeError):
            peaks[dtype] = Peak(dtype, device, packed=True)
    return peaks


@contextlib.contextmanager
def high_water(device) -> Iterator[dict[str, int | None]]:
    """Fills in "bytes": peak memory while the context was open.

    On a GPU what tensors took; on a CPU the resident high-water mark of the process, from a counter reset here
    (Linux; elsewhere the mark of the process's whole life).
    """
    import resource

    import torch

    taken: dict[str, int | None] = {"bytes": None}
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
    yield taken
    if device.type == "cuda":
        taken["bytes"] = torch.cuda.max_memory_allocated(device)
        return
    try:
        status = Path("/proc/self/status").read_text()
        taken["bytes"] = next(1024 * int(x.split()[1]) for x in status.splitlines() if x.startswith("VmHWM:"))
    except (OSError, StopIteration):
        unit = 1 if sys.platform == "darwin" else 1024
        taken["bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class CompileGuard:
    """Refuses figures of "compiled" functions that ran uncompiled, in part or at times."""

    def __init__(self):
        from torch._dynamo.utils import counters

        self.counters = counters
        self.counters.clear()

    def graphs(self) -> int:
        return int(self.counters["stats"].get("unique_graphs", 0))

    def check(self, name: str, run: Callable[[], object], engine) -> None:
        """Run once more and look: every call of the core must be one compiled graph. UserError otherwise."""
        import torch

        from hrm_rl.core.pieces import InPieces

        breaks = [str(reason).split("\n")[0] for reason in self.counters["graph_break"]]
        if breaks:
            raise UserError(f"{name}: not reported, the compiled graph is broken ({breaks[0]})")
        if not self.graphs():
            raise UserError(f"{name}: not reported, nothing was compiled (torch.compile fell back to eager)")
        calls: list[Callable] = []

        def counting(function):
            def call(*arguments):
                calls.append(function)
                return function(*arguments)

            return call

        # A core whose every call carries gradient has an empty prefix: there is no graph in it.
        empty = getattr(getattr(engine, "core", None), "without_gradient", 1) == 0
        places: list[tuple[Any, Any, Callable]] = []
        for part in ("run_tail",) if empty else ("run_prefix", "run_tail"):
            called = getattr(engine, part)
            if isinstance(called, InPieces):
                places += [(called.functions, number, function) for number, function in enumerate(called.functions)]
            else:
                places.append((vars(engine), part, called))
        for place, key, function in places:
            place[key] = counting(function)
        try:
            with profiler_of(torch.profiler.ProfilerActivity.CPU) as profiler:
                run()
        finally:
            for place, key, function in places:
                place[key] = function
        regions = sum(e.count for e in profiler.key_averages() if e.key.startswith("Torch-Compiled Region"))
        if regions != len(calls):
            raise UserError(
                f"{name}: not reported, {len(calls)} calls of the core ran {regions} compiled graphs "
                "(torch.compile fell back to eager)"
            )

    def check_same(self, before: int) -> None:
        """UserError if something was compiled since `graphs()` was `before`."""
        if self.graphs() != before:
            raise UserError(f"not reported: {self.graphs() - before} graphs were compiled during the timed repeats")


def profiler_of(*activities):
    """PyTorch's profiler, over all threads (`hrm_rl.core.pieces`)."""
    from torch.profiler import _ExperimentalConfig, profile

    return profile(activities=activities, experimental_config=_ExperimentalConfig(profile_all_threads=True))


def write_trace(path: str, run: Callable[[], object], device, times: int = 3) -> list[list]:
    """Chrome trace of `times` calls; returns the operations that took longest: [name, calls, milliseconds a call]."""
    from torch.profiler import ProfilerActivity

    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu
    with profiler_of(*activities) as profiler:
        for _ in range(times):
            run()
        synchronise(device)
    profiler.export_chrome_trace(path)
    took = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    events = sorted(profiler.key_averages(), key=lambda e: -getattr(e, took))
    return [[e.key, e.count / times, getattr(e, took) / times / 1e3] for e in events[:25]]


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and range of repeats."""
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def progress(total: int):
    from tqdm import tqdm

    return tqdm(total=total, unit="repeat", disable=None, leave=False, file=sys.stderr)


def interleave(repeats: int, runs: Sequence[Callable[[], Any]]) -> list[list[Any]]:
    """Results of every run, repeat by repeat; every other repeat goes through them backwards."""
    results: list[list[Any]] = [[] for _ in runs]
    with progress(repeats) as bar:
        for repeat in range(repeats):
            numbered = list(enumerate(runs))
            for number, run in reversed(numbered) if repeat % 2 else numbered:
                results[number].append(run())
            bar.update()
    return results
