"""The configuration of a training run: frozen dataclasses, one sentence a field, unknown keys refused.

A YAML file holds only what differs from these defaults, which are the recipe of the default run. The
resolved configuration is written beside the checkpoints.
"""

from __future__ import annotations

import importlib
import re
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import gymnasium as gym
from gymnasium.envs.registration import load_env_creator

from agents.q_targets import Bootstrap
from hrm_rl.core import CoreConfig
from hrm_rl.core.io import core_config
from hrm_rl.devices import pick_device, pick_dtype
from hrm_rl.errors import UserError, nearest
from hrm_rl.settings import check_settings, shortened
from hrm_rl.tasks.registry import DEFAULT_TASK, Task, check_side, get_task, task_class


@dataclass(frozen=True)
class OptimConfig:
    """The optimiser: one step a segment (deep supervision).

    Args:
        optimizer: adamw for every parameter, adam_atan2 likewise (what the paper trains with), or muon for the
            matrices of f_H and f_L and AdamW for the rest (torch >= 2.9).
        lr: Peak learning rate of AdamW and Adam-atan2.
        muon_lr: Peak learning rate of Muon.
        muon_momentum: Momentum of Muon.
        weight_decay: Decoupled weight decay, on every parameter as released.
        embedding: What trains the puzzle embedding: adamw like the rest, or sign_sgd (the release).
        embedding_lr: Peak learning rate of sign_sgd.
        embedding_weight_decay: Weight decay of sign_sgd.
        beta1: Decay of the first moment.
        beta2: Decay of the second moment.
        eps: Added to the root of the second moment (AdamW).
        warmup_steps: Updates over which the learning rate rises linearly from 0.
        schedule: What follows the warm-up: constant (the release), or a linear or cosine decay.
        final_lr: Where a decay ends, as a share of lr.
        grad_clip: Largest gradient norm; 0 is off, as released.
        ema: Decay of the running average of the weights that evaluation uses; 0 is off.
    """

    optimizer: Literal["adamw", "muon", "adam_atan2"] = "muon"
    lr: float = 2e-3
    muon_lr: float = 5e-3
    muon_momentum: float = 0.95
    weight_decay: float = 0.1
    embedding: Literal["adamw", "sign_sgd"] = "adamw"
    embedding_lr: float = 1e-4
    embedding_weight_decay: float = 1.0
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    warmup_steps: int = 100
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    final_lr: float = 0.0
    grad_clip: float = 0.0
    ema: float = 0.99

    def __post_init__(self) -> None:
        _check("optim", self, lr=(0, None), muon_lr=(0, None), muon_momentum=(0, 1), weight_decay=(0, None),
               embedding_lr=(0, None), embedding_weight_decay=(0, None), beta1=(0, 1), beta2=(0, 1), eps=(0, None),
               warmup_steps=(0, None), final_lr=(0, 1), grad_clip=(0, None), ema=(0, 1))  # fmt: skip


def small_core() -> CoreConfig:
    """The core of the default run: 0.11 M parameters, small enough for two CPU cores (docs/LAB_NOTES.md)."""
    return CoreConfig(
        hidden_size=96, num_heads=6, expansion=2.0, inner_multiple=64, H_cycles=2, L_cycles=2, H_layers=1, L_layers=1,
        token_mixing="grid", grid_strength=8.0, puzzle_emb_ndim=96,
    )  # fmt: skip


@dataclass(frozen=True)
class TrainConfig:
    """A training run.

    Args:
        env: Registered id of the environment, which also decides the task: SudokuHalt-v0, MazeHalt-v0, NQueensHalt-v0,
            FutoshikiHalt-v0, MiniSudokuHalt-v0 or one of your own.
        size: Side of the puzzles: 4, 6 or 9 for Sudoku, 5 to 30 for mazes; 0 is the task's usual one (9 and 10).
        data: Training puzzles: a .csv or .csv.gz file, hf://owner/name, or nothing for the shipped set.
        test_data: Unseen puzzles for the report: likewise.
        train_limit: Train on this many puzzles, picked at random by a fixed seed; 0 takes all.
        test_limit: At most this many test puzzles; 0 takes all.
        augment: Draw a random symmetry of every puzzle (Sudoku: digits, bands, rows, stacks, columns, transpose).
        clues: Fewest and most givens of the training puzzles, as [30,40]: more of the answer is shown at random until a
            puzzle has that many. [0,0] shows them as they are.
        curriculum: Share of the cells given when training begins, fewest and most: it starts on easier puzzles,
            with more of the answer shown, and moves to the puzzles as they are (or to clues). [0,0]: off, as it is
            where the task has no givens to show more of.
        curriculum_ramp: Share of the run over which it gets there.
        out: Folder in which the run's own folder is made.
        name: Name of the run's folder; empty makes one from the objective, the seed and the time.
        init_core: Weights to start from (a run, checkpoint or model file). Only objective=q starts from
            the packaged core where none is named; training the core starts from scratch. The sizes are those of the
            file; core.gradient, gradient_k and solver* are the run's own where they are not the usual ones.
        objective: joint (supervised and Q), supervised (the Q-head is untouched), q (the core is frozen
            and not held by the optimiser).
        q_to_core: Whether the gradient of the Q-loss reaches the core (joint only).
        bootstrap: Where the target of CONTINUE comes from: extra_forward (the release), shared_prefix,
            shared_prefix_all (the same, and one more segment of slots that halt), next_observation (never reaches the
            core), none (no continue loss).
        loss: The supervised loss: softmax or stablemax cross entropy.
        supervised_weight: Weight of the supervised loss.
        halt_weight: Weight of the loss of q_halt (0.5 in the release).
        continue_weight: Weight of the loss of q_continue (0.5 in the release).
        num_envs: Slots of the environment: the batch size, over all ranks where torchrun starts several.
        max_steps: Segments after which an episode is forced to halt.
        ponder_cost: Price of every CONTINUE, in the environment's reward (not in HRM's targets).
        total_steps: Optimiser updates; each runs one segment in every slot. 0 picks 6600, or 1200 where
            objective=q.
        time_budget: Seconds after which training ends whatever total_steps says; 0 is no limit. The
            learning-rate decay then follows whichever is further on.
        seed: Fixes weights, puzzles, symmetries and exploration.
        device: auto takes a GPU where there is one, otherwise the CPU.
        compile: Compile the core with torch.compile: auto does so where a compiler is found.
        cuda_graph: on: replay updates as one CUDA graph (a GPU, one process, an agent that can be captured).
        deterministic: Only kernels that give the same numbers every time: auto is on for a CPU and off for a GPU.
        log_every: Updates between two lines of metrics.
        eval_every: Updates between two evaluations during training; 0 is off.
        eval_puzzles: Test puzzles in an evaluation during training.
        checkpoint_every: Updates between two checkpoints; 0 saves at the end only.
        report_steps: Segments in the report's table, where that is more than max_steps.
        log_gradient_cosine: Measure at logged updates how near the 1-step gradient is to the implicit and to the full
            one (it costs about as much as ten updates).
        optim: The optimiser.
        core: The core.
    """

    env: str = "SudokuHalt-v0"
    size: int = 0
    data: str | None = None
    test_data: str | None = None
    train_limit: int = 0
    test_limit: int = 1000
    augment: bool = True
    clues: tuple[int, int] = (0, 0)
    curriculum: tuple[float, float] = (0.62, 0.74)
    curriculum_ramp: float = 0.35
    out: str = "runs"
    name: str = ""
    init_core: str | None = None
    objective: Literal["joint", "supervised", "q"] = "joint"
    q_to_core: bool = True
    bootstrap: Bootstrap = "shared_prefix"
    loss: Literal["softmax", "stablemax"] = "softmax"
    supervised_weight: float = 1.0
    halt_weight: float = 0.5
    continue_weight: float = 0.5
    num_envs: int = 32
    max_steps: int = 16
    ponder_cost: float = 0.0
    total_steps: int = 0
    time_budget: float = 0.0
    seed: int = 0
    device: str = "auto"
    compile: Literal["auto", "on", "off"] = "auto"
    cuda_graph: Literal["on", "off"] = "off"
    deterministic: Literal["auto", "on", "off"] = "auto"
    log_every: int = 50
    eval_every: int = 1000
    eval_puzzles: int = 256
    checkpoint_every: int = 500
    report_steps: int = 0
    log_gradient_cosine: bool = False
    optim: OptimConfig = field(default_factory=OptimConfig)
    core: CoreConfig = field(default_factory=small_core)

    def __post_init__(self) -> None:
        at_least_0 = (
            "train_limit", "test_limit", "supervised_weight", "halt_weight", "continue_weight", "ponder_cost",
            "time_budget", "eval_every", "checkpoint_every", "report_steps", "total_steps",
        )  # fmt: skip
        at_least_1 = ("num_envs", "max_steps", "log_every", "eval_puzzles")
        ranges = {name: (0, None) for name in at_least_0} | {name: (1, None) for name in at_least_1}
        _check("", self, curriculum_ramp=(0, 1), seed=(0, 2**62), **ranges)
        if not self.name.isprintable() or len(self.name) > 200:
            raise UserError(f"name must be a folder's plain name, not {shortened(self.name)}")
        if "/" in self.name or "\\" in self.name or self.name in (".", ".."):
            raise UserError(f"name must be a folder's plain name, not {self.name!r} (out says where it is made)")
        if self.total_steps == 0:
            object.__setattr__(self, "total_steps", 1200 if self.objective == "q" else 6600)
        if self.size == 0:
            object.__setattr__(self, "size", task_class(self.task).default_side)
        check_side(task_class(self.task).sides, self.size, "size")
        rules = self.rules
        if not rules.reveals:
            if self.curriculum == type(self).curriculum:
                object.__setattr__(self, "curriculum", (0.0, 0.0))
            for name in ("clues", "curriculum"):
                if tuple(getattr(self, name)) != (0, 0):
                    raise UserError(f"{name}: the task {self.task} has no givens to show more of; use [0,0]")
        for name, most in (("clues", rules.cells), ("curriculum", 1)):
            low, high = getattr(self, name)
            if not 0 <= low <= high <= most:
                raise UserError(f"{name} must be two numbers, 0 <= low <= high <= {most}, not {low} and {high}")
        if self.core.seq_len != rules.seq_len or self.core.vocab_size != rules.vocab_size:
            raise UserError(
                f"core.seq_len={self.core.seq_len} and core.vocab_size={self.core.vocab_size} do not fit size="
                f"{self.size}, which needs {rules.seq_len} and {rules.vocab_size}"
            )

    @property
    def task(self) -> str:
        """Name or import path of the task of the environment."""
        return task_of_env(self.env)

    @property
    def rules(self) -> Task:
        """The task at this size."""
        return get_task(self.task, self.size)

    @classmethod
    def from_values(cls, values: dict[str, Any]) -> TrainConfig:
        """From plain nested values as YAML and flags give them; core.dtype "auto" is decided by the device.

        The task and its size set core.seq_len and core.vocab_size where they stand at their defaults, and core.geometry
        where that is auto.
        Raises UserError for a value out of range.
        """
        values = dict(values)
        check_settings(cls, {name: value for name, value in values.items() if name not in ("optim", "core")})
        for group in ("optim", "core"):
            if not isinstance(values.get(group, {}), dict):
                raise UserError(f"{group} must hold settings of its own, not {values[group]!r}")
        optim, core = dict(values.pop("optim", {})), asdict(small_core()) | dict(values.pop("core", {}))
        for name in ("clues", "curriculum"):
            if name in values:
                values[name] = tuple(values[name])
        kind = task_class(task := task_of_env(values.get("env", cls.env)))
        side = values.get("size", cls.size) or kind.default_side
        check_side(kind.sides, side, "size")
        rules = get_task(task, side)
        if core.get("geometry") == CoreConfig.geometry and kind.geometry != "boxes":
            core["geometry"] = kind.geometry
        for name, needed in (("seq_len", rules.seq_len), ("vocab_size", rules.vocab_size)):
            if core.get(name, getattr(CoreConfig, name)) == getattr(CoreConfig, name):
                core[name] = needed
        device = pick_device(values.get("device", cls.device))
        core["dtype"] = pick_dtype(core.get("dtype", CoreConfig.dtype), device)
        check_settings(OptimConfig, optim, "optim")
        try:
            config = cls(**values, optim=OptimConfig(**optim), core=core_config(core))
        except ValueError as error:
            raise UserError(str(error)) from error
        if config.from_scratch:  # a core that is loaded brings its own gradient: `trainer.make_core`
            check_gradient_k(config.core, CoreConfig.gradient_k)
        return config

    @property
    def from_scratch(self) -> bool:
        """Whether the core starts with fresh weights; objective=q needs a trained one."""
        return not self.init_core and self.objective != "q"

    def to_values(self) -> dict[str, Any]:
        """Plain nested values for YAML; `from_values` reads them back."""
        values = asdict(self)
        for group, name in ((values["core"], "box"), (values, "clues"), (values, "curriculum")):
            group[name] = list(group[name])  # YAML has no tuples
        return values


def check_gradient_k(core: CoreConfig, usual: int) -> None:
    """UserError for a gradient_k other than the `usual` one where nothing looks at it."""
    if core.gradient != "last_k" and core.gradient_k != usual:
        raise UserError(f"core.gradient_k has no effect with core.gradient={core.gradient}; it counts with last_k")


def task_of_env(env: str) -> str:
    """The task of a registered environment. UserError for an id that is not registered or cannot be loaded."""
    try:
        module, _, name = env.rpartition(":")
        if module:  # "my_task:MyHalt-v0": importing the module registers the id
            importlib.import_module(module)
        entry = gym.spec(name).entry_point
        return getattr(load_env_creator(entry) if isinstance(entry, str) else entry, "task", DEFAULT_TASK)
    except (gym.error.Error, ImportError, AttributeError, ValueError, TypeError) as error:
        raise cannot_be_made(env, error) from error


def cannot_be_made(env: str, error: Exception) -> UserError:
    """Why an environment cannot be made, with a hint for a misspelt id: one of this project's, else Gymnasium's own."""
    ours = [known for known, spec in gym.registry.items() if str(spec.entry_point).startswith("envs")]
    hint = "" if env in gym.registry else nearest(env, ours)
    said = re.sub(r" Did you mean: .*", "", str(error)) if hint else str(error)
    return UserError(f"env {env!r} cannot be made: {said.rstrip('.')}{hint}")


_LARGEST = 2**31 - 1  # of a whole number, so that no count or index overflows


def _check(group: str, config: object, **ranges: tuple[float | None, float | None]) -> None:
    """Raise UserError for the first number outside its range (ends included) or without end."""
    for name, (low, high) in ranges.items():
        value = getattr(config, name)
        if not ((low is None or value >= low) and (high is None or value <= high)):  # so that NaN is out as well
            said = f"at least {low}" if high is None else f"between {low} and {high}"
            raise UserError(f"{group + '.' if group else ''}{name} must be {said}, not {value}")
        if high is None and value > _LARGEST:
            raise UserError(f"{group + '.' if group else ''}{name} must be at most {_LARGEST}, not {value}")
