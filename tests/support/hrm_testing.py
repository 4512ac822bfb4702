"""What several test files share: golden vectors, small puzzles, small runs, a trainer fed by hand.

Letters: B slots, S tokens, T calls of a recorded trace.
"""

from __future__ import annotations

import io
import itertools
from pathlib import Path
from types import MethodType

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from agents import QHaltingAgent
from agents.q_targets import BOOTSTRAPS
from hrm_rl.config import OptimConfig, TrainConfig
from hrm_rl.core import CoreConfig, HRMCore
from hrm_rl.core.counting import CountingCore
from hrm_rl.core.q_head import QHead
from hrm_rl.core.released import from_released
from hrm_rl.parallel import ALONE, Ranks
from hrm_rl.tasks import PuzzleSet

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests" / "golden"
FORWARD, FIRST_SEGMENT = 5e-5, 1e-5  # absolute tolerances of the golden README

# --- golden vectors -----------------------------------------------------------------------------------------


def golden(name: str) -> dict[str, Tensor]:
    """One golden file: names to tensors (integers as int64; text is left out)."""
    tensors = {}
    for key, value in np.load(io.BytesIO((GOLDEN / f"{name}.npz").read_bytes())).items():
        if value.dtype.kind in "biuf":
            value = torch.from_numpy(value)
            tensors[key] = value.long() if value.dtype == torch.int32 else value
    return tensors


def golden_text(name: str, key: str) -> list[str]:
    """An array of text of a golden file."""
    return [str(word) for word in np.load(GOLDEN / f"{name}.npz")[key]]


def within(values: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The entries under `prefix`, without it."""
    return {key.removeprefix(prefix): value for key, value in values.items() if key.startswith(prefix)}


def tiny_config(**changes) -> CoreConfig:
    """The tiny configuration of the golden README."""
    values = dict(vocab_size=6, seq_len=16, hidden_size=32, num_heads=2, expansion=4.0, inner_multiple=256,
                  H_cycles=2, L_cycles=2, H_layers=2, L_layers=2, positions="rope", puzzle_emb_ndim=32,
                  dtype="float32")  # fmt: skip
    return CoreConfig(**values | changes)


def released_model(tensors: dict[str, Tensor], **changes) -> tuple[HRMCore, QHead]:
    """Core and Q-head with the weights of a released state dict."""
    core, head = HRMCore(tiny_config(**changes)), QHead(32)
    core_tensors, head_tensors = from_released(tensors)
    core.load_state_dict(core_tensors)
    head.load_state_dict(head_tensors)
    return core, head


def tiny_model() -> tuple[HRMCore, QHead]:
    return released_model(golden("weights_tiny"))


def close(got: Tensor, wanted: Tensor, atol: float = FORWARD, what: str = "") -> None:
    """Largest absolute difference at most `atol`; shapes equal."""
    assert got.shape == wanted.shape, f"{what}: {tuple(got.shape)} against {tuple(wanted.shape)}"
    worst = (got.detach().double() - wanted.double()).abs().max().item()
    assert worst <= atol, f"{what}: off by {worst:.3g} (allowed {atol:.3g})"


def relative(got: float | Tensor, wanted: float | Tensor, rtol: float, what: str = "") -> None:
    got, wanted = (float(x.detach()) if isinstance(x, Tensor) else float(x) for x in (got, wanted))
    assert abs(got - wanted) <= rtol * abs(wanted), f"{what}: {got} against {wanted}"


# --- small puzzles and runs ---------------------------------------------------------------------------------


def small_puzzles(count: int, blanks: int = 6, seed: int = 0, padding: int = 0) -> PuzzleSet:
    """`count` different 4x4 Sudokus with some blanks (not necessarily unique), then `padding` empty rows."""
    generator = np.random.default_rng(seed)
    base = np.array([[1, 2, 3, 4], [3, 4, 1, 2], [2, 1, 4, 3], [4, 3, 2, 1]])
    grids = [
        (np.array(digits)[base - 1][[*rows, *rows2]]).ravel()
        for digits in itertools.permutations((1, 2, 3, 4))
        for rows in ((0, 1), (1, 0))
        for rows2 in ((2, 3), (3, 2))
    ]
    chosen = generator.permutation(len(grids))[:count]
    answers = np.stack([grids[i] for i in chosen]) + 1
    questions = answers.copy()
    for row in questions:
        row[generator.permutation(16)[:blanks]] = 1
    nothing = np.zeros((padding, 16), dtype=answers.dtype)
    questions, answers = (np.concatenate((part, nothing)).astype(np.uint8) for part in (questions, answers))
    total = count + padding
    return PuzzleSet(
        task="sudoku", side=4, questions=torch.from_numpy(questions), answers=torch.from_numpy(answers),
        ratings=torch.zeros(total), sources=("test",) * total, name="small puzzles",
    )  # fmt: skip


def small_core(**changes) -> CoreConfig:
    """A core of a few thousand parameters for 4x4 puzzles."""
    values = dict(vocab_size=6, seq_len=16, hidden_size=16, num_heads=2, inner_multiple=16, H_layers=1, L_layers=1,
                  puzzle_emb_ndim=16, dtype="float32")  # fmt: skip
    return CoreConfig(**values | changes)


def small_config(optim: dict | None = None, core: dict | None = None, **changes) -> TrainConfig:
    """A short run on 4x4 puzzles, on the CPU, not compiled."""
    values = dict(size=4, num_envs=4, max_steps=4, total_steps=100, device="cpu", compile="off", seed=3,
                  curriculum=(0.0, 0.0))  # fmt: skip
    plain = dict(optimizer="adamw", lr=1e-2, warmup_steps=0, schedule="constant", ema=0.0)
    settings = OptimConfig(**plain | (optim or {}))
    return TrainConfig(**values | changes, optim=settings, core=small_core(**(core or {})))


def small_trainer(agent=QHaltingAgent, arguments: dict | None = None, puzzles: PuzzleSet | None = None,
                  core: torch.nn.Module | None = None, optim: dict | None = None, ranks: Ranks = ALONE,
                  **changes):  # fmt: skip
    """A Trainer of `small_config`; objective=q gets a fresh core in place of the packaged one."""
    from hrm_rl.trainer import Trainer

    config = small_config(optim, **changes)
    if core is None and config.objective == "q":
        core = HRMCore(config.core, torch.Generator().manual_seed(config.seed)).to(config.device)
    puzzles = puzzles or small_puzzles(16)
    return Trainer(
        config, agent, arguments, core=core, puzzles=puzzles, test_puzzles=small_puzzles(12, seed=1), ranks=ranks
    )


def lively_trainer(**changes):
    """A small trainer whose Q-head halts here and there from the start."""
    trainer = small_trainer(arguments={"q_bias": 0.0, "epsilon": 0.5}, **changes)
    with torch.no_grad():
        trainer.agent.q_head.weight.normal_(generator=torch.Generator().manual_seed(1))
    return trainer


def counting_core(puzzles: PuzzleSet, right_from: int, right_until: int | None = None) -> CountingCore:
    """A CountingCore that looks the answers of `puzzles` up (use it without augmentation)."""
    questions, answers = puzzles.questions.long(), puzzles.answers.long()

    def solve(tokens: Tensor) -> Tensor:
        return answers[(tokens[:, None] == questions).all(-1).int().argmax(-1)]

    return CountingCore(16, 6, solve, right_from, right_until, max_count=8)


# --- a trainer fed by hand ----------------------------------------------------------------------------------


def fed_trainer(inputs: Tensor, labels: Tensor, agent=QHaltingAgent, arguments: dict | None = None, *,
                core: torch.nn.Module | None = None, head: QHead | None = None, puzzle_embedding_learns=False,
                mask_padding=False, optim: dict | None = None, **changes):  # fmt: skip
    """A trainer whose environment takes call t's puzzles from inputs[t], labels[t] (T, B, S).

    The padding mask is off unless asked for, as in the release (`valid` is True for every row), so that a row
    without labels counts as right and trains the Q-head. The golden runs keep the puzzle embedding fixed, so
    it is taken out of the optimiser unless asked for. All else is the trainer and the environment of users.
    """
    if core is None:
        core, head = tiny_model()
    settings = dict(num_envs=inputs.shape[1], max_steps=4, loss="stablemax", bootstrap="extra_forward", augment=False)
    if agent is QHaltingAgent:
        arguments = {"epsilon": 0.0, **(arguments or {})}
    optimiser = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1} | (optim or {})
    core = core.to(changes.get("device", "cpu"))
    trainer = small_trainer(agent, arguments, core=core, optim=optimiser, **settings | changes)
    inputs, labels = inputs.to(trainer.device), labels.to(trainer.device)
    if head is not None and hasattr(trainer.agent, "q_head"):
        trainer.agent.q_head.load_state_dict(head.state_dict())
    if not puzzle_embedding_learns:
        fixed = trainer.trained.pop("core.puzzle_emb.weights", None)
        (group,) = trainer.optimizers[0].param_groups
        group["params"] = [p for p in group["params"] if p is not fixed]
    engine, calls = trainer.engine, itertools.count()
    own_draw = engine._draw

    def draw(self, key, episode, puzzle, augment):
        call = min(next(calls), len(inputs) - 1)
        start = own_draw(key, episode, torch.zeros_like(key), False)
        valid = (labels[call] != -100).any(-1) | (not mask_padding)
        return start._replace(tokens=inputs[call], labels=labels[call], valid=valid)

    engine._draw = MethodType(draw, engine)
    trainer.envs.reset(seed=0)
    return trainer


def losses_of(trainer) -> dict[str, float]:
    """The loss terms of the latest update, per slot; call it after every update."""
    taken = trainer.sums.take()
    return {name.removeprefix("loss/"): value for name, value in taken.items() if name.startswith("loss/")}


#: The bootstrap modes as parameters of tests; what is hardly another one is left to the slow run.
MODES = [pytest.param(mode, marks=pytest.mark.slow) if mode == "shared_prefix_all" else mode for mode in BOOTSTRAPS]


# --- the device ---------------------------------------------------------------------------------------------


class NoWaiting(TorchDispatchMode):
    """Refuses what would make the host wait for a device: reading a value, shapes that depend on values."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name()
        boolean = name.startswith("aten::index.") and any(i is not None and i.dtype == torch.bool for i in args[1])
        if boolean or name in ("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal"):
            raise AssertionError(f"{name} waits for the device")
        return func(*args, **(kwargs or {}))
