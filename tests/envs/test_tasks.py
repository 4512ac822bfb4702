"""The same environment for every task: what is right earns 1, pictures show it, and what does not fit is refused."""

from __future__ import annotations

import re
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.envs.registration import load_env_creator
from task_testing import problem_of, puzzles_of, tiny_core

from agents import view_of
from agents.signals import free_cells
from envs import CONTINUE, HALT, MazeHaltEnv, MazeHaltVectorEnv
from hrm_rl.config import TrainConfig
from hrm_rl.core import HRMCore
from hrm_rl.core.counting import CountingCore
from hrm_rl.errors import UserError
from hrm_rl.tasks import PuzzleSet, Task, get_task, load_puzzles, task_class
from hrm_rl.tasks.registry import TASKS, task_of_core

OTHERS = ("MazeHalt-v0", "NQueensHalt-v0", "FutoshikiHalt-v0", "MiniSudokuHalt-v0")


def counting(puzzles: PuzzleSet, right_from: int) -> CountingCore:
    """Answers rightly from that segment on, in whatever symmetry a puzzle is shown."""
    questions, answers = puzzles.questions.long(), puzzles.answers.long()
    table_q, table_a = [questions], [answers]
    for key in range(200):  # all symmetries there are
        moved = puzzles.rules.augment(torch.full((len(puzzles),), key), questions, answers)
        table_q.append(moved[0]), table_a.append(moved[1])
    table_q, table_a = torch.cat(table_q), torch.cat(table_a)

    def solve(tokens: torch.Tensor) -> torch.Tensor:
        return table_a[(tokens[:, None] == table_q).all(-1).int().argmax(-1)]

    return CountingCore(puzzles.seq_len, puzzles.vocab_size, solve, right_from)


@pytest.mark.parametrize("env_id", OTHERS[:3])  # Sudoku has more symmetries than a table holds
def test_the_reward_is_for_the_right_answer(env_id):
    puzzles = puzzles_of(env_id)
    envs = gym.make_vec(env_id, num_envs=5, data=puzzles, core=counting(puzzles, 3), max_steps=4)
    envs.reset(seed=0)
    for step, right in ((1, False), (2, False), (3, True)):
        _, info = envs.reset(seed=step)
        for _ in range(step - 1):
            *_, info = envs.step(np.full(5, CONTINUE))
        assert (info["is_correct"] == right).all() and (info["steps"] == step).all()
        _, rewards, terminated, _, _ = envs.step(np.full(5, HALT))
        assert terminated.all() and (rewards == float(right)).all()


@pytest.mark.parametrize("env_id", OTHERS)
def test_pictures(env_id):
    problem = problem_of(env_id)
    for mode in ("ansi", "rgb_array"):
        env = gym.make(env_id, **problem, render_mode=mode).unwrapped
        env.reset(seed=0)
        picture = env.render()
        if mode == "ansi":
            rows, columns = env.engine.task.shape
            lines = [line for line in re.sub("\033\\[\\d+m", "", picture).splitlines() if "│" in line]
            assert len(lines) == rows and "wrong" not in picture and "step 1/16" in picture
            assert all(len(re.sub("│ ", "", line)) == 3 * 0 + len(re.sub("│ ", "", lines[0])) for line in lines)
            assert len(re.sub("│ ?", "", lines[0])) == 3 * columns
        else:
            assert picture.shape == (560, 480, 3) and picture.dtype == np.uint8 and picture.std() > 10


def test_a_solved_maze_as_text():
    puzzles = puzzles_of("MazeHalt-v0")
    env = MazeHaltEnv(data=puzzles, core=counting(puzzles, 1), render_mode="ansi")
    env.reset(seed=0, options={"puzzle": 2, "augment": False})
    picture = env.render()
    answer = "".join(" █·SGo"[token] for token in puzzles.answers[2].tolist())
    drawn = [re.sub("\033\\[\\d+m", "", line)[2::3][:6] for line in picture.splitlines() if "│" in line]
    assert drawn == [answer[i : i + 6] for i in range(0, 36, 6)]
    green, bold = picture.count("\033[32m"), picture.count("\033[1m")
    open_cells = int((puzzles.questions[2] == 2).sum())
    assert (green, bold) == (open_cells, 36 - open_cells) and "×" not in picture


@pytest.mark.parametrize("env_id", OTHERS)
def test_rules_look_at_the_cells_that_are_open(env_id):
    """In a maze token 1 is a wall: halting rules must look at the free cells, whatever token those have."""
    puzzles = puzzles_of(env_id)
    envs = gym.make_vec(env_id, num_envs=3, **problem_of(env_id), tensors="torch").unwrapped
    envs.reset(seed=0)
    task = envs.engine.task
    free = free_cells(view_of(envs.slots, open_token=task.open_token))
    assert (free == (envs.slots.tokens == task.open_token)).all() and free.any(1).all()
    differ = envs.slots.tokens != envs.slots.labels
    assert (free | ~differ).all()  # wherever the answer says something new, the cell is free
    assert (puzzles.clues == task.cells - (puzzles.questions == task.open_token).sum(1)).all()


def test_arguments_of_another_task_are_refused():
    maze, queens = puzzles_of("MazeHalt-v0"), puzzles_of("NQueensHalt-v0")
    core = HRMCore(tiny_core(maze))
    for kind in (MazeHaltEnv, MazeHaltVectorEnv):
        for arguments, message in (
            ({"data": queens}, "data .n_queens-8 .test.. holds puzzles of the task n_queens, not maze"),
            ({"size": 4}, "size must be 5 to 30, not 4"), ({"size": True}, "size must be 5 to 30, not True"),
            ({"size": 7, "data": maze}, "size is 7 and data .* holds puzzles of side 6"),
            ({"data": maze, "clues": (3, 5)}, "clues: the task maze has no givens to show more of"),
            ({"data": "n_queens-8"}, "n_queens-8 holds puzzles of the task n_queens, not maze"),
            ({"core": None, "size": 25, "data": "maze-25"}, "no trained core ships for maze of size 25"),
        ):  # fmt: skip
            with pytest.raises(UserError, match=message) as error:
                kind(**{"core": core} | arguments)
            assert "\n" not in str(error.value)


def test_size_follows_the_core():
    core = HRMCore(tiny_core(puzzles_of("FutoshikiHalt-v0")))
    assert gym.make("FutoshikiHalt-v0", core=core).unwrapped.engine.puzzles.side == 4
    with pytest.raises(UserError, match="core: made for vocab_size 11, but puzzles of side 7 .maze-7 .train.. need 6"):
        MazeHaltEnv(core=core)


# --- the registry of tasks ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TASKS)
def test_every_task_keeps_the_protocol(name):
    kind = task_class(name)
    for side in kind.sides[:2]:
        task = get_task(name, side)
        assert isinstance(task, Task) and task.side == side and task.name == name
        assert task.seq_len == task.shape[0] * task.shape[1] >= task.cells
        assert task.vocab_size == len(task.characters) + 1 and len(set(task.characters)) == len(task.characters)
        assert task.shape[0] % task.box[0] == 0 == task.shape[1] % task.box[1]
        assert all(len(task.glyph(token)) == 1 for token in range(task.vocab_size))
        assert set(task.aliases.values()) <= set(task.characters) and not set(task.aliases) & set(task.characters)
    wrong = kind.sides[-1] + 1
    with pytest.raises(UserError, match=f"side must be .*, not {wrong}"):
        get_task(name, wrong)


def test_a_core_without_a_note_shows_its_task_by_its_sizes():
    assert task_of_core(11, 81) == ("sudoku", 9) and task_of_core(6, 900) == ("maze", 30)
    assert task_of_core(6, 16) == ("sudoku", 4) and task_of_core(11, 49) == ("futoshiki", 4)
    with pytest.raises(UserError, match="no task has puzzles of 17 tokens with 6 values"):
        task_of_core(6, 17)


def test_a_task_of_ones_own_is_one_file(monkeypatch, tmp_path):
    """The one that docs/TASKS.md shows."""
    text = (Path(__file__).resolve().parents[2] / "docs" / "TASKS.md").read_text()
    (tmp_path / "my_task.py").write_text(re.search(r"```python\n(# my_task.py\n.*?)```", text, re.DOTALL)[1])
    monkeypatch.syspath_prepend(tmp_path)
    maze = puzzles_of("MazeHalt-v0")
    own = PuzzleSet("my_task.SmallMaze", 6, maze.questions, maze.answers, maze.ratings, maze.sources, "own")
    try:
        config = TrainConfig.from_values({"env": "my_task:SmallMazeHalt-v0"})
        envs = gym.make_vec("my_task:SmallMazeHalt-v0", num_envs=2, data=own, core=HRMCore(tiny_core(maze)))
        envs.reset(seed=0)
        assert envs.unwrapped.engine.task.sides == range(5, 9)
        assert (config.task, config.size, config.core.seq_len) == ("my_task.SmallMaze", 8, 64)
        assert config.core.geometry == "neighbours" and config.curriculum == (0, 0)
        made = load_puzzles("my_task.SmallMaze-8", split="test", limit=3, task="my_task.SmallMaze")
        assert (made.task, made.side, len(made)) == ("my_task.SmallMaze", 8, 3)
        with pytest.raises(UserError, match="size must be 5 to 8, not 9"):
            TrainConfig.from_values({"env": "my_task:SmallMazeHalt-v0", "size": 9})
        with pytest.raises(UserError, match="holds puzzles of the task maze, not my_task.SmallMaze"):
            gym.make("SmallMazeHalt-v0", data=maze, core=HRMCore(tiny_core(maze)))
    finally:
        gym.registry.pop("SmallMazeHalt-v0", None)


def test_unknown_tasks_are_named():
    for name, message in (
        ("mase", "unknown task 'mase'; did you mean 'maze'"),
        ("no.such.Task", "task 'no.such.Task' cannot be imported"),
        ("hrm_rl.tasks.maze.Nothing", "cannot be imported"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=message):
            get_task(name, 9)


@pytest.mark.parametrize("env_id", OTHERS)
def test_entry_points_name_their_task(env_id):
    spec = gym.spec(env_id)
    single, vector = load_env_creator(spec.entry_point), load_env_creator(spec.vector_entry_point)
    assert single.task == vector.task and single.task in TASKS
    assert f'gym.make("{env_id}"' in single.__doc__
