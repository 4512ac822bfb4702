"""Training and evaluation on every task, from the command to the report, and what each task refuses."""

from __future__ import annotations

import functools
import json
import signal
from types import SimpleNamespace

import gymnasium as gym
import pytest
import torch
from hrm_testing import small_config
from task_testing import puzzles_of, tiny_core

from agents import QHaltingAgent, make_agent
from hrm_rl import bench, compare, evaluate, figures, train
from hrm_rl.config import TrainConfig
from hrm_rl.core import HRMCore
from hrm_rl.core.io import load_core, model_bytes
from hrm_rl.core.layers import GEOMETRIES, GridBias
from hrm_rl.core.q_head import QHead
from hrm_rl.ensemble import relabelled, solve_ensemble
from hrm_rl.errors import UserError
from hrm_rl.tasks import load_puzzles
from hrm_rl.trainer import Trainer

OTHERS = ("MazeHalt-v0", "NQueensHalt-v0", "FutoshikiHalt-v0", "MiniSudokuHalt-v0")
SMALL = """
num_envs: 4
max_steps: 2
total_steps: 4
device: cpu
compile: "off"
log_every: 2
eval_every: 2
eval_puzzles: 4
test_limit: 6
train_limit: 20
optim: {lr: 0.01, warmup_steps: 2}
core: {hidden_size: 16, num_heads: 2, inner_multiple: 16, H_layers: 1, L_layers: 1, puzzle_emb_ndim: 16, dtype: float32}
"""


@pytest.fixture(autouse=True)
def _signals():
    """The command takes over two signals; give them back."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def trainer(env_id: str, **changes) -> Trainer:
    puzzles = puzzles_of(env_id)
    values = {"optim": {"optimizer": "adamw", "lr": 1e-2, "warmup_steps": 0, "schedule": "constant", "ema": 0.0},
              "core": {"hidden_size": 16, "num_heads": 2, "inner_multiple": 16, "puzzle_emb_ndim": 16,
                       "dtype": "float32"}}  # fmt: skip
    values |= dict(env=env_id, size=puzzles.side, num_envs=8, max_steps=2, device="cpu", compile="off", augment=False)
    config = TrainConfig.from_values(values | changes)
    return Trainer(config, QHaltingAgent, puzzles=puzzles, test_puzzles=puzzles)


@pytest.mark.slow
@pytest.mark.parametrize("env_id", OTHERS)
def test_a_core_learns_eight_puzzles_by_heart(env_id):
    run = trainer(env_id)
    losses = []
    for _ in range(120):
        run.update()
        losses.append(run.sums.take()["loss/supervised"])
    assert losses[-1] < 0.5 * losses[0], (losses[0], losses[-1])
    assert run.config.core.geometry == ("auto" if env_id.startswith("Mini") else run.puzzles.rules.geometry)


@pytest.mark.parametrize("env_id", [OTHERS[0], *(pytest.param(i, marks=pytest.mark.slow) for i in OTHERS[1:])])
def test_from_the_command_to_the_report_and_back(env_id, tmp_path, capsys):
    (tmp_path / "small.yaml").write_text(SMALL)
    flags = ["--config", str(tmp_path / "small.yaml"), "--env", env_id, "--out", str(tmp_path), "--name", "run"]
    assert train.main(flags) == 0
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    name = puzzles_of(env_id).task
    assert report["test"].startswith(f"{name}-") and report["puzzles"] == 6 and (tmp_path / "run/training.png").exists()
    assert train.main(["--resume", str(tmp_path / "run"), "--total-steps", "6"]) == 0
    assert evaluate.main([str(tmp_path / "run"), "--limit", "6", "--agent", "stability", "--device", "cpu"]) == 0
    assert f"6 test puzzles ({name}-" in capsys.readouterr().out
    env = gym.make(env_id, core=str(tmp_path / "run"), split="test")
    assert env.unwrapped.max_steps == 2 and env.reset(seed=0)[0].shape == env.observation_space.shape


@pytest.mark.slow
def test_resumed_mazes_are_those_of_a_run_in_one_piece(tmp_path):
    (tmp_path / "small.yaml").write_text(SMALL.replace("total_steps: 4", "total_steps: 8"))
    flags = ["--config", str(tmp_path / "small.yaml"), "--env", "MazeHalt-v0", "--out", str(tmp_path),
             "--optim.schedule", "constant"]  # fmt: skip
    assert train.main([*flags, "--name", "straight"]) == 0
    assert train.main([*flags, "--name", "halves", "--total-steps", "4"]) == 0
    assert train.main(["--resume", str(tmp_path / "halves"), "--total-steps", "8"]) == 0
    one, other = (load_core(tmp_path / name).core.state_dict() for name in ("straight", "halves"))
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_compare_and_ensembles_know_the_task(tmp_path):
    puzzles = puzzles_of("MazeHalt-v0")
    core, head = HRMCore(tiny_core(puzzles), torch.Generator().manual_seed(0)), QHead(16)
    path = tmp_path / "maze.safetensors"
    path.write_bytes(model_bytes(core, head, {"max_steps": 2, "task": "maze", "size": 6}))
    loaded = load_core(path)
    options = SimpleNamespace(task="auto", data="", limit=12, validation="", validation_limit=15)
    test, validation = compare._puzzles(options, loaded, loaded.core)
    assert (test.task, len(test), validation.task, len(validation)) == ("maze", 12, "maze", 15)
    agent = make_agent(QHaltingAgent, core, 2, "extra_forward")
    shown, _ = relabelled(puzzles, 3)
    assert shown.rules.first_fault(*((t - 1).numpy() for t in (shown.questions, shown.answers)), True) is None
    run = solve_ensemble(core, agent, puzzles, 2, "best", 3, batch_size=8)
    assert run.exact.shape == (8,) and (run.segments >= 3).all()


def test_a_file_that_names_no_task_is_known_by_its_sizes(tmp_path):
    puzzles = puzzles_of("MazeHalt-v0")
    core = HRMCore(tiny_core(puzzles), torch.Generator().manual_seed(0))
    path = tmp_path / "maze.safetensors"

    def task(meta: dict, asked: str = "auto"):
        path.write_bytes(model_bytes(core, None, meta))
        return evaluate.task_of(load_core(path), asked)

    assert task({}) == ("maze", 6) == task({"task": "maze"}) == task({"task": "own.Task"}, "maze")
    with pytest.raises(UserError, match="was trained on the task 'own.Task', .* must be asked for: --task own.Task"):
        task({"task": "own.Task"})
    with pytest.raises(UserError, match="36 tokens with 6 values, as no puzzle of the task n_queens has"):
        task({"task": "n_queens"})


OWN = """
from hrm_rl.tasks.maze import Maze

class Corridors(Maze):
    sides = range(5, 7)
    default_side = 5
"""
JUDGES = {  # the commands that read a core: how each is told which one, and a little work for it
    "evaluate": (evaluate.main, ["--limit", "2"]),
    "compare": (compare.main, ["--limit", "2", "--validation-limit", "4", "--cache", "off"]),
    "bench": (bench.main, ["--limit", "2", "--repeats", "1", "--dtype", "float32"]),
    "residuals": (figures.main, ["--puzzles", "2", "--max-steps", "2"]),
    "gradient": (figures.main, ["--puzzles", "2", "--max-steps", "1", "--solver-steps", "2"]),
}


@pytest.fixture
def judge(tmp_path, monkeypatch):
    """Run a command by its name on a core for mazes of a task of the user's own, in a folder where that can be read."""
    (tmp_path / "own_task.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bench, "Peak", functools.partial(bench.Peak, sizes=(32,)))
    puzzles = load_puzzles("own_task.Corridors-5", 5, "test", 2, task="own_task.Corridors")
    core, head = HRMCore(tiny_core(puzzles), torch.Generator().manual_seed(0)), QHead(16)
    meta = {"max_steps": 2, "task": "own_task.Corridors", "size": 5}
    (tmp_path / "model.safetensors").write_bytes(model_bytes(core, head, meta))

    def call(name: str, *more: str) -> int:
        main, words = JUDGES[name]
        first = {"bench": ["evaluate", "--core"], "residuals": ["residuals"], "gradient": ["gradient"]}.get(name, [])
        return main([*first, "model.safetensors", *words, "--device", "cpu", *more])

    return call


@pytest.mark.parametrize("command", JUDGES)
def test_a_task_of_ones_own_is_asked_for_by_the_flag_that_the_message_names(command, judge):
    with pytest.raises(UserError, match="asked for: --task own_task.Corridors$"):
        judge(command)
    try:
        assert judge(command, "--task", "own_task.Corridors") == 0
    except UserError as error:  # no threshold can be chosen for a core that has learned nothing
        assert command == "compare" and "solves none of these 4 validation puzzles" in str(error)


@pytest.mark.parametrize("command", JUDGES)
def test_a_kind_of_core_that_the_file_does_not_hold_is_refused(command, judge):
    with pytest.raises(UserError, match="model.safetensors: its core is of kind 'hrm', not 'trm', which was asked for"):
        judge(command, "--core-kind", "trm")
    with pytest.raises(UserError, match="asked for: --task"):  # under its import path it is the same kind
        judge(command, "--core-kind", "hrm_rl.core.hrm.HRMCore")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"clues": [3, 4]}, r"clues: the task maze has no givens to show more of; use \[0,0\]"),
        ({"curriculum": [0.1, 0.2]}, "curriculum: the task maze has no givens"),
        ({"size": 4}, "size must be 5 to 30, not 4"), ({"size": 31}, "size must be 5 to 30, not 31"),
        ({"core": {"vocab_size": 7}}, "core.vocab_size=7 do not fit size=10, which needs 100 and 6"),
        ({"env": "MazHalt-v0"}, "env 'MazHalt-v0' cannot be made: .*; did you mean 'MazeHalt-v0'"),
        ({"env": "Maze"}, "^env 'Maze' cannot be made: Environment `Maze` doesn't exist; did you mean 'MazeHalt-v0'.$"),
        ({"env": "CartPole-v1x"}, "Environment `CartPole-v1x` doesn't exist. Did you mean: `CartPole`"),
        ({"env": "FutoshikiHalt-v0", "clues": [3, 17]}, "clues must be two numbers, 0 <= low <= high <= 16"),
        ({"env": "SudokuHalt-v0", "size": 10}, "size must be one of 4, 6, 9, not 10"),
    ],
)  # fmt: skip
def test_settings_that_do_not_fit_the_task(values, message):
    with pytest.raises(UserError, match=message) as error:
        TrainConfig.from_values({"env": "MazeHalt-v0"} | values)
    assert "\n" not in str(error.value)


def test_the_task_decides_what_is_left_open():
    default = TrainConfig.from_values({})
    found = default.task, default.size, default.core.geometry, default.curriculum
    assert found == ("sudoku", 9, "auto", (0.62, 0.74))
    maze = TrainConfig.from_values({"env": "MazeHalt-v0"})
    assert (maze.size, maze.core.seq_len, maze.core.vocab_size, maze.curriculum) == (10, 100, 6, (0, 0))
    assert maze.core.geometry == "neighbours" and TrainConfig.from_values(maze.to_values()) == maze
    own = TrainConfig.from_values({"env": "MazeHalt-v0", "core": {"geometry": "boxes", "token_mixing": "attention"}})
    assert (own.core.geometry, own.core.token_mixing) == ("boxes", "attention")
    futoshiki = TrainConfig.from_values({"env": "FutoshikiHalt-v0", "size": 5})
    assert futoshiki.core.seq_len == 81 and futoshiki.curriculum == (0.62, 0.74)


def test_a_core_for_another_task_is_refused(tmp_path):
    puzzles = puzzles_of("NQueensHalt-v0")
    path = tmp_path / "queens.safetensors"
    path.write_bytes(model_bytes(HRMCore(tiny_core(puzzles)), QHead(16), {"max_steps": 2}))
    config = TrainConfig.from_values({"env": "MazeHalt-v0", "objective": "q", "init_core": str(path), "device": "cpu"})
    with pytest.raises(UserError, match="init_core: seq_len is 64 there, the task needs 100"):
        Trainer(config, QHaltingAgent)


def test_a_curriculum_counts_the_cells_that_may_be_open():
    """Of a 4x4 Futoshiki's 49 tokens 33 are never open: ten givens are ten digits."""
    run = trainer("FutoshikiHalt-v0", clues=[10, 10], curriculum=[0, 0])
    shown = run.envs.slots.tokens
    assert ((shown == 1).sum(1) == 6).all() and (run.puzzles.clues < 10).all()
    assert (shown[:, 1] != 1).all()  # a place for a sign stays what it is
    config = small_config()
    assert config.task == "sudoku" and config.rules.cells == 16


# --- geometries -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GEOMETRIES)
def test_units_of_a_geometry(name):
    relation, units = GEOMETRIES[name](5 if name != "boxes" and name != "auto" else 4, (2, 2))
    cells = len(relation)
    assert relation.shape == (cells, cells) and relation.min() >= 0 and relation.max() < units.shape[1]
    itself = relation.diagonal()
    assert units[:, itself.unique()].all() and units.dtype == torch.bool
    bias = GridBias(len(units) + 1, round(cells**0.5), (2, 2), 1, 8.0, name)()
    looks = bias.softmax(-1)[:, 1:, 1:]  # of a cell at the cells
    for unit in range(len(units)):
        inside = units[unit][relation]
        share = (looks[unit] * inside).sum(-1)
        assert share.min() > 0.95, (name, unit, share.min())
    assert torch.allclose(looks[-1], looks[-1, :1, :1].expand_as(looks[-1]))  # the last head looks everywhere alike


def seen(name: str, side: int, unit: int, row: int, column: int) -> set[tuple[int, int]]:
    """The cells that a unit of a geometry holds for one cell."""
    relation, units = GEOMETRIES[name](side, (1, side))
    inside = units[unit][relation[row * side + column]].view(side, side)
    return {tuple(cell) for cell in inside.nonzero().tolist()}


def test_neighbours():
    around = {(r, c) for r in (1, 2, 3) for c in (2, 3, 4)}
    for unit, other in enumerate(((1, 3), (3, 3), (2, 2), (2, 4))):
        assert seen("neighbours", 6, unit, 2, 3) == {(2, 3), other}
    assert seen("neighbours", 6, 4, 2, 3) == around
    assert seen("neighbours", 6, 0, 0, 3) == {(0, 3)}  # nothing above the first row


def test_lines():
    board = {(r, c) for r in range(6) for c in range(6)}
    wanted = (
        {(2, c) for c in range(6)}, {(r, 3) for r in range(6)}, {(r, c) for r, c in board if r - c == -1},
        {(r, c) for r, c in board if r + c == 5},
    )  # fmt: skip
    assert [seen("lines", 6, unit, 2, 3) for unit in range(4)] == list(wanted)


def test_signs():
    """Of a 4x4 Futoshiki (7x7 tokens): the cells of the row, those of the column, the next signs and cells."""
    assert seen("signs", 7, 0, 2, 4) == {(2, c) for c in (0, 2, 4, 6)}
    assert seen("signs", 7, 1, 2, 4) == {(r, 4) for r in (0, 2, 4, 6)}
    next_to = {(2, c) for c in range(2, 7)} | {(r, 4) for r in range(5)}
    assert seen("signs", 7, 2, 2, 4) == next_to
