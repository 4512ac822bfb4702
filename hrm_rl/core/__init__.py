"""Recurrent cores: modules that map (tokens, state) to (state, logits)."""

from hrm_rl.core.base import Core, CoreOutput, State
from hrm_rl.core.hrm import CoreConfig, HRMCore

__all__ = ["Core", "CoreConfig", "CoreOutput", "HRMCore", "State"]
