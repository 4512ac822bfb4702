"""What the environments and agents ask of a core."""

from __future__ import annotations

from typing import NamedTuple, Protocol, runtime_checkable

from torch import Tensor


class State(NamedTuple):
    """Latent state of a batch of puzzles. D is the hidden size, P the prefix, S the tokens."""

    z_H: Tensor  # (B, P + S, D) high level: what an agent observes
    z_L: Tensor  # (B, P + S, D) low level

    def detach(self) -> State:
        return State(self.z_H.detach(), self.z_L.detach())


class CoreOutput(NamedTuple):
    """Result of one segment. Gradient flows into `state` and `logits`; the caller detaches the state."""

    state: State
    logits: Tensor  # (B, S, V) scores of every token value


@runtime_checkable
class Core(Protocol):
    """A recurrent reasoner: one call is one segment. Any `nn.Module` of this shape fits the environments.

    `prefix` and `tail` are optional: where a core has both, `forward` equals `tail(prefix(...))`, `prefix`
    runs without gradient, and the environments can keep a prefix for the segment that comes next.
    """

    num_positions: int  # P + S
    hidden_size: int  # D

    def initial_state(self, batch_size: int) -> State:
        """The fixed state every puzzle starts from, expanded to `batch_size`."""
        ...

    def __call__(self, tokens: Tensor, state: State) -> CoreOutput:
        """tokens: (B, S) int64."""
        ...
