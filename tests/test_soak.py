"""200,000 environment steps: memory stays flat and nothing is left open."""

from __future__ import annotations

import numpy as np
import pytest
from hrm_testing import lively_trainer

from hrm_rl import checkpoint
from hrm_rl.measure import memory_and_files
from hrm_rl.metrics import MetricsWriter

STEPS, SLOTS = 200_000, 256


def slope(values: list[float]) -> tuple[float, float]:
    """Growth over the whole series by a straight line, and its standard error."""
    x = np.linspace(0, 1, len(values)) - 0.5
    rate = (x @ values) / (x @ x)
    rest = np.asarray(values) - np.mean(values) - rate * x
    return rate, float(np.sqrt((rest @ rest) / (len(values) - 2) / (x @ x)))


@pytest.mark.slow
@pytest.mark.parametrize("leak", [0, 20_000], ids=["as it is", "control"])
def test_memory_and_files_stay_as_they_are(tmp_path, leak):
    """With metrics, evaluation and checkpoints as a run has them. The control keeps `leak` numbers an update."""
    if not memory_and_files():
        pytest.skip("this system does not say how much memory a process has")
    kept: list[np.ndarray] = []
    trainer = lively_trainer(num_envs=SLOTS, optim={"ema": 0.9})
    writer = MetricsWriter(tmp_path)
    memory, files = [], []
    updates = STEPS // SLOTS
    for update in range(1, updates + 1):
        details = trainer.update(detailed=update % 5 == 0, before_detailed=update % 5 == 4)
        kept.append(np.ones(leak))
        if update % 5 == 0:
            writer.write(update, trainer.line(details, 1.0))
        if update % 50 == 0:
            trainer.evaluate(trainer.test_puzzles, 4)
            plain = trainer.state()
            checkpoint.save_checkpoint(tmp_path, update, trainer.model(), *plain)
        if update > updates // 4 and update % 5 == 0:  # after the warm-up
            now = memory_and_files()
            memory.append(now["system/memory_mb"])
            files.append(now["system/open_files"])
    writer.close()
    growth, error = slope(memory)
    print(f"memory {memory[0]:.1f} to {memory[-1]:.1f} MB, growth {growth:.2f} +- {error:.2f} MB, files {set(files)}")
    flat = growth < max(3 * error, 0.01 * memory[0])
    assert flat == (leak == 0), (growth, error, memory[0])
    assert len(set(files)) == 1 and memory_and_files()["system/open_files"] <= files[-1] - 1
