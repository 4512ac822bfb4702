"""How fast this machine is: `python -m hrm_rl.bench train|evaluate|env|generate|cores`.

Every figure is the median of several repeats, and everything compared is measured in turn in one process, so that
a machine that slows down slows all of it. What is reported:

- samples a second; a sample is one slot's segment in one training update, whatever else the update runs;
- utilisation: achieved floating-point operations a second (hrm_rl/flops.py) over those of large matrix products
  measured between the repeats, in the same dtype and on the same threads;
- peak memory: of a fresh process on a CPU (resident high-water mark), of the allocator on a GPU.

A compiled figure is refused where part of it ran uncompiled, and a core with gradient=implicit wherever arithmetic is
reported: how often a solver calls the networks is not known beforehand.
"""

from __future__ import annotations

import itertools
import json
import os
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

from hrm_rl import bench_cores as cores
from hrm_rl import cli
from hrm_rl.bench_cores import CoresBench, bench_cores
from hrm_rl.errors import UserError, nearest
from hrm_rl.timing import (
    CompileGuard,
    Peak,
    high_water,
    interleave,
    packed_peaks,
    progress,
    seconds_of,
    spread,
    synchronise,
    times_in,
    write_trace,
)

SETTLE = 3  # updates before anything is timed: the first one compiles, the second one makes the optimiser's state
MEMORY_UPDATES = 3  # updates over which the high-water mark is taken
LIMIT_SECONDS = 900  # a fresh process that has not finished by then is given up

#: Goals of the project: (model, dtype) -> least utilisation of a training update, compiled.
UTILISATION_GOALS = {
    ("small", "float32"): 0.75, ("small", "bfloat16"): 0.55, ("paper", "float32"): 0.85, ("paper", "bfloat16"): 0.78,
}  # fmt: skip
#: Least speed-up over extra_forward.
BOOTSTRAP_GOALS = {"shared_prefix": 1.25, "next_observation": 1.5, "none": 1.5}
ENV_GOAL, START_GOAL, HALT_GOAL = 0.03, 10.0, 0.85


@dataclass(frozen=True)
class TrainBench:
    """What to time. Lists are written a,b,c; every combination is a variant.

    Args:
        model: small (hidden 128, 2+2 layers), paper (hidden 512, 4+4 layers), or default (the recipe of hrm_rl.train).
        train_config: A YAML file of hrm_rl.train to time in place of a model.
        bootstrap: Bootstrap modes: extra_forward, shared_prefix, shared_prefix_all, next_observation, none.
        compile: off, on, or both.
        cuda_graph: off, on, or both: updates replayed as one CUDA graph (a GPU).
        dtype: float32, bfloat16, float16; auto is what hrm_rl.train would choose.
        objective: joint, supervised or q; empty keeps the model's.
        num_envs: Slots; 0 keeps the model's (small 64; paper 16 on a CPU and 768 on a GPU).
        repeats: Timed repeats of every variant.
        seconds: About how long one repeat of one variant takes, in seconds.
        threads: CPU threads; 0 keeps PyTorch's choice.
        device: auto, cpu or cuda.
        fresh: Start each variant in a process of its own, too: peak memory and seconds to the first update.
        out: Write everything as JSON to this file.
        profile: Write a Chrome trace of three updates to this file (one variant only).
    """

    model: Literal["small", "paper", "default"] = "small"
    train_config: str | None = None
    bootstrap: str = "extra_forward,shared_prefix"
    compile: str = "off,on"
    cuda_graph: str = "off"
    dtype: str = "auto"
    objective: Literal["", "joint", "supervised", "q"] = ""
    num_envs: int = 0
    repeats: int = 5
    seconds: float = 2.0
    threads: int = 0
    device: str = "auto"
    fresh: bool = True
    out: str | None = None
    profile: str | None = None


@dataclass(frozen=True)
class EvaluateBench:
    """Puzzles a second at the learned halt, against running every puzzle to the budget.

    Args:
        core: Run folder, checkpoint or model file; nothing: the core that ships.
        core_kind: Import path of the core's class, where it is your own (docs/CORES.md).
        task: What the puzzles are (sudoku, maze, ... or an import path); auto: what the core was trained on.
        data: Test puzzles: .csv, .csv.gz or hf://owner/name; nothing: the shipped test set.
        limit: At most this many of them.
        batch_size: Puzzles in work at once.
        max_steps: The budget; 0 is the one trained with.
        compile: off, on, or both.
        dtype: float32, bfloat16, float16; auto is what hrm_rl.evaluate would choose.
        repeats: Timed repeats.
        threads: CPU threads; 0 keeps PyTorch's choice.
        device: auto, cpu or cuda.
        out: Write everything as JSON to this file.
        profile: Write a Chrome trace of one evaluation at the learned halt to this file (one variant only).
    """

    core: str | None = None
    core_kind: str = ""
    task: str = "auto"
    data: str | None = None
    limit: int = 512
    batch_size: int = 128
    max_steps: int = 0
    compile: str = "off"
    dtype: str = "auto"
    repeats: int = 5
    threads: int = 0
    device: str = "auto"
    out: str | None = None
    profile: str | None = None


@dataclass(frozen=True)
class EnvBench:
    """Steps of the vector environment a second, with random actions.

    Args:
        model: The core behind it: shipped, small, paper or default.
        tensors: Forms: numpy, torch.
        num_envs: Slots.
        dtype: float32, bfloat16, float16; auto is what hrm_rl.train would choose.
        repeats: Timed repeats of every form.
        seconds: About how long one repeat takes, in seconds.
        threads: CPU threads; 0 keeps PyTorch's choice.
        device: auto, cpu or cuda.
        out: Write everything as JSON to this file.
        profile: Write a Chrome trace of three steps to this file (one form only).
    """

    model: Literal["shipped", "small", "paper", "default"] = "shipped"
    tensors: str = "numpy,torch"
    num_envs: int = 64
    dtype: str = "auto"
    repeats: int = 5
    seconds: float = 1.0
    threads: int = 0
    device: str = "auto"
    out: str | None = None
    profile: str | None = None


@dataclass(frozen=True)
class GenerateBench:
    """Puzzles with exactly one solution made a second, on one core.

    Args:
        side: Side of the grid: 4, 6 or 9.
        count: Puzzles a repeat makes.
        repeats: Timed repeats, each with a seed of its own.
        out: Write everything as JSON to this file.
    """

    side: Literal[4, 6, 9] = 9
    count: int = 500
    repeats: int = 5
    out: str | None = None


# --- the command --------------------------------------------------------------------------------------------


def main(argv: Sequence[str]) -> int:
    commands = {"train": (TrainBench, bench_train), "evaluate": (EvaluateBench, bench_evaluate),
                "env": (EnvBench, bench_env), "generate": (GenerateBench, bench_generate),
                "cores": (CoresBench, bench_cores)}  # fmt: skip
    if argv and argv[0] == "fresh":  # a variant in a process of its own, asked for by `bench train`
        return _fresh_process()
    name = argv[0] if argv else ""
    if name in ("-h", "--help"):
        print(f"usage: python -m hrm_rl.bench {{{','.join(commands)}}} [--help] [flags]\n\n{__doc__}")
        return 0
    if name not in commands:
        raise UserError(f"say what to time: {', '.join(commands)}, not {name!r}{nearest(name, commands)}")
    kind, function = commands[name]
    parser = cli.make_parser(f"python -m hrm_rl.bench {name}", kind.__doc__.split("\n")[0])
    parser.add_class_arguments(kind, as_group=False)
    parsed = cli.parse(parser, argv[1:])
    options = kind(**{field.name: parsed[field.name] for field in fields(kind)})
    for flag in ("out", "profile"):
        _check_writable(getattr(options, flag, None), flag)
    for flag, least in (("repeats", 1), ("num_envs", 0), ("threads", 0), ("seconds", 0), ("limit", 1), ("count", 1),
                        ("batch_size", 1), ("max_steps", 0)):  # fmt: skip
        if getattr(options, flag, least) < least:
            raise UserError(f"--{flag} must be at least {least}, not {getattr(options, flag)}")
    _set_threads(getattr(options, "threads", 0))
    result = _header(["python", "-m", "hrm_rl.bench", *argv], getattr(options, "device", "cpu")) | function(options)
    print("\n".join(report(result)))
    if options.out:
        from hrm_rl.checkpoint import write_atomically

        try:
            write_atomically(Path(options.out), (json.dumps(result, indent=1) + "\n").encode())
        except OSError as error:
            raise UserError(f"{options.out}: cannot be written ({error.strerror})") from error
    return 0


def _header(command: Sequence[str], device: str) -> dict[str, Any]:
    import torch

    from hrm_rl.devices import describe, pick_device

    return {
        "command": shlex.join(command), "machine": describe(pick_device(device)), "threads": torch.get_num_threads(),
        "torch": torch.__version__, "date": time.strftime("%Y-%m-%d %H:%M"),
    }  # fmt: skip


def _check_writable(path: str | None, flag: str) -> None:
    """UserError now if the file could not be written after the work."""
    if path is None:
        return
    folder = Path(path).parent
    if Path(path).is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        raise UserError(f"--{flag} {path}: is a folder, or its folder does not exist or cannot be written")


def choices(flag: str, given: str, allowed: Sequence[str]) -> list[str]:
    """The words of a comma-separated list, each once. UserError names one that is not allowed."""
    words = list(dict.fromkeys(word.strip() for word in given.split(",")))
    for word in words:
        if word not in allowed:
            raise UserError(f"--{flag} must be from {', '.join(allowed)}, not {word!r}{nearest(word, allowed)}")
    return words


def _set_threads(threads: int) -> None:
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # read when torch is loaded: the profiler keeps quiet
    import torch

    if threads and threads != torch.get_num_threads():  # it slows float32 attention down even where nothing changes
        torch.set_num_threads(threads)


# --- train --------------------------------------------------------------------------------------------------


def model_values(model: str, device) -> dict[str, Any]:
    """A model's training configuration as plain values for `TrainConfig.from_values`.

    small and paper are trained as published: AdamW, stablemax, no running average, no curriculum.
    """
    if model == "default":
        return {}
    published = {
        "loss": "stablemax", "curriculum": (0.0, 0.0),
        "optim": {"optimizer": "adamw", "lr": 1e-4, "weight_decay": 1.0, "warmup_steps": 0, "schedule": "constant",
                  "ema": 0.0},
    }  # fmt: skip
    shape = {"expansion": 4.0, "inner_multiple": 256, "H_cycles": 2, "L_cycles": 2, "token_mixing": "attention",
             "positions": "rope"}  # fmt: skip
    if model == "small":
        sizes = {"hidden_size": 128, "num_heads": 4, "H_layers": 2, "L_layers": 2, "puzzle_emb_ndim": 128}
        return published | {"num_envs": 64, "core": shape | sizes}
    sizes = {"hidden_size": 512, "num_heads": 8, "H_layers": 4, "L_layers": 4, "puzzle_emb_ndim": 512}
    return published | {"num_envs": 768 if device.type == "cuda" else 16, "core": shape | sizes}


def train_configs(options: TrainBench) -> dict[str, Any]:
    """Every variant's TrainConfig by a name that says how it differs."""
    from agents.q_targets import BOOTSTRAPS
    from hrm_rl.config import TrainConfig
    from hrm_rl.core.config import DTYPES
    from hrm_rl.devices import can_compile, pick_device
    from hrm_rl.flops import check_countable

    device = pick_device(options.device)
    modes = choices("bootstrap", options.bootstrap, BOOTSTRAPS)
    compiled = choices("compile", options.compile, ("off", "on"))
    graphs = choices("cuda_graph", options.cuda_graph, ("off", "on"))
    dtypes = choices("dtype", options.dtype, ("auto", *DTYPES))
    if "on" in graphs and device.type != "cuda":
        raise UserError(f"--cuda_graph on: it needs a GPU, not {device.type}")
    if "on" in compiled and not can_compile(device):
        raise UserError("--compile on: no C++ compiler (CPU) or Triton (GPU) was found; use --compile off")
    values = train_values(options.train_config) if options.train_config else model_values(options.model, device)
    values |= {"device": str(device), "total_steps": 10**9, "time_budget": 0.0}
    if options.objective:
        values["objective"] = options.objective
    if options.num_envs:
        values["num_envs"] = options.num_envs
    configs = {}
    for dtype, how, graph, mode in itertools.product(dtypes, compiled, graphs, modes):
        core = dict(values.get("core", {})) | {"dtype": dtype}
        own = {"bootstrap": mode, "compile": how, "cuda_graph": graph, "core": core}
        config = TrainConfig.from_values(values | own)
        check_countable(config.core)
        label = f"{'compiled' if how == 'on' else 'eager'}{' graph' if graph == 'on' else ''}"
        configs[f"{mode}, {label}, {config.core.dtype}"] = config
    return configs


def train_values(path: str) -> dict[str, Any]:
    """The values in a configuration file of hrm_rl.train; what belongs to the agent is left out."""
    from hrm_rl import train

    values = cli.parse(train.build_parser(), ["--config", path]).as_dict()
    for name in ("config", "resume", "agent", "agent_args"):
        values.pop(name, None)
    return values


def make_trainer(config):
    """The Trainer of `config`, with the agent hrm_rl.train would pick."""
    from agents import find_agent
    from hrm_rl.trainer import Trainer

    return Trainer(config, find_agent("fixed" if config.objective == "supervised" else "q"))


def bench_train(options: TrainBench, make: Callable[[Any], Any] = make_trainer) -> dict[str, Any]:
    """Time every variant; see the module. UserError where a compiled variant ran uncompiled."""
    import torch

    from hrm_rl.flops import published_flops, update_flops

    configs = train_configs(options)
    if options.profile and len(configs) > 1:
        raise UserError(f"--profile needs a single variant, not {len(configs)}: {'; '.join(configs)}")
    # The functions of all variants share their code, and each has a graph of its own there.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 8 * len(configs))
    guard = CompileGuard()
    trainers = {name: make(config) for name, config in configs.items()}
    device = next(iter(trainers.values())).device
    for trainer in trainers.values():
        for _ in range(SETTLE):
            trainer.update()
    check_compiled(guard, trainers)
    replayed = [trainer for trainer in trainers.values() if getattr(trainer, "replayed", None) is not None]
    for trainer in replayed:
        while not trainer.replayed.replays:
            trainer.update()
    counts = {name: times_in(trainer.update, device, options.seconds) for name, trainer in trainers.items()}
    dtypes = sorted({trainer.config.core.dtype for trainer in trainers.values()})
    peaks, packed = [Peak(dtype, device) for dtype in dtypes], packed_peaks(dtypes, device)
    graphs = guard.graphs()
    timed = [lambda t=trainer, n=counts[name]: n * t.config.num_envs / seconds_of(t.update, device, n)
             for name, trainer in trainers.items()]  # fmt: skip
    machine = [peak.measure for peak in (*peaks, *packed.values())]
    results = interleave(options.repeats, [*timed, *machine])
    guard.check_same(graphs)
    trace = write_trace(options.profile, next(iter(trainers.values())).update, device) if options.profile else None
    for trainer in replayed:  # what follows looks into updates, which a replay does not let it
        trainer.replayed.settle()
        trainer.replayed = None
    check_compiled(guard, trainers)
    speeds = [spread(values) for values in results[len(timed) :]]
    peak_of = dict(zip(dtypes, speeds[: len(dtypes)], strict=True))
    packed_of = dict(zip(packed, speeds[len(dtypes) :], strict=True))
    rows = []
    for (name, trainer), rates in zip(trainers.items(), results, strict=False):
        c = trainer.config
        flops = update_flops(c.core, c.bootstrap, c.objective, max_steps=c.max_steps, q_to_core=c.q_to_core,
                             has_q_head=hasattr(trainer.agent, "q_head"))  # fmt: skip
        peak = peak_of[c.core.dtype]["median"]
        rate = spread(rates)
        rows.append({
            "name": name, "bootstrap": c.bootstrap, "compiled": trainer.compiled, "cuda_graph": c.cuda_graph == "on",
            "dtype": c.core.dtype, "num_envs": c.num_envs, "samples_per_second": rate, "repeats": rates,
            "flops_per_sample": flops.total, "flops": asdict(flops), "peak_flops_per_second": peak,
            "utilisation": rate["median"] * flops.total / peak,
            "equivalent_utilisation": rate["median"] * published_flops(c.core) / peak,
            "environment_share": _environment_share(trainer),
        })  # fmt: skip
    if options.fresh:
        for row in rows:
            row |= fresh(configs[row["name"]])
    return {
        "what": "train", "model": options.train_config or options.model, "variants": rows, "peaks": peak_of,
        "packed_peaks": packed_of, "core": asdict(next(iter(trainers.values())).config.core),
        "ratios": _bootstrap_ratios(rows), "trace": trace,
    }  # fmt: skip


def check_compiled(guard: CompileGuard, trainers: dict[str, Any]) -> None:
    for name, trainer in trainers.items():
        if trainer.config.compile != "on":
            continue
        if not trainer.compiled:
            raise UserError(f"{name}: not reported, the trainer did not compile its core")
        guard.check(name, trainer.update, trainer.engine)


def _bootstrap_ratios(rows: list[dict]) -> list[dict]:
    """Speed of each bootstrap mode over extra_forward with all else equal: median of the repeats' ratios."""
    ratios = []
    for base in rows:
        for row in rows:
            same = all(row[key] == base[key] for key in ("compiled", "cuda_graph", "dtype", "num_envs"))
            if base["bootstrap"] == "extra_forward" and same and row is not base:
                pairs = [a / b for a, b in zip(row["repeats"], base["repeats"], strict=True)]
                ratios.append({"name": row["name"], "bootstrap": row["bootstrap"], "ratio": spread(pairs)})
    return ratios


def _environment_share(trainer, updates: int = 5) -> float:
    """Share of the time in the environment (step and lookahead) that is not the core: median over updates."""
    inside = {"core": 0.0, "env": 0.0}

    def timing(part: str, function):
        def call(*arguments, **keywords):
            result = None

            def run():
                nonlocal result
                result = function(*arguments, **keywords)

            inside[part] += seconds_of(run, trainer.device)
            return result

        return call

    places = ((trainer.engine, "run_prefix", "core"), (trainer.engine, "run_tail", "core"),
              (trainer.envs, "step", "env"), (trainer.envs, "lookahead", "env"))  # fmt: skip
    own = [getattr(place, name) for place, name, _ in places]
    segment = trainer.segment
    shares = []
    try:
        # extra_forward calls the engine's functions from outside of the environment: that is no part of its step.
        prefix, tail = own[:2]
        trainer.segment = lambda tokens, state: tail(tokens, prefix(tokens, state))
        for (place, name, part), function in zip(places, own, strict=True):
            setattr(place, name, timing(part, function))
        for _ in range(updates):
            inside.update(core=0.0, env=0.0)
            trainer.update()
            shares.append((inside["env"] - inside["core"]) / inside["env"])
    finally:
        for (place, name, _), function in zip(places, own, strict=True):
            setattr(place, name, function)
        trainer.segment = segment
    return statistics.median(shares)


# --- a variant in a process of its own ----------------------------------------------------------------------


def fresh(config) -> dict[str, Any]:
    """Peak memory in bytes and seconds from the start of a new process to the end of its first update."""
    import torch

    order = {"config": config.to_values(), "threads": torch.get_num_threads(), "began": time.time()}
    try:
        done = subprocess.run(
            [sys.executable, "-m", "hrm_rl.bench", "fresh"], input=json.dumps(order), capture_output=True, text=True,
            timeout=LIMIT_SECONDS, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise UserError(f"a fresh process did not finish within {LIMIT_SECONDS} s") from error
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise UserError(f"a fresh process failed: {last}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def _fresh_process() -> int:
    """The other end of `fresh`: reads its order from stdin."""
    order = json.load(sys.stdin)

    _set_threads(order["threads"])
    from hrm_rl.config import TrainConfig

    trainer = make_trainer(TrainConfig.from_values(order["config"]))
    trainer.update()
    synchronise(trainer.device)
    started = time.time() - order["began"]
    for _ in range(SETTLE + 2 * (trainer.replayed is not None)):  # the capture as well
        trainer.update()
    with high_water(trainer.device) as peak:
        seconds_of(trainer.update, trainer.device, MEMORY_UPDATES)
    print(json.dumps({"peak_memory": peak["bytes"], "seconds_to_first_update": started}))
    return 0


# --- evaluate, env, generate --------------------------------------------------------------------------------


def bench_evaluate(options: EvaluateBench) -> dict[str, Any]:
    """The learned halt against the whole budget, by `evaluation.solve` both, in turn."""
    import torch

    from agents import find_agent, make_agent
    from hrm_rl.core import build_core
    from hrm_rl.core.config import DTYPES
    from hrm_rl.devices import can_compile, pick_device, pick_dtype
    from hrm_rl.evaluate import load_asked, task_of
    from hrm_rl.evaluation import solve
    from hrm_rl.flops import segment_flops
    from hrm_rl.trainer import user_puzzles

    device = pick_device(options.device)
    (dtype,) = choices("dtype", options.dtype, ("auto", *DTYPES))[:1]
    compiled = choices("compile", options.compile, ("off", "on"))
    if "on" in compiled and not can_compile(device):
        raise UserError("--compile on: no C++ compiler (CPU) or Triton (GPU) was found; use --compile off")
    if options.profile and len(compiled) > 1:
        raise UserError("--profile needs a single variant: --compile off or --compile on")
    loaded = load_asked(options.core, options.core_kind, options.task)
    if loaded.q_head is None:
        raise UserError(f"{loaded.source}: holds no Q-head, so there is no learned halt to time")
    core = build_core(replace(loaded.core.config, dtype=pick_dtype(dtype, device)))
    core.load_state_dict(loaded.core.state_dict())
    core.to(device)
    flops = segment_flops(core.config).forward
    max_steps = options.max_steps or int(loaded.meta.get("max_steps", 16))
    learned = make_agent(find_agent("q"), core, max_steps, loaded.meta.get("bootstrap", "extra_forward"), {})
    learned.q_head.load_state_dict(loaded.q_head.state_dict())
    fixed = make_agent(find_agent("fixed"), core, max_steps, None, {})
    agents = {"learned halt": learned.to(device), f"fixed at {max_steps}": fixed}
    task, side = task_of(loaded, options.task)
    puzzles = user_puzzles(options.data, side, "test", options.limit, task)

    class Engine:  # what CompileGuard looks at
        run_prefix, run_tail = staticmethod(core.prefix), staticmethod(core.tail)

    Engine.core = core
    guard, engines, runs = CompileGuard(), {}, {}
    for how in compiled:
        engine = engines[how] = Engine()
        if how == "on":
            engine.run_prefix, engine.run_tail = (torch.compile(f, dynamic=False) for f in (core.prefix, core.tail))

        def segment(tokens, state, engine=engine):
            return engine.run_tail(tokens, engine.run_prefix(tokens, state))

        for name, agent in agents.items():
            label = f"{name}, {'compiled' if how == 'on' else 'eager'}"
            runs[label] = lambda agent=agent, segment=segment: solve(
                core, agent, puzzles, max_steps, options.batch_size, device, segment=segment
            )
            runs[label]()
            if how == "on":
                guard.check(label, runs[label], engine)
    peak = Peak(core.config.dtype, device)
    graphs = guard.graphs()
    with high_water(device) as memory:
        results = interleave(options.repeats, [*runs.values(), peak.measure])
    guard.check_same(graphs)
    top, rows = statistics.median(results[-1]), []
    for label, solved in zip(runs, results, strict=False):
        if label.endswith("compiled"):
            guard.check(label, runs[label], engines["on"])
        rates = [len(puzzles) / s.seconds for s in solved]
        rows.append({
            "name": label, "puzzles_per_second": spread(rates), "repeats": rates,
            "mean_steps": solved[0].steps.double().mean().item(),
            "exact_accuracy": solved[0].exact.double().mean().item(),
            "busy": int(solved[0].steps.sum()) / solved[0].segments_run,
            "utilisation": statistics.median(s.segments_run * flops / s.seconds for s in solved) / top,
        })  # fmt: skip
    ratios = []
    for first, second in zip(rows[::2], rows[1::2], strict=True):
        pairs = [a / b for a, b in zip(first["repeats"], second["repeats"], strict=True)]
        goal = HALT_GOAL * max_steps / first["mean_steps"]
        ratios.append({"name": first["name"], "ratio": spread(pairs), "goal": goal})
    first_run = next(iter(runs.values()))
    return {
        "what": "evaluate", "model": loaded.source, "puzzles": len(puzzles), "batch_size": options.batch_size,
        "dtype": core.config.dtype, "max_steps": max_steps, "flops_per_segment": flops, "peak_flops_per_second": top,
        "variants": rows, "ratios": ratios, "peak_memory": memory["bytes"],
        "trace": write_trace(options.profile, first_run, device, 1) if options.profile else None,
    }  # fmt: skip


def bench_env(options: EnvBench) -> dict[str, Any]:
    """The vector environment with random actions, and the share of its step that is not the core."""
    import gymnasium as gym
    import torch

    import hrm_rl  # noqa: F401 - registers the environments
    from envs.vector import TENSORS
    from hrm_rl.config import TrainConfig
    from hrm_rl.core import build_core
    from hrm_rl.core.config import DTYPES
    from hrm_rl.core.io import load_core
    from hrm_rl.devices import pick_device, pick_dtype

    device = pick_device(options.device)
    forms = choices("tensors", options.tensors, TENSORS)
    (dtype,) = choices("dtype", options.dtype, ("auto", *DTYPES))[:1]
    if options.profile and len(forms) > 1:
        raise UserError("--profile needs a single form: --tensors numpy or --tensors torch")
    if options.model == "shipped":
        shipped = load_core().core
        core = build_core(replace(shipped.config, dtype=pick_dtype(dtype, device)))
        core.load_state_dict(shipped.state_dict())
    else:
        values = model_values(options.model, device)
        values["core"] = dict(values.get("core", {})) | {"dtype": dtype}
        core = build_core(TrainConfig.from_values(values).core, torch.Generator().manual_seed(0))
    core.to(device)
    steppers, inside, slots = {}, {}, options.num_envs or 64
    for form in forms:
        made = gym.make_vec("SudokuHalt-v0", num_envs=slots, core=core, tensors=form, device=str(device))
        envs = made.unwrapped
        envs.reset(seed=0)
        actions = torch.randint(2, (slots,), generator=torch.Generator().manual_seed(0)).to(device)
        actions = actions if form == "torch" else actions.cpu().numpy()
        steppers[form] = lambda envs=envs, actions=actions: envs.step(actions)
        inside[form] = envs
    for step in steppers.values():
        for _ in range(SETTLE):
            step()
    counts = {form: times_in(step, device, options.seconds) for form, step in steppers.items()}
    with high_water(device) as memory:
        results = interleave(options.repeats, [
            lambda f=form: counts[f] * inside[f].num_envs / seconds_of(steppers[f], device, counts[f]) for form in forms
        ])  # fmt: skip
    rows = [
        {"name": form, "steps_per_second": spread(rates), "repeats": rates,
         "environment_share": _step_share(inside[form], steppers[form], device)}
        for form, rates in zip(forms, results, strict=True)
    ]  # fmt: skip
    first = steppers[forms[0]]
    return {
        "what": "env", "model": options.model, "num_envs": slots, "dtype": core.config.dtype,
        "variants": rows, "peak_memory": memory["bytes"],
        "trace": write_trace(options.profile, first, device) if options.profile else None,
    }  # fmt: skip


def _step_share(envs, step: Callable[[], object], device, steps: int = 10) -> float:
    """Share of a step's time that is not the core: median over steps."""
    inside = 0.0

    def timing(function):
        def call(*arguments):
            nonlocal inside
            synchronise(device)
            began = time.perf_counter()
            result = function(*arguments)
            synchronise(device)
            inside += time.perf_counter() - began
            return result

        return call

    own = envs.engine.run_prefix, envs.engine.run_tail
    envs.engine.run_prefix, envs.engine.run_tail = map(timing, own)
    shares = []
    try:
        for _ in range(steps):
            inside = 0.0
            whole = seconds_of(step, device)
            shares.append((whole - inside) / whole)
    finally:
        envs.engine.run_prefix, envs.engine.run_tail = own
    return statistics.median(shares)


def bench_generate(options: GenerateBench) -> dict[str, Any]:
    """Puzzles made a second. The generator runs on one core; a repeat is so many puzzles of a seed of its own."""
    import torch

    from hrm_rl.tasks.generate import PuzzleSpec, generate_puzzles

    generate_puzzles(PuzzleSpec(side=4, count=1, grid_classes=1))  # compiles
    device, rates, cores = torch.device("cpu"), [], []
    with high_water(device) as memory, progress(options.repeats) as bar:
        for seed in range(options.repeats):
            spec, used = PuzzleSpec(side=options.side, count=options.count, seed=seed), time.process_time()
            seconds = seconds_of(lambda spec=spec: generate_puzzles(spec), device)
            rates.append(options.count / seconds)
            cores.append((time.process_time() - used) / seconds)
            bar.update()
    return {
        "what": "generate", "side": options.side, "count": options.count, "peak_memory": memory["bytes"],
        "variants": [{"name": f"minimal {options.side}x{options.side}", "puzzles_per_second": spread(rates),
                      "repeats": rates, "cores_used": statistics.median(cores)}],
    }  # fmt: skip


# --- what is printed ----------------------------------------------------------------------------------------


def report(result: dict[str, Any]) -> list[str]:
    """The result as lines of text."""
    lines = [f"$ {result['command']}", f"{result['machine']}, {result['date']}"]
    lines += {"train": _train_lines, "evaluate": _evaluate_lines, "env": _env_lines, "generate": _generate_lines,
              "cores": cores.lines}[result["what"]](result)  # fmt: skip
    if result.get("trace"):
        lines += ["", f"{'longest operations':<60}{'calls':>8}{'ms':>10}"]
        lines += [f"{name[:58]:<60}{calls:>8.1f}{ms:>10.3f}" for name, calls, ms in result["trace"]]
    return lines


def rate_in_words(value: dict[str, float]) -> str:
    digits = 0 if value["median"] >= 100 else 1
    return f"{value['median']:,.{digits}f} ({value['low']:,.{digits}f}-{value['high']:,.{digits}f})"


def _megabytes(value: int | None) -> str:
    return "-" if value is None else f"{value / 2**20:,.0f}"


def _goal(reached: bool, goal: str) -> str:
    return f"goal {goal}: {'met' if reached else 'missed'}"


def _train_lines(result: dict[str, Any]) -> list[str]:
    rows = result["variants"]
    width = max(len(row["name"]) for row in rows) + 2
    lines = [f"model {result['model']}, {rows[0]['num_envs']} slots; matrix products reach "
             + ", ".join(f"{p['median'] / 1e9:,.0f} GFLOP/s in {d}" for d, p in result["peaks"].items())]  # fmt: skip
    if result["packed_peaks"]:
        lines.append("oneDNN with packed weights, for comparison: " + ", ".join(
            f"{p['median'] / 1e9:,.0f} in {d}" for d, p in result["packed_peaks"].items()))  # fmt: skip
    lines.append(f"{'variant':<{width}}{'samples/s (range)':>24}{'GFLOP':>8}{'used':>7}{'equiv.':>8}{'env':>7}"
                 f"{'MiB':>8}{'start s':>9}")  # fmt: skip
    for row in rows:
        start = row.get("seconds_to_first_update")
        lines.append(
            f"{row['name']:<{width}}{rate_in_words(row['samples_per_second']):>24}{row['flops_per_sample'] / 1e9:>8.3f}"
            f"{row['utilisation']:>7.1%}{row['equivalent_utilisation']:>8.1%}{row['environment_share']:>7.1%}"
            f"{_megabytes(row.get('peak_memory')):>8}{'-' if start is None else f'{start:.1f}':>9}"
        )
    for ratio in result["ratios"]:
        r, goal = ratio["ratio"], BOOTSTRAP_GOALS.get(ratio["bootstrap"])
        against = "" if goal is None else f", {_goal(r['median'] >= goal, f'{goal:g}')}"
        rate = f"{r['median']:.3f} ({r['low']:.3f}-{r['high']:.3f})"
        lines.append(f"{ratio['name']}: {rate} times extra_forward{against}")
    for row in rows:
        goal = UTILISATION_GOALS.get((result["model"], row["dtype"]))
        if goal and row["compiled"]:
            used = row["utilisation"]
            lines.append(f"{row['name']}: {used:.1%} used, {_goal(used >= goal, f'{goal:.0%}')}")
    worst = max(row["environment_share"] for row in rows)
    lines.append(f"environment beside the core: {worst:.1%} of its time at most, {_goal(worst < ENV_GOAL, '3 %')}")
    starts = [row["seconds_to_first_update"] for row in rows if not row["compiled"] and "peak_memory" in row]
    if starts:
        lines.append(f"first update, uncompiled: after {max(starts):.1f} s, {_goal(max(starts) < START_GOAL, '10 s')}")
    lines.append(
        "used: share of the speed of torch.mm; equiv.: the same if a sample always cost the published step's "
        "arithmetic;\nenv: share of the environment's time that is not the core; MiB: peak memory, and start s: "
        "seconds to the first update,\nboth of a fresh process (a compiled one finds the compiler's cache warm)"
    )
    return lines


def _evaluate_lines(result: dict[str, Any]) -> list[str]:
    lines = [f"{result['model']}, {result['puzzles']} puzzles, {result['batch_size']} at once, {result['dtype']}, "
             f"peak memory {_megabytes(result['peak_memory'])} MiB",
             f"{'':<28}{'puzzles/s (range)':>24}{'steps':>8}{'exact':>8}{'busy':>8}{'used':>8}"]  # fmt: skip
    for row in result["variants"]:
        lines.append(f"{row['name']:<28}{rate_in_words(row['puzzles_per_second']):>24}{row['mean_steps']:>8.2f}"
                     f"{row['exact_accuracy']:>8.1%}{row['busy']:>8.1%}{row['utilisation']:>8.1%}")  # fmt: skip
    for ratio in result["ratios"]:
        lines.append(f"{ratio['name']}: {ratio['ratio']['median']:.2f} times the rate of {result['max_steps']} steps, "
                     + _goal(ratio["ratio"]["median"] >= ratio["goal"], f"{ratio['goal']:.2f}"))  # fmt: skip
    lines.append("busy: share of the segments run that a puzzle needed; used: share of the speed of torch.mm")
    return lines


def _env_lines(result: dict[str, Any]) -> list[str]:
    lines = [f"core {result['model']} in {result['dtype']}, {result['num_envs']} slots, peak memory "
             f"{_megabytes(result['peak_memory'])} MiB",
             f"{'form':<10}{'slot steps/s (range)':>28}{'not the core':>14}"]  # fmt: skip
    for row in result["variants"]:
        lines.append(f"{row['name']:<10}{rate_in_words(row['steps_per_second']):>28}{row['environment_share']:>14.1%}")
    return lines


def _generate_lines(result: dict[str, Any]) -> list[str]:
    (row,) = result["variants"]
    return [f"{row['name']}: {rate_in_words(row['puzzles_per_second'])} puzzles a second on {row['cores_used']:.2f} "
            f"cores, peak memory {_megabytes(result['peak_memory'])} MiB"]  # fmt: skip


if __name__ == "__main__":
    cli.run(main)
