"""Products of a core's layers with weights in oneDNN's own layout, for training in float32 on a CPU.

There such a product is 8 to 20 % faster than `torch.mm`, and packing a weight takes a small part of one product: it
pays for a weight that is used several times between two steps of the optimiser, as those of a segment are
(docs/PERFORMANCE.md).

`prepare` has the layers of a core call an operator of their own, `hrm_rl::linear`, which is an ordinary product but
inside of `kept`: there it packs a weight at its first use and keeps it until the block ends. Whoever changes weights
inside the block has to call `forget`; nothing is remembered outside of it, where anyone may change them.
"""

from __future__ import annotations

import contextlib
import platform
from collections.abc import Iterator
from contextvars import ContextVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Below, packing and calling cost what the products gain.
SMALLEST_WIDTH = 128  # features of a position
SMALLEST_STATE = 1 << 18  # numbers in a state of all slots

# Address of a weight and rows of the product -> the packed weight, which suits them; None: nothing is kept. Threads
# that are given this one's context (`core/pieces.py`) share it.
_kept: ContextVar[dict[tuple[int, int], Tensor] | None] = ContextVar("kept", default=None)


def prepare(core: nn.Module, num_slots: int, device: torch.device) -> bool:
    """Let the layers of `core` (`hrm_rl.core.layers.Linear`) use packed weights where that is faster, as returned."""
    pays = (
        getattr(core, "dtype", None) == torch.float32 and core.hidden_size >= SMALLEST_WIDTH
        and num_slots * core.num_positions * core.hidden_size >= SMALLEST_STATE
        and device.type == "cpu" and platform.machine() in ("x86_64", "AMD64") and torch.backends.mkldnn.is_available()
    )  # fmt: skip
    for module in core.modules():
        if hasattr(module, "packs_weight"):
            module.packs_weight = pays
    return pays


@contextlib.contextmanager
def kept() -> Iterator[None]:
    """Keep packed weights for a while."""
    before = _kept.set({})
    try:
        yield
    finally:
        _kept.reset(before)


def forget() -> None:
    """To be called inside of `kept` whenever weights have changed."""
    packed = _kept.get()
    if packed is not None:
        packed.clear()


def _linear(x: Tensor, weight: Tensor) -> Tensor:
    """x (..., in), weight (out, in), float32 -> x W^T (..., out)."""
    packed = _kept.get()
    if packed is None:
        return F.linear(x, weight)
    product = weight.data_ptr(), x.numel() // x.shape[-1]
    if product not in packed:
        packed[product] = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), product[1])
    return torch.ops.mkldnn._linear_pointwise(x, packed[product], None, "none", [], "")


def _shape(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _save(ctx, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx, gradient: Tensor) -> tuple[Tensor, Tensor]:
    x, weight = ctx.saved_tensors
    return gradient @ weight, gradient.flatten(0, -2).t() @ x.flatten(0, -2)


# By the plain interface, whose calls take a few microseconds where those of `custom_op` take tens.
_operators = torch.library.Library("hrm_rl", "DEF")
_operators.define("linear(Tensor x, Tensor weight) -> Tensor")
_operators.impl("linear", _linear, "CPU")
torch.library.register_fake("hrm_rl::linear", _shape)
torch.library.register_autograd("hrm_rl::linear", _backward, setup_context=_save)
