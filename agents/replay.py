"""The last n decisions of every slot, for learners that replay them: a ring of tensors in an agent's memory.

Row i belongs to slot i and its entries follow each other in time, so that the entry after one is the slot's next step,
or the first of its next episode. Rings lie in the memory and not in a buffer: what belongs to slots is checkpointed
there, for any number of ranks, and is no part of a model. B slots, n entries a slot, K ages.

An entry's age counts back from the newest, which is 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from agents.memory import Memory

_NAME, _COUNT = "replay_", "replay_count"


def push(memory: Memory, size: int, **values: Tensor) -> None:
    """Add one entry (B, ...) of each name to every slot's ring of `size`; the oldest makes room, in place."""
    first = next(iter(values.values()))
    rows = torch.arange(len(first), device=first.device)
    count = memory.get(_COUNT)
    if count is None:
        count = torch.zeros_like(rows)
    for name, value in values.items():
        if _NAME + name not in memory:
            memory[_NAME + name] = value.new_zeros(len(value), size, *value.shape[1:])
        memory[_NAME + name][rows, count % size] = value.detach()
    memory[_COUNT] = count + 1


def size_of(memory: Memory) -> int | None:
    """Entries that a slot's ring has room for; None before the first."""
    held = next((value for name, value in memory.items() if name.startswith(_NAME) and name != _COUNT), None)
    return None if held is None else held.shape[1]


def filled(memory: Memory) -> Tensor:
    """(B,) int64, entries that each slot's ring holds."""
    return memory[_COUNT].clamp(max=size_of(memory))


def at(memory: Memory, name: str, ages: Tensor) -> Tensor:
    """Entries of those ages: (B,) -> (B, ...), (B, K) -> (B, K, ...). Ages must be in [0, `filled`)."""
    held = memory[_NAME + name]
    count = memory[_COUNT].view(-1, *(1 for _ in ages.shape[1:]))
    rows = torch.arange(len(held), device=held.device).view(count.shape)
    return held[rows, (count - 1 - ages) % held.shape[1]]
