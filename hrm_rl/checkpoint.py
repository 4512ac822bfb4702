"""Checkpoints: a folder written beside its final name, flushed to disk, then renamed. Never code, never pickle.

    checkpoints/step-00000400/
        model.safetensors    core and Q-head as evaluation uses them (the running average where there is one)
        train.safetensors    everything else that is a tensor: raw weights, optimiser, slots, metrics
        state.json           everything else that is not, with the SHA-256 of both files

The newest two are kept. A reader that finds a damaged one says so by name.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from hrm_rl.core.io import MODEL_FILE
from hrm_rl.errors import UserError

TRAIN_FILE, STATE_FILE = "train.safetensors", "state.json"
KEEP = 2


def save_checkpoint(run: Path, step: int, model: bytes, tensors: dict[str, Tensor], state: dict) -> Path:
    """Write checkpoints/step-STEP of `run` atomically and return its path. OSError passes through."""
    folder = run / "checkpoints"
    folder.mkdir(parents=True, exist_ok=True)
    final = folder / f"step-{step:08d}"
    staging = folder / f".writing-{os.getpid()}"
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir()
    try:
        train = save({name: value.detach().cpu().contiguous() for name, value in tensors.items()})
        digests = {MODEL_FILE: _sha256(model), TRAIN_FILE: _sha256(train)}
        _write(staging / MODEL_FILE, model)
        _write(staging / TRAIN_FILE, train)
        _write(staging / STATE_FILE, json.dumps(state | {"step": step, "sha256": digests}, indent=1).encode())
        _sync_folder(staging)
        if final.exists():  # the same step saved twice (a resumed run that ended at once)
            shutil.rmtree(final)
        os.rename(staging, final)
        _sync_folder(folder)
    except OSError:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    for old in list_checkpoints(run)[:-KEEP]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def list_checkpoints(run: Path) -> list[Path]:
    """The finished checkpoints of a run, oldest first."""
    return sorted(path for path in (run / "checkpoints").glob("step-*") if (path / STATE_FILE).is_file())


def load_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict]:
    """(tensors, state) of one checkpoint. UserError names the file that is missing or damaged."""
    try:
        state = json.loads((path / STATE_FILE).read_text())
        for name, digest in state["sha256"].items():
            if _sha256((path / name).read_bytes()) != digest:
                raise UserError(f"{path / name}: damaged (its SHA-256 is not the one noted when it was written)")
        return load((path / TRAIN_FILE).read_bytes()), state
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: not a readable checkpoint ({error})") from error


def write_atomically(path: Path, content: bytes) -> None:
    """Replace `path` by `content`, or leave it as it was."""
    staging = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        _write(staging, content)
        os.replace(staging, path)
    except OSError:
        staging.unlink(missing_ok=True)
        raise


def _write(path: Path, content: bytes) -> None:
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
