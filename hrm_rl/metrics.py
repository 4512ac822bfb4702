"""What a training run reports: running sums that stay on the device, and their writers.

TAGS is the one list of metrics; docs/METRICS.md is made from it (`python -m hrm_rl.metrics`) and a test
keeps both in step.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from torch import Tensor

from hrm_rl.errors import UserError
from hrm_rl.parallel import ALONE, Ranks

TAGS: dict[str, str] = {
    "loss/total": "What the optimiser minimises, per slot: the weighted sum of the losses below.",
    "loss/supervised": "Cross entropy of the answer: mean over a puzzle's tokens, then over slots.",
    "loss/q_halt": "Binary cross entropy between q_halt and whether the answer is right, mean over slots; of q_variant "
    "with agent.loss=mse_values or mse_logits half the squared error.",
    "loss/q_continue": "The same loss between q_continue and its bootstrapped target, summed over the slots that have "
    "one and divided by all slots.",
    "loss/agent": "Loss of an agent that learns by another rule than Q-targets, as it enters the total.",
    "agent/NAME": "A part of such a loss, under the name that the agent gives it. act: task (expected loss), ponder "
    "(N + R); ponder: task, kl (to the prior, nats); reinforce: policy, baseline (half its squared error), entropy "
    "(nats); all summed where an episode ended and divided by all slots; bce: bce, the mean over all slots.",
    "halt/exact_accuracy": "Share of the episodes that ended whose whole answer was right at their halt.",
    "halt/token_accuracy": "Share of right cells at the halt, mean over the episodes that ended.",
    "halt/mean_steps": "Segments used by the episodes that ended: the unit of compute.",
    "halt/q_halt_accuracy": "Share of ended episodes where the sign of q_halt agrees with being right.",
    "halt/episodes": "Episodes that ended since the last line.",
    "q/td_error_halt": "Mean |G_halt - sigmoid(q_halt)| over slots (agent.loss=mse_logits: of q itself).",
    "q/td_error_continue": "Mean |G_continue - sigmoid(q_continue)| over the slots that have a continue target.",
    "q/mean_abs_logit": "Mean |q logit| over slots and both actions; growth without bound is divergence.",
    "q/max_abs_logit": "Largest |q logit| since the last line.",
    "q/target_drift": "Mean |G_continue now - G_continue at the last line| on 32 fixed puzzles after segment 1: "
    "how fast the bootstrapped target moves under the learner.",
    "state/residual_z_H": "|z_H(m) - z_H(m-1)| / |z_H(m)| (L2 over a puzzle), mean over the episodes that go on.",
    "state/residual_z_L": "The same for z_L.",
    "grad/core_H": "L2 norm of the gradient of f_H, at the logged update, before clipping.",
    "grad/core_L": "L2 norm of the gradient of f_L (trm: of its only network).",
    "grad/core_net": "L2 norm of the gradient of the network of recurrent_transformer and direct_transformer.",
    "grad/core_other": "L2 norm of the gradient of all else in the core: embeddings, output head, gates.",
    "grad/q_head": "L2 norm of the gradient of the Q-head.",
    "solver/forward_residual": "core.gradient=implicit: |f(z) - z| / |f(z)| where the segment ends (f: the last call "
    "of each network), mean over slots and updates.",
    "solver/forward_missed": "Share of slots and updates in which that is above core.solver_tol: no fixed point "
    "was found.",
    "solver/backward_residual": "The same for the linear equation of the backward pass, u = g + J^T u.",
    "solver/backward_missed": "Share of slots and updates in which that is above core.solver_tol.",
    "gradient/cosine": "Cosine of the 1-step to the implicit gradient of the supervised loss, both taken where a "
    "segment of the slots ends (log_gradient_cosine; `hrm_rl.measure.gradient_cosines`).",
    "gradient/cosine_full": "Cosine of the 1-step gradient to backpropagation through all calls of that segment.",
    "gradient/cosine_solved": "Cosine of the 1-step to the implicit gradient, both taken where the solver ends.",
    "gradient/forward": "|f(z) - z| / |f(z)| where the segment ends, mean over slots.",
    "gradient/forward_solved": "The same where the solver ends.",
    "gradient/backward": "Relative residual of the linear solve behind gradient/cosine, mean over slots.",
    "gradient/backward_solved": "The same behind gradient/cosine_solved.",
    "gradient/missed": "Share of slots in which the linear solve behind gradient/cosine missed core.solver_tol.",
    "gradient/missed_solved": "The same behind gradient/cosine_solved.",
    "param/share_of_bound_adamw": "Largest |weight| of AdamW's parameters times weight decay: its bound says 1 "
    "(Xie & Li, arXiv:2404.04454; `hrm_rl.optim.linf_bound`).",
    "param/share_of_bound_adam_atan2": "The same of Adam-atan2's, over pi / 2: 1 is the worst case, 0.5 where a "
    "gradient no longer changes.",
    "param/share_of_bound_sign_sgd": "The same of sign-SGD's (puzzle embedding) times its own weight decay.",
    "param/share_of_bound_muon": "The same of Muon's matrices, over 0.242 sqrt(longer side), which bounds their "
    "largest singular value.",
    "optim/lr": "Learning rate of the logged update.",
    "eval/exact_accuracy": "Exact accuracy at the learned halt on the first eval_puzzles test puzzles.",
    "eval/exact_accuracy_last": "Exact accuracy on them at max_steps.",
    "eval/mean_steps": "Mean steps to the learned halt on them.",
    "system/memory_mb": "Resident memory of the process at the logged update, in MB.",
    "system/open_files": "Open files of the process at the logged update.",
    "time/samples_per_second": "Segments (slots times updates) a second since the last line, evaluation left out.",
    "time/elapsed": "Seconds of training, over all sessions of the run.",
}


class Sums:
    """Running sums on the device, read by the host once a line. `add` never waits for the device.

    Each rank adds what it sees of its own slots; `totals` and `take` give what one process with all slots would have.
    """

    def __init__(self, device: torch.device, ranks: Ranks = ALONE):
        self.device = device
        self.ranks = ranks
        self.values: dict[str, Tensor] = {}
        self._largest: set[str] = set()

    def add(self, name: str, value: Tensor) -> None:
        """Add a scalar: a sum over slots."""
        value = value.detach().double()
        self.values[name] = self.values[name] + value if name in self.values else value

    def add_mean(self, name: str, value: Tensor) -> None:
        """Add a scalar: a mean over slots, of which each rank has as many."""
        self.add(name, value if self.ranks.world == 1 else value / self.ranks.world)

    def largest(self, name: str, value: Tensor) -> None:
        """Keep the larger; of values that are not negative."""
        value = value.detach().double()
        self._largest.add(name)
        self.values[name] = torch.maximum(self.values[name], value) if name in self.values else value

    def take(self) -> dict[str, float]:
        """All sums as floats; starts anew."""
        taken, self.values = self.totals(), {}
        return taken

    def totals(self) -> dict[str, float]:
        """All sums as floats (one transfer), over all ranks."""
        if not self.values:
            return {}
        own = dict(zip(self.values, torch.stack(list(self.values.values())).tolist(), strict=True))
        if self.ranks.world == 1:
            return own
        totals = dict(zip(own, self.ranks.total(list(own.values())), strict=True))
        kept = [name for name in own if name in self._largest]
        return totals | dict(zip(kept, self.ranks.largest([own[name] for name in kept]), strict=True))

    def load(self, totals: dict[str, Tensor]) -> None:
        """Go on from `totals`: rank 0 has them, the others begin at nothing."""
        self.values = totals if self.ranks.first else {name: torch.zeros_like(t) for name, t in totals.items()}


class MetricsWriter:
    """metrics.jsonl and TensorBoard events of a run; on resume both go back to the checkpoint's position."""

    def __init__(self, run: Path, position: int = 0, step: int = 0):
        from torch.utils.tensorboard import SummaryWriter

        self.path = run / "metrics.jsonl"
        self.file = open(self.path, "ab")  # noqa: SIM115 - closed by close()
        if self.file.tell() < position:
            raise UserError(f"{self.path}: shorter than it was when the checkpoint was written; restore it to resume")
        if self.file.tell() > position:
            self.file.truncate(position)
            self.file.seek(position)
        self.board = SummaryWriter(str(run / "tensorboard"), purge_step=step + 1 if step else None)

    def write(self, step: int, values: dict[str, float]) -> None:
        """One line {"step": ..., tag: value, ...}; every tag must be in TAGS (KeyError otherwise), or agent/NAME."""
        for tag in values:
            if tag not in TAGS and not tag.startswith("agent/"):
                raise KeyError(f"metric {tag!r} is not in hrm_rl.metrics.TAGS")
            self.board.add_scalar(tag, values[tag], step)
        self.file.write((json.dumps({"step": step, **values}) + "\n").encode())
        self.file.flush()

    def position(self) -> int:
        """Bytes of metrics.jsonl written and on disk so far: what a checkpoint stores."""
        os.fsync(self.file.fileno())
        return self.file.tell()

    def close(self) -> None:
        self.file.close()
        self.board.close()


def read_metrics(run: Path) -> list[dict]:
    """The lines of a run's metrics.jsonl."""
    with open(run / "metrics.jsonl", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def markdown() -> str:
    """docs/METRICS.md."""
    lines = ["# Metrics", "", "Every tag of `metrics.jsonl` and TensorBoard. Made by `python -m hrm_rl.metrics`."]
    lines += ["Unless said otherwise a value is the mean since the last line.", ""]
    lines += ["| tag | meaning |", "| --- | --- |"]
    return "\n".join(lines + [f"| `{tag}` | {_cell(text)} |" for tag, text in TAGS.items()]) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    print(markdown(), end="")
