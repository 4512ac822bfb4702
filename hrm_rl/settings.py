"""Settings by their types: whether a plain value fits, and what to ask for in words where it does not."""

from __future__ import annotations

import types
from collections.abc import Mapping
from dataclasses import fields
from functools import lru_cache
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from hrm_rl.errors import UserError, nearest

_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text", dict: 'a mapping, as {"k": 4}'}
_PLURALS = {int: "whole numbers", float: "numbers", str: "texts"}


@lru_cache
def hints_of(cls: type) -> dict[str, Any]:
    """Field name -> type of a dataclass."""
    resolved = get_type_hints(cls)
    return {field.name: resolved[field.name] for field in fields(cls)}


def is_optional(hint: Any) -> bool:
    """Whether None fits."""
    return get_origin(hint) in (Union, types.UnionType) and type(None) in get_args(hint)


def is_pair(hint: Any) -> bool:
    return get_origin(hint) is tuple and len(get_args(hint)) == 2


def fits(hint: Any, value: Any) -> bool:
    """Whether a plain value (of YAML, JSON or Python) is one of that type."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return any(fits(part, value) for part in inner)
    if origin is Literal:
        return any(type(value) is type(choice) and value == choice for choice in inner)
    if origin is tuple:
        return isinstance(value, (list, tuple)) and len(value) == len(inner) and all(map(fits, inner, value))
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


def in_words(hint: Any) -> str:
    """What to ask for: "a whole number", "joint, supervised or q", "two numbers, as [0.1,0.2]"."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(in_words(part) for part in inner if part is not type(None))
    if origin is Literal:
        *first, last = map(str, inner)
        return f"{', '.join(first)} or {last}" if first else last
    if origin is tuple:
        return f"two {_PLURALS[inner[0]]}, as {'[30,40]' if inner[0] is int else '[0.2,0.5]'}"
    return _WORDS.get(hint, getattr(hint, "__name__", str(hint)))


def check_settings(cls: type, values: Mapping[str, Any], group: str = "") -> None:
    """UserError for the first name that is no field of the dataclass `cls`, or value that is not of its type."""
    hints, prefix = hints_of(cls), f"{group}." if group else ""
    for name, value in values.items():
        if name not in hints:
            raise UserError(f"unknown {group + ' ' if group else ''}setting {name!r}{nearest(str(name), hints)}")
        if not fits(hints[name], value):
            raise UserError(f"{prefix}{name} must be {in_words(hints[name])}, not {shortened(value)}")


def shortened(value: Any, most: int = 60) -> str:
    """repr, cut where it is long."""
    text = repr(value)
    return text if len(text) <= most else text[: most - 3] + "..."
