"""What all cores of this project share: embedding, recursion over calls, how far the gradient reaches, output head.

A segment is a row of calls, each of which updates one of the two states; a core says which networks it has and in what
order they are called. The first calls run without gradient (`prefix`), the others with it (`tail`); `gradient` says how
many those are. With gradient=implicit the calls before the last of each network are replaced by a solver that looks for
their fixed point (`core/implicit.py`).

Letters: B puzzles, S tokens, P prefix positions, D hidden size, V token values.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hrm_rl.core import implicit
from hrm_rl.core.base import CoreOutput, State
from hrm_rl.core.config import AUTO, DTYPES, CoreConfig
from hrm_rl.core.layers import (
    Attention,
    Block,
    Embedding,
    GridBias,
    GridMixing,
    Linear,
    PuzzleEmbedding,
    SwiGLU,
    rope_tables,
    swiglu_width,
    trunc_normal_,
)


class Inputs(NamedTuple):
    """What every call of a segment is given beside the state."""

    injection: Tensor  # (B, P + S, D) the embedded puzzle
    rope: tuple[Tensor, Tensor] | None  # cos and sin of the rotary positions
    bias: Tensor | None  # (heads, P + S, P + S) learned biases of the attention


class Level(nn.Module):
    """A network of a core (f_L, f_H or the only one): its blocks in a row, (B, P + S, D) -> (B, P + S, D)."""

    def __init__(self, layers: list[Block]):
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor] | None, bias: Tensor | None) -> Tensor:
        for layer in self.layers:
            x = layer(x, rope, bias)
        return x


class RecurrentCore(nn.Module):
    """Maps (tokens, state) to (state, logits); one call is one segment. The base of every core here.

    A subclass builds its networks in `build`, lists the calls of a segment in `calls` and runs one of them in `call`.
    `config.kind` of an instance always names its own class.
    """

    #: Short name, `core.kind`; a class that gives itself none goes by its import path.
    kind: ClassVar[str] = ""
    #: Every subclass that has been defined in this process, by its kind (`hrm_rl.core.registry`).
    defined: ClassVar[weakref.WeakValueDictionary[str, type[RecurrentCore]]] = weakref.WeakValueDictionary()

    #: The calls of one segment in their order, by names that `call` knows.
    calls: tuple[str, ...]
    #: gradient=implicit: how far the solvers came, relative residuals (B,), detached: "forward" of the latest segment
    #: that was run with gradient, "backward" of the latest backward pass.
    solved: dict[str, Tensor]

    def __init_subclass__(cls, **keywords):
        super().__init_subclass__(**keywords)
        path = f"{cls.__module__}.{cls.__qualname__}"
        cls.kind = cls.__dict__.get("kind", path)
        other = RecurrentCore.defined.get(cls.kind)
        if other is not None and f"{other.__module__}.{other.__qualname__}" != path:
            raise TypeError(f"core kind {cls.kind!r} is that of {other.__module__}.{other.__qualname__} already")
        RecurrentCore.defined[cls.kind] = cls

    def __init__(self, config: CoreConfig, generator: torch.Generator | None = None):
        super().__init__()
        config = config if config.kind == self.kind else replace(config, kind=self.kind)
        self.config = config
        self.solved = {}
        c = config
        D = c.hidden_size
        self.hidden_size = D
        self.prefix_len = c.prefix_len
        self.num_positions = c.prefix_len + c.seq_len
        self.dtype = DTYPES.get(c.dtype, AUTO)
        self.embed_scale = math.sqrt(D)
        self.observation_bound = 1.01 * math.sqrt(D)  # the last norm keeps |z| below sqrt(D); bf16 rounds

        self.embed_tokens = Embedding(c.vocab_size, D, 1.0 / self.embed_scale, generator)
        if c.puzzle_emb_ndim > 0:
            self.puzzle_emb = PuzzleEmbedding(c.num_puzzle_identifiers, c.puzzle_emb_ndim)
        if c.positions == "learned":
            self.embed_pos = Embedding(self.num_positions, D, 1.0 / self.embed_scale, generator)
        if c.positions == "rope" and c.token_mixing == "attention":
            cos, sin = rope_tables(self.num_positions, D // c.num_heads, c.rope_theta)
            self.register_buffer("rope_cos", cos, persistent=False)
            self.register_buffer("rope_sin", sin, persistent=False)
        if c.positions == "grid" and c.token_mixing == "attention":
            self.grid_bias = GridBias(c.num_heads, *c.grid, c.prefix_len, c.grid_strength, c.geometry)
        self.build(generator)
        self.lm_head = Linear(D, c.vocab_size, generator)
        self.register_buffer("H_init", trunc_normal_(torch.empty(D), 1.0, generator))
        self.register_buffer("L_init", trunc_normal_(torch.empty(D), 1.0, generator))

    # --- what a core is ----------------------------------------------------------------------------------------

    def build(self, generator: torch.Generator | None) -> None:
        """Make the networks and set `calls`."""
        raise NotImplementedError

    def call(self, which: str, z_H: Tensor, z_L: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """One of `calls`: the states (B, P + S, D) before it -> those after it."""
        raise NotImplementedError

    @property
    def one_step(self) -> int:
        """Calls that the 1-step gradient reaches: the last of each name."""
        return len(set(self.calls))

    @property
    def published(self) -> int:
        """Calls that the gradient reaches as this core was published (gradient=auto)."""
        return self.one_step

    def level(self, layers: int, generator: torch.Generator | None) -> Level:
        """A network of `layers` blocks, as `config` has them."""
        c = self.config
        inner = swiglu_width(c.hidden_size, c.expansion, c.inner_multiple)
        return Level(
            [
                Block(self._mixer(generator), c.hidden_size, inner, c.rms_norm_eps, generator)
                for _ in range(layers)
            ]
        )

    def _mixer(self, generator: torch.Generator | None) -> nn.Module:
        c = self.config
        if c.token_mixing == "attention":
            return Attention(c.hidden_size, c.num_heads, generator)
        if c.token_mixing == "mlp":
            inner = swiglu_width(self.num_positions, c.expansion, c.inner_multiple)
            return SwiGLU(self.num_positions, inner, generator)  # over positions, features as batch
        sizes = c.hidden_size, c.num_heads, *c.grid, c.prefix_len, c.grid_strength
        return GridMixing(*sizes, generator, c.geometry)

    # --- one segment -------------------------------------------------------------------------------------------

    def initial_state(self, batch_size: int) -> State:
        """The fixed initial states, (batch_size, P + S, D) each, without copying them."""
        shape = (batch_size, self.num_positions, self.hidden_size)
        return State(self.H_init.to(self.dtype).expand(shape), self.L_init.to(self.dtype).expand(shape))

    def embed(self, tokens: Tensor, puzzle_ids: Tensor | None = None) -> Tensor:
        """tokens (B, S), puzzle_ids (B,) or None for identifier 0 -> the input injection (B, P + S, D)."""
        x = self.embed_tokens(tokens)
        if self.prefix_len:
            if puzzle_ids is None:
                puzzle_ids = torch.zeros(tokens.shape[0], dtype=torch.long, device=tokens.device)
            front = self.puzzle_emb(puzzle_ids)
            front = F.pad(front, (0, self.prefix_len * self.hidden_size - front.shape[-1]))
            x = torch.cat((front.view(-1, self.prefix_len, self.hidden_size), x), dim=1)
        if self.config.positions == "learned":
            x = math.sqrt(0.5) * (x + self.embed_pos.embedding_weight)  # keeps the variance of one embedding
        return (self.embed_scale * x).to(self.dtype)

    def inputs(self, tokens: Tensor, puzzle_ids: Tensor | None = None) -> Inputs:
        """The same for every call of a segment; see `embed`."""
        rope = (self.rope_cos, self.rope_sin) if hasattr(self, "rope_cos") else None
        bias = self.grid_bias() if hasattr(self, "grid_bias") else None
        return Inputs(self.embed(tokens, puzzle_ids), rope, bias)

    @property
    def without_gradient(self) -> int:
        """How many calls of a segment, from its first on, run without gradient."""
        c = self.config
        every = len(self.calls)
        reached = {"auto": self.published, "one_step": self.one_step, "last_k": c.gradient_k, "full": every,
                   "implicit": self.one_step}[c.gradient]  # fmt: skip
        return max(0, len(self.calls) - reached)

    def run(self, calls: tuple[str, ...], state: State, inputs: Inputs) -> State:
        """Some calls, one after the other."""
        z_H, z_L = state
        for which in calls:
            z_H, z_L = self.call(which, z_H, z_L, inputs)
        return State(z_H, z_L)

    def prefix(self, tokens: Tensor, state: State, puzzle_ids: Tensor | None = None) -> State:
        """The first calls of a segment, without gradient (with the 1-step gradient: all but the last of each level).

        With gradient=implicit: where repeating the other calls leads, as near as the solver comes.
        """
        if not self.without_gradient and self.config.gradient != "implicit":
            return state
        with torch.no_grad():
            inputs = self.inputs(tokens, puzzle_ids)
            if self.config.gradient != "implicit":
                return self.run(self.calls[: self.without_gradient], state, inputs)
            return implicit.fixed_point(self._last_calls(inputs), state, self._solver)

    def tail(self, tokens: Tensor, state: State, puzzle_ids: Tensor | None = None) -> CoreOutput:
        """The other calls and the output head, with gradient."""
        inputs = self.inputs(tokens, puzzle_ids)
        if self.config.gradient == "implicit" and torch.is_grad_enabled() and self._learns():
            state = implicit.differentiated(self._last_calls(inputs), state, self._solver, self.solved)
        else:
            state = self.run(self.calls[self.without_gradient :], state, inputs)
        return CoreOutput(state, self.lm_head(state.z_H)[:, self.prefix_len :])

    def _learns(self) -> bool:
        return any(p.requires_grad for p in self.parameters())

    def _last_calls(self, inputs: Inputs) -> Callable[[State], State]:
        return lambda state: self.run(self.calls[self.without_gradient :], state, inputs)

    @property
    def _solver(self) -> implicit.Settings:
        c = self.config
        return implicit.Settings(c.solver_tol, c.solver_steps, c.solver, c.solver_window)

    def forward(self, tokens: Tensor, state: State, puzzle_ids: Tensor | None = None) -> CoreOutput:
        """One segment from a detached state. tokens (B, S) int64; see `Core`."""
        return self.tail(tokens, self.prefix(tokens, state, puzzle_ids), puzzle_ids)
