"""The training loop: one segment in every slot, one optimiser step, again.

Source: HRM, arXiv:2506.21734, section 2 (deep supervision, 1-step gradient, ACT), in the released code's scale:

    L = L_sup + 0.5 * [ BCE(q_halt, G_halt) + BCE(q_continue, G_continue) ],  sums over slots / number of slots

The loop trains through the very environment everyone else uses, in its torch form: the observation carries
the gradient of the last segment. An update reads `envs.slots`, asks the agent for actions, computes the
losses, steps the optimiser and then steps the environment, so that the next segment runs with new weights.
"""

from __future__ import annotations

import contextlib
import copy
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import fields, replace
from pathlib import Path

import gymnasium as gym
import torch
from torch import Tensor, nn

import hrm_rl  # noqa: F401 - registers the environments
from agents import AgentLoss, HaltingAgent, QHaltingAgent, Transition, View, decide, make_agent, raise_fault, view_of
from agents.q_targets import HALTED_SHARE, QLosses
from agents.registry import agent_name
from envs import HALT, Slots
from hrm_rl import cuda_graph, evaluation, measure
from hrm_rl.config import TrainConfig, cannot_be_made, check_gradient_k, small_core
from hrm_rl.core import CoreConfig, CoreOutput, RecurrentCore, State, build_core, find_core, packing, pieces
from hrm_rl.core.io import load_core, model_bytes
from hrm_rl.core.pieces import InPieces, Threads
from hrm_rl.core.q_head import QHead
from hrm_rl.cuda_graph import Replayed
from hrm_rl.devices import can_compile
from hrm_rl.errors import NonFiniteError, UserError
from hrm_rl.losses import supervised_loss
from hrm_rl.measure import FiniteWatch
from hrm_rl.metrics import Sums
from hrm_rl.optim import load_state_tensors, make_optimizers, set_learning_rate, shares_of_bound, state_tensors
from hrm_rl.parallel import ALONE, Ranks
from hrm_rl.tasks import PuzzleSet, load_puzzles
from hrm_rl.tasks.registry import DEFAULT_TASK

PROBE_PUZZLES = 32
#: How far the gradient reaches: no property of the weights, so a run may ask for another one than the loaded core's.
_OF_THE_RUN = ("gradient", "gradient_k", "solver", "solver_tol", "solver_steps", "solver_window")
_BY_SLOT = ("slots.", "stored.", "previous.", "memory.")  # tensors of a checkpoint with a row for each slot


def _here(function: Callable, *arguments):
    return function(*arguments)


def make_core(config: TrainConfig, device: torch.device) -> RecurrentCore:
    """The core a run starts from: from scratch by its seed, or `init_core`; objective=q needs a trained one."""
    kind = find_core(config.core.kind).kind
    if not config.from_scratch:
        config = replace(config, core=replace(config.core, kind=kind))
        loaded = load_core(config.init_core, device, size=config.size, task=config.task).core
        differs = [n for n in ("seq_len", "vocab_size") if getattr(loaded.config, n) != getattr(config.core, n)]
        if differs:
            raise UserError(f"init_core: {differs[0]} is {getattr(loaded.config, differs[0])} there, the task needs "
                            f"{getattr(config.core, differs[0])}")  # fmt: skip
        _refuse_other_sizes(config, loaded.config)
        given = {name: getattr(config.core, name) for name in _OF_THE_RUN if _is_given(config, name)}
        core = build_core(replace(loaded.config, **given, dtype=config.core.dtype)).to(device)
        check_gradient_k(core.config, loaded.config.gradient_k)
        _check_calls(config, core)
        core.load_state_dict(loaded.state_dict())
        return core
    core = build_core(config.core, torch.Generator().manual_seed(config.seed)).to(device)
    _check_calls(config, core)
    return core


def _check_calls(config: TrainConfig, core: RecurrentCore) -> None:
    """UserError for a gradient that was asked to reach more calls than a segment has."""
    k, calls = core.config.gradient_k, len(core.calls)
    if core.config.gradient == "last_k" and _is_given(config, "gradient_k") and k > calls:
        raise UserError(f"core.gradient_k must be at most {calls}, the calls of a segment of this core, not {k}")


def _refuse_other_sizes(config: TrainConfig, loaded: CoreConfig) -> None:
    """UserError if a setting of the core was given that the loaded core does not have."""
    for name in (f.name for f in fields(CoreConfig) if f.name not in ("seq_len", "vocab_size", "dtype", *_OF_THE_RUN)):
        given = getattr(config.core, name)
        if _is_given(config, name) and given != getattr(loaded, name):
            raise UserError(f"core.{name} is {given}, but the core that is loaded has {getattr(loaded, name)}")


def _is_given(config: TrainConfig, name: str) -> bool:
    """Whether that setting of the core differs from the usual one."""
    return getattr(config.core, name) != getattr(small_core(), name)


def user_puzzles(
    source: str | None, size: int, split: str, limit: int | None = None, task: str = DEFAULT_TASK
) -> PuzzleSet:
    """The shipped set, or a user's: a file is checked for uniqueness as well (the Hub's millions are not)."""
    unique = source is not None and not source.startswith("hf:")
    return load_puzzles(source or f"{task}-{size}", size, split, limit, unique, task)


def training_puzzles(config: TrainConfig) -> PuzzleSet:
    """The puzzles of `config.data`, or `train_limit` of them (always the same ones, whatever the seed)."""
    puzzles = user_puzzles(config.data, config.size, "train", task=config.task)
    if not config.train_limit or config.train_limit >= len(puzzles):
        return puzzles
    order = torch.randperm(len(puzzles), generator=torch.Generator().manual_seed(0))
    return puzzles.select(order[: config.train_limit].sort().values)


def made_for(puzzles: PuzzleSet) -> dict:
    """What a model file notes of the puzzles it is for, where its sizes do not say so (`evaluate.task_of`)."""
    return {} if puzzles.task == DEFAULT_TASK else {"task": puzzles.task, "size": puzzles.side}


class Trainer:
    """Trains a core and a halting agent as `config` says; `hrm_rl.train` drives it, tests call `update` themselves.

    One of several `ranks` trains on its share of the slots; `update`, `line`, `check_finite` and `state` are then to be
    called by all of them, and say what one process with all slots would.

    Attributes: core, agent, envs (torch form), optimizers, step (updates done), sums (running metrics),
    ema (name -> averaged parameter; empty where off), num_slots (those of this rank).
    """

    def __init__(
        self, config: TrainConfig, agent_class: type[HaltingAgent], agent_arguments: dict | None = None,
        *, core: nn.Module | None = None, puzzles: PuzzleSet | None = None, test_puzzles: PuzzleSet | None = None,
        ranks: Ranks = ALONE,
    ):  # fmt: skip
        self.config = config
        self.ranks = ranks
        self.num_slots = ranks.share(config.num_envs)
        self.device = ranks.device(config.device)
        torch.manual_seed(config.seed)  # for agents that draw their weights from torch's own generator
        self.puzzles = puzzles or training_puzzles(config)
        self.test_puzzles = test_puzzles or user_puzzles(
            config.test_data, config.size, "test", config.test_limit or None, config.task
        )
        self.core = core if core is not None else make_core(config, self.device)
        if isinstance(self.core, RecurrentCore):
            self.config = config = replace(config, core=self.core.config)  # what is written down is what runs
        if "is_correct" in agent_class.sees:
            why = "it looks at the answer, an upper bound for evaluation only"
            raise UserError(f"agent {agent_class.__name__} cannot be trained with: {why}")
        self.agent = make_agent(agent_class, self.core, config.max_steps, config.bootstrap, agent_arguments)
        self.agent.to(self.device)
        self.agent_arguments = dict(agent_arguments or {})
        self.learns_core = config.objective != "q"
        self.learns_q = config.objective != "supervised" and self.agent.learns
        if config.objective == "q" and not self.agent.learns:
            raise UserError(f"objective=q needs an agent that learns from Q-targets; {agent_class.__name__} does not")
        self.core.requires_grad_(self.learns_core)
        self.agent.requires_grad_(self.learns_q)
        self.envs = self._make_envs()
        self.engine = self.envs.engine
        self.engine.carry(self.agent.sees)
        packing.prepare(self.core, self.num_slots, self.device)
        self.threads: Threads | None = None  # of a core that is computed in pieces
        self.compiled = self._compile()
        trained = {f"core.{n}": p for n, p in self.core.named_parameters()} if self.learns_core else {}
        if self.learns_q:
            trained |= {f"agent.{n}": p for n, p in self.agent.named_parameters()}
        self.trained: dict[str, nn.Parameter] = trained
        self.optimizers = make_optimizers(trained, config.optim, capturable=config.cuda_graph == "on")
        self.ema = {name: p.detach().clone() for name, p in trained.items()} if config.optim.ema else {}
        self.step = 0
        self.elapsed = 0.0
        # Another learner's loss may leave a parameter alone now and then.
        all_used = not self.learns_q or isinstance(self.agent, QHaltingAgent)
        self.averaging = ranks.averaging(trained.values(), all_used)
        self.sums = Sums(self.device, ranks)
        self.watch = FiniteWatch(self.device, ranks)
        self.samples = 0  # segments since the last line
        self.stored: Transition | None = None  # the decision before, for bootstrap=next_observation
        self.probe_target: Tensor | None = None
        self.previous: tuple[Tensor, Tensor] | None = None  # state one segment ago, kept at logged updates
        self.fault: Tensor | None = None  # what is wrong with the agent's values, read at logged updates (not on a CPU)
        self.actions: Tensor | None = None  # (B,) the latest decision
        self.fewest_clues = int(self.puzzles.clues.min())
        self._set_clues()
        self.replayed: Replayed | None = None
        if config.cuda_graph == "on":
            cuda_graph.check(self)
        with self._beginning_anew():
            self.envs.reset(seed=config.seed + ranks.rank * self.num_slots)

    # --- set-up -------------------------------------------------------------------------------------------

    def _make_envs(self) -> gym.vector.VectorEnv:
        c = self.config
        try:
            return gym.make_vec(
                c.env, num_envs=self.num_slots, size=c.size, data=self.puzzles, core=self.core, max_steps=c.max_steps,
                ponder_cost=c.ponder_cost, augment=c.augment, device=str(self.device), tensors="torch",
                observation="q_token",  # the loop reads `envs.slots`
            ).unwrapped  # fmt: skip
        except (gym.error.Error, ModuleNotFoundError, TypeError) as error:
            raise cannot_be_made(c.env, error) from error

    def _compile(self) -> bool:
        wanted = self.config.compile
        if wanted == "off" or not hasattr(self.core, "tail"):
            return False
        if isinstance(self.core, RecurrentCore) and self.core.config.gradient == "implicit":
            if wanted == "on":
                raise UserError("compile=on: a solver's steps depend on its numbers (core.gradient=implicit)")
            return False
        if not can_compile(self.device):
            if wanted == "on":
                raise UserError("compile=on: no C++ compiler (CPU) or Triton (GPU) was found; use compile=off")
            return False
        if pieces.pay(self.core, self.num_slots, self.device):
            self.threads = Threads(torch.get_num_threads())

        def compiled(method: Callable, parameters: Iterable[nn.Parameter] = ()) -> Callable:
            if self.threads:
                return InPieces(method, self.threads, list(parameters))
            return torch.compile(method, dynamic=False)

        self.engine.run_tail = compiled(self.core.tail, self.core.parameters())
        if getattr(self.core, "without_gradient", 1):  # else the prefix is empty: nothing to compile
            self.engine.run_prefix = compiled(self.core.prefix)
        return True

    def segment(self, tokens: Tensor, state: State) -> CoreOutput:
        """One whole segment by the functions the environment uses (compiled where it compiles)."""
        return self.engine.run_tail(tokens, self.engine.run_prefix(tokens, state))

    @contextlib.contextmanager
    def _beginning_anew(self) -> Iterator[None]:
        """For a segment that no update leads to: as those in updates run, and what was captured before is void."""
        if self.config.cuda_graph == "on":
            self.replayed = Replayed(self)
        with packing.kept(), self.replayed.on_stream() if self.replayed else contextlib.nullcontext():
            yield

    # --- one update ---------------------------------------------------------------------------------------

    def progress(self, after: int = 0) -> float:
        """Share of the run that is done, counted from update `after`: by updates or by time, whichever is further."""
        c = self.config
        done = (self.step - after) / max(1, c.total_steps - after)
        if c.time_budget:
            done = max(done, self.elapsed / c.time_budget)
        return min(1.0, done)

    def _set_clues(self) -> None:
        """Move the range of givens along the curriculum, from its start to `clues` or to the puzzles as they are."""
        c = self.config
        if c.clues == (0, 0) and c.curriculum == (0, 0):
            return
        end = c.clues if c.clues != (0, 0) else (self.fewest_clues, self.fewest_clues)
        start = [share * c.rules.cells for share in c.curriculum] if c.curriculum != (0, 0) else end
        done = min(1.0, self.progress() / c.curriculum_ramp) if c.curriculum_ramp else 1.0
        self.engine.set_clues(*(round(a + (b - a) * done) for a, b in zip(start, end, strict=True)))

    def schedule(self) -> float:
        """Share of the peak learning rate: linear warm-up from 0, then constant or a decay over the rest."""
        o = self.config.optim
        if self.step < o.warmup_steps:
            return (self.step + 1) / o.warmup_steps
        if o.schedule == "constant":
            return 1.0
        progress = self.progress(o.warmup_steps)
        left = 1 - progress if o.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
        return o.final_lr + (1 - o.final_lr) * left

    def update(self, detailed: bool = False, before_detailed: bool = False) -> dict[str, float]:
        """One optimiser step and one segment in every slot. `detailed` returns gradient norms and the like.

        `before_detailed` keeps the states of this segment, which a detailed update right after compares with its own.
        Raises NonFiniteError before the optimiser moves (on a GPU, which it would have to wait for, at detailed
        updates and before checkpoints, by `check_finite`).
        """
        if self.replayed is not None:
            return self.replayed.update(detailed, before_detailed)
        on_one_core = self.threads.lead if self.threads else _here
        with packing.kept():
            self.before_update()
            details = on_one_core(self.learn, detailed, before_detailed)
            for optimizer in self.optimizers:
                optimizer.step()
            packing.forget()
            self.after_update()
            on_one_core(self.next_segment)
        return details

    def before_update(self) -> None:
        """What the host decides before an update."""
        set_learning_rate(self.optimizers, self.schedule())

    def learn(self, detailed: bool = False, before_detailed: bool = False) -> dict[str, float]:
        """Decide in every slot and leave the gradient of the losses in the parameters: see `update`."""
        slots = self.envs.slots
        view, q_logits, self.actions = self._decide(slots)
        ended = (self.actions == HALT) | (slots.steps >= self.config.max_steps)
        transition = Transition(view, q_logits, self.actions, slots.is_correct, None, ended)
        losses, q = self._losses(slots, transition)
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        self._backward(losses["loss/total"])
        measure.record(self.sums, slots, transition, losses, q)
        if isinstance(self.core, RecurrentCore) and self.learns_core:
            measure.record_solver(self.sums, self.core)
        norms = measure.gradient_norms(self.trained)
        self.watch.see(losses | norms)
        if detailed or self.device.type == "cpu":
            self.watch.check(self.step + 1)
        details = self._details(slots, norms) if detailed else {}
        if self.config.optim.grad_clip:
            nn.utils.clip_grad_norm_(list(self.trained.values()), self.config.optim.grad_clip)
        self.previous = (slots.z_H.detach(), slots.z_L.detach()) if before_detailed else None
        if self.config.bootstrap == "next_observation" and self.learns_q and self.agent.bootstraps:
            self.stored = transition._replace(view=view._replace(z_H=slots.z_H.detach(), logits=None), q_logits=None)
        return details

    def after_update(self) -> None:
        """The running average and the counters, once the optimisers have moved."""
        self._average()
        self.step += 1
        self.samples += self.config.num_envs
        self._set_clues()

    def next_segment(self) -> None:
        """Act as decided: one segment in every slot, with the new weights."""
        self.envs.step(self.actions)

    def carried(self) -> dict:
        """All tensors that an update leaves to the next, beside weights and optimisers, before `next_segment`."""
        slots, ahead = self.engine.held()
        return {"slots": slots, "ahead": ahead, "actions": self.actions, "stored": self.stored,
                "memory": dict(self.agent.memory), "sums": dict(self.sums.values), "watch": self.watch.held(),
                "fault": self.fault}  # fmt: skip

    def carry_on(self, carried: dict) -> None:
        """Take over what `carried` returned, or tensors like it."""
        self.actions, self.stored, self.fault = carried["actions"], carried["stored"], carried["fault"]
        self.engine.hold(carried["slots"], carried["ahead"], self.actions)
        self.agent.memory.update(carried["memory"])
        self.sums.values = dict(carried["sums"])
        self.watch.hold(*carried["watch"])

    def _backward(self, loss: Tensor) -> None:
        if self.averaging is None:
            loss.backward()
        else:
            self.ranks.backward(self.averaging(loss))

    def _decide(self, slots: Slots) -> tuple[View, Tensor | None, Tensor]:
        reaches_core = self.config.q_to_core and self.learns_core
        z_H = slots.z_H if reaches_core else slots.z_H.detach()
        view = view_of(slots, z_H, self.engine.task.open_token)
        q_logits = self.agent.scores(view.z_H)
        seen = None if q_logits is None else q_logits.detach()
        actions, fault = decide(self.agent, view, seen, where=f"update {self.step + 1}", explore=True)
        if fault is not None:
            self.fault = fault if self.fault is None else torch.maximum(self.fault, fault)
        return view, q_logits, actions

    def _losses(self, slots: Slots, transition: Transition) -> tuple[dict[str, Tensor], QLosses | None]:
        """The loss by tag (the total is weighted, its parts are not), and the Q-losses slot by slot."""
        c, B = self.config, self.num_slots
        losses: dict[str, Tensor] = {}
        total, q = [], None
        if self.learns_core:
            per_slot = supervised_loss(slots.logits, slots.labels, c.loss)
            losses["loss/supervised"] = per_slot.sum() / B
            transition = transition._replace(supervised=per_slot.detach().float())
            total.append(c.supervised_weight * losses["loss/supervised"])
        if self.learns_q:
            learned_from = self._with_bootstrap(slots, transition)
            if learned_from is not None:
                q = self.agent.loss(learned_from)
                if not isinstance(q, AgentLoss | QLosses):
                    got = f"loss() must return AgentLoss or QLosses, not {type(q).__name__}"
                    raise UserError(f"agent {type(self.agent).__name__}, update {self.step + 1}: {got}")
            if isinstance(q, AgentLoss):
                total.append(q.total)
                losses["loss/agent"] = q.total
                losses |= {f"agent/{name}": part for name, part in q.parts.items()}
                q = None
            elif q is not None:
                total += [c.halt_weight * q.halt.sum() / B, c.continue_weight * q.cont.sum() / B]
            else:  # the first update of next_observation has no decision behind it
                total.append(sum(p.sum() * 0 for p in self.agent.parameters()))
        if q is not None:
            losses |= {"loss/q_halt": q.halt.sum() / B, "loss/q_continue": q.cont.sum() / B}
        losses["loss/total"] = sum(total)
        return losses, q

    def _with_bootstrap(self, slots: Slots, transition: Transition) -> Transition | None:
        """The transition to learn from, with the observation its continue target is read from."""
        mode = self.config.bootstrap if self.agent.bootstraps else "none"
        if mode == "next_observation":
            if self.stored is None:
                return None
            return self.stored._replace(
                q_logits=self.agent.scores(self.stored.view.z_H), next_z_H=slots.z_H.detach()
            )
        if mode == "none" or self.config.max_steps == 1:
            return transition
        if mode == "shared_prefix":
            return transition._replace(next_z_H=self.envs.lookahead(transition.actions).z_H)
        if mode == "shared_prefix_all":
            return self._looking_after_halts(slots, transition)
        with torch.no_grad():
            output = self.segment(slots.tokens, State(slots.z_H, slots.z_L).detach())
            return transition._replace(next_z_H=output.state.z_H)

    @torch.no_grad()
    def _looking_after_halts(self, slots: Slots, transition: Transition) -> Transition:
        """Each slot's next segment: of those that halt one more of the old puzzle, of as many as there is room for."""
        z_H = self.envs.lookahead(transition.actions).z_H.clone()
        rows, looked = self.slots_that_halt(slots, transition.ended)
        output = self.segment(slots.tokens[rows], State(slots.z_H[rows], slots.z_L[rows]))
        z_H[rows] = torch.where(looked[rows, None, None], output.state.z_H, z_H[rows])
        return transition._replace(next_z_H=z_H, looked=looked)

    def slots_that_halt(self, slots: Slots, ended: Tensor) -> tuple[Tensor, Tensor]:
        """(rows (K,), looked (B,) bool) of bootstrap=shared_prefix_all: the slots that are run once more, and those of
        them that halt before the budget. K is a share of all slots, so other rows may be among them."""
        halts = ended & (slots.steps < self.config.max_steps)
        room = -(-self.num_slots // HALTED_SHARE)
        rows = halts.int().argsort(descending=True, stable=True)[:room]  # those that halt come first
        return rows, torch.zeros_like(halts).index_put((rows,), halts[rows])

    @torch.no_grad()
    def _average(self) -> None:
        """The running average of the weights, with the usual correction for a short past."""
        if self.ema:
            decay = min(self.config.optim.ema, (1 + self.step) / (10 + self.step))
            torch._foreach_lerp_(list(self.ema.values()), list(self.trained.values()), 1 - decay)

    # --- metrics ------------------------------------------------------------------------------------------

    def _details(self, slots: Slots, norms: dict[str, Tensor]) -> dict[str, float]:
        """What is measured at logged updates only (waits for the device)."""
        raise_fault(self.agent, self.fault, f"update {self.step + 1} or one since the last logged update")
        values = {"optim/lr": self.schedule() * self.config.optim.lr}
        values |= {tag: norm.item() for tag, norm in norms.items()} | measure.memory_and_files()
        values |= {f"param/share_of_bound_{kind}": share for kind, share in shares_of_bound(self.optimizers).items()}
        if self.previous is not None:
            values |= measure.residuals(slots, self.previous, self.ranks)
        if self.learns_q and self.config.max_steps > 1:
            values |= self._drift()
        if self.config.log_gradient_cosine and self.learns_core and isinstance(self.core, RecurrentCore):
            state = State(slots.z_H, slots.z_L).detach()
            cosines = measure.gradient_cosines(self.core, slots.tokens, slots.labels, state, self.config.loss)
            means = self.ranks.total(list(cosines.values()))
            values |= {f"gradient/{n}": v / self.ranks.world for n, v in zip(cosines, means, strict=True)}
        return values

    def check_finite(self) -> None:
        """Raise NonFiniteError if anything is not a number (before a checkpoint is written over a good one)."""
        self.watch.check(self.step)
        for name, parameter in self.trained.items():
            if not bool(parameter.isfinite().all()):
                raise NonFiniteError(f"update {self.step}: the weights of {name} are not finite")

    @torch.no_grad()
    def _drift(self) -> dict[str, float]:
        count = min(PROBE_PUZZLES, len(self.test_puzzles))
        tokens = self.test_puzzles.questions[:count].to(self.device).long()
        output = self.core(tokens, self.core.initial_state(count))
        output = self.core(tokens, output.state)
        q_logits = self.agent.scores(output.state.z_H)
        if q_logits is None:
            return {}
        target = q_logits.amax(dim=-1).sigmoid()
        before, self.probe_target = self.probe_target, target
        return {} if before is None else {"q/target_drift": (target - before).abs().mean().item()}

    def line(self, details: dict[str, float], seconds: float) -> dict[str, float]:
        """The metrics since the last line, ready for the writer."""
        values = details | measure.averages(self.sums.take())
        values["time/samples_per_second"] = self.samples / max(seconds, 1e-9)
        values["time/elapsed"] = self.elapsed
        self.samples = 0
        return values

    # --- evaluation and state -----------------------------------------------------------------------------

    def evaluation_models(self) -> tuple[nn.Module, HaltingAgent]:
        """Core and agent as evaluation sees them: with the averaged weights where there are any."""
        if not self.ema:
            return self.core, self.agent
        core, agent = copy.deepcopy(self.core), copy.deepcopy(self.agent)
        for module, prefix in ((core, "core."), (agent, "agent.")):
            own = dict(module.named_parameters())
            for name, value in self.ema.items():
                if name.startswith(prefix):
                    own[name.removeprefix(prefix)].data.copy_(value)
        return core, agent

    def evaluate(self, puzzles: PuzzleSet, max_steps: int, **keywords) -> evaluation.Trajectories:
        """Trajectories of `puzzles` with the evaluation weights, in batches as large as training's."""
        with self.evaluation_weights():
            return evaluation.trajectories(
                self.core, self.agent, puzzles, max_steps, self.num_slots, self.device, **keywords
            )

    @contextlib.contextmanager
    def evaluation_weights(self) -> Iterator[None]:
        """The averaged weights in the trained modules for a while, so that compiled functions see them too.

        Written through `.data`: the graph of the segment in work must not take it for a change, since the
        very same values are back before its backward pass.
        """
        raw = {name: self.trained[name].detach().clone() for name in self.ema}
        try:
            for name, value in self.ema.items():
                self.trained[name].data.copy_(value)
            yield
        finally:
            for name, value in raw.items():
                self.trained[name].data.copy_(value)

    def model(self, meta: dict | None = None) -> bytes:
        """The model file's content (evaluation weights)."""
        core, agent = self.evaluation_models()
        meta = {"max_steps": self.config.max_steps, "bootstrap": self.config.bootstrap, **(meta or {})}
        meta |= made_for(self.puzzles)
        meta |= {"agent": agent_name(type(agent)), "agent_args": self.agent_arguments}
        q_head = getattr(agent, "q_head", None)
        return model_bytes(core, q_head if isinstance(q_head, QHead) else None, meta, agent)

    def state(self) -> tuple[dict[str, Tensor], dict]:
        """(tensors, plain values): everything a checkpoint needs to go on number for number, on rank 0.

        Whatever belongs to slots is that of all ranks, so that any number of ranks can go on from it.
        """
        if self.replayed is not None:
            self.replayed.settle()
        tensors = {f"core.{n}": t for n, t in self.core.state_dict().items()}
        tensors |= {f"agent.{n}": t for n, t in self.agent.state_dict().items()}
        tensors |= {f"ema.{n}": t for n, t in self.ema.items()}
        tensors |= {f"optim.{n}": t for n, t in state_tensors(self.optimizers).items()}
        slots = self.envs.state_dict()
        tensors |= {f"slots.{n}": t for n, t in slots.items() if isinstance(t, Tensor)}
        tensors |= {f"memory.{n}": t for n, t in self.agent.memory.items()}
        tensors |= {f"sums.{n}": torch.tensor(t, dtype=torch.float64) for n, t in self.sums.totals().items()}
        if self.stored is not None:
            s = self.stored
            tensors |= {f"stored.{n}": t for n, t in s.view._asdict().items() if t is not None}
            tensors |= {"stored.actions": s.actions, "stored.is_correct": s.is_correct, "stored.ended": s.ended}
        if self.device.type == "cuda":
            tensors["cuda_rng"] = torch.cuda.get_rng_state(self.device)
        if self.probe_target is not None:
            tensors["probe_target"] = self.probe_target
        if self.previous is not None:
            tensors |= {"previous.z_H": self.previous[0].clone(), "previous.z_L": self.previous[1]}
        tensors |= {n: self.ranks.gather(t) for n, t in tensors.items() if n.startswith(_BY_SLOT)}
        plain = {"elapsed": self.elapsed, "torch_rng": torch.get_rng_state().tolist(),
                 "puzzles": self.puzzles.sha256, "test_puzzles": self.test_puzzles.sha256,
                 "slots": {n: v for n, v in slots.items() if not isinstance(v, Tensor)}}  # fmt: skip
        return tensors, plain

    def load_state(self, tensors: dict[str, Tensor], plain: dict) -> None:
        """The inverse of `state`. UserError where the checkpoint belongs to other puzzles or another model."""
        def part(prefix: str) -> dict[str, Tensor]:
            held = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
            return {n: (self.ranks.rows(t) if prefix in _BY_SLOT else t).to(self.device) for n, t in held.items()}

        for held, puzzles in (("puzzles", self.puzzles), ("test_puzzles", self.test_puzzles)):
            if plain[held] != puzzles.sha256:
                raise UserError(f"{puzzles.name}: the puzzles are not those the run was started with (other SHA-256)")
        try:
            self.core.load_state_dict(part("core."))
            self.agent.load_state_dict(part("agent."))
        except RuntimeError as error:
            reason = str(error).splitlines()[-1].strip()
            raise UserError(f"the checkpoint holds another model: {reason}") from error
        for name, value in part("ema.").items():
            self.ema[name].copy_(value)
        load_state_tensors(self.optimizers, part("optim."))
        self.agent.memory.update(part("memory."))
        self.sums.load(part("sums."))
        self.step, self.elapsed = plain["step"], plain["elapsed"]
        torch.set_rng_state(torch.tensor(plain["torch_rng"], dtype=torch.uint8))
        if self.device.type == "cuda" and "cuda_rng" in tensors:
            torch.cuda.set_rng_state(tensors["cuda_rng"], self.device)
        stored = part("stored.")
        if stored:
            view = View(**{n: stored.get(n) for n in View._fields if n != "is_correct"})
            self.stored = Transition(view, None, stored["actions"], stored["is_correct"], None, stored["ended"])
        if "probe_target" in tensors:
            self.probe_target = tensors["probe_target"].to(self.device)
        previous = part("previous.")
        self.previous = (previous["z_H"], previous["z_L"]) if previous else None
        self._set_clues()
        with self._beginning_anew():
            self.envs.load_state_dict({**plain["slots"], **part("slots.")})


def is_due(step: int, every: int) -> bool:
    """Whether something done each `every` updates is due after update `step` (never where every is 0)."""
    return every > 0 and step % every == 0


def run_folder(config: TrainConfig) -> Path:
    """A new folder for a run; never one that exists (two runs started in one second get two folders)."""
    name = config.name or f"{config.objective}-s{config.seed}-{time.strftime('%Y%m%d-%H%M%S')}"
    base = Path(config.out)
    for attempt in range(1000):
        path = base / (name if attempt == 0 else f"{name}-{attempt + 1}")
        try:
            path.mkdir(parents=True)
            return path
        except FileExistsError as error:
            if config.name:
                raise UserError(f"{path}: the run's folder exists; choose another name or resume it") from error
        except OSError as error:
            raise UserError(f"{path}: the run's folder cannot be made ({error.strerror})") from error
    raise UserError(f"{base / name}: no free name for a run's folder")
