"""Every core side by side: `python -m hrm_rl.bench cores`.

Sizes are those of the default run (or of --train-config), each core with its own `core.kind` and nothing else changed,
so that hrm, gated_hrm, trm and recurrent_transformer run as many blocks a segment. Speeds are medians of repeats in
turn.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal

from hrm_rl.errors import UserError
from hrm_rl.timing import interleave, seconds_of, spread, times_in

SETTLE = 3  # updates before anything is timed


@dataclass(frozen=True)
class CoresBench:
    """Parameters, arithmetic, memory and speed of every core at the same sizes.

    Args:
        kinds: Which, as a,b,c: short names and import paths; all is every core that ships.
        train_config: A YAML file of hrm_rl.train with the sizes; nothing: those of the default run.
        compile: off or on.
        dtype: float32, bfloat16, float16; auto is what hrm_rl.train would choose.
        num_envs: Slots; 0 keeps the configuration's.
        repeats: Timed repeats of every core.
        seconds: About how long one repeat of one core takes, in seconds, for segments and for updates each.
        threads: CPU threads; 0 keeps PyTorch's choice.
        device: auto, cpu or cuda.
        out: Write everything as JSON to this file.
    """

    kinds: str = "all"
    train_config: str | None = None
    compile: Literal["off", "on"] = "off"
    dtype: str = "auto"
    num_envs: int = 0
    repeats: int = 5
    seconds: float = 1.0
    threads: int = 0
    device: str = "auto"
    out: str | None = None


def core_configs(options: CoresBench) -> dict[str, Any]:
    """Every core's TrainConfig by its kind. UserError for a kind that is none, an unknown dtype, gradient=implicit."""
    from hrm_rl import bench
    from hrm_rl.config import TrainConfig
    from hrm_rl.core import CORES, find_core
    from hrm_rl.core.config import DTYPES
    from hrm_rl.devices import can_compile, pick_device
    from hrm_rl.flops import check_countable

    device = pick_device(options.device)
    if options.compile == "on" and not can_compile(device):
        raise UserError("--compile on: no C++ compiler (CPU) or Triton (GPU) was found; use --compile off")
    (dtype,) = bench.choices("dtype", options.dtype, ("auto", *DTYPES))[:1]
    words = [word.strip() for word in options.kinds.split(",")]
    kinds = list(dict.fromkeys(kind for word in words for kind in (CORES if word == "all" else [find_core(word).kind])))
    values = bench.train_values(options.train_config) if options.train_config else {}
    values |= {"device": str(device), "total_steps": 10**9, "time_budget": 0.0, "compile": options.compile}
    if options.num_envs:
        values["num_envs"] = options.num_envs
    core = dict(values.get("core", {})) | {"dtype": dtype}
    configs = {kind: TrainConfig.from_values(values | {"core": core | {"kind": kind}}) for kind in kinds}
    for config in configs.values():
        check_countable(config.core)
    return configs


def bench_cores(options: CoresBench) -> dict[str, Any]:
    """One row a core; segments are run as in evaluation (no gradient, the whole batch), updates as in training."""
    import torch

    from hrm_rl import bench
    from hrm_rl.flops import call_flops, segment_flops, update_flops
    from hrm_rl.timing import CompileGuard

    configs = core_configs(options)
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 8 * len(configs))
    guard = CompileGuard()
    trainers = {kind: bench.make_trainer(config) for kind, config in configs.items()}
    device = next(iter(trainers.values())).device
    segments = {kind: _segment(trainer) for kind, trainer in trainers.items()}
    for kind, trainer in trainers.items():
        for _ in range(SETTLE):
            trainer.update()
            segments[kind]()
    bench.check_compiled(guard, trainers)
    graphs = guard.graphs()

    def rates(runs: dict[str, Callable[[], object]]) -> list[Callable[[], float]]:
        counts = {kind: times_in(run, device, options.seconds) for kind, run in runs.items()}
        slots = {kind: trainer.num_slots for kind, trainer in trainers.items()}
        return [
            lambda k=kind, run=run: counts[k] * slots[k] / seconds_of(run, device, counts[k])
            for kind, run in runs.items()
        ]

    updates = {kind: trainer.update for kind, trainer in trainers.items()}
    results = interleave(options.repeats, [*rates(segments), *rates(updates)])
    guard.check_same(graphs)
    bench.check_compiled(guard, trainers)
    rows = []
    for number, (kind, trainer) in enumerate(trainers.items()):
        c = trainer.config
        calls, _, without = call_flops(c.core)
        forward, trained = results[number], results[number + len(trainers)]
        update = update_flops(c.core, c.bootstrap, c.objective, max_steps=c.max_steps, q_to_core=c.q_to_core,
                              has_q_head=hasattr(trainer.agent, "q_head"))  # fmt: skip
        rows.append({
            "name": kind, "parameters": sum(p.numel() for p in trainer.core.parameters()),
            "calls": len(calls), "calls_with_gradient": len(calls) - without,
            "flops_per_segment": segment_flops(c.core).forward, "flops_per_update": update.total,
            "activations": saved_bytes(trainer.core, trainer.envs.slots.tokens) // trainer.num_slots,
            "segments_per_second": spread(forward), "samples_per_second": spread(trained),
            "repeats": {"segments": forward, "samples": trained},
        })  # fmt: skip
    first = next(iter(trainers.values()))
    return {
        "what": "cores", "model": options.train_config or "default", "num_envs": first.num_slots,
        "dtype": first.config.core.dtype, "compiled": first.compiled, "bootstrap": first.config.bootstrap,
        "core": asdict(first.config.core), "variants": rows,
    }  # fmt: skip


def _segment(trainer) -> Callable[[], object]:
    """One segment of the trainer's slots without gradient, from the state they are in when it is called."""
    import torch

    from hrm_rl.core import State

    def run():
        slots = trainer.envs.slots
        with torch.no_grad():
            return trainer.segment(slots.tokens, State(slots.z_H, slots.z_L).detach())

    return run


def saved_bytes(core, tokens) -> int:
    """Bytes that one segment of (B, S) tokens keeps for its backward pass, weights and other leaves left out.

    Each storage counts once, however many views of it are kept; uncompiled, whatever the trainer runs.
    """
    import torch

    held: dict[int, tuple[object, int]] = {}
    own = {t.untyped_storage().data_ptr() for t in (*core.parameters(), *core.buffers(), tokens)}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            held[storage.data_ptr()] = (tensor, storage.nbytes())  # kept alive, so that no address comes twice
        return tensor

    state = core.prefix(tokens, core.initial_state(len(tokens)))
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        core.tail(tokens, state)
    return sum(size for _, size in held.values())


def lines(result: dict[str, Any]) -> list[str]:
    """The result as lines of text, for `bench.report`."""
    from hrm_rl.bench import rate_in_words

    width = max(24, *(len(row["name"]) + 2 for row in result["variants"]))
    text = [
        f"sizes: {result['model']}, {result['num_envs']} slots, {result['dtype']}, "
        f"{'compiled' if result['compiled'] else 'eager'}, bootstrap {result['bootstrap']}",
        f"{'core':<{width}}{'parameters':>11}{'calls':>7}{'grad':>6}{'MFLOP/seg':>11}{'MFLOP/upd':>11}{'KiB/slot':>10}"
        f"{'segments/s (range)':>24}{'samples/s (range)':>24}",
    ]
    for row in result["variants"]:
        text.append(
            f"{row['name']:<{width}}{row['parameters']:>11,}{row['calls']:>7}{row['calls_with_gradient']:>6}"
            f"{row['flops_per_segment'] / 1e6:>11.1f}{row['flops_per_update'] / 1e6:>11.1f}"
            f"{row['activations'] / 1024:>10,.0f}{rate_in_words(row['segments_per_second']):>24}"
            f"{rate_in_words(row['samples_per_second']):>24}"
        )
    text.append(
        "calls of networks in a segment, and how many of them carry gradient; MFLOP: matrix products of one slot in a "
        "segment\nwithout gradient and in a training update; KiB/slot: what a segment keeps for its backward pass; "
        "segments/s: without\ngradient; samples/s: slots' segments in training updates, whatever else an update runs"
    )
    return text
