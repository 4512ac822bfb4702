"""Halt where the state has stopped turning: cosine between z_m and z_{m-1}.

Source: hidden-state saturation of CALM, arXiv:2207.07061.
"""

from __future__ import annotations

from agents.rule import SignalAgent


class CosineAgent(SignalAgent):
    """Halts where the cosine between two successive z_H is at least `tau`."""

    signal = "cosine"
    tau = 0.998
