"""Bad input to the commands: exit code 2, one line on stderr that says what and where, nothing left behind."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hrm_testing import small_core

from hrm_rl import checkpoint, cli, evaluate, generate, train
from hrm_rl.config import TrainConfig
from hrm_rl.core import HRMCore
from hrm_rl.core.io import model_bytes
from hrm_rl.core.q_head import QHead
from hrm_rl.errors import UserError
from hrm_rl.tasks import load_puzzles
from hrm_rl.tasks.csv_io import HEADER, read_csv

ROOT = Path(__file__).resolve().parents[1]
HEAD = ",".join(HEADER) + "\n"
ANSWER = "1234341221434321"
GOOD = f"x,1...34..2.4.43.1,{ANSWER},0\n"  # one solution
SMALL = """size: 4
num_envs: 4
max_steps: 3
device: cpu
compile: off
core: {hidden_size: 16, num_heads: 2, inner_multiple: 16, puzzle_emb_ndim: 16, dtype: float32}
"""
COMMANDS = {"train": train.main, "evaluate": evaluate.main, "generate": generate.main}


@pytest.fixture(autouse=True)
def _signals():
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def make_model() -> bytes:
    core = HRMCore(small_core(), torch.Generator().manual_seed(0))
    return model_bytes(core, QHead(16), {"max_steps": 3})


MODEL = make_model()


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with good files, in which the command runs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    Path("good.csv").write_text(HEAD + GOOD)
    Path("small.yaml").write_text(SMALL)
    Path("model.safetensors").write_bytes(MODEL)
    return tmp_path


def refusal(words: list[str], monkeypatch, capsys) -> str:
    """Run a command in process; its one line on stderr without "error: "."""
    command, *argv = words
    monkeypatch.setattr(sys, "argv", [command, *argv])
    with pytest.raises(SystemExit) as stop:
        cli.run(COMMANDS[command])
    said = capsys.readouterr().err
    assert stop.value.code == 2, said
    assert said.startswith("error: ") and said.count("\n") == 1 and "Traceback" not in said, said
    for leak in ("Parser key", "typing.", "<class", "Expected a"):
        assert leak not in said
    return said.removeprefix("error: ").rstrip("\n")


# (command line, files to write first, what the line must match). Binary files are bytes.
TRAIN, EVAL, MAKE = ["train", "--config", "small.yaml"], ["evaluate"], ["generate", "--side", "4"]
LOCAL = ["--device", "cpu", "--data", "good.csv"]
BAD_FLAGS = [
    ([*TRAIN, "--num-env", "3"], r"unknown flag '--num_env'; did you mean '--num_envs'\?"),
    ([*TRAIN, "--optim.lrr", "3"], r"unknown flag '--optim.lrr'; did you mean '--optim.lr'\?"),
    ([*EVAL, "--max-step", "3"], r"unknown flag '--max_step'; did you mean '--max_steps'\?"),
    ([*MAKE, "--cuont", "3", "--out", "x.csv"], r"unknown flag '--cuont'; did you mean '--count'\?"),
    ([*TRAIN, "-x"], "unknown flag '-x'"),
    ([*TRAIN, "stray"], "unexpected word 'stray'"),
    ([*TRAIN, "--num-envs"], "--num_envs needs a value"),
    ([*TRAIN, "--objective", "x"], "--objective must be joint, supervised or q, not 'x'"),
    ([*TRAIN, "--num-envs", "many"], "--num_envs must be a whole number, not 'many'"),
    ([*TRAIN, "--optim.lr", "fast"], "--optim.lr must be a number, not 'fast'"),
    ([*TRAIN, "--q-to-core", "maybe"], "--q_to_core must be true or false, not 'maybe'"),
    ([*TRAIN, "--clues", "30"], r"--clues must be two whole numbers, as \[30,40\], not '\[30\]'"),
    ([*TRAIN, "--agent-args", "[1]"], "--agent_args must be a mapping"),
    ([*TRAIN, "--agent-args", '{"epsilon": 7}'], "epsilon"),
    ([*TRAIN, "--agent", "qq"], "agent 'qq' is unknown"),
    ([*TRAIN, "--dtype", "float8"], "--core.dtype must be auto, float32, bfloat16 or float16, not 'float8'"),
    ([*EVAL, "--dtype", "float8"], "--dtype must be auto, float32, bfloat16 or float16, not 'float8'"),
    ([*EVAL, "--agent-args", "{"], "--agent_args must be a mapping"),
    ([*EVAL, "--limit", "-1"], "--limit must be between 0 and"),
    ([*EVAL, "--batch-size", "0"], "--batch_size must be between 1 and"),
    ([*EVAL, "--max-steps", "4", "0"], "--max_steps must be between 1 and 10000, not 0"),
    ([*EVAL, "--max-steps", "2", "x"], "--max_steps must be .*whole number.*, not '2 x'"),
    ([*MAKE, "--count", "many", "--out", "x.csv"], "--count must be a whole number, not 'many'"),
    ([*MAKE], "^--out must be given$"),
    ([*TRAIN, "--num-envs", "0"], "num_envs must be at least 1, not 0"),
    ([*TRAIN, "--num-envs", "9" * 30], "num_envs must be at most"),
    ([*TRAIN, "--seed", "-1"], "seed must be between 0 and"),
    ([*TRAIN, "--optim.lr=-1"], "optim.lr must be at least 0, not -1"),
    ([*TRAIN, "--optim.beta1", "2"], "optim.beta1 must be between 0 and 1, not 2"),
    ([*TRAIN, "--optim.lr", "inf"], "optim.lr must be"),
    ([*TRAIN, "--core.num_heads", "5"], r"core.hidden_size \(16\) must be a multiple of core.num_heads \(5\)"),
    ([*MAKE, "--min-clues", "9", "--max-clues", "7", "--out", "x.csv"], r"min_clues \(9\) is above max_clues \(7\)"),
    ([*MAKE, "--side", "5", "--out", "x.csv"], "side must be one of 4, 6, 9, not 5"),
    ([*TRAIN, "--env", "SudokuHallt-v0"], "did you mean 'SudokuHalt-v0'"),
    ([*TRAIN, "--env", "Nothing"], "env 'Nothing' cannot be made"),
    ([*TRAIN, "--device", "cuda:99"], r"device 'cuda:99' is not there \((no GPU|only).*; use auto or cpu\)"),
    ([*EVAL, "--device", "gpu"], "device must be auto, cpu or cuda .*, not 'gpu'"),
    ([*TRAIN, "--config", "none.yaml"], "none.yaml: no such file"),
    ([*TRAIN, "--optim", "small.yaml"], "small.yaml:1: unknown setting 'optim.size'"),
    ([*TRAIN, "--optim", "3"], "3: no such file"),
    ([*TRAIN, "--data", "none.csv"], r"none.csv: cannot be read \(No such file"),
    ([*TRAIN, "--data", "sudoku-5"], "unknown data 'sudoku-5'; did you mean"),
    ([*TRAIN, "--init-core", "none.safetensors"], "none.safetensors: no such file or folder"),
    ([*TRAIN, "--resume", "none"], "none: no run to resume"),
    ([*TRAIN, "--data", "hf://x"], "hf://x: must read hf://owner/name"),
    ([*EVAL, "none"], "none: no such file or folder"),
    ([*EVAL, "a\0b"], "cannot be read|no such file"),
    ([*EVAL, "n" * 5000], "cannot be read"),
    ([*EVAL, "/dev/zero"], "/dev/zero: neither a regular file nor a folder"),
    ([*EVAL, "model.safetensors", *LOCAL, "--out", "no/where.json"], "no/where.json: the folder no does not exist"),
    ([*EVAL, "model.safetensors", *LOCAL, "--out", "."], "is a folder, not a file"),
    ([*MAKE, "--out", "no/x.csv"], "no/x.csv: the folder no does not exist"),
    ([*MAKE, "--out", "x.txt"], "x.txt: the name must end in .csv or .csv.gz"),
    ([*MAKE, "--out", "good.csv"], "good.csv: exists; add --overwrite to replace it"),
    ([*MAKE, "--out", "x.csv", "--exclude-grids-of", "none.csv"], "none.csv: cannot be read"),
]


@pytest.mark.parametrize(("words", "said"), BAD_FLAGS, ids=[" ".join(words)[:50] for words, _ in BAD_FLAGS])
def test_flags(place, monkeypatch, capsys, words, said):
    before = sorted(place.rglob("*"))
    assert re.search(said, refusal(words, monkeypatch, capsys))
    assert sorted(place.rglob("*")) == before


BAD_YAML = [
    ("num_env: 3\n", r"bad.yaml:1: unknown setting 'num_env'; did you mean 'num_envs'\?"),
    ("size: 4\noptim:\n  lrr: 0.1\n", r"bad.yaml:3: unknown setting 'optim.lrr'; did you mean 'optim.lr'\?"),
    ("size: 4\nnum_envs: many\n", "bad.yaml:2: num_envs must be a whole number, not 'many'"),
    ("kind: train\nseeds: 3\narms: {}\n", "bad.yaml: this is a study: python -m hrm_rl.ablate bad.yaml$"),
    ("objective: x\n", "bad.yaml:1: objective must be joint, supervised or q, not 'x'"),
    ("optim: 3\n", "bad.yaml:1: optim must hold settings of its own"),
    ("num_envs: [1, 2]\n", "bad.yaml:1: num_envs must be a whole number, not a list of 2"),
    ("num_envs: {a: 1}\n", "bad.yaml:1: num_envs must be a whole number, not a mapping"),
    ("num_envs:\n", "bad.yaml:1: num_envs must be a whole number, not nothing"),
    ("clues: [1, 2, 3]\n", "bad.yaml:1: clues must be two whole numbers"),
    ("seed: 1\nseed: 2\n", "bad.yaml:2: setting 'seed' is given twice"),
    ("- 1\n", "bad.yaml: must hold settings"), ("", "bad.yaml: must hold settings"),
    ("size: [4\n", "bad.yaml:2: not YAML"), ("[" * 5000, "bad.yaml: not YAML"),
    ("a: &a [x, x, x, x, x, x, x, x]\nb: &b [*a, *a, *a, *a, *a, *a, *a, *a]\nc: &c [*b, *b, *b, *b, *b, *b, *b, *b]\n"
     "d: &d [*c, *c, *c, *c, *c, *c, *c, *c]\nagent_args: {x: [*d, *d, *d, *d]}\n", "bad.yaml: holds too many values"),
    ("agent_args: &a {x: *a}\n", "bad.yaml: holds too many values"),
    ("agent: fixed\nagent.k: 4\n", "bad.yaml:2: unknown setting 'agent.k'; write agent_args: {k: ...}"),
    ("data: !!python/object/apply:os.system ['touch hacked']\n", "bad.yaml:1: tag '!!python/object/apply:os.system'"),
    (b"size: 4\n\xff\xfe", "bad.yaml:2: not UTF-8 text"), ("size: 4\n".encode("utf-16"), "bad.yaml:1: not UTF-8 text"),
    (b"size: 4\0\n", "bad.yaml:1: not YAML"),
]  # fmt: skip


@pytest.mark.parametrize(("content", "said"), BAD_YAML, ids=range(len(BAD_YAML)))
def test_files_of_settings(place, monkeypatch, capsys, content, said):
    (place / "bad.yaml").write_bytes(content if isinstance(content, bytes) else content.encode())
    before = sorted(place.rglob("*"))
    assert re.match(said, refusal(["train", "--config", "bad.yaml"], monkeypatch, capsys))
    assert sorted(place.rglob("*")) == before


def test_a_value_out_of_range_names_its_file(place):
    (place / "bad.yaml").write_text("size: 4\noptim:\n  lr: -1\n")
    options = cli.parse(train.build_parser(), ["--config", "bad.yaml"])
    said = "^bad.yaml:3: optim.lr must be at least 0, not -1.0$"
    with pytest.raises(UserError, match=said), cli.blaming(options.config):
        TrainConfig.from_values({"optim": {"lr": -1.0}})
    options = cli.parse(train.build_parser(), ["--config", "bad.yaml", "--optim.lr=-2"])
    with pytest.raises(UserError, match="^optim.lr must"), cli.blaming(options.config):  # the flag's fault
        TrainConfig.from_values({"optim": {"lr": -2.0}})


TWO = f"x,{'.' * 16},{ANSWER},0\n"
BAD_CSV = [
    (b"", "1: the header must be source,question,answer,rating, not ''"), (HEAD.encode(), "2: no puzzle"),
    (b"question,answer\n", "1: the header must be"), ((HEAD + GOOD + "x,1\n").encode(), "3: 4 fields expected"),
    ((HEAD + "x,1...34..2.4.43.,1234,0\n").encode(), "2: the question must have"),
    ((HEAD + GOOD.replace("...", ".a.")).encode(), "2: the question has a character that is not 1 to 4"),
    ((HEAD + GOOD.replace("1...", "11..")).encode(), "2: the question breaks the rules: 1 more than once in row 1"),
    ((HEAD + GOOD + TWO).encode(), "3: the question has more than one solution"),
    ((HEAD + f"x,2{'.' * 15},{ANSWER},0\n").encode(), "2: the answer contradicts the question"),
    ((HEAD + f"x,{'.' * 16},1134341221434321,0\n").encode(), "2: the answer breaks the rules"),
    ((HEAD + GOOD).encode("utf-16"), "1: not UTF-8 text .UTF-16"),
    ((HEAD + GOOD + GOOD.replace("x,", "é,")).encode("latin-1"), "3: not UTF-8 text"),
    ((HEAD + GOOD + "\n" + GOOD).encode(), "3: empty line"),
    ((HEAD + GOOD.replace(",0\n", ",nan\n")).encode(), "2: the rating must be"),
    ((HEAD + "x" * 100_000).encode(), "2: longer than any line"),
]  # fmt: skip


@pytest.mark.parametrize("command", ["train", "evaluate"])
@pytest.mark.parametrize(("content", "said"), BAD_CSV, ids=range(len(BAD_CSV)))
def test_puzzle_files(place, monkeypatch, capsys, command, content, said):
    (place / "bad.csv").write_bytes(content)
    before = sorted(place.rglob("*"))
    words = {"train": TRAIN, "evaluate": ["evaluate", "model.safetensors", "--device", "cpu"]}[command]
    assert refusal([*words, "--data", "bad.csv"], monkeypatch, capsys).startswith("bad.csv:")
    monkeypatch.undo()
    with pytest.raises(UserError, match=f"bad.csv:{said}"):
        read_csv(place / "bad.csv", check_unique=True)
    assert sorted(place.rglob("*")) == before


def test_what_is_no_fault(place):
    """CRLF, a byte order mark and blank lines at the end."""
    expected = read_csv("good.csv")
    for content in (HEAD + GOOD + "\n\r\n\n", (HEAD + GOOD).replace("\n", "\r\n"), "\ufeff" + HEAD + GOOD):
        Path("fine.csv").write_bytes(content.encode())
        assert (read_csv("fine.csv").questions == expected.questions).all()


def test_a_pipe_is_not_waited_for(place, monkeypatch, capsys):
    for name in ("pipe.csv", "pipe.safetensors", "pipe.yaml"):
        os.mkfifo(name)
    assert "pipe.csv: not a regular file" in refusal([*TRAIN, "--data", "pipe.csv"], monkeypatch, capsys)
    assert "pipe.yaml: not a regular file" in refusal(["train", "--config", "pipe.yaml"], monkeypatch, capsys)
    assert "neither a regular file" in refusal(["evaluate", "pipe.safetensors"], monkeypatch, capsys)
    (place / "held").mkdir()
    os.mkfifo("held/model.safetensors")
    assert "held/model.safetensors: not a regular file" in refusal(["evaluate", "held"], monkeypatch, capsys)


def test_a_checkpoint_of_another_architecture(place, monkeypatch, capsys):
    words = [*TRAIN, "--init-core", "model.safetensors", "--core.hidden_size", "32"]
    assert refusal(words, monkeypatch, capsys) == "core.hidden_size is 32, but the core that is loaded has 16"
    words = ["train", "--size", "6", "--init-core", "model.safetensors", "--device", "cpu", "--compile", "off"]
    assert "seq_len is 16 there, the task needs 36" in refusal(words, monkeypatch, capsys)
    words = ["evaluate", "model.safetensors", "--data", "sudoku-9", "--device", "cpu"]
    assert "sudoku-9 holds puzzles of side 9, not 4" in refusal(words, monkeypatch, capsys)


def test_damaged_checkpoints(place, monkeypatch, capsys):
    """Cut off or with one bit turned, alone and as part of a run; every time the file is named."""
    Path("cut.safetensors").write_bytes(MODEL[:-7])
    Path("text.safetensors").write_text("no model")
    Path("empty.safetensors").write_bytes(b"")
    for name in ("cut", "text", "empty"):
        said = refusal(["evaluate", f"{name}.safetensors"], monkeypatch, capsys)
        assert said.startswith(f"{name}.safetensors: not a readable safetensors file")
    flags = ["--data", "good.csv", "--test-data", "good.csv", "--total-steps", "1", "--eval-every", "0", "--name", "a"]
    assert train.main(["--config", "small.yaml", *flags]) == 0
    assert capsys.readouterr().err.startswith("warning: good.csv: 1 of 1 questions and 1 of 1 solution grids stand in")
    (step,) = checkpoint.list_checkpoints(Path("runs/a"))
    for name in ("model.safetensors", "train.safetensors", "state.json"):
        kept = (step / name).read_bytes()
        turned = bytearray(kept)
        turned[len(kept) // 2] ^= 4
        for content in (kept[:-3], bytes(turned)):
            (step / name).write_bytes(content)
            with pytest.raises(UserError, match=f"{step / name}: (damaged|not readable)"):
                checkpoint.load_checkpoint(step)
            if name == "model.safetensors":  # the one that evaluation reads
                assert refusal(["evaluate", "runs/a"], monkeypatch, capsys).startswith(f"{step / name}: ")
        if name != "state.json":
            (step / name).write_bytes(kept)
    said = refusal(["train", "--resume", "runs/a", "--total-steps", "2"], monkeypatch, capsys)
    assert said.startswith(f"{step / 'state.json'}: ")


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you")])
def test_out_of_memory_says_what_to_lower(monkeypatch, capsys, error):
    def main(argv):
        raise error

    monkeypatch.setitem(COMMANDS, "train", main)
    assert refusal(["train"], monkeypatch, capsys).startswith("out of memory; lower num_envs")


def test_too_large_for_any_memory(place, monkeypatch, capsys):
    """Than any address space has."""
    words = [*TRAIN, "--core.hidden_size", str(1 << 23), "--core.inner_multiple", str(1 << 24)]
    assert refusal(words, monkeypatch, capsys).startswith("out of memory; lower num_envs")


def test_a_fault_in_the_product_is_not_hidden(monkeypatch):
    """The control: an error that is not the user's keeps its traceback."""
    monkeypatch.setattr(sys, "argv", ["x"])
    with pytest.raises(KeyError):
        cli.run(lambda argv: {}["no"])


@pytest.mark.slow
def test_debug_shows_the_traceback(place):
    """In a process of its own, as a user sees it."""
    plain = [sys.executable, "-m", "hrm_rl.generate", "--cuont", "3"]
    debug = [sys.executable, "-m", "hrm_rl.evaluate", "none", "--debug"]
    plain, debug = (subprocess.run(w, capture_output=True, text=True, timeout=120) for w in (plain, debug))
    said = "error: unknown flag '--cuont'; did you mean '--count'?\n"
    assert (plain.returncode, plain.stdout, plain.stderr) == (2, "", said)
    assert debug.returncode != 0 and "Traceback" in debug.stderr and "none: no such file or folder" in debug.stderr


def test_pairs_and_spellings(place):
    for words in (["30,40"], ["30", "40"], ["[30,40]"], ["30,", "40"], ["[30,", "40]"], ["=30,40"], ["=[30,40]"]):
        flags = [f"--clues{words[0]}"] if words[0].startswith("=") else ["--clues", *words]
        options = cli.parse(train.build_parser(), [*flags, "--max-steps", "7"])
        assert (tuple(options.clues), options.max_steps) == ((30, 40), 7)
    (place / "pair.yaml").write_text("clues: 30,40\ncompile: off\ncurriculum: [0.5, 0.6]\n")
    options = cli.parse(train.build_parser(), ["--config", "pair.yaml"])
    assert (tuple(options.clues), options.compile, tuple(options.curriculum)) == ((30, 40), "off", (0.5, 0.6))
    (place / "fast.yaml").write_text("lr: 0.5\n")
    options = cli.parse(train.build_parser(), ["--optim", "fast.yaml", "--optim.eps", "1e-3"])
    assert (options.optim.lr, options.optim.eps, options.config) == (0.5, 1e-3, {"optim.lr": "fast.yaml:1"})
    assert cli.parse(train.build_parser(), ["--dtype", "float16"]).core.dtype == "float16"
    for spelt in ("--max-steps", "--max_steps"):
        assert cli.parse(evaluate.build_parser(), [spelt, "1", "2", "--dtype", "float32"]).max_steps == [1, 2]


@pytest.mark.parametrize("main", COMMANDS.values(), ids=COMMANDS)
def test_help_names_the_frame(main, capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    assert "--debug" in text and "- or _" in text and ("--dtype" in text or main is generate.main)


def test_overwrite_is_asked_for(place, capsys):
    assert generate.main(["--side", "4", "--count", "2", "--out", "good.csv", "--overwrite"]) == 0
    assert len(load_puzzles("good.csv")) == 2


def test_the_hub_without_a_network(monkeypatch, capsys):
    hub = pytest.importorskip("huggingface_hub")

    def offline(**_):
        raise hub.errors.LocalEntryNotFoundError("An error happened\nwhile trying to locate the file")

    monkeypatch.setattr(hub, "hf_hub_download", offline)
    with pytest.raises(UserError) as refused:
        load_puzzles("hf://a/b")
    reason = "the Hub cannot be reached, and no copy lies in the cache"
    assert str(refused.value) == f"hf://a/b: cannot fetch train.csv ({reason})"


def test_shared_puzzles_are_said():
    from hrm_rl.tasks.dataset import shared_puzzles

    train_set, test_set = (load_puzzles("sudoku-9", split=split, limit=50) for split in ("train", "test"))
    assert shared_puzzles(train_set, test_set) is None
    said = shared_puzzles(train_set, train_set.select(torch.arange(5)))
    assert "5 of 5 questions and 5 of 5 solution grids stand in" in said and "\n" not in said
    fewer = SimpleNamespace(**{n: getattr(train_set, n) for n in ("task", "side", "name", "answers")})
    fewer.questions = test_set.questions
    assert "questions" not in shared_puzzles(fewer, train_set)
