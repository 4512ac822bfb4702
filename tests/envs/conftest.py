"""4x4 puzzles made by hand, a core that counts (its answers are known) and a tiny HRM core (its are not)."""

from __future__ import annotations

import itertools
from functools import cache

import pytest
import torch

from hrm_rl.core import CoreConfig, HRMCore
from hrm_rl.core.counting import CountingCore
from hrm_rl.tasks import PuzzleSet

SIDE, CELLS, VOCAB = 4, 16, 6


@cache
def all_grids() -> torch.Tensor:
    """The 288 full 4x4 grids as tokens, (288, 16)."""
    rows = list(itertools.permutations(range(2, 6)))
    bands = [(a, b) for a in rows for b in rows if not {*a[:2]} & {*b[:2]} and not {*a[2:]} & {*b[2:]}]
    pairs = itertools.product(bands, bands)
    grids = [(*p, *q) for p, q in pairs if all(len({*column}) == SIDE for column in zip(*p, *q, strict=True))]
    return torch.tensor(grids).reshape(-1, CELLS)


def solutions(tokens: torch.Tensor) -> torch.Tensor:
    """(B, 16) tokens -> (B, 288) bool: the grids that agree with the givens."""
    return ((tokens[:, None] == all_grids()) | (tokens[:, None] == 1)).all(-1)


def solve(tokens: torch.Tensor) -> torch.Tensor:
    """The solution of puzzles that have exactly one."""
    return all_grids()[solutions(tokens).float().argmax(-1)]


def make_puzzles(count: int = 8, padding_rows: int = 0) -> PuzzleSet:
    """`count` puzzles with one solution each, then rows of nothing but padding."""
    generator = torch.Generator().manual_seed(0)
    questions, answers = [], []
    for grid in all_grids()[torch.randperm(288, generator=generator)[:count]]:
        question = grid.clone()
        for cell in torch.randperm(CELLS, generator=generator)[:9]:
            blanked = question.index_fill(0, cell, 1)
            if solutions(blanked[None]).sum() == 1:
                question = blanked
        questions.append(question)
        answers.append(grid)
    padding = [torch.zeros(CELLS, dtype=torch.int64)] * padding_rows
    rows = count + padding_rows
    return PuzzleSet(
        task="sudoku", side=SIDE, questions=torch.stack(questions + padding).to(torch.uint8),
        answers=torch.stack(answers + padding).to(torch.uint8), ratings=torch.arange(rows).float() / 2,
        sources=("hand",) * rows, name="made by hand", sha256=f"{count} and {padding_rows}",
    )  # fmt: skip


@pytest.fixture(scope="session")
def puzzles() -> PuzzleSet:
    return make_puzzles()


@pytest.fixture(scope="session")
def padded_puzzles() -> PuzzleSet:
    """One puzzle and one row of padding."""
    return make_puzzles(1, padding_rows=1)


@pytest.fixture
def counting():
    """right_from, right_until -> a core that answers rightly in those segments, whatever the puzzle."""

    def make(right_from: int, right_until: int | None = None) -> CountingCore:
        return CountingCore(CELLS, VOCAB, solve, right_from, right_until)

    return make


@pytest.fixture
def core() -> HRMCore:
    config = CoreConfig(
        vocab_size=VOCAB, seq_len=CELLS, hidden_size=16, num_heads=2, inner_multiple=16, puzzle_emb_ndim=16
    )
    return HRMCore(config, torch.Generator().manual_seed(0))
