"""Agents of stable-baselines3: DQN, PPO and A2C on the q-token of a frozen core.

SB3 trains the policy (`hrm_rl.sb3_training`, behind `python -m hrm_rl.train --objective q --agent sb3.DQN`); here it
decides. The policy is SB3's own network, so evaluation runs what was trained; it acts deterministically and ties go
to HALT, action 0, as SB3's argmax has it. Importing this file does not import stable-baselines3.

Departures from SB3's defaults, each for this problem: gamma is 1 (the paper's; an episode has at most max_steps
decisions), and the rollouts are short, since many slots run at once.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from agents.base import HaltingAgent, Transition, View
from envs.actions import ACTION_NAMES, CONTINUE, HALT
from hrm_rl.errors import UserError
from hrm_rl.settings import shortened

ACTIVATIONS = {"relu": nn.ReLU, "tanh": nn.Tanh}
_MOST_LAYERS, _WIDEST = 8, 4096  # so that a model file cannot ask for more memory than it has itself
_NOT_SETTINGS = ("self", "core", "max_steps", "threshold", "net_arch", "activation", "schedule")


class SB3Agent(HaltingAgent):
    """What the three have in common. The constructor of a subclass takes, beside the arguments here, the settings of
    its algorithm under SB3's names; they matter to training only, net_arch and activation to evaluation too.

    Args:
        core: The core; read for its hidden size and bound.
        max_steps: The budget of the episodes.
        threshold: Halt where the score reaches this; 0 is the policy's own deterministic action.
        net_arch: Sizes of the hidden layers; None is [64,64], [] a linear policy, as HRM's Q-head is.
        activation: Between the layers: relu or tanh.
        settings: Of the algorithm, by SB3's names.
    """

    learns = True
    bootstraps = False
    #: SB3's name of the algorithm.
    algorithm: ClassVar[str]

    def __init__(
        self, core: nn.Module, max_steps: int, threshold: float, net_arch: list[int] | None, activation: str,
        schedule: str, settings: dict[str, Any],
    ):  # fmt: skip
        super().__init__(max_steps, threshold)
        net_arch = [64, 64] if net_arch is None else list(net_arch)
        if len(net_arch) > _MOST_LAYERS or not all(1 <= size <= _WIDEST for size in net_arch):
            raise UserError(f"agent.net_arch must hold at most {_MOST_LAYERS} sizes between 1 and {_WIDEST}, not "
                            f"{shortened(net_arch)}")  # fmt: skip
        self.schedule, self.settings = schedule, settings
        self.policy_kwargs = {"net_arch": net_arch, "activation_fn": ACTIVATIONS[activation]}
        from gymnasium import spaces

        bound = float(getattr(core, "observation_bound", np.inf))
        self.observation_space = spaces.Box(-bound, bound, (core.hidden_size,), np.float32)
        self.action_space = spaces.Discrete(len(ACTION_NAMES))
        policy_class = self.algorithm_class().policy_aliases["MlpPolicy"]
        with torch.random.fork_rng(devices=[]):  # its weights are trained or loaded: leave the caller's numbers alone
            self.policy = policy_class(
                self.observation_space, self.action_space, lambda _: 0.0, **self.policy_kwargs
            )  # fmt: skip
        self.policy.set_training_mode(False)

    @classmethod
    def algorithm_class(cls) -> type:
        """SB3's class. UserError where stable-baselines3 is not installed."""
        try:
            import stable_baselines3
        except ImportError as error:
            raise UserError(
                f"agent sb3.{cls.algorithm} needs stable-baselines3 ({error}); pip install stable-baselines3"
            ) from error
        return getattr(stable_baselines3, cls.algorithm)

    def make_learner(self, envs, total_timesteps: int, seed: int, device: torch.device):
        """SB3's algorithm over `envs` (SB3's VecEnv), ready to learn; from here on the agent acts with its policy."""
        from stable_baselines3.common.logger import Logger

        rate = self.settings["learning_rate"]
        settings = self.settings | {"learning_rate": (lambda left: rate * left) if self.schedule == "linear" else rate}
        try:
            learner = self.algorithm_class()(
                "MlpPolicy", envs, policy_kwargs=dict(self.policy_kwargs), seed=seed, device=device, **settings
            )
        except (ValueError, AssertionError, TypeError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise UserError(f"agent_args of {type(self).__name__}: SB3 refuses the settings ({reason})") from error
        learner.set_logger(Logger(folder=None, output_formats=[]))  # the run has its own writers
        learner._setup_learn(total_timesteps, reset_num_timesteps=True)
        self.policy = learner.policy
        return learner

    def score(self, view: View) -> Tensor:
        """How much the policy prefers HALT: in value for DQN, in log-odds for PPO and A2C."""
        self.policy.set_training_mode(False)
        halt = self._preference(view.z_H[:, 0].float())
        return halt[:, HALT] - halt[:, CONTINUE]

    def _preference(self, q_token: Tensor) -> Tensor:
        """q_token (B, D) float32 -> (B, 2) float32, in the order of the actions."""
        raise NotImplementedError

    def loss(self, transition: Transition):
        raise UserError(f"agent sb3.{self.algorithm} is trained by stable-baselines3 on a frozen core: use "
                        f"python -m hrm_rl.train --objective q --agent sb3.{self.algorithm}")  # fmt: skip


class DQNAgent(SB3Agent):
    """SB3's DQN (arXiv:1312.5602): replay and a target network. Its score is Q(HALT) - Q(CONTINUE), in reward.

    Args:
        core: The core.
        max_steps: The budget of the episodes.
        threshold: Halt where the score reaches this.
        net_arch: Sizes of the hidden layers.
        activation: Between the layers.
        schedule: Learning rate over the run: constant, or linear to 0.
        learning_rate: Of Adam.
        buffer_size: Transitions held for replay (4 (2 D + 4) bytes each; saved with every checkpoint).
        learning_starts: Transitions collected at random before learning begins.
        batch_size: Transitions of a gradient step.
        tau: Share of the weights that goes over into the target network.
        gamma: Discount.
        train_freq: Steps of all slots between two rounds of gradient steps.
        gradient_steps: Gradient steps in a round.
        n_steps: Rewards in a target before it bootstraps.
        target_update_interval: Transitions between two updates of the target network.
        exploration_fraction: Share of the run over which exploration falls.
        exploration_initial_eps: Probability that a step's actions are random, at first.
        exploration_final_eps: And at last.
        max_grad_norm: Largest norm of the gradient.
    """

    algorithm = "DQN"

    def __init__(
        self, core: nn.Module, max_steps: int, threshold: float = 0.0, net_arch: list[int] | None = None,
        activation: Literal["relu", "tanh"] = "relu", schedule: Literal["constant", "linear"] = "linear",
        learning_rate: float = 1e-3, buffer_size: int = 50_000, learning_starts: int = 1000, batch_size: int = 256,
        tau: float = 1.0, gamma: float = 1.0, train_freq: int = 1, gradient_steps: int = 2, n_steps: int = 1,
        target_update_interval: int = 320, exploration_fraction: float = 0.5, exploration_initial_eps: float = 0.3,
        exploration_final_eps: float = 0.1, max_grad_norm: float = 10.0,
    ):  # fmt: skip
        super().__init__(core, max_steps, threshold, net_arch, activation, schedule, _settings(locals()))

    def _preference(self, q_token: Tensor) -> Tensor:
        return self.policy.q_net(q_token)


class _ActorCriticAgent(SB3Agent):
    def _preference(self, q_token: Tensor) -> Tensor:
        return self.policy.get_distribution(q_token).distribution.logits


class PPOAgent(_ActorCriticAgent):
    """SB3's PPO (arXiv:1707.06347). Its score is log p(HALT) - log p(CONTINUE).

    Args:
        core: The core.
        max_steps: The budget of the episodes.
        threshold: Halt where the score reaches this.
        net_arch: Sizes of the hidden layers, of policy and value alike.
        activation: Between the layers.
        schedule: Learning rate over the run: constant, or linear to 0.
        learning_rate: Of Adam.
        n_steps: Steps of all slots in a rollout.
        batch_size: Transitions of a gradient step.
        n_epochs: Times a rollout is gone through.
        gamma: Discount.
        gae_lambda: Of the generalised advantage estimate.
        clip_range: How far the ratio of new to old probability counts.
        normalize_advantage: Whether a batch's advantages are brought to mean 0 and variance 1.
        ent_coef: Weight of the entropy.
        vf_coef: Weight of the value's loss.
        max_grad_norm: Largest norm of the gradient.
    """

    algorithm = "PPO"

    def __init__(
        self, core: nn.Module, max_steps: int, threshold: float = 0.0, net_arch: list[int] | None = None,
        activation: Literal["relu", "tanh"] = "tanh", schedule: Literal["constant", "linear"] = "linear",
        learning_rate: float = 1e-3, n_steps: int = 64, batch_size: int = 256, n_epochs: int = 10,
        gamma: float = 1.0, gae_lambda: float = 0.95, clip_range: float = 0.2, normalize_advantage: bool = True,
        ent_coef: float = 0.0, vf_coef: float = 0.5, max_grad_norm: float = 0.5,
    ):  # fmt: skip
        super().__init__(core, max_steps, threshold, net_arch, activation, schedule, _settings(locals()))


class A2CAgent(_ActorCriticAgent):
    """SB3's A2C (arXiv:1602.01783, synchronous). Its score is log p(HALT) - log p(CONTINUE).

    Args:
        core: The core.
        max_steps: The budget of the episodes.
        threshold: Halt where the score reaches this.
        net_arch: Sizes of the hidden layers, of policy and value alike.
        activation: Between the layers.
        schedule: Learning rate over the run: constant, or linear to 0.
        learning_rate: Of RMSprop.
        n_steps: Steps of all slots in a rollout.
        gamma: Discount.
        gae_lambda: Of the generalised advantage estimate.
        ent_coef: Weight of the entropy.
        vf_coef: Weight of the value's loss.
        normalize_advantage: Whether a rollout's advantages are brought to mean 0 and variance 1.
        max_grad_norm: Largest norm of the gradient.
    """

    algorithm = "A2C"

    def __init__(
        self, core: nn.Module, max_steps: int, threshold: float = 0.0, net_arch: list[int] | None = None,
        activation: Literal["relu", "tanh"] = "tanh", schedule: Literal["constant", "linear"] = "linear",
        learning_rate: float = 7e-4, n_steps: int = 16, gamma: float = 1.0, gae_lambda: float = 1.0,
        ent_coef: float = 0.0, vf_coef: float = 0.5, normalize_advantage: bool = False, max_grad_norm: float = 0.5,
    ):  # fmt: skip
        super().__init__(core, max_steps, threshold, net_arch, activation, schedule, _settings(locals()))


def _settings(given: dict[str, Any]) -> dict[str, Any]:
    """The algorithm's own settings among a constructor's arguments. UserError for one out of range."""
    settings = {n: v for n, v in given.items() if n not in _NOT_SETTINGS and n != "__class__"}
    for name, value in settings.items():
        low = 1 if name in _COUNTS else 0
        high = 1 if name in _SHARES else float("inf")
        if not low <= value <= high:
            wanted = f"at least {low}" if high > 1 else f"between {low} and {high}"
            raise UserError(f"agent.{name} must be {wanted}, not {value}")
    return settings


_SHARES = ("tau", "gamma", "gae_lambda", "exploration_fraction", "exploration_initial_eps", "exploration_final_eps")
_COUNTS = (
    "buffer_size", "batch_size", "train_freq", "gradient_steps", "n_steps", "target_update_interval", "n_epochs",
)  # fmt: skip
