"""200,000 environment steps: memory stays flat and nothing is left open."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from statistics import median

import numpy as np
import pytest

from hrm_rl.measure import memory_and_files

ROOT = Path(__file__).resolve().parents[1]


def slope(values: list[float]) -> tuple[float, float]:
    """Growth over the whole series by a straight line, and its standard error."""
    x = np.linspace(0, 1, len(values)) - 0.5
    rate = (x @ values) / (x @ x)
    rest = np.asarray(values) - np.mean(values) - rate * x
    return rate, float(np.sqrt((rest @ rest) / (len(values) - 2) / (x @ x)))


@pytest.mark.slow
@pytest.mark.parametrize("leak", [0, 1_000], ids=["as it is", "control"])
def test_memory_and_files_stay_as_they_are(tmp_path, leak):
    """In a process of its own, with nothing that other tests have left; the control keeps `leak` numbers an update."""
    if not memory_and_files() or platform.libc_ver()[0] != "glibc":
        pytest.skip("this system does not say what memory a process has, or gives no free memory back when asked")
    done = subprocess.run([sys.executable, str(ROOT / "tests/support/soak.py"), str(tmp_path), str(leak)], cwd=ROOT,
                          env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout.splitlines()[-1])
    memory, files = seen["memory"], seen["files"]
    growth, error = slope(memory)
    print(f"memory {memory[0]:.1f} to {memory[-1]:.1f} MB, growth {growth:.2f} +- {error:.2f} MB, files {set(files)}")
    flat = growth < max(3 * error, 2.0)  # it settles by 0.5 MB; the control grows by 5.9
    assert flat == (leak == 0), (growth, error, memory[0])
    quarter = len(files) // 4  # a file may be open for a moment, as one is looked at; none may stay open
    assert median(files[-quarter:]) == median(files[:quarter]) and seen["files_left"] < median(files)
