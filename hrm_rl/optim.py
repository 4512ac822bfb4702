"""Optimisers of a run: AdamW for everything, Adam-atan2 as released, or Muon for the core's matrices.

Muon (Jordan et al., 2024; torch.optim.Muon, torch >= 2.9) orthogonalises the momentum of hidden matrices; the
embeddings, the output head, biases and the Q-head stay with AdamW, as its authors advise. Its step is scaled
to AdamW's size ("match_rms_adamw", Liu et al., arXiv:2502.16982), so learning rates are of one kind.

Adam-atan2 (Everett et al., arXiv:2407.05872) is what the paper trains with. Its released kernel (the package
adam_atan2) computes, with c1 = 1 - beta1^t and c2 = 1 - beta2^t,

    p <- (1 - lr * weight_decay) p - lr / c1 * atan2(m, sqrt(v / c2))

that is a = b = 1, with the correction of m outside of the arctangent. adam_atan2_pytorch computes a lr * atan2(m / c1,
b sqrt(v / c2)), a = 1.27 unless told otherwise; with a = b = 1 / c1, set anew at every step, that is the kernel's.
(With a = b = 1 throughout its first step would be pi / 4 where the kernel's is 0.997; after fifty steps they agree.)

The puzzle embeddings may have the release's sign-SGD instead (`SignSGD`).

Where the weights end. Decay p <- (1 - lr * lambda) p and a step of at most lr * s leave every |p| at s / lambda at
most, in the long run (`linf_bound`): a bound on the norm of the weights that the optimiser implies, whatever the loss.

    AdamW        s = 1          Xie & Li, arXiv:2404.04454, for beta1 <= beta2 and a run that settles; for any gradients
                                (1 - beta1) / sqrt((1 - beta2) (1 - beta1^2 / beta2)), by Cauchy and Schwarz: 1.17 for
                                the trainer's betas, 7.27 for torch's own
    Adam-atan2   s = pi / 2     the arctangent's range; pi / 4 for a gradient that no longer changes (|m| = sqrt(v))
    sign-SGD     s = 1          exact
    Muon         s = 0.2 * 1.21 * sqrt(max(m, n))    on the largest singular value of an m x n matrix, hence on its
                                entries: the step is the orthogonal factor, scaled to the size of AdamW's; five
                                Newton-Schulz steps leave its singular values below 1.21
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from hrm_rl.config import OptimConfig
from hrm_rl.errors import UserError

_NEWTON_SCHULZ = 1.21  # largest value that Muon's polynomial, iterated five times, takes between 0 and 1


def is_hidden_matrix(name: str, parameter: Tensor) -> bool:
    """Whether Muon takes this parameter: the weight of a linear layer in a network (`recurrent.Level`) of the core."""
    return parameter.ndim == 2 and name.endswith(".weight") and name.startswith("core.") and ".layers." in name


def is_puzzle_embedding(name: str) -> bool:
    """Whether `optim.embedding` decides about this parameter."""
    return name.startswith("core.puzzle_emb.")


class SignSGD(torch.optim.Optimizer):
    """Sign-SGD with decoupled decay for rows of an embedding: p <- (1 - lr * weight_decay) p - lr * sign(gradient).

    Source: CastedSparseEmbeddingSignSGD_Distributed of the released code ("Adam is sign-SGD if the gradient is very
    sparse"). Only rows that a puzzle of the batch used move, decay included, as there; a row is taken to be used where
    its gradient is not 0 throughout, so that (unlike there) a used row without any gradient stands still.
    """

    def __init__(self, params: Sequence[nn.Parameter], lr: float = 1e-4, weight_decay: float = 1.0):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:
        for group in self.param_groups:
            lr, decay = group["lr"], 1 - group["lr"] * group["weight_decay"]
            for p in group["params"]:
                if p.grad is not None:
                    used = (p.grad != 0).any(dim=-1, keepdim=True)
                    p.copy_(torch.where(used, decay * p - lr * p.grad.sign(), p))


def make_optimizers(
    parameters: Mapping[str, nn.Parameter], config: OptimConfig, capturable: bool = False
) -> list[torch.optim.Optimizer]:  # fmt: skip
    """The optimisers that together hold each of `parameters` (name -> parameter) exactly once.

    Every group has a key "peak", its peak learning rate, which the schedule multiplies, and "kind", its name.
    capturable: AdamW on a GPU can be part of a CUDA graph; its learning rates are then tensors.
    Raises UserError where this torch has no Muon, or where adam_atan2_pytorch is missing.
    """
    matrices: dict[str, nn.Parameter] = {}
    embedding: dict[str, nn.Parameter] = {}
    if config.optimizer == "muon":
        if not hasattr(torch.optim, "Muon"):
            raise UserError(f"optim.optimizer=muon needs torch >= 2.9, this is {torch.__version__}; use adamw")
        matrices = {name: p for name, p in parameters.items() if is_hidden_matrix(name, p)}
    if config.embedding == "sign_sgd":
        embedding = {name: p for name, p in parameters.items() if is_puzzle_embedding(name)}
    rest = {name: p for name, p in parameters.items() if name not in matrices and name not in embedding}
    by_atan2: dict[str, nn.Parameter] = {}
    if config.optimizer == "adam_atan2":
        by_atan2 = {name: p for name, p in rest.items() if not is_puzzle_embedding(name)}
        rest = {name: p for name, p in rest.items() if name not in by_atan2}
    found = {
        "adam_atan2": (by_atan2, _adam_atan2), "adamw": (rest, _adamw), "muon": (matrices, _muon),
        "sign_sgd": (embedding, _sign_sgd),
    }  # fmt: skip
    optimizers = []
    for kind, (held, make) in found.items():
        if held:
            optimizer = make(list(held.values()), config)
            for group in optimizer.param_groups:
                group["peak"], group["kind"] = group["lr"], kind
                if capturable and kind == "adamw" and group["params"][0].device.type == "cuda":
                    group["capturable"] = True
                    group["lr"] = torch.tensor(group["lr"], device=group["params"][0].device)
            optimizers.append(optimizer)
    return optimizers


def is_capturable(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a CUDA graph can hold its steps."""
    return all(group.get("capturable", False) for group in optimizer.param_groups)


def _adamw(parameters: list[nn.Parameter], config: OptimConfig) -> torch.optim.Optimizer:
    fused = parameters[0].device.type in ("cpu", "cuda") or None
    return torch.optim.AdamW(
        parameters, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps,
        weight_decay=config.weight_decay, fused=fused,
    )  # fmt: skip


def _muon(parameters: list[nn.Parameter], config: OptimConfig) -> torch.optim.Optimizer:
    return torch.optim.Muon(
        parameters, lr=config.muon_lr, weight_decay=config.weight_decay, momentum=config.muon_momentum,
        adjust_lr_fn="match_rms_adamw",
    )  # fmt: skip


def _sign_sgd(parameters: list[nn.Parameter], config: OptimConfig) -> torch.optim.Optimizer:
    return SignSGD(parameters, config.embedding_lr, config.embedding_weight_decay)


def _adam_atan2(parameters: list[nn.Parameter], config: OptimConfig) -> torch.optim.Optimizer:
    try:
        from adam_atan2_pytorch import AdamAtan2
    except ImportError as error:
        raise UserError(f"optim.optimizer=adam_atan2 needs adam-atan2-pytorch (pip install): {error}") from error
    # A group for each parameter, since a and b follow its own count of steps; the learning rate may be 0 but not here.
    optimizer = AdamAtan2(
        [{"params": [p]} for p in parameters], lr=config.lr or 1.0, betas=(config.beta1, config.beta2),
        weight_decay=config.weight_decay, decoupled_wd=False,
    )  # fmt: skip
    for group in optimizer.param_groups:
        group["lr"] = config.lr
    optimizer.register_step_pre_hook(_as_the_kernel)
    return optimizer


def _as_the_kernel(optimizer: torch.optim.Optimizer, *_) -> None:
    """a = b = 1 / (1 - beta1^t) for the step t to come: the correction of m moves out of the arctangent."""
    for group in optimizer.param_groups:
        (parameter,) = group["params"]
        t = optimizer.state[parameter].get("steps", 0) + 1
        group["a"] = group["b"] = 1 / (1 - group["betas"][0] ** t)


def linf_bound(
    kind: str, weight_decay: float, shape: Sequence[int] = (), steady: bool = False,
    betas: tuple[float, float] | None = None,
) -> float:  # fmt: skip
    """The |weight| that an optimiser cannot keep exceeding (see above); infinite without decay.

    kind: adamw, adam_atan2, sign_sgd or muon, which needs the `shape` (m, n) of its matrix. KeyError for another.
    steady: for a gradient that keeps its sign and size, which is less for Adam-atan2. betas: AdamW's, for the largest
    step that any sequence of gradients makes; None for a run that settles.
    """
    step = {
        "adamw": 1.0 if betas is None else _largest_adam_step(*betas), "sign_sgd": 1.0,
        "adam_atan2": math.pi / 4 if steady else math.pi / 2,
        "muon": 0.2 * _NEWTON_SCHULZ * math.sqrt(max(shape, default=0)),
    }[kind]  # fmt: skip
    return step / weight_decay if weight_decay else math.inf


def _largest_adam_step(beta1: float, beta2: float) -> float:
    """|m| / sqrt(v) at most, for beta1^2 < beta2."""
    return (1 - beta1) / math.sqrt((1 - beta2) * (1 - beta1**2 / beta2))


@torch.no_grad()
def shares_of_bound(optimizers: Sequence[torch.optim.Optimizer]) -> dict[str, float]:
    """Largest |weight| / `linf_bound` of the parameters of each kind of optimiser; waits for the device."""
    shares: dict[str, list[Tensor]] = {}
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        shares.setdefault(group["kind"], []).extend(
            p.abs().max() / linf_bound(group["kind"], group["weight_decay"], p.shape) for p in group["params"]
        )
    return {kind: torch.stack(values).max().item() for kind, values in shares.items()}


def set_learning_rate(optimizers: list[torch.optim.Optimizer], share: float) -> None:
    """Every group's learning rate becomes `share` of its peak."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(share * group["peak"])
            else:
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
    """The inverse of `state_tensors`; a count that was a whole number (Adam-atan2's steps) is one again."""
    entries: list[dict[int, dict[str, Tensor | int]]] = [{} for _ in optimizers]
    for name, value in tensors.items():
        number, index, key = name.split(".")
        counts = value.ndim == 0 and not value.is_floating_point()
        entries[int(number)].setdefault(int(index), {})[key] = value.item() if counts else value
    for optimizer, state in zip(optimizers, entries, strict=True):
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
