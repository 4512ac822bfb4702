"""Updates turned round and replayed: the numbers of ordinary updates, from fixed addresses, without a wait.

On a CPU there is no graph: the body that one would be captured from is run at every replay.
"""

from __future__ import annotations

import copy

import pytest
import torch
from hrm_testing import MODES, NoWaiting, lively_trainer, small_core, small_trainer

from agents import AGENTS, HaltingAgent, find_agent
from agents.q_targets import BOOTSTRAPS
from hrm_rl import cuda_graph
from hrm_rl.core import build_core
from hrm_rl.cuda_graph import WARM_UP, Replayed
from hrm_rl.errors import UserError

LEARN = [name for name in AGENTS if find_agent(name).learns and find_agent(name).capturable]


def rehearsed(*arguments, **changes):
    trainer = small_trainer(*arguments, **changes)
    trainer.replayed = Replayed(trainer)
    return trainer


def numbers(trainer) -> dict[str, torch.Tensor]:
    """All that a checkpoint keeps, as one would be written now."""
    tensors, plain = trainer.state()
    return tensors | {"step": torch.tensor(trainer.step), "elapsed": torch.tensor(plain["elapsed"])}


def assert_same(one, other) -> None:
    a, b = numbers(one), numbers(other)
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def run(trainer, updates: int, logged: int = 8) -> list[dict[str, float]]:
    """Updates with a line every `logged`, as the command drives them."""
    lines = []
    for _ in range(updates):
        step = trainer.step + 1
        details = trainer.update(step % logged == 0, (step + 1) % logged == 0)
        if step % logged == 0:
            lines.append({n: v for n, v in trainer.line(details, 1.0).items() if not n.startswith("system/")})
    return lines


@pytest.mark.parametrize("bootstrap", MODES)
def test_the_numbers_are_those_of_ordinary_updates(bootstrap):
    plain, replayed = (lively_trainer(bootstrap=bootstrap, augment=True, optim={"ema": 0.9}) for _ in range(2))
    replayed.replayed = Replayed(replayed)
    assert run(plain, 30) == run(replayed, 30)
    assert replayed.replayed.replays >= 15
    assert_same(plain, replayed)


@pytest.mark.parametrize("logged", [3, 7, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 2, 4, 5, 6, 8, 9))])
def test_however_often_a_line_is_written(logged):
    """A line takes the sums away, also right before the update that would be captured."""
    plain, replayed = lively_trainer(), lively_trainer()
    replayed.replayed = Replayed(replayed)
    assert run(plain, 24, logged) == run(replayed, 24, logged)
    assert (replayed.replayed.replays > 0) == (logged > 3)  # two of each `logged` updates are ordinary, one more after
    assert_same(plain, replayed)


@pytest.mark.slow
@pytest.mark.parametrize("name", LEARN)
def test_every_agent_that_says_so_can_be_captured(name):
    agent, objective = find_agent(name), "joint"
    plain, replayed = (make(agent, objective=objective) for make in (small_trainer, rehearsed))
    assert run(plain, 20) == run(replayed, 20) and replayed.replayed.replays >= 8
    assert_same(plain, replayed)


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [
    {"target": "polyak"}, {"target": "hard", "period": 3}, {"replay": "fifo", "replay_size": 40},
    {"replay": "fifo", "replay_size": 64, "backup": "lambda"}, {"backup": "double"},
], ids=str)  # fmt: skip
def test_targets_and_replay(arguments):
    plain, replayed = (make(find_agent("q_variant"), arguments) for make in (small_trainer, rehearsed))
    assert run(plain, 24) == run(replayed, 24) and replayed.replayed.replays >= 8
    assert_same(plain, replayed)


@pytest.mark.parametrize("changes", [
    {"optim": {"optimizer": "adam_atan2", "embedding": "sign_sgd"}}, {"optim": {"optimizer": "muon", "grad_clip": 0.5}},
    {"objective": "q"}, {"objective": "supervised"}, {"clues": (10, 12), "curriculum": (0.8, 0.9)},
    {"core": "full"},
], ids=str)  # fmt: skip
def test_whatever_the_recipe(changes):
    agent = find_agent("fixed") if changes.get("objective") == "supervised" else find_agent("q")
    if "core" in changes:
        changes = {"core": build_core(small_core(gradient=changes["core"]), torch.Generator().manual_seed(0))}
    plain, replayed = (make(agent, **copy.deepcopy(changes)) for make in (small_trainer, rehearsed))
    assert run(plain, 20) == run(replayed, 20) and replayed.replayed.replays >= 8
    assert_same(plain, replayed)


def test_a_checkpoint_in_between_changes_nothing_and_can_be_resumed_either_way():
    plain, replayed = (make(bootstrap="shared_prefix", augment=True) for make in (small_trainer, rehearsed))
    run(plain, 13), run(replayed, 13)
    tensors, state = replayed.state()
    state["step"] = replayed.step
    assert not replayed.replayed.pending
    resumed = small_trainer(bootstrap="shared_prefix", augment=True)
    resumed.load_state({name: tensor.clone() for name, tensor in tensors.items()}, state)
    for trainer in (plain, replayed, resumed):
        run(trainer, 12)
    assert_same(plain, replayed)
    assert_same(plain, resumed)


def test_what_is_carried_stays_where_it_is():
    trainer = rehearsed(bootstrap="shared_prefix")
    run(trainer, WARM_UP + 1, logged=1000)
    places = [t.data_ptr() for t in cuda_graph._taken_apart(trainer.carried())[0]]
    run(trainer, 14, logged=6)  # with ordinary updates among them
    assert places == [t.data_ptr() for t in cuda_graph._taken_apart(trainer.carried())[0]]


def test_a_value_in_the_place_of_another_is_read_before_it_is_written_over():
    one, two = torch.zeros(3), torch.ones(3)
    cuda_graph._write([one, two], [two, one])
    assert one.tolist() == [1, 1, 1] and two.tolist() == [0, 0, 0]


@pytest.mark.parametrize("name", ["q", *(pytest.param(name, marks=pytest.mark.slow) for name in LEARN if name != "q")])
def test_nothing_in_the_body_waits(name, monkeypatch):
    trainer = rehearsed(find_agent(name), augment=True)
    run(trainer, WARM_UP + 1, logged=1000)
    # What a CPU is asked at every update and a GPU at logged ones alone.
    monkeypatch.setattr(trainer.watch, "check", lambda step: None)
    monkeypatch.setattr("agents.checks.raise_fault", lambda *arguments: None)
    with NoWaiting():
        trainer.replayed._body()


def test_a_body_that_waits_is_seen(monkeypatch):
    """Negative control of the test above."""
    trainer = rehearsed()
    run(trainer, WARM_UP + 1, logged=1000)
    with pytest.raises(AssertionError, match="_local_scalar_dense waits"), NoWaiting():
        trainer.replayed._body()


def test_what_changes_its_form_is_captured_anew():
    trainer = rehearsed()
    run(trainer, WARM_UP + 2, logged=1000)
    trainer.agent.memory["new"] = torch.zeros(trainer.num_slots)
    trainer.replayed.settle()
    run(trainer, 1)
    assert trainer.replayed._held is None
    before = trainer.replayed.replays
    run(trainer, WARM_UP + 2, logged=1000)
    assert trainer.replayed.replays > before


def test_refused_where_there_is_no_gpu():
    with pytest.raises(UserError, match="cuda_graph=on: it needs a GPU, not cpu"):
        small_trainer(cuda_graph="on")


def test_an_agent_that_does_not_say_it_can_be_captured_is_refused(monkeypatch):
    assert not HaltingAgent.capturable  # a plug-in may count on the host

    class Own(find_agent("q")):
        capturable = False

    trainer = small_trainer(Own)
    monkeypatch.setattr(trainer, "device", torch.device("cuda"))
    with pytest.raises(UserError, match="decides on the host"):
        cuda_graph.check(trainer)


@pytest.mark.gpu
@pytest.mark.parametrize("bootstrap", BOOTSTRAPS)
def test_a_captured_graph_gives_the_numbers_of_ordinary_updates(bootstrap):
    changes = {"bootstrap": bootstrap, "augment": True, "device": "cuda", "optim": {"optimizer": "adamw", "ema": 0.9}}
    plain, replayed = small_trainer(**changes), small_trainer(cuda_graph="on", **changes)
    lines = run(plain, 40), run(replayed, 40)
    assert replayed.replayed._graph is not None and replayed.replayed.replays >= 20
    for one, other in zip(*lines, strict=True):
        assert one == pytest.approx(other, rel=1e-3, abs=1e-4)
    for name, tensor in numbers(plain).items():
        if tensor.is_floating_point() and name.startswith("core."):
            torch.testing.assert_close(numbers(replayed)[name], tensor, rtol=1e-3, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("changes", [
    {"compile": "on", "core": "bfloat16"}, {"optim": {"optimizer": "muon"}}, {"objective": "q"},
    {"optim": {"optimizer": "adamw", "grad_clip": 0.5}, "clues": (10, 12)},
], ids=str)  # fmt: skip
def test_a_captured_graph_whatever_the_recipe(changes):
    """Lines, an evaluation and a checkpoint in between, and a second capture after it."""
    changes = {"device": "cuda", "augment": True, "optim": {"optimizer": "adamw"}, **copy.deepcopy(changes)}
    near = {"rel": 1e-3, "abs": 1e-4}
    if "core" in changes:
        near = {"rel": 0.1, "abs": 0.02}
        core = build_core(small_core(dtype=changes.pop("core")), torch.Generator().manual_seed(0)).cuda()
        plain, replayed = (small_trainer(core=copy.deepcopy(core), cuda_graph=g, **changes) for g in ("off", "on"))
    else:
        plain, replayed = (small_trainer(cuda_graph=g, **changes) for g in ("off", "on"))
    for logged in (5, 8):
        for one, other in zip(run(plain, 24, logged), run(replayed, 24, logged), strict=True):
            assert one["loss/total"] == pytest.approx(other["loss/total"], **near)
        assert replayed.replayed._graph is not None and replayed.replayed.replays >= 6
        replayed.evaluate(replayed.test_puzzles, 4)
        tensors, state = replayed.state()
        state["step"] = replayed.step
        replayed.load_state({name: tensor.clone() for name, tensor in tensors.items()}, state)
        assert replayed.replayed.replays == 0


@pytest.mark.gpu
def test_a_gradient_that_is_not_finite_is_seen_in_a_replay(monkeypatch):
    from hrm_rl.measure import NonFiniteError

    trainer = small_trainer(cuda_graph="on", device="cuda", optim={"optimizer": "adamw"})
    run(trainer, WARM_UP + 2, logged=1000)
    next(iter(trainer.trained.values())).data.fill_(float("nan"))
    trainer.update()
    with pytest.raises(NonFiniteError):
        trainer.check_finite()


