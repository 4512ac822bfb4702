"""What every core of the registry, and the one that docs/CORES.md shows, must keep to. B slots."""

from __future__ import annotations

import re

import gymnasium as gym
import numpy as np
import pytest
import torch
from hrm_testing import ROOT, small_core, small_puzzles, small_trainer

from agents.q_targets import BOOTSTRAPS
from hrm_rl import compare, evaluate
from hrm_rl.core import CORES, Core, RecurrentCore, State, build_core, find_core
from hrm_rl.core.io import load_core, model_bytes
from hrm_rl.core.q_head import QHead

PAGE = (ROOT / "docs" / "CORES.md").read_text(encoding="utf-8")
(EXAMPLE,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
SPACE: dict = {"__name__": "my_core"}
exec(EXAMPLE, SPACE)
DAMPED = SPACE["DampedCore"].kind
KINDS = [*CORES, DAMPED]
MIXINGS = ("attention", "mlp", "grid")
B = 3


def make(kind: str, **changes) -> RecurrentCore:
    return build_core(small_core(kind=kind, H_layers=2, **changes), torch.Generator().manual_seed(0))


def tokens() -> torch.Tensor:
    return small_puzzles(B).questions.long()


def some_state(core: RecurrentCore) -> State:
    """A state in the middle of an episode, with gradient asked for."""
    z = torch.randn(2, B, core.num_positions, core.hidden_size, generator=torch.Generator().manual_seed(7))
    return State(*(part.clone().requires_grad_() for part in z))


def test_the_example_is_short_and_the_others_are_as_many_as_the_page_says():
    assert len([line for line in EXAMPLE.splitlines() if line.strip()]) <= 15
    assert set(re.findall(r"^\| `(\w+)` \|", PAGE, re.MULTILINE)) >= set(CORES)


@pytest.mark.parametrize("kind", KINDS)
def test_shapes_and_the_name_it_goes_by(kind):
    core = make(kind)
    assert isinstance(core, Core) and core.config.kind == core.kind == kind and find_core(kind) is type(core)
    output = core(tokens(), core.initial_state(B))
    shape = (B, core.num_positions, core.hidden_size)
    assert output.state.z_H.shape == output.state.z_L.shape == shape and output.logits.shape == (B, 16, 6)
    assert output.logits.isfinite().all()
    direct = find_core(kind)(small_core(kind="hrm", H_layers=2), torch.Generator().manual_seed(0))
    assert direct.config == core.config  # whatever the configuration said, it says what it is


@pytest.mark.parametrize("kind", KINDS)
def test_the_initial_state_is_fixed(kind):
    """Drawn once with the weights, the same for every puzzle and position, and no parameter."""
    core = make(kind)
    first = core.initial_state(B)
    for z, again in zip(first, core.initial_state(B), strict=True):
        assert torch.equal(z, again) and torch.equal(z, z[:1, :1].expand_as(z)) and not z.requires_grad
        assert 0.5 < z[0, 0].std() < 1.5
    assert {"H_init", "L_init"} <= set(core.state_dict()) - set(dict(core.named_parameters()))


@pytest.mark.parametrize("mixing", MIXINGS)
@pytest.mark.parametrize("gradient", ["auto", "one_step", "last_k", "full"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_segment_is_its_prefix_and_its_tail(kind, gradient, mixing):
    """And the gradient's reach changes no number; calls without gradient come first."""
    core = make(kind, gradient=gradient, gradient_k=2, token_mixing=mixing)
    seen, own = [], core.call

    def noting(which, *arguments):
        seen.append((which, torch.is_grad_enabled()))
        return own(which, *arguments)

    core.call = noting
    state = some_state(core).detach()
    whole, halves = core(tokens(), state), core.tail(tokens(), core.prefix(tokens(), state))
    assert torch.equal(whole.logits, halves.logits) and torch.equal(whole.state.z_H, halves.state.z_H)
    assert torch.equal(whole.logits, make(kind, token_mixing=mixing, gradient="full")(tokens(), state).logits)
    calls = len(core.calls)
    assert [which for which, _ in seen] == [*core.calls] * 2
    by_name = {"auto": core.published, "one_step": len(set(core.calls)), "last_k": min(2, calls), "full": calls}
    reached = by_name[gradient]
    assert [on for _, on in seen[:calls]] == [False] * (calls - reached) + [True] * reached


@pytest.mark.parametrize("mixing", MIXINGS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_reaches_every_weight_and_no_state(kind, mixing):
    core = make(kind, token_mixing=mixing)
    state = some_state(core)
    output = core(tokens(), state)
    weights = torch.randn(output.logits.shape, generator=torch.Generator().manual_seed(1))
    (output.logits * weights).sum().backward()
    for name, parameter in core.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().sum() > 0, name
    assert all(z.grad is None or not z.grad.any() for z in state) and not core.H_init.requires_grad
    if kind != "direct_transformer":  # the control: with its full reach the state before does get one
        full = make(kind, token_mixing=mixing, gradient="full")
        full(tokens(), state).logits.square().sum().backward()
        assert state.z_H.grad.any()
    other = core(tokens().roll(1, dims=0), state.detach())
    assert not torch.equal(other.logits, output.logits)  # the puzzle does matter


@pytest.mark.parametrize("mixing", MIXINGS)
@pytest.mark.parametrize("kind", KINDS)
def test_scales_at_the_start(kind, mixing):
    """Post-norm: z_H has unit mean square after any number of segments, and logits are of order one."""
    core = make(kind, token_mixing=mixing, hidden_size=64, puzzle_emb_ndim=64)
    state = core.initial_state(B)
    with torch.no_grad():
        for _ in range(4):
            output = core(tokens(), state)
            state = output.state
            assert 0.7 < state.z_H.square().mean().sqrt() < 1.05 and state.z_H.abs().max() < core.observation_bound
            assert 0.4 < output.logits.std() < 1.6


@pytest.mark.parametrize("kind", KINDS)
def test_a_puzzles_answer_is_its_own(kind):
    """Whatever else is in the batch."""
    core, state = make(kind), some_state(make(kind)).detach()
    together = core(tokens(), state).logits
    for row in range(B):
        alone = core(tokens()[row : row + 1], State(*(z[row : row + 1] for z in state))).logits
        torch.testing.assert_close(alone[0], together[row], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_saved_and_loaded_it_is_the_same(kind, tmp_path, capsys):
    """And the file evaluates, alone and in an ensemble."""
    core = make(kind, gradient="last_k", gradient_k=3)
    path = tmp_path / "model.safetensors"
    path.write_bytes(model_bytes(core, QHead(16), {"max_steps": 3}))
    loaded = load_core(path)
    assert type(loaded.core) is type(core) and loaded.core.config == core.config
    state = some_state(core).detach()
    assert torch.equal(loaded.core(tokens(), state).logits, core(tokens(), state).logits)
    flags = ["--limit", "8", "--ensemble", "best", "--copies", "2", "--device", "cpu", "--dtype", "float32"]
    assert evaluate.main([str(path), *flags]) == 0
    assert "learned, at most 3" in capsys.readouterr().out


@pytest.mark.slow  # each is trained until it solves something: there is nothing to calibrate on before
@pytest.mark.parametrize("kind", KINDS)
def test_rules_are_compared_on_it(kind, tmp_path, capsys):
    puzzles, validation, test = small_puzzles(32, blanks=2), tmp_path / "first.csv", tmp_path / "second.csv"
    seen = {tuple(grid) for grid in puzzles.answers[:16].tolist()}
    unseen = [row for row, grid in enumerate(puzzles.answers.tolist()) if tuple(grid) not in seen]
    for file, part in zip((validation, test), (range(16), unseen), strict=True):
        digits = [["".join(str(token - 1) for token in grid) for grid in grids.tolist()]
                  for grids in (puzzles.questions, puzzles.answers)]  # fmt: skip
        lines = (f"test,{digits[0][row]},{digits[1][row]},0\n" for row in part)
        file.write_text("source,question,answer,rating\n" + "".join(lines))
    trainer = small_trainer(core=make(kind), puzzles=puzzles, augment=False, optim={"lr": 5e-3, "weight_decay": 0.0})
    for _ in range(400):
        trainer.update()
    path = tmp_path / "model.safetensors"
    path.write_bytes(trainer.model())
    flags = ["--data", str(test), "--validation", str(validation), "--agents", "q", "confidence", "--timing", "false",
             "--resamples", "50", "--cache", "off", "--device", "cpu", "--dtype", "float32"]  # fmt: skip
    assert compare.main([str(path), *flags, "--out", str(tmp_path)]) == 0
    assert "confidence" in capsys.readouterr().out


@pytest.mark.parametrize("kind", KINDS)
def test_the_environment_runs_it(kind):
    envs = gym.make_vec("SudokuHalt-v0", num_envs=3, core=make(kind), data=small_puzzles(8), max_steps=3)
    observation, _ = envs.reset(seed=0)
    generator = np.random.default_rng(0)
    for _ in range(6):
        assert observation in envs.observation_space
        observation, reward, terminated, truncated, _ = envs.step(generator.integers(0, 2, 3))
        assert np.isfinite(reward).all() and not truncated.any()


@pytest.mark.parametrize("bootstrap", BOOTSTRAPS)
@pytest.mark.parametrize("kind", KINDS)
def test_it_trains_under_every_bootstrap(kind, bootstrap):
    trainer = small_trainer(core=make(kind), bootstrap=bootstrap, optim={"lr": 1e-2, "weight_decay": 0.0})
    before = {name: value.clone() for name, value in trainer.core.state_dict().items()}
    for _ in range(2):
        trainer.update()
    trainer.check_finite()
    for name, parameter in trainer.core.named_parameters():
        assert not torch.equal(parameter, before[name]), name
    assert torch.equal(trainer.core.H_init, before["H_init"]) and torch.equal(trainer.core.L_init, before["L_init"])


@pytest.mark.parametrize("kind", KINDS)
def test_muon_takes_its_networks_and_a_frozen_core_stays(kind, tmp_path):
    trainer = small_trainer(core=make(kind), optim={"optimizer": "muon"})
    adamw, muon = (group["params"] for o in trainer.optimizers for group in o.param_groups)
    of_muon = {id(p) for p in muon}
    names = {name for name, p in trainer.trained.items() if id(p) in of_muon}
    assert names and all(".layers." in name for name in names) and len(names) + len(adamw) == len(trainer.trained)
    linear = {n for n, p in trainer.trained.items() if p.ndim == 2 and n.endswith("_proj.weight")}
    assert names == linear
    path = tmp_path / "model.safetensors"
    path.write_bytes(model_bytes(trainer.core, None))
    from hrm_rl.config import TrainConfig
    from hrm_rl.trainer import make_core

    values = {"size": 4, "objective": "q", "init_core": str(path), "device": "cpu", "core": {"dtype": "float32"}}
    start = make_core(TrainConfig.from_values(values), torch.device("cpu"))
    frozen = small_trainer(core=start, objective="q")
    frozen.update()
    assert type(frozen.core) is type(trainer.core)
    for name, value in trainer.core.state_dict().items():
        assert torch.equal(frozen.core.state_dict()[name], value), name


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_goes_on_number_for_number(kind):
    straight, stopped, resumed = (small_trainer(core=make(kind), optim={"ema": 0.9}) for _ in range(3))
    for trainer, updates in ((straight, 4), (stopped, 2)):
        for _ in range(updates):
            trainer.update()
    tensors, plain = stopped.state()
    resumed.load_state({name: t.clone() for name, t in tensors.items()}, {**plain, "step": stopped.step})
    for _ in range(2):
        resumed.update()
    assert all(torch.equal(a, b) for a, b in zip(straight.trained.values(), resumed.trained.values(), strict=True))
    assert torch.equal(straight.envs.slots.z_H, resumed.envs.slots.z_H)
