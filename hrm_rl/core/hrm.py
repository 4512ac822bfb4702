"""The HRM core: N high-level cycles of T low-level steps on a latent state, with the 1-step gradient.

Source: HRM, arXiv:2506.21734, sections 2 and 3, and the released code (github.com/sapientinc/HRM).
Letters: B puzzles, S tokens, P prefix positions, D hidden size, V token values.

Departures from the released code, each of them on purpose:
- the Q-head is not here: halting belongs to the agent (`agents/`), the core only reasons;
- the puzzle embedding is an ordinary parameter (the release trains it by its own sign-SGD optimiser);
- token mixing by an MLP (TRM) or by the geometry of a grid, and relative grid positions, stand beside attention.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hrm_rl.core.base import CoreOutput, State
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

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_LARGEST_SIZE = 1 << 24  # far above any core; keeps the products of sizes within 64 bits
_LARGEST_NUMBER = {"expansion": 1024.0, "rope_theta": 1e12, "rms_norm_eps": 1.0}
_AUTO = torch.float32  # what a core computes in where nobody has chosen for the machine at hand


@dataclass(frozen=True)
class CoreConfig:
    """Every size of the core.

    Args:
        vocab_size: Token values, padding and blank included (0 = padding, 1 = blank, digit d = d + 1).
        seq_len: Tokens of a puzzle (81 for 9x9 Sudoku).
        hidden_size: Features of every position.
        num_heads: Attention heads.
        expansion: SwiGLU expansion; the inner width is 2/3 of it times hidden_size, rounded up.
        inner_multiple: The multiple the inner width of SwiGLU is rounded up to (256 in the release).
        H_cycles: High-level cycles a segment (N in the paper).
        L_cycles: Low-level steps a high-level cycle (T in the paper).
        H_layers: Blocks of the high-level module.
        L_layers: Blocks of the low-level module.
        token_mixing: How positions exchange information: attention, mlp (over positions, as in TRM), or grid
            (fixed by the geometry of the grid, with a learned weight for each relation).
        positions: Positional information for attention: rope (rotary), learned (added to the embedding),
            grid (a learned bias for each relation of two cells), none.
        geometry: How two cells of a grid are related, for grid mixing and positions: boxes (rows, columns, boxes),
            neighbours (the cells around it), lines (rows, columns, diagonals), signs (rows, columns, the signs
            between). The commands turn auto into the task's own; a core built with auto has boxes.
        rope_theta: Base of the rotary wavelengths.
        box: Rows and columns of a box, for grid positions; 0 0 picks the usual one for the side.
        grid_strength: How strongly heads start out on rows, columns and the like (grid mixing and positions).
        rms_norm_eps: Added to the mean square in the norm.
        puzzle_emb_ndim: Size of the puzzle embedding put in front; it takes ceil(ndim / hidden_size)
            prefix positions. 0: no prefix, and the Q-head reads the first token.
        num_puzzle_identifiers: Rows of the puzzle embedding.
        dtype: What the core computes in; parameters stay float32. The commands turn auto into bfloat16 where
            the hardware multiplies it natively; a core built with auto computes in float32.
    """

    vocab_size: int = 11
    seq_len: int = 81
    hidden_size: int = 128
    num_heads: int = 4
    expansion: float = 4.0
    inner_multiple: int = 256
    H_cycles: int = 2
    L_cycles: int = 2
    H_layers: int = 2
    L_layers: int = 2
    token_mixing: Literal["attention", "mlp", "grid"] = "attention"
    positions: Literal["rope", "learned", "grid", "none"] = "rope"
    geometry: Literal["auto", "boxes", "neighbours", "lines", "signs"] = "auto"
    rope_theta: float = 10000.0
    box: tuple[int, int] = (0, 0)
    grid_strength: float = 4.0
    rms_norm_eps: float = 1e-5
    puzzle_emb_ndim: int = 128
    num_puzzle_identifiers: int = 1
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"

    def __post_init__(self) -> None:
        positive = (
            "vocab_size", "seq_len", "hidden_size", "num_heads", "inner_multiple", "H_cycles", "L_cycles",
            "H_layers", "L_layers", "num_puzzle_identifiers",
        )  # fmt: skip
        for name in positive:
            if getattr(self, name) < 1:
                raise ValueError(f"core.{name} must be at least 1, not {getattr(self, name)}")
            if getattr(self, name) > _LARGEST_SIZE:
                raise ValueError(f"core.{name} must be at most {_LARGEST_SIZE}, not {getattr(self, name)}")
        for name in ("expansion", "rope_theta", "rms_norm_eps"):
            if not 0 < getattr(self, name) <= _LARGEST_NUMBER[name]:  # so that NaN is out as well
                most = f"{_LARGEST_NUMBER[name]:g}"
                raise ValueError(f"core.{name} must be above 0 and at most {most}, not {getattr(self, name)}")
        if not abs(self.grid_strength) <= 1e4:
            raise ValueError(f"core.grid_strength must be between -10000 and 10000, not {self.grid_strength}")
        if self.token_mixing != "mlp" and self.hidden_size % self.num_heads:
            raise ValueError(
                f"core.hidden_size ({self.hidden_size}) must be a multiple of core.num_heads ({self.num_heads})"
            )
        if self.positions == "rope" and (self.hidden_size // self.num_heads) % 2:
            raise ValueError("core.positions=rope needs an even head size (hidden_size / num_heads)")
        if not 0 <= self.puzzle_emb_ndim <= _LARGEST_SIZE:
            raise ValueError(f"core.puzzle_emb_ndim must be between 0 and {_LARGEST_SIZE}, not {self.puzzle_emb_ndim}")
        if "grid" in (self.positions, self.token_mixing) and math.isqrt(self.seq_len) ** 2 != self.seq_len:
            raise ValueError(f"a grid needs a square number of tokens, not seq_len={self.seq_len}")

        side = math.isqrt(self.seq_len)
        if tuple(self.box) != (0, 0) and (min(self.box) < 1 or self.box[0] * self.box[1] != side):
            raise ValueError(f"core.box must be rows and columns with a product of {side}, not {self.box}")

    @property
    def prefix_len(self) -> int:
        """Positions in front of the tokens (P)."""
        return math.ceil(self.puzzle_emb_ndim / self.hidden_size)

    @property
    def grid(self) -> tuple[int, tuple[int, int]]:
        """Side of the grid and (rows, columns) of its boxes."""
        side = math.isqrt(self.seq_len)
        if self.box != (0, 0):
            return side, self.box
        rows = max(r for r in range(1, math.isqrt(side) + 1) if side % r == 0)
        return side, (rows, side // rows)


class Level(nn.Module):
    """f_L or f_H: adds the injection to the state, then runs its blocks."""

    def __init__(self, layers: list[Block]):
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, state: Tensor, injection: Tensor, rope, bias) -> Tensor:
        x = state + injection
        for layer in self.layers:
            x = layer(x, rope, bias)
        return x


class HRMCore(nn.Module):
    """Maps (tokens, state) to (state, logits); one call is one segment.

    The gradient flows through the last low-level and the last high-level call only (the 1-step gradient,
    section 2.2 of the paper); everything before them is `prefix`, they are `tail`.
    """

    def __init__(self, config: CoreConfig, generator: torch.Generator | None = None):
        super().__init__()
        self.config = config
        c = config
        D = c.hidden_size
        self.hidden_size = D
        self.prefix_len = c.prefix_len
        self.num_positions = c.prefix_len + c.seq_len
        self.dtype = DTYPES.get(c.dtype, _AUTO)
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
        self.H_level = self._level(c.H_layers, generator)
        self.L_level = self._level(c.L_layers, generator)
        self.lm_head = Linear(D, c.vocab_size, generator)
        self.register_buffer("H_init", trunc_normal_(torch.empty(D), 1.0, generator))
        self.register_buffer("L_init", trunc_normal_(torch.empty(D), 1.0, generator))

    def _level(self, layers: int, generator: torch.Generator | None) -> Level:
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

    def _positional(self) -> tuple[tuple[Tensor, Tensor] | None, Tensor | None]:
        rope = (self.rope_cos, self.rope_sin) if hasattr(self, "rope_cos") else None
        return rope, self.grid_bias() if hasattr(self, "grid_bias") else None

    def prefix(self, tokens: Tensor, state: State, puzzle_ids: Tensor | None = None) -> State:
        """All calls of a segment but the last of each level, without gradient."""
        with torch.no_grad():
            injection, positional = self.embed(tokens, puzzle_ids), self._positional()
            z_H, z_L = state
            for cycle in range(self.config.H_cycles):
                last_cycle = cycle == self.config.H_cycles - 1
                for _ in range(self.config.L_cycles - last_cycle):
                    z_L = self.L_level(z_L, z_H + injection, *positional)
                if not last_cycle:
                    z_H = self.H_level(z_H, z_L, *positional)
        return State(z_H, z_L)

    def tail(self, tokens: Tensor, state: State, puzzle_ids: Tensor | None = None) -> CoreOutput:
        """The last low-level and the last high-level call and the output head, with gradient."""
        injection, positional = self.embed(tokens, puzzle_ids), self._positional()
        z_L = self.L_level(state.z_L, state.z_H + injection, *positional)
        z_H = self.H_level(state.z_H, z_L, *positional)
        return CoreOutput(State(z_H, z_L), self.lm_head(z_H)[:, self.prefix_len :])

    def forward(self, tokens: Tensor, state: State, puzzle_ids: Tensor | None = None) -> CoreOutput:
        """One segment from a detached state. tokens (B, S) int64; see `Core`."""
        return self.tail(tokens, self.prefix(tokens, state, puzzle_ids), puzzle_ids)
