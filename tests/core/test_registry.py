"""A core by its name: those that ship, a user's file from the page to the report, and files that may import nothing."""

from __future__ import annotations

import functools
import json
import re
import sys
from importlib import metadata

import gymnasium as gym
import pytest
import torch
import yaml
from hrm_testing import ROOT, small_core, small_puzzles
from safetensors import safe_open
from safetensors.torch import save

from hrm_rl import bench, evaluate, figures, train
from hrm_rl.core import CORES, HRMCore, RecurrentCore, build_core, find_core, known_core
from hrm_rl.core.io import load_core, model_bytes
from hrm_rl.core.q_head import QHead
from hrm_rl.errors import UserError

PAGE = (ROOT / "docs" / "CORES.md").read_text(encoding="utf-8")
(EXAMPLE,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
KIND = "my_core.DampedCore"
SIZES = ["--core.hidden_size", "16", "--core.num_heads", "2", "--core.inner_multiple", "16",
         "--core.puzzle_emb_ndim", "16"]  # fmt: skip
RUN = ["--size", "4", "--num-envs", "4", "--max-steps", "3", "--device", "cpu", "--compile", "off",
       "--dtype", "float32", "--total-steps", "4", "--curriculum", "[0,0]", "--log-every", "2", "--eval-every", "0",
       "--test-limit", "8", "--checkpoint-every", "2", *SIZES]  # fmt: skip


def forget() -> None:
    """As in a fresh process: my_core is not imported."""
    sys.modules.pop("my_core", None)
    RecurrentCore.defined.pop(KIND, None)


@pytest.fixture
def users_folder(tmp_path, monkeypatch):
    """A folder on sys.path with the page's my_core.py, nothing of it imported."""
    (tmp_path / "my_core.py").write_text(EXAMPLE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    held = RecurrentCore.defined.get(KIND)
    forget()
    yield tmp_path
    forget()
    if held is not None:
        RecurrentCore.defined[KIND] = held


@pytest.mark.slow
def test_a_core_of_ones_own_from_its_file_to_the_report(users_folder, capsys):
    assert train.main([*RUN, "--core.kind", KIND, "--name", "mine", "--seed", "1"]) == 0
    run = users_folder / "runs" / "mine"
    assert yaml.safe_load((run / "config.yaml").read_text())["core"]["kind"] == KIND
    report = json.loads((run / "report.json").read_text())
    forget()
    with pytest.raises(UserError, match=f"kind '{KIND}', and no model file makes us import code: name it"):
        evaluate.main(["runs/mine"])
    assert "my_core" not in sys.modules
    assert evaluate.main(["runs/mine", "--core-kind", KIND, "--limit", "8", "--device", "cpu", "--out", "again.json",
                          "--dtype", "float32"]) == 0  # fmt: skip
    again = json.loads((users_folder / "again.json").read_text())
    for row, other in zip(report["fixed_steps"], again["fixed_steps"], strict=True):
        assert (row["steps"], row["token_accuracy"]) == (other["steps"], other["token_accuracy"])
    forget()
    assert train.main(["--resume", "runs/mine", "--total-steps", "6", "--compile", "off"]) == 0  # by its config.yaml
    forget()
    assert train.main([*RUN, "--core.kind", KIND, "--init-core", "runs/mine", "--objective", "q", "--name", "q"]) == 0
    forget()
    with pytest.raises(UserError, match="no model file makes us import code"):
        train.main([*RUN, "--init-core", "runs/mine", "--objective", "q", "--name", "q2"])
    assert not (users_folder / "runs" / "q2").exists()
    import my_core

    envs = gym.make_vec("SudokuHalt-v0", num_envs=2, core="runs/mine")
    assert type(envs.unwrapped.engine.core) is my_core.DampedCore


@pytest.mark.parametrize(
    ("main", "words"),
    [(bench.main, ["evaluate", "--repeats", "1", "--limit", "8", "--core"]),
     (figures.main, ["residuals", "--puzzles", "8", "--max-steps", "2"])],
)  # fmt: skip
def test_other_commands_take_a_core_of_ones_own(users_folder, main, words, monkeypatch):
    monkeypatch.setattr(bench, "Peak", functools.partial(bench.Peak, sizes=(32,)))
    core, head = find_core(KIND)(small_core(), torch.Generator().manual_seed(0)), QHead(16)
    (users_folder / "model.safetensors").write_bytes(model_bytes(core, head, {"max_steps": 2}))
    words = [*words, "model.safetensors", "--device", "cpu", "--dtype", "float32"]
    forget()
    with pytest.raises(UserError, match="no model file makes us import code: name it"):
        main(words)
    assert main([*words, "--core-kind", KIND]) == 0


def test_the_commands_of_the_page_have_these_flags():
    known = {"train": train.build_parser(), "evaluate": evaluate.build_parser()}
    shown = re.findall(r"python -m hrm_rl\.(train|evaluate)((?: [^\n#`]+)?)", PAGE)
    assert len(shown) >= 3
    for command, rest in shown:
        flags = {action.dest for action in known[command]._actions}
        for flag in re.findall(r"--([a-z][a-z_.\-]*)", rest):
            assert flag.replace("-", "_") in flags, flag


# --- files ----------------------------------------------------------------------------------------------------


def renamed(tmp_path, kind: str):
    """A sound model file whose header names another kind."""
    path = tmp_path / "model.safetensors"
    path.write_bytes(model_bytes(HRMCore(small_core()), None))
    with safe_open(path, framework="pt") as file:
        header, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    header["core"] = json.dumps(json.loads(header["core"]) | {"kind": kind})
    path.write_bytes(save(tensors, header))
    return path


@pytest.mark.parametrize("kind", ["evil.Core", "evil", "os.system", "", ".", "a..b", "hrm_rl.core.RecurrentCore",
                                  "x" * 999, "__main__.Core", "evil\nCore"])  # fmt: skip
def test_a_model_file_imports_nothing(kind, tmp_path, monkeypatch):
    (tmp_path / "evil.py").write_text("raise SystemExit('imported')\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match="no model file makes us import code") as error:
        load_core(renamed(tmp_path, kind))
    assert len(str(error.value).removeprefix(str(tmp_path))) < 300 and "\n" not in str(error.value)
    assert "evil" not in sys.modules


def test_a_file_of_another_kind_of_core_is_refused_by_its_tensors(tmp_path):
    assert type(load_core(renamed(tmp_path, "hrm")).core) is HRMCore
    for kind, said in (("trm", "has no place in this model"), ("direct_transformer", "holds no tensor 'net."),
                       ("gated_hrm", "holds no tensor 'H_gate.weight'")):  # fmt: skip
        with pytest.raises(UserError, match=said):
            load_core(renamed(tmp_path, kind))


def test_a_file_without_a_kind_is_hrms(tmp_path):
    """Those of before there were others."""
    path = renamed(tmp_path, "hrm")
    with safe_open(path, framework="pt") as file:
        header, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    values = json.loads(header["core"])
    del values["kind"], values["gradient"], values["gradient_k"]
    path.write_bytes(save(tensors, header | {"core": json.dumps(values)}))
    loaded = load_core(path).core
    assert type(loaded) is HRMCore and len(loaded.calls) - loaded.without_gradient == 2


# --- names ----------------------------------------------------------------------------------------------------


def test_what_names_no_core_says_so():
    for kind, said in (("trn", "did you mean 'trm'"), ("nowhere.Core", "cannot be imported .ModuleNotFoundError"),
                       ("hrm_rl.core.CoreConfig", "no subclass"), ("hrm_rl.core.RecurrentCore", "no subclass"),
                       ("hrm_rl.core.Nothing", "cannot be imported"),
                       ("hrm_rl.core.hrm.HRMCor", "no attribute 'HRMCor'.*; did you mean 'HRMCore'"),
                       (".", "one of hrm, recurrent_transformer")):
        with pytest.raises(UserError, match=said):
            find_core(kind)
    assert find_core("hrm_rl.core.hrm.HRMCore") is HRMCore is CORES["hrm"]


def test_a_file_that_does_not_run_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "broken_core.py").write_text("def f(:\n")
    (tmp_path / "failing_core.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    for name, said in (("broken_core.Core", "SyntaxError"), ("failing_core.Core", "ZeroDivisionError")):
        with pytest.raises(UserError, match=said) as error:
            find_core(name)
        assert "\n" not in str(error.value)


def test_a_core_is_known_once_it_is_defined(tmp_path):
    class Mine(HRMCore):
        pass

    assert Mine.kind.endswith("test_a_core_is_known_once_it_is_defined.<locals>.Mine") and HRMCore.kind == "hrm"
    core = Mine(small_core(), torch.Generator().manual_seed(0))
    assert core.config.kind == Mine.kind and known_core(Mine.kind) is Mine
    path = tmp_path / "model.safetensors"
    path.write_bytes(model_bytes(core, None))
    assert type(load_core(path).core) is Mine
    with pytest.raises(TypeError, match="'trm' is that of hrm_rl.core.trm.TRMCore already"):
        type("Other", (HRMCore,), {"kind": "trm"})
    assert find_core("trm") is CORES["trm"]


@pytest.mark.parametrize("own_name", [False, True])
def test_an_installed_packages_core(own_name, users_folder, monkeypatch):
    """By its entry point's name and by its import path, from a configuration and from a file."""
    if own_name:
        text = EXAMPLE.replace("    def build", '    kind = "damped"\n\n    def build')
        (users_folder / "my_core.py").write_text(text)
    point = metadata.EntryPoint("damped", KIND.replace(".DampedCore", ":DampedCore"), "hrm_rl.cores")
    real = metadata.entry_points
    monkeypatch.setattr(metadata, "entry_points", lambda **k: [point] if k == {"group": "hrm_rl.cores"} else real(**k))
    core = build_core(small_core(kind="damped"), torch.Generator().manual_seed(0))
    assert core.config.kind == ("damped" if own_name else KIND)
    path = users_folder / "model.safetensors"
    path.write_bytes(model_bytes(core, None))
    del core
    forget()
    RecurrentCore.defined.pop("damped", None)
    loaded = load_core(path).core
    tokens = small_puzzles(2).questions.long()
    assert type(loaded).__name__ == "DampedCore" and loaded(tokens, loaded.initial_state(2)).logits.isfinite().all()
    RecurrentCore.defined.pop("damped", None)


def test_too_many_calls_are_refused():
    with pytest.raises(ValueError, match=r"H_cycles \* core.L_cycles must be at most 65536"):
        small_core(H_cycles=1 << 20, L_cycles=1 << 20)


# --- bench cores ----------------------------------------------------------------------------------------------


def test_bench_knows_a_core_of_ones_own(users_folder, capsys):
    values = {"size": 4, "num_envs": 4, "max_steps": 4, "curriculum": [0, 0], "optim": {"optimizer": "adamw"},
              "core": {n: v for n, v in vars(small_core()).items() if n not in ("dtype", "box", "kind")}}  # fmt: skip
    (users_folder / "tiny.yaml").write_text(yaml.safe_dump(values))
    flags = ["--train-config", "tiny.yaml", "--repeats", "1", "--seconds", "0.001", "--dtype", "float32",
             "--device", "cpu"]  # fmt: skip
    assert bench.main(["cores", "--kinds", f"direct_transformer,{KIND}", *flags, "--out", "out.json"]) == 0
    rows = json.loads((users_folder / "out.json").read_text())["variants"]
    assert [(row["name"], row["calls"], row["calls_with_gradient"]) for row in rows] == [
        ("direct_transformer", 1, 1), (KIND, 4, 1)]  # fmt: skip
    assert KIND in capsys.readouterr().out
