"""How fast learners on recordings are, beside one DQN of stable-baselines3: `python -m hrm_rl.study.speed`.

A learner-update is one optimiser step of one learner. Ours also decide and move their slots in it, DQN samples its
replay memory instead: that is filled beforehand with transitions of the same trajectories, and only `train` is timed,
with batches of num_envs rows. Both have heads of the same size; repeats alternate in one process.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from hrm_rl import cli


def build_parser():
    """The parser of this command; its --help explains every flag."""
    parser = cli.make_parser("python -m hrm_rl.study.speed", __doc__.split("\n")[0], config=False)
    add = parser.add_argument
    add("--width", type=int, default=128, help="Of the q-token, and of the hidden layer of an mlp.")
    add("--num_envs", type=int, default=32, help="Slots of each learner, and rows of a DQN batch.")
    add("--learners", type=int, default=1000, help="How many (arm, seed) to speak of.")
    add("--updates", type=int, default=2000, help="How many updates each.")
    add("--repeats", type=int, default=5, help="Of each figure; the table shows median and range.")
    add("--seconds", type=float, default=1.0, help="Of each repeat.")
    add("--device", type=str, default="auto", help="auto, cpu or cuda.")
    return parser


def main(argv: Sequence[str]) -> int:
    options = cli.parse(build_parser(), argv)
    import torch

    from agents.arm import Arm
    from hrm_rl.devices import describe, pick_device
    from hrm_rl.study.learners import groups
    from hrm_rl.study.stack import Stack
    from hrm_rl.study.trajectories import Trajectories
    from hrm_rl.timing import interleave, spread

    device = pick_device(options.device)
    draw = torch.Generator().manual_seed(0)
    q_token = torch.randn(16, 2000, options.width, generator=draw)
    data = Trajectories(q_token, torch.rand(16, 2000, generator=draw) < torch.linspace(0.1, 0.9, 16)[:, None])
    runs, names = [], []
    for head in ("linear", "mlp"):
        arm = Arm(num_envs=options.num_envs, head=head, head_width=options.width)
        group = groups([("standard", arm, seed) for seed in range(options.learners)], options.width)[0]
        stack = Stack([m.arm for m in group], [m.seed for m in group], data, device)
        learner = _dqn(data, arm, device)

        def train_dqn(times: int, learner=learner) -> None:
            learner.train(gradient_steps=times, batch_size=options.num_envs)

        def train_ours(times: int, stack=stack) -> None:
            for _ in range(times):
                stack.update()

        runs += [_rate(train_ours, len(group), device, options.seconds), _rate(train_dqn, 1, device, options.seconds)]
        names += [(head, f"ours, {len(group)} in a batch"), (head, "DQN of stable-baselines3")]
    found = [spread(rates) for rates in interleave(options.repeats, runs)]
    total = options.learners * options.updates
    sizes = f"q-token of {options.width}, {options.num_envs} rows an update, {options.repeats} repeats"
    print(f"{describe(device)}; {sizes}")
    heading = f"{options.learners:,} x {options.updates:,}"
    print(f"{'head':<8}{'learner':<28}{'learner-updates/s':>18}{'range':>20}{'ratio':>8}{heading:>16}")
    for i, ((head, name), rate) in enumerate(zip(names, found, strict=True)):
        ratio, took = rate["median"] / found[i // 2 * 2 + 1]["median"], total / rate["median"] / 60
        span = f"{rate['low']:,.0f} to {rate['high']:,.0f}"
        print(f"{head:<8}{name:<28}{rate['median']:>18,.0f}{span:>20}{ratio:>8.1f}{took:>12.1f} min")
    return 0


def _rate(train: Callable[[int], None], learners: int, device, seconds: float) -> Callable[[], float]:
    """A repeat: learner-updates a second over about `seconds`."""
    from hrm_rl.timing import seconds_of, times_in

    train(20)
    times = 20 * times_in(lambda: train(20), device, seconds)
    return lambda: learners * times / seconds_of(lambda: train(times), device)


def _dqn(data, arm, device):
    """SB3's DQN with a head as the arm's, its memory full of transitions of the trajectories."""
    import gymnasium as gym
    import numpy as np
    from stable_baselines3 import DQN
    from stable_baselines3.common.logger import Logger

    M, N, D = data.q_token.shape

    class Nothing(gym.Env):
        observation_space = gym.spaces.Box(-np.inf, np.inf, (D,), np.float32)
        action_space = gym.spaces.Discrete(2)

    size = 10_000
    net_arch = [arm.head_width] if arm.head == "mlp" else []
    learner = DQN("MlpPolicy", Nothing(), buffer_size=size, batch_size=arm.num_envs, gamma=arm.gamma, device=device,
                  policy_kwargs={"net_arch": net_arch}, seed=0)  # fmt: skip
    learner.set_logger(Logger(folder=None, output_formats=[]))
    q_token, correct, draw = data.q_token.numpy(), data.correct.numpy(), np.random.default_rng(0)
    for m, n, action in zip(draw.integers(M, size=size), draw.integers(N, size=size), draw.integers(2, size=size),
                            strict=True):  # fmt: skip
        halts = action == 0 or m == M - 1
        after = q_token[m, n] if halts else q_token[m + 1, n]
        reward = float(correct[m, n]) if halts else 0.0
        learner.replay_buffer.add(q_token[m, n], after, np.array([action]), np.array([reward]), np.array([halts]), [{}])
    return learner


if __name__ == "__main__":
    cli.run(main)
