"""Draws docs/images/solving.png: one unseen puzzle, segment by segment, until the packaged agent halts.

    python docs/make_images.py [--steps 5]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import gymnasium as gym
import numpy as np
from PIL import Image

import hrm_rl  # noqa: F401 - registers the environment
from envs import CONTINUE, HALT
from hrm_rl.tasks import load_puzzles


def halting_frames(env: gym.Env, puzzle: int, max_steps: int) -> list[np.ndarray]:
    """Frames of one episode under the greedy rule q_halt > q_continue; the last one is where it halts."""
    q_head = env.unwrapped.q_head
    env.reset(seed=0, options={"puzzle": puzzle, "augment": False})
    frames = []
    while True:
        q_halt, q_continue = q_head(env.unwrapped.slots.z_H)[0].tolist()
        halts = q_halt > q_continue or len(frames) + 1 == max_steps
        if not halts:
            frames.append(env.render())
        env.step(HALT if halts else CONTINUE)
        if halts:
            return [*frames, env.render()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=5, help="draw a puzzle that takes this many segments")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "images" / "solving.png")
    options = parser.parse_args()
    puzzles = load_puzzles("sudoku-9", split="test", limit=400)
    hard = (puzzles.clues <= 31).nonzero()[:, 0].tolist()
    env = gym.make("SudokuHalt-v0", data=puzzles, render_mode="rgb_array", disable_env_checker=True)
    for puzzle in hard:
        frames = halting_frames(env, puzzle, env.unwrapped.max_steps)
        if len(frames) == options.steps and env.unwrapped.slots.is_correct[0]:
            break
    else:
        raise SystemExit(f"none of the hard ones among 400 test puzzles halts rightly at step {options.steps}")
    gap = np.full((frames[0].shape[0], 24, 3), 255, dtype=np.uint8)
    row = np.concatenate([part for frame in frames for part in (frame, gap)][:-1], axis=1)
    image = Image.fromarray(row)
    image.resize((image.width // 2, image.height // 2), Image.Resampling.LANCZOS).save(options.out, optimize=True)
    print(f"puzzle {puzzle}, {len(frames)} segments: {options.out}")


if __name__ == "__main__":
    main()
