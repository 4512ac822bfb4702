"""The two ways to attention give the same numbers."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from hrm_rl.core.layers import Attention, plain_attention, rope_tables


@pytest.mark.parametrize(("dtype", "forward", "backward"), [(torch.float32, 1e-6, 1e-5), (torch.bfloat16, 2e-2, 4e-2)])
def test_plain_attention_is_attention(dtype, forward, backward):
    """Against PyTorch's own, values and gradients, within a few units of the last place of values of order 1."""
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(3, 2, 17, 8, generator=generator) for _ in range(4)]
    *qkv, weights = (x.to(dtype) for x in inputs)
    results = []
    for function in (plain_attention, scaled_dot_product_attention):
        leaves = [x.clone().requires_grad_() for x in qkv]
        out = function(*leaves)
        (out * weights).sum().backward()
        results.append((out.detach(), *(x.grad for x in leaves)))
    for i, (ours, theirs) in enumerate(zip(*results, strict=True)):
        assert (ours - theirs).abs().max() < (backward if i else forward)
    wrong = plain_attention(qkv[0] * 1.1, *qkv[1:])  # the control: a temperature that is off by a tenth is seen
    assert (wrong - results[1][0]).abs().max() > (1e-3 if dtype == torch.float32 else 2e-2)


def test_bfloat16_attention_on_a_cpu_is_near_float32():
    """The module itself, whichever way it takes."""
    attention = Attention(32, 4, torch.Generator().manual_seed(0))
    rope = rope_tables(17, 8, 1e4)
    x = torch.randn(3, 17, 32, generator=torch.Generator().manual_seed(1))
    wide, narrow = attention(x, rope, None), attention(x.bfloat16(), rope, None)
    assert narrow.dtype == torch.bfloat16
    assert (wide - narrow).abs().max() < 0.03 * wide.abs().max()
