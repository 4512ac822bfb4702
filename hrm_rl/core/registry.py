"""Cores by name: `core.kind` of a configuration, a short name or an import path.

A subclass of `RecurrentCore` is known by its kind as soon as it is defined. A configuration (a flag, a YAML file,
Python) may name one that is yet to be imported; a model file may not, since no file of weights decides what code runs.
"""

from __future__ import annotations

import importlib
from importlib import metadata

import torch

from hrm_rl.core.config import CoreConfig
from hrm_rl.core.direct_transformer import DirectTransformerCore
from hrm_rl.core.gated_hrm import GatedHRMCore
from hrm_rl.core.hrm import HRMCore
from hrm_rl.core.recurrent import RecurrentCore
from hrm_rl.core.recurrent_transformer import RecurrentTransformerCore
from hrm_rl.core.trm import TRMCore
from hrm_rl.errors import UserError, near_class, nearest
from hrm_rl.settings import shortened

#: Short name -> class of the cores that ship.
CORES: dict[str, type[RecurrentCore]] = {
    core.kind: core for core in (HRMCore, RecurrentTransformerCore, DirectTransformerCore, TRMCore, GatedHRMCore)
}

#: Entry points of installed packages: [project.entry-points."hrm_rl.cores"] kind = "module:Class".
GROUP = "hrm_rl.cores"


def known_core(kind: str) -> type[RecurrentCore] | None:
    """The class of that kind that ships, is defined in this process or belongs to an installed package, else None."""
    if kind in CORES:
        return CORES[kind]
    if kind in RecurrentCore.defined:
        return RecurrentCore.defined[kind]
    points = [p for p in metadata.entry_points(group=GROUP) if kind in (p.name, p.value.replace(":", "."))]
    return _checked(kind, points[0].load) if points else None


def find_core(kind: str) -> type[RecurrentCore]:
    """The class behind a short name or an import path (my_package.my_file.MyCore). UserError where there is none."""
    known = known_core(kind)
    if known is not None:
        return known
    module, _, name = kind.rpartition(".")
    if not module:
        raise UserError(f"core.kind must be one of {', '.join(CORES)} or an import path, not {shortened(kind)}"
                        f"{nearest(kind, CORES)}")  # fmt: skip
    return _checked(kind, lambda: getattr(importlib.import_module(module), name))


def build_core(config: CoreConfig, generator: torch.Generator | None = None) -> RecurrentCore:
    """The core that `config.kind` names, with fresh weights."""
    return find_core(config.kind)(config, generator)


def _checked(kind: str, load) -> type[RecurrentCore]:
    try:
        found = load()
    except Exception as error:  # whatever a user's file does wrong
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        hint = near_class(error, kind.rpartition(".")[2], _is_core)
        raise UserError(f"core.kind: {shortened(kind)} cannot be imported ({reason}){hint}") from error
    if not (isinstance(found, type) and _is_core(found)):
        raise UserError(f"core.kind: {shortened(kind)} is no subclass of hrm_rl.core.RecurrentCore")
    return found


def _is_core(found: type) -> bool:
    return issubclass(found, RecurrentCore) and found is not RecurrentCore
