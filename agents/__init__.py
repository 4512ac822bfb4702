"""Halting agents: small plug-ins that say HALT or CONTINUE after each segment."""

from agents.base import HaltingAgent, Transition, View
from agents.fixed import FixedAgent
from agents.q_halting import QHaltingAgent

#: Agents by the short names of the command line.
AGENTS = {"q": QHaltingAgent, "fixed": FixedAgent}

__all__ = ["AGENTS", "FixedAgent", "HaltingAgent", "QHaltingAgent", "Transition", "View"]
