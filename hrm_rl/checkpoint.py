"""Checkpoints: a folder written beside its final name, flushed to disk, then renamed. Never code, never pickle.

    checkpoints/step-00000400/
        model.safetensors    core and Q-head as evaluation uses them (the running average where there is one)
        train.safetensors    everything else that is a tensor: raw weights, optimiser, slots, metrics
        state.json           everything else that is not, with the SHA-256 of both files and of itself

The newest two are kept. A reader that finds a damaged one says so by name, and which one before it is whole.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import IO

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from hrm_rl.core.io import MODEL_FILE
from hrm_rl.errors import UserError

TRAIN_FILE, STATE_FILE = "train.safetensors", "state.json"
KEEP = 2


def save_checkpoint(run: Path, step: int, model: bytes, tensors: dict[str, Tensor], state: dict) -> Path:
    """Write checkpoints/step-STEP of `run` atomically and return its path. OSError passes through.

    Only the run's one owner may call it (`lock_run`). A whole checkpoint of this step is kept as it is.
    """
    folder = run / "checkpoints"
    folder.mkdir(parents=True, exist_ok=True)
    final = folder / f"step-{step:08d}"
    for left in folder.glob(".writing-*"):  # by a process that was killed here
        shutil.rmtree(left, ignore_errors=True)
    if final.exists():
        if is_whole(final):  # a run that ends where it was last saved
            return final
        shutil.rmtree(final)
    staging = folder / f".writing-{os.getpid()}"
    staging.mkdir()
    try:
        train = save({name: value.detach().cpu().contiguous() for name, value in tensors.items()})
        state = state | {"step": step}
        digests = {MODEL_FILE: _sha256(model), TRAIN_FILE: _sha256(train), STATE_FILE: _sha256(_plain(state))}
        _write(staging / MODEL_FILE, model)
        _write(staging / TRAIN_FILE, train)
        _write(staging / STATE_FILE, json.dumps(state | {"sha256": digests}, indent=1).encode())
        _sync_folder(staging)
        os.rename(staging, final)
        _sync_folder(folder)
    except OSError:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    for old in list_checkpoints(run)[:-KEEP]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def lock_run(run: Path) -> IO[str]:
    """Take a run's folder for this process; UserError if a live process has it. Held until closed or until death."""
    import fcntl

    handle = open(run / ".lock", "a+", encoding="ascii")  # noqa: SIM115 - held for as long as the run goes on
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        handle.seek(0)
        owner = handle.read().strip() or "unknown"
        handle.close()
        raise UserError(f"{run}: the run is in use by a live process (pid {owner})") from error
    handle.truncate(0)
    handle.write(str(os.getpid()))
    handle.flush()
    return handle


def list_checkpoints(run: Path) -> list[Path]:
    """The finished checkpoints of a run, oldest first."""
    return sorted(path for path in (run / "checkpoints").glob("step-*") if (path / STATE_FILE).is_file())


def is_whole(path: Path) -> bool:
    """Whether a checkpoint loads."""
    try:
        load_checkpoint(path)
    except UserError:
        return False
    return True


def run_of(source: Path) -> tuple[Path, Path | None]:
    """(run, None) for a run's folder, (run, checkpoint) for one of its checkpoints. UserError for anything else."""
    path = source.absolute()
    run, checkpoint = (path.parents[1], path) if path.parent.name == "checkpoints" else (source, None)
    if not (run / "config.yaml").is_file():
        raise UserError(f"{source}: no run to resume (it holds no config.yaml)")
    if checkpoint is not None and not checkpoint.is_dir():
        there = ", ".join(path.name for path in list_checkpoints(run)) or "none"
        raise UserError(f"{source}: no such checkpoint (there are: {there})")
    return run, checkpoint


def load_newest(run: Path) -> tuple[Path, dict[str, Tensor], dict]:
    """(path, tensors, state) of a run's newest checkpoint.

    Raises UserError where there is none, and where it is damaged: that names the one before that is whole.
    """
    found = list_checkpoints(run)
    if not found:
        raise UserError(f"{run}: holds no checkpoint to resume from; start anew with --config {run}/config.yaml")
    try:
        return found[-1], *load_checkpoint(found[-1])
    except UserError as error:
        whole = next((path for path in reversed(found[:-1]) if is_whole(path)), None)
        advice = f"go on from the one before: --resume {whole}" if whole else "no other checkpoint of the run is whole"
        raise UserError(f"{error}; {advice}") from error


def set_aside_after(checkpoint: Path) -> list[Path]:
    """Rename the later checkpoints of its run to aside-step-N, so that the run goes on from this one."""
    later = [path for path in checkpoint.parent.glob("step-*") if path.name > checkpoint.name]
    aside = []
    for path in sorted(later):
        free = (path.with_name(f"aside-{path.name}" + (f"-{n}" if n else "")) for n in range(10_000))
        aside.append(path.rename(next(name for name in free if not name.exists())))
    return aside


def load_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict]:
    """(tensors, state) of one checkpoint. UserError names the file that is missing or damaged."""
    name = STATE_FILE
    try:
        state = json.loads((path / STATE_FILE).read_bytes())
        digests = state.pop("sha256")
        held = {STATE_FILE: _plain(state)}
        for name in (TRAIN_FILE, MODEL_FILE):
            if not (path / name).is_file():  # a pipe would never end
                raise UserError(f"{path / name}: is missing, or no plain file")
        for name in (STATE_FILE, TRAIN_FILE, MODEL_FILE):
            held[name] = held[name] if name in held else (path / name).read_bytes()
            if _sha256(held[name]) != digests[name]:
                raise UserError(f"{path / name}: damaged (its SHA-256 is not the one noted when it was written)")
        return load(held[TRAIN_FILE]), state
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, SafetensorError) as error:
        raise UserError(f"{path / name}: not readable as part of a checkpoint ({error})") from error


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


def _plain(state: dict) -> bytes:
    """What the digest of state.json is taken of: its values, however the file is laid out."""
    return json.dumps(state, sort_keys=True).encode()


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
