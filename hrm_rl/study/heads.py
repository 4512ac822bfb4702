"""Q-heads of many learners as one stack: parameters with a leading axis of learners, one batched product for all.

L learners, H heads of each (two for double Q-learning), E rows, D width of the q-token, W of the hidden layer.

- linear: HRM's own (`hrm_rl.core.q_head`): weights 0, bias q_bias. A norm, where one is asked for, is on its input.
- mlp: H separate networks x -> SiLU(norm(x A + a)) B + b with A as `hrm_rl.core.layers.Linear` starts (LeCun, cut
  at two sigmas) and all else as in the linear head, so that both start out with the same values.

Norms have no parameters of their own, as the core's: rmsnorm is x / rms(x), layernorm (x - mean) / std.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from agents.arm import Arm
from hrm_rl.core.layers import rms_norm, trunc_normal_

Parameters = Mapping[str, Tensor]
EPS = 1e-5  # under the root of a norm
TRUNK = ("hidden.weight", "hidden.bias")  # what comes before the last linear layer


def normalised(x: Tensor, norm: str) -> Tensor:
    """(..., D) -> (..., D) by none, rmsnorm or layernorm. Raises ValueError for another name."""
    if norm == "none":
        return x
    if norm == "rmsnorm":
        return rms_norm(x, EPS)
    if norm == "layernorm":
        return F.layer_norm(x, x.shape[-1:], eps=EPS)
    raise ValueError(f"unknown norm {norm!r}; choose none, rmsnorm or layernorm")


@dataclass(frozen=True)
class Heads:
    """What the heads of a stack have in common. Their parameters are handed in, name -> (L, ...)."""

    inputs: int  # D
    hidden: int  # W; 0 for a linear head
    norm: str
    count: int  # H

    @classmethod
    def of(cls, arm: Arm, inputs: int) -> Heads:
        width = arm.head_width if arm.head == "mlp" else 0
        return cls(inputs, width, arm.head_norm, 2 if arm.backup == "double" else 1)

    @property
    def numbers(self) -> int:
        """Parameters of one learner."""
        D, W, H = self.inputs, self.hidden, self.count
        return H * ((D + 1) * W + 2 * W + 2 if W else 2 * D + 2)

    def start(self, seeds: Sequence[int], q_bias: Tensor) -> dict[str, Tensor]:
        """Fresh parameters on the device of q_bias (L,). The hidden layer depends on the seed alone."""
        L, D, W, H, device = len(seeds), self.inputs, self.hidden, self.count, q_bias.device
        bias = q_bias.float()[:, None].repeat(1, 2 * H)
        if not W:
            return {"out.weight": torch.zeros(L, 2 * H, D, device=device), "out.bias": bias}
        drawn: dict[int, Tensor] = {}
        for seed in set(seeds):
            generator = torch.Generator().manual_seed(seed)
            layers = [trunc_normal_(torch.empty(W, D), D**-0.5, generator) for _ in range(H)]
            drawn[seed] = torch.cat(layers)
        return {
            "hidden.weight": torch.stack([drawn[seed] for seed in seeds]).to(device),  # (L, H W, D)
            "hidden.bias": torch.zeros(L, H * W, device=device),
            "out.weight": torch.zeros(L, 2 * H, W, device=device),
            "out.bias": bias,
        }

    def table(self, q_token: Tensor) -> Tensor:
        """What `q_logits` reads, of q-tokens (..., D): for a linear head with a norm, normalised once and for all."""
        return q_token if self.hidden else normalised(q_token, self.norm)

    def features(self, parameters: Parameters, x: Tensor) -> Tensor:
        """x (L, E, D) -> what the last layer reads: (L, E, H W) after the nonlinearity; x where there is none."""
        if not self.hidden:
            return x
        L, E, _ = x.shape
        weight, bias = parameters["hidden.weight"], parameters["hidden.bias"]
        z = torch.baddbmm(bias[:, None], x, weight.transpose(1, 2))
        z = normalised(z.view(L, E, self.count, self.hidden), self.norm)
        return F.silu(z).view(L, E, -1)

    def q_logits(self, parameters: Parameters, x: Tensor) -> Tensor:
        """x (L, E, D), rows of `table` -> (L, E, H, 2) float32, last axis (HALT, CONTINUE)."""
        (L, E, _), H = x.shape, self.count
        z, weight, bias = self.features(parameters, x), parameters["out.weight"], parameters["out.bias"]
        if self.hidden and H > 1:  # each head reads its own features
            z = z.view(L, E, H, -1).transpose(1, 2).reshape(L * H, E, -1)
            weight, bias = weight.view(L * H, 2, -1), bias.view(L * H, 2)
        # the few outputs first: three to five times faster than (E, D) (D, 2), backwards as well (2026-11-22, MKL)
        q = torch.baddbmm(bias[..., None], weight, z.transpose(1, 2))
        return q.view(L, H, 2, E).permute(0, 3, 1, 2)
