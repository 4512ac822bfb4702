"""What Q-only learners learn from and are scored on: the q-tokens of a frozen core and whether its answers are right.

With a frozen core the process is deterministic, so an episode is a column of a table and a live process is a row
number that moves down it. M segments, N puzzles, D hidden size.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from hrm_rl.errors import UserError
from hrm_rl.recorded import Notice, Pass, Recording, model_sha256, recorded, recording_key
from hrm_rl.tasks import PuzzleSet


@dataclass(frozen=True, eq=False)
class Trajectories:
    """Segments 1..M of N puzzles; row m - 1 is segment m. `key` names them: SHA-256, of the content unless given.

    M is the budget: CONTINUE there counts as HALT and nothing is read beyond it (DESIGN, section 3).
    """

    q_token: Tensor  # (M, N, D) float32: what the Q-head reads
    correct: Tensor  # (M, N) bool: the whole answer is right
    key: str = ""

    def __post_init__(self) -> None:
        q_token, correct = self.q_token, self.correct
        if q_token.ndim != 3 or q_token.shape[:2] != correct.shape or not correct.numel():
            shapes = f"{tuple(q_token.shape)} and {tuple(correct.shape)}"
            raise UserError(f"trajectories: q_token (M, N, D) and correct (M, N) do not fit each other: {shapes}")
        if q_token.dtype != torch.float32 or correct.dtype != torch.bool:
            kinds = f"{q_token.dtype} and {correct.dtype}"
            raise UserError(f"trajectories: q_token must be float32 and correct bool, not {kinds}")
        if not bool(q_token.isfinite().all()):
            raise UserError("trajectories: q_token holds numbers that are not finite")
        if not self.key:
            digest = hashlib.sha256(str(tuple(q_token.shape)).encode())
            for part in (q_token, correct):
                digest.update(part.detach().cpu().contiguous().numpy().tobytes())
            object.__setattr__(self, "key", digest.hexdigest())


def trajectories_of(recording: Recording) -> Trajectories:
    """The part of a recording that Q-learners see. UserError where the core's state is not finite."""
    return Trajectories(recording.q_token.float(), recording.exact, recording.key)


def load_trajectories(
    source: str | Path | None, puzzles: PuzzleSet, max_steps: int = 0, device: str | torch.device = "cpu",
    folder: Path | None = None, notice: Notice = lambda line: None, progress: Callable[[int], None] | None = None,
    batch_size: int = 128, dtype: str = "auto",
) -> Trajectories:  # fmt: skip
    """Run a core over puzzles for `max_steps` segments (0: the budget it was trained with), or read that from `folder`.

    source: None (the core that ships for the puzzles' size), a run folder, a model file or a released checkpoint.
    dtype: to compute in, as `--dtype` of compare. folder: cache of recordings; None keeps nothing. progress is told
    the puzzles done. UserError for a core that cannot be read or does not fit the puzzles.
    """
    from envs.problem import check_fit
    from hrm_rl.core.io import load_core
    from hrm_rl.devices import pick_dtype
    from hrm_rl.evaluate import in_dtype

    device = torch.device(device)
    loaded = load_core(source, size=puzzles.side)
    core = in_dtype(loaded.core, pick_dtype(dtype, device)).to(device).eval()
    check_fit(core, puzzles)
    max_steps = max_steps or int(loaded.meta.get("max_steps", 16))
    key = recording_key(core, model_sha256(loaded.source), puzzles, max_steps, str(device))
    the = Pass(core, puzzles, max_steps, key, batch_size, device, folder, notice, progress)
    return trajectories_of(recorded(the)[0])
