"""Halt where the answer's distribution has stopped changing: KL(p_m || p_{m-1}), mean over the free cells.

Source: the exit rule of recurrent-depth transformers, arXiv:2502.05171. At step 1 p_0 is the uniform distribution.
"""

from __future__ import annotations

from agents.rule import SignalAgent


class KLAgent(SignalAgent):
    """Halts where the mean KL divergence from the answer before is at most `tau` nats."""

    signal = "kl"
    tau = 0.003
