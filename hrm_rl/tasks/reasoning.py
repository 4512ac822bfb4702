"""Grid tasks of reasoning-gym (arXiv:2505.24760) as tasks of ours: n_queens, futoshiki, mini_sudoku.

reasoning-gym states a puzzle as text and scores a text as the answer. Here both texts become grids of characters of one
shape, the tokens; an item is taken over only where reasoning-gym itself scores the answer made back from our grid with
1.0, and where it is the only right one: several queens may complete a board (`valid_answers`), and exact match with
one of them would call the others wrong, so such boards are left out.

The sets that ship were made by the commands in data/README.md and need no reasoning-gym; making others does
(pip install "hrm_rl[reasoning]"; `python -m hrm_rl.generate --task futoshiki ...`), at some ten to a hundred a second.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from hrm_rl.errors import UserError
from hrm_rl.tasks.csv_io import Rows
from hrm_rl.tasks.registry import check_side
from hrm_rl.tasks.square import SquareGrid
from hrm_rl.tasks.sudoku import Sudoku
from hrm_rl.tasks.symmetry import Symmetries, apply_symmetry, of_the_square, undo_symmetry

_MAX_ATTEMPTS = 5000  # items in a row without one that is new and allowed before the request is called hopeless


def reasoning_gym() -> Any:
    """The package. UserError, one line, where it is not installed."""
    try:
        import reasoning_gym as package
    except ImportError:
        raise UserError('reasoning-gym is not installed (pip install "hrm_rl[reasoning]")') from None
    return package


def _check(spec: Any, sides: Any) -> None:
    check_side(sides, spec.side)
    if spec.count < 1:
        raise UserError(f"count must be at least 1, not {spec.count}")
    if not 0 <= spec.seed < 1 << 31:
        raise UserError(f"seed must be 0 to 2^31 - 1, not {spec.seed}")
    if spec.grid_classes < 0:
        raise UserError(f"grid_classes must not be negative, not {spec.grid_classes}")


def _check_range(spec: Any, low: str, high: str, least: int, most: int) -> None:
    for name in (low, high):
        if not least <= getattr(spec, name) <= most:
            raise UserError(f"{name} must be {least} to {most}, not {getattr(spec, name)}")
    if getattr(spec, low) > getattr(spec, high):
        raise UserError(f"{low} ({getattr(spec, low)}) is above {high} ({getattr(spec, high)})")


def _collect(
    task: type, spec: Any, items: Iterator[tuple[str, str, float]], exclude: Collection[bytes],
    progress: Callable[[int], None] | None,
) -> Rows:  # fmt: skip
    """The first `spec.count` different puzzles of `items` (question, answer, rating) whose form is not excluded."""
    characters = task(spec.side).characters
    place = {character: index for index, character in enumerate(characters)}
    excluded, allowed, seen, rows, since = frozenset(exclude), set(), set(), [], 0

    def accept(question: str, grids: list[np.ndarray]) -> bool:
        if question in seen:
            return False
        if excluded or spec.grid_classes:
            form = task.form(*grids)
            if form in excluded or (spec.grid_classes and form not in allowed and len(allowed) == spec.grid_classes):
                return False
            allowed.add(form)
        seen.add(question)
        return True

    for question, answer, rating in items:
        grids = [np.array([place[c] for c in text], np.uint8) for text in (question, answer)]
        if not accept(question, grids):
            since += 1
            if since == _MAX_ATTEMPTS:
                break
            continue
        rows.append((*grids, rating))
        since = 0
        if progress is not None:
            progress(1)
        if len(rows) == spec.count:
            break
    if len(rows) < spec.count:
        left = ", or leave more solutions to this file: make the other one with --grid-classes" if excluded else ""
        raise UserError(
            f"after {len(rows)} of {spec.count} puzzles of the task {task.name}, {_MAX_ATTEMPTS:,} items held no "
            f"further one; ask for a wider range or fewer puzzles{left}"
        )
    questions, answers, ratings = zip(*rows, strict=True)
    sources = (f"reasoning-gym-{task.name}",) * spec.count
    return Rows(np.stack(questions), np.stack(answers), np.array(ratings, np.float32), sources)


def _dataset(name: str, seed: int, **settings: int) -> Any:
    """A virtual dataset of reasoning-gym; item i is fixed by (seed, i). Seeds are spread so that none overlap."""
    return reasoning_gym().create_dataset(name, seed=seed * 10_000_019 % (1 << 31), size=1 << 30, **settings)


def _confirm(data: Any, item: dict, text: str) -> bool:
    """Whether reasoning-gym scores `text` as right."""
    return data.score_answer(text, item) == 1.0


# --- n queens -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class NQueensSpec:
    """What boards to make: n queens of which some are taken away, so that there is one way to put them back.

    Args:
        side: Side of the board and number of queens: 4 to 10.
        count: How many boards, all different. There are few: 92 solutions of side 8, 12 up to symmetry.
        min_removed: Fewest queens to put back.
        max_removed: Most queens to put back; nothing: all but one.
        seed: Fixes the result.
        grid_classes: Draw the solutions from no more than this many that differ up to symmetry (0: no limit), so that
            another set can be made from the others.
    """

    side: int = 8
    count: int = 1000
    min_removed: int = 1
    max_removed: int | None = None
    seed: int = 0
    grid_classes: int = 0

    def __post_init__(self) -> None:
        _check(self, NQueens.sides)
        if self.max_removed is None:
            object.__setattr__(self, "max_removed", self.side - 1)
        _check_range(self, "min_removed", "max_removed", 1, self.side)


@dataclass(frozen=True)
class NQueens(SquareGrid):
    """Complete a board with n queens, none of which attacks another. Tokens: 0 padding, 1 empty or open, 2 queen."""

    name: ClassVar[str] = "n_queens"
    sides: ClassVar[range] = range(4, 11)
    default_side: ClassVar[int] = 8
    geometry: ClassVar[str] = "lines"
    reveals: ClassVar[bool] = False  # an empty cell of the answer looks like one that is not given
    aliases: ClassVar[dict[str, str]] = {"_": "."}
    characters: ClassVar[str] = ".Q"
    open_token: ClassVar[int] = 1
    vocab_size: ClassVar[int] = 3
    spec: ClassVar[type] = NQueensSpec
    quick: ClassVar[bool] = False

    side: int = 8

    def __post_init__(self) -> None:
        check_side(self.sides, self.side)

    def glyph(self, token: int) -> str:
        return " ·Q"[token]

    def symmetry(self, key: Tensor) -> tuple[Tensor, Tensor]:
        """One of the 8 symmetries of the square for every key (B,)."""
        return _board_symmetries(self.side).draw(key)

    def is_consistent(self, tokens: Tensor) -> Tensor:
        """(B, S) -> (B,) bool: no two queens on one row, column or diagonal."""
        queens = (tokens == 2).double()
        return ((queens @ torch.from_numpy(_lines(self.side)).double().to(tokens.device).T) <= 1).all(1)

    def first_fault(self, questions: np.ndarray, answers: np.ndarray, check_unique: bool) -> tuple[int, str] | None:
        """(row, reason) of the first board that is wrong. questions, answers (N, S) uint8: 0 empty, 1 queen."""
        lines = _lines(self.side).T
        for row, (question, answer) in enumerate(zip(questions, answers, strict=True)):
            for word, cells in (("question", question), ("answer", answer)):
                if (cells > 1).any():
                    where = _where(int((cells > 1).argmax()), self.shape)
                    return row, f"the {word} has a character that is not 'Q', '.' or '_' at {where}"
            if answer.sum() != self.side:
                return row, f"the answer must have {self.side} queens, not {int(answer.sum())}"
            if (answer.astype(int) @ lines > 1).any():
                return row, "two queens of the answer attack each other"
            if (question > answer).any():
                return row, f"the answer has no queen at {_where(int((question > answer).argmax()), self.shape)}"
            if check_unique and _completions(question, self.side) != 1:
                return row, "the question has more than one solution"
        return None

    @staticmethod
    def generate(
        spec: NQueensSpec, exclude: Collection[bytes] = (), progress: Callable[[int], None] | None = None
    ) -> Rows:
        """Boards with one solution from reasoning-gym's n_queens, rated by the number of queens to put back."""
        data = _dataset("n_queens", spec.seed, n=spec.side, min_remove=spec.min_removed, max_remove=spec.max_removed)

        def items() -> Iterator[tuple[str, str, float]]:
            since = 0
            for index in range(1 << 30):
                item = data[index]
                since += 1
                if since > _MAX_ATTEMPTS:
                    return
                if len(item["metadata"]["valid_answers"]) != 1:
                    continue
                question = item["question"].strip().rsplit("\n", spec.side)[-spec.side :]
                grids = ["".join(text).replace(" ", "").replace("_", ".") for text in (question, item["answer"])]
                question, answer = (grid.replace("\n", "") for grid in grids)
                back = "\n".join(" ".join(answer[i : i + spec.side]) for i in range(0, len(answer), spec.side))
                if not _confirm(data, item, back.replace(".", "_")):
                    raise UserError(f"reasoning-gym: its own answer to item {index} of n_queens does not score 1.0")
                since = 0
                yield question, answer, float(item["metadata"]["num_removed"])

        return _collect(NQueens, spec, items(), exclude, progress)

    @staticmethod
    def form(question: np.ndarray, answer: np.ndarray) -> bytes:
        """The solution up to symmetry: (S,) places -> S bytes."""
        side = round(len(answer) ** 0.5)
        return min(image.tobytes() for image in _board_symmetries(side).images(answer))


@lru_cache
def _board_symmetries(side: int) -> Symmetries:
    return Symmetries(of_the_square(side), np.tile(np.arange(3), (8, 1)))


@lru_cache
def _lines(side: int) -> np.ndarray:
    """(L, S) bool: every row, column and diagonal of a board."""
    row, column = np.divmod(np.arange(side * side), side)
    kinds = ((row, side), (column, side), (row + column, 2 * side - 1), (row - column + side - 1, 2 * side - 1))
    return np.concatenate([kind[None] == np.arange(count)[:, None] for kind, count in kinds])


def _completions(question: np.ndarray, side: int, most: int = 2) -> int:
    """How many ways there are to complete a board (S,) of 0 and 1, counted up to `most`."""
    board = question.reshape(side, side)
    given = [int(line.argmax()) if line.any() else None for line in board]
    found = 0

    def place(row: int, columns: int, falling: int, rising: int) -> None:
        nonlocal found
        if row == side:
            found += 1
            return
        for column in range(side) if given[row] is None else (given[row],):
            bits = 1 << column, 1 << (row - column + side), 1 << (row + column)
            if columns & bits[0] or falling & bits[1] or rising & bits[2]:
                continue
            place(row + 1, columns | bits[0], falling | bits[1], rising | bits[2])
            if found >= most:
                return

    place(0, 0, 0, 0)
    return found


# --- futoshiki ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FutoshikiSpec:
    """What Futoshiki to make.

    Args:
        side: Side of the square: 4 to 9.
        count: How many puzzles, all different.
        min_difficulty: Least of reasoning-gym's difficulties, 0 to 3.
        max_difficulty: Largest of them.
        seed: Fixes the result.
        grid_classes: Draw the solutions from no more than this many that differ up to symmetry (0: no limit), so that
            another set can be made from the others.
    """

    side: int = 4
    count: int = 1000
    min_difficulty: int = 0
    max_difficulty: int = 3
    seed: int = 0
    grid_classes: int = 0

    def __post_init__(self) -> None:
        _check(self, Futoshiki.sides)
        _check_range(self, "min_difficulty", "max_difficulty", 0, 3)


@dataclass(frozen=True)
class Futoshiki:
    """A Latin square with signs between its cells, S = (2 side - 1)^2 tokens: cells and the places between them.

    Tokens: 0 padding, 1 blank, digit d = d + 1, then '<', '>' (along a row), '^', 'v' (down a column: which of the two
    is smaller is where the tip is) and ' ' for no sign. Signs and empty places are given and stay what they are."""

    name: ClassVar[str] = "futoshiki"
    sides: ClassVar[range] = range(4, 10)
    default_side: ClassVar[int] = 4
    geometry: ClassVar[str] = "signs"
    reveals: ClassVar[bool] = True
    aliases: ClassVar[dict[str, str]] = {"_": ".", "0": "."}
    open_token: ClassVar[int] = 1
    spec: ClassVar[type] = FutoshikiSpec
    quick: ClassVar[bool] = False

    side: int = 4

    def __post_init__(self) -> None:
        check_side(self.sides, self.side)

    @property
    def shape(self) -> tuple[int, int]:
        return 2 * self.side - 1, 2 * self.side - 1

    @property
    def box(self) -> tuple[int, int]:
        return self.shape

    @property
    def seq_len(self) -> int:
        return self.shape[0] * self.shape[1]

    @property
    def cells(self) -> int:
        return self.side * self.side

    @property
    def characters(self) -> str:
        return ".123456789"[: self.side + 1] + "<>^v "

    @property
    def vocab_size(self) -> int:
        return len(self.characters) + 1

    def glyph(self, token: int) -> str:
        return " " if token == 0 else self.characters[token - 1].replace(".", "·")

    def augment(self, key: Tensor, questions: Tensor, answers: Tensor) -> tuple[Tensor, Tensor]:
        """One of 16 symmetries for every row: (B, S) int64 each. The signs turn with the square, and where digits are
        counted from above (d becomes side + 1 - d) they are reversed."""
        cells, labels = _signed_symmetries(self.side).draw(key)
        return apply_symmetry(cells, labels, questions), apply_symmetry(cells, labels, answers)

    def restore(self, key: Tensor, tokens: Tensor) -> Tensor:
        """The inverse of `augment` under the same key (B,): tokens (B, S) -> (B, S) int64."""
        return undo_symmetry(*_signed_symmetries(self.side).draw(key), tokens)

    def is_consistent(self, tokens: Tensor) -> Tensor:
        """(B, S) -> (B,) bool: no digit twice in a row or column, no sign contradicted by the digits beside it."""
        return torch.from_numpy(_is_consistent(tokens.cpu().numpy().astype(int) - 1, self.side)).to(tokens.device)

    def first_fault(self, questions: np.ndarray, answers: np.ndarray, check_unique: bool) -> tuple[int, str] | None:
        """(row, reason) of the first puzzle that is wrong. questions, answers (N, S) uint8 places in `characters`."""
        n, span = self.side, self.shape[0]
        row, column = np.divmod(np.arange(span * span), span)
        kind = row % 2 + 2 * (column % 2)  # 0 cell, 1 sign down a column, 2 sign along a row, 3 neither
        allowed = np.zeros((4, len(self.characters)), bool)
        for index, characters in enumerate((self.characters[: n + 1], "^v ", "<> ", " ")):
            allowed[index, [self.characters.index(c) for c in characters]] = True
        for index, (question, answer) in enumerate(zip(questions, answers, strict=True)):
            for word, grid in (("question", question), ("answer", answer)):
                known = grid < len(self.characters)
                good = known & allowed[kind, np.where(known, grid, 0)]
                if word == "answer":
                    good &= (grid != 0) | (kind != 0)
                if not good.all():
                    where = _where(int(good.argmin()), self.shape)
                    return index, f"the {word} has a character that has no place at {where} (digits, signs between)"
            kept = (question == answer) | ((question == 0) & (kind == 0))
            if not kept.all():
                return index, f"the answer contradicts the question at {_where(int(kept.argmin()), self.shape)}"
            if not _is_consistent(answer[None].astype(int), n)[0]:
                return index, "the answer breaks the rules: a digit twice in a line, or a sign that is not kept"
            if check_unique and _solutions(question, n) != 1:
                return index, "the question has more than one solution"
        return None

    @staticmethod
    def generate(
        spec: FutoshikiSpec, exclude: Collection[bytes] = (), progress: Callable[[int], None] | None = None
    ) -> Rows:
        """Puzzles from reasoning-gym's futoshiki that have one solution, rated by their number of blanks."""
        data = _dataset("futoshiki", spec.seed, min_board_size=spec.side, max_board_size=spec.side,
                        min_difficulty=spec.min_difficulty, max_difficulty=spec.max_difficulty)  # fmt: skip
        characters = Futoshiki(spec.side).characters

        def items() -> Iterator[tuple[str, str, float]]:
            for index in range(1 << 30):
                item = data[index]
                lines = item["question"].split("\n\n")[1]
                question, answer = (_compact(text, spec.side) for text in (lines, item["answer"]))
                if not _confirm(data, item, _spread(answer, spec.side)):
                    raise UserError(f"reasoning-gym: its own answer to item {index} of futoshiki does not score 1.0")
                places = np.array([characters.index(c) for c in question])
                if _solutions(places, spec.side) != 1:
                    continue
                yield question, answer, float(question.count("."))

        return _collect(Futoshiki, spec, items(), exclude, progress)

    @staticmethod
    def form(question: np.ndarray, answer: np.ndarray) -> bytes:
        """The solution's digits up to symmetry: (S,) places -> bytes."""
        side = (round(len(answer) ** 0.5) + 1) // 2
        digits = np.where(answer <= side, answer, 0).astype(np.int64) + 1
        return min(image.astype(np.uint8).tobytes() for image in _signed_symmetries(side).images(digits))


def _compact(text: str, side: int) -> str:
    """reasoning-gym's picture of a Futoshiki -> (2 side - 1)^2 characters, row by row.

    In the picture every token has 2 columns: a cell or sign, and a space; lines may lack trailing spaces."""
    span = 2 * side - 1
    lines = [line.ljust(2 * span)[: 2 * span : 2] for line in text.split("\n")]
    return "".join(lines).translate(str.maketrans({"_": ".", "\u2227": "^", "\u2228": "v"}))


def _spread(grid: str, side: int) -> str:
    """The inverse of `_compact`."""
    span = 2 * side - 1
    lines = [" ".join(grid[i : i + span]) for i in range(0, span * span, span)]
    return "\n".join(lines).translate(str.maketrans({".": "_", "^": "\u2227", "v": "\u2228"}))


@lru_cache
def _signed_symmetries(side: int) -> Symmetries:
    """The 8 of the square times the complement of the digits. Tokens: padding, blank, digits, < > ^ v, no sign."""
    n, span = side, 2 * side - 1
    less, greater, up, down = range(n + 2, n + 6)
    turned = of_the_square(span)
    labels = np.tile(np.arange(n + 7), (16, 1))
    # What the signs "smaller" and "larger" of the old grid are called along each direction in it, by a step's size:
    signs = {1: (less, greater), -1: (greater, less), span: (up, down), -span: (down, up)}
    for k, cells in enumerate(turned):
        right, below = int(cells[1] - cells[0]), int(cells[span] - cells[0])  # old steps behind the new ones
        for step, called in ((right, (less, greater)), (below, (up, down))):
            labels[k, list(signs[step])] = called
    reverse = np.arange(n + 7)
    reverse[2 : n + 2] = reverse[2 : n + 2][::-1].copy()
    reverse[[less, greater, up, down]] = greater, less, down, up
    labels[8:] = reverse[labels[:8]]
    return Symmetries(np.concatenate((turned, turned)), labels)


def _is_consistent(places: np.ndarray, side: int) -> np.ndarray:
    """(N, S) places in `characters` (padding -1) -> (N,) bool."""
    n = side
    grid = places.reshape(-1, 2 * n - 1, 2 * n - 1)
    cells = np.where((grid[:, ::2, ::2] > 0) & (grid[:, ::2, ::2] <= n), grid[:, ::2, ::2], 0)
    held = cells[..., None] == np.arange(1, n + 1)
    good = (held.sum(1) <= 1).all((1, 2)) & (held.sum(2) <= 1).all((1, 2))
    for signs, first, second, smaller in (
        (grid[:, ::2, 1::2], cells[:, :, :-1], cells[:, :, 1:], n + 1),
        (grid[:, 1::2, ::2], cells[:, :-1], cells[:, 1:], n + 3),
    ):
        both = (first > 0) & (second > 0)
        wrong = both & (((signs == smaller) & (first >= second)) | ((signs == smaller + 1) & (first <= second)))
        good &= ~wrong.any((1, 2))
    return good


def _solutions(question: np.ndarray, side: int, most: int = 2) -> int:
    """How many solutions a Futoshiki (S,) of places has, counted up to `most`: cell by cell, fewest digits first."""
    n = side
    grid = question.reshape(2 * n - 1, 2 * n - 1)
    digits = grid[::2, ::2].astype(int)
    order: dict[tuple[int, int], list[tuple[tuple[int, int], bool]]] = {(r, c): [] for r in range(n) for c in range(n)}
    for r in range(n):
        for c in range(n):
            for sign, other in ((grid[2 * r, 2 * c + 1] if c + 1 < n else 0, (r, c + 1)),
                                (grid[2 * r + 1, 2 * c] if r + 1 < n else 0, (r + 1, c))):  # fmt: skip
                if n < sign < n + 5:
                    smaller = sign in (n + 1, n + 3)
                    order[r, c].append((other, smaller))
                    order[other].append(((r, c), not smaller))

    def fits(r: int, c: int) -> list[int]:
        used = {*digits[r], *digits[:, c]}
        for other, smaller in order[r, c]:
            if digits[other]:
                used |= set(range(digits[other], n + 1)) if smaller else set(range(1, digits[other] + 1))
            else:
                used.add(n if smaller else 1)
        return [d for d in range(1, n + 1) if d not in used]

    def count(left: int) -> int:
        open_cells = [(fits(r, c), r, c) for r in range(n) for c in range(n) if digits[r, c] == 0]
        if not open_cells:
            return 1
        choices, r, c = min(open_cells, key=lambda entry: len(entry[0]))
        found = 0
        for digit in choices:
            digits[r, c] = digit
            found += count(left - found)
            digits[r, c] = 0
            if found >= left:
                break
        return found

    return count(most)


# --- mini sudoku --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MiniSudokuSpec:
    """What 4x4 Sudoku to make.

    Args:
        side: 4.
        count: How many puzzles, all different.
        min_empty: Fewest blanks.
        max_empty: Most blanks.
        seed: Fixes the result.
        grid_classes: Draw the solutions from no more than this many that differ up to symmetry (0: no limit), so that
            another set can be made from the others.
    """

    side: int = 4
    count: int = 1000
    min_empty: int = 8
    max_empty: int = 12
    seed: int = 0
    grid_classes: int = 0

    def __post_init__(self) -> None:
        _check(self, MiniSudoku.sides)
        _check_range(self, "min_empty", "max_empty", 1, 12)


@dataclass(frozen=True)
class MiniSudoku(Sudoku):
    """4x4 Sudoku as reasoning-gym makes them: the rules and tokens of `Sudoku`."""

    name: ClassVar[str] = "mini_sudoku"
    sides: ClassVar[tuple[int, ...]] = (4,)
    default_side: ClassVar[int] = 4
    aliases: ClassVar[dict[str, str]] = {"0": ".", "_": "."}
    spec: ClassVar[type] = MiniSudokuSpec
    quick: ClassVar[bool] = False

    side: int = 4

    def __post_init__(self) -> None:
        check_side(self.sides, self.side)

    @staticmethod
    def generate(
        spec: MiniSudokuSpec, exclude: Collection[bytes] = (), progress: Callable[[int], None] | None = None
    ) -> Rows:
        """Puzzles from reasoning-gym's mini_sudoku that have one solution, rated by their number of blanks."""
        data = _dataset("mini_sudoku", spec.seed, min_empty=spec.min_empty, max_empty=spec.max_empty)

        def items() -> Iterator[tuple[str, str, float]]:
            from hrm_rl.tasks.solver import count_solutions  # numba is only loaded where puzzles are made

            for index in range(1 << 30):
                item = data[index]
                found = re.search(r"puzzle:\n((?:[1-4_ ]+\n){4})", item["question"])
                if found is None:
                    raise UserError(f"reasoning-gym: item {index} of mini_sudoku does not read as a 4x4 grid")
                question, answer = ("".join(text.split()).replace("_", ".") for text in (found[1], item["answer"]))
                back = "\n".join(" ".join(answer[i : i + 4]) for i in range(0, 16, 4))
                if not _confirm(data, item, back):
                    raise UserError(f"reasoning-gym: its own answer to item {index} of mini_sudoku does not score 1.0")
                if count_solutions(np.array([int(c) for c in question.replace(".", "0")])) == 1:
                    yield question, answer, float(question.count("."))

        return _collect(MiniSudoku, spec, items(), exclude, progress)

    @staticmethod
    def form(question: np.ndarray, answer: np.ndarray) -> bytes:
        """The solution up to symmetry: (16,) digits -> 16 bytes."""
        from hrm_rl.tasks.canonical import canonical

        return canonical(answer)


def _where(cell: int, shape: tuple[int, int]) -> str:
    return f"row {cell // shape[1] + 1}, column {cell % shape[1] + 1}"
