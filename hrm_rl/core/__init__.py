"""Recurrent cores: modules that map (tokens, state) to (state, logits)."""

from hrm_rl.core.base import Core, CoreOutput, State
from hrm_rl.core.config import CoreConfig
from hrm_rl.core.hrm import HRMCore
from hrm_rl.core.recurrent import Inputs, Level, RecurrentCore
from hrm_rl.core.registry import CORES, build_core, find_core, known_core

__all__ = [
    "CORES", "Core", "CoreConfig", "CoreOutput", "HRMCore", "Inputs", "Level", "RecurrentCore", "State", "build_core",
    "find_core", "known_core",
]  # fmt: skip
