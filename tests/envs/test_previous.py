"""Rows of one tensor or another: the same whatever the memory they lie in."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from envs.previous import choose

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.int64, torch.uint8, torch.bool)


@given(st.data())
def test_rows_are_chosen(data):
    rows, width = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 24))
    dtype = data.draw(st.sampled_from(DTYPES))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))

    def values() -> torch.Tensor:
        made = (torch.randn(rows + 1, 3, width + 1, generator=generator) * 9).to(dtype)
        kind = data.draw(st.sampled_from(("whole", "shifted", "turned", "expanded")))
        if kind == "shifted":
            return made[1:, :, 1:]
        if kind == "turned":
            return made[1:, :, 1:].transpose(1, 2).contiguous().transpose(1, 2)
        if kind == "expanded":
            return made[0, 0, 1:].expand(rows, 3, width)
        return made[1:, :, 1:].contiguous()

    new, old, mask = values(), values(), torch.rand(rows, generator=generator) < 0.5
    found = choose(mask, new, old)
    assert found.dtype == dtype and found.shape == new.shape
    for row in range(rows):
        assert torch.equal(found[row], (new if mask[row] else old)[row])


def test_what_is_no_number_stays_what_it_is():
    new, old = torch.full((2, 8), float("nan")), torch.full((2, 8), float("-inf"))
    found = choose(torch.tensor([True, False]), new, old)
    assert found[0].isnan().all() and (found[1] == float("-inf")).all()


@pytest.mark.parametrize("which", [0, 1])
def test_gradient_passes_where_there_is_any(which):
    pair = [torch.ones(2, 8), torch.zeros(2, 8)]
    pair[which].requires_grad_()
    choose(torch.tensor([True, False]), *pair).sum().backward()
    assert pair[which].grad[:, 0].tolist() == [float(which == 0), float(which == 1)]


def test_numbers_of_two_kinds_are_promoted_as_ever():
    assert choose(torch.tensor([True]), torch.ones(1, 8), torch.zeros(1, 8, dtype=torch.float64)).dtype == torch.float64
    assert choose(torch.tensor([True]), None, torch.zeros(1)) is None
