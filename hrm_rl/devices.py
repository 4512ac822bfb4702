"""Where and in which precision to compute, as the user asked and the machine allows."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from hrm_rl.errors import UserError


def pick_device(name: str) -> torch.device:
    """"auto" is a GPU where there is one, else the CPU. UserError for a device that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"device must be auto, cpu or cuda (or cuda:1), not {name!r}") from None
    try:
        if device.type == "meta":  # shapes without numbers
            raise RuntimeError
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        said = f"only {torch.cuda.device_count()} GPU" if torch.cuda.is_available() else "no GPU was found"
        reason = f"{said}; use auto or cpu" if device.type == "cuda" else "use auto, cpu or cuda"
        raise UserError(f"device {name!r} is not there ({reason})") from error
    return device


def pick_dtype(name: str, device: torch.device) -> str:
    """"auto" is bfloat16 where the hardware multiplies it natively, else float32."""
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    return "bfloat16" if device.type == "cpu" and cpu_has_bfloat16() else "float32"


def cpu_has_bfloat16() -> bool:
    """Whether this CPU has bfloat16 matrix instructions (AVX512-BF16, AMX or the Arm extension)."""
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return any(f" {flag}" in flags for flag in ("avx512_bf16", "amx_bf16", "bf16 ", "i8mm bf16"))


@contextlib.contextmanager
def repeatable(mode: str, device: str) -> Iterator[None]:
    """Only kernels that give the same numbers every time, for a while (docs/REPRODUCIBILITY.md).

    mode: on, off, or auto, which is on for a CPU (where it costs nothing that can be measured) and off for a GPU.
    """
    on_gpu = pick_device(device).type == "cuda"
    if mode == "off" or (mode == "auto" and on_gpu):
        yield
        return
    if on_gpu:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS is first used
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)  # a kernel that has no such form is named in a warning
    torch.utils.deterministic.fill_uninitialized_memory = False  # costs time, and nothing here reads such memory
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory = filled


def can_compile(device: torch.device) -> bool:
    """Whether torch.compile has what it needs: a C++ compiler on a CPU, Triton on a GPU."""
    if device.type == "cuda":
        try:
            import triton  # noqa: F401
        except ImportError:
            return False
        return True
    return sys.platform != "win32" and any(shutil.which(name) for name in ("g++", "clang++", "c++"))


def describe(device: torch.device) -> str:
    """The machine in words, for reports."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    model = "CPU"
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                model = line.split(":", 1)[1].strip()
                break
    except OSError:
        pass
    threads = torch.get_num_threads()
    return f"{model}, {threads} thread{'s' * (threads != 1)}, torch {torch.__version__}"
