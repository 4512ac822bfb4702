"""The names of the released HRM checkpoints (github.com/sapientinc/HRM), one to one.

A released checkpoint stores every tensor as `_orig_mod.model.inner.NAME` (compiled), the model alone as
`inner.NAME`. NAME is ours as well: `q_head.*` belongs to the agent's QHead, all else to the core.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

_PREFIXES = ("_orig_mod.model.inner.", "model.inner.", "inner.")


def from_released(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Split a released state dict into (core, q_head) state dicts. KeyError names a foreign tensor.

    `puzzle_emb.local_weights` and `local_ids` (the release's per-batch buffers) have no counterpart.
    """
    core, q_head = {}, {}
    for full, value in tensors.items():
        prefix = next((p for p in _PREFIXES if full.startswith(p)), None)
        if prefix is None:
            raise KeyError(f"{full!r} is not a name of the released HRM model")
        name = full[len(prefix) :]
        if name in ("puzzle_emb.local_weights", "puzzle_emb.local_ids"):
            continue
        if name.startswith("q_head."):
            q_head[name.removeprefix("q_head.")] = value
        else:
            core[name] = value
    return core, q_head


def to_released(
    core: Mapping[str, Tensor], q_head: Mapping[str, Tensor], prefix: str = _PREFIXES[0]
) -> dict[str, Tensor]:
    """The inverse: one state dict under the released names."""
    named = {f"{prefix}{name}": value for name, value in core.items()}
    return named | {f"{prefix}q_head.{name}": value for name, value in q_head.items()}
