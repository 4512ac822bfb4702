"""Halt where the best value of a cell is far ahead of the second best, on average over the free cells.

Source: the softmax response of CALM, arXiv:2207.07061.
"""

from __future__ import annotations

from agents.rule import SignalAgent


class MarginAgent(SignalAgent):
    """Halts where the mean of top-1 minus top-2 probability over the free cells is at least `tau`."""

    signal = "margin"
    tau = 0.96
