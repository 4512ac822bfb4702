"""Compare halting rules on one frozen core: `python -m hrm_rl.compare RUN [--agents q residual my_agent.MyAgent]`.

Thresholds are chosen on validation puzzles, never on those of the test; the core runs once for all rules.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Literal

from hrm_rl import cli
from hrm_rl.errors import UserError
from hrm_rl.tasks.csv_io import check_target

#: Arguments that are a threshold, or one in other words: an agent given one of them keeps it.
THRESHOLDS = ("threshold", "tau", "k", "patience", "cost", "mean_steps")
FILES = ("compare.json", "compare.csv", "compare.png")


def build_parser():
    """The parser of this command; its --help explains every flag."""
    parser = cli.make_parser("python -m hrm_rl.compare", __doc__.split("\n")[0], config=False)
    add = parser.add_argument
    add("run", nargs="?", type=str, default=None, metavar="RUN",
        help="Run folder, checkpoint folder, model file, or checkpoint of the released HRM; nothing: the core that "
        "ships.")  # fmt: skip
    add("--core_kind", type=str, default="",
        help="Import path of the core's class, where it is one of your own (docs/CORES.md).")
    add("--agents", type=str, nargs="+", default=[],
        help="Rules: NAME, NAME:ARGUMENT=VALUE,... or an import path. NAME@own keeps the agent's own threshold, as "
        "does one given by hand (residual:tau=0.05). Nothing: all that fit the core. residual and oracle are always "
        "there.")  # fmt: skip
    add("--calibrate", type=Literal["drop", "steps", "risk", "none"], default="drop",
        help="Thresholds: fewest steps within --drop of the best accuracy, mean steps of --mean-steps, the risk bound "
        "of --delta and --alpha, or none (every agent's own).")  # fmt: skip
    add("--drop", type=float, default=0.005, help="Exact accuracy that may be given up for fewer steps.")
    add("--reference", type=Literal["best", "budget"], default="best",
        help="Given up against the rule's own best threshold, or against running every puzzle to max_steps.")
    add("--mean_steps", type=float, default=0.0, help="Mean steps on the validation puzzles (--calibrate steps).")
    add("--delta", type=float, default=0.02, help="Accuracy lost against the full budget (--calibrate risk).")
    add("--alpha", type=float, default=0.05, help="Chance that more than --delta is lost (--calibrate risk).")
    add("--bound", type=Literal["binomial", "hoeffding"], default="binomial",
        help="P-values of --calibrate risk: binomial (exact, of puzzles lost) or hoeffding (of lost minus gained).")
    add("--max_steps", type=int, default=0, help="The budget; 0 is the one trained with.")
    add("--task", type=str, default="auto",
        help="What the puzzles are (sudoku, maze, ... or an import path); auto: what the core was trained on.")
    add("--data", type=str, default="", help="Test puzzles: .csv, .csv.gz or hf://owner/name; nothing: the shipped "
        "test set.")  # fmt: skip
    add("--limit", type=int, default=1000, help="At most this many test puzzles; 0 is all.")
    add("--validation", type=str, default="", help="Validation puzzles, likewise; nothing: the file that the run was "
        "trained on.")  # fmt: skip
    add("--validation_limit", type=int, default=2000, help="At most this many of them; 0 is all.")
    add("--ponder_cost", type=float, default=0.01, help="Price of each further segment in regret and return.")
    add("--baseline", type=str, default="", help="The agent to compare with, beside the fixed steps; nothing: q@own, "
        "or residual where the core has no Q-head.")  # fmt: skip
    add("--timing", type=bool, default=True, help="Also halt for real with every rule, and take the time.")
    add("--resamples", type=int, default=2000, help="Of the bootstrap intervals.")
    add("--cache", type=str, default="", help="Folder of the recordings, or off; nothing: hrm_rl/recordings in the "
        "user's cache ($XDG_CACHE_HOME or ~/.cache).")  # fmt: skip
    add("--batch_size", type=int, default=128, help="Puzzles in work at once.")
    add("--device", type=str, default="auto", help="auto, cpu or cuda.")
    add("--dtype", type=Literal["auto", "float32", "bfloat16", "float16"], default="auto",
        help="What to compute in; auto picks what the hardware multiplies natively.")
    add("--out", type=str, default="", help="Folder for compare.json, compare.csv and compare.png; nothing: "
        "RUN/compare, or runs/compare where RUN is no run's folder.")  # fmt: skip
    return parser


@dataclass(frozen=True)
class Spec:
    """One word of --agents."""

    label: str  # as it was written
    name: str
    arguments: dict[str, str]
    own: bool  # keeps its own threshold


def read_spec(word: str) -> Spec:
    """NAME[:ARGUMENT=VALUE,...][@own]. UserError for anything else."""
    rest, at, suffix = word.partition("@")
    if at and suffix != "own":
        raise UserError(f"--agents {word}: after @ only own may stand (keep the agent's own threshold)")
    name, _, listed = rest.partition(":")
    arguments = {}
    for part in listed.split(",") if listed else []:
        key, equals, value = part.partition("=")
        if not equals or not key:
            raise UserError(f"--agents {word}: arguments are written NAME:ARGUMENT=VALUE,..., not {part!r}")
        arguments[key.replace("-", "_")] = value
    if not name:
        raise UserError(f"--agents {word}: no name")
    return Spec(word, name, arguments, bool(at) or any(key in THRESHOLDS for key in arguments))


def main(argv: Sequence[str]) -> int:
    options = cli.parse(build_parser(), argv)
    _check_numbers(options)
    specs = [read_spec(word) for word in options.agents]
    out = _out_folder(options)

    from tqdm import tqdm

    from hrm_rl import comparison, evaluation, recorded, scoring
    from hrm_rl.checkpoint import write_atomically
    from hrm_rl.devices import describe, pick_device, pick_dtype
    from hrm_rl.evaluate import in_dtype, load_asked
    from hrm_rl.figures import frontier_figure
    from hrm_rl.flops import countable, segment_flops

    device = pick_device(options.device)
    loaded = load_asked(options.run, options.core_kind, options.task)
    core = in_dtype(loaded.core, pick_dtype(options.dtype, device)).to(device).eval()
    max_steps = options.max_steps or int(loaded.meta.get("max_steps", 16))
    target = comparison.Target(**{name: options[name] for name in comparison.Target.__dataclass_fields__})
    if target.calibrate == "steps" and not 1 <= target.mean_steps <= max_steps:
        raise UserError(f"--mean-steps must be between 1 and max_steps={max_steps}, not {target.mean_steps:g}")
    test, validation = _puzzles(options, loaded, core)
    chosen = _agents(specs, options.baseline, loaded, core, max_steps, device)
    folder = None if options.cache == "off" else Path(options.cache or recorded.default_folder()).expanduser()
    if options.cache not in ("", "off"):
        _check_folder(folder, "--cache")

    model = recorded.model_sha256(loaded.source)
    passes = {}
    for split, puzzles in (("validation", validation), ("test", test)):
        key = recorded.recording_key(core, model, puzzles, max_steps, str(device))
        with tqdm(total=len(puzzles), unit="puzzle", desc=split, disable=None, file=sys.stderr, leave=False) as bar:
            the = recorded.Pass(core, puzzles, max_steps, key, options.batch_size, device, folder, _notice, bar.update)
            passes[split] = recorded.wishes_of(the, [(agent, spec.arguments) for spec, agent in chosen])
    comparison.check_solvable(passes["validation"][0], validation.name)

    baseline = options.baseline or _default_baseline(chosen)
    entries = _entries(chosen, passes, target, baseline, max_steps)
    if options.timing:
        evaluation.solve(core, entries[0].agent, test.select(_first(len(test))), 2, options.batch_size, device)  # warm
        entries = [
            replace(e, solved=evaluation.solve(core, e.agent, test, max_steps, options.batch_size, device))
            for e in tqdm(entries, unit="rule", desc="timing", disable=None, file=sys.stderr, leave=False)
        ]
    flops = segment_flops(core.config).forward if countable(core.config) else None
    compared = comparison.compare(entries, passes["test"][0], scoring.difficulty_groups(test), baseline,
                                  options.ponder_cost, flops, options.resamples)  # fmt: skip
    result = {
        "model": loaded.source, "model_sha256": model, "max_steps": max_steps, "calibration": target.words,
        "target": vars(target), "ponder_cost": options.ponder_cost, "baseline": compared.baseline,
        "residual": compared.residual, "test": _said(test), "validation": _said(validation),
        "recording_seconds": {split: held[0].seconds for split, held in passes.items()},
        "flop_per_segment": flops, "batch_size": options.batch_size, "dtype": core.config.dtype,
        "machine": describe(device), "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "agents": compared.rows, "fixed_steps": compared.fixed_steps, "differences": compared.differences,
        "verdicts": compared.verdicts,
    }  # fmt: skip
    print(f"{len(test)} test puzzles ({test.name}), at most {max_steps} segments; core {loaded.source}")
    print(f"thresholds from {len(validation)} validation puzzles ({validation.name}): {target.words}\n")
    print(comparison.table(compared, options.ponder_cost))
    contents = (json.dumps(result, indent=1, allow_nan=False).encode(), comparison.as_csv(compared),
                frontier_figure(result))  # fmt: skip
    try:
        for name, content in zip(FILES, contents, strict=True):
            write_atomically(out / name, content)
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror})") from error
    print(f"\n{', '.join(FILES)} in {out}")
    return 0


def _entries(chosen, passes: dict, target, baseline: str, max_steps: int) -> list:
    """One entry an agent, with its threshold set from the validation puzzles."""
    from agents.random_stop import RandomAgent
    from hrm_rl import comparison
    from hrm_rl.recorded import from_recording

    (held, on_validation), (recording, on_test) = passes["validation"], passes["test"]
    entries, matched = [], None
    for (spec, agent), val, tested in zip(chosen, on_validation, on_test, strict=True):
        entry = comparison.Entry(spec.label, agent, tested, tested.steps(), None, "")
        calibrates = target.calibrate != "none" and not (spec.own or entry.is_oracle or isinstance(agent, RandomAgent))
        steps = val.steps()
        if calibrates:
            comparison.check_score(spec.label, agent, val)
            choice = comparison.choose(val.scores, held.exact, target, agent.strict)
            entry = comparison.with_threshold(agent, replace(entry, choice=choice), choice.threshold)
            steps = val.steps(choice.threshold, agent.strict)
        elif val.scores is not None and not entry.is_oracle:
            entry = replace(entry, setting=comparison.setting_of(agent))
        entries.append(entry)
        if spec.label == baseline:
            matched = float(steps.double().mean())
    for i, (entry, (spec, agent)) in enumerate(zip(entries, chosen, strict=True)):
        if type(agent) is not RandomAgent:
            continue
        if not spec.own:  # matched to the mean steps of the baseline on the validation puzzles
            agent = RandomAgent(max_steps, matched, **{k: v for k, v in spec.arguments.items() if k == "distribution"})
            tested = from_recording(agent, recording)
            entry = replace(entry, agent=agent, wishes=tested, steps=tested.steps())
        entries[i] = replace(entry, setting=f"mean={agent.mean_steps:.4g}")
    return entries


def _agents(specs: list[Spec], baseline: str, loaded, core, max_steps: int, device) -> list:
    """(spec, agent) of every rule of the table; residual, the oracle and the baseline always among them."""
    from agents.oracle import OracleAgent
    from agents.residual import ResidualAgent
    from hrm_rl.evaluate import load_agent, which_agent

    def build(spec: Spec):
        name, noted = which_agent(spec.name, loaded)  # with the arguments that the model file notes for its own agent
        spec = replace(spec, name=name, arguments=noted | spec.arguments)
        return spec, load_agent(name, spec.arguments, loaded, core, max_steps).to(device).eval()

    found = [build(spec) for spec in specs] or _default_agents(build, loaded.meta.get("agent", "q"))
    labels = [spec.label for spec, _ in found]
    for label in labels:
        if labels.count(label) > 1:
            raise UserError(f"--agents: {label} is there twice")
    wanted = []
    if not any(isinstance(agent, ResidualAgent) for _, agent in found):
        wanted.append("residual")
    if baseline and baseline not in labels:
        wanted.append(baseline)
    elif not baseline and loaded.q_head is not None and "q@own" not in labels:
        wanted.append("q@own")
    if not any(isinstance(agent, OracleAgent) for _, agent in found):
        wanted.append("oracle")
    for word in wanted:
        found.append(build(read_spec(word)))
    return found


def _default_agents(build, trained: str) -> list:
    """Every agent that ships and fits: rules that are read off the recording, and the learned one that the file is of.

    Other learners read the same Q-head without having trained it, so they stay out, but for the two rules on it.
    A learned agent stands twice: with the threshold it was trained with (@own) and with a calibrated one.
    """
    from agents import AGENTS
    from hrm_rl.recorded import is_recordable

    found = []
    fitting = {"q", "trm", "advantage"} if trained == "q" else {trained}
    for name, agent_class in AGENTS.items():
        if agent_class.learns and name not in fitting:
            continue
        try:
            spec, agent = build(read_spec(name))
        except UserError:  # learned, and the file holds no weights of it
            if agent_class.learns:
                continue
            raise
        if agent_class.learns and (name == "q" or not is_recordable(agent)):
            found.append(build(read_spec(f"{name}@own")))
        if agent_class.can_be_calibrated() if agent_class.learns else is_recordable(agent):
            found.append((spec, agent))
    return found


def _default_baseline(chosen) -> str:
    from agents.residual import ResidualAgent

    labels = [spec.label for spec, _ in chosen]
    if "q@own" in labels:
        return "q@own"
    return next(spec.label for spec, agent in chosen if isinstance(agent, ResidualAgent))


def _puzzles(options, loaded, core) -> tuple:
    """(test, validation) puzzles. UserError where they share one, or do not fit the core."""
    import torch

    from envs.problem import check_fit
    from hrm_rl.evaluate import task_of
    from hrm_rl.tasks.dataset import shared_puzzles
    from hrm_rl.trainer import user_puzzles

    task, side = task_of(loaded, options.task)
    test = user_puzzles(options.data or None, side, "test", options.limit or None, task)
    source = options.validation or _trained_on(Path(loaded.source))
    validation = user_puzzles(source, side, "train", task=task)
    for puzzles in (test, validation):
        check_fit(core, puzzles)
    if options.validation_limit and len(validation) > options.validation_limit:
        # the last of the order whose first train_limit a run is trained on (trainer.training_puzzles)
        order = torch.randperm(len(validation), generator=torch.Generator().manual_seed(0))
        validation = validation.select(order[-options.validation_limit :].sort().values)
    shared = shared_puzzles(test, validation)
    if shared:
        raise UserError(f"thresholds must not be chosen on test puzzles: {shared.partition(', so')[0]}; name other "
                        "puzzles by --validation")  # fmt: skip
    return test, validation


def _trained_on(model: Path) -> str | None:
    """The training puzzles of the run that a model file lies in; None for the shipped ones."""
    from hrm_rl.yaml_files import compose, construct

    config = model.parents[2] / "config.yaml" if len(model.parents) > 2 else None
    if config is None or model.parents[1].name != "checkpoints" or not config.is_file():
        return None
    held = construct(config, compose(config))
    return held.get("data") if isinstance(held, dict) else None


def _said(puzzles) -> dict:
    return {"name": puzzles.name, "puzzles": len(puzzles), "sha256": puzzles.sha256}


def _first(count: int):
    import torch

    return torch.arange(min(count, 64))


def _check_numbers(options) -> None:
    for name, low in (("batch_size", 1), ("limit", 0), ("validation_limit", 0), ("resamples", 1)):
        if not low <= options[name] < 1 << 31:
            flag = name.replace("_", "-")
            raise UserError(f"--{flag} must be between {low} and {(1 << 31) - 1}, not {options[name]}")
    if not 0 <= options.max_steps <= 10_000:
        raise UserError(f"--max-steps must be between 1 and 10000 (or 0), not {options.max_steps}")
    for name, low, high in (("drop", 0, 1), ("delta", 0, 1), ("alpha", 0, 1), ("ponder_cost", 0, 1e6)):
        if not low <= options[name] <= high:
            raise UserError(f"--{name.replace('_', '-')} must be between {low} and {high:g}, not {options[name]}")


def _out_folder(options) -> Path:
    """Where the results go, ready to be written into. UserError otherwise, before the work."""
    run = Path(options.run) if options.run else None
    own = run if run is not None and run.is_dir() and (run / "config.yaml").is_file() else Path("runs")
    out = Path(options.out).expanduser() if options.out else own / "compare"
    _check_folder(out, "--out")
    for name in FILES:
        check_target(out / name)
    return out


def _check_folder(folder: Path, flag: str) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(13, "Permission denied")
    except (OSError, ValueError) as error:
        raise UserError(f"{flag} {folder}: cannot be written ({getattr(error, 'strerror', None) or error})") from None


def _notice(line: str) -> None:
    print(f"note: {line}", file=sys.stderr)


if __name__ == "__main__":
    cli.run(main)
