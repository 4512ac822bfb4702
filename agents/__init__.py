"""Halting agents: small plug-ins that say HALT or CONTINUE after each segment."""

from agents.base import HaltingAgent, Transition, View
from agents.fixed import FixedAgent
from agents.q_halting import QHaltingAgent
from agents.registry import AGENTS, find_agent, make_agent

__all__ = ["AGENTS", "FixedAgent", "HaltingAgent", "QHaltingAgent", "Transition", "View", "find_agent", "make_agent"]
