"""One run on many devices: the processes that `torchrun` starts, each with its share of the slots.

    torchrun --nproc-per-node N -m hrm_rl.train ...        # one process (a rank) for each device

Rank r of N holds the slots r B / N to (r + 1) B / N - 1 of the B that one process would hold, with the very same random
keys. Gradients are averaged by DistributedDataParallel; what the host has to know of all ranks (sums of metrics, the
clock, a signal to stop) goes over gloo, so that nothing waits for a device. Of a single process, which is `ALONE`, all
of this is the identity.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from hrm_rl.devices import pick_device
from hrm_rl.errors import UserError

#: How long a rank waits for another that lives and does not answer. One that has died is noticed at once.
TIMEOUT = timedelta(minutes=30)
_NEEDED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # what torchrun sets


class RankLostError(UserError):
    """Another rank has died or does not answer; the run cannot go on."""


@dataclass(frozen=True)
class Ranks:
    """Where this process stands among those of a run. Every method that says "of all ranks" must be called by all."""

    rank: int = 0
    world: int = 1
    local: int = 0  # number on this machine: which of its GPUs is ours
    store: dist.Store | None = None  # words that ranks leave for each other

    @property
    def first(self) -> bool:
        """Whether this is the rank that writes and prints."""
        return self.rank == 0

    def device(self, name: str) -> torch.device:
        """The device of this rank: `name` for one process; each rank its own GPU where there are several."""
        device = pick_device(name)
        if self.world == 1 or device.type != "cuda":
            return device
        if device.index is not None:
            raise UserError(f"device must be auto, cpu or cuda with {self.world} ranks, not {name!r}")
        if self.local >= torch.cuda.device_count():
            raise UserError(f"rank {self.rank} has no GPU: this machine has {torch.cuda.device_count()}; start as many "
                            "ranks as there are GPUs, or use --device cpu")  # fmt: skip
        device = torch.device("cuda", self.local)
        torch.cuda.set_device(device)
        return device

    def share(self, slots: int) -> int:
        """How many of `slots` slots are this rank's. UserError where they cannot be split evenly."""
        if slots % self.world:
            raise UserError(f"num_envs={slots} cannot be split evenly over {self.world} ranks; choose a multiple of it")
        return slots // self.world

    # --- on the host ------------------------------------------------------------------------------------------

    def total(self, numbers: Sequence[float]) -> list[float]:
        """Sums of all ranks, number by number."""
        return self._reduced(numbers, dist.ReduceOp.SUM)

    def largest(self, numbers: Sequence[float]) -> list[float]:
        """The largest of all ranks, number by number."""
        return self._reduced(numbers, dist.ReduceOp.MAX)

    def _reduced(self, numbers: Sequence[float], operation: dist.ReduceOp) -> list[float]:
        if self.world == 1 or not numbers:
            return list(numbers)
        values = torch.tensor(numbers, dtype=torch.float64)
        with _saying_who_is_lost():
            dist.all_reduce(values, operation)
        return values.tolist()

    def gather(self, own: Tensor) -> Tensor:
        """The rows (b, ...) of all ranks, one after the other (N b, ...), bit for bit: on rank 0, elsewhere `own`."""
        if self.world == 1:
            return own
        raw = own.detach().cpu().contiguous().flatten().view(torch.uint8)
        parts = [torch.empty_like(raw) for _ in range(self.world)] if self.first else None
        with _saying_who_is_lost():
            dist.gather(raw, parts)
        return own if parts is None else torch.cat(parts).view(own.dtype).view(-1, *own.shape[1:])

    def rows(self, everyone: Tensor) -> Tensor:
        """This rank's part (b, ...) of the rows of all ranks (N b, ...)."""
        return everyone if self.world == 1 else everyone.chunk(self.world)[self.rank]

    def wait(self) -> None:
        """Go on once all ranks have come here."""
        self.total([0.0])

    def told(self, name: str, word: str | None) -> str:
        """The word that rank 0 has for all ranks under `name`; the others hand in None and wait for it."""
        if self.store is None:
            return word
        if self.first:
            self.store.set(name, word)
        return self.store.get(name).decode()

    def speaks(self) -> bool:
        """True for the first rank that asks: of an error that several have, one is to be told."""
        try:
            return self.store is None or self.store.add("speaks", 1) == 1
        except RuntimeError:  # torchrun, which keeps the store, is gone
            return True

    # --- on the device ----------------------------------------------------------------------------------------

    def averaging(self, parameters: Iterable[nn.Parameter], all_used: bool) -> DistributedDataParallel | None:
        """Call this on the loss: its backward pass then leaves the mean gradient of all ranks in `parameters`.

        all_used: every parameter has a gradient in every update (saves a look through the graph). None for one
        process. DistributedDataParallel hooks onto the parameters, so it does not matter that the segment was run,
        and its graph built, before the call.
        """
        if self.world == 1:
            return None
        with _saying_who_is_lost():
            return DistributedDataParallel(
                _Loss(parameters), gradient_as_bucket_view=True, find_unused_parameters=not all_used
            )

    def backward(self, loss: Tensor) -> None:
        """`loss.backward()`, which waits for the other ranks."""
        with _saying_who_is_lost():
            loss.backward()


ALONE = Ranks()


class _Loss(nn.Module):
    """A loss that is already there, and what it trains."""

    def __init__(self, parameters: Iterable[nn.Parameter]):
        super().__init__()
        self.trained = nn.ParameterList(parameters)

    def forward(self, loss: Tensor) -> Tensor:
        return loss


@contextlib.contextmanager
def joined() -> Iterator[Ranks]:
    """The ranks of this run, from what torchrun says in the environment; ALONE without it.

    While they are joined a UserError is raised by one rank only, the first that has it: the others leave with exit
    code 2 in silence.
    """
    if any(name not in os.environ for name in _NEEDED) or os.environ["WORLD_SIZE"] == "1":
        yield ALONE
        return
    store, rank, world = next(dist.rendezvous("env://", timeout=TIMEOUT))
    ranks = Ranks(rank, world, int(os.environ["LOCAL_RANK"]), store)
    try:
        # Tensors on the host go over gloo, those on a GPU over NCCL.
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=TIMEOUT)
        yield ranks
    except UserError as error:
        if not ranks.speaks():
            raise SystemExit(2) from error
        raise
    dist.destroy_process_group()  # not after an error: it would wait for ranks that are gone


@contextlib.contextmanager
def _saying_who_is_lost() -> Iterator[None]:
    """RankLostError where a collective ends because another rank has."""
    try:
        yield
    except RuntimeError as error:
        text = str(error).lower()
        if not isinstance(error, dist.DistError) and not any(word in text for word in ("gloo", "nccl", "peer")):
            raise
        raise RankLostError("another rank of the run has died or does not answer") from error
