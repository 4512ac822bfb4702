"""Cores by name: `core.kind` of a configuration, a short name or an import path."""

from __future__ import annotations

import importlib

import torch

from hrm_rl.core.config import CoreConfig
from hrm_rl.core.hrm import HRMCore
from hrm_rl.core.recurrent import RecurrentCore
from hrm_rl.errors import UserError, nearest

#: Short name -> class. A new core is a line here or, from outside, an import path.
CORES: dict[str, type[RecurrentCore]] = {"hrm": HRMCore}


def find_core(kind: str) -> type[RecurrentCore]:
    """The class behind a short name or an import path (my_package.my_file.MyCore). UserError where there is none."""
    if kind in CORES:
        return CORES[kind]
    module, _, name = kind.rpartition(".")
    if not module:
        raise UserError(f"core.kind must be one of {', '.join(CORES)} or an import path, not {kind!r}"
                        f"{nearest(kind, CORES)}")  # fmt: skip
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"core.kind: {kind!r} cannot be imported ({error})") from error
    if not (isinstance(found, type) and issubclass(found, RecurrentCore)):
        raise UserError(f"core.kind: {kind!r} is no subclass of hrm_rl.core.RecurrentCore")
    return found


def build_core(config: CoreConfig, generator: torch.Generator | None = None) -> RecurrentCore:
    """The core that `config.kind` names, with fresh weights."""
    return find_core(config.kind)(config, generator)
