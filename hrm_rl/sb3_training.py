"""Training a halting agent by stable-baselines3, behind `python -m hrm_rl.train --objective q --agent sb3.DQN`.

`SB3Trainer` has the face of `hrm_rl.trainer.Trainer` that the command drives, so that a run of SB3 is a run like every
other: the same folder, metrics, checkpoints, report. SB3 does the learning: one `update` is one round of its own
`learn` loop, a rollout through the environment and the gradient steps that follow. A "step" of the run is one segment
in every slot, as everywhere, so runs of equal steps and slots have seen equally many transitions.

Resuming goes on number for number (with compile=off), for all three algorithms: weights, moments of the optimiser,
replay memory, slots and the state of every generator that SB3 draws from are in the checkpoint, as tensors and plain
values. What does not go on as if nothing had happened: SB3's averages over past episodes (`ep_info_buffer`), which
nothing here reads, and a run resumed with other total_steps, since SB3's schedules are shares of the whole. They follow
total_steps alone; a time_budget ends the run where it stands.
"""

from __future__ import annotations

import contextlib
import math
import random
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor, nn

from agents import make_agent
from agents.sb3 import SB3Agent
from hrm_rl import evaluation, measure
from hrm_rl.config import OptimConfig, TrainConfig
from hrm_rl.core import RecurrentCore
from hrm_rl.core.io import model_bytes
from hrm_rl.devices import pick_device
from hrm_rl.errors import NonFiniteError, UserError
from hrm_rl.optim import load_state_tensors, state_tensors
from hrm_rl.parallel import ALONE
from hrm_rl.tasks import PuzzleSet
from hrm_rl.trainer import Trainer, cannot_be_made, made_for, make_core, training_puzzles, user_puzzles

_BUFFER = ("observations", "next_observations", "actions", "rewards", "dones", "timeouts")
_COUNTERS = ("num_timesteps", "_n_updates", "_episode_num", "_n_calls", "exploration_rate")


class SB3Trainer:
    """A frozen core, an SB3 algorithm that learns on its q-token, and what the train command asks of a trainer.

    Attributes: config, core, agent, envs, learner (SB3's algorithm), step (segments run in every slot), stride (by how
    many an `update` advances it).
    """

    def __init__(
        self, config: TrainConfig, agent_class: type[SB3Agent], agent_arguments: dict | None = None,
        *, core: nn.Module | None = None, puzzles: PuzzleSet | None = None, test_puzzles: PuzzleSet | None = None,
    ):  # fmt: skip
        name = f"sb3.{agent_class.algorithm}"
        if config.objective != "q":
            raise UserError(f"agent {name} learns on a frozen core: it needs objective q, not {config.objective}")
        if config.optim != OptimConfig():
            raise UserError(f"optim: agent {name} has an optimiser of its own; its flags are --agent.learning_rate "
                            "and the like")  # fmt: skip
        if config.cuda_graph == "on":
            raise UserError(f"cuda_graph=on: agent {name} learns in stable-baselines3's own loop")
        agent_class.algorithm_class()  # SB3 is there, or one line says that it is not
        self.config = config
        self.device = pick_device(config.device)
        self.agent_arguments = dict(agent_arguments or {})
        self.puzzles = puzzles or training_puzzles(config)
        limit = config.test_limit or None
        self.test_puzzles = test_puzzles or user_puzzles(config.test_data, config.size, "test", limit, config.task)
        self.core = (core if core is not None else make_core(config, self.device)).requires_grad_(False).eval()
        if isinstance(self.core, RecurrentCore):
            self.config = config = replace(config, core=self.core.config)  # what is written down is what runs
        self.agent = make_agent(agent_class, self.core, config.max_steps, config.bootstrap, self.agent_arguments)
        self.agent.to(self.device)
        self.envs = self._make_envs()
        self.engine = self.envs.engine
        self.compiled = self._compile()
        self.fewest_clues = int(self.puzzles.clues.min())
        self.ranks, self.num_slots = ALONE, config.num_envs
        self.step = 0
        self.elapsed = 0.0
        self.samples = 0  # segments since the last line
        self._set_clues()
        from envs.sb3 import SB3VecEnv

        total = config.total_steps * config.num_envs
        self.learner = self.agent.make_learner(SB3VecEnv(self.envs), total, config.seed, self.device)
        self.off_policy = hasattr(self.learner, "replay_buffer")
        self.stride = self.learner.train_freq.frequency if self.off_policy else self.learner.n_steps
        self.callback = _episodes()
        self.callback.init_callback(self.learner)

    progress, _set_clues = Trainer.progress, Trainer._set_clues
    _compile, segment = Trainer._compile, Trainer.segment

    def _make_envs(self) -> gym.vector.VectorEnv:
        c = self.config
        try:
            return gym.make_vec(
                c.env, num_envs=c.num_envs, size=c.size, data=self.puzzles, core=self.core, max_steps=c.max_steps,
                ponder_cost=c.ponder_cost, augment=c.augment, device=str(self.device), observation="q_token",
            ).unwrapped  # fmt: skip
        except (gym.error.Error, ModuleNotFoundError, TypeError) as error:
            raise cannot_be_made(c.env, error) from error

    def update(self, detailed: bool = False, before_detailed: bool = False) -> dict[str, float]:
        """One round of SB3's `learn`: a rollout of `stride` steps and its gradient steps."""
        learner = self.learner
        if self.off_policy:
            rollout = learner.collect_rollouts(
                learner.env, callback=self.callback, train_freq=learner.train_freq, replay_buffer=learner.replay_buffer,
                learning_starts=learner.learning_starts,
            )  # fmt: skip
            if learner.num_timesteps > learner.learning_starts:
                steps = learner.gradient_steps if learner.gradient_steps >= 0 else rollout.episode_timesteps
                learner.train(gradient_steps=steps, batch_size=learner.batch_size)
        else:
            learner.collect_rollouts(learner.env, self.callback, learner.rollout_buffer, learner.n_steps)
            learner._update_current_progress_remaining(learner.num_timesteps, learner._total_timesteps)
            learner.train()
        self.step += self.stride
        self._set_clues()
        self.samples += self.stride * self.config.num_envs
        return measure.memory_and_files() if detailed else {}

    def line(self, details: dict[str, float], seconds: float) -> dict[str, float]:
        """The metrics since the last line: the episodes' own, and what SB3 records, as agent/NAME."""
        values = details | self.callback.take()
        for name, value in self.learner.logger.name_to_value.items():
            if math.isfinite(value):  # the explained variance of a rollout without variance is not
                values[f"agent/{name.rpartition('/')[2]}"] = float(value)
        values["time/samples_per_second"] = self.samples / max(seconds, 1e-9)
        values["time/elapsed"] = self.elapsed
        self.samples = 0
        return values

    def check_finite(self) -> None:
        """Raise NonFiniteError if a weight is not a number (before a checkpoint is written over a good one)."""
        for name, parameter in self.agent.named_parameters():
            if not bool(parameter.isfinite().all()):
                raise NonFiniteError(f"update {self.step}: the weights of {name} are not finite")

    # --- evaluation and state -----------------------------------------------------------------------------

    def evaluate(self, puzzles: PuzzleSet, max_steps: int, **keywords) -> evaluation.Trajectories:
        """Trajectories of `puzzles`, in batches as large as training's."""
        return evaluation.trajectories(
            self.core, self.agent, puzzles, max_steps, self.config.num_envs, self.device, **keywords
        )

    @contextlib.contextmanager
    def evaluation_weights(self) -> Iterator[None]:
        """The policy as it is: no average is kept of it."""
        yield

    def _meta(self) -> dict[str, Any]:
        """What the model file notes of the agent, so that it can be built again."""
        return {"agent": f"sb3.{self.agent.algorithm}", "agent_args": self.agent_arguments}

    def model(self, meta: dict | None = None) -> bytes:
        """The model file's content: the core and SB3's policy, as tensors."""
        own = {"max_steps": self.config.max_steps, "bootstrap": self.config.bootstrap, **self._meta()}
        own |= made_for(self.puzzles)
        return model_bytes(self.core, None, own | (meta or {}), self.agent)

    def state(self) -> tuple[dict[str, Tensor], dict]:
        """(tensors, plain values): everything a checkpoint needs to go on number for number."""
        learner = self.learner
        tensors = {f"agent.{n}": t for n, t in self.agent.state_dict().items()}
        tensors |= {f"optim.{n}": t for n, t in state_tensors([learner.policy.optimizer]).items()}
        slots = self.envs.state_dict()
        tensors |= {f"slots.{n}": t for n, t in slots.items() if isinstance(t, Tensor)}
        tensors["last.observation"] = torch.from_numpy(learner._last_obs.copy())
        tensors["last.starts"] = torch.from_numpy(np.array(learner._last_episode_starts))
        plain: dict[str, Any] = {"elapsed": self.elapsed, "counters": {}, "random": _generators(learner)}
        plain |= {"puzzles": self.puzzles.sha256, "test_puzzles": self.test_puzzles.sha256}
        plain["slots"] = {n: v for n, v in slots.items() if not isinstance(v, Tensor)}
        plain["counters"] = {n: float(getattr(learner, n)) for n in _COUNTERS if hasattr(learner, n)}
        plain["episodes"] = self.callback.sums
        if self.off_policy:
            held = learner.replay_buffer
            rows = held.buffer_size if held.full else held.pos
            tensors |= {f"replay.{n}": torch.from_numpy(getattr(held, n)[:rows].copy()) for n in _BUFFER}
            plain["replay"] = [held.pos, bool(held.full)]
        return tensors, plain

    def load_state(self, tensors: dict[str, Tensor], plain: dict) -> None:
        """The inverse of `state`. UserError where the checkpoint belongs to other puzzles or another model."""
        def part(prefix: str) -> dict[str, Tensor]:
            return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}

        for held, puzzles in (("puzzles", self.puzzles), ("test_puzzles", self.test_puzzles)):
            if plain[held] != puzzles.sha256:
                raise UserError(f"{puzzles.name}: the puzzles are not those the run was started with (other SHA-256)")
        try:
            self.agent.load_state_dict(part("agent."))
        except RuntimeError as error:
            reason = str(error).splitlines()[-1].strip()
            raise UserError(f"the checkpoint holds another model: {reason}") from error
        learner = self.learner
        load_state_tensors([learner.policy.optimizer], part("optim."))
        self.envs.load_state_dict({**plain["slots"], **{n: t.to(self.device) for n, t in part("slots.").items()}})
        last = part("last.")
        learner._last_obs, learner._last_episode_starts = last["observation"].numpy(), last["starts"].numpy()
        for name, value in plain["counters"].items():
            setattr(learner, name, type(getattr(learner, name))(value))
        self.callback.sums = dict(plain["episodes"])
        if self.off_policy:
            for name, value in part("replay.").items():
                getattr(learner.replay_buffer, name)[: len(value)] = value.numpy()
            learner.replay_buffer.pos, learner.replay_buffer.full = plain["replay"]
        learner._update_current_progress_remaining(learner.num_timesteps, learner._total_timesteps)
        self.step, self.elapsed = plain["step"], plain["elapsed"]
        self._set_clues()
        _set_generators(learner, plain["random"])


def _episodes():
    """A callback of SB3's that sums up the episodes that end (made here, so that SB3 is imported where it is used)."""
    from stable_baselines3.common.callbacks import BaseCallback

    class Episodes(BaseCallback):
        """sums: over the episodes since the last `take`, by the tags of `hrm_rl.metrics`."""

        def __init__(self):
            super().__init__()
            self.sums: dict[str, float] = {}

        def _on_step(self) -> bool:
            for done, info in zip(self.locals["dones"], self.locals["infos"], strict=True):
                if done:
                    values = {"halt/episodes": 1, "halt/exact_accuracy": info["is_correct"],
                              "halt/token_accuracy": info["token_accuracy"],
                              "halt/mean_steps": info["steps"]}  # fmt: skip
                    for tag, value in values.items():
                        self.sums[tag] = self.sums.get(tag, 0.0) + float(value)
            return True

        def take(self) -> dict[str, float]:
            """Means over the episodes, and how many there were; starts anew."""
            held, self.sums = self.sums, {}
            count = held.get("halt/episodes", 0.0)
            return {tag: value if tag == "halt/episodes" else value / count for tag, value in held.items()}

    return Episodes()


def _generators(model) -> dict[str, Any]:
    """The state of every generator that SB3 draws from, as JSON: NumPy's and Python's global ones, torch's, and that
    of the action space."""
    kind, keys, position, has_gauss, gauss = np.random.get_state()
    state = {"numpy": [kind, keys.tolist(), position, has_gauss, gauss], "torch": torch.get_rng_state().tolist()}
    version, numbers, spare = random.getstate()
    state["python"] = [version, list(numbers), spare]
    state["actions"] = model.action_space.np_random.bit_generator.state
    if model.device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(model.device).tolist()
    return state


def _set_generators(model, state: dict[str, Any]) -> None:
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(torch.tensor(state["torch"], dtype=torch.uint8))
    version, numbers, spare = state["python"]
    random.setstate((version, tuple(numbers), spare))
    model.action_space.np_random.bit_generator.state = state["actions"]
    if "cuda" in state and model.device.type == "cuda":
        torch.cuda.set_rng_state(torch.tensor(state["cuda"], dtype=torch.uint8), model.device)
