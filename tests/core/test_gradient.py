"""How far the gradient of a segment reaches: each mode against an unrolled reference or a closed form."""

from __future__ import annotations

import copy

import pytest
import torch
from hrm_testing import close, small_puzzles, small_trainer, tiny_config

from hrm_rl import measure
from hrm_rl.core import HRMCore, State, build_core
from hrm_rl.core.implicit import Settings, fixed_point, solve
from hrm_rl.core.recurrent import Inputs, RecurrentCore
from hrm_rl.errors import UserError

MODES = ("one_step", "last_k", "full", "implicit")


def puzzles(count=3):
    return small_puzzles(count).questions.long(), small_puzzles(count).answers.long()


def make_core(gradient="one_step", **changes) -> HRMCore:
    core = HRMCore(tiny_config(gradient=gradient, **changes), torch.Generator().manual_seed(1))
    with torch.no_grad():  # the puzzle embedding starts at 0, and a gradient is to pass it
        core.puzzle_emb.weights.normal_(generator=torch.Generator().manual_seed(2))
    return core


def weight_of(core):
    return torch.randn(core.num_positions, core.hidden_size, generator=torch.Generator().manual_seed(3))


def gradients(core, tokens) -> dict[str, torch.Tensor]:
    """Of a fixed linear reading of z_H, so that the Q-head's path is in it, and of the logits."""
    out = core(tokens, core.initial_state(len(tokens)))
    value = (out.state.z_H * weight_of(core)).sum() + out.logits.square().sum()
    core.zero_grad()
    value.backward()
    return {name: p.grad.clone() for name, p in core.named_parameters() if p.grad is not None}


def unrolled(core, tokens, detach_before: int) -> dict[str, torch.Tensor]:
    """The published loop written out once more, z detached before call number `detach_before` (counted from 0)."""
    c, (z_H, z_L) = core.config, core.initial_state(len(tokens))
    x, rope = core.embed(tokens), (core.rope_cos, core.rope_sin)

    def call(which, x):
        return core.call(which, z_H, z_L, Inputs(x, rope, None))

    number = 0
    for _ in range(c.H_cycles):
        for step in range(c.L_cycles + 1):
            if number == detach_before:
                z_H, z_L, x = z_H.detach(), z_L.detach(), core.embed(tokens)
            if step < c.L_cycles:
                z_L = call("L", x if number >= detach_before else x.detach())[1]
            else:
                z_H = call("H", x)[0]
            number += 1
    value = (z_H * weight_of(core)).sum() + core.lm_head(z_H)[:, core.prefix_len :].square().sum()
    core.zero_grad()
    value.backward()
    return {name: p.grad.clone() for name, p in core.named_parameters() if p.grad is not None}


def same(got, wanted) -> bool:
    assert set(got) == set(wanted)
    return all(torch.allclose(got[n], wanted[n], rtol=1e-3, atol=1e-5 * wanted[n].abs().max()) for n in wanted)


@pytest.mark.parametrize("gradient, k, detach_before", [("one_step", 2, 4), ("last_k", 1, 5), ("last_k", 3, 3),
                                                        ("last_k", 99, 0), ("full", 2, 0)])  # fmt: skip
def test_reaches_the_calls_it_names(gradient, k, detach_before):
    core, (tokens, _) = make_core(gradient, gradient_k=k), puzzles()
    got = gradients(core, tokens)
    assert same(got, unrolled(core, tokens, detach_before))
    other = detach_before + (1 if detach_before == 0 else -1)  # negative control: one call more or fewer is seen
    assert set(got) != set(unrolled(core, tokens, other)) or not same(got, unrolled(core, tokens, other))


def test_which_parameters_get_a_gradient():
    """One call of f_H alone does not pass f_L, and so not the embeddings either."""
    core, (tokens, _) = make_core("last_k", gradient_k=1), puzzles()
    assert {name.split(".")[0] for name in gradients(core, tokens)} == {"H_level", "lm_head"}
    for mode in MODES:
        found = gradients(make_core(mode), tokens)
        assert set(found) == {name for name, _ in core.named_parameters()}, mode
        assert all(g.abs().sum() > 0 for g in found.values()), mode


@pytest.mark.parametrize("gradient", MODES[:3])
def test_values_do_not_depend_on_the_gradient(gradient):
    tokens, _ = puzzles()
    core, other = make_core(), make_core(gradient)
    out, again = (c(tokens, c.initial_state(3)) for c in (core, other))
    assert torch.equal(out.logits, again.logits) and torch.equal(out.state.z_L, again.state.z_L)


# --- a linear contraction -----------------------------------------------------------------------------------


class LinearCore(RecurrentCore):
    """z_L <- A z_L + C z_H + x, z_H <- D z_H + E z_L: all fixed points and their derivatives in closed form."""

    def build(self, generator):
        D = self.hidden_size
        draw = lambda: torch.randn(D, D, generator=generator or torch.Generator().manual_seed(0))  # noqa: E731
        matrices = {n: torch.nn.Parameter(m / torch.linalg.matrix_norm(m, 2) * r) for n, m, r in
                    (("A", draw(), 0.6), ("C", draw(), 0.4), ("D", draw(), 0.5), ("E", draw(), 0.4))}  # fmt: skip
        self.m = torch.nn.ParameterDict(matrices)
        self.calls = (*("L",) * self.config.L_cycles, "H") * self.config.H_cycles

    def call(self, which, z_H, z_L, inputs):
        if which == "L":
            return z_H, z_L @ self.m["A"].T + z_H @ self.m["C"].T + inputs.injection
        return z_H @ self.m["D"].T + z_L @ self.m["E"].T, z_L


def linear(gradient, scale=1.0, **changes):
    settings = dict(hidden_size=6, puzzle_emb_ndim=0, positions="none", solver_tol=1e-12, solver_steps=200)
    core = LinearCore(tiny_config(gradient=gradient, **settings | changes), torch.Generator().manual_seed(5)).double()
    core.dtype = torch.float64
    with torch.no_grad():
        for matrix in core.m.values():
            matrix *= scale
    return core


def exact_fixed_point(core, tokens):
    """(z_H, z_L) by one linear solve of both equations, differentiable: autograd through it is equation 1."""
    x, D = core.embed(tokens), core.hidden_size
    m = core.m
    big = torch.cat((torch.cat((m["A"], m["C"]), 1), torch.cat((m["E"], m["D"]), 1)))  # of (z_L, z_H)
    inverse = torch.linalg.inv(torch.eye(2 * D, dtype=torch.float64) - big)
    z = torch.cat((x, torch.zeros_like(x)), -1) @ inverse.T
    return State(z[..., D:], z[..., :D])


def reading(core, state):
    return (state.z_H * weight_of(core).double()).sum()


def of(core, value):
    found = torch.autograd.grad(value, list(core.parameters()), allow_unused=True)
    return torch.cat([g.flatten() for g in found if g is not None])


@pytest.mark.parametrize("solver", ["anderson", "iterate"])
def test_implicit_is_the_closed_form(solver):
    core, (tokens, _) = linear("implicit", solver=solver), puzzles()
    out = core(tokens, core.initial_state(3))
    wanted = exact_fixed_point(core, tokens)
    close(out.state.z_H, wanted.z_H.detach(), 1e-9, "z_H")
    close(out.state.z_L, wanted.z_L.detach(), 1e-9, "z_L")
    got, exact = of(core, reading(core, out.state)), of(core, reading(core, wanted))
    close(got, exact, 1e-8 * float(exact.abs().max()), "gradient")
    assert max(core.solved["forward"].max(), core.solved["backward"].max()) <= 1e-12
    short = measure.with_gradient(core, "one_step")  # negative control, from the very same state
    one_step = of(short, reading(short, short.tail(tokens, out.state.detach()).state))
    assert torch.nn.functional.cosine_similarity(one_step, exact, dim=0) < 0.99


def test_full_tends_to_implicit():
    """The error of backpropagation through N cycles falls with N, to nothing."""
    tokens, _ = puzzles()
    core = linear("implicit")
    exact = of(core, reading(core, exact_fixed_point(core, tokens)))
    errors = []
    for cycles in (1, 4, 16, 64):
        full = linear("full", H_cycles=cycles)
        got = of(full, reading(full, full(tokens, full.initial_state(3)).state))
        errors.append(float((got - exact).norm() / exact.norm()))
    assert errors[0] > 0.1 and errors[0] > errors[1] > errors[2] > errors[3] and errors[3] < 1e-9


def test_gradient_check():
    """Finite differences of the solved segment itself (float64)."""
    core, (tokens, _) = linear("implicit", hidden_size=4), puzzles(1)
    names = list(core.m)

    def solved_reading(*matrices):
        parameters = {f"m.{n}": m for n, m in zip(names, matrices, strict=True)}
        return reading(core, torch.func.functional_call(core, parameters, (tokens, core.initial_state(1))).state)

    matrices = [core.m[n].detach().clone().requires_grad_() for n in names]
    assert torch.autograd.gradcheck(solved_reading, matrices, eps=1e-6, atol=1e-6)


def test_an_expansion_is_reported():
    """No fixed point that repetition finds: every residual is far above the tolerance and is handed out."""
    core, (tokens, _) = linear("implicit", scale=4.0, solver="iterate", solver_tol=1e-3, solver_steps=20), puzzles()
    out = core(tokens, core.initial_state(3))
    assert out.state.z_H.isfinite().all()
    reading(core, out.state).backward()
    for which in ("forward", "backward"):
        assert core.solved[which].shape == (3,) and core.solved[which].min() > 0.05, which
    assert all(p.grad.isfinite().all() for p in core.m.values())


def test_agrees_with_torchdeq():
    deq = pytest.importorskip("torchdeq")
    core, (tokens, _) = linear("implicit"), puzzles()
    inputs, shape = core.inputs(tokens), core.initial_state(3)
    solver = deq.get_deq(core="sliced", f_solver="fixed_point_iter", b_solver="fixed_point_iter", ift=True, f_tol=1e-12,
                         b_tol=1e-12, f_max_iter=200, b_max_iter=200)  # fmt: skip
    (theirs,), info = solver(lambda z_H, z_L: list(core.run(("L", "H"), State(z_H, z_L), inputs)),
                             [z.contiguous() for z in shape])  # fmt: skip
    wanted = of(core, reading(core, State(*theirs)))
    got = of(core, reading(core, core(tokens, shape).state))
    close(got, wanted, 1e-7 * float(wanted.abs().max()), "torchdeq")
    assert copy.deepcopy(core).solved.keys() == {"forward", "backward"}


# --- the solver ---------------------------------------------------------------------------------------------


def contraction(rate, n=40, rows=3):
    generator = torch.Generator().manual_seed(0)
    A = torch.randn(n, n, dtype=torch.float64, generator=generator)
    A *= rate / torch.linalg.matrix_norm(A, 2)
    b = torch.randn(rows, n, dtype=torch.float64, generator=generator)
    return (lambda z: z @ A.T + b), b @ torch.linalg.inv(torch.eye(n, dtype=torch.float64) - A).T


@pytest.mark.parametrize("method", ["anderson", "iterate"])
@pytest.mark.parametrize("tol", [1e-2, 1e-5, 1e-9])
def test_tolerance(method, tol):
    f, exact = contraction(0.95)
    found = solve(f, torch.zeros_like(exact), Settings(tol, 400, method))
    assert (found.residual <= tol).all() and (found.steps < 400).all()
    shorter = solve(f, torch.zeros_like(exact), Settings(tol, int(found.steps.min()) - 1, method))
    assert (shorter.residual > tol).all()  # not one step more than it takes


def test_anderson_needs_fewer_steps():
    """Rotations by less than a quarter turn: plain repetition is slow, and the mixing knows the direction."""
    A = 0.99 * torch.tensor([[0.8, -0.6], [0.6, 0.8]], dtype=torch.float64)
    b = torch.ones(1, 2, dtype=torch.float64)
    steps = {m: int(solve(lambda z: z @ A.T + b, torch.zeros_like(b), Settings(1e-8, 5000, m)).steps) for m in
             ("anderson", "iterate")}  # fmt: skip
    assert steps["anderson"] <= 6 and steps["iterate"] > 200


def test_anderson_solves_a_linear_expansion():
    """With a window as wide as the problem it is GMRES, which needs no contraction; a narrow one is the control."""
    A = torch.randn(12, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    b = torch.ones(1, 12, dtype=torch.float64)
    assert torch.linalg.eigvals(A).abs().max() > 2
    found = {w: solve(lambda z: z @ A.T + b, b, Settings(1e-8, 20, "anderson", w)) for w in (20, 2)}
    close(found[20].z, b @ torch.linalg.inv(torch.eye(12, dtype=torch.float64) - A).T, 1e-5)
    assert found[20].residual <= 1e-8 < 1e-2 < found[2].residual


@pytest.mark.parametrize("method", ["anderson", "iterate"])
def test_rows_do_not_depend_on_each_other(method):
    f, exact = contraction(0.9, rows=1)

    def both(z):  # the second row never comes to rest
        return torch.cat((f(z[:1]), z[1:] + 1))

    start = torch.zeros_like(exact)
    alone, beside = solve(f, start, Settings(1e-4, 60, method)), solve(
        both, start.repeat(2, 1), Settings(1e-4, 60, method)
    )
    close(beside.z[:1], alone.z, 1e-12)
    assert beside.steps[0] == alone.steps[0] < 60 and beside.steps[1] == 60 and beside.residual[1] > 1e-4


@pytest.mark.parametrize("method", ["anderson", "iterate"])
def test_what_is_not_finite_says_so(method):
    found = solve(lambda z: z * float("nan"), torch.ones(2, 3), Settings(1e-3, 10, method))
    assert found.residual.isnan().all()
    f, exact = contraction(0.5, rows=1)
    found = solve(lambda z: torch.cat((f(z[:1]), z[1:] * float("nan"))), torch.zeros(2, 40, dtype=torch.float64),
                  Settings(1e-6, 100, method))  # fmt: skip
    close(found.z[:1], exact, 1e-5)
    assert found.residual[0] <= 1e-6 and found.residual[1].isnan()


def test_nothing_to_do():
    found = solve(lambda z: z.clone(), torch.zeros(2, 3), Settings(1e-3, 10))
    assert found.residual.tolist() == [0, 0] and found.steps.tolist() == [1, 1]


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_a_fixed_point_takes_no_more_calls_than_it_is_given(steps):
    calls = []

    def step(state):
        calls.append(state)
        return State(state.z_H + 1, state.z_L)  # never comes to rest

    found = fixed_point(step, State(torch.ones(2, 3, 4), torch.ones(2, 3, 4)), Settings(1e-3, steps, "iterate"))
    assert len(calls) == steps and torch.equal(found.z_H, torch.full((2, 3, 4), 1.0 + steps))


# --- in use -------------------------------------------------------------------------------------------------


class HighOnly(LinearCore):
    """Only z_H is solved for: z_L is handed back as it is, and must not end up in the equations."""

    def build(self, generator):
        super().build(generator)
        self.calls = ("H",) * 3


def test_a_part_that_is_not_called_is_given():
    torch.manual_seed(0)
    core = HighOnly(linear("implicit").config, torch.Generator().manual_seed(5)).double()
    z = [torch.randn(2, 16, 6, dtype=torch.float64) for _ in range(2)]
    tokens, _ = puzzles(2)
    out = core(tokens, State(*z))
    assert torch.equal(out.state.z_L, z[1])
    inverse = torch.linalg.inv(torch.eye(6, dtype=torch.float64) - core.m["D"])
    exact = z[1] @ core.m["E"].T @ inverse.T
    close(out.state.z_H, exact.detach(), 1e-9)
    names = [core.m["D"], core.m["E"]]
    got, wanted = (torch.autograd.grad(reading(core, State(s, z[1])), names) for s in (out.state.z_H, exact))
    for a, b in zip(got, wanted, strict=True):
        close(a, b, 1e-8 * float(b.abs().max()))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("bootstrap", ["shared_prefix", "extra_forward"])
def test_trains_in_the_environment(bootstrap, dtype):
    trainer = small_trainer(core=HRMCore(tiny_config(gradient="implicit", solver_steps=6, dtype=dtype)),
                            bootstrap=bootstrap)  # fmt: skip
    before = [p.detach().clone() for p in trainer.core.parameters()]
    for _ in range(3):
        trainer.update()
    line = trainer.line({}, 1.0)
    assert 0 < line["solver/forward_residual"] < 10 and 0 <= line["solver/forward_missed"] <= 1
    assert 0 < line["solver/backward_residual"] < 10 and 0 <= line["solver/backward_missed"] <= 1
    assert all(not torch.equal(a, b) for a, b in zip(before, trainer.core.parameters(), strict=True))


def test_a_core_that_ignores_its_state_has_the_one_step_gradient():
    """Its Jacobian is 0, so the series (I - J)^-1 ends with its first term."""
    tokens, _ = puzzles()
    found = {}
    for gradient in ("one_step", "implicit"):
        config = tiny_config(kind="direct_transformer", gradient=gradient)
        core = build_core(config, torch.Generator().manual_seed(1))
        found[gradient] = gradients(core, tokens)
    assert set(found["implicit"]) == set(found["one_step"]) and core.solved["backward"].tolist() == [0, 0, 0]
    assert all(torch.equal(g, found["one_step"][name]) for name, g in found["implicit"].items())


def test_other_gradients_log_no_solver():
    trainer = small_trainer()
    trainer.update()
    assert not any(tag.startswith("solver/") for tag in trainer.line({}, 1.0))


def test_is_not_compiled():
    with pytest.raises(UserError, match="compile=on: a solver"):
        small_trainer(core=HRMCore(tiny_config(gradient="implicit")), compile="on")


@pytest.mark.parametrize("changes, said", [({"solver_tol": 0.0}, "solver_tol"), ({"solver_steps": 0}, "solver_steps")])
def test_settings_out_of_range(changes, said):
    with pytest.raises(ValueError, match=said):
        tiny_config(**changes)


# --- how near the 1-step gradient comes ---------------------------------------------------------------------


def test_cosines_of_a_contraction():
    """Against the closed form at the fixed point, where all that is measured is known."""
    core, (tokens, labels) = linear("one_step", H_cycles=40), puzzles()
    got = measure.gradient_cosines(core, tokens, labels, core.initial_state(3))
    exact = exact_fixed_point(core, tokens)
    logits = core.lm_head(exact.z_H)[:, core.prefix_len :]
    loss = measure.supervised_loss(logits, labels, "softmax").sum()
    out = core(tokens, core.initial_state(3))
    short = measure.supervised_loss(out.logits, labels, "softmax").sum()
    wanted = torch.nn.functional.cosine_similarity(of(core, short), of(core, loss), dim=0).item()
    assert wanted < 0.999
    assert all(abs(got[name] - wanted) < 1e-6 for name in ("cosine", "cosine_solved", "cosine_full"))
    assert got["missed"] == got["missed_solved"] == 0 and got["backward"] <= 1e-12
    assert got["forward"] < 1e-6 and got["forward_solved"] <= 1e-12


def test_cosines_leave_the_core_alone():
    core, (tokens, labels) = make_core(), puzzles()
    values = measure.gradient_cosines(core, tokens, labels, core.initial_state(3), solver_steps=5)
    assert core.config.gradient == "one_step" and not core.solved
    assert all(p.grad is None for p in core.parameters())
    assert -1 <= values["cosine"] <= 1 and -1 <= values["cosine_full"] < 0.9999
    one_call = build_core(tiny_config(H_cycles=1, L_cycles=1))  # the 1-step gradient is the full one there
    assert measure.gradient_cosines(one_call, tokens, labels, one_call.initial_state(3))["cosine_full"] > 1 - 1e-9


def test_cosines_are_logged_where_asked_for():
    trainer = small_trainer(log_gradient_cosine=True)
    details = trainer.update(detailed=True)
    assert {tag for tag in details if tag.startswith("gradient/")} == {
        "gradient/" + n for n in measure.gradient_cosines(trainer.core, *puzzles(), trainer.core.initial_state(3))
    }
    assert not any(tag.startswith("gradient/") for tag in small_trainer().update(detailed=True))
