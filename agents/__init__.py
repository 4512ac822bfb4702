"""Halting agents: small plug-ins that say HALT or CONTINUE after each segment (docs/PLUGINS.md)."""

from agents.base import SEES, AgentLoss, HaltingAgent, Transition, View, view_of
from agents.checks import decide, raise_fault
from agents.fixed import FixedAgent
from agents.memory import Memory
from agents.q_halting import QHaltingAgent
from agents.registry import AGENTS, agent_names, find_agent, make_agent
from agents.rule import SignalAgent
from agents.signals import SIGNALS, Signal

__all__ = [
    "AGENTS", "SEES", "SIGNALS", "AgentLoss", "FixedAgent", "HaltingAgent", "Memory", "QHaltingAgent", "Signal",
    "SignalAgent", "Transition", "View", "agent_names", "decide", "find_agent", "make_agent", "raise_fault", "view_of",
]  # fmt: skip
