"""Halt where the state has stopped moving: |z_m - z_{m-1}| / |z_m|, L2 over a puzzle.

Source: the stopping rule of deep equilibrium models (arXiv:1909.01377).
"""

from __future__ import annotations

from agents.rule import SignalAgent


class ResidualAgent(SignalAgent):
    """Halts where the relative L2 step of z_H is at most `tau`."""

    signal = "residual"
    tau = 0.05
