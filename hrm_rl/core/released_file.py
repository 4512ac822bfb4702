"""Reads a checkpoint of the released HRM code: a torch.save'd state dict `step_N`, beside an `all_config.yaml`.

On the Hub the two are called `checkpoint` and `all_config.yaml`.

The archive is looked through before torch opens it, and torch loads weights only: nothing in the file is ever run.
Sizes come from the shapes; what shapes do not show (heads, cycles, the budget) from all_config.yaml, or, for the
published size, from the published configuration. How many tokens a puzzle has stands in neither, since the release
reads it from the data set: it follows from the name of that (`data_path: data/maze-30x30-hard-1k`), or from the number
of token values where only one task has so many.
"""

from __future__ import annotations

import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

import torch
from torch import Tensor

from hrm_rl.core.config import DTYPES, CoreConfig
from hrm_rl.core.layers import swiglu_width
from hrm_rl.core.released import from_released
from hrm_rl.errors import UserError
from hrm_rl.settings import fits
from hrm_rl.tasks.geometry import BOXES
from hrm_rl.yaml_files import load_plain

CONFIG_FILE = "all_config.yaml"
CHECKPOINT_FILE = "checkpoint"  # on the Hub
PUBLISHED = {"hidden_size": 512, "num_heads": 8, "H_cycles": 2, "L_cycles": 2, "halt_max_steps": 16}
#: Token values -> tokens of a Sudoku; one of 4x4 has as many values as a maze of any size, so they say nothing of it.
SUDOKUS = {side + 2: side**2 for side in BOXES if side != 4}
_LARGEST_INDEX = 1 << 24  # bytes of data.pkl, which holds names and shapes only
_MOST_MEMBERS = 100_000


def is_released(path: Path) -> bool:
    """Whether the file begins like an archive of torch.save."""
    with open(path, "rb") as file:
        return file.read(4) == b"PK\x03\x04"


def read_released(path: Path) -> tuple[CoreConfig, dict, dict[str, Tensor], dict[str, Tensor]]:
    """(core configuration, meta, core tensors, Q-head tensors). UserError in one line for anything else."""
    _check_archive(path)
    tensors = _load(path)
    try:
        core, q_head = from_released(tensors)
    except KeyError as error:
        raise UserError(f"{path}: {error.args[0]}") from None
    arch, data = _settings(path.parent / CONFIG_FILE)
    return _config(path, core, arch, data), _meta(path, arch), core, q_head


def _check_archive(path: Path) -> None:
    """UserError for an archive that no torch.save has written: paths that lead elsewhere, packed or doubled members."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise UserError(f"{path}: damaged archive ({error})") from None
    names = [member.orig_filename for member in members]
    if len(names) > _MOST_MEMBERS or len(set(names)) != len(names):
        raise UserError(f"{path}: refused: too many members, or one of them twice")
    for name, member in zip(names, members, strict=True):
        parts = PurePosixPath(name.replace("\\", "/")).parts
        if name.startswith(("/", "\\")) or ".." in parts or ":" in name or "\0" in name:
            raise UserError(f"{path}: refused: its member {name!r} leads outside of the archive")
        if member.compress_type != zipfile.ZIP_STORED or member.file_size != member.compress_size:
            raise UserError(f"{path}: refused: its member {name!r} is packed, which torch.save never does")
        if name.endswith("data.pkl") and member.file_size > _LARGEST_INDEX:
            raise UserError(f"{path}: refused: its index {name!r} has {member.file_size} bytes")
    if sum(member.file_size for member in members) > path.stat().st_size:
        raise UserError(f"{path}: refused: its members claim more bytes than the file has")


def _load(path: Path) -> dict[str, Tensor]:
    """The state dict, mapped into memory. No code of the file runs: torch's weights-only reader."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # the reader has no common base for all that can be wrong with a file
        text = str(error)
        asked = re.search(r"(?:GLOBAL|[Cc]lass|function|global:?) `?([\w.]+\.[\w.]+)`?", text)
        if asked or "eights only" in text:
            what = f"it asks for {asked[1]}, and " if asked else ""
            raise UserError(f"{path}: refused: {what}loading a checkpoint runs no code") from None
        raise UserError(f"{path}: not a readable checkpoint ({(text.splitlines() or [''])[0][:160]})") from None
    if not isinstance(loaded, Mapping) or not loaded:
        raise UserError(f"{path}: holds no state dict, but {type(loaded).__name__}")
    for name, value in loaded.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise UserError(f"{path}: {name!r} is no tensor, but {type(value).__name__}")
        plain = value.layout is torch.strided and value.device.type == "cpu"
        if not plain or value.numel() * value.element_size() > value.untyped_storage().nbytes():
            raise UserError(f"{path}: tensor {name!r} does not hold the values that its shape claims")
    return dict(loaded)


def _settings(path: Path) -> tuple[dict, str]:
    """What stands under `arch:` and `data_path:` of all_config.yaml; nothing where no such file lies there."""
    if not path.exists():
        return {}, ""
    values = load_plain(path)
    arch = values.get("arch") if isinstance(values, dict) else None
    if not isinstance(arch, dict):
        raise UserError(f"{path}: holds no 'arch:' with the settings of the model")
    whole = ("hidden_size", "num_heads", "H_cycles", "L_cycles", "H_layers", "L_layers", "puzzle_emb_ndim", "seq_len",
             "vocab_size", "halt_max_steps")  # fmt: skip
    wanted = {name: int for name in whole} | dict.fromkeys(("expansion", "rope_theta", "rms_norm_eps"), float)
    wanted |= {"pos_encodings": str, "forward_dtype": str}
    for name, kind in wanted.items():
        if name in arch and not fits(kind, arch[name]):
            raise UserError(f"{path}: arch.{name} must be {kind.__name__}, not {arch[name]!r}")
    data = values.get("data_path") or ""
    if not fits(str, data):
        raise UserError(f"{path}: data_path must be str, not {data!r}")
    return arch, data


def _tokens(vocab: int, data: str) -> int:
    """Tokens of a puzzle: by the size in the data set's name, else of a Sudoku with so many values; 0: not known."""
    size = re.search(r"(?<!\d)(\d{1,2})x(\d{1,2})(?!\d)", PurePosixPath(data).name)
    if size:
        return int(size[1]) * int(size[2])
    return SUDOKUS.get(vocab, 0)


def _config(path: Path, core: Mapping[str, Tensor], arch: dict, data: str) -> CoreConfig:
    """The configuration that the shapes show, filled up from `arch`; the two must agree."""

    def shape(name: str, axes: int = 2) -> tuple[int, ...]:
        if name not in core:
            raise UserError(f"{path}: holds no tensor {name!r}")
        if core[name].dim() != axes:
            raise UserError(f"{path}: tensor {name!r} has {core[name].dim()} axes, not {axes}")
        return tuple(core[name].shape)

    def layers(level: str) -> int:
        numbers = {match[1] for name in core if (match := re.match(rf"{level}\.layers\.(\d+)\.", name))}
        return len(numbers)

    def asked(name: str) -> int:
        if name in arch:
            return arch[name]
        if hidden == PUBLISHED["hidden_size"]:
            return PUBLISHED[name]
        raise UserError(f"{path}: {name} does not show in the weights; put its {CONFIG_FILE} beside it")

    vocab, hidden = shape("embed_tokens.embedding_weight")
    identifiers, width = shape("puzzle_emb.weights") if "puzzle_emb.weights" in core else (1, 0)
    counts = {name: asked(name) for name in ("num_heads", "H_cycles", "L_cycles")}
    learned = "embed_pos.embedding_weight" in core
    prefix = -(-width // max(hidden, 1))
    if learned:
        tokens = shape("embed_pos.embedding_weight")[0] - prefix
    else:
        tokens = arch.get("seq_len", _tokens(vocab, data))
        if tokens < 1:
            raise UserError(f"{path}: seq_len (tokens of a puzzle) does not show in the weights; add it under arch: of "
                            f"the {CONFIG_FILE} beside it")  # fmt: skip
    inner = shape("L_level.layers.0.mlp.down_proj.weight")[1]
    expansion, multiple = float(arch.get("expansion", CoreConfig.expansion)), 256
    if swiglu_width(hidden, expansion, multiple) != inner:
        expansion, multiple = inner * 1.5 / max(hidden, 1), 1
    dtype = arch.get("forward_dtype", "bfloat16")
    if dtype not in DTYPES:
        raise UserError(f"{path.parent / CONFIG_FILE}: arch.forward_dtype must be one of {', '.join(DTYPES)}")
    found = {
        "vocab_size": vocab, "seq_len": tokens, "hidden_size": hidden, "H_layers": layers("H_level"),
        "L_layers": layers("L_level"), "puzzle_emb_ndim": width,
    }  # fmt: skip
    for name, value in found.items():
        if arch.get(name, value) != value:
            raise UserError(f"{path}: {name} is {value} in the weights and {arch[name]} in {CONFIG_FILE}")
    known = {name: float(arch[name]) for name in ("rope_theta", "rms_norm_eps") if name in arch}
    try:
        return CoreConfig(
            **found, **known, **counts, expansion=expansion, inner_multiple=multiple,
            positions="learned" if learned else "rope", num_puzzle_identifiers=identifiers, dtype=dtype,
        )  # fmt: skip
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None


def _meta(path: Path, arch: dict) -> dict:
    """What our own files note beside a model: the budget it was trained with, and the release's bootstrap."""
    steps = arch.get("halt_max_steps", PUBLISHED["halt_max_steps"])
    if not 1 <= steps <= 1 << 20:
        raise UserError(f"{path.parent / CONFIG_FILE}: arch.halt_max_steps must be at least 1, not {steps}")
    return {"max_steps": steps, "bootstrap": "extra_forward", "released": path.name}
