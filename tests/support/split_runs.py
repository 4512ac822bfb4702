"""Small runs that any number of ranks can share: `torchrun ... split_runs.py OUT` writes what rank 0 saw as JSON.

tests/test_parallel.py does the same in its own process and compares.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from hrm_testing import lively_trainer, small_puzzles, small_trainer

from agents import AgentLoss, FixedAgent, HaltingAgent
from agents.q_variant import QVariantAgent
from hrm_rl.errors import NonFiniteError
from hrm_rl.measure import FiniteWatch
from hrm_rl.parallel import Ranks, joined

UPDATES, EVERY = 9, 3
BAD_UPDATE = 2


class OwnLossAgent(HaltingAgent):
    """Learns by a rule of its own, remembers, and leaves one of its parameters alone in every second update."""

    learns, bootstraps = True, False

    def __init__(self, core, max_steps: int):
        super().__init__(max_steps)
        self.a, self.b = (torch.nn.Linear(core.hidden_size, 1) for _ in range(2))
        self.calls = 0

    def score(self, view):
        seen = self.recall("seen", view, 0) + 1
        self.keep("seen", seen)
        return self.a(view.z_H[:, 0].detach().float())[:, 0] * seen

    def loss(self, transition):
        self.calls += 1
        layer = self.a if self.calls % 2 else self.b
        wrong = (layer(transition.view.z_H[:, 0].float())[:, 0] - transition.is_correct.float()) ** 2
        return AgentLoss(wrong.sum() / len(wrong), {"wrong": wrong.mean()})


#: A ring for each slot, a coin for each slot and a copy of the heads.
SWITCHES = dict(backup="double", replay="fifo", replay_size=12, target="polyak", tau=0.3, head="mlp", head_width=8,
                q_bias=0.0, epsilon=0.5)  # fmt: skip

CASES = {
    "shared_prefix": dict(bootstrap="shared_prefix", optim=dict(ema=0.9)),
    "extra_forward": dict(bootstrap="extra_forward", optim=dict(grad_clip=0.5)),
    "next_observation": dict(bootstrap="next_observation"),
    "muon": dict(optim=dict(optimizer="muon", muon_lr=2e-4)),
    "none": dict(bootstrap="none", loss="stablemax"),
    "q": dict(objective="q"),
    "detached": dict(q_to_core=False),
    "supervised": dict(objective="supervised"),
    "q_variant": dict(optim=dict(ema=0.9)),
    "own_loss": {},
    "unsplit": {},  # a control: every rank has the slots of the first
}


def run(case: str, ranks: Ranks) -> dict:
    """Every line of metrics, the slots' keys and puzzles, and the weights, after UPDATES updates."""
    torch.manual_seed(0)
    changes = dict(CASES[case])
    # With AdamW's usual eps a step is the sign of the gradient, however small that is, and rounding decides it.
    optim = dict(lr=2e-3, eps=1e-2) | changes.pop("optim", {})
    common = dict(ranks=ranks, puzzles=small_puzzles(14, padding=2), num_envs=4, optim=optim, **changes)
    if case == "supervised":
        trainer = small_trainer(FixedAgent, **common)
    elif case == "q_variant":
        trainer = small_trainer(QVariantAgent, SWITCHES, **common)
    elif case == "own_loss":
        trainer = small_trainer(OwnLossAgent, **common)
    else:
        trainer = lively_trainer(**common)
    if case == "unsplit":
        trainer.envs.reset(seed=trainer.config.seed)
    lines = []
    for update in range(1, UPDATES + 1):
        details = trainer.update(detailed=update % EVERY == 0, before_detailed=(update + 1) % EVERY == 0)
        if update % EVERY == 0:
            line = trainer.line(details, 1.0)
            lines.append({tag: value for tag, value in line.items() if not tag.startswith("system/")})
    trainer.update()  # so that the sums of the state are not empty
    trainer.check_finite()
    tensors, _ = trainer.state()
    shapes = {name: [str(t.dtype), *t.shape] for name, t in sorted(tensors.items())}
    held = {name: t.double().flatten().tolist() for name, t in tensors.items() if t.numel() < 10_000}
    return {"lines": lines, "shapes": shapes, "state": held}


def unsound(ranks: Ranks) -> str:
    """What is said where a loss of the last rank alone is not a number."""
    watch = FiniteWatch(torch.device("cpu"), ranks)
    for update in range(1, 5):
        here = update >= BAD_UPDATE and ranks.rank == ranks.world - 1
        watch.see({"loss/a": torch.tensor(0.0), "loss/b": torch.tensor(float("nan") if here else 1.0)})
    try:
        watch.check(4)
    except NonFiniteError as error:
        return str(error)
    return "nothing"


def main(out: str) -> None:
    with joined() as ranks:
        result = {case: run(case, ranks) for case in CASES}
        said = unsound(ranks)
        result["unsound_ranks"] = ranks.total([float(said != "nothing")])[0]
        result["unsound"] = said
        result["speakers"] = ranks.total([float(ranks.speaks())])[0]
        result["word"] = ranks.told("word", "of rank 0" if ranks.first else None)
        if ranks.first:
            Path(out).write_text(json.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1])
