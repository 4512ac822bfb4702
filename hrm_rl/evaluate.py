"""Evaluate a run or a model file: `python -m hrm_rl.evaluate RUN [--max-steps 1 2 4 8 16]`.

Each puzzle is counted exactly once, at its own halt. Budgets beyond the one trained with are allowed.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from hrm_rl import cli
from hrm_rl.errors import UserError
from hrm_rl.tasks.csv_io import check_target


def build_parser():
    """The parser of this command; its --help explains every flag."""
    parser = cli.make_parser("python -m hrm_rl.evaluate", __doc__.split("\n")[0], config=False)
    parser.add_argument("run", nargs="?", type=str, default=None, metavar="RUN",
                        help="Run folder, checkpoint folder, model file, or checkpoint of the released HRM "
                        "(hf://owner/name fetches it from the Hub); nothing: the core that ships.")  # fmt: skip
    parser.add_argument("--core", type=str, default="", help="The same as RUN, as a flag.")
    parser.add_argument("--core_kind", type=str, default="",
                        help="Import path of the core's class, where it is your own (docs/CORES.md).")  # fmt: skip
    parser.add_argument("--max_steps", type=int, nargs="+", default=None,
                        help="Budgets to report the learned halt for; nothing: the one trained with.")  # fmt: skip
    parser.add_argument("--data", type=str, default="",
                        help=".csv, .csv.gz or hf://owner/name; nothing: the shipped test set.")  # fmt: skip
    parser.add_argument("--task", type=str, default="auto",
                        help="What the puzzles are (sudoku, maze, ... or an import path); auto: what the core was "
                        "trained on.")  # fmt: skip
    parser.add_argument("--limit", type=int, default=0, help="At most this many puzzles; 0 is all.")
    parser.add_argument("--agent", type=str, default="auto",
                        help="auto (the one the run was trained with, its arguments included; q in a file that names "
                        "none), another short name (docs/PLUGINS.md) or an import path; its arguments follow as "
                        "--agent.NAME VALUE and win over the run's.")  # fmt: skip
    parser.add_argument("--agent_args", type=dict, default={}, help='Or in one piece, e.g. \'{"k": 4}\'.')
    parser.add_argument("--ensemble", type=Literal["none", "first", "best"], default="none",
                        help="Show each puzzle in several symmetries as well and answer with the copy that halts first "
                        "or the one of the highest q_halt; segments are counted over all copies.")  # fmt: skip
    parser.add_argument("--copies", type=int, default=None,
                        help="Of a puzzle in an ensemble, itself included; nothing: 4.")  # fmt: skip
    parser.add_argument("--batch_size", type=int, default=128, help="Puzzles in work at once.")
    parser.add_argument("--device", type=str, default="auto", help="auto, cpu or cuda.")
    parser.add_argument("--dtype", type=Literal["auto", "float32", "bfloat16", "float16"], default="auto",
                        help="What to compute in; auto picks what the hardware multiplies natively.")  # fmt: skip
    parser.add_argument("--out", type=str, default="", help="Write the report as JSON to this file as well.")
    return parser


def main(argv: Sequence[str]) -> int:
    from agents.arguments import split_flags

    words, agent_flags = split_flags(argv)
    options = cli.parse(build_parser(), words)
    out = Path(options.out).expanduser() if options.out else None
    if out is not None:
        check_target(out)
    import torch

    from hrm_rl import evaluation
    from hrm_rl.checkpoint import write_atomically
    from hrm_rl.devices import describe, pick_device, pick_dtype
    from hrm_rl.ensemble import MOST_COPIES, ensemble_line, ensemble_report, solve_ensemble
    from hrm_rl.trainer import user_puzzles

    device = pick_device(options.device)
    for name, low, high in (("batch_size", 1, (1 << 31) - 1), ("limit", 0, (1 << 31) - 1), ("copies", 1, MOST_COPIES)):
        if options[name] is not None and not low <= options[name] <= high:
            raise UserError(f"--{name} must be between {low} and {high}, not {options[name]}")
    if options.copies is not None and options.ensemble == "none":
        raise UserError("--copies: of an ensemble; say which with --ensemble first or best")
    if options.core and options.run is not None:
        raise UserError(f"say once what to evaluate: RUN is {options.run}, --core is {options.core}")
    loaded = load_asked(options.core or options.run, options.core_kind, options.task)
    core = in_dtype(loaded.core, pick_dtype(options.dtype, device)).to(device)
    trained_with = int(loaded.meta.get("max_steps", 16))
    budgets = sorted(set(options.max_steps or [trained_with]))
    if budgets[0] < 1 or budgets[-1] > 10_000:
        wrong = budgets[0] if budgets[0] < 1 else budgets[-1]
        raise UserError(f"--max_steps must be between 1 and 10000, not {wrong}")
    task, side = task_of(loaded, options.task)
    puzzles = user_puzzles(options.data or None, side, "test", options.limit or None, task)

    name, arguments = which_agent(options.agent, loaded)
    agent = load_agent(name, arguments | dict(options.agent_args) | agent_flags, loaded, core, budgets[-1])
    agent.to(device)

    from tqdm import tqdm

    with tqdm(total=len(puzzles), unit="puzzle", disable=None, file=sys.stderr) as bar:
        run = evaluation.trajectories(
            core, agent, puzzles, budgets[-1], options.batch_size, device, progress=bar.update
        )
    solved = evaluation.solve(core, agent, puzzles, budgets[-1], options.batch_size, device)
    result = evaluation.report(run, budgets, solved) | {
        "model": loaded.source, "test": puzzles.name, "test_sha256": puzzles.sha256, "agent": name,
        "trained_with_max_steps": trained_with, "machine": describe(device), "torch": torch.__version__,
    }  # fmt: skip
    label = "learned" if options.agent == "auto" and agent.learns or name == "q" else name.rpartition(".")[2]
    print(evaluation.table(result, puzzles.name, label))
    if options.ensemble != "none":
        rule, copies = options.ensemble, options.copies or 4
        chosen = solve_ensemble(core, agent, puzzles, budgets[-1], rule, copies, options.batch_size, device)
        result["ensemble"] = ensemble_report(chosen, rule, copies)
        print(ensemble_line(result["ensemble"]))
    if out is not None:
        try:
            write_atomically(out, (json.dumps(result, indent=1) + "\n").encode())
        except OSError as error:
            raise UserError(f"{out}: cannot be written ({error.strerror})") from error
    return 0


def load_asked(source: str | None, core_kind: str = "", task: str = "auto"):
    """The core that a command's RUN, --core-kind and --task ask for; no RUN: the one that ships for the task."""
    from hrm_rl.core.io import load_core
    from hrm_rl.tasks.registry import task_class, task_name

    packaged = {}
    if source is None and task != "auto":
        packaged = {"task": task_name(task), "size": task_class(task).default_side}
    return load_core(source, kind=core_kind, **packaged)


def task_of(loaded, asked: str = "auto") -> tuple[str, int]:
    """(task, side) of the puzzles that a loaded core was made for: what its file notes, else what its sizes fit.

    A file that came from elsewhere cannot make us import code: a task of the user's own has to be named.
    """
    from hrm_rl.tasks.registry import DEFAULT_TASK, TASKS, get_task, task_class, task_name, task_of_core

    config, noted = loaded.core.config, loaded.meta.get("task")
    if noted is None and asked == "auto":
        side = round(config.seq_len**0.5)
        if config.vocab_size == side + 2 and config.seq_len == side**2:  # whether or not there is such a Sudoku
            return DEFAULT_TASK, side
        return task_of_core(config.vocab_size, config.seq_len)
    if asked == "auto" and not (isinstance(noted, str) and noted in TASKS):
        raise UserError(f"{loaded.source}: was trained on the task {noted!r}, which is no short name and must be asked "
                        f"for: --task {noted}")  # fmt: skip
    name = noted if asked == "auto" else task_name(asked)
    kind = task_class(name)
    fits = (s for s in kind.sides if (t := get_task(name, s)).seq_len == config.seq_len
            and t.vocab_size == config.vocab_size)  # fmt: skip
    side = next(fits, None)
    if side is None:
        sizes = f"{config.seq_len} tokens with {config.vocab_size} values"
        raise UserError(f"{loaded.source}: made for {sizes}, as no puzzle of the task {name} has")
    return name, side


def which_agent(asked: str, loaded) -> tuple[str, dict]:
    """(name, arguments) of --agent: those the model file notes, where it is that agent that is asked for.

    auto is the file's own agent. A file that came from elsewhere cannot make us import code: an agent of the user's,
    known by its import path, has to be named.
    """
    from agents import agent_names, find_agent
    from agents.registry import agent_name

    own, arguments = loaded.meta.get("agent", "q"), loaded.meta.get("agent_args", {})
    if not isinstance(own, str) or not isinstance(arguments, dict):
        raise UserError(f"{loaded.source}: its header names no valid agent ({own!r} with {arguments!r})")
    if asked == "auto" and own not in agent_names():
        raise UserError(f"{loaded.source}: was trained with {own}, which is no short name and must be asked for: "
                        f"--agent {own} (--agents in compare)")  # fmt: skip
    name = own if asked == "auto" else asked
    same = name == own or agent_name(find_agent(name)) == own
    return name, arguments if same else {}


def load_agent(name: str, arguments: dict, loaded, core, max_steps: int):
    """The agent of that name; a learned one gets the weights that lie beside the core. UserError if there are none."""
    from agents import find_agent, make_agent
    from hrm_rl.core.q_head import QHead

    agent_class = find_agent(name)
    agent = make_agent(agent_class, core, max_steps, loaded.meta.get("bootstrap", "extra_forward"), arguments)
    q_head = loaded.q_head.state_dict() if loaded.q_head is not None else {}
    held = loaded.agent_tensors | {f"q_head.{name}": value for name, value in q_head.items()}
    own = agent.state_dict()
    if not own:
        return agent
    if isinstance(getattr(agent, "q_head", None), QHead) and loaded.q_head is None:
        raise UserError(f"{loaded.source}: holds no Q-head, so there is no learned halt; name another agent (fixed is "
                        "one)")  # fmt: skip
    for name, value in own.items():
        if name not in held or held[name].shape != value.shape:
            missing = f"holds no weights {name!r} {tuple(value.shape)} of {agent_class.__name__}"
            raise UserError(f"{loaded.source}: {missing}; train with this agent first")
    agent.load_state_dict({name: held[name] for name in own})
    return agent


def in_dtype(core, dtype: str):
    """The same core computing in another dtype."""
    from dataclasses import replace

    from hrm_rl.core import build_core

    twin = build_core(replace(core.config, dtype=dtype))
    twin.load_state_dict(core.state_dict())
    return twin


if __name__ == "__main__":
    cli.run(main)
