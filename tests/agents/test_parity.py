"""Halting, targets, losses, gradients, rollout and optimisation as published, through our trainer and environment.

`fed_trainer` hands the recorded batches to the environment's slots and switches the padding mask off; all
else is the code of a normal run. B = 8 slots.
"""

from __future__ import annotations

import math

import pytest
import torch
from hrm_testing import FIRST_SEGMENT, close, fed_trainer, golden, losses_of, relative, tiny_model, within

from agents import FixedAgent, QHaltingAgent, q_targets
from agents.base import Transition, View
from envs.actions import HALT
from hrm_rl.core import layers, packing, pieces
from hrm_rl.cuda_graph import WARM_UP, Replayed
from hrm_rl.devices import can_compile
from hrm_rl.timing import CompileGuard

B, CPU = 8, torch.device("cpu")
needs_compiler = pytest.mark.skipif(not can_compile(CPU), reason="no C++ compiler")


# --- fast paths: each has to reach the same golden values ---------------------------------------------------


class Plain:
    """Every operation as it is written; the others are ways to the same numbers that training takes on a CPU."""

    changes = {}  # of the trainer
    logits = 1e-3  # how far Q-logits may be off along the training

    def __init__(self, patch: pytest.MonkeyPatch):
        pass

    def check(self, trainer) -> None:
        """That it was taken."""
        assert not trainer.compiled and not trainer.threads


def pack(patch: pytest.MonkeyPatch) -> None:
    """Weights are packed however small they are, where this machine can."""
    patch.setattr(packing, "SMALLEST_WIDTH", 1)
    patch.setattr(packing, "SMALLEST_STATE", 1)


class Packed(Plain):
    """Weights in oneDNN's layout, once an update."""

    def __init__(self, patch: pytest.MonkeyPatch):
        pack(patch)
        if not packing.prepare(tiny_model()[0], B, CPU):
            pytest.skip("no packed weights here")
        self.seen, forget = set(), packing.forget

        def remember():
            self.seen.add(len(packing._kept.get()))
            forget()

        patch.setattr(packing, "forget", remember)

    def check(self, trainer) -> None:
        assert min(self.seen) >= 2 * 2 * 4  # at least the layers' products of both levels in every update


class PlainAttention(Plain):
    """Two products in place of PyTorch's kernel, as for bfloat16 on a CPU."""

    def __init__(self, patch: pytest.MonkeyPatch):
        self.calls = 0

        def attention(query, key, value, attn_mask=None):
            assert attn_mask is None
            self.calls += 1
            return layers.plain_attention(query, key, value)

        patch.setattr(layers.F, "scaled_dot_product_attention", attention)

    def check(self, trainer) -> None:
        assert self.calls


def few_slots_at_a_time(patch: pytest.MonkeyPatch) -> None:
    """Pieces of two slots each on two threads, whatever the core and the machine."""
    patch.setattr(pieces, "WIDTHS", {torch.float32: range(1, 512)})
    patch.setattr(pieces, "SMALLEST_STATE", 1)
    patch.setattr(pieces, "LARGEST", 2 * 17 * 32)
    patch.setattr(pieces, "MOST_THREADS", 1 << 20)
    patch.setattr("hrm_rl.trainer.Threads", lambda count: pieces.Threads(2))


class Pieces(Plain):
    """A few slots at a time on a thread each (not compiled: how they are shared out and put together)."""

    changes = {"compile": "on"}

    def __init__(self, patch: pytest.MonkeyPatch):
        few_slots_at_a_time(patch)
        patch.setattr(torch, "compile", lambda function, **_: function)

    def check(self, trainer) -> None:
        parts = trainer.engine.run_tail, trainer.engine.run_prefix
        assert all(isinstance(part, pieces.InPieces) for part in parts)
        assert {rows for _, rows, _ in parts[0]._begun} == {2}


class Compiled(Plain):
    """By torch.compile, with packed weights: as wide cores are trained in float32.

    Its fused operations round otherwise, which grows along the training: 2.2e-3 at logits of up to 12.
    """

    changes = {"compile": "on"}
    logits = 5e-3

    def __init__(self, patch: pytest.MonkeyPatch):
        pack(patch)
        torch._dynamo.reset()
        self.guard = CompileGuard()

    def check(self, trainer) -> None:
        assert not trainer.threads
        self.guard.check("whole", trainer.update, trainer.engine)


class CompiledPieces(Pieces):
    """With packed weights: as cores of middle width are trained in float32."""

    logits = Compiled.logits

    def __init__(self, patch: pytest.MonkeyPatch):
        few_slots_at_a_time(patch)
        pack(patch)
        torch._dynamo.reset()
        self.guard = CompileGuard()

    def check(self, trainer) -> None:
        super().check(trainer)
        self.guard.check("pieces", trainer.update, trainer.engine)


SLOW = [pytest.mark.slow, needs_compiler]
PATHS = [Plain, Packed, PlainAttention, pytest.param(Pieces, marks=needs_compiler),
         pytest.param(Compiled, marks=SLOW), pytest.param(CompiledPieces, marks=SLOW)]  # fmt: skip


@pytest.fixture(params=PATHS, ids=lambda kind: kind.__name__)
def path(request, monkeypatch):
    return request.param(monkeypatch)


def case(name: str) -> dict[str, torch.Tensor]:
    """A case of loss_tiny; c and d share the puzzles of a."""
    values = golden("loss_tiny")
    return {key: values[f"a.{key}"] for key in ("inputs", "labels")} | within(values, f"{name}.")


def trainer_of(name: str, **changes):
    """A trainer that stands right after the segment of the case. Case b begins at step 4 from a given state."""
    wanted = case(name)
    trainer = fed_trainer(
        wanted["inputs"][None], wanted["labels"][None], puzzle_embedding_learns=True, optim={"lr": 0.0}, **changes
    )
    if name == "b":
        slots = trainer.envs.state_dict()
        state = trainer.core.prefix(wanted["inputs"], (wanted["z_H_in"], wanted["z_L_in"]))
        trainer.envs.load_state_dict(slots | {"z_H": state.z_H, "z_L": state.z_L, "steps": torch.full((B,), 4)})
    return trainer, wanted


def target_continue(trainer) -> torch.Tensor:
    """The continue target of the slots as they stand, by the agent's own functions."""
    slots = trainer.envs.slots
    with torch.no_grad():
        ahead = trainer.core(slots.tokens, type(trainer.core.initial_state(1))(slots.z_H.detach(), slots.z_L.detach()))
        return q_targets.continue_target(trainer.agent.scores(ahead.state.z_H), slots.steps >= trainer.config.max_steps)


@pytest.mark.parametrize("name", ["a", "b"])
def test_one_call_of_the_loss_head(name, path):
    trainer, wanted = trainer_of(name, **path.changes)
    slots = trainer.envs.slots
    view, q_logits, actions = trainer._decide(slots)
    atol = FIRST_SEGMENT if name == "a" else 5e-5
    close(slots.logits, wanted["logits"], atol, "logits")
    close(q_logits[:, 0], wanted["q_halt_logits"], atol, "q_halt")
    close(q_logits[:, 1], wanted["q_continue_logits"], atol, "q_continue")
    close(target_continue(trainer), wanted["target_q_continue"], atol, "continue target")
    assert torch.equal(slots.steps, wanted["steps_out"])
    assert torch.equal((actions == HALT) | (slots.steps >= 4), wanted["halted_out"])
    assert torch.equal(slots.is_correct, wanted["seq_is_correct"])

    trainer.update()
    losses = losses_of(trainer)
    relative(losses["supervised"] * B, wanted["lm_loss"], 1e-5, "lm_loss")
    relative(losses["q_halt"] * B, wanted["q_halt_loss"], 1e-5, "q_halt_loss")
    relative(losses["q_continue"] * B, wanted["q_continue_loss"], 1e-5, "q_continue_loss")
    relative(losses["total"] * B, wanted["total_loss"], 1e-5, "total_loss")
    check_gradients(trainer, wanted)
    path.check(trainer)


def check_gradients(trainer, wanted) -> None:
    gradients = within(wanted, "grad.inner.")
    rows = gradients.pop("puzzle_emb.local_weights")
    gradients["puzzle_emb.weights"] = rows.sum(0)  # ours is one parameter, the release's a row for every sequence
    ours = {name.removeprefix("core."): p.grad for name, p in trainer.trained.items() if name.startswith("core.")}
    ours |= {f"q_head.{name}": p.grad for name, p in trainer.agent.q_head.named_parameters()}
    assert set(ours) == set(gradients)
    for name, gradient in gradients.items():
        close(ours[name].flatten() * B, gradient.flatten(), 1e-4 * gradient.abs().max().item(), f"gradient of {name}")


def test_puzzle_embedding_gradient_by_sequence():
    """The same for the rows the release keeps: one identifier for every sequence."""
    wanted = case("a")
    trainer, _ = trainer_of("a")
    core, slots = trainer.core, trainer.envs.slots
    rows = core.puzzle_emb.weights.detach().expand(B, -1).clone().requires_grad_()
    del core.puzzle_emb.weights
    core.puzzle_emb.weights = rows
    output = core(wanted["inputs"], core.initial_state(B), torch.arange(B))
    view = View(output.state.z_H, output.logits, slots.steps, slots.valid, slots.key)
    q_logits = trainer.agent.scores(output.state.z_H)
    ahead = core(wanted["inputs"], output.state.detach(), torch.arange(B)).state.z_H.detach()
    seen = Transition(view, q_logits, torch.zeros(B), slots.is_correct, ahead, torch.zeros(B, dtype=torch.bool))
    losses, _ = trainer._losses(slots._replace(logits=output.logits), seen)
    q = trainer.agent.loss(seen)
    (losses["loss/supervised"] * B + 0.5 * (q.halt.sum() + q.cont.sum())).backward()
    gradient = wanted["grad.inner.puzzle_emb.local_weights"]
    close(rows.grad, gradient, 1e-4 * gradient.abs().max().item(), "gradient of the rows")


@pytest.mark.parametrize("name", ["a", "b"])
def test_softmax_in_place_of_stablemax(name):
    trainer, wanted = trainer_of(name, loss="softmax")
    trainer.update()
    losses = losses_of(trainer)
    relative(losses["supervised"] * B, wanted["softmax.lm_loss"], 1e-5, "lm_loss")
    relative(losses["total"] * B, wanted["softmax.total_loss"], 1e-5, "total_loss")
    for key, parameter in trainer.trained.items():
        norm = wanted.get(f"softmax.gradnorm.inner.{key.removeprefix('core.').removeprefix('agent.')}")
        if norm is not None:
            relative(parameter.grad.norm() * B, norm, 1e-4, key)


def test_budget_of_one_segment_has_no_continue_target():
    trainer, wanted = trainer_of("c", max_steps=1)
    trainer.update()
    losses = losses_of(trainer)
    relative(losses["total"] * B, wanted["total_loss"], 1e-5, "total_loss")
    relative(losses["q_halt"] * B, wanted["q_halt_loss"], 1e-5, "q_halt_loss")
    assert losses["q_continue"] == 0 and "q_continue_loss" not in wanted
    assert torch.equal(trainer.envs.slots.steps, torch.ones(B, dtype=torch.long))  # every slot began anew
    assert wanted["halted_out"].all()


def test_evaluation_mode_of_one_call():
    trainer, wanted = trainer_of("d", bootstrap="none")
    slots = trainer.envs.slots
    assert torch.equal(FixedAgent(4).act(trainer._decide(slots)[0]) == HALT, wanted["halted_out"])
    trainer.update()
    losses = losses_of(trainer)
    relative(losses["supervised"] * B, wanted["lm_loss"], 1e-5, "lm_loss")
    relative(losses["total"] * B, wanted["total_loss"], 1e-5, "total_loss")


def test_the_trace_by_the_pure_functions_alone():
    """The same twelve calls with the core and `agents.q_targets`, without trainer and environment."""
    wanted = golden("act_trace")
    core, head = tiny_model()
    initial = core.initial_state(B)
    state, steps, halted = initial, torch.zeros(B, dtype=torch.long), torch.ones(B, dtype=torch.bool)
    tokens, labels = wanted["batch_inputs"][0], wanted["batch_labels"][0]
    for t in range(12):
        assert torch.equal(halted, wanted["halted_in"][t]) and torch.equal(steps, wanted["steps_in"][t])
        new = halted[:, None]
        tokens = torch.where(new, wanted["batch_inputs"][t], tokens)
        labels = torch.where(new, wanted["batch_labels"][t], labels)
        state = [torch.where(new[..., None], first, z) for first, z in zip(initial, state, strict=True)]
        with torch.no_grad():
            state, logits = core(tokens, state)
            q_logits, ahead = head(state.z_H), head(core(tokens, state).state.z_H)
        steps = torch.where(halted, 0, steps) + 1
        target = q_targets.continue_target(ahead, steps >= 4)
        close(target, wanted["target_q_continue"][t], 5e-5, f"target {t}")
        right = ((logits.argmax(-1) == labels) | (labels == -100)).all(-1)
        everywhere = torch.ones(B, dtype=torch.bool)
        losses = q_targets.q_losses(q_logits, q_targets.halt_target(right), target, everywhere, everywhere)
        relative(losses.halt.sum(), wanted["q_halt_loss"][t], 1e-4, f"q_halt_loss {t}")
        relative(losses.cont.sum(), wanted["q_continue_loss"][t], 1e-4, f"q_continue_loss {t}")
        wish = q_targets.wants_halt(q_logits, "extra_forward")
        halted = q_targets.halts(wish, steps, torch.ones_like(steps), 4)
        assert torch.equal(halted, wanted["halted_out"][t]) and torch.equal(steps, wanted["steps_out"][t])


# --- twelve calls with auto-reset ---------------------------------------------------------------------------


def check_call(slots, actions, wanted, t) -> None:
    """What the slots hold after call t, and who halts."""
    assert torch.equal(slots.steps, wanted["steps_out"][t]), t
    if "current_inputs" in wanted:
        assert torch.equal(slots.tokens, wanted["current_inputs"][t]), t
    if "current_labels" in wanted:
        assert torch.equal(slots.labels, wanted["current_labels"][t]), t
    assert torch.equal((actions == HALT) | (slots.steps >= 4), wanted["halted_out"][t]), t


def roll_out(lr: float, **changes):
    """The trainer, once all of act_trace's twelve calls are the recorded ones."""
    wanted = golden("act_trace")
    trainer = fed_trainer(wanted["batch_inputs"], wanted["batch_labels"], optim={"lr": lr}, **changes)
    for t in range(12):
        slots = trainer.envs.slots
        _, q_logits, actions = trainer._decide(slots)
        check_call(slots, actions, wanted, t)
        close(slots.logits, wanted["logits"][t], 5e-5, f"logits {t}")
        close(q_logits[:, 0], wanted["q_halt_logits"][t], 5e-5, f"q_halt {t}")
        close(q_logits[:, 1], wanted["q_continue_logits"][t], 5e-5, f"q_continue {t}")
        close(target_continue(trainer), wanted["target_q_continue"][t], 5e-5, f"target {t}")
        trainer.update()
        check_sums(trainer.sums.take(), wanted, t, slots)
    close(slots.z_H, wanted["final_z_H"], 5e-5, "final z_H")
    close(slots.z_L, wanted["final_z_L"], 5e-5, "final z_L")
    return trainer


def test_rollout_through_the_trainer(path):
    """With weights that stand still."""
    path.check(roll_out(lr=0.0, **path.changes))


def test_weights_that_move_leave_the_rollout():
    """The negative control."""
    with pytest.raises(AssertionError):
        roll_out(lr=1e-2)


def check_sums(sums, wanted, t, slots) -> None:
    """Losses and metrics of one call. The release counts finished sequences with labels only."""
    relative(sums["loss/supervised"] * B, wanted["lm_loss"][t], 1e-4, "lm_loss")
    relative(sums["loss/q_halt"] * B, wanted["q_halt_loss"][t], 1e-4, "q_halt_loss")
    if "q_continue_loss" in wanted:
        relative(sums["loss/q_continue"] * B, wanted["q_continue_loss"][t], 1e-4, "q_continue_loss")
    relative(sums["loss/total"] * B, wanted["total_loss"][t], 1e-4, "total_loss")
    empty = ((slots.labels == -100).all(-1) & wanted["halted_out"][t]).sum().item()
    steps_of_empty = (slots.steps * ((slots.labels == -100).all(-1) & wanted["halted_out"][t])).sum().item()
    assert sums["episodes"] - empty == wanted["metric.count"][t]
    assert sums["exact"] - empty == wanted["metric.exact_accuracy"][t]
    assert sums["steps"] - steps_of_empty == wanted["metric.steps"][t]
    assert abs(sums["token"] - wanted["metric.accuracy"][t].item()) < 1e-5


class Recorded(QHaltingAgent):
    """Explores by the recorded draws; the test turns `t`."""

    u, m, t = None, None, 0

    def _floor(self, view):
        return q_targets.min_steps(self.u[self.t], self.m[self.t], self.epsilon)


@pytest.mark.parametrize("epsilon", [0.5, 0.0])
def test_exploration_by_the_recorded_draws(epsilon):
    """The same batches with exploration; without it (negative control) the trace is another."""
    trace, wanted = golden("act_trace"), within(golden("extras"), "explore.")
    trainer = fed_trainer(
        trace["batch_inputs"], trace["batch_labels"], Recorded, {"epsilon": epsilon}, optim={"lr": 0.0}
    )
    head = tiny_model()[1]
    trainer.agent.q_head.load_state_dict(head.state_dict())
    trainer.agent.u, trainer.agent.m = wanted["u"], wanted["m"]
    same = True
    for t in range(12):
        trainer.agent.t = t
        slots = trainer.envs.slots
        _, q_logits, actions = trainer._decide(slots)
        if epsilon:
            check_call(slots, actions, wanted, t)
            close(q_logits[:, 0], wanted["q_halt_logits"][t], 5e-5, f"q_halt {t}")
            close(q_logits[:, 1], wanted["q_continue_logits"][t], 5e-5, f"q_continue {t}")
        same &= torch.equal(slots.steps, wanted["steps_out"][t])
        trainer.update()
    assert same == bool(epsilon)


def test_evaluation_mode_halts_at_the_budget():
    """The release's evaluation is our agent `fixed` at max_steps."""
    trace, wanted = golden("act_trace"), within(golden("extras"), "eval.")
    trainer = fed_trainer(trace["batch_inputs"][:6], trace["batch_labels"][:6], FixedAgent, objective="supervised")
    core, head = tiny_model()
    for t in range(6):
        slots = trainer.envs.slots
        _, none, actions = trainer._decide(slots)
        assert none is None
        check_call(slots, actions, wanted, t)
        close(head(slots.z_H)[:, 0], wanted["q_halt_logits"][t], 5e-5, f"q_halt {t}")
        close(head(slots.z_H)[:, 1], wanted["q_continue_logits"][t], 5e-5, f"q_continue {t}")
        trainer.envs.step(actions)


# --- twenty optimiser steps ---------------------------------------------------------------------------------


def run_training(logits: float = Plain.logits, **changes):
    """The trainer, once all of its twenty updates are the recorded ones; logits: how far Q-logits may be off."""
    wanted = golden("train_trace")
    trainer = fed_trainer(wanted["batch_inputs"], wanted["batch_labels"], **changes)
    assert len(trainer.trained) == 20
    before = {name: p.detach().clone() for name, p in trainer.trained.items()}
    released = {name: "inner." + name.removeprefix("core.").removeprefix("agent.") for name in trainer.trained}
    for name, p in before.items():
        relative(p.double().norm(), wanted[f"init_norm.{released[name]}"], 1e-6, name)
    for t in range(20):
        slots = trainer.envs.slots
        _, q_logits, actions = trainer._decide(slots)
        check_call(slots, actions, wanted, t)
        close(q_logits[:, 0], wanted["q_halt_logits"][t], logits, f"q_halt {t}")
        close(q_logits[:, 1], wanted["q_continue_logits"][t], logits, f"q_continue {t}")
        trainer.update()
        sums = trainer.sums.take()
        for ours in ("supervised", "q_halt", "q_continue", "total"):
            theirs = f"{ours.replace('supervised', 'lm')}_loss"
            relative(sums[f"loss/{ours}"] * B, wanted[theirs][t], 1e-3, f"{theirs} {t}")
        norm = math.sqrt(sum(p.grad.double().square().sum().item() for p in trainer.trained.values()))
        relative(norm, wanted["grad_norm"][t], 1e-3, f"gradient norm {t}")
    check_weights(trainer.trained, before, wanted)
    return trainer


def check_weights(weights, before, wanted) -> None:
    """Those after the twenty updates; before: what they began from."""
    released = {name: "inner." + name.removeprefix("core.").removeprefix("agent.") for name in weights}
    for name, p in weights.items():
        relative(p.double().norm(), wanted[f"final_norm.{released[name]}"], 1e-5, name)
        relative((p - before[name]).double().norm(), wanted[f"delta_norm.{released[name]}"], 1e-3, name)
        if (final := wanted.get(f"final.{released[name]}")) is not None:
            close(p, final.view_as(p), 1e-5, name)


def test_twenty_optimiser_steps(path):
    path.check(run_training(path.logits, **path.changes))


def run_training_unwatched(replayed: bool = False, **changes):
    """The trainer after the twenty updates, of which only what they lead to is looked at."""
    wanted = golden("train_trace")
    trainer = fed_trainer(wanted["batch_inputs"], wanted["batch_labels"], **changes)
    before = {name: p.detach().cpu().clone() for name, p in trainer.trained.items()}
    if replayed:
        trainer.replayed = Replayed(trainer)
    for _ in range(20):
        trainer.update()
    check_weights({name: p.detach().cpu() for name, p in trainer.trained.items()}, before, wanted)
    return trainer


def test_twenty_optimiser_steps_replayed():
    """As one CUDA graph would replay them; here its body runs in its place."""
    assert run_training_unwatched(replayed=True).replayed.replays == 20 - WARM_UP


@pytest.mark.gpu
@pytest.mark.parametrize("compile", ["off", "on"])
def test_twenty_optimiser_steps_on_a_gpu(compile):
    """Not as a captured graph, to which one cannot hand batches: that is held to these (tests/test_cuda_graph.py)."""
    run_training_unwatched(compile=compile, device="cuda")


def never_forget(patch):
    patch.setattr(packing, "forget", lambda: None)


def another_temperature(patch):
    own = layers.plain_attention
    patch.setattr(layers, "plain_attention", lambda query, key, value: own(query * 1.01, key, value))


def a_piece_in_anothers_place(patch):
    own = pieces._together
    patch.setattr(pieces, "_together", lambda parts: own([parts[1], parts[0], *parts[2:]]))


@pytest.mark.parametrize(
    ("path", "spoil"),
    [(Packed, never_forget), (PlainAttention, another_temperature),
     pytest.param(Pieces, a_piece_in_anothers_place, marks=needs_compiler)],
    indirect=["path"],
)  # fmt: skip
def test_a_fast_path_to_other_numbers_is_seen(path, spoil, monkeypatch):
    """The negative controls of `path`."""
    spoil(monkeypatch)
    with pytest.raises(AssertionError):
        run_training(**path.changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"optim": {"weight_decay": 0.0}}, {"optim": {"beta2": 0.999}}, {"halt_weight": 1.0}, {"q_to_core": False},
        {"bootstrap": "shared_prefix"}, {"loss": "softmax"}, {"num_envs": 8, "supervised_weight": 2.0},
    ],
)  # fmt: skip
def test_another_recipe_is_seen(changes):
    """Negative controls: each departure from the published recipe leaves the trace."""
    with pytest.raises(AssertionError):
        run_training(**changes)


def test_the_padding_mask_is_a_departure():
    """With our mask on, the rows without labels train nothing: the release's q_halt loss is larger."""
    wanted = case("a")
    assert (wanted["labels"] == -100).all(-1).sum() == 1
    masked = fed_trainer(wanted["inputs"][None], wanted["labels"][None], mask_padding=True, optim={"lr": 0.0})
    masked.update()
    losses = losses_of(masked)
    relative(losses["supervised"] * B, wanted["lm_loss"], 1e-5, "lm_loss")  # the same: it holds no label
    row = torch.nn.functional.softplus(-wanted["q_halt_logits"][-1])  # BCE of q_halt against "right"
    relative(losses["q_halt"] * B, wanted["q_halt_loss"] - row, 1e-5, "q_halt_loss without the empty row")


def test_halting_on_equal_values_would_be_seen():
    """q_halt > q_continue is strict: equal values go on (the release's initial Q-head gives exactly that)."""
    equal = torch.full((3, 2), -5.0)
    assert not q_targets.wants_halt(equal, "extra_forward").any()
    agent = QHaltingAgent(tiny_model()[0], 4, epsilon=0.0)
    view = View(torch.randn(3, 17, 32), None, torch.tensor([1, 3, 4]), torch.ones(3, dtype=torch.bool), torch.arange(3))
    assert (agent.act(view) == HALT).tolist() == [False, False, True]
