"""Pictures: what stands where, in text and in pixels."""

from __future__ import annotations

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.wrappers import RecordVideo

from envs import CONTINUE, HALT, SudokuHaltEnv, SudokuHaltVectorEnv
from hrm_rl.core.q_head import QHead


def digits(text: str) -> list[str]:
    """The grid's rows without colours and lines, one digit and mark a cell."""
    for code in ("\033[1m", "\033[31m", "\033[32m", "\033[0m"):
        text = text.replace(code, "")
    return [line.replace("│", " ") for line in text.splitlines()[1:] if "│" in line]


def test_text_shows_givens_right_and_wrong_answers(puzzles, counting):
    env = SudokuHaltEnv(data=puzzles, core=counting(2), render_mode="ansi", max_steps=3)
    env.reset(seed=0, options={"puzzle": 3, "augment": False})
    wrong = env.render()
    assert wrong.splitlines()[0] == ("puzzle 3 (rating 1.5)  step 1/3  q_halt -  q_continue -  accuracy 0.00  thinking")
    assert wrong.count("×") == 16 == wrong.count("\033[31m")  # the counting core errs in every cell
    env.step(CONTINUE)
    right = env.render()
    givens = int((puzzles.questions[3] > 1).sum())
    assert "×" not in right and right.count("\033[1m") == givens and right.count("\033[32m") == 16 - givens
    answer = (puzzles.answers[3] - 1).reshape(4, 4).tolist()
    assert [[int(d) for d in line.split()] for line in digits(right)] == answer
    env.step(HALT)
    assert env.render().splitlines()[0].endswith("step 2/3  q_halt -  q_continue -  accuracy 1.00  halted, right")


def test_q_values_are_those_of_the_head(puzzles, core):
    head = QHead(core.hidden_size, bias=0.0)
    with torch.no_grad():
        head.bias.copy_(torch.tensor([2.0, -1.0]))
    env = SudokuHaltEnv(data=puzzles, core=core, render_mode="ansi", q_head=head)
    env.reset(seed=0)
    assert "q_halt 0.88  q_continue 0.27" in env.render()


def test_pixels(puzzles, counting):
    env = SudokuHaltEnv(data=puzzles, core=counting(2), render_mode="rgb_array", q_head=QHead(18))
    env.reset(seed=0)
    wrong = env.render()
    assert wrong.shape == (560, 480, 3) and wrong.dtype == np.uint8
    env.step(CONTINUE)
    right = env.render()

    def reddish(picture):
        return (picture[116:, :, 0].astype(int) - picture[116:, :, 1] > 100).sum()

    def greenish(picture):
        return (picture[116:, :, 1].astype(int) - picture[116:, :, 0] > 60).sum()

    assert reddish(wrong) > 500 and greenish(wrong) == 0
    assert reddish(right) == 0 and greenish(right) > 500


@pytest.mark.parametrize("mode", ["ansi", "rgb_array", None])
def test_render_modes_of_both_forms(puzzles, core, mode):
    env = SudokuHaltEnv(data=puzzles, core=core, render_mode=mode)
    if mode is not None:
        with pytest.raises(gym.error.ResetNeeded):
            env.render()
    env.reset(seed=3)
    vector = SudokuHaltVectorEnv(2, data=puzzles, core=core, render_mode=mode)
    vector.reset(seed=3)
    if mode is None:
        assert env.render() is None and vector.render() is None
    else:
        pictures = vector.render()
        assert len(pictures) == 2 and np.array_equal(pictures[0], env.render())


def test_padding_is_left_empty(padded_puzzles, counting):
    env = SudokuHaltEnv(data=padded_puzzles, core=counting(1), render_mode="ansi")
    env.reset(seed=0, options={"puzzle": 1})
    assert [line.strip() for line in digits(env.render())] == [""] * 4


def test_record_video(puzzles, core, tmp_path):
    env = gym.make("SudokuHalt-v0", data=puzzles, core=core, render_mode="rgb_array")
    with RecordVideo(env, str(tmp_path / "videos"), episode_trigger=lambda _: True) as env:
        env.reset(seed=0)
        env.step(CONTINUE)
        env.step(HALT)
    (video,) = (tmp_path / "videos").glob("*.mp4")
    assert video.stat().st_size > 1000
