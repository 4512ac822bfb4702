"""Train a core and a halting agent: `python -m hrm_rl.train --env SudokuHalt-v0`.

A run is a folder: config.yaml, metrics.jsonl, tensorboard/, checkpoints/, report.json, training.png.
"""

from __future__ import annotations

import contextlib
import json
import shlex
import shutil
import signal
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from hrm_rl import cli
from hrm_rl.errors import UserError

DESCRIPTION = (
    "Train a recurrent reasoner and its halting agent. Every flag is also a key of the YAML file given by "
    "--config (an agent's own arguments: agent_args). Without flags: 9x9 Sudoku on this machine, as in the README."
)

_ANEW = ("total_steps", "time_budget", "device", "compile", "cuda_graph")  # what a resumed run may be told anew


def main(argv: Sequence[str]) -> int:
    began = time.perf_counter()
    from agents.arguments import split_flags
    from hrm_rl.parallel import joined

    with joined() as ranks, contextlib.ExitStack() as stack:
        words, agent_flags = split_flags(argv)
        options = cli.parse(build_parser(), words)
        session = _Session(began, stack, ranks)
        if options.resume is not None:
            if not options.resume.strip():
                raise UserError("--resume: no run is named")
            return session.resume(Path(options.resume), options, argv)
        return session.start(*read_options(options, agent_flags))


def build_parser():
    """The parser of this command; its --help explains every field."""
    from hrm_rl.config import TrainConfig

    parser = cli.make_parser("python -m hrm_rl.train", DESCRIPTION)
    parser.add_class_arguments(TrainConfig)
    parser.add_argument("--agent", type=str, default="auto",
                        help="Halting agent: a short name (q, trm, confidence, ...: docs/PLUGINS.md) or an import path "
                        "(my_package.my_file.MyAgent); auto is q, and fixed where objective=supervised. Its own "
                        "arguments follow as --agent.NAME VALUE")  # fmt: skip
    parser.add_argument("--agent_args", type=dict, default={},
                        help='Arguments of the agent in one piece, e.g. \'{"epsilon": 0.2}\'')  # fmt: skip
    parser.add_argument("--resume", type=str, default=None,
                        help="Run folder to go on with (or one of its checkpoints); its own configuration counts, but "
                        f"{', '.join(_ANEW[:-1])} and {_ANEW[-1]} may be given anew")  # fmt: skip
    return parser


def read_options(options, agent_flags: dict[str, str] | None = None) -> tuple:
    """(TrainConfig, agent class, agent arguments) of parsed options; `agent_flags` win over agent_args."""
    from agents import find_agent
    from agents.arguments import check_arguments
    from hrm_rl.config import TrainConfig

    values = options.clone().as_dict()
    for name in ("config", "resume", "agent", "agent_args"):
        values.pop(name, None)
    with cli.blaming(options.config):
        config = TrainConfig.from_values(values)
    agent = options.agent
    if agent == "auto":
        agent = "fixed" if config.objective == "supervised" else "q"
    agent_class = find_agent(agent)
    return config, agent_class, check_arguments(agent_class, dict(options.agent_args) | (agent_flags or {}))


def _make_trainer(config, agent_class, agent_arguments, ranks):
    """Our trainer, or the one that lets stable-baselines3 learn where the agent is one of its own."""
    from agents.sb3 import SB3Agent

    if not issubclass(agent_class, SB3Agent):
        from hrm_rl.trainer import Trainer

        return Trainer(config, agent_class, agent_arguments, ranks=ranks)
    from hrm_rl.sb3_training import SB3Trainer

    if ranks.world > 1:
        raise UserError(f"agent {agent_class.__name__}: stable-baselines3 trains in one process, not in {ranks.world}")
    return SB3Trainer(config, agent_class, agent_arguments)


class _Session:
    """One process's share of a run: from the start or a checkpoint to the end, a signal or an error.

    Of several ranks the first one writes and prints; all leave the loop at the same update.
    """

    def __init__(self, began: float, stack: contextlib.ExitStack, ranks):
        self.began = began
        self.stack = stack  # what is given back at the end of the command
        self.ranks = ranks
        self.say = print if ranks.first else lambda *words, **keywords: None
        self.stop_signal: int | None = None

    def start(self, config, agent_class, agent_arguments) -> int:
        import yaml

        from hrm_rl.checkpoint import lock_run, write_atomically
        from hrm_rl.devices import repeatable
        from hrm_rl.metrics import MetricsWriter
        from hrm_rl.tasks.dataset import shared_puzzles
        from hrm_rl.trainer import run_folder

        if self.ranks.first and config.name and (Path(config.out) / config.name).exists():
            folder = Path(config.out) / config.name
            raise UserError(f"{folder}: the run's folder exists; choose another name or resume it")
        self.say("loading puzzles and preparing the core (where it is compiled, about ten seconds) ...", flush=True)
        self.stack.enter_context(repeatable(config.deterministic, config.device))
        # Before the folder: bad input leaves nothing behind.
        trainer = _make_trainer(config, agent_class, agent_arguments, self.ranks)
        if not self.ranks.first:
            self.run = Path(self.ranks.told("run", None))
            return self._train(trainer, None)
        shared = shared_puzzles(trainer.puzzles, trainer.test_puzzles) if config.data or config.test_data else None
        if shared:
            print(f"warning: {shared}", file=sys.stderr)
        self.run = run_folder(trainer.config)
        self.lock = lock_run(self.run)
        self.stack.callback(self.lock.close)
        content = trainer.config.to_values() | {
            "name": "",  # so that --config of this file makes a new folder
            "agent": f"{agent_class.__module__}.{agent_class.__qualname__}", "agent_args": agent_arguments,
        }  # fmt: skip
        write_atomically(self.run / "config.yaml", yaml.safe_dump(content, sort_keys=False).encode())
        self.ranks.told("run", str(self.run))
        try:
            return self._train(trainer, MetricsWriter(self.run))
        except UserError:
            if trainer.step == 0:  # nothing was learned: leave nothing behind that cannot be resumed
                shutil.rmtree(self.run, ignore_errors=True)
            raise

    def resume(self, source: Path, options, argv: Sequence[str]) -> int:
        from hrm_rl.checkpoint import load_checkpoint, load_newest, lock_run, run_of, set_aside_after
        from hrm_rl.devices import repeatable
        from hrm_rl.metrics import MetricsWriter

        run, chosen = run_of(source)
        if self.ranks.first:
            self.lock = lock_run(run)
            self.stack.callback(self.lock.close)
        given = {word.split("=")[0].lstrip("-").replace("-", "_") for word in argv if word.startswith("--")}
        refused = given - {"resume", "debug", *_ANEW}
        if refused:
            name = sorted(refused)[0]
            may = f"{', '.join(_ANEW[:-1])} and {_ANEW[-1]} may change"
            raise UserError(f"--{name}: a resumed run keeps its configuration ({may})")
        stored = cli.parse(build_parser(), ["--config", str(run / "config.yaml")])
        config, agent_class, agent_arguments = read_options(stored)
        changes = {n: getattr(options, n) for n in _ANEW if n in given}
        config = replace(config, **changes)
        if self.ranks.first:
            chosen, tensors, state = (chosen, *load_checkpoint(chosen)) if chosen else load_newest(run)
            self.ranks.told("checkpoint", str(chosen))
        else:
            tensors, state = load_checkpoint(Path(self.ranks.told("checkpoint", None)))
        self.stack.enter_context(repeatable(config.deterministic, config.device))
        trainer = _make_trainer(config, agent_class, agent_arguments, self.ranks)
        trainer.load_state(tensors, state)
        self.run = run
        if trainer.step >= config.total_steps:
            done = f"{run}: is at update {trainer.step} of {config.total_steps}"
            raise UserError(f"{done}; ask for more by --total-steps")
        if not self.ranks.first:
            return self._train(trainer, None)
        for path in set_aside_after(chosen):
            print(f"kept aside, since the run goes on from {chosen.name}: {path}")
        print(f"resuming {run} at update {trainer.step}")
        return self._train(trainer, MetricsWriter(run, state["metrics_position"], trainer.step))

    # --- the loop -----------------------------------------------------------------------------------------

    def _train(self, trainer, writer) -> int:
        from hrm_rl.parallel import RankLostError
        from hrm_rl.trainer import NonFiniteError, is_due

        c, first = trainer.config, self.ranks.first  # only the first rank has a writer
        stride = getattr(trainer, "stride", 1)  # SB3 collects some steps in every slot before it learns

        def passes(before: int, every: int) -> bool:
            """Whether something done each `every` steps falls due in the update that begins at step `before`."""
            return any(is_due(step, every) for step in range(before + 1, before + stride + 1))

        self._catch_signals()
        self.stack.callback(setattr, threading, "excepthook", threading.excepthook)
        threading.excepthook = _quiet_about_files
        progress = _Progress(c, trainer) if first else None
        self.say(f"run folder: {self.run}\n{_describe(trainer)}", flush=True)
        clock, line_clock = time.perf_counter(), time.perf_counter()
        try:
            if self.ranks.world > 1 and trainer.step == 0:
                self._save(trainer, writer)  # a rank may die at any time, and something must be there to go on from
            while trainer.step < c.total_steps:
                if self._agree(trainer) or (c.time_budget and trainer.elapsed >= c.time_budget):
                    break
                coming = trainer.step + stride
                due = passes(trainer.step, c.log_every) or coming >= c.total_steps
                next_due = passes(coming, c.log_every) or coming < c.total_steps <= coming + stride
                details = trainer.update(detailed=due, before_detailed=next_due)
                now = time.perf_counter()
                trainer.elapsed, clock = trainer.elapsed + now - clock, now
                if due:
                    values = trainer.line(details, now - line_clock)
                    if first:
                        if passes(trainer.step - stride, c.eval_every):
                            values |= self._evaluate(trainer)
                        writer.write(coming, values)
                        progress.line(coming, values)
                    clock = line_clock = time.perf_counter()
                if first:
                    progress.tick(coming)
                if passes(coming - stride, c.checkpoint_every):
                    self._save(trainer, writer)
                    clock = time.perf_counter()
            self._save(trainer, writer)
        except RankLostError as error:
            raise UserError(f"{error}; the last good checkpoint is {self._last_checkpoint()}, go on with: "
                            f"{self._resume_command()}") from error  # fmt: skip
        except NonFiniteError as error:
            if first:
                writer.close()
            raise UserError(f"{error}; the last good checkpoint is {self._last_checkpoint()}") from error
        except OSError as error:  # a full disk, a folder that went away
            reason = error.strerror or error
            raise UserError(
                f"{self.run}: cannot be written ({reason}); the last good checkpoint is {self._last_checkpoint()}"
            ) from error
        finally:
            if first:
                progress.close()
        if first:
            writer.close()
        if self.stop_signal:
            name = signal.Signals(self.stop_signal).name
            self.say(f"\n{name}: saved at update {trainer.step}. Go on with:\n  {self._resume_command()}", flush=True)
            return 128 + self.stop_signal
        for number in (signal.SIGINT, signal.SIGTERM):  # all is saved: from here on a signal just ends the process
            signal.signal(number, signal.default_int_handler)
        if not first:
            return 0
        try:
            self._report(trainer)
        except OSError as error:
            saved = f"the trained model is safe in {self._last_checkpoint()}"
            raise UserError(f"{self.run}: the report cannot be written ({error.strerror or error}); {saved}") from error
        return 0

    def _catch_signals(self) -> None:
        def remember(number, frame):
            if self.stop_signal and self.ranks.world == 1:  # a second one means it (torchrun may send two by itself)
                raise KeyboardInterrupt
            self.stop_signal = number

        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, remember)

    def _agree(self, trainer) -> int:
        """The signal by which all ranks stop now, or 0; all take the first one's clock (the schedule depends on it).

        A signal that comes while they agree counts the next time: a rank that stopped alone would leave the others
        waiting for it.
        """
        if self.ranks.world == 1:
            return self.stop_signal or 0
        told = [self.stop_signal or 0, trainer.elapsed if self.ranks.first else 0.0]
        stop, trainer.elapsed = self.ranks.largest(told)
        if stop:
            self.stop_signal = int(stop)
        return int(stop)

    def _evaluate(self, trainer) -> dict[str, float]:
        count = min(trainer.config.eval_puzzles, len(trainer.test_puzzles))
        import torch

        puzzles = trainer.test_puzzles.select(torch.arange(count))
        run = trainer.evaluate(puzzles, trainer.config.max_steps, segment=trainer.segment)
        steps = run.halt_steps(trainer.config.max_steps)
        return {
            "eval/exact_accuracy": run.at(steps)[0].float().mean().item(),
            "eval/exact_accuracy_last": run.exact[-1].float().mean().item(),
            "eval/mean_steps": steps.float().mean().item(),
        }

    def _save(self, trainer, writer) -> None:
        from hrm_rl.checkpoint import save_checkpoint

        trainer.check_finite()
        tensors, plain = trainer.state()
        if self.ranks.first:
            plain["metrics_position"] = writer.position()
            save_checkpoint(self.run, trainer.step, trainer.model({"run": self.run.name}), tensors, plain)
        self.ranks.wait()  # where all are about to leave, none leaves before it is written

    def _last_checkpoint(self) -> str:
        from hrm_rl.checkpoint import list_checkpoints

        found = list_checkpoints(self.run)
        return str(found[-1]) if found else "none yet"

    def _resume_command(self) -> str:
        world = self.ranks.world
        command = Path(sys.executable).name if world == 1 else f"torchrun --nproc-per-node {world}"
        return f"{command} -m hrm_rl.train --resume {shlex.quote(str(self.run))}"

    def _report(self, trainer) -> None:
        from hrm_rl.checkpoint import write_atomically
        from hrm_rl.devices import describe
        from hrm_rl.evaluation import report, solve, table
        from hrm_rl.figures import training_figure
        from hrm_rl.metrics import read_metrics

        c = trainer.config
        segments = max(c.report_steps, c.max_steps)  # the learned halt needs max_steps of them
        puzzles = trainer.test_puzzles
        compiled = {"segment": trainer.segment}
        trajectories = trainer.evaluate(puzzles, segments, **compiled)
        with trainer.evaluation_weights():
            solved = solve(
                trainer.core, trainer.agent, puzzles, c.max_steps, trainer.num_slots, trainer.device, **compiled
            )
        result = report(trajectories, [c.max_steps], solved)
        minutes = (time.perf_counter() - self.began) / 60
        result |= {
            "test": puzzles.name, "test_sha256": puzzles.sha256, "train": trainer.puzzles.name, "run": self.run.name,
            "seed": c.seed, "updates": trainer.step, "training_seconds": round(trainer.elapsed, 1),
            "machine": describe(trainer.device), "date": time.strftime("%Y-%m-%d"),
        }  # fmt: skip
        write_atomically(self.run / "report.json", (json.dumps(result, indent=1) + "\n").encode())
        training_figure(self.run / "training.png", read_metrics(self.run), result, f"{self.run.name}: {puzzles.name}")
        print("\n" + table(result, puzzles.name, "learned" if trainer.agent.learns else type(trainer.agent).__name__))
        print(f"\n{trainer.step} updates, {minutes:.1f} minutes.")
        print(f"report: {self.run}/report.json, figure: {self.run}/training.png")


def _describe(trainer) -> str:
    from hrm_rl.devices import describe

    c = trainer.config
    size = sum(p.numel() for p in trainer.core.parameters())
    core = getattr(trainer.core, "config", None)
    ranks = f" ({trainer.ranks.world} ranks of {trainer.num_slots})" if trainer.ranks.world > 1 else ""
    return (
        f"{c.env} {c.size}x{c.size}, {len(trainer.puzzles)} training puzzles ({trainer.puzzles.name}), "
        f"{len(trainer.test_puzzles)} test puzzles ({trainer.test_puzzles.name})\n"
        f"core of {size / 1e6:.2f} M parameters in {core.dtype if core else 'its own dtype'}, objective {c.objective}, "
        f"bootstrap {c.bootstrap}, {c.num_envs} slots{ranks}, at most {c.max_steps} steps\n"
        f"{describe(trainer.device)}{', compiled (the first update takes a while)' if trainer.compiled else ''}"
    )


def _quiet_about_files(arguments) -> None:
    """TensorBoard's thread met a full disk: its writer tells us so at the next line, in one line."""
    if not issubclass(arguments.exc_type, OSError):
        threading.__excepthook__(arguments)


class _Progress:
    """A bar on a terminal, a quiet line every ten seconds elsewhere."""

    def __init__(self, config, trainer):
        from tqdm import tqdm

        self.total = config.total_steps
        self.budget = config.time_budget
        self.trainer = trainer
        self.bar = tqdm(total=self.total, initial=trainer.step, unit="upd", disable=None, dynamic_ncols=True)
        self.last = 0.0

    def tick(self, step: int) -> None:
        self.bar.update(step - self.bar.n)

    def line(self, step: int, values: dict[str, float]) -> None:
        parts = []
        for label, tag, style in (
            ("loss", "loss/total", ".3f"), ("loss", "agent/loss", ".3f"),
            ("exact", "halt/exact_accuracy", ".1%"), ("steps", "halt/mean_steps", ".2f"),
            ("|q|", "q/mean_abs_logit", ".1f"), ("seg/s", "time/samples_per_second", ".0f"),
            ("test", "eval/exact_accuracy", ".1%"),
        ):  # fmt: skip
            if tag in values:
                parts.append(f"{label} {values[tag]:{style}}")
        if not self.bar.disable:
            self.bar.set_postfix_str(" ".join(parts), refresh=False)
            return
        now = time.monotonic()
        if now - self.last >= 10 or step >= self.total or "eval/exact_accuracy" in values:
            self.last = now
            print(f"update {step}/{self.total}  {'  '.join(parts)}  {self._left(step)}", flush=True)

    def _left(self, step: int) -> str:
        done = max(step, 1)
        seconds = self.trainer.elapsed / done * (self.total - step)
        if self.budget:
            seconds = min(seconds, max(0.0, self.budget - self.trainer.elapsed))
        return f"{int(seconds // 60)}:{int(seconds % 60):02d} left"

    def close(self) -> None:
        self.bar.close()


if __name__ == "__main__":
    cli.run(main)
