"""Models on disk: safetensors with the configuration in the header, never code.

One file holds a core (`core.*`), optionally a Q-head (`q_head.*`) and other weights of an agent (`agent.*`),
and in its metadata the format, the core's configuration and what the model was trained with. Names map one to
one to the released checkpoints (`core/released.py`).
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field, fields, replace
from importlib import resources
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from hrm_rl.core.hrm import CoreConfig, HRMCore
from hrm_rl.core.q_head import QHead
from hrm_rl.devices import pick_dtype
from hrm_rl.errors import UserError, nearest

FORMAT = "hrm_rl.model.v1"
MODEL_FILE = "model.safetensors"


@dataclass(frozen=True)
class LoadedCore:
    """A core read from disk. `q_head` is None where the file holds none; `meta` is what its writer noted.

    agent_tensors: what the file holds of an agent's own weights beside a Q-head, by their names in the agent.
    """

    core: HRMCore
    q_head: QHead | None
    source: str
    meta: dict = field(default_factory=dict)
    agent_tensors: dict[str, Tensor] = field(default_factory=dict)


def packaged_core(size: int = 9) -> Path:
    """Path of the small trained core that ships with the package. UserError if none ships for `size`."""
    path = Path(str(resources.files("hrm_rl") / "assets" / f"sudoku-{size}.safetensors"))
    if not path.is_file():
        raise UserError(f"no trained core ships for size {size}; name one with core= (a run folder or a model file)")
    return path


def find_model(source: str | Path) -> Path:
    """The model file behind a path: the file itself, a checkpoint folder, or a run's newest checkpoint."""
    path = Path(source)
    if path.is_file():
        return path
    if not path.exists():
        raise UserError(f"{path}: no such file or folder")
    if (path / MODEL_FILE).is_file():
        return path / MODEL_FILE
    saved = sorted((path / "checkpoints").glob(f"step-*/{MODEL_FILE}"))
    if not saved:
        raise UserError(f"{path}: holds no {MODEL_FILE} and no checkpoints/step-*/{MODEL_FILE}")
    return saved[-1]


def model_bytes(
    core: HRMCore, q_head: nn.Module | None, meta: dict | None = None, agent: nn.Module | None = None
) -> bytes:
    """The file's content. `meta` must be JSON; of `agent` all weights but those of a `q_head` are written as agent.*"""
    tensors = {f"core.{name}": value for name, value in core.state_dict().items()}
    if q_head is not None:
        tensors |= {f"q_head.{name}": value for name, value in q_head.state_dict().items()}
    if agent is not None:
        own = {n: t for n, t in agent.state_dict().items() if q_head is None or not n.startswith("q_head.")}
        tensors |= {f"agent.{name}": value for name, value in own.items()}
    header = {"format": FORMAT, "core": json.dumps(asdict(core.config)), "meta": json.dumps(meta or {})}
    return save({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, header)


def read_header(path: Path) -> tuple[CoreConfig, dict, dict[str, Tensor]]:
    """(core configuration, meta, tensors) of a model file. UserError says what is wrong with it."""
    _check_digest(path)
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: not a readable safetensors file ({_first_line(error)})") from error
    if header.get("format") != FORMAT:
        raise UserError(f"{path}: not a model of this project (format {header.get('format')!r}, expected {FORMAT!r})")
    try:
        config = core_config(json.loads(header["core"]))
        meta = json.loads(header.get("meta", "{}"))
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path}: its header holds no valid core configuration ({_first_line(error)})") from error
    return config, meta, tensors


def _check_digest(path: Path) -> None:
    """Where a checkpoint's state.json lies beside the file, its SHA-256 must be the one noted there."""
    note = path.parent / "state.json"
    if not note.is_file():
        return
    try:
        noted = json.loads(note.read_bytes())["sha256"][path.name]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{note}: not readable as part of a checkpoint ({_first_line(error)})") from error
    if hashlib.sha256(path.read_bytes()).hexdigest() != noted:
        raise UserError(f"{path}: damaged (its SHA-256 is not the one noted when it was written)")


def core_config(values: dict) -> CoreConfig:
    """CoreConfig from plain values. Unknown keys are errors that name the nearest field."""
    known = [f.name for f in fields(CoreConfig)]
    for name in values:
        if name not in known:
            raise UserError(f"unknown core setting {name!r}{nearest(name, known)}")
    if "box" in values:
        values = values | {"box": tuple(values["box"])}
    return CoreConfig(**values)


def load_core(source: str | Path | None = None, device: str | torch.device = "cpu", size: int = 9) -> LoadedCore:
    """Read a core. source: None (the packaged one), a run folder, a checkpoint folder or a model file.

    It computes in the dtype it was trained in, or in float32 where the hardware does not multiply bfloat16.
    Raises UserError for a missing, damaged or foreign file, naming the first tensor that does not fit.
    """
    path = packaged_core(size) if source is None else find_model(source)
    config, meta, tensors = read_header(path)
    if config.dtype == "bfloat16" and pick_dtype("auto", torch.device(device)) != "bfloat16":
        config = replace(config, dtype="float32")  # made on a machine that multiplies bfloat16; this one does not
    core = HRMCore(config)
    _fill(core, {n[5:]: t for n, t in tensors.items() if n.startswith("core.")}, path)
    head_tensors = {n[7:]: t for n, t in tensors.items() if n.startswith("q_head.")}
    q_head = None
    if head_tensors:
        q_head = QHead(config.hidden_size)
        _fill(q_head, head_tensors, path)
        q_head.to(device)
    agent_tensors = {n[6:]: t.to(device) for n, t in tensors.items() if n.startswith("agent.")}
    return LoadedCore(core.to(device), q_head, str(path), meta, agent_tensors)


def _fill(module: nn.Module, tensors: dict[str, Tensor], path: Path) -> None:
    """load_state_dict that names the first difference in one line."""
    own = module.state_dict()
    for name, value in own.items():
        if name not in tensors:
            raise UserError(f"{path}: holds no tensor {name!r}")
        if tensors[name].shape != value.shape:
            raise UserError(
                f"{path}: tensor {name!r} has shape {tuple(tensors[name].shape)}, the model needs {tuple(value.shape)}"
            )
    for name in tensors:
        if name not in own:
            raise UserError(f"{path}: tensor {name!r} has no place in this model")
    module.load_state_dict(tensors)


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
