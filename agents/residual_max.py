"""Halt where no feature of the state moves any more: max|z_m - z_{m-1}| / (max|z_m| + 1e-8).

Source: the fixed-point halting of FPRM, arXiv:2606.18206 (the definition by way of a re-implementation).
"""

from __future__ import annotations

from agents.rule import SignalAgent


class ResidualMaxAgent(SignalAgent):
    """Halts where the relative L-infinity step of z_H is at most `tau`."""

    signal = "residual_max"
    tau = 0.07
