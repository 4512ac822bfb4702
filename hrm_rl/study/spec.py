"""A study as its YAML file says it: what is trained, from which baseline, and every arm that is compared with it.

    kind: q_only                     # or joint, train
    seeds: 10
    updates: 2000
    baseline: {weight_decay: 0.1}    # what every arm starts from
    arms:
      targets:                       # a block: its lists are crossed
        target: [polyak, hard]
        lr: [1.0e-3, 1.0e-2]
      one_at_a_time:                 # a list of blocks
        - {gamma: [0.9, 0.99]}
        - {loss: [mse_values, mse_logits]}
      wild: {name: wild, lr: 10}     # one arm under a name of its own

Fields of q_only are those of `agents.arm.Arm`; those of joint and train are the settings of `hrm_rl.train`, in
the layout of its YAML files (optim: {lr: ...}, agent_args: {target: ...}). Arms are named by what differs from the
baseline, which is always there; what has no effect (tau without a running average) is no difference, and arms that are
the same are one arm. docs/STUDIES.md shows all of it.
"""

from __future__ import annotations

import fnmatch
import hashlib
import inspect
import itertools
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from agents.arm import Arm
from hrm_rl.cli import blaming
from hrm_rl.errors import UserError, nearest
from hrm_rl.settings import fits, hints_of, in_words, is_pair, shortened
from hrm_rl.yaml_files import compose, construct

Kind = Literal["q_only", "joint", "train"]
BASELINE = "baseline"
MOST_ARMS = 50_000
CONFIGS = Path(__file__).resolve().parents[2] / "configs"

#: Settings of hrm_rl.train that the study itself decides for every run.
_STUDYS_OWN = {
    "seed": "seeds", "total_steps": "updates", "out": "--out", "name": "the arm and the seed", "device": "--device",
    "cuda_graph": "--device", "log_every": "checkpoints", "eval_every": "checkpoints",
    "checkpoint_every": "checkpoints",
}  # fmt: skip
_GROUPS = ("optim", "core", "agent_args")
#: Fields that only count beside a certain value of another one.
_COUNTS = {
    "tau": lambda v: v["target"] == "polyak", "period": lambda v: v["target"] in ("hard", "last_layer"),
    "replay_size": lambda v: v["replay"] == "fifo", "lam": lambda v: v["backup"] == "lambda",
    "head_width": lambda v: v["head"] == "mlp", "exploration": lambda v: v["epsilon"] > 0,
}  # fmt: skip


@dataclass(frozen=True)
class PuzzleSource:
    """Where puzzles come from.

    Args:
        data: A .csv or .csv.gz file, or nothing for the shipped set.
        count: At most this many; 0 takes all.
    """

    data: str | None = None
    count: int = 0


@dataclass(frozen=True)
class StudyArm:
    """One arm: `values` is all that defines it, `changes` what of it differs from the baseline."""

    name: str
    values: dict[str, Any]  # q_only: every field of Arm; else settings of hrm_rl.train by dotted name
    changes: dict[str, Any]
    place: str = ""  # file:line of its block

    @property
    def arm(self) -> Arm:
        """As the learners on recordings take it (q_only)."""
        return Arm(**self.values)


@dataclass(frozen=True)
class Study:
    """A study, read and checked.

    Args:
        name: The file's name without its ending.
        kind: q_only (learners on the recordings of a frozen core), joint (live training, measured at checkpoints) or
            train (the whole recipe of hrm_rl.train, read from its report).
        title: Heading of the report.
        question: What the study is to answer, in a sentence.
        seeds: Runs an arm, with the seeds 0, 1, ...
        updates: Optimiser updates of a run.
        checkpoints: Measurements on the way, evenly spaced, beside the one at update 0.
        size: Side of the Sudoku grid of the shipped core and puzzles (q_only).
        core: Run, checkpoint or model file that is recorded; nothing: the core that ships (q_only).
        max_steps: Segments of an episode (q_only).
        train: Puzzles that are learned from (q_only).
        probe: Puzzles that are measured on; of joint and train the first `count` of the test set.
        arms: The baseline, then all others.
        path: The file.
        without_effect: What was asked for and is no arm of its own: (as it was asked for, the arm it comes to).
    """

    name: str
    kind: Kind
    title: str = ""
    question: str = ""
    seeds: int = 10
    updates: int = 2000
    checkpoints: int = 20
    size: Literal[4, 6, 9] = 9
    core: str | None = None
    max_steps: int = 16
    train: PuzzleSource = PuzzleSource(None, 2000)
    probe: PuzzleSource = PuzzleSource(None, 1000)
    arms: tuple[StudyArm, ...] = ()
    path: str = ""
    without_effect: tuple[tuple[str, str], ...] = ()

    @property
    def baseline(self) -> StudyArm:
        return self.arms[0]

    @property
    def runs(self) -> list[tuple[StudyArm, int]]:
        """Every (arm, seed)."""
        return [(arm, seed) for arm in self.arms for seed in range(self.seeds)]

    def plain(self) -> dict[str, Any]:
        """What defines the runs, as plain values: no seeds, no words of the report, no content of files."""
        own = {"kind": self.kind, "updates": self.updates, "checkpoints": self.checkpoints}
        own |= {"max_steps": self.max_steps} if self.kind == "q_only" else {"probe": self.probe.count}
        return own | {"arms": {arm.name: arm.values for arm in self.arms}}

    def selected(self, patterns: Sequence[str]) -> Study:
        """The study of the baseline and the arms whose names fit a pattern (* and ? as in file names)."""
        names = [arm.name for arm in self.arms]
        chosen = {BASELINE}
        for pattern in patterns:
            found = {name for name in names if name == pattern or fnmatch.fnmatchcase(name, pattern)}
            if not found:
                raise UserError(f"--arms: no arm fits {pattern!r}{nearest(pattern, names)}; there are: "
                                f"{', '.join(names)}")  # fmt: skip
            chosen |= found
        return replace(self, arms=tuple(arm for arm in self.arms if arm.name in chosen))


def identity(study: Study, files: Mapping[str, str]) -> str:
    """SHA-256 of what defines a study's runs. files: SHA-256 of each file they depend on, by what it is."""
    return hashlib.sha256(json.dumps([study.plain(), dict(files)], sort_keys=True).encode()).hexdigest()


def shipped_studies() -> list[str]:
    """The names of the studies in configs/."""
    return sorted(path.stem for path in CONFIGS.glob("*.yaml") if is_study(path))


def is_study(path: Path) -> bool:
    """Whether a YAML file is a study's, and not a recipe of hrm_rl.train."""
    import yaml

    root = compose(path)
    return isinstance(root, yaml.MappingNode) and any(key.value == "arms" for key, _ in root.value)


def find_study(word: str) -> Path:
    """The file of a study: a path, or the name of one that ships. UserError lists those there are."""
    there = shipped_studies()
    if word in there:
        return CONFIGS / f"{word}.yaml"
    path = Path(word).expanduser()
    if path.suffix in (".yaml", ".yml") or "/" in word:
        return path
    raise UserError(f"study {word!r} is unknown{nearest(word, there)}; there are: {', '.join(there) or 'none'}, or "
                    "name a YAML file")  # fmt: skip


def load_study(path: str | Path, seeds: int | None = None, updates: int | None = None) -> Study:
    """Read a study. `seeds` and `updates` win over the file. UserError names file and line of what does not fit."""
    return _Reader(Path(path)).study({"seeds": seeds, "updates": updates})


# --- reading --------------------------------------------------------------------------------------------------

_TOP = {"kind": Kind, "title": str, "question": str, "seeds": int, "updates": int, "checkpoints": int,
        "size": Literal[4, 6, 9], "core": str | None, "max_steps": int}  # fmt: skip
_RANGES = {"seeds": (1, 100_000), "updates": (1, 1 << 30), "checkpoints": (1, 10_000), "max_steps": (2, 1000)}
_ONLY_Q = ("size", "core", "max_steps")


@dataclass(frozen=True)
class _Leaf:
    """A field of a block or of the baseline: the values to cross, and where it stands."""

    values: list[Any]
    place: str


class _Reader:
    """One file, from its tree of nodes to a Study."""

    def __init__(self, path: Path):
        self.path = path
        self.root = compose(path)

    def refuse(self, node, message: str):
        raise UserError(f"{self.place(node)}: {message}")

    def place(self, node) -> str:
        return f"{self.path}:{node.start_mark.line + 1}"

    def pairs(self, node, what: str, known: Sequence[str] = ()) -> list[tuple[str, Any, Any]]:
        """(name, key node, value node) of a mapping; a name that is not `known` is refused, where there are any."""
        import yaml

        if not isinstance(node, yaml.MappingNode):
            self.refuse(node, f"{what} must hold settings, one 'name: value' a line")
        found: dict[str, tuple[str, Any, Any]] = {}
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag.endswith(":merge"):
                self.refuse(key, f"a name in {what} must be a word")
            if key.value in found:
                self.refuse(key, f"{key.value!r} is given twice in {what}")
            if known and key.value not in known:
                self.refuse(key, f"unknown {key.value!r} in {what}{nearest(key.value, known)} (it takes: "
                                 f"{', '.join(known)})")  # fmt: skip
            found[key.value] = (key.value, key, value)
        return list(found.values())

    def value(self, node, name: str, hint: Any) -> Any:
        """One plain value of the type of its field; without a type, whatever stands there."""
        import yaml

        held = construct(self.path, node)
        if isinstance(held, float) and not math.isfinite(held):
            self.refuse(node, f"{name} must be a finite number, not {held}")
        if hint is None or fits(hint, held):
            return float(held) if hint is float else held
        if isinstance(node, yaml.ScalarNode):
            if fits(hint, node.value):  # off and 1 where a word is asked for
                return node.value
            if hint is float:
                try:
                    number = float(node.value)  # 1e-3, which YAML takes for a word
                    if math.isfinite(number):
                        return number
                except ValueError:
                    pass
        self.refuse(node, f"{name} must be {in_words(hint)}, not {shortened(held)}")

    # --- the study ------------------------------------------------------------------------------------------

    def study(self, given: Mapping[str, int | None]) -> Study:
        import yaml

        if not isinstance(self.root, yaml.MappingNode):
            raise UserError(f"{self.path}: must hold a study, one 'name: value' a line")
        top = {name: (key, node) for name, key, node in
               self.pairs(self.root, "a study", (*_TOP, "puzzles", "baseline", "arms"))}  # fmt: skip
        if "kind" not in top:
            raise UserError(f"{self.path}: kind must be given: {in_words(Kind)}")
        values = {name: self.value(top[name][1], name, hint) for name, hint in _TOP.items() if name in top}
        for name, (low, high) in _RANGES.items():
            if name in values and not low <= values[name] <= high:
                self.refuse(top[name][1], f"{name} must be between {low} and {high}, not {values[name]}")
            if given.get(name) is not None:
                if not low <= given[name] <= high:
                    raise UserError(f"--{name} must be between {low} and {high}, not {given[name]}")
                values[name] = given[name]
        kind = values["kind"]
        if kind != "q_only":
            for name in _ONLY_Q:
                if name in top:
                    self.refuse(top[name][0], f"{name} of a {kind} study is a setting of its baseline")
        sources = self._puzzles(top["puzzles"][1], kind) if "puzzles" in top else {}
        fields = _QFields() if kind == "q_only" else _TrainFields()
        baseline = self._leaves(top["baseline"][1], "the baseline", fields) if "baseline" in top else {}
        for name, leaf in baseline.items():
            if len(leaf.values) != 1:
                raise UserError(f"{leaf.place}: {name} of the baseline must be one value, not a list of "
                                f"{len(leaf.values)}")  # fmt: skip
        study = Study(self.path.stem, arms=(), path=str(self.path), **values, **sources)
        if study.checkpoints > study.updates:
            study = replace(study, checkpoints=study.updates)
        blocks = self._blocks(top["arms"][1], fields) if "arms" in top else []
        arms, without_effect = _arms(fields, baseline, blocks, f"{self.path}:1")
        return replace(study, arms=arms, without_effect=without_effect)

    def _puzzles(self, node, kind: str) -> dict[str, PuzzleSource]:
        known = ("train", "probe") if kind == "q_only" else ("probe",)
        hints = hints_of(PuzzleSource) if kind == "q_only" else {"count": int}
        found = {}
        for name, key, part in self.pairs(node, "puzzles", known):
            own = {}
            for field, _, value in self.pairs(part, f"puzzles.{name}", tuple(hints)):
                own[field] = self.value(value, f"puzzles.{name}.{field}", hints[field])
            usual = getattr(Study, name)
            found[name] = source = replace(usual, **own)
            if not 0 <= source.count < 1 << 31:
                self.refuse(key, f"puzzles.{name}.count must be at least 0, not {source.count}")
        return found

    def _blocks(self, node, fields: _Fields) -> list[tuple[str, str | None, dict[str, _Leaf]]]:
        """(place, name or None, leaves) of every block."""
        import yaml

        if isinstance(node, yaml.SequenceNode):
            named = [("a block of arms", part) for part in node.value]
        else:
            named = []
            for name, key, value in self.pairs(node, "arms"):
                if isinstance(value, yaml.SequenceNode) and not value.value:
                    self.refuse(key, f"{name!r} holds an empty list")
                if self._is_no_block(name, value, fields):
                    block = f"{{{name}: {_as_written(value)}}}"
                    self.refuse(key, f"{name!r} stands where the name of a block belongs: write arms: {{any_name: "
                                     f"{block}}}, or a list, - {block}")  # fmt: skip
                named.append((f"block {name!r}", value))
        found = []
        for what, block in named:
            for part in block.value if isinstance(block, yaml.SequenceNode) else [block]:
                names = [value for name, _, value in self.pairs(part, what) if name == "name"]
                own = self.value(names[0], "name", str) if names else None
                leaves = self._leaves(part, what, fields, skip=("name",))
                if own is not None and (math.prod(len(leaf.values) for leaf in leaves.values()) != 1 or not own
                                        or own == BASELINE or not own.isprintable() or len(own) > 100):  # fmt: skip
                    self.refuse(names[0], f"name must be a word for one arm (no list in its block), not {own!r}")
                found.append((self.place(part), own, leaves))
        return found

    def _is_no_block(self, name: str, node, fields: _Fields) -> bool:
        """Whether `name: node` among the arms is a field with its values, one level too high."""
        import yaml

        parts = node.value if isinstance(node, yaml.SequenceNode) else [node]
        blocks = [part for part in parts if isinstance(part, (yaml.MappingNode, yaml.SequenceNode))]
        if name not in fields.groups:
            return not blocks and not fields.refusal(name)
        words = [key.value for part in blocks if isinstance(part, yaml.MappingNode) for key, _ in part.value
                 if isinstance(key, yaml.ScalarNode) and key.value != "name"]  # fmt: skip
        return any(fields.refusal(word) and not fields.refusal(f"{name}.{word}") for word in words
                   if word not in fields.groups)  # fmt: skip

    def _leaves(self, node, what: str, fields: _Fields, prefix: str = "", skip: Sequence[str] = ()) -> dict[str, _Leaf]:
        import yaml

        found: dict[str, _Leaf] = {}
        for word, key, value in self.pairs(node, what):
            name = prefix + word
            if word in skip:
                continue
            if not prefix and word in fields.groups:
                found |= self._leaves(value, word, fields, f"{word}.")
                continue
            complaint = fields.refusal(name)
            if complaint:
                self.refuse(key, complaint)
            hint = fields.hint(name)
            parts = value.value if isinstance(value, yaml.SequenceNode) else [value]
            one_pair = hint is not None and is_pair(hint) and all(isinstance(p, yaml.ScalarNode) for p in parts)
            if one_pair:
                parts = [value]
            if not parts:
                self.refuse(key, f"{name} holds no value")
            values = [self.value(part, name, hint) for part in parts]
            found[name] = _Leaf([tuple(v) if one_pair or isinstance(v, list) else v for v in values], self.place(key))
        return found


# --- fields ---------------------------------------------------------------------------------------------------


class _Fields:
    """What an arm of one kind of study can set, and what it comes to."""

    groups: Sequence[str] = ()

    def refusal(self, name: str) -> str:
        """Why a field cannot be set; empty where it can."""
        raise NotImplementedError

    def hint(self, name: str) -> Any:
        """Its type; None where only its owner knows."""
        raise NotImplementedError

    def resolve(self, values: dict[str, Any]) -> dict[str, Any]:
        """Everything that defines the arm, with defaults. UserError for what does not fit together."""
        raise NotImplementedError

    def agent(self, values: Mapping[str, Any]) -> str:
        """The name of its agent, where it has one."""
        return ""

    def short(self, name: str) -> str:
        """A field as the names of arms spell it."""
        return name


class _QFields(_Fields):
    """Learners on recordings: the fields of Arm."""

    def refusal(self, name: str) -> str:
        known = list(hints_of(Arm))
        return "" if name in known else f"unknown field {name!r} of an arm{nearest(name, known)} (there are: " \
                                        f"{', '.join(known)})"  # fmt: skip

    def hint(self, name: str) -> Any:
        return hints_of(Arm)[name]

    def resolve(self, values: dict[str, Any]) -> dict[str, Any]:
        from hrm_rl.study.learners import check

        resolved = without_effect_as(Arm(), Arm.from_values(values).to_values())
        check(Arm(**resolved))
        return resolved


class _TrainFields(_Fields):
    """Live training: the settings of hrm_rl.train, its agent and that agent's arguments."""

    groups = _GROUPS

    def __init__(self):
        from hrm_rl.config import OptimConfig, TrainConfig
        from hrm_rl.core import CoreConfig

        own = {name: hint for name, hint in hints_of(TrainConfig).items() if name not in ("optim", "core")}
        self.hints = own | {"agent": str}
        for group, cls in (("optim", OptimConfig), ("core", CoreConfig)):
            self.hints |= {f"{group}.{name}": hint for name, hint in hints_of(cls).items()}
        self.hints["core.dtype"] = Literal["auto", "float32", "bfloat16", "float16"]

    def refusal(self, name: str) -> str:
        if name in _STUDYS_OWN:
            return f"{name} is no field of an arm: {_STUDYS_OWN[name]} of the study decides it"
        if name.startswith("agent_args.") or name in self.hints:
            return ""
        known = [known for known in (*self.hints, "agent_args") if known not in _STUDYS_OWN]
        return f"unknown field {name!r} of an arm{nearest(name, known)} (there are: {', '.join(known)})"

    def hint(self, name: str) -> Any:
        return self.hints.get(name)

    def short(self, name: str) -> str:
        own = name.removeprefix("agent_args.")
        return own if own == name or own not in self.hints else f"agent.{own}"

    def agent(self, values: Mapping[str, Any]) -> str:
        return _agent(values.get("agent", "auto"), values.get("objective", "joint"))

    def resolve(self, values: dict[str, Any]) -> dict[str, Any]:
        from hrm_rl.core import find_core

        from_scratch = values.get("init_core") is None and values.get("objective") != "q"
        if from_scratch and values.get("core.gradient") != "last_k":
            values = {name: value for name, value in values.items() if name != "core.gradient_k"}  # has no effect
        config, agent, arguments = train_settings(values)
        find_core(config.core.kind)  # refuses a kind that is none
        resolved = _flat(config.to_values()) | {"core.dtype": values.get("core.dtype", "auto")}  # not this machine's
        for name in _STUDYS_OWN:
            resolved.pop(name)
        signature = inspect.signature(find_agent_class(agent)).parameters
        usual = {n: p.default for n, p in signature.items() if p.default is not inspect.Parameter.empty}
        from agents.arguments import OFFERED

        full = {name: value for name, value in usual.items() if name not in OFFERED} | arguments
        if set(hints_of(Arm)) & set(full) >= {"target", "replay", "backup", "head", "epsilon"}:
            full = without_effect_as(usual, full)
        return resolved | {"agent": agent} | {f"agent_args.{name}": value for name, value in full.items()}


def without_effect_as(usual: Arm | Mapping[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """`values` of an Arm with the fields that have no effect beside the others as in `usual`."""
    known = usual.to_values() if isinstance(usual, Arm) else usual
    return {n: v if n not in _COUNTS or n not in known or _COUNTS[n](values) else known[n] for n, v in values.items()}


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping) and not prefix and name in _GROUPS:
            found |= _flat(value, f"{name}.")
        else:
            found[prefix + name] = tuple(value) if isinstance(value, list) else value
    return found


def nested(values: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted names to the layout of hrm_rl.train's YAML files, with lists for tuples."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        group, dot, rest = name.rpartition(".")
        held = found.setdefault(group, {}) if dot else found
        held[rest] = list(value) if isinstance(value, tuple) else value
    return found


def train_settings(values: Mapping[str, Any], **own: Any) -> tuple:
    """(TrainConfig, name of the agent, its arguments) of an arm's values; `own` are the study's settings of the run."""
    from hrm_rl.config import TrainConfig

    held = nested(values) | own
    agent, arguments = held.pop("agent", "auto"), held.pop("agent_args", {})
    config = TrainConfig.from_values(held)
    agent = _agent(agent, config.objective)
    checked: dict[str, Any] = {}
    for name, value in arguments.items():
        checked |= _checked_argument(agent, name, value)
    return config, agent, checked


def _agent(name: str, objective: str) -> str:
    """auto as `hrm_rl.train` takes it."""
    return name if name != "auto" else "fixed" if objective == "supervised" else "q"


@lru_cache(maxsize=4096)
def _checked_argument(agent: str, name: str, value: Any) -> dict[str, Any]:
    from agents.arguments import check_arguments

    return check_arguments(find_agent_class(agent), {name: value})


@lru_cache
def find_agent_class(name: str) -> type:
    from agents import find_agent

    return find_agent(name)


# --- arms -----------------------------------------------------------------------------------------------------


def _arms(fields: _Fields, baseline: dict[str, _Leaf], blocks: Sequence[tuple], place: str) -> tuple[tuple, tuple]:
    """The baseline, then every different arm of the blocks, in their order; and what came to an arm there was already.

    The latter only where a field that was given never has an effect in its block, or where the block is the baseline:
    crossed lists come to the same arm here and there by their nature.
    """
    count = sum(math.prod(len(leaf.values) for leaf in leaves.values()) for _, _, leaves in blocks)
    if count > MOST_ARMS:
        raise UserError(f"{blocks[0][0]}: {count:,} arms are more than any study runs (at most {MOST_ARMS:,})")
    base = {name: leaf.values[0] for name, leaf in baseline.items()}
    places = {name: leaf.place for name, leaf in baseline.items()}
    resolved_base = _resolved(fields, base, places, place)
    found = {_content(resolved_base): StudyArm(BASELINE, resolved_base, {}, place)}
    names, same = {BASELINE}, []
    for where, own_name, leaves in blocks:
        combinations = []
        for combination in itertools.product(*(leaf.values for leaf in leaves.values())):
            given = dict(zip(leaves, combination, strict=True))
            start = base
            if fields.agent(start | given) != fields.agent(base):  # another agent takes other arguments
                start = {name: value for name, value in base.items() if not name.startswith("agent_args.")}
            own_places = places | {name: leaf.place for name, leaf in leaves.items()}
            combinations.append((given, _resolved(fields, start | given, own_places, where)))
        idle = {name for name in leaves if not any(values.get(name) == given[name] != resolved_base.get(name)
                                                   for given, values in combinations)}  # fmt: skip
        for given, values in combinations:
            changes = _changes(resolved_base, values, given)
            name = own_name or " ".join(f"{fields.short(n)}={_shown(v)}" for n, v in changes.items())
            known = found.get(_content(values))
            if known is not None:
                if own_name and known.name == BASELINE:
                    raise UserError(f"{where}: arm {own_name!r} is the baseline itself")
                if own_name:
                    found[_content(values)] = replace(known, name=own_name)
                elif any(values.get(n) != given[n] for n in idle) or (len(combinations) == 1 and not changes):
                    asked = " ".join(f"{fields.short(n)}={_shown(v)}" for n, v in given.items())
                    same.append((asked or "an empty block", known))
                continue
            if name in names:
                raise UserError(f"{where}: two different arms are named {name!r}")
            names.add(name)
            found[_content(values)] = StudyArm(name, values, changes, where)
    said = {(asked, found[_content(known.values)].name): None for asked, known in same}  # an arm may be renamed later
    return tuple(found.values()), tuple(said)


def _as_written(node) -> str:
    """A node of a file on one line, cut where it is long."""
    import yaml

    if isinstance(node, yaml.MappingNode):
        text = f"{{{', '.join(f'{key.value}: {_as_written(value)}' for key, value in node.value)}}}"
    elif isinstance(node, yaml.SequenceNode):
        text = f"[{', '.join(map(_as_written, node.value))}]"
    else:
        text = str(node.value)
    return text if len(text) <= 60 else "..."


def _resolved(fields: _Fields, values: dict[str, Any], places: Mapping[str, str], where: str) -> dict[str, Any]:
    try:
        with blaming(places):
            return fields.resolve(values)
    except UserError as error:
        if str(error).startswith(tuple(f"{held}: " for held in places.values())):
            raise
        named = re.match(r"agent_args of \w+: (?:unknown ')?(\w+)", str(error))
        place = places.get(f"agent_args.{named[1]}", where) if named else where
        raise UserError(f"{place}: {error}") from error


def _changes(base: Mapping[str, Any], values: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """What differs from the baseline; of another agent's arguments those that were given."""
    other_agent = base.get("agent") != values.get("agent")
    return {
        name: value for name, value in values.items()
        if (name not in base or base[name] != value)
        and not (other_agent and name.startswith("agent_args.") and name not in given)
    }  # fmt: skip


def _content(values: Mapping[str, Any]) -> str:
    return json.dumps(values, sort_keys=True, default=str)


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}" if float(f"{value:g}") == value else repr(value)
    return ",".join(map(_shown, value)) if isinstance(value, tuple) else str(value)
