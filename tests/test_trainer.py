"""The training loop: bootstrap modes, resume, learning rate, averages, clipping, what it reports."""

from __future__ import annotations

import pytest
import torch
from hrm_testing import counting_core, lively_trainer, small_puzzles, small_trainer
from safetensors.torch import load

from agents import FixedAgent, HaltingAgent, QHaltingAgent, q_targets
from agents.q_targets import BOOTSTRAPS
from hrm_rl.checkpoint import load_checkpoint, save_checkpoint
from hrm_rl.config import OptimConfig
from hrm_rl.errors import UserError
from hrm_rl.trainer import NonFiniteError, is_due, run_folder


def weights(trainer) -> dict[str, torch.Tensor]:
    tensors = {f"core.{n}": t.clone() for n, t in trainer.core.state_dict().items()}
    return tensors | {f"agent.{n}": t.clone() for n, t in trainer.agent.state_dict().items()}


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


# --- bootstrap modes ----------------------------------------------------------------------------------------


def bootstrapped(trainer, updates: int):
    """(continue target's q', slots that go on, q_continue loss) of each update."""
    seen = []
    own = trainer.agent.loss

    def loss(transition):
        losses = own(transition)
        at_limit = transition.view.steps >= trainer.config.max_steps
        cont = losses.cont.detach().masked_fill(at_limit, 0)  # known there without a bootstrap (grounded_target)
        seen.append((trainer.agent.scores(transition.next_z_H).detach(), ~transition.ended, cont))
        return losses

    trainer.agent.loss = loss
    for _ in range(updates):
        trainer.update()
    return seen


def test_shared_prefix_equals_extra_forward_where_weights_stand_still():
    modes = ("extra_forward", "shared_prefix", "next_observation")
    extra, shared, after = (bootstrapped(lively_trainer(bootstrap=m, optim={"lr": 0.0}), 12) for m in modes)
    went_on = ended = 0
    for (q_extra, goes_on, cont_extra), (q_shared, goes_on_too, cont_shared) in zip(extra, shared, strict=True):
        assert torch.equal(goes_on, goes_on_too)
        assert torch.allclose(q_extra[goes_on], q_shared[goes_on], atol=1e-6)
        assert torch.allclose(cont_extra[goes_on], cont_shared[goes_on], atol=1e-6)
        assert not cont_shared[~goes_on].any()  # no continue loss where the episode ended
        went_on, ended = went_on + goes_on.sum().item(), ended + (~goes_on).sum().item()
    assert went_on > 8 and ended > 8
    # The same decisions, learned from one update later.
    assert len(after) == 11
    for (q_extra, goes_on, _), (q_after, goes_on_too, cont_after) in zip(extra[:-1], after, strict=True):
        assert torch.equal(goes_on, goes_on_too)
        assert torch.allclose(q_extra[goes_on], q_after[goes_on], atol=1e-6)
        assert not cont_after[~goes_on].any()


def test_where_an_episode_ends_the_modes_read_another_puzzle():
    """Negative control: in ended slots shared_prefix sees the first segment of the next puzzle."""
    modes = ("extra_forward", "shared_prefix")
    extra, shared = (bootstrapped(lively_trainer(bootstrap=m, optim={"lr": 0.0}), 12) for m in modes)
    ended = [(a[~goes_on], b[~goes_on]) for (a, goes_on, _), (b, _, _) in zip(extra, shared, strict=True)]
    assert not all(torch.allclose(a, b, atol=1e-3) for a, b in ended)


def test_shared_prefix_is_one_update_old():
    """With weights that move, the prefix kept for the coming segment comes from before the update."""
    states = {}
    for mode in ("extra_forward", "shared_prefix"):
        no_q = dict(halt_weight=0.0, continue_weight=0.0, q_to_core=False)
        trainer = small_trainer(bootstrap=mode, optim={"lr": 0.05}, **no_q)
        trainer.update()
        states[mode] = trainer.envs.slots.z_H.detach()
    assert not torch.allclose(states["extra_forward"], states["shared_prefix"], atol=1e-4)


def test_core_calls_an_update(puzzles):
    """What a bootstrap mode costs: extra_forward one segment more; all others one call a batch."""
    calls = {}
    for mode in BOOTSTRAPS:
        core = counting_core(puzzles, 9)
        trainer = small_trainer(puzzles=puzzles, core=core, objective="q", bootstrap=mode, augment=False)
        before = core.calls
        for _ in range(5):
            trainer.update()
        calls[mode] = (core.calls - before) / 5
    # The counting core has no prefix, so shared_prefix pays a whole look ahead as well; shared_prefix_all calls it once
    # more for a quarter of the slots.
    assert calls == {
        "extra_forward": 2, "shared_prefix": 2, "shared_prefix_all": 3, "next_observation": 1, "none": 1,
    }  # fmt: skip


@pytest.mark.parametrize("slots", [8, 5])
def test_which_slots_shared_prefix_all_looks_ahead_of(slots):
    """Those that go on: the segment that comes next, as shared_prefix; those that halt, as far as there is room: one
    more of their own puzzle, as extra_forward; all others have no target."""

    class Wanted(QHaltingAgent):
        def act(self, view, q_logits=None, explore=False):
            return (view.key % 3 == 0).long()  # two of three halt

    seen = {}
    for mode in ("shared_prefix", "extra_forward", "shared_prefix_all"):
        trainer = small_trainer(Wanted, bootstrap=mode, num_envs=slots, optim={"lr": 0.0, "weight_decay": 0.0})
        kept = []
        own = trainer.agent.loss
        trainer.agent.loss = lambda transition, kept=kept, own=own: kept.append(transition) or own(transition)
        for _ in range(6):
            trainer.update()
        seen[mode] = kept
    room, covered = -(-slots // 4), 0
    for shared, extra, both in zip(*seen.values(), strict=True):
        assert torch.equal(both.ended, shared.ended) and both.looked.sum() <= room
        halts = both.ended & (both.view.steps < 4)
        assert both.looked.sum() == min(room, int(halts.sum())) and not (both.looked & ~halts).any()
        for part, other in ((both.looked, extra), (~both.looked, shared)):
            torch.testing.assert_close(both.next_z_H[part], other.next_z_H[part], atol=5e-5, rtol=0)
        if both.looked.any():  # negative control: in the slot another puzzle comes next
            assert not torch.allclose(both.next_z_H[both.looked], shared.next_z_H[both.looked], atol=1e-3)
        has = q_targets.one_step_targets("shared_prefix_all", torch.zeros(slots, 2), both.is_correct,
                                         both.view.steps >= 4, both.ended, looked=both.looked)[1]  # fmt: skip
        assert torch.equal(has, ~both.ended | (both.view.steps >= 4) | both.looked)
        covered += int(both.looked.sum())
    assert covered >= 4


# --- resume -------------------------------------------------------------------------------------------------

COMBINATIONS = [("adamw", o, b) for o in ("joint", "q") for b in BOOTSTRAPS if b != "shared_prefix_all"]
COMBINATIONS += [("adamw", "joint", "shared_prefix_all")]
COMBINATIONS += [("adamw", "supervised", "shared_prefix"), ("muon", "joint", "shared_prefix"), ("muon", "q", "none")]
COMBINATIONS += [("adam_atan2", "joint", "shared_prefix")]


@pytest.mark.parametrize(("optimizer", "objective", "bootstrap"), COMBINATIONS)
def test_resume_is_exact(tmp_path, optimizer, objective, bootstrap):
    """Twelve updates straight against six, a checkpoint on disk, and six more: number for number."""
    optim = {"optimizer": optimizer, "warmup_steps": 3, "schedule": "cosine", "ema": 0.9}
    if optimizer == "adam_atan2":  # the released pair
        optim |= {"embedding": "sign_sgd", "embedding_lr": 1e-2}
    curriculum = dict(curriculum=(0.75, 1.0), clues=(0, 6), curriculum_ramp=0.9)
    settings = dict(objective=objective, bootstrap=bootstrap, total_steps=12, optim=optim, **curriculum)
    straight = lively_trainer(**settings)
    for _ in range(12):
        straight.update()

    first = lively_trainer(**settings)
    for _ in range(6):
        first.update()
    path = save_checkpoint(tmp_path, first.step, first.model(), *first.state())
    second = small_trainer(arguments={"epsilon": 0.5}, **settings | {"seed": 3})
    second.load_state(*load_checkpoint(path))
    torch.manual_seed(99)  # nothing may depend on the global generator of the moment
    assert second.step == 6
    for _ in range(6):
        second.update()

    tensors, plain = straight.state()
    again, plain_again = second.state()
    assert tensors.keys() == again.keys()
    differing = [name for name in tensors if not torch.equal(tensors[name], again[name])]
    assert differing == []
    assert plain["puzzles"] == plain_again["puzzles"]
    assert equal(load(straight.model()), load(second.model()))
    groups = ("core.", "agent.", "optim.", "slots.", "sums.", "ema.")
    assert all(any(name.startswith(group) for name in tensors) for group in groups)
    # Negative control: six updates on from the start are not the same.
    assert not equal(weights(first), weights(straight))


def test_resume_needs_the_optimiser_and_the_slots(tmp_path):
    """Negative control: with the moments or the slots forgotten, the second half is another one."""
    straight = lively_trainer()
    for _ in range(8):
        straight.update()
    first = lively_trainer()
    for _ in range(4):
        first.update()
    tensors, plain = first.state()
    for forgotten in ("optim.", "slots."):
        second = small_trainer(arguments={"epsilon": 0.5})
        own, _ = second.state()
        kept = {n: own.get(n, t * 0) if n.startswith(forgotten) else t for n, t in tensors.items()}
        second.load_state(kept, plain | {"step": 4})
        for _ in range(4):
            second.update()
        assert not equal(weights(second), weights(straight)), forgotten


def test_resume_refuses_what_does_not_belong(tmp_path):
    trainer = lively_trainer()
    tensors, plain = trainer.state()
    plain |= {"step": 0}
    other_puzzles = small_trainer(puzzles=small_puzzles(16, seed=5))
    with pytest.raises(UserError, match="puzzles"):
        other_puzzles.load_state(tensors, plain)
    other_model = small_trainer(core=None)
    other_model.core.lm_head.weight = torch.nn.Parameter(torch.zeros(7, 16))
    with pytest.raises(UserError, match="another model"):
        other_model.load_state(tensors, plain)


def test_a_run_is_fixed_by_its_seed():
    runs = []
    for seed in (3, 3, 4):
        trainer = small_trainer(seed=seed)
        torch.rand(seed)
        for _ in range(5):
            trainer.update()
        runs.append(weights(trainer))
    assert equal(runs[0], runs[1])
    assert not equal(runs[0], runs[2])


def test_training_lowers_the_loss():
    """Sixteen puzzles by heart; with the learning rate at zero (negative control) nothing is learned."""
    final = {}
    for lr in (1e-2, 0.0):
        trainer = small_trainer(augment=False, num_envs=16, optim={"lr": lr})
        trainer.update()
        first = trainer.sums.take()["loss/supervised"]
        for _ in range(60):
            trainer.update()
        trainer.sums.take()
        trainer.update()
        final[lr] = trainer.sums.take()["loss/supervised"] / first
    assert final[1e-2] < 0.6 and final[0.0] > 0.9


# --- learning rate, averages, clipping ----------------------------------------------------------------------


def rates(trainer, steps) -> list[float]:
    values = []
    for step in steps:
        trainer.step = step
        values.append(round(trainer.schedule(), 9))
    return values


def test_learning_rate_schedule():
    def trainer(**optim):
        return small_trainer(total_steps=110, optim={"lr": 1.0, "warmup_steps": 10} | optim)

    assert rates(trainer(schedule="constant"), (0, 4, 9, 10, 109)) == [0.1, 0.5, 1.0, 1.0, 1.0]
    assert rates(trainer(schedule="linear"), (0, 9, 10, 35, 60, 110)) == [0.1, 1.0, 1.0, 0.75, 0.5, 0.0]
    assert rates(trainer(schedule="cosine"), (10, 60, 110)) == [1.0, 0.5, 0.0]
    assert rates(trainer(schedule="linear", final_lr=0.2), (10, 60, 110, 500)) == [1.0, 0.6, 0.2, 0.2]
    assert rates(trainer(schedule="linear", warmup_steps=0), (0, 55)) == [1.0, 0.5]


def test_the_time_budget_drives_the_decay():
    trainer = small_trainer(total_steps=100, time_budget=50.0, optim={"lr": 1.0, "schedule": "linear"})
    assert rates(trainer, (10,)) == [0.9]
    trainer.elapsed = 25.0
    assert rates(trainer, (10, 80)) == [0.5, 0.2]  # whichever is further on
    trainer.elapsed = 500.0
    assert rates(trainer, (10,)) == [0.0]


def test_the_optimiser_uses_the_scheduled_rate():
    """A rate of zero moves nothing; the first step of a warm-up is not zero."""
    trainer = small_trainer(total_steps=10, optim={"schedule": "linear", "warmup_steps": 2})
    before = weights(trainer)
    trainer.update()
    assert trainer.optimizers[0].param_groups[0]["lr"] == 0.005 and not equal(before, weights(trainer))
    trainer.step = 10
    before = weights(trainer)
    trainer.update()
    assert equal(before, weights(trainer))


def test_muon_takes_the_matrices_of_the_levels():
    """Each optimiser has its own peak rate; the schedule scales both."""
    trainer = small_trainer(total_steps=10, optim={"optimizer": "muon", "lr": 0.01, "muon_lr": 0.1, "warmup_steps": 4})
    adamw, muon = (o.param_groups[0] for o in trainer.optimizers)
    of_muon = {id(p) for p in muon["params"]}
    levels = {n for n in trainer.trained if n.startswith(("core.H_level.", "core.L_level."))}
    assert {n for n, p in trainer.trained.items() if id(p) in of_muon} == levels and len(levels) == 8
    trainer.update()
    assert (adamw["lr"], muon["lr"]) == (0.01 / 4, 0.1 / 4)
    for number, still in ((0, "core.lm_head.weight"), (1, "core.H_level.layers.0.mlp.down_proj.weight")):
        other = small_trainer(optim={"optimizer": "muon", "lr": 0.01, "muon_lr": 0.1})
        before = other.trained[still].detach().clone()
        other.optimizers[number].param_groups[0]["peak"] = 0.0
        other.update()
        assert torch.equal(other.trained[still], before)  # no other optimiser holds it


def givens(trainer) -> list[int]:
    return (trainer.envs.slots.tokens > 1).sum(-1).tolist()


def test_curriculum_of_givens():
    """From the curriculum to clues over its ramp; the puzzles themselves have 10 givens."""
    curriculum = dict(curriculum=(1.0, 1.0), clues=(12, 12), curriculum_ramp=0.5, total_steps=16)
    trainer = small_trainer(FixedAgent, {"k": 1}, objective="supervised", **curriculum)
    seen = []
    for _ in range(10):
        seen.append(givens(trainer))
        trainer.update()
    assert seen[0] == [16] * 4 and seen[4] == [14] * 4 and seen[8] == seen[9] == [12] * 4
    plain = small_trainer(FixedAgent, {"k": 1}, objective="supervised")
    plain.update()
    assert givens(plain) == [10] * 4  # negative control: without it, puzzles are shown as they are


def test_average_of_the_weights():
    """ema <- ema + (1 - d)(w - ema) with d = min(ema, (1 + n) / (10 + n)) at update n; training keeps the raw ones."""
    trainer, plain = small_trainer(optim={"ema": 0.3}), small_trainer()
    name = "core.lm_head.weight"
    expected = trainer.trained[name].detach().clone()
    for n in range(6):
        trainer.update()
        plain.update()
        decay = min(0.3, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * trainer.trained[name].detach()
        assert torch.allclose(trainer.ema[name], expected, atol=1e-6)
    assert equal(weights(trainer), weights(plain)) and not plain.ema
    core, agent = trainer.evaluation_models()
    assert torch.equal(core.lm_head.weight, trainer.ema[name])
    assert not torch.equal(core.lm_head.weight, trainer.trained[name])
    assert torch.equal(agent.q_head.bias, trainer.ema["agent.q_head.bias"])
    same_core, same_agent = plain.evaluation_models()
    assert same_core is plain.core and same_agent is plain.agent


@pytest.mark.parametrize("own_segment", [True, False])
def test_evaluation_during_training_sees_the_average(own_segment):
    """Also through `segment`, the (compiled) functions of the environment; and training goes on untouched."""
    trainer, undisturbed = lively_trainer(optim={"ema": 0.9}), lively_trainer(optim={"ema": 0.9})
    for t in (trainer, undisturbed):
        for _ in range(5):
            t.update()
    before = weights(trainer)
    run = trainer.evaluate(trainer.test_puzzles, 3, **({"segment": trainer.segment} if own_segment else {}))
    assert equal(before, weights(trainer))
    from hrm_rl.evaluation import trajectories

    averaged = trajectories(*trainer.evaluation_models(), trainer.test_puzzles, 3, 4)
    raw = trajectories(trainer.core, trainer.agent, trainer.test_puzzles, 3, 4)
    assert torch.equal(run.q_logits, averaged.q_logits)
    assert not torch.allclose(run.q_logits, raw.q_logits, atol=1e-4)
    for t in (trainer, undisturbed):
        for _ in range(3):
            t.update()
    assert equal(weights(trainer), weights(undisturbed))


def test_clipping_is_off_by_default():
    assert OptimConfig().grad_clip == 0
    norms = {}
    for clip in (0.0, 0.01):
        trainer = small_trainer(optim={"grad_clip": clip})
        trainer.update()
        norms[clip] = torch.linalg.vector_norm(torch.stack([p.grad.norm() for p in trainer.trained.values()])).item()
    assert norms[0.0] > 0.1 and norms[0.01] == pytest.approx(0.01, rel=1e-3)


# --- agents and folders --------------------------------------------------------------------------------------


def test_an_agent_of_ones_own():
    """The least an agent defines is `act`; the trainer hands over what its constructor names."""

    class Alternate(HaltingAgent):
        def __init__(self, max_steps: int, start: int = 1):
            super().__init__()
            self.limit, self.start = max_steps, start

        def act(self, view, q_logits=None, explore=False):
            return (view.steps + self.start) % 2

    trainer = small_trainer(Alternate, {"start": 0}, objective="supervised")
    steps = []
    for _ in range(4):
        steps.append(trainer.envs.slots.steps[0].item())
        trainer.update()
    assert steps == [1, 2, 1, 2] and trainer.agent.limit == 4
    with pytest.raises(UserError, match="'begin'.*it takes: start"):
        small_trainer(Alternate, {"begin": 0}, objective="supervised")


def test_is_due():
    assert [step for step in range(1, 10) if is_due(step, 4)] == [4, 8]
    assert not any(is_due(step, 0) for step in range(5))


def test_run_folders_are_never_shared(tmp_path):
    from hrm_testing import small_config

    free = small_config(out=str(tmp_path))
    folders = {run_folder(free) for _ in range(3)}
    assert len(folders) == 3 and all(f.is_dir() for f in folders)
    named = small_config(out=str(tmp_path), name="mine")
    run_folder(named)
    with pytest.raises(UserError, match="mine.*exists"):
        run_folder(named)


@pytest.mark.slow
def test_compiled_equals_eager():
    """With a C++ compiler: three updates compiled and not, to float32 accuracy."""
    from hrm_rl.devices import can_compile

    if not can_compile(torch.device("cpu")):
        pytest.skip("no C++ compiler")
    runs = []
    for mode in ("on", "off"):
        trainer = lively_trainer(compile=mode, objective="joint", optim={"lr": 1e-3})
        for _ in range(3):
            trainer.update()
        runs.append(weights(trainer))
        assert trainer.compiled == (mode == "on")
    assert all(torch.allclose(runs[0][n], runs[1][n], atol=1e-4) for n in runs[0])
    assert isinstance(trainer.agent, QHaltingAgent)


def test_weights_that_are_not_numbers_are_never_saved_as_good():
    trainer = small_trainer()
    trainer.check_finite()
    with torch.no_grad():
        trainer.core.lm_head.weight[0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match="core.lm_head.weight are not finite"):
        trainer.check_finite()


def test_a_checkpoint_right_before_a_logged_update(tmp_path):
    """The decision kept for next_observation and the state kept for residuals are one tensor in memory, two on disk."""
    trainer = lively_trainer(bootstrap="next_observation")
    trainer.update(before_detailed=True)
    path = save_checkpoint(tmp_path, 1, trainer.model(), *trainer.state())
    tensors, _ = load_checkpoint(path)
    assert torch.equal(tensors["stored.z_H"], tensors["previous.z_H"])
