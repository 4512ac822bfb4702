"""Halt where the steps of the state have become even: change of the relative step size from segment to segment.

Source: the second-order exit of arXiv:2509.23314 (read in the abstract only: the scalar form here is ours). With
s_m = |z_m - z_{m-1}| / |z_m| and s_0 = 0 the signal is |s_m - s_{m-1}|.
"""

from __future__ import annotations

from agents.rule import SignalAgent


class SecondOrderAgent(SignalAgent):
    """Halts where the relative step size of z_H changes by at most `tau` in a segment."""

    signal = "second_order"
    tau = 0.005
