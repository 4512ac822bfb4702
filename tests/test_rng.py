"""Counter-based random numbers: known values of SplitMix64, and independence of everything but the key."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hrm_rl import rng

MASK = 2**64 - 1
KEYS = st.integers(-(2**63), 2**63 - 1)


def splitmix64(seed: int):
    """The published generator in Python's own integers (Steele, Lea & Flood, OOPSLA 2014)."""
    state = seed & MASK
    while True:
        state = (state + 0x9E3779B97F4A7C15) & MASK
        z = state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
        yield z ^ (z >> 31)


def test_the_published_stream():
    """The first numbers of seed 1234567 as they stand in many test suites, and uniform() made of them."""
    stream = splitmix64(1234567)
    first = [next(stream) for _ in range(5)]
    assert first == [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431,
                     16408922859458223821]  # fmt: skip
    assert rng.uniform(torch.tensor([1234567]), 5)[0].tolist() == [(z >> 11) * 2.0**-53 for z in first]


@settings(max_examples=100, deadline=None)
@given(KEYS)
def test_uniform_is_splitmix64_for_every_key(key):
    stream = splitmix64(key)
    assert rng.uniform(torch.tensor([key]), 3)[0].tolist() == [(next(stream) >> 11) * 2.0**-53 for _ in range(3)]


@settings(max_examples=50, deadline=None)
@given(st.lists(KEYS, min_size=1, max_size=8), st.integers(1, 12))
def test_a_row_depends_on_its_key_alone(keys, count):
    batch = torch.tensor(keys)
    together = rng.uniform(batch, count), rng.permutation(batch, count), rng.integers(batch, count), rng.fold(batch, 7)
    for i, key in enumerate(keys):
        alone = torch.tensor([key])
        parts = rng.uniform(alone, count), rng.permutation(alone, count), rng.integers(alone, count), rng.fold(alone, 7)
        for part, whole in zip(parts, together, strict=True):
            assert torch.equal(part[0], whole[i])
    uniform, permutation, integers, _ = together
    assert ((uniform >= 0) & (uniform < 1)).all()
    assert torch.equal(permutation.sort(-1).values, torch.arange(count).expand(len(keys), -1))
    assert ((integers >= 0) & (integers < count)).all()
    assert torch.equal(rng.uniform(batch, count + 3)[:, :count], uniform)  # more numbers leave the first alone


def test_fold_tells_numbers_and_keys_apart():
    keys = torch.arange(200)
    folded = rng.fold(keys[:, None], torch.arange(50)[None])
    assert folded.shape == (200, 50) and folded.unique().numel() == 200 * 50
    assert torch.equal(rng.fold(keys, 3), rng.fold(keys, torch.tensor(3)))
    assert torch.equal(rng.fold(keys, torch.full((200,), 3, dtype=torch.int32)), rng.fold(keys, 3))
    assert not torch.equal(rng.fold(rng.fold(keys, 1), 2), rng.fold(rng.fold(keys, 2), 1))


def test_neighbouring_keys_are_independent():
    """Keys that count up (episodes do) give numbers as uniform as any: mean, spread, correlation of neighbours."""
    u = rng.uniform(rng.fold(torch.arange(20000), 1), 1)[:, 0]
    assert abs(u.mean() - 0.5) < 0.01 and abs(u.var() - 1 / 12) < 0.003
    centred = u - u.mean()
    assert abs((centred[1:] * centred[:-1]).mean() / u.var()) < 0.03
    counts = torch.bincount((u * 20).long(), minlength=20)
    assert (counts - 1000).abs().max() < 160


def test_integers_take_a_bound_for_every_row():
    high = torch.tensor([1, 2, 1000])
    draws = torch.stack([rng.integers(rng.fold(torch.arange(3), i), high) for i in range(300)])
    assert (draws < high).all() and (draws >= 0).all()
    assert draws[:, 0].eq(0).all() and draws[:, 1].unique().tolist() == [0, 1] and draws[:, 2].max() > 900


def test_permutations_are_even():
    """All six orders of three, about equally often."""
    orders = rng.permutation(rng.fold(torch.arange(6000), 9), 3)
    counts = torch.bincount(orders[:, 0] * 9 + orders[:, 1] * 3 + orders[:, 2])
    assert (counts > 0).sum() == 6 and (counts[counts > 0] - 1000).abs().max() < 130
