"""Agents by name: short ones that ship, those of installed packages, and any class by its import path."""

from __future__ import annotations

import importlib
import inspect
from importlib import metadata

from torch import nn

from agents.advantage import AdvantageAgent
from agents.arguments import check_arguments
from agents.base import HaltingAgent, check_sees
from agents.confidence import ConfidenceAgent, ConfidenceMinAgent
from agents.cosine import CosineAgent
from agents.entropy import EntropyAgent
from agents.fixed import FixedAgent
from agents.graves import GravesAgent
from agents.halt_bce import HaltBCEAgent
from agents.kl import KLAgent
from agents.lambda_return import LambdaAgent
from agents.margin import MarginAgent
from agents.monte_carlo import MonteCarloAgent
from agents.oracle import OracleAgent
from agents.ponder import PonderAgent
from agents.q_halting import QHaltingAgent
from agents.q_variant import QVariantAgent
from agents.random_stop import RandomAgent
from agents.reinforce import ReinforceAgent
from agents.residual import ResidualAgent
from agents.residual_max import ResidualMaxAgent
from agents.sarsa import SarsaAgent
from agents.sb3 import A2CAgent, DQNAgent, PPOAgent
from agents.second_order import SecondOrderAgent
from agents.stability import StabilityAgent
from agents.trm import TRMAgent
from hrm_rl.errors import UserError, near_class, nearest

#: Agents by the short names of the command line.
AGENTS: dict[str, type[HaltingAgent]] = {
    "q": QHaltingAgent, "trm": TRMAgent, "advantage": AdvantageAgent,
    "fixed": FixedAgent, "random": RandomAgent, "oracle": OracleAgent,
    "confidence": ConfidenceAgent, "confidence_min": ConfidenceMinAgent, "entropy": EntropyAgent,
    "margin": MarginAgent, "stability": StabilityAgent, "residual": ResidualAgent, "residual_max": ResidualMaxAgent,
    "cosine": CosineAgent, "kl": KLAgent, "second_order": SecondOrderAgent,
    "mc": MonteCarloAgent, "lambda": LambdaAgent, "sarsa": SarsaAgent, "q_variant": QVariantAgent,
    "bce": HaltBCEAgent, "act": GravesAgent, "ponder": PonderAgent, "reinforce": ReinforceAgent,
    "sb3.DQN": DQNAgent, "sb3.PPO": PPOAgent, "sb3.A2C": A2CAgent,
}  # fmt: skip

#: Entry points of installed packages: [project.entry-points."hrm_rl.agents"] short_name = "module:Class".
GROUP = "hrm_rl.agents"


def agent_names() -> list[str]:
    """Every short name there is: those that ship, then those of installed packages."""
    return [*AGENTS, *sorted({point.name for point in metadata.entry_points(group=GROUP)} - set(AGENTS))]


def agent_name(agent_class: type[HaltingAgent]) -> str:
    """A class's short name (shipped, or of an installed package), else its import path: `find_agent` takes either."""
    module, name = agent_class.__module__, agent_class.__qualname__
    short = [short for short, held in AGENTS.items() if held is agent_class]
    short += [point.name for point in metadata.entry_points(group=GROUP) if point.value == f"{module}:{name}"]
    return short[0] if short else f"{module}.{name}"


def find_agent(name: str) -> type[HaltingAgent]:
    """The class behind a short name or an import path (my_package.my_file.MyAgent); UserError otherwise."""
    if name in AGENTS:
        return AGENTS[name]
    points = [point for point in metadata.entry_points(group=GROUP) if point.name == name]
    if points:
        return _checked(name, lambda: points[0].load(), f" (entry point {points[0].value})")
    module, _, attribute = name.rpartition(".")
    if module in ("", "sb3"):
        known = agent_names()
        raise UserError(f"agent {name!r} is unknown{nearest(name, known)} (one of {', '.join(known)}, or an import "
                        "path as in my_package.my_file.MyAgent)")  # fmt: skip
    return _checked(name, lambda: getattr(importlib.import_module(module), attribute), "")


def _checked(name: str, load, origin: str) -> type[HaltingAgent]:
    """What `load` returns, if it is an agent; an error in the user's file is told with its place."""
    try:
        found = load()
    except AttributeError as error:
        hint = near_class(error, name.rpartition(".")[2], lambda there: issubclass(there, HaltingAgent))
        raise UserError(f"agent {name!r}{origin} cannot be imported ({error}){hint}") from error
    except SyntaxError as error:
        raise UserError(f"agent {name!r}{origin} cannot be imported ({error})") from error
    except Exception as error:  # a user's module may fail in any way
        raise UserError(f"agent {name!r}{origin} cannot be imported ({type(error).__name__}: {error})") from error
    if not (isinstance(found, type) and issubclass(found, HaltingAgent)):
        raise UserError(f"agent {name!r}{origin} is not a subclass of agents.HaltingAgent")
    check_sees(found)
    return found


def make_agent(
    agent_class: type[HaltingAgent], core: nn.Module, max_steps: int, bootstrap: str, arguments: dict | None = None
) -> HaltingAgent:
    """Build an agent: it gets those of core, max_steps and bootstrap that its constructor names, and `arguments`.

    Raises UserError for an argument that the constructor does not take, one of another type than it is annotated
    with, or one that it needs and is not given.
    """
    check_sees(agent_class)
    offered = {"core": core, "max_steps": max_steps, "bootstrap": bootstrap}
    signature = inspect.signature(agent_class)
    given = {name: value for name, value in offered.items() if name in signature.parameters}
    given |= check_arguments(agent_class, arguments or {})
    try:
        signature.bind(**given)
    except TypeError as error:
        raise UserError(f"agent_args of {agent_class.__name__}: {error}") from error
    try:
        agent = agent_class(**given)
    except TypeError as error:
        raise UserError(f"agent_args of {agent_class.__name__}: {error}") from error
    if "_modules" not in vars(agent):
        raise UserError(f"agent {agent_class.__name__}: its __init__ does not call super().__init__()")
    return agent
