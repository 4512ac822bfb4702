"""Models on disk: safetensors with the configuration in the header, never code.

One file holds a core (`core.*`), optionally a Q-head (`q_head.*`) and other weights of an agent (`agent.*`),
and in its metadata the format, the core's configuration and what the model was trained with. Names map one to
one to the released checkpoints (`core/released.py`).
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field, replace
from importlib import resources
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from hrm_rl.core.config import CoreConfig
from hrm_rl.core.q_head import QHead
from hrm_rl.core.recurrent import RecurrentCore
from hrm_rl.core.registry import build_core, find_core, known_core
from hrm_rl.core.released_file import CHECKPOINT_FILE, CONFIG_FILE, is_released, read_released
from hrm_rl.devices import pick_dtype
from hrm_rl.errors import UserError
from hrm_rl.hub import fetch, on_hub
from hrm_rl.settings import check_settings, fits, shortened

FORMAT = "hrm_rl.model.v1"
MODEL_FILE = "model.safetensors"
_LARGEST_HEADER = 1 << 24  # bytes; a thousand tensors need less than a hundredth of it


@dataclass(frozen=True)
class LoadedCore:
    """A core read from disk. `q_head` is None where the file holds none; `meta` is what its writer noted.

    agent_tensors: what the file holds of an agent's own weights beside a Q-head, by their names in the agent.
    """

    core: RecurrentCore
    q_head: QHead | None
    source: str
    meta: dict = field(default_factory=dict)
    agent_tensors: dict[str, Tensor] = field(default_factory=dict)


def packaged_core(size: int = 9, task: str = "sudoku") -> Path:
    """Path of the small trained core that ships with the package. UserError if none ships for `size`."""
    path = Path(str(resources.files("hrm_rl") / "assets" / f"{task}-{size}.safetensors"))
    if not path.is_file():
        what = f"size {size}" if task == "sudoku" else f"{task} of size {size}"
        raise UserError(f"no trained core ships for {what}; name one (a run folder or a model file)")
    return path


def find_model(source: str | Path) -> Path:
    """The model file behind a path: the file itself, a checkpoint folder, or a run's newest checkpoint.

    hf://owner/name is a repository of the Hub with the release's two files, which are fetched; UserError if not.
    """
    if hub := on_hub(source):
        fetch(hub, CONFIG_FILE, "model")  # which lies beside the other one in the client's cache
        return fetch(hub, CHECKPOINT_FILE, "model")
    path = Path(source)
    try:
        if path.is_file():
            return path
        if not path.exists():
            raise UserError(f"{path}: no such file or folder")
        if not path.is_dir():  # a pipe or a device could keep us waiting for ever
            raise UserError(f"{path}: neither a regular file nor a folder")
        if (path / MODEL_FILE).exists():
            return _regular(path / MODEL_FILE)
        saved = sorted((path / "checkpoints").glob(f"step-*/{MODEL_FILE}"))
    except (OSError, ValueError) as error:  # no permission, a name too long or with a NUL
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from None
    if not saved:
        raise UserError(f"{path}: holds no {MODEL_FILE} and no checkpoints/step-*/{MODEL_FILE}")
    return _regular(saved[-1])


def _regular(path: Path) -> Path:
    """The path itself; UserError for a folder, a pipe, a device or a link that leads nowhere."""
    if not path.is_file():
        raise UserError(f"{path}: not a regular file")
    return path


def model_bytes(
    core: RecurrentCore, q_head: nn.Module | None, meta: dict | None = None, agent: nn.Module | None = None
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
    _check_size(path)
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
        if not isinstance(meta, dict):
            raise ValueError("meta is no mapping")
        if not fits(int, meta.get("max_steps", 1)) or not 1 <= meta.get("max_steps", 1) <= 1 << 20:
            raise ValueError(f"max_steps is {meta['max_steps']!r}")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: its header holds no valid core configuration ({_first_line(error)})") from error
    return config, meta, tensors


def _check_size(path: Path) -> None:
    """UserError for a header that is larger than any model's, or than the file, before anything is read."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        first = file.read(9)
    claimed = int.from_bytes(first[:8], "little")
    if len(first) < 9 or first[8:] != b"{":
        raise UserError(f"{path}: not a readable safetensors file (nor a checkpoint of the released HRM)")
    if claimed > min(_LARGEST_HEADER, size - 8):
        raise UserError(f"{path}: not a readable safetensors file (its header claims {claimed} bytes)")


def _check_digest(path: Path) -> None:
    """Where a checkpoint's state.json lies beside the file, its SHA-256 must be the one noted there."""
    note = path.parent / "state.json"
    if path.name != MODEL_FILE or not (note.exists() or note.is_symlink()):
        return
    try:
        noted = json.loads(_regular(note).read_bytes())["sha256"][path.name]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{note}: not readable as part of a checkpoint ({_first_line(error)})") from error
    if hashlib.sha256(path.read_bytes()).hexdigest() != noted:
        raise UserError(f"{path}: damaged (its SHA-256 is not the one noted when it was written)")


def core_config(values: dict) -> CoreConfig:
    """CoreConfig from plain values. Unknown keys are errors that name the nearest field."""
    check_settings(CoreConfig, values, "core")
    if "box" in values:
        values = values | {"box": tuple(values["box"])}
    return CoreConfig(**values)


def load_core(
    source: str | Path | None = None, device: str | torch.device = "cpu", size: int = 9, task: str = "sudoku",
    kind: str = "",
) -> LoadedCore:  # fmt: skip
    """Read a core. source: None (the packaged one), a run folder, a checkpoint folder, a model file, or a
    checkpoint of the released HRM (`core/released_file.py`), on this machine or as hf://owner/name on the Hub.

    kind: what the core must be, a short name or an import path (which is imported); empty takes what the file holds.
    It computes in the dtype it was trained in, or in float32 where the hardware does not multiply bfloat16.
    Raises UserError for a missing, damaged or foreign file, naming the first tensor that does not fit, and for a core
    of a kind that is unknown here: a class of the user's own must be named or have been imported before.
    """
    wanted = find_core(kind) if kind else None
    path = packaged_core(size, task) if source is None else find_model(source)
    try:
        if is_released(path):
            (config, meta, core_tensors, head_tensors), agent_tensors = read_released(path), {}
        else:
            config, meta, tensors = read_header(path)
            core_tensors = {n[5:]: t for n, t in tensors.items() if n.startswith("core.")}
            head_tensors = {n[7:]: t for n, t in tensors.items() if n.startswith("q_head.")}
            agent_tensors = {n[6:]: t.to(device) for n, t in tensors.items() if n.startswith("agent.")}
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error
    if config.dtype == "bfloat16" and pick_dtype("auto", torch.device(device)) != "bfloat16":
        config = replace(config, dtype="float32")  # made on a machine that multiplies bfloat16; this one does not
    found = known_core(config.kind)
    if found is None:
        raise UserError(f"{path}: its core is of kind {shortened(config.kind)}, and no model file makes us import code:"
                        " name it (--core-kind, in training --core.kind), import it first or install it with an entry "
                        "point")  # fmt: skip
    if wanted not in (None, found):
        raise UserError(f"{path}: its core is of kind {shortened(config.kind)}, not {shortened(kind)}, which was asked "
                        "for")  # fmt: skip
    if max(config.H_layers, config.L_layers) > len(core_tensors):
        raise UserError(f"{path}: its header claims more layers than it holds tensors")
    with torch.device("meta"):  # shapes alone: a file cannot make us ask for more memory than it has itself
        _compare(build_core(config), core_tensors, path)
    core = build_core(config)
    core.load_state_dict(core_tensors)
    q_head = None
    if head_tensors:
        q_head = QHead(config.hidden_size)
        _compare(q_head, head_tensors, path)
        q_head.load_state_dict(head_tensors)
        q_head.to(device)
    return LoadedCore(core.to(device), q_head, str(path), meta, agent_tensors)


def _compare(module: nn.Module, tensors: dict[str, Tensor], path: Path) -> None:
    """UserError that names the first tensor in which the file and the model differ, both shapes included."""
    own = module.state_dict()
    for name, value in own.items():
        if name not in tensors:
            raise UserError(f"{path}: holds no tensor {name!r}")
        if tensors[name].shape != value.shape:
            raise UserError(
                f"{path}: tensor {name!r} has shape {tuple(tensors[name].shape)}, the model needs {tuple(value.shape)}"
            )
        if not tensors[name].is_floating_point():
            raise UserError(f"{path}: tensor {name!r} holds {tensors[name].dtype}, the model needs {value.dtype}")
        if not tensors[name].isfinite().all():
            raise UserError(f"{path}: tensor {name!r} holds values that are not finite")
    for name in tensors:
        if name not in own:
            raise UserError(f"{path}: tensor {name!r} has no place in this model")


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
