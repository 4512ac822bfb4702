"""The grids of the Sudoku family: sizes, boxes, units and peers as plain numpy tables."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np

from hrm_rl.errors import UserError

BOXES = {4: (2, 2), 6: (2, 3), 9: (3, 3)}  # side -> (rows, columns) of a box


class Tables(NamedTuple):
    """Index tables of one size. n is the side, S = n * n cells, numbered row by row."""

    units: np.ndarray  # (3n, n) cells of every row, then column, then box
    cell_units: np.ndarray  # (S, 3) the three units of a cell
    peers: np.ndarray  # (S, P) the other cells that share a unit with a cell


def box_of(side: int) -> tuple[int, int]:
    """(rows, columns) of a box. UserError for a side that is not supported."""
    if side not in BOXES:
        raise UserError(f"side must be one of {', '.join(map(str, BOXES))}, not {side}")
    return BOXES[side]


@lru_cache
def tables(side: int) -> Tables:
    """The tables of a supported side, int64, built once."""
    rows, columns = box_of(side)
    cell = np.arange(side * side)
    row, column = cell // side, cell % side
    block = (row // rows) * (side // columns) + column // columns
    cell_units = np.stack((row, side + column, 2 * side + block), axis=1)
    units = np.stack([np.flatnonzero((cell_units == unit).any(axis=1)) for unit in range(3 * side)])
    shares = (cell_units[:, None, :] == cell_units[None, :, :]).any(axis=-1)
    np.fill_diagonal(shares, False)
    peers = np.stack([np.flatnonzero(line) for line in shares])
    return Tables(units, cell_units, peers)
