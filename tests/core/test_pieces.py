"""A core computed in pieces (`hrm_rl/core/pieces.py`) computes and learns what it does as a whole."""

from __future__ import annotations

import threading
import time
from collections import Counter
from concurrent.futures import Future, ThreadPoolExecutor

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch._dynamo.utils import counters

from hrm_rl.core import HRMCore, State, packing, pieces
from hrm_rl.core.pieces import InPieces, Threads, cut
from hrm_rl.devices import can_compile
from hrm_rl.timing import CompileGuard
from tests.support.hrm_testing import MODES, lively_trainer, small_core, tiny_config

CPU, MANY = torch.device("cpu"), 10_000
SETTINGS = {"hidden_size": 128, "num_heads": 4, "puzzle_emb_ndim": 128, "dtype": "float32"}
needs_compiler = pytest.mark.skipif(not can_compile(CPU), reason="no C++ compiler")


@pytest.fixture
def uncompiled(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)


@pytest.fixture
def small_pieces(monkeypatch):
    """Cores are computed in pieces on two threads, however few slots there are, of two slots at most."""
    monkeypatch.setattr(pieces, "SMALLEST_STATE", 0)
    monkeypatch.setattr(pieces, "MOST_THREADS", 1 << 20)
    monkeypatch.setattr("hrm_rl.trainer.Threads", lambda count: Threads(2))
    monkeypatch.setattr(pieces, "LARGEST", 2 * 17 * 128)


def trainer_of(bootstrap: str = "extra_forward", compile: str = "on", **changes):
    """Its AdamW does not tell apart tiny gradients by their sign, which rounding decides."""
    core = HRMCore(small_core(**SETTINGS), torch.Generator().manual_seed(0))
    return lively_trainer(bootstrap=bootstrap, core=core, compile=compile, optim={"lr": 1e-3, "eps": 1e-3}, **changes)


def weights(trainer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainer.trained.items()}


# --- pieces -------------------------------------------------------------------------------------------------


@given(st.integers(1, 300), st.integers(1, pieces.LARGEST), st.integers(1, 4))
@example(64, 82 * 128, 2)
def test_pieces_hold_every_slot_once_and_fit(slots, numbers, threads):
    rows = cut(slots, numbers, threads)
    sizes = [piece.stop - piece.start for piece in rows]
    assert [row for piece in rows for row in range(piece.start, piece.stop)] == list(range(slots))
    assert max(sizes) - min(sizes) <= 1 and min(sizes) > 0
    assert len(rows) % threads == 0 or len(rows) == slots
    assert max(sizes) * numbers <= pieces.LARGEST + numbers  # rounding up may add a slot
    if (slots, numbers, threads) == (64, 82 * 128, 2):
        assert sizes == [16] * 4


@pytest.mark.usefixtures("uncompiled", "small_pieces")
@pytest.mark.parametrize("slots", [1, 2, 7])
@pytest.mark.parametrize("threads", [1, 3])
def test_results_and_gradients_are_those_of_the_whole(slots, threads):
    core = HRMCore(tiny_config(**SETTINGS), torch.Generator().manual_seed(0))
    core.embed_tokens.requires_grad_(False)
    tokens = torch.randint(1, 6, (slots, 16), generator=torch.Generator().manual_seed(1))
    given = torch.randn(2, slots, core.num_positions, 128, generator=torch.Generator().manual_seed(2))
    state = State(*given)
    where = Threads(threads)
    tail = InPieces(core.tail, where, list(core.parameters()))
    for a, b in zip(core.prefix(tokens, state), InPieces(core.prefix, where)(tokens, state), strict=True):
        assert torch.allclose(a, b, atol=1e-5) and not b.requires_grad
    with torch.no_grad():
        assert not tail(tokens, state).logits.requires_grad
    for loss in (lambda output: output.logits.square().sum(),
                 lambda output: output.logits.sin().sum() + output.state.z_H.pow(3).sum()):  # fmt: skip
        gradients = []
        for function in (core.tail, tail):
            core.zero_grad()
            output = function(tokens, state)
            loss(output).backward()
            gradients.append([output.logits, *(p.grad for p in core.parameters())])
        assert sum(gradient is not None for gradient in gradients[0]) > 5
        for a, b in zip(*gradients, strict=True):
            assert (a is None) == (b is None)
            assert a is None or torch.allclose(a, b, rtol=1e-4, atol=1e-4 * a.abs().max().item())


@pytest.mark.usefixtures("uncompiled", "small_pieces")
def test_each_thread_computes_on_one_core_with_code_of_its_own():
    seen: list[tuple[str, int, int]] = []

    class Core:
        def call(self, tokens, state):
            seen.append((threading.current_thread().name, torch.get_num_threads(), len(tokens)))
            return state

    before, where = torch.get_num_threads(), Threads(2)
    called = InPieces(Core().call, where)
    state = State(*torch.arange(8.0)[:, None, None].expand(8, 17, 128).repeat(2, 1, 1, 1))
    tokens = torch.zeros(8, 16, dtype=torch.int64)
    for _ in range(3):
        assert torch.equal(where.lead(called, tokens, state).z_L, state.z_L)
    assert set(Counter(name for name, *_ in seen).values()) == {6}
    assert {(cores, size) for _, cores, size in seen} == {(1, 2)} and torch.get_num_threads() == before
    assert len({id(function.__func__.__code__) for function in called.functions}) == 2
    assert where.lead(torch.get_num_threads) == 1


@pytest.mark.usefixtures("uncompiled", "small_pieces")
def test_what_is_raised_in_a_piece_comes_out_when_all_have_ended():
    ended: list[int] = []

    class Core:
        def call(self, tokens, state):
            if tokens[0, 0] == 0:
                raise ZeroDivisionError("piece 0")
            ended.append(int(tokens[0, 0]))
            return state

    where = Threads(2)
    called = InPieces(Core().call, where)
    tokens, state = torch.arange(1, 9)[:, None].repeat(1, 16), State(*torch.zeros(2, 8, 17, 128))
    called(tokens, state)
    ended.clear()
    with pytest.raises(ZeroDivisionError, match="piece 0"):
        where.lead(called, tokens - 1, state)
    assert sorted(ended) == [2, 4, 6]
    assert len(called(tokens, state).z_H) == 8  # the threads live on


@pytest.mark.usefixtures("uncompiled", "small_pieces")
def test_a_second_backward_pass_says_that_there_is_none():
    core = HRMCore(tiny_config(**SETTINGS), torch.Generator().manual_seed(0))
    tail = InPieces(core.tail, Threads(2), list(core.parameters()))
    tokens = torch.ones(4, 16, dtype=torch.int64)
    loss = tail(tokens, core.initial_state(4)).logits.sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="differentiated once"):
        loss.backward()


@pytest.mark.usefixtures("uncompiled", "small_pieces")
def test_parameters_that_share_a_gradient():
    """Autograd hands both of them one tensor, to which nobody may add."""

    class Core(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = torch.nn.Parameter(torch.ones(128)), torch.nn.Parameter(torch.ones(128))

        def call(self, tokens, state):
            return State(state.z_H + (self.a + self.b), state.z_L)

    core = Core()
    called = InPieces(core.call, Threads(2), list(core.parameters()))
    tokens, state = torch.zeros(8, 16, dtype=torch.int64), State(*torch.zeros(2, 8, 17, 128))
    called(tokens, state).z_H.sum().backward()
    assert core.a.grad.unique().tolist() == core.b.grad.unique().tolist() == [8 * 17]
    core.zero_grad()
    called(tokens, state).z_L.sum().backward()  # which has nothing to do with them
    assert core.a.grad is None


def test_threads_that_begin_later_have_all_cores():
    where = Threads(2)
    with ThreadPoolExecutor(1) as later:
        assert later.submit(torch.get_num_threads).result() == torch.get_num_threads()
    assert where.lead(torch.get_num_threads) == 1


def test_an_interruption_waits_for_the_leader(monkeypatch):
    ended, real = threading.Event(), Future.result

    def interrupted(future, timeout=None):
        monkeypatch.setattr(Future, "result", real)
        raise KeyboardInterrupt

    monkeypatch.setattr(Future, "result", interrupted)
    with pytest.raises(KeyboardInterrupt):
        Threads(1).lead(lambda: (time.sleep(0.3), ended.set()))
    assert ended.is_set()


# --- where ----------------------------------------------------------------------------------------------------


def test_only_where_it_was_measured_to_be_faster(monkeypatch):
    core = HRMCore(tiny_config(**SETTINGS))
    monkeypatch.setattr(pieces, "MOST_THREADS", 10_000)
    assert pieces.pay(core, MANY, CPU)
    assert not pieces.pay(core, 16, CPU)
    assert not pieces.pay(core, MANY, torch.device("meta"))
    assert not pieces.pay(HRMCore(tiny_config(**SETTINGS | {"hidden_size": 96})), MANY, CPU)
    assert not pieces.pay(HRMCore(tiny_config(**SETTINGS | {"hidden_size": 512})), MANY, CPU)
    assert pieces.pay(HRMCore(tiny_config(**SETTINGS | {"dtype": "bfloat16"})), MANY, CPU)
    assert not pieces.pay(HRMCore(tiny_config(**SETTINGS | {"dtype": "bfloat16", "hidden_size": 256})), MANY, CPU)
    assert not pieces.pay(torch.nn.Linear(128, 128), MANY, CPU)
    monkeypatch.setattr(pieces, "MOST_THREADS", 0)
    assert not pieces.pay(core, MANY, CPU)


@pytest.mark.usefixtures("uncompiled", "small_pieces")
def test_a_trainer_that_does_not_compile_computes_as_a_whole():
    assert trainer_of(compile="off").threads is None


# --- training -------------------------------------------------------------------------------------------------


@needs_compiler
@pytest.mark.usefixtures("uncompiled", "small_pieces")
@pytest.mark.parametrize("bootstrap", MODES)
def test_updates_learn_what_those_of_the_whole_learn(bootstrap):
    def learned(compile: str) -> dict[str, torch.Tensor]:
        trainer = trainer_of(bootstrap, compile)
        assert (trainer.threads is not None) == (compile == "on")
        for number in range(4):
            assert bool(trainer.update(detailed=number == 2)) == (number == 2)
        return weights(trainer)

    whole, in_pieces, again = learned("off"), learned("on"), learned("on")
    assert any(not torch.equal(whole[name], in_pieces[name]) for name in whole)  # else nothing was in pieces
    for name, value in whole.items():
        assert torch.allclose(value, in_pieces[name], atol=1e-4)
        assert torch.equal(in_pieces[name], again[name])


@needs_compiler
@pytest.mark.usefixtures("uncompiled", "small_pieces")
@pytest.mark.parametrize("objective", ["supervised", "q"])
def test_each_objective_alone(objective):
    trainer = trainer_of(objective=objective)
    core = {name: value.clone() for name, value in trainer.core.state_dict().items()}
    before = weights(trainer)
    for _ in range(2):
        trainer.update()
    moved = {name.partition(".")[0] for name, value in weights(trainer).items() if not torch.equal(value, before[name])}
    assert moved == {"supervised": {"core"}, "q": {"agent"}}[objective]
    same = all(torch.equal(value, core[name]) for name, value in trainer.core.state_dict().items())
    assert same == (objective == "q")


@needs_compiler
@pytest.mark.usefixtures("uncompiled", "small_pieces")
def test_a_resumed_run_goes_on_number_for_number(monkeypatch):
    monkeypatch.setattr(packing, "SMALLEST_STATE", 0)
    trainer, resumed = trainer_of("shared_prefix"), trainer_of("shared_prefix")
    for _ in range(3):
        trainer.update()
    tensors, state = trainer.state()
    resumed.load_state({name: tensor.clone() for name, tensor in tensors.items()}, state | {"step": trainer.step})
    for _ in range(3):
        trainer.update()
        resumed.update()
    assert all(torch.equal(value, weights(resumed)[name]) for name, value in weights(trainer).items())


@pytest.mark.slow
@needs_compiler
@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_compiled_pieces_learn_what_the_plain_whole_learns(dtype, monkeypatch):
    """... are graphs in every call, and nothing is compiled once all has been called (threads that share what
    torch.compile keeps compile anew now and then)."""
    monkeypatch.setattr(packing, "SMALLEST_STATE", 0)
    monkeypatch.setitem(SETTINGS, "dtype", dtype)
    guard = CompileGuard()
    whole, in_pieces = trainer_of(compile="off"), trainer_of(compile="on")
    for _ in range(4):
        whole.update()
        in_pieces.update()
    if dtype == "float32":  # bfloat16 rounds some decisions away
        assert all(torch.allclose(value, weights(in_pieces)[name], atol=1e-4) for name, value in weights(whole).items())
    guard.check("pieces", in_pieces.update, in_pieces.engine)
    graphs = counters["stats"]["unique_graphs"]
    for _ in range(300):
        in_pieces.update()
    assert counters["stats"]["unique_graphs"] == graphs
    in_pieces.core.load_state_dict(whole.core.state_dict())
    slots = whole.envs.slots
    logits, same = (t.segment(slots.tokens, State(slots.z_H, slots.z_L).detach()).logits for t in (whole, in_pieces))
    assert torch.allclose(logits, same, atol=(1e-4 if dtype == "float32" else 0.05) * logits.abs().max().item())
