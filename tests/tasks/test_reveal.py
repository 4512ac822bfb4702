"""Showing more of the answer: the number of givens is the one asked for, and nothing else changes."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hrm_rl.tasks import load_puzzles
from hrm_rl.tasks.reveal import BLANK, reveal

PUZZLES = load_puzzles("sudoku-6", split="test", limit=64)
QUESTIONS, ANSWERS = PUZZLES.questions.long(), PUZZLES.answers.long()
KEYS = torch.arange(64) * 7919


@settings(max_examples=40, deadline=None)
@given(low=st.integers(0, 36), width=st.integers(0, 12), salt=st.integers(0, 2**40))
def test_number_of_givens(low, width, salt):
    high = min(36, low + width)
    shown = reveal(KEYS + salt, QUESTIONS, ANSWERS, torch.tensor(low), torch.tensor(high))
    before, after = (QUESTIONS > BLANK).sum(1), (shown > BLANK).sum(1)
    assert (after >= before).all()
    assert ((after == before) | ((after >= low) & (after <= high))).all()
    assert (after >= low).all()  # a puzzle with fewer is filled up
    changed = shown != QUESTIONS
    assert (shown[changed] == ANSWERS[changed]).all() and (QUESTIONS[changed] == BLANK).all()


def test_every_count_of_the_range_and_every_cell_occur():
    keys = torch.arange(4000)
    blank, answer = torch.full((4000, 36), BLANK), torch.full((4000, 36), 5)
    shown = reveal(keys, blank, answer, torch.tensor(10), torch.tensor(13)) > BLANK
    counts = shown.sum(1).bincount(minlength=14)[10:]
    assert counts.sum() == 4000 and counts.min() > 850
    share = shown.float().mean(0)  # 11.5 of 36 cells, each equally often
    assert (share - 11.5 / 36).abs().max() < 0.04


def test_same_key_same_cells_another_key_others():
    low, high = torch.tensor(20), torch.tensor(20)
    first = reveal(KEYS, QUESTIONS, ANSWERS, low, high)
    assert torch.equal(first, reveal(KEYS, QUESTIONS, ANSWERS, low, high))
    assert not torch.equal(first, reveal(KEYS + 1, QUESTIONS, ANSWERS, low, high))


def test_padding_is_left_alone():
    zeros = torch.zeros(3, 36, dtype=torch.int64)
    assert torch.equal(reveal(torch.arange(3), zeros, zeros, torch.tensor(30), torch.tensor(30)), zeros)
