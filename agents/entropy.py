"""Halt where the free cells are certain on average: mean entropy of their softmax, in nats.

Source: the exit rule of BranchyNet, arXiv:1709.01686.
"""

from __future__ import annotations

from agents.rule import SignalAgent


class EntropyAgent(SignalAgent):
    """Halts where the mean entropy of the free cells is at most `tau` nats."""

    signal = "entropy"
    tau = 0.06
