"""A segment as a fixed point: a solver, and differentiation by the implicit function theorem.

Source: HRM, arXiv:2506.21734, section 2.2. There f_L runs to its fixed point z_L* = f_L(z_L*, z_H, x), f_H makes one
step with it, z_H <- f_H(z_H, z_L*) = F(z_H), and where F has a fixed point of its own

    d z_H* / d theta = (I - J_F)^-1  dF / d theta          (equation 1; J_F is the Jacobian of F at z_H*)

of which the 1-step gradient keeps the first term of (I - J_F)^-1 = I + J_F + J_F^2 + ... twice: for F and, inside it,
for f_L (equations 2 and 3).

What is solved here is the pair of equations z_L = f_L(z_L, z_H, x), z_H = f_H(z_H, z_L): the fixed point of the map M
that calls each network once, in the order of a segment's last calls. Its fixed points are those of the paper's F (with
the z_L* that belongs to them), and the theorem gives them the same derivative, since the solution of a pair of
equations has one however it was found; but it needs one solver where F needs a solver within a solver. The calls of M
are those that the 1-step gradient passes: the backward pass solves u = g + J_M^T u, and with u = g it is the 1-step
gradient. Any core with a row of calls has such a map.

Both solvers look at every puzzle on its own: one that has come to the tolerance stays where it is, whatever its
neighbours do. On a GPU all steps are run, since a look whether any is left would wait for the device; the numbers are
the same. A puzzle that does not get there keeps its best iterate (least residual), and the residual is handed out.

Why not torchdeq (0.1.0 of 2023, its only release)? It works with torch 2.13, and the tests compare with it, but: its
Anderson mixing has an absolute ridge, 1e-4 beside squared residuals, and needed 84 steps to 1e-10 on a contraction by
0.9 where plain repetition needs 34; it stops for a batch as a whole, so that a puzzle's numbers depend on its
neighbours; and it solves in the dtype of the state, which fails in bfloat16.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from hrm_rl.core.base import State

RIDGE = 10  # of Anderson's least squares, in roundings of the dtype


class Settings(NamedTuple):
    """How to solve; the fields of `CoreConfig` without solver_."""

    tol: float
    steps: int
    method: str = "anderson"
    window: int = 10


class Solution(NamedTuple):
    """What a solver came to, for B problems of n numbers."""

    z: Tensor  # (B, n) f of the iterate with the least residual
    residual: Tensor  # (B,) |f(x) - x| / |f(x)| of that iterate
    steps: Tensor  # (B,) int64, evaluations of f until the tolerance was met, or all of them


def solve(f: Callable[[Tensor], Tensor], start: Tensor, settings: Settings) -> Solution:
    """A fixed point of f, (B, n) -> (B, n) row by row, from `start`, with at most `settings.steps` evaluations of f.

    method: "iterate" (z <- f(z)) or "anderson" (type II, Walker & Ni, SIAM J. Numer. Anal. 49, 2011: the next z is the
    combination of the last `window` values of f whose combined residual is least; on a linear f, as in the backward
    pass, that is GMRES as long as no value has left the window: Walker & Ni, theorem 2.2). Rows stop on their own; a
    row that is not finite is left behind with a residual that is not finite.
    """
    tol, steps, method, window = settings
    x, value = start, f(start)
    difference = value - x
    best, least = value, _relative(difference, value)
    taken = torch.ones(len(x), dtype=torch.int64, device=x.device)
    values, differences = [value], [difference]
    for _ in range(steps - 1):
        running = ~(least <= tol)  # NaN runs on
        if x.device.type == "cpu" and not bool(running.any()):
            break
        x = _mix(values, differences) if method == "anderson" else value
        value = f(x)
        difference = value - x
        residual = _relative(difference, value)
        better = running & ((residual < least) | least.isnan())
        best = torch.where(better[:, None], value, best)
        least = torch.where(better, residual, least)
        taken += running
        values, differences = [*values, value][-window:], [*differences, difference][-window:]
    return Solution(best, least, taken)


def _relative(difference: Tensor, value: Tensor) -> Tensor:
    """|difference| / |value| of every row; 0 where both are 0."""
    return difference.norm(dim=1) / value.norm(dim=1).clamp(min=torch.finfo(value.dtype).tiny)


def _mix(values: list[Tensor], differences: list[Tensor]) -> Tensor:
    """sum_i a_i values_i, with the a of sum 1 for which |sum_i a_i differences_i| is least; row by row.

    Differences shrink over many powers of ten, so each is measured by its own length, and the ridge with it.
    """
    G = torch.stack(differences, dim=1)  # (B, k, n)
    tiny = torch.finfo(G.dtype).tiny
    length = G.norm(dim=2, keepdim=True).clamp(min=tiny)
    unit = G / length
    gram = torch.bmm(unit, unit.transpose(1, 2)).double()
    share = (length.amin(dim=1, keepdim=True) / length)[..., 0].double()
    ridge = torch.full_like(share, RIDGE * torch.finfo(G.dtype).eps)
    c, _ = torch.linalg.solve_ex(gram + torch.diag_embed(ridge), share)  # solve() would wait for the device
    a = c * share
    a = (a / a.sum(dim=1, keepdim=True)).to(G.dtype)
    return torch.bmm(a[:, None], torch.stack(values, dim=1))[:, 0]


def fixed_point(step: Callable[[State], State], state: State, settings: Settings) -> State:
    """Where repeating `step` leads, from `state`, with at most `settings.steps` calls of it; see `solve`.

    A part of the state that `step` hands back as it is (the very tensor) is given, not solved for.
    """
    first = step(state)
    moved = _moved(state, first)

    def f(flat: Tensor) -> Tensor:
        return _flat(step(_unflat(flat, first, moved)), moved)

    if settings.steps == 1:
        return first
    settings = settings._replace(steps=settings.steps - 1)
    return _unflat(solve(f, _flat(first, moved), settings).z, first, moved)


def differentiated(
    step: Callable[[State], State], state: State, settings: Settings, solved: dict[str, Tensor]
) -> State:
    """step(state) at, or near, a fixed point, with the gradient of the implicit function theorem.

    The parameters that `step` uses get (d step / d theta)^T u with u = (I - J^T)^-1 g, found by the same solver as u =
    g + J^T u from u = g. Writes the relative residuals (B,) into `solved`: "forward" now, "backward" when it is found.
    """
    start = State(*(z.detach().requires_grad_() for z in state))
    out = step(start)
    moved = _moved(start, out)
    flat = _flat(out, moved)
    with torch.no_grad():
        solved["forward"] = _relative(flat - _flat(start, moved), flat)
    parts = [z for z, moves in zip(start, moved, strict=True) if moves]
    return _unflat(_AtFixedPoint.apply(flat, (flat, parts), settings, solved), out, moved)


class _AtFixedPoint(torch.autograd.Function):
    """The identity on f(z); backward turns the gradient g there into u = g + J^T u, J the Jacobian of f at z."""

    @staticmethod
    def forward(ctx, flat: Tensor, graph: tuple, settings: Settings, solved: dict[str, Tensor]) -> Tensor:
        ctx.graph, ctx.settings, ctx.solved = graph, settings, solved
        return flat.clone()

    @staticmethod
    def backward(ctx, g: Tensor) -> tuple:
        flat, parts = ctx.graph

        def f(u: Tensor) -> Tensor:
            # of a core whose step does not look at its state, J is 0 and no part is in the graph
            products = torch.autograd.grad(flat, parts, u, retain_graph=True, materialize_grads=True)
            return g + torch.cat([part.flatten(1) for part in products], dim=1).to(g.dtype)

        solution = solve(f, g, ctx.settings)
        ctx.solved["backward"] = solution.residual
        return solution.z, None, None, None


def _moved(before: State, after: State) -> list[bool]:
    return [new is not old for old, new in zip(before, after, strict=True)]


def _flat(state: State, moved: list[bool]) -> Tensor:
    """The parts that are solved for, (B, n), at least in float32."""
    parts = [z.flatten(1) for z, moves in zip(state, moved, strict=True) if moves]
    return torch.cat([z if z.dtype == torch.float64 else z.float() for z in parts], dim=1)


def _unflat(flat: Tensor, like: State, moved: list[bool]) -> State:
    """The inverse of `_flat`; the other parts, the shapes and the dtype are those of `like`."""
    parts, at = [], 0
    for z, moves in zip(like, moved, strict=True):
        size = z[0].numel()
        parts.append(flat[:, at : at + size].view_as(z).to(z.dtype) if moves else z)
        at += size if moves else 0
    return State(*parts)
