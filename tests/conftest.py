"""Puts the repository root (so that tests run from a plain checkout) and the tests' own helpers on sys.path."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

TESTS = Path(__file__).resolve().parent
for folder in (TESTS / "support", TESTS.parent):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))


@pytest.fixture(autouse=True)
def _own_generator():
    """Every test starts from the same global generator and leaves the one it found."""
    state = torch.get_rng_state()
    torch.manual_seed(0)
    yield
    torch.set_rng_state(state)


@pytest.fixture
def puzzles():
    """Sixteen 4x4 Sudokus with six blanks each."""
    from hrm_testing import small_puzzles

    return small_puzzles(16)
