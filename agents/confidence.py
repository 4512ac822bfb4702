"""Halt where the answer is certain: softmax probability of the best value, over the cells the puzzle leaves blank.

Source: the exit rules of BranchyNet (arXiv:1709.01686) and CALM (arXiv:2207.07061). The mean forgives one
uncertain cell, the minimum does not: a puzzle is right only if all cells are.
"""

from __future__ import annotations

from agents.rule import SignalAgent


class ConfidenceAgent(SignalAgent):
    """Halts where the mean confidence of the free cells is at least `tau`."""

    signal = "confidence"
    tau = 0.98


class ConfidenceMinAgent(SignalAgent):
    """Halts where the least certain free cell has a probability of at least `tau`."""

    signal = "confidence_min"
    tau = 0.75
