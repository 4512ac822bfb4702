"""Pictures of a slot: the grid with givens and answers, the step and both Q-values, as text or as pixels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from envs.slots import IGNORE_LABEL, SlotEngine, Slots

GIVEN, RIGHT, WRONG, PADDING = "given", "right", "wrong", "padding"

_BOLD, _GREEN, _RED, _RESET = "\033[1m", "\033[32m", "\033[31m", "\033[0m"
_STYLE = {GIVEN: _BOLD, RIGHT: _GREEN, WRONG: _RED, PADDING: ""}
_BLOCK = "█"  # a cell that is filled
_WRONG_MARK = "×"  # also shows where colours do not


@dataclass(frozen=True)
class Scene:
    """What a picture shows, as Python values."""

    shape: tuple[int, int]  # rows and columns of the grid
    box: tuple[int, int]  # rows and columns of a block with a frame of its own
    cells: tuple[tuple[str, str], ...]  # (glyph, GIVEN | RIGHT | WRONG | PADDING), row by row
    puzzle: int
    rating: float
    step: int
    max_steps: int
    q_values: tuple[float, float] | None  # probabilities (halt, continue); None without a Q-head
    accuracy: float
    is_correct: bool
    ended: bool

    @property
    def outcome(self) -> str:
        if not self.ended:
            return "thinking"
        return "halted, right" if self.is_correct else "halted, wrong"


@torch.no_grad()
def scene(engine: SlotEngine, slots: Slots, index: int, q_head: nn.Module | None, ended: bool) -> Scene:
    """Read slot `index`. A cell counts as wrong wherever the core's answer is, in a given cell too."""
    task = engine.task
    tokens, labels = slots.tokens[index].tolist(), slots.labels[index].tolist()
    answers = slots.logits[index].argmax(-1).tolist()
    cells = []
    for token, label, answer in zip(tokens, labels, answers, strict=True):
        if label == IGNORE_LABEL:
            cells.append(("", PADDING))
        elif answer != label:
            cells.append((task.glyph(answer), WRONG))
        else:
            cells.append((task.glyph(answer), RIGHT if token == task.open_token else GIVEN))
    q_values = None
    if q_head is not None:
        q_values = tuple(q_head(slots.z_H[index : index + 1]).float()[0].sigmoid().tolist())
    puzzle = int(slots.puzzle[index])
    return Scene(
        task.shape, task.box, tuple(cells), puzzle, float(engine.puzzles.ratings[puzzle]),
        int(slots.steps[index]), engine.max_steps, q_values, float(slots.token_accuracy[index]),
        bool(slots.is_correct[index]), ended,
    )  # fmt: skip


def draw_ansi(s: Scene) -> str:
    """Givens bold, right answers green, wrong ones red with a mark behind them."""
    q_halt, q_continue = ("-", "-") if s.q_values is None else (f"{q:.2f}" for q in s.q_values)
    head = (
        f"puzzle {s.puzzle} (rating {s.rating:g})  step {s.step}/{s.max_steps}  q_halt {q_halt}  "
        f"q_continue {q_continue}  accuracy {s.accuracy:.2f}  {s.outcome}"
    )
    rows, columns = s.box
    bar = "─" * (3 * columns + 1)
    across = s.shape[1] // columns

    def rule(left: str, middle: str, right: str) -> str:
        return left + middle.join([bar] * across) + right

    lines = [head, rule("┌", "┬", "┐")]
    for row in range(s.shape[0]):
        if row and row % rows == 0:
            lines.append(rule("├", "┼", "┤"))
        line = ""
        for column in range(s.shape[1]):
            text, kind = s.cells[row * s.shape[1] + column]
            mark = _WRONG_MARK if kind == WRONG else " "
            style = _STYLE[kind]
            line += "│ " if column % columns == 0 else ""
            line += f"{style}{text or ' '}{mark}{_RESET if style else ''} "
        lines.append(line + "│")
    return "\n".join([*lines, rule("└", "┴", "┘")])


_SIZE = (480, 560)  # even, as video codecs want it
_SCALE = 2  # drawn twice as large and shrunk, for smooth edges
_GRID_AT, _GRID_SIDE = (24, 116), 432
_INK, _SOFT, _FAINT, _PAPER = (33, 37, 41), (108, 117, 125), (206, 212, 218), (255, 255, 255)
_GIVEN_FILL, _GREEN_INK, _RED_INK, _RED_FILL = (233, 236, 239), (24, 124, 62), (200, 30, 45), (253, 232, 234)
_GREEN_BAR, _BLUE_BAR = (64, 160, 100), (70, 120, 190)


def draw_rgb(s: Scene) -> np.ndarray:
    """(560, 480, 3) uint8: givens dark on grey, right answers green, wrong ones red and underlined."""
    from PIL import Image, ImageDraw, ImageFont

    image = Image.new("RGB", (_SIZE[0] * _SCALE, _SIZE[1] * _SCALE), _PAPER)
    pen = ImageDraw.Draw(image)
    fonts: dict[int, ImageFont.FreeTypeFont] = {}

    def at(*values: float) -> tuple[int, ...]:
        return tuple(round(v * _SCALE) for v in values)

    def write(x: float, y: float, text: str, size: int, ink: tuple[int, int, int], anchor: str = "ls") -> None:
        font = fonts.setdefault(size, ImageFont.load_default(size * _SCALE))
        pen.text(at(x, y), text, font=font, fill=ink, anchor=anchor)

    left, top = _GRID_AT
    right = left + _GRID_SIDE
    write(left, 38, f"step {s.step} / {s.max_steps}", 24, _INK)
    outcome_ink = _SOFT if not s.ended else _GREEN_INK if s.is_correct else _RED_INK
    write(right, 38, s.outcome, 18, outcome_ink, "rs")
    write(left, 62, f"puzzle {s.puzzle}, rating {s.rating:g}", 14, _SOFT)
    write(right, 62, f"accuracy {s.accuracy:.0%}", 14, _SOFT, "rs")
    width = _GRID_SIDE / 2 - 10  # of one name, bar and number
    named = zip(("halt", "continue"), s.q_values or (None, None), (_GREEN_BAR, _BLUE_BAR), strict=True)
    for i, (name, value, colour) in enumerate(named):
        x = right - width if i else left
        begin, end = x + 84, x + width - 42
        write(x, 94, f"Q {name}", 14, _INK)
        write(x + width, 94, "-" if value is None else f"{value:.2f}", 14, _INK, "rs")
        pen.rounded_rectangle(at(begin, 84, end, 95), 5 * _SCALE, fill=_GIVEN_FILL)
        if value is not None and value * (end - begin) >= 1:
            filled = begin + value * (end - begin)
            pen.rounded_rectangle(at(begin, 84, filled, 95), 5 * _SCALE, fill=colour)

    cell = _GRID_SIDE / max(s.shape)
    fills = {GIVEN: _GIVEN_FILL, RIGHT: _PAPER, WRONG: _RED_FILL, PADDING: _PAPER}
    inks = {GIVEN: _INK, RIGHT: _GREEN_INK, WRONG: _RED_INK, PADDING: _INK}
    for i, (text, kind) in enumerate(s.cells):
        x, y = left + i % s.shape[1] * cell, top + i // s.shape[1] * cell
        solid = text == _BLOCK
        pen.rectangle(at(x, y, x + cell, y + cell), fill=inks[kind] if solid else fills[kind])
        if not solid:
            write(x + cell / 2, y + cell / 2, text, round(cell * 0.55), inks[kind], "mm")
        if kind == WRONG:
            pen.line(at(x + 0.28 * cell, y + 0.84 * cell, x + 0.72 * cell, y + 0.84 * cell), _RED_INK, 2 * _SCALE)
    for boxes in (False, True):  # thick lines over thin ones
        for i in range(max(s.shape) + 1):
            for step, vertical in ((s.box[1], True), (s.box[0], False)):
                if (i % step == 0) is not boxes or i > s.shape[vertical]:
                    continue
                ends = (left + i * cell, top, left + i * cell, top + s.shape[0] * cell)
                if not vertical:
                    ends = (left, top + i * cell, left + s.shape[1] * cell, top + i * cell)
                pen.line(at(*ends), _INK if boxes else _FAINT, (3 if boxes else 1) * _SCALE)
    return np.asarray(image.resize(_SIZE, Image.Resampling.LANCZOS)).copy()


_DRAW: dict[str, Callable[[Scene], str | np.ndarray]] = {"ansi": draw_ansi, "rgb_array": draw_rgb}
RENDER_MODES = tuple(_DRAW)


def render(
    mode: str, engine: SlotEngine, slots: Slots, index: int, q_head: nn.Module | None, ended: bool
) -> str | np.ndarray:
    """Slot `index` in the render mode "ansi" or "rgb_array"."""
    return _DRAW[mode](scene(engine, slots, index, q_head, ended))
