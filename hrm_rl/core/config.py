"""Every size and choice of a core: one frozen dataclass for all kinds of cores."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_LARGEST_SIZE = 1 << 24  # far above any core; keeps the products of sizes within 64 bits
_MOST_CYCLES = 1 << 16  # H_cycles * L_cycles, which is about how many calls a segment lists
_LARGEST_NUMBER = {"expansion": 1024.0, "rope_theta": 1e12, "rms_norm_eps": 1.0, "solver_tol": 1.0}
AUTO = torch.float32  # what a core computes in where nobody has chosen for the machine at hand


@dataclass(frozen=True)
class CoreConfig:
    """Every size of the core.

    Args:
        kind: Which core: hrm, recurrent_transformer, direct_transformer, trm, gated_hrm (docs/CORES.md), or the import
            path of one of your own.
        vocab_size: Token values, padding and blank included (0 = padding, 1 = blank, digit d = d + 1).
        seq_len: Tokens of a puzzle (81 for 9x9 Sudoku).
        hidden_size: Features of every position.
        num_heads: Attention heads.
        expansion: SwiGLU expansion; the inner width is 2/3 of it times hidden_size, rounded up.
        inner_multiple: The multiple the inner width of SwiGLU is rounded up to (256 in the release).
        H_cycles: High-level cycles a segment (N in the paper).
        L_cycles: Low-level steps a high-level cycle (T in the paper).
        H_layers: Blocks of the high-level module (trm has none).
        L_layers: Blocks of the low-level module (trm: of its only network).
        gradient: How far the gradient of a segment reaches back through its calls of f_L and f_H: auto (as the core was
            published: trm through its last recursion, all others by one_step), one_step (through the last call of
            each), last_k (through the last gradient_k calls), full (through all of them), or implicit (a solver in
            place of the cycles, and the implicit function theorem).
        gradient_k: Calls that the gradient reaches (gradient=last_k).
        solver: Of gradient=implicit: anderson (mixing of the last iterates) or iterate (plain repetition).
        solver_tol: The relative residual |f(z) - z| / |f(z)| of a puzzle at which it stops, forward and backward.
        solver_steps: Most evaluations of f, forward and backward each; a puzzle that is not there yet is counted.
        solver_window: Iterates that anderson mixes: each is a copy of the state in memory.
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

    kind: str = "hrm"
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
    gradient: Literal["auto", "one_step", "last_k", "full", "implicit"] = "auto"
    gradient_k: int = 2
    solver: Literal["anderson", "iterate"] = "anderson"
    solver_tol: float = 1e-3
    solver_steps: int = 30
    solver_window: int = 10
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
            "H_layers", "L_layers", "gradient_k", "solver_steps", "solver_window", "num_puzzle_identifiers",
        )  # fmt: skip
        for name in positive:
            if getattr(self, name) < 1:
                raise ValueError(f"core.{name} must be at least 1, not {getattr(self, name)}")
            if getattr(self, name) > _LARGEST_SIZE:
                raise ValueError(f"core.{name} must be at most {_LARGEST_SIZE}, not {getattr(self, name)}")
        if self.H_cycles * self.L_cycles > _MOST_CYCLES:
            product = f"{self.H_cycles} * {self.L_cycles}"
            raise ValueError(f"core.H_cycles * core.L_cycles must be at most {_MOST_CYCLES}, not {product}")
        for name in ("expansion", "rope_theta", "rms_norm_eps", "solver_tol"):
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
