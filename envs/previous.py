"""What the segment before left behind, for agents that ask for it: carried by the slots and by evaluation alike.

B slots, T = P + S positions, D hidden size, S tokens, V token values.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

import torch
from torch import Tensor


class Previous(NamedTuple):
    """One segment ago; a field that nobody asks for is None and costs nothing."""

    previous_z_H: Tensor | None = None  # (B, T, D), no gradient; at step 1 the core's initial state
    previous_answer: Tensor | None = None  # (B, S) int64, argmax of the logits; at step 1 all 0 (padding): none yet
    previous_logits: Tensor | None = None  # (B, S, V) float32, no gradient; at step 1 all 0: the uniform distribution

    @classmethod
    def none_yet(cls, names: Collection[str], z_H: Tensor, tokens: Tensor, vocab_size: int) -> Previous:
        """Before the first segment: z_H (B, T, D) is the core's initial state, tokens (B, S) the puzzle."""
        return cls(
            z_H.detach() if "previous_z_H" in names else None,
            torch.zeros_like(tokens) if "previous_answer" in names else None,
            torch.zeros(*tokens.shape, vocab_size, device=tokens.device) if "previous_logits" in names else None,
        )

    @classmethod
    def left_by(cls, names: Collection[str], z_H: Tensor, logits: Tensor) -> Previous:
        """After a segment with this state (B, T, D) and these logits (B, S, V)."""
        return cls(
            z_H.detach() if "previous_z_H" in names else None,
            logits.detach().argmax(-1) if "previous_answer" in names else None,
            logits.detach().float() if "previous_logits" in names else None,
        )

    def where(self, mask: Tensor, other: Previous) -> Previous:
        """These rows where mask (B,) bool is true, those of `other` elsewhere."""
        return Previous(*(choose(mask, new, old) for new, old in zip(self, other, strict=True)))


def choose(mask: Tensor, new: Tensor | None, old: Tensor | None) -> Tensor | None:
    """Rows of `new` where mask (B,) is true, else of `old`; (B, ...) both. None where neither is carried."""
    if new is None:
        return None
    rows = mask.view(-1, *(1 for _ in new.shape[1:]))
    if new.dtype == old.dtype and _is_words(new) and _is_words(old):  # a CPU takes a fourth of the time
        return torch.where(rows, new.view(torch.int64), old.view(torch.int64)).view(new.dtype)
    return torch.where(rows, new, old)


def _is_words(tensor: Tensor) -> bool:
    """Whether the last dimension can be read as whole 64-bit words, and no gradient is lost by it."""
    if tensor.requires_grad and torch.is_grad_enabled():
        return False
    size = 8 // tensor.element_size()
    places = *tensor.stride()[:-1], tensor.storage_offset(), tensor.shape[-1]
    return size > 1 and tensor.ndim > 1 and tensor.stride(-1) == 1 and all(place % size == 0 for place in places)
