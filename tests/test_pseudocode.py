"""The published pseudo-code, one puzzle after the other, computes the losses of our trainer with one slot."""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from hrm_testing import small_trainer


def published_loop(core, q_head, puzzles, optimizer, max_steps):
    """Deep supervision with ACT (arXiv:2506.21734, Figure 4 and section 2.2); yields every loss and step."""
    for tokens, labels in puzzles:
        state = core.initial_state(1)
        for m in range(1, max_steps + 1):
            state, logits = core(tokens, state)
            q = q_head(state.z_H)[0]
            right = (logits.argmax(-1) == labels).all().float()
            act_halt = F.binary_cross_entropy_with_logits(q[0], right)
            with torch.no_grad():
                q_next = q_head(core(tokens, state).state.z_H)[0]
            best = q_next[0] if m == max_steps else q_next.max()
            act_continue = F.binary_cross_entropy_with_logits(q[1], best.sigmoid())
            loss = F.cross_entropy(logits[0], labels[0]) + 0.5 * (act_halt + act_continue)
            state = state.detach()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            yield loss.item(), m
            if q[0] > q[1]:
                break


def one_slot_trainer(**changes):
    settings = dict(num_envs=1, bootstrap="extra_forward", optim={"lr": 3e-3, "weight_decay": 0.1})
    trainer = small_trainer(arguments={"epsilon": 0.0, "q_bias": 0.0}, **settings | changes)
    head = trainer.agent.q_head
    with torch.no_grad():  # a Q-head that does not wish the same everywhere
        head.weight.copy_(torch.randn(head.weight.shape, generator=torch.Generator().manual_seed(6)))
    return trainer


def run_both(updates: int = 30, **changes):
    trainer = one_slot_trainer(**changes)
    ours, puzzles = [], []
    for _ in range(updates):
        slots = trainer.envs.slots
        if slots.steps.item() == 1:
            puzzles.append((slots.tokens.clone(), slots.labels.clone()))
        trainer.update()
        ours.append((trainer.sums.take()["loss/total"], slots.steps.item()))
    twin = one_slot_trainer()
    optimizer = torch.optim.AdamW([*twin.core.parameters(), *twin.agent.parameters()], lr=3e-3, betas=(0.9, 0.95),
                                  eps=1e-8, weight_decay=0.1)  # fmt: skip
    loop = published_loop(twin.core, twin.agent.q_head, puzzles, optimizer, 4)
    theirs = list(itertools.islice(loop, updates))
    return ours, theirs


def differ(ours, theirs) -> float:
    assert len(ours) == len(theirs)
    return max(abs(a - b) / b for (a, _), (b, _) in zip(ours, theirs, strict=True))


def test_the_loop_is_the_trainer():
    ours, theirs = run_both()
    assert [m for _, m in ours] == [m for _, m in theirs]
    lengths = [m for (_, m), (_, after) in zip(ours[:-1], ours[1:], strict=True) if after == 1]
    assert len(set(lengths)) >= 3, f"the episodes are too much alike to show anything: {lengths}"
    assert differ(ours, theirs) < 2e-4


def test_other_rules_are_seen():
    """Negative controls: another bootstrap, or weights of the loss, leaves the loop within a few updates."""
    for changes in ({"bootstrap": "shared_prefix"}, {"halt_weight": 1.0}, {"q_to_core": False}):
        ours, theirs = run_both(12, **changes)
        assert [m for _, m in ours] != [m for _, m in theirs] or differ(ours, theirs) > 1e-3, changes
