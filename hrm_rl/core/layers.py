"""Building blocks of the recurrent core.

Source: HRM (arXiv:2506.21734) and its released code; token mixing by an MLP from TRM (arXiv:2510.04871).
Letters: B puzzles, T positions (prefix + tokens), D hidden size, N heads, K head size.

Parameters stay in float32; every layer computes in the dtype of its input.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hrm_rl.core import packing  # noqa: F401 - defines the operator that `Linear` calls

# Standard deviation of a unit normal cut at +-2: dividing by it restores the requested one.
_TRUNCATED_STD = 0.87962566103423978


def trunc_normal_(tensor: Tensor, std: float, generator: torch.Generator | None = None) -> Tensor:
    """Fill `tensor` with a normal cut at two sigmas whose standard deviation *after* the cut is `std`."""
    if std == 0:
        return nn.init.zeros_(tensor)
    sigma = std / _TRUNCATED_STD
    return nn.init.trunc_normal_(tensor, std=sigma, a=-2 * sigma, b=2 * sigma, generator=generator)


def rms_norm(x: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm without parameters, (..., D) -> (..., D); the mean is taken in float32."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


class Linear(nn.Module):
    """y = x W^T without bias; LeCun truncated-normal weights (out, in), cast to the dtype of x.

    Attributes:
        packs_weight: Call the operator of `core/packing.py`, which computes the same.
    """

    packs_weight = False

    def __init__(self, in_features: int, out_features: int, generator: torch.Generator | None = None):
        super().__init__()
        self.weight = nn.Parameter(trunc_normal_(torch.empty(out_features, in_features), in_features**-0.5, generator))

    def forward(self, x: Tensor) -> Tensor:
        if self.packs_weight:
            return torch.ops.hrm_rl.linear(x, self.weight)
        return F.linear(x, self.weight.to(x.dtype))


class Embedding(nn.Module):
    """Rows looked up by integer index, initialised with standard deviation `std`."""

    def __init__(self, rows: int, dim: int, std: float, generator: torch.Generator | None = None):
        super().__init__()
        self.embedding_weight = nn.Parameter(trunc_normal_(torch.empty(rows, dim), std, generator))

    def forward(self, index: Tensor) -> Tensor:
        return F.embedding(index, self.embedding_weight)


class PuzzleEmbedding(nn.Module):
    """One vector a puzzle identifier, starting at zero (`weights`, the released name)."""

    def __init__(self, identifiers: int, dim: int):
        super().__init__()
        self.weights = nn.Parameter(torch.zeros(identifiers, dim))

    def forward(self, index: Tensor) -> Tensor:
        return F.embedding(index, self.weights)


class SwiGLU(nn.Module):
    """down(silu(gate) * up) on the last axis; gate and up share one matrix, gate first."""

    def __init__(self, dim: int, inner: int, generator: torch.Generator | None = None):
        super().__init__()
        self.gate_up_proj = Linear(dim, 2 * inner, generator)
        self.down_proj = Linear(inner, dim, generator)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(F.silu(gate) * up)


def swiglu_width(dim: int, expansion: float, multiple: int) -> int:
    """Inner width of SwiGLU as released: 2/3 of `expansion * dim`, rounded up to a multiple."""
    return math.ceil(round(expansion * dim * 2 / 3) / multiple) * multiple


def rope_tables(positions: int, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin of the rotary embedding, each (positions, head_dim), float32, halves repeated."""
    inverse = 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    angles = torch.outer(torch.arange(positions, dtype=torch.float32), inverse)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of (B, T, N, K) in float32, pairing element i with element i + K/2."""
    wide = x.float()
    low, high = wide.chunk(2, dim=-1)
    turned = torch.cat((-high, low), dim=-1)
    return (wide * cos[:, None] + turned * sin[:, None]).to(x.dtype)


def plain_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(K)) v by two products, (B, N, T, K) each -> (B, N, T, K).

    For bfloat16 on a CPU, where the backward pass of PyTorch's fused kernel takes five to eight times as long as
    this for sequences of a puzzle's length (docs/PERFORMANCE.md).
    """
    weights = torch.matmul(query * query.shape[-1] ** -0.5, key.transpose(-2, -1)).softmax(dim=-1)
    return torch.matmul(weights, value)


class Attention(nn.Module):
    """Bidirectional multi-head attention without bias or dropout, (B, T, D) -> (B, T, D).

    `qkv_proj` lays out its output as queries, keys, values, head by head, as released.
    """

    def __init__(self, dim: int, num_heads: int, generator: torch.Generator | None = None):
        super().__init__()
        self.num_heads = num_heads
        self.qkv_proj = Linear(dim, 3 * dim, generator)
        self.o_proj = Linear(dim, dim, generator)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor] | None, bias: Tensor | None) -> Tensor:
        """rope: cos and sin (T, K), or None. bias: (N, T, T) added to the attention logits, or None."""
        B, T, D = x.shape
        qkv = self.qkv_proj(x).view(B, T, 3, self.num_heads, D // self.num_heads)
        query, key, value = qkv.unbind(dim=2)  # (B, T, N, K) each
        if rope is not None:
            query, key = rotate(query, *rope), rotate(key, *rope)
        query, key, value = (part.transpose(1, 2) for part in (query, key, value))
        if x.device.type == "cpu" and x.dtype == torch.bfloat16 and bias is None:
            mixed = plain_attention(query, key, value)
        else:
            bias = None if bias is None else bias.to(x.dtype)
            mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
        return self.o_proj(mixed.transpose(1, 2).reshape(B, T, D))


class GridBias(nn.Module):
    """Relative positions on a grid: one learned attention bias a head and relation.

    How two cells are related is the geometry's to say (`GEOMETRIES`); the prefix positions have three relations of
    their own (prefix to cell, cell to prefix, prefix to prefix). Heads start out looking along the geometry's units
    and everywhere, in turn: `strength` is how far below its own unit everything else starts. With strength 0 the
    biases start at zero and the geometry has to be learned.
    """

    def __init__(
        self, num_heads: int, side: int, box: tuple[int, int], prefix: int, strength: float, geometry: str = "auto"
    ):
        super().__init__()
        relation, units = GEOMETRIES[geometry](side, box)
        prefix_to_cell, cell_to_prefix, prefix_to_prefix = (units.shape[1] + i for i in range(3))
        self.register_buffer("relation", F.pad(relation, (prefix, 0, prefix, 0)), persistent=False)
        self.relation[prefix:, :prefix] = cell_to_prefix
        self.relation[:prefix, prefix:] = prefix_to_cell
        self.relation[:prefix, :prefix] = prefix_to_prefix
        table = torch.zeros(num_heads, units.shape[1] + 3)
        for head in range(num_heads):
            unit = head % (len(units) + 1)
            if unit < len(units):
                table[head, : units.shape[1]] = -strength * ~units[unit]
                table[head, cell_to_prefix] = -strength
        self.table = nn.Parameter(table)

    def forward(self) -> Tensor:
        """The bias (N, T, T), float32."""
        return self.table[:, self.relation]


class GridMixing(nn.Module):
    """Token mixing by the geometry alone, (B, T, D) -> (B, T, D): attention without queries and keys.

    Head n mixes its values with the weights softmax(bias[n]), which depend on how two positions are related
    (`GridBias`) and not on what stands in them. On a CPU it costs a small part of attention's price.
    """

    def __init__(
        self, dim: int, num_heads: int, side: int, box: tuple[int, int], prefix: int, strength: float,
        generator: torch.Generator | None = None, geometry: str = "auto",
    ):  # fmt: skip
        super().__init__()
        self.num_heads = num_heads
        self.bias = GridBias(num_heads, side, box, prefix, strength, geometry)
        self.v_proj = Linear(dim, dim, generator)
        self.o_proj = Linear(dim, dim, generator)

    def forward(self, x: Tensor) -> Tensor:
        B, T, D = x.shape
        weights = self.bias().softmax(dim=-1).to(x.dtype)  # (N, T, T)
        values = self.v_proj(x).view(B, T, self.num_heads, D // self.num_heads)
        mixed = torch.einsum("nts,bsnk->btnk", weights, values)
        return self.o_proj(mixed.reshape(B, T, D))


_SELF = 8


def grid_relations(side: int, box: tuple[int, int]) -> Tensor:
    """(side^2, side^2) int64: bit 0 same row, bit 1 same column, bit 2 same box; 8 for the cell itself."""
    cell = torch.arange(side * side)
    row, column = cell // side, cell % side
    block = (row // box[0]) * side + column // box[1]
    same = [(unit[:, None] == unit[None, :]).long() for unit in (row, column, block)]
    relation = same[0] + 2 * same[1] + 4 * same[2]
    relation.fill_diagonal_(_SELF)
    return relation


# A geometry: (side, box) -> relation (side^2, side^2) int64, and units (U, R) bool: which of the R relations each
# unit that a head may start out on holds. The relation of a cell with itself is in every one.


def _boxes(side: int, box: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Rows, columns and boxes (Sudoku): `grid_relations`."""
    bits = (torch.arange(_SELF)[None] >> torch.arange(3)[:, None]) & 1
    return grid_relations(side, box), F.pad(bits.bool(), (0, 1), value=True)


def _neighbours(side: int, box: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """The way from one cell to the other (mazes): a relation of its own for each of the 9 of at most one row and
    column, and one each for the rest of the row, the rest of the column and all that is left. Units: the cell above,
    below, to the left and to the right, the 9 together."""
    down, right = _offsets(side)
    near = 3 * (down + 1) + right + 1
    far = torch.where(down == 0, 9, torch.where(right == 0, 10, 11))
    units = torch.zeros(5, 12, dtype=torch.bool)
    units[:, 4] = True
    for unit, relation in enumerate((1, 7, 3, 5)):
        units[unit, relation] = True
    units[4, :9] = True
    return torch.where((down.abs() <= 1) & (right.abs() <= 1), near, far), units


def _lines(side: int, box: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Rows, columns and both diagonals (queens): the cell itself, each of the four lines, all that is left."""
    down, right = _offsets(side)
    relation = torch.full_like(down, 5)
    for number, on_line in enumerate((down == 0, right == 0, down == right, down == -right), 1):
        relation[on_line] = number
    relation.fill_diagonal_(0)
    return relation, torch.eye(6, dtype=torch.bool)[1:5] | (torch.arange(6) == 0)


def _signs(side: int, box: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Rows and columns of a grid with signs between its cells (Futoshiki): the relation says how far apart two tokens
    are (up to 2 along a row or column) and which kinds they are. Units: rows, columns, and the 5 next along both."""
    down, right = _offsets(side)
    cell = torch.arange(side * side)
    kind = (cell // side % 2 + cell % side % 2 * 2)[None].expand(side * side, -1)  # 0 cell, 1 and 2 sign, 3 neither
    row = torch.where(down == 0, right.clamp(-3, 3) + 3, -1)  # 0..6, 3 itself
    column = torch.where((right == 0) & (down != 0), down.clamp(-3, 3) + 10, -1)  # 7..13, 10 unused
    place = torch.where(row >= 0, row, torch.where(column >= 0, column, 14))
    relation = place * 4 + kind
    at = torch.arange(60) // 4
    itself, near = at == 3, torch.tensor([1, 2, 3, 4, 5, 8, 9, 11, 12])
    units = torch.stack(((at < 7) & (torch.arange(60) % 4 == 0), (at >= 7) & (at < 14) & (torch.arange(60) % 4 == 0),
                         torch.isin(at, near)))  # fmt: skip
    return relation, units | itself


def _offsets(side: int) -> tuple[Tensor, Tensor]:
    """Rows down and columns to the right from each cell to each other, (side^2, side^2) both."""
    cell = torch.arange(side * side)
    row, column = cell // side, cell % side
    return row[None] - row[:, None], column[None] - column[:, None]


GEOMETRIES = {"auto": _boxes, "boxes": _boxes, "neighbours": _neighbours, "lines": _lines, "signs": _signs}


class Block(nn.Module):
    """Encoder block, post-norm: mix the positions, then each position's features.

    `mixer` is an `Attention` (named self_attn), a `SwiGLU` over positions (mlp_t) or a `GridMixing` (grid).
    """

    def __init__(self, mixer: nn.Module, dim: int, inner: int, eps: float, generator: torch.Generator | None = None):
        super().__init__()
        self.eps = eps
        self.kind = "self_attn" if isinstance(mixer, Attention) else "mlp_t" if isinstance(mixer, SwiGLU) else "grid"
        self.add_module(self.kind, mixer)
        self.mlp = SwiGLU(dim, inner, generator)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor] | None, bias: Tensor | None) -> Tensor:
        if self.kind == "self_attn":
            mixed = self.self_attn(x, rope, bias)
        elif self.kind == "mlp_t":
            mixed = self.mlp_t(x.transpose(1, 2)).transpose(1, 2)
        else:
            mixed = self.grid(x)
        x = rms_norm(x + mixed, self.eps)
        return rms_norm(x + self.mlp(x), self.eps)
