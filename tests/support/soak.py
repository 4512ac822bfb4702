"""200,000 environment steps in a process of their own: python tests/support/soak.py FOLDER LEAK -> one line of JSON.

With metrics, evaluation and checkpoints as a run has them. LEAK numbers are kept at every update (the control).
Before a look the allocator gives back what is free: how much of that it holds varies by some 3 MB from look to look.
"""

from __future__ import annotations

import ctypes
import json
import sys
from pathlib import Path

import numpy as np
from hrm_testing import lively_trainer

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from hrm_rl import checkpoint  # noqa: E402
from hrm_rl.measure import memory_and_files  # noqa: E402
from hrm_rl.metrics import MetricsWriter  # noqa: E402

STEPS, SLOTS = 200_000, 256


def main(folder: Path, leak: int) -> None:
    trainer, writer = lively_trainer(num_envs=SLOTS, optim={"ema": 0.9}), MetricsWriter(folder)
    give_back = ctypes.CDLL(None).malloc_trim
    kept, memory, files = [], [], []
    updates = STEPS // SLOTS
    for update in range(1, updates + 1):
        details = trainer.update(detailed=update % 5 == 0, before_detailed=update % 5 == 4)
        if leak:
            kept.append(np.ones(leak))
        if update % 5 == 0:
            writer.write(update, trainer.line(details, 1.0))
        if update % 50 == 0:
            trainer.evaluate(trainer.test_puzzles, 4)
            checkpoint.save_checkpoint(folder, update, trainer.model(), *trainer.state())
        if update > updates // 4 and update % 5 == 0:  # after the warm-up
            give_back(0)
            now = memory_and_files()
            memory.append(now["system/memory_mb"])
            files.append(now["system/open_files"])
    writer.close()
    print(json.dumps({"memory": memory, "files": files, "files_left": memory_and_files()["system/open_files"]}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
