"""What a frozen core did with every puzzle, computed once and kept on disk: halting rules are scored on it.

`recorded` gives a `Recording`: segments 1..M of N puzzles with the q-token, the answer, every signal of
`agents.signals` and whether the answer is right. `wishes_of` gives what each agent makes of it: from the recording
where the rule is a function of what it holds, else from one live pass over the core that all such agents share, kept
as well. Files are safetensors under the hash of all they depend on, never code; a damaged one is computed anew.
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

import agents
from agents import SIGNALS, FixedAgent, HaltingAgent, Memory, QHaltingAgent, SignalAgent, decide, raise_fault
from agents.oracle import OracleAgent
from agents.random_stop import RandomAgent
from envs.actions import HALT
from hrm_rl import evaluation, rng
from hrm_rl.calibration import halting_steps, read_at
from hrm_rl.checkpoint import write_atomically
from hrm_rl.tasks import PuzzleSet

FORMAT = "hrm_rl.recording.v1"
_SEES = ("previous_z_H", "previous_answer", "previous_logits")
Notice = Callable[[str], None]


@dataclass(frozen=True)
class Recording:
    """Segments 1..M of N puzzles, on the CPU. Row m - 1 is segment m. D hidden size, S tokens."""

    key: str  # hash of all that it depends on
    exact: Tensor  # (M, N) bool, whole answer right
    token: Tensor  # (M, N) float32, share of right cells
    answers: Tensor  # (M, N, S) uint8, the tokens answered
    q_token: Tensor  # (M, N, D) in the core's dtype, first position of z_H: what a Q-head reads
    signals: Mapping[str, Tensor]  # name of SIGNALS -> (M, N) float32, larger = readier to halt
    seconds: float  # wall-clock of the pass that made it; 0 where it was read from disk


@dataclass(frozen=True)
class Wishes:
    """What an agent made of a recording. A score of NaN stands nowhere: `decide` refuses it."""

    scores: Tensor | None  # (M, N) float32, None for an agent without `score`
    wish: Tensor  # (M, N) bool, HALT with the threshold that the agent had
    q_halt: Tensor | None = None  # (M, N) float32 in [0, 1], its probability that the answer is right, if it has one

    def steps(self, threshold: float | None = None, strict: bool = False) -> Tensor:
        """(N,) int64: the segment of the halt; None takes the wishes as they are, a number the scores."""
        if threshold is None:
            return halting_steps(self.wish.float(), 0.5)
        return halting_steps(self.scores, threshold, strict)


@dataclass(frozen=True)
class Halted:
    """One line a puzzle, in their order: what halting at `steps` gives."""

    steps: Tensor  # (N,) int64
    exact: Tensor  # (N,) bool
    answers: Tensor  # (N, S) uint8


def halted(recording: Recording, steps: Tensor) -> Halted:
    """The recording read at each puzzle's own halt, steps (N,)."""
    return Halted(steps, read_at(recording.exact, steps), read_at(recording.answers, steps))


# --- keys -----------------------------------------------------------------------------------------------------


def _digest(*parts: bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()


def weights_sha256(module: nn.Module) -> str:
    """SHA-256 of a module's weights by name."""
    parts = []
    for name, value in sorted(module.state_dict().items()):
        value = value.detach().cpu().contiguous()
        parts += [name.encode(), str(value.dtype).encode(), value.reshape(-1).view(torch.uint8).numpy().tobytes()]
    return _digest(*parts)


def model_sha256(path: str | Path) -> str:
    """SHA-256 of a model's file."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


@lru_cache
def code_sha256() -> str:
    """SHA-256 of the code that a recording depends on: the core, the signals, evaluation and this file."""
    import envs.previous
    import hrm_rl.core

    folders = [Path(hrm_rl.core.__file__).parent]
    files = [Path(m.__file__) for m in (agents.signals, agents.memory, envs.previous, evaluation, rng)]
    files += [Path(__file__), *(path for folder in folders for path in folder.glob("*.py"))]
    return _digest(*(path.read_bytes() for path in sorted(files)))


def recording_key(core: nn.Module, model_sha256: str, puzzles: PuzzleSet, max_steps: int, device: str) -> str:
    """Hash of model, puzzles, max_steps, dtype, kind of device, code and torch: a recording's name.

    model_sha256: of the model's file, or `weights_sha256(core)`. The batch size is not in it: it moves a number by
    rounding at most.
    """
    config = getattr(core, "config", None)
    parts = {
        "format": FORMAT, "model": model_sha256, "core": f"{type(core).__name__} {config}", "puzzles": puzzles.sha256,
        "max_steps": max_steps, "dtype": str(getattr(config, "dtype", "")), "device": torch.device(device).type,
        "code": code_sha256(), "torch": torch.__version__,
    }  # fmt: skip
    return _digest(json.dumps(parts, sort_keys=True).encode())


def agent_key(recording: str, agent: HaltingAgent, arguments: Mapping) -> str | None:
    """Hash of recording, class, arguments, weights and source; None where the source cannot be read.

    The source is that of the modules in which the class and its bases stand, not of what those import besides.
    """
    sources = []
    for base in type(agent).__mro__:
        if not issubclass(base, HaltingAgent):
            continue
        try:
            sources.append(inspect.getsource(sys.modules[base.__module__]))
        except (KeyError, OSError, TypeError):
            return None
    name = f"{type(agent).__module__}.{type(agent).__qualname__}"
    said = json.dumps({name: {k: str(v) for k, v in arguments.items()}, "threshold": agent.threshold}, sort_keys=True)
    return _digest(FORMAT.encode(), recording.encode(), said.encode(), weights_sha256(agent).encode(),
                   *(source.encode() for source in sources))  # fmt: skip


# --- files ----------------------------------------------------------------------------------------------------


def _read(folder: Path | None, key: str | None, notice: Notice) -> dict[str, Tensor] | None:
    """The tensors kept under `key`; None where there are none, or (with a notice) where the file is damaged."""
    if folder is None or key is None:
        return None
    path = folder / f"{key}.safetensors"
    try:
        if not path.is_file():
            return None
        content = path.read_bytes()
        tensors = load(content)
        noted = bytes(tensors.pop("sha256").tolist())
        if noted != _content_sha256(key, tensors):
            raise ValueError("its SHA-256 is not the one noted when it was written")
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        notice(f"{path}: damaged cache ({reason}); computed anew")
        return None
    return tensors


def _write(folder: Path | None, key: str | None, tensors: dict[str, Tensor], notice: Notice) -> None:
    """Keep tensors under `key`, atomically; a folder that cannot be written is a notice."""
    if folder is None or key is None:
        return
    tensors = {name: value.contiguous() for name, value in tensors.items()}
    noted = torch.tensor(list(_content_sha256(key, tensors)), dtype=torch.uint8)
    path = folder / f"{key}.safetensors"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(path, save(tensors | {"sha256": noted}))
    except OSError as error:
        notice(f"{path}: cannot be written ({error.strerror}); not cached")


def _content_sha256(key: str, tensors: Mapping[str, Tensor]) -> bytes:
    parts = [key.encode()]
    for name, value in sorted(tensors.items()):
        parts += [f"{name} {value.dtype} {tuple(value.shape)}".encode(),
                  value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()]  # fmt: skip
    return bytes.fromhex(_digest(*parts))


# --- from the recording ---------------------------------------------------------------------------------------


def _steps(recording: Recording) -> Tensor:
    M, N = recording.exact.shape
    return torch.arange(1, M + 1)[:, None].expand(M, N)


def _of_random(agent: RandomAgent, recording: Recording, device) -> Wishes:
    key = evaluation.episode_keys(torch.arange(recording.exact.shape[1]))
    return Wishes(None, _steps(recording) >= agent.stop_steps(key))


def _of_scores(agent: HaltingAgent, scores: Tensor, q_halt: Tensor | None = None) -> Wishes:
    return Wishes(scores, scores > agent.threshold if agent.strict else scores >= agent.threshold, q_halt)


def _of_q_head(agent: QHaltingAgent, recording: Recording, device) -> Wishes:
    q_logits = agent.scores(recording.q_token.flatten(0, 1)[:, None].to(device)).float()
    shape = recording.exact.shape
    return _of_scores(agent, agent.rule(q_logits).cpu().view(shape), q_logits[:, 0].sigmoid().cpu().view(shape))


#: Rules that are a function of what a recording holds: (class, its methods that must not be replaced, function).
_RULES = (
    (RandomAgent, ("act", "stop_steps"), _of_random),
    (SignalAgent, ("act", "score"), lambda agent, held, device: _of_scores(agent, held.signals[agent.signal])),
    (FixedAgent, ("act", "score"), lambda agent, held, device: _of_scores(agent, _steps(held).float())),
    (OracleAgent, ("act", "score"), lambda agent, held, device: _of_scores(agent, held.exact.float())),
    (QHaltingAgent, ("act", "score", "scores"), _of_q_head),
)


def is_recordable(agent: HaltingAgent) -> bool:
    """Whether `from_recording` knows the rule, so that it costs no run of the core."""
    return _rule(agent) is not None


def _rule(agent: HaltingAgent) -> Callable | None:
    kind = type(agent)
    for base, names, function in _RULES:
        if isinstance(agent, base) and all(getattr(kind, n) is getattr(base, n) for n in (*names, "halts")):
            return function
    return None


@torch.no_grad()
def from_recording(agent: HaltingAgent, recording: Recording, device: str | torch.device = "cpu") -> Wishes | None:
    """What an agent makes of a recording, with its own threshold; None for one that must run live: one with a
    `score` or an `act` of its own."""
    rule = _rule(agent)
    return rule and rule(agent, recording, device)


# --- live -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pass:
    """One pass of a core over puzzles: what to run it with."""

    core: nn.Module
    puzzles: PuzzleSet
    max_steps: int
    key: str  # of the recording
    batch_size: int = 128
    device: str | torch.device = "cpu"
    folder: Path | None = None  # of the cache; None keeps nothing
    notice: Notice = lambda line: None
    progress: Callable[[int], None] | None = None  # told the puzzles done


class _Live:
    """An agent in a pass, and what it said so far."""

    def __init__(self, agent: HaltingAgent):
        self.agent, self.faults = agent, []
        self.rows: dict[str, list[list[Tensor]]] = {"wish": [], "scores": [], "q_halt": []}

    def see(self, view: agents.View, where: str) -> None:
        agent = self.agent
        if view.is_correct is not None and "is_correct" not in agent.sees:
            view = view._replace(is_correct=None)
        view = view._replace(**{name: None for name in _SEES if name not in agent.sees})
        q_logits = agent.scores(view.z_H)
        actions, fault = decide(agent, view, q_logits, where=where)
        self.faults += [] if fault is None else [fault]
        said = {"wish": actions == HALT, "scores": agent.last_score}
        said["q_halt"] = None if q_logits is None else q_logits[:, 0].float().sigmoid()
        for name, value in said.items():
            if value is not None:
                if int(view.steps[0]) == 1:
                    self.rows[name].append([])
                self.rows[name][-1].append(value)

    def end_batch(self, where: str) -> None:
        if self.faults:
            raise_fault(self.agent, torch.stack(self.faults).amax(), where)
        self.faults = []

    def wishes(self, count: int) -> Wishes:
        found = {
            name: torch.cat([torch.stack(rows).cpu() for rows in batches], dim=1)[:, :count] if batches else None
            for name, batches in self.rows.items()
        }
        return Wishes(found["scores"], found["wish"], found["q_halt"])


@torch.no_grad()
def _run(the: Pass, live: Sequence[HaltingAgent], record: bool) -> tuple[Recording | None, list[Wishes]]:
    """One pass over the core: the recording where `record`, and the wishes of live agents."""
    M, N = the.max_steps, len(the.puzzles)
    sees = set(_SEES if record else ()).union(*(agent.sees for agent in live))
    runs = [_Live(agent) for agent in live]
    exact, token = torch.zeros(M, N, dtype=torch.bool), torch.zeros(M, N)
    answers = torch.zeros(M, N, the.puzzles.seq_len, dtype=torch.uint8)
    signals = {name: torch.zeros(M, N) for name in SIGNALS} if record else {}
    q_token, memories, began = None, {}, time.perf_counter()
    with contextlib.ExitStack() as stack:
        for agent in live:
            stack.enter_context(agent.fresh_memory())
            had = evaluation._set_max_steps(agent, M + 1)  # so that only wishes count, not the budget
            stack.callback(evaluation._set_max_steps, agent, had)
        for first, count, step, view, *right in evaluation.views(
            the.core, sees, the.puzzles, M, the.batch_size, the.device
        ):
            if record:
                place = (step - 1, slice(first, first + count))
                if step == 1:
                    memories = {name: Memory() for name in SIGNALS}
                exact[place], token[place] = (part[:count].cpu() for part in right)
                answers[place] = view.logits[:count].argmax(-1).to(torch.uint8).cpu()
                front = view.z_H[:count, 0].cpu()
                q_token = torch.zeros(M, N, front.shape[-1], dtype=front.dtype) if q_token is None else q_token
                q_token[place] = front
                for name, signal in SIGNALS.items():
                    signals[name][place] = signal.score(view, memories[name])[:count].cpu()
            for run in runs:
                run.see(view, f"step {step} of puzzles {first} and on")
            if step == M:
                for run in runs:
                    run.end_batch(f"puzzles {first} and on")
                if the.progress:
                    the.progress(count)
    seconds = time.perf_counter() - began
    made = Recording(the.key, exact, token, answers, q_token, signals, seconds) if record else None
    return made, [run.wishes(N) for run in runs]


def recorded(the: Pass, live: Sequence[tuple[HaltingAgent, Mapping]] = ()) -> tuple[Recording, list[Wishes]]:
    """The recording of a pass, and the wishes of agents that must run live with their arguments, in their order.

    Read from the cache where it has them; what is missing is computed in one pass and kept.
    UserError if what an agent returns is unsound.
    """
    recording = _recording_from(the, _read(the.folder, the.key, the.notice))
    keys = [agent_key(the.key, agent, arguments) for agent, arguments in live]
    found = [_wishes_from(the, _read(the.folder, key, the.notice)) for key in keys]
    missing = [i for i, wishes in enumerate(found) if wishes is None]
    if recording is None or missing:
        made, wishes = _run(the, [live[i][0] for i in missing], recording is None)
        if made is not None:
            recording = made
            held = {"exact": made.exact, "token": made.token, "answers": made.answers, "q_token": made.q_token}
            held |= {f"signal.{name}": value for name, value in made.signals.items()}
            _write(the.folder, the.key, held, the.notice)
        for i, said in zip(missing, wishes, strict=True):
            found[i] = said
            held = {"scores": said.scores, "wish": said.wish, "q_halt": said.q_halt}
            _write(the.folder, keys[i], {n: v for n, v in held.items() if v is not None}, the.notice)
    return recording, found


def _recording_from(the: Pass, tensors: dict[str, Tensor] | None) -> Recording | None:
    shape = (the.max_steps, len(the.puzzles))
    if tensors is None or any(tuple(value.shape[:2]) != shape for value in tensors.values()):
        return None
    signals = {name: tensors.pop(f"signal.{name}") for name in SIGNALS}
    return Recording(the.key, **tensors, signals=signals, seconds=0.0)


def _wishes_from(the: Pass, tensors: dict[str, Tensor] | None) -> Wishes | None:
    shape = (the.max_steps, len(the.puzzles))
    if tensors is None or any(tuple(value.shape) != shape for value in tensors.values()):
        return None
    return Wishes(tensors.get("scores"), tensors["wish"], tensors.get("q_halt"))


def wishes_of(the: Pass, chosen: Sequence[tuple[HaltingAgent, Mapping]]) -> tuple[Recording, list[Wishes]]:
    """(recording, wishes of every agent in `chosen`, each with its arguments), by whichever way is the cheapest."""
    live = [i for i, (agent, _) in enumerate(chosen) if _rule(agent) is None]
    recording, ran = recorded(the, [chosen[i] for i in live])
    by_index = dict(zip(live, ran, strict=True))
    return recording, [
        by_index[i] if i in by_index else from_recording(agent, recording, the.device)
        for i, (agent, _) in enumerate(chosen)
    ]


def default_folder() -> Path:
    """Where recordings are kept unless told otherwise: hrm_rl/recordings in the user's cache."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "hrm_rl" / "recordings"
