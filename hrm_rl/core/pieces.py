"""Segments computed a few slots at a time, on all threads at once, for training on a CPU.

PyTorch shares each operation among its threads, all of which wait for the last one before the next operation begins,
and what they leave is too much for their caches. Slots do not depend on each other, so here a thread takes a piece of
them through all operations of a call, by itself (docs/PERFORMANCE.md).

A piece's backward pass runs as its forward pass did, and the gradients are added up in the order of the slots:
numbers depend on how many threads there are, not on which was faster.
"""

from __future__ import annotations

import contextvars
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from hrm_rl.core.base import CoreOutput, State
from hrm_rl.core.recurrent import RecurrentCore

LARGEST = 1 << 18  # numbers in the state of a piece, or a slot more
#: Features of a position with which it was measured to be faster; narrower cores lose by it, wider ones gain nothing.
WIDTHS = {torch.float32: range(128, 512), torch.bfloat16: range(128, 256)}
SMALLEST_STATE = 1 << 18  # numbers in a state of all slots
MOST_THREADS = 4
# In C++ as a whole, which leaves the interpreter to the other threads.
COMPILE = {"cpp_wrapper": True}

Function = Callable[[Tensor, State], State | CoreOutput]


def pay(core: nn.Module, num_slots: int, device: torch.device) -> bool:
    """Whether a compiled core is faster in pieces. Cores of other kinds may do things that threads disturb: no."""
    return (
        isinstance(core, RecurrentCore) and core.hidden_size in WIDTHS.get(core.dtype, ()) and device.type == "cpu"
        and num_slots * core.num_positions * core.hidden_size >= SMALLEST_STATE
        and torch.get_num_threads() <= MOST_THREADS
        and all(isinstance(method, MethodType) for method in (core.prefix, core.tail))
    )  # fmt: skip


class Threads:
    """Threads that compute on one core each: `count` workers and a leader; they end with this object."""

    def __init__(self, count: int):
        self.count = count
        before = torch.get_num_threads()
        self._workers = [ThreadPoolExecutor(1, f"worker {number}") for number in range(count)]
        self._leader = ThreadPoolExecutor(1, "leader")
        wait([thread.submit(_on_one_core) for thread in (*self._workers, self._leader)])
        with ThreadPoolExecutor(1) as passing:  # the setting is that of threads to come, too
            passing.submit(torch.set_num_threads, before)

    def lead(self, function: Callable, *arguments) -> Any:
        """What `function` returns, called on the leader; an interruption (Ctrl-C) is raised when it has ended.

        What calls functions in pieces belongs there: after operations on several cores PyTorch's own threads keep
        them busy for a while, and the pieces wait.
        """
        running = self._leader.submit(contextvars.copy_context().run, function, *arguments)
        try:
            return running.result()
        except BaseException:
            wait([running])
            raise

    def map(self, function: Callable, jobs: dict[int, Any]) -> dict[int, Any]:
        """`function` of the number of the worker (number of the job modulo `count`) and each job, by their numbers;
        all have ended when one's exception is raised."""
        running = {}
        for number, job in jobs.items():
            worker = number % self.count
            run = contextvars.copy_context().run
            running[number] = self._workers[worker].submit(run, function, worker, job)
        wait(running.values())
        return {number: job.result() for number, job in running.items()}


def _on_one_core() -> None:
    torch.set_num_threads(1)
    torch.get_num_threads()  # takes over what was set last in any thread, once


class InPieces:
    """A function of slots, in pieces: (tokens (B, S), State) -> State or CoreOutput, no row of which needs another.

    Args:
        method: Of which object it is what; `state` must carry no gradient (`RecurrentCore.prefix` and `tail`).
        threads: Where.
        parameters: Those the function's result is to have a gradient for; none: it has none.

    Attributes:
        functions: The compiled function of each thread. Each has code of its own: torch.compile keeps what it has
            compiled with the code, and its look-up fails now and then (and compiles anew) when threads share it.
    """

    def __init__(self, method: MethodType, threads: Threads, parameters: Sequence[Tensor] = ()):
        self.functions: list[Function] = [
            torch.compile(_copy(method), dynamic=False, options=COMPILE) for _ in range(threads.count)
        ]
        self.threads = threads
        self.parameters = list(parameters)
        self._begun: set[tuple[str, int, int]] = set()

    def __call__(self, tokens: Tensor, state: State) -> State | CoreOutput:
        learned = [p for p in self.parameters if p.requires_grad] if torch.is_grad_enabled() else []
        if learned:
            return _join(_Learned.apply(self, tokens, *state, *learned))
        return _join(_together([part for _, part in self.parts(tokens, State(*state), gradient=False)]))

    def parts(self, tokens: Tensor, state: State, gradient: bool) -> list[tuple[slice, tuple[Tensor, ...]]]:
        """Which rows each piece has, and what the function says of them."""

        def call(worker: int, rows: slice) -> tuple[Tensor, ...]:
            with torch.set_grad_enabled(gradient):
                return _split(self.functions[worker](tokens[rows], State(state.z_H[rows], state.z_L[rows])))

        rows = cut(len(tokens), state.z_H[0].numel(), self.threads.count)
        return list(zip(rows, self.run(call, rows, rows, f"gradient={gradient}"), strict=True))

    def run(self, call: Callable, jobs: Sequence, rows: Sequence[slice], kind: str) -> list:
        """`call` of each job; alone the first one of its kind and size on its thread, for that may have to compile."""
        results, together = {}, {}
        for number, (job, piece) in enumerate(zip(jobs, rows, strict=True)):
            new = (kind, piece.stop - piece.start, number % self.threads.count)
            if new in self._begun:
                together[number] = job
            else:
                results |= self.threads.map(call, {number: job})
                self._begun.add(new)
        results |= self.threads.map(call, together)
        return [results[number] for number in range(len(jobs))]


class _Learned(torch.autograd.Function):
    """The pieces' results as one, whose backward pass is theirs."""

    @staticmethod
    def forward(ctx, pieces: InPieces, tokens: Tensor, z_H: Tensor, z_L: Tensor, *learned: Tensor):
        ctx.set_materialize_grads(False)
        ctx.pieces, ctx.learned = pieces, learned
        ctx.parts = pieces.parts(tokens, State(z_H, z_L), gradient=True)
        return _together([tuple(t.detach() for t in part) for _, part in ctx.parts])

    @staticmethod
    @once_differentiable
    def backward(ctx, *gradients: Tensor | None):
        if ctx.parts is None:
            raise RuntimeError("a segment in pieces can be differentiated once: its intermediate results are freed")

        def call(worker: int, job: tuple[slice, tuple[Tensor, ...]]) -> tuple[Tensor | None, ...]:
            rows, part = job
            used = [(t, g[rows]) for t, g in zip(part, gradients, strict=True) if g is not None and t.requires_grad]
            if not used:
                return (None,) * len(ctx.learned)
            return torch.autograd.grad([t for t, _ in used], ctx.learned, [g for _, g in used], allow_unused=True)

        each = ctx.pieces.run(call, ctx.parts, [rows for rows, _ in ctx.parts], "backward")
        ctx.parts = None
        total = list(each[0])
        for gradients_of_piece in each[1:]:  # not in place: two parameters may have been given one tensor
            for at, gradient in enumerate(gradients_of_piece):
                if gradient is not None:
                    total[at] = gradient if total[at] is None else total[at] + gradient
        return None, None, None, None, *total


def cut(slots: int, numbers: int, threads: int) -> list[slice]:
    """Rows of the pieces: of at most `LARGEST` numbers, `numbers` a slot, as many for each thread, and where the
    slots allow it (a size is compiled for itself) all of one size."""
    least = -(-max(1, -(-slots * numbers // LARGEST)) // threads) * threads
    even = (count for count in range(least, 2 * least + 1, threads) if slots % count == 0)
    count = min(slots, next(even, least))
    edges = [slots * piece // count for piece in range(count + 1)]
    return [slice(*ends) for ends in zip(edges, edges[1:], strict=False)]


def _copy(method: MethodType) -> MethodType:
    """The same method with code of its own."""
    original = method.__func__
    code = original.__code__.replace()
    function = FunctionType(code, original.__globals__, original.__name__, original.__defaults__, original.__closure__)
    function.__kwdefaults__ = original.__kwdefaults__
    return MethodType(function, method.__self__)


def _split(output: State | CoreOutput) -> tuple[Tensor, ...]:
    return (*output.state, output.logits) if isinstance(output, CoreOutput) else tuple(output)


def _join(tensors: Sequence[Tensor]) -> State | CoreOutput:
    state = State(*tensors[:2])
    return CoreOutput(state, *tensors[2:]) if tensors[2:] else state


def _together(parts: Sequence[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    return tuple(torch.cat(tensors) for tensors in zip(*parts, strict=True))
