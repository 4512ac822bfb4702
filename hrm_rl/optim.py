"""Optimisers of a run: AdamW for everything (the paper), or Muon for the matrices of the core's networks.

Muon (Jordan et al., 2024; torch.optim.Muon, torch >= 2.9) orthogonalises the momentum of hidden matrices; the
embeddings, the output head, biases and the Q-head stay with AdamW, as its authors advise. Its step is scaled
to AdamW's size ("match_rms_adamw", Liu et al., arXiv:2502.16982), so learning rates are of one kind.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from hrm_rl.config import OptimConfig
from hrm_rl.errors import UserError


def is_hidden_matrix(name: str, parameter: Tensor) -> bool:
    """Whether Muon takes this parameter: the weight of a linear layer in a network (`recurrent.Level`) of the core."""
    return parameter.ndim == 2 and name.endswith(".weight") and name.startswith("core.") and ".layers." in name


def make_optimizers(parameters: Mapping[str, nn.Parameter], config: OptimConfig) -> list[torch.optim.Optimizer]:
    """One or two optimisers that hold each of `parameters` (name -> parameter) exactly once.

    Every group has a key "peak", its peak learning rate, which the schedule multiplies.
    Raises UserError where this torch has no Muon.
    """
    matrices: list[nn.Parameter] = []
    rest = list(parameters.values())
    if config.optimizer == "muon":
        if not hasattr(torch.optim, "Muon"):
            raise UserError(f"optim.optimizer=muon needs torch >= 2.9, this is {torch.__version__}; use adamw")
        matrices = [p for name, p in parameters.items() if is_hidden_matrix(name, p)]
        rest = [p for name, p in parameters.items() if not is_hidden_matrix(name, p)]
    optimizers: list[torch.optim.Optimizer] = []
    if rest:
        fused = rest[0].device.type in ("cpu", "cuda") or None
        optimizers.append(
            torch.optim.AdamW(
                rest, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps,
                weight_decay=config.weight_decay, fused=fused,
            )
        )  # fmt: skip
    if matrices:
        optimizers.append(
            torch.optim.Muon(
                matrices, lr=config.muon_lr, weight_decay=config.weight_decay, momentum=config.muon_momentum,
                adjust_lr_fn="match_rms_adamw",
            )
        )  # fmt: skip
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return optimizers


def set_learning_rate(optimizers: list[torch.optim.Optimizer], share: float) -> None:
    """Every group's learning rate becomes `share` of its peak."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = share * group["peak"]


def state_tensors(optimizers: list[torch.optim.Optimizer]) -> dict[str, Tensor]:
    """The optimisers' moments by flat names, NUMBER.PARAMETER.KEY."""
    return {
        f"{number}.{index}.{key}": torch.as_tensor(value)
        for number, optimizer in enumerate(optimizers)
        for index, entry in optimizer.state_dict()["state"].items()
        for key, value in entry.items()
    }


def load_state_tensors(optimizers: list[torch.optim.Optimizer], tensors: Mapping[str, Tensor]) -> None:
    """The inverse of `state_tensors`."""
    entries: list[dict[int, dict[str, Tensor]]] = [{} for _ in optimizers]
    for name, value in tensors.items():
        number, index, key = name.split(".")
        entries[int(number)].setdefault(int(index), {})[key] = value
    for optimizer, state in zip(optimizers, entries, strict=True):
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
