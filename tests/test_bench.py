"""The instrument itself: what it measures it with, what it prints, and what it refuses to report."""

from __future__ import annotations

import functools
import json
import re
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import yaml
from hrm_testing import small_core

from agents.q_targets import BOOTSTRAPS
from hrm_rl import bench, bench_cores, timing
from hrm_rl.bench_cores import saved_bytes
from hrm_rl.core import CORES, HRMCore, RecurrentCore, build_core
from hrm_rl.core.io import model_bytes, packaged_core
from hrm_rl.core.q_head import QHead
from hrm_rl.errors import UserError
from hrm_rl.flops import published_flops, segment_flops, update_flops
from hrm_rl.timing import CompileGuard, Peak, high_water, interleave, spread, times_in, write_trace

CPU = torch.device("cpu")
QUICK = ["--repeats", "2", "--seconds", "0.001"]


@pytest.fixture
def tiny(tmp_path):
    """A training configuration that takes milliseconds, as a file."""
    core = {name: value for name, value in vars(small_core()).items() if name not in ("dtype", "box")}
    path = tmp_path / "tiny.yaml"
    values = {"size": 4, "num_envs": 4, "max_steps": 4, "curriculum": [0, 0], "optim": {"optimizer": "adamw"}}
    path.write_text(yaml.safe_dump(values | {"core": core}))
    return path


@pytest.fixture
def quick(monkeypatch):
    """Matrix products of a size that takes no time, and Dynamo without a compiler behind it."""
    monkeypatch.setattr(bench, "Peak", functools.partial(Peak, sizes=(32,)))
    monkeypatch.setattr(bench, "packed_peaks", lambda dtypes, device: {})
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def train(tiny, *flags: str) -> bench.TrainBench:
    """Options as the command reads them."""
    kind, parser = bench.TrainBench, bench.cli.make_parser("bench", "")
    parser.add_class_arguments(kind, as_group=False)
    parsed = bench.cli.parse(parser, ["--train_config", str(tiny), "--fresh", "false", *QUICK, *flags])
    return kind(**{name: parsed[name] for name in kind.__dataclass_fields__})


# --- clocks, memory, the machine's speed --------------------------------------------------------------------


def test_repeats_are_interleaved_and_every_other_one_runs_backwards():
    order = []
    results = interleave(3, [functools.partial(order.append, name) for name in "abc"])
    assert "".join(order) == "abccbaabc"
    assert [len(part) for part in results] == [3, 3, 3]
    assert spread([3.0, 1.0, 2.0]) == {"median": 2.0, "low": 1.0, "high": 3.0}


@pytest.fixture
def passes(monkeypatch):
    """passes(seconds) moves the clock of hrm_rl.timing, which stands still otherwise."""
    now = [0.0]
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: now[0]))

    def passes(seconds: float) -> None:
        now[0] += seconds

    return passes


def test_as_many_calls_as_fill_the_time(passes):
    assert times_in(lambda: passes(0.01), CPU, 0.1) == 10
    assert times_in(lambda: passes(0.01), CPU, 0.0) == 1


def test_the_high_water_mark_is_of_the_phase_alone():
    def allocate(mebibytes: int) -> int:
        with high_water(CPU) as peak:
            torch.ones(mebibytes, 2**20, dtype=torch.uint8)
        return peak["bytes"]

    assert 200 * 2**20 < allocate(256) - allocate(8) < 300 * 2**20  # the later one does not see the earlier one's


def test_the_peak_is_measured_in_the_dtype_asked_for(monkeypatch):
    seen = []
    own = torch.mm
    monkeypatch.setattr(torch, "mm", lambda a, b, out: seen.append((a.dtype, b.dtype, out.dtype)) or own(a, b, out=out))
    for dtype in (torch.bfloat16, torch.float32):
        seen.clear()
        assert Peak(str(dtype).removeprefix("torch."), CPU, (16, 32)).measure() > 0
        assert set(seen) == {(dtype, dtype, dtype)}


def test_packed_products_are_products_too():
    for dtype in ("float32", "bfloat16"):
        try:
            peak = Peak(dtype, CPU, (64,), packed=True)
        except RuntimeError:
            pytest.skip("this build of torch packs no weights")
        ((flops, run),) = peak.runs
        x, weight = run.args[0], run.args[1].to_dense()
        assert flops == 2 * 64**3
        torch.testing.assert_close(run(), x @ weight.t(), atol=0.2, rtol=0.02)


def test_a_trace_is_one_a_browser_reads(tmp_path):
    rows = write_trace(str(tmp_path / "trace.json"), lambda: torch.ones(8, 8) @ torch.ones(8, 8), CPU)
    assert json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert {"aten::mm": 1.0}.items() <= {name: calls for name, calls, _ in rows}.items()


# --- train --------------------------------------------------------------------------------------------------


def test_every_combination_is_a_variant_and_utilisation_is_of_its_own_dtype(tiny, quick, monkeypatch):
    class Known:  # in place of the machine's own speed
        def __init__(self, dtype, device):
            self.speed = {"float32": 1e9, "bfloat16": 4e9}[dtype]

        def measure(self):
            return self.speed

    monkeypatch.setattr(bench, "Peak", Known)
    options = train(tiny, "--bootstrap", "extra_forward,none", "--compile", "off", "--dtype", "float32,bfloat16")
    result = bench.bench_train(options)
    rows = result["variants"]
    assert [row["name"] for row in rows] == [
        "extra_forward, eager, float32", "none, eager, float32",
        "extra_forward, eager, bfloat16", "none, eager, bfloat16",
    ]  # fmt: skip
    core = small_core()
    for row in rows:
        speed, rate = (1e9 if row["dtype"] == "float32" else 4e9), row["samples_per_second"]["median"]
        flops = update_flops(core, row["bootstrap"], max_steps=4).total
        assert row["flops_per_sample"] == flops
        assert row["utilisation"] == pytest.approx(rate * flops / speed)
        assert row["equivalent_utilisation"] == pytest.approx(rate * published_flops(core) / speed)
        assert 0 < row["environment_share"] < 1 and len(row["repeats"]) == 2
    assert [ratio["name"] for ratio in result["ratios"]] == ["none, eager, float32", "none, eager, bfloat16"]
    pairs = [a / b for a, b in zip(rows[1]["repeats"], rows[0]["repeats"], strict=True)]
    assert result["ratios"][0]["ratio"] == spread(pairs)


def test_the_command_prints_a_table_and_writes_json(tiny, quick, tmp_path, capsys):
    out, trace = tmp_path / "out.json", tmp_path / "trace.json"
    flags = ["--train_config", str(tiny), "--compile", "off", "--dtype", "float32", "--bootstrap", "none"]
    files = ["--out", str(out), "--profile", str(trace)]
    assert bench.main(["train", *flags, "--fresh", "false", *QUICK, *files]) == 0
    printed, written = capsys.readouterr().out, json.loads(out.read_text())
    assert printed.startswith("$ python -m hrm_rl.bench train --train_config")
    assert written["torch"] == torch.__version__ and torch.__version__ in printed
    assert "none, eager, float32" in printed and "longest operations" in printed
    assert json.loads(trace.read_text())["traceEvents"]
    assert list(written["variants"][0]["samples_per_second"]) == ["median", "low", "high"]


def test_the_environments_share_counts_what_is_not_the_core(tiny, passes):
    (config,) = bench.train_configs(train(tiny, "--compile", "off", "--bootstrap", "shared_prefix")).values()
    trainer = bench.make_trainer(config)

    def slow(place, name, seconds):
        own = getattr(place, name)
        setattr(place, name, lambda *arguments: (passes(seconds), own(*arguments))[1])

    slow(trainer.engine, "run_prefix", 0.02)
    assert bench._environment_share(trainer) == pytest.approx(0)
    slow(trainer.engine, "_draw", 0.06)
    assert bench._environment_share(trainer) == pytest.approx(0.75)


def test_models_are_those_of_the_paper_and_its_small_sister():
    small, = bench.train_configs(bench.TrainBench(bootstrap="none", compile="off", device="cpu")).values()
    core = HRMCore(small.core)
    assert core.num_positions == 82 and small.num_envs == 64 and small.optim.optimizer == "adamw"
    assert tuple(core.L_level.layers[0].mlp.down_proj.weight.shape) == (128, 512) and small.loss == "stablemax"
    paper, = bench.train_configs(bench.TrainBench("paper", bootstrap="none", compile="off", device="cpu")).values()
    core = HRMCore(paper.core)
    assert paper.num_envs == 16 and sum(p.numel() for p in core.parameters()) == pytest.approx(27.3e6, rel=0.01)


# --- refusals -----------------------------------------------------------------------------------------------


def test_a_compiled_figure_is_reported_where_all_of_it_ran_compiled(tiny, quick):
    result = bench.bench_train(train(tiny, "--bootstrap", "shared_prefix", "--compile", "off,on", "--dtype", "float32"))
    assert [row["compiled"] for row in result["variants"]] == [False, True]


def test_a_broken_graph_is_refused(tiny, quick, monkeypatch):
    own = HRMCore.tail

    def broken(self, tokens, state, puzzle_ids=None):
        torch._dynamo.graph_break()
        return own(self, tokens, state, puzzle_ids)

    monkeypatch.setattr(HRMCore, "tail", broken)
    with pytest.raises(UserError, match="not reported, the compiled graph is broken"):
        bench.bench_train(train(tiny, "--compile", "on", "--dtype", "float32", "--bootstrap", "none"))


@pytest.mark.slow
def test_a_fall_back_to_eager_is_refused(tiny, quick, monkeypatch):
    def failing(*arguments):
        raise RuntimeError("no compiler today")

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile.func, backend=failing))
    with torch._dynamo.config.patch(suppress_errors=True), pytest.raises(UserError, match="fell back to eager"):
        bench.bench_train(train(tiny, "--compile", "on", "--dtype", "float32", "--bootstrap", "none"))


def test_every_mode_is_reported(tiny, quick):
    flags = ["--bootstrap", ",".join(BOOTSTRAPS), "--compile", "off", "--dtype", "float32"]
    lines = bench.report({"command": "x", "machine": "x", "date": "x"} | bench.bench_train(train(tiny, *flags)))
    for mode in BOOTSTRAPS[1:]:
        (line,) = [line for line in lines if line.startswith(f"{mode}, eager, float32: ") and "times" in line]
        assert ("goal" in line) == (mode in bench.BOOTSTRAP_GOALS)


def test_a_graph_needs_a_gpu(tiny):
    with pytest.raises(UserError, match="--cuda_graph on: it needs a GPU, not cpu"):
        bench.train_configs(train(tiny, "--cuda_graph", "on", "--device", "cpu"))


def test_one_function_left_uncompiled_is_refused(tiny, quick):
    def make(config):
        trainer = bench.make_trainer(config)
        trainer.engine.run_prefix = trainer.core.prefix
        return trainer

    with pytest.raises(UserError, match="calls of the core ran .* compiled graphs"):
        bench.bench_train(train(tiny, "--compile", "on", "--dtype", "float32", "--bootstrap", "none"), make)


def test_a_trainer_that_did_not_compile_is_refused(tiny, quick, monkeypatch):
    def make(config):
        return SimpleNamespace(config=config, compiled=False, device=CPU, update=lambda: None)

    with pytest.raises(UserError, match="did not compile its core"):
        bench.bench_train(train(tiny, "--compile", "on", "--dtype", "float32", "--bootstrap", "none"), make)


def test_compiling_during_the_repeats_is_refused(quick):
    guard = CompileGuard()
    function = torch.compile(lambda x: x + 1, dynamic=False)
    function(torch.ones(2))
    before = guard.graphs()
    function(torch.zeros(2))
    guard.check_same(before)
    function(torch.ones(3))
    with pytest.raises(UserError, match="1 graphs were compiled during"):
        guard.check_same(before)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["race"], "say what to time"),
        (["train", "--bootstrap", "extra_forwards"], "did you mean 'extra_forward'"),
        (["train", "--dtype", "float8"], "--dtype must be from"),
        (["train", "--compile", "maybe"], "--compile must be from off, on"),
        (["train", "--out", "/nowhere/at/all.json"], "--out /nowhere/at/all.json"),
        (["train", "--profile", "trace.json"], "--profile needs a single variant, not 4"),
        (["train", "--repeats", "0"], "--repeats must be at least 1"),
        (["train", "--modell", "small"], "modell"),
        (["evaluate", "--core", "/nowhere"], "/nowhere: no such file"),
        (["evaluate", "--data", "/nowhere.csv"], "/nowhere.csv: cannot be read"),
        (["env", "--tensors", "jax"], "--tensors must be from numpy, torch"),
        (["generate", "--count", "0"], "--count must be at least 1"),
    ],
)
def test_what_the_command_refuses_before_any_work(flags, message, monkeypatch):
    monkeypatch.setattr(bench, "interleave", None)
    with pytest.raises(UserError, match=message):
        bench.main(flags)


@pytest.mark.parametrize("command", ["train", "cores", "evaluate"])
def test_a_solver_has_no_arithmetic_to_report(command, tiny, tmp_path):
    tiny.write_text(tiny.read_text().replace("gradient: auto", "gradient: implicit"))
    model = tmp_path / "model.safetensors"
    model.write_bytes(model_bytes(build_core(replace(small_core(), gradient="implicit")), QHead(16)))
    flags = ["--core", str(model)] if command == "evaluate" else ["--train_config", str(tiny)]
    with pytest.raises(UserError, match="core.gradient=implicit: .* cannot be counted"):
        bench.main([command, *flags, "--dtype", "float32", "--compile", "off"])


# --- the other commands -------------------------------------------------------------------------------------


def test_evaluate_env_and_generate(quick, tmp_path, capsys):
    out = tmp_path / "out.json"
    quick_out = ["--repeats", "2", "--out", str(out)]

    assert bench.main(["evaluate", "--limit", "12", "--batch_size", "4", "--max_steps", "2", *quick_out]) == 0
    result = json.loads(out.read_text())
    learned, fixed = result["variants"]
    assert fixed["mean_steps"] == 2 and fixed["busy"] == 1 and learned["mean_steps"] <= 2
    assert result["ratios"][0]["goal"] == pytest.approx(0.85 * 2 / learned["mean_steps"])

    assert bench.main(["env", "--num_envs", "2", "--seconds", "0.01", *quick_out]) == 0
    rows = json.loads(out.read_text())["variants"]
    assert [row["name"] for row in rows] == ["numpy", "torch"]
    assert all(0 < row["environment_share"] < 1 and row["steps_per_second"]["low"] > 0 for row in rows)

    assert bench.main(["generate", "--side", "4", "--count", "3", *quick_out]) == 0
    assert json.loads(out.read_text())["variants"][0]["puzzles_per_second"]["low"] > 0
    printed = capsys.readouterr().out
    assert "learned halt, eager" in printed and "not the core" in printed and "a second on" in printed


def test_evaluate_times_the_puzzles_that_the_core_was_made_for(quick, capsys):
    flags = ["--limit", "4", "--max_steps", "1", "--repeats", "1"]
    assert bench.main(["evaluate", "--core", str(packaged_core(4, "futoshiki")), *flags]) == 0
    assert "4 puzzles" in capsys.readouterr().out


@pytest.mark.slow
def test_a_fresh_process_says_when_its_first_update_was_done(tiny):
    (config,) = bench.train_configs(train(tiny, "--compile", "off", "--bootstrap", "none")).values()
    began = time.perf_counter()
    taken = bench.fresh(config)
    assert 0.5 < taken["seconds_to_first_update"] < time.perf_counter() - began
    assert 100 * 2**20 < taken["peak_memory"] < 2000 * 2**20


@pytest.mark.slow
def test_a_fresh_process_that_fails_is_one_line(tiny, monkeypatch):
    (config,) = bench.train_configs(train(tiny, "--compile", "off", "--bootstrap", "none")).values()
    with pytest.raises(UserError, match="a fresh process failed: error: /nowhere.csv"):
        bench.fresh(bench.replace(config, data="/nowhere.csv"))


@pytest.mark.slow
def test_compiled_for_real(tiny, monkeypatch):
    monkeypatch.setattr(bench, "Peak", functools.partial(Peak, sizes=(32,)))
    torch._dynamo.reset()
    result = bench.bench_train(train(tiny, "--compile", "on", "--dtype", "float32,bfloat16"))
    assert all(row["compiled"] for row in result["variants"])
    assert timing.CompileGuard().graphs() == 0


# --- cores --------------------------------------------------------------------------------------------------


def test_every_core_has_its_row(tiny, capsys, tmp_path, monkeypatch):
    """On a clock on which an update takes a second and a segment a quarter of one."""
    def seconds_of(run, device, times=1):
        for _ in range(times):
            run()
        return times * (1.0 if getattr(run, "__name__", "") == "update" else 0.25)

    monkeypatch.setattr(bench_cores, "seconds_of", seconds_of)
    monkeypatch.setattr(bench_cores, "times_in", lambda run, device, seconds: 3)
    out = tmp_path / "cores.json"
    flags = ["--train-config", str(tiny), "--dtype", "float32", "--device", "cpu", *QUICK, "--out", str(out)]
    assert bench.main(["cores", *flags]) == 0
    printed, result = capsys.readouterr().out, json.loads(out.read_text())
    rows = {row["name"]: row for row in result["variants"]}
    assert list(rows) == list(CORES) and result["num_envs"] == 4 and not result["compiled"]
    for kind, row in rows.items():
        core = replace(small_core(), kind=kind)
        assert row["flops_per_segment"] == segment_flops(core).forward
        assert row["flops_per_update"] == update_flops(core, "shared_prefix", max_steps=4).total
        assert row["parameters"] == sum(p.numel() for p in build_core(core).parameters())
        assert len(row["repeats"]["segments"]) == len(row["repeats"]["samples"]) == 2
        assert row["segments_per_second"]["median"] == 16 and row["samples_per_second"]["median"] == 4  # of 4 slots
        assert re.search(rf"^{kind} +{row['parameters']:,} ", printed, re.MULTILINE)
    assert rows["trm"]["activations"] > rows["recurrent_transformer"]["activations"]  # three calls against one of two
    assert rows["trm"]["calls_with_gradient"] == 3 and rows["recurrent_transformer"]["calls"] == 3


@pytest.mark.slow
def test_cores_are_timed_compiled_where_all_of_it_ran_compiled(tiny, quick, monkeypatch):
    """direct_transformer has an empty prefix, in which there is nothing to compile."""
    options = bench.CoresBench(kinds="direct_transformer,trm", train_config=str(tiny), compile="on", dtype="float32",
                               device="cpu", repeats=1, seconds=0.001)  # fmt: skip
    assert bench.bench_cores(options)["compiled"]
    own = RecurrentCore.tail

    def broken(self, tokens, state, puzzle_ids=None):
        torch._dynamo.graph_break()
        return own(self, tokens, state, puzzle_ids)

    monkeypatch.setattr(RecurrentCore, "tail", broken)
    with pytest.raises(UserError, match="not reported, the compiled graph is broken"):
        bench.bench_cores(options)


def test_activations_are_what_autograd_keeps():
    class Squares(torch.nn.Module):
        """Keeps x, its square and nothing of its own weight."""

        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(1000))

        def initial_state(self, count):
            return torch.ones(count, 1000)

        def prefix(self, tokens, state):
            return state

        def tail(self, tokens, state):
            x = self.weight * state  # keeps the state
            return x.square().square()  # keeps x and its square

    assert saved_bytes(Squares(), torch.ones(2, 3)) == 3 * 2 * 1000 * 4


@pytest.mark.parametrize(
    ("flags", "said"),
    [(["--kinds", "hrm,trn"], "did you mean 'trm'"), (["--dtype", "float8"], "--dtype must be from"),
     (["--repeats", "0"], "--repeats must be at least 1"), (["--kinds", ""], "one of hrm, ")],
)  # fmt: skip
def test_cores_refuses_in_one_line(flags, said):
    with pytest.raises(UserError, match=said):
        bench.main(["cores", *flags])
