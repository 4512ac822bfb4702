"""Agents by name: short ones that ship, and any class by its import path."""

from __future__ import annotations

import importlib
import inspect

from torch import nn

from agents.base import HaltingAgent
from agents.fixed import FixedAgent
from agents.q_halting import QHaltingAgent
from hrm_rl.errors import UserError, nearest

#: Agents by the short names of the command line.
AGENTS: dict[str, type[HaltingAgent]] = {"q": QHaltingAgent, "fixed": FixedAgent}


def find_agent(name: str) -> type[HaltingAgent]:
    """The class behind a short name or an import path (my_package.my_file.MyAgent); UserError otherwise."""
    if name in AGENTS:
        return AGENTS[name]
    module, _, attribute = name.rpartition(".")
    if not module:
        known = ", ".join(AGENTS)
        raise UserError(f"agent {name!r} is unknown; choose one of {known} or an import path{nearest(name, AGENTS)}")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, SyntaxError) as error:
        raise UserError(f"agent {name!r} cannot be imported ({error})") from error
    if not (isinstance(found, type) and issubclass(found, HaltingAgent)):
        raise UserError(f"agent {name!r} is not a subclass of agents.HaltingAgent")
    return found


def make_agent(
    agent_class: type[HaltingAgent], core: nn.Module, max_steps: int, bootstrap: str, arguments: dict | None = None
) -> HaltingAgent:
    """Build an agent: it gets those of core, max_steps and bootstrap that its constructor names, and `arguments`.

    Raises UserError for an argument that the constructor does not take or one that it needs and is not given.
    """
    offered = {"core": core, "max_steps": max_steps, "bootstrap": bootstrap}
    signature = inspect.signature(agent_class)
    given = {name: value for name, value in offered.items() if name in signature.parameters} | (arguments or {})
    try:
        signature.bind(**given)
    except TypeError as error:
        takes = ", ".join(name for name in signature.parameters if name not in offered) or "none"
        raise UserError(f"agent_args of {agent_class.__name__}: {error} (it takes: {takes})") from error
    try:
        return agent_class(**given)
    except TypeError as error:
        raise UserError(f"agent_args of {agent_class.__name__}: {error}") from error
