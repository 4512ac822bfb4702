"""YAML from elsewhere: plain values only, never an object, never a file that keeps us waiting or fills the memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from hrm_rl.errors import UserError

_LARGEST_FILE = 1 << 20  # bytes
_MOST_NODES = 10_000  # values, counted where they are used (an anchor can stand for many)


def load_plain(path: str | Path) -> Any:
    """The plain values of a YAML file; UserError names file and line."""
    root = compose(path)
    return None if root is None else construct(path, root)


def construct(path: str | Path, node: yaml.Node) -> Any:
    """The plain values of one node of `compose`."""
    try:
        return yaml.SafeLoader("").construct_document(node)
    except (yaml.YAMLError, ValueError, OverflowError, TypeError, KeyError, AttributeError) as error:
        place = f"{path}:{node.start_mark.line + 1}"
        reason = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise UserError(f"{place}: not plain values ({reason})") from None


def read_text(path: str | Path) -> str:
    """A file of settings as text. UserError for what is missing, no regular file, too large or not UTF-8."""
    path = Path(path)
    try:
        if not path.is_file():  # a pipe or a device could keep us waiting for ever
            reason = "is a folder, not a file" if path.is_dir() else "not a regular file"
            raise UserError(f"{path}: {reason if path.exists() else 'no such file'}")
        if path.stat().st_size > _LARGEST_FILE:
            raise UserError(f"{path}: larger than any file of settings (1 MiB)")
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise UserError(f"{path}:{line}: not UTF-8 text") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from None


def compose(path: str | Path) -> yaml.Node | None:
    """The file as a tree of YAML nodes, nothing constructed. UserError for anything but plain values."""
    text = read_text(path)
    try:
        root = yaml.compose(text, yaml.SafeLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = mark.line + 1 if mark else text[: getattr(error, "position", 0)].count("\n") + 1
        reason = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise UserError(f"{path}:{line}: not YAML ({reason})") from None
    except (RecursionError, ValueError):
        raise UserError(f"{path}: not YAML that holds settings (nested too deeply)") from None
    left, ahead = _MOST_NODES, [root] if root is not None else []
    while ahead:
        node, left = ahead.pop(), left - 1
        if left < 0:
            raise UserError(f"{path}: holds too many values for a file of settings")
        kind, _, tag = node.tag.rpartition(":")
        if kind != "tag:yaml.org,2002" or tag in ("binary", "set", "omap", "pairs"):
            shown = node.tag.replace("tag:yaml.org,2002:", "!!")
            raise UserError(f"{path}:{node.start_mark.line + 1}: tag {shown!r} is refused: settings are plain values")
        if isinstance(node, yaml.MappingNode):
            ahead += [part for pair in node.value for part in pair]
        elif isinstance(node, yaml.SequenceNode):
            ahead += node.value
    return root
