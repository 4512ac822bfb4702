"""Generated input: whatever a file holds and whatever an agent does, there is an answer or one clear line.

The default run takes a few hundred examples of each, `-m slow` ten thousand of the files.
"""

from __future__ import annotations

import gzip
import math
import re
import string

import numpy as np
import pytest
import torch
import yaml
from hrm_testing import small_core, small_puzzles
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from envs import CONTINUE, HALT, SudokuHaltEnv, SudokuHaltVectorEnv
from hrm_rl import cli
from hrm_rl.config import OptimConfig, TrainConfig
from hrm_rl.core import CoreConfig, HRMCore
from hrm_rl.errors import UserError
from hrm_rl.tasks.csv_io import read_csv
from hrm_rl.train import build_parser, read_options

QUICK, LONG = 300, 10_000
COMMON = {"deadline": None, "suppress_health_check": list(HealthCheck)}
HEADER = b"source,question,answer,rating"
ANSWER = "1234341221434321"
GOOD = [f"own,1...34..2.4.43.1,{ANSWER},0", f"own,.2.......1......,{ANSWER},2.5",
        f'"o,w""n",000.34........21,{ANSWER},7']  # fmt: skip


# --- puzzle files -------------------------------------------------------------------------------------------


def fault_of(line: bytes) -> str | None:
    """What is wrong with one line, by the letter of DESIGN section 6; shares no code with the reader."""
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError:
        return "encoding"
    if "\r" in text:
        return "line end"
    fields = split_fields(text)
    if fields is None:
        return "quotes"
    if len(fields) != 4:
        return "fields"
    _, question, answer, rating = fields
    if len(question) != 16 or len(answer) != 16:
        return "length"
    if not re.fullmatch("[1-4.0]{16}", question, re.ASCII) or not re.fullmatch("[1-4]{16}", answer, re.ASCII):
        return "alphabet"
    try:
        number = float(rating) if "_" not in rating else math.nan
    except ValueError:
        return "rating"
    if not abs(number) <= 3.4028234663852886e38:
        return "rating"
    for i in range(4):
        row, column = answer[4 * i : 4 * i + 4], answer[i::4]
        corner = 8 * (i // 2) + 2 * (i % 2)
        box = answer[corner : corner + 2] + answer[corner + 4 : corner + 6]
        if any(sorted(unit) != list("1234") for unit in (row, column, box)):
            return "answer"
    if any(q not in (".", "0", a) for q, a in zip(question, answer, strict=True)):
        return "givens"
    return None


def split_fields(text: str) -> list[str] | None:
    """The fields of one line: plain, or quoted with doubled quotes; None where quotes are broken."""
    fields, rest = [], text
    while True:
        if rest.startswith('"'):
            match = re.match(r'"((?:[^"]|"")*)"(?:,|\Z)', rest, re.DOTALL)
            if match is None:
                return None
            fields.append(match[1].replace('""', '"'))
        else:
            match = re.match(r"([^,]*)(?:,|\Z)", rest, re.DOTALL)
            fields.append(match[1])
        if not match[0].endswith(","):
            return fields
        rest = rest[match.end() :]


def expected(data: bytes) -> tuple[int, int]:
    """(line of the first fault or 0, puzzles) of a plain file, by the same letter."""
    lines = [line.removesuffix(b"\r") for line in data.split(b"\n")]
    if data.endswith(b"\n"):
        lines.pop()
    if not lines or lines[0].removeprefix(b"\xef\xbb\xbf") != HEADER:
        return 1, 0
    while len(lines) > 1 and not lines[-1]:
        lines.pop()
    for number, line in enumerate(lines[1:], start=2):
        if fault_of(line) is not None:
            return number, 0
    return (0, len(lines) - 1) if len(lines) > 1 else (2, 0)


PIECES = st.one_of(
    st.sampled_from([b"1", b"4", b".", b",", b"\n", b'"', b"\r", b"\r\n", b"\0", b"\xef\xbb\xbf", b"\xff",
                     b"1" * 3000, "٣".encode(), b"1e999", b"nan", b" ", b"\t", b"\x0b", b"\x1c", b"\xc2\x85", b"0x1",
                     "\u2028".encode()]),
    st.binary(max_size=3),
)  # fmt: skip


@st.composite
def damaged(draw) -> bytes:
    """A valid file after one to four changes: bytes, fields, lines, line ends, encodings."""
    lines = [HEADER, *(line.encode() for line in draw(st.permutations(GOOD)))]
    for _ in range(draw(st.integers(0, 2))):
        row = draw(st.integers(1 if len(lines) > 1 and draw(st.integers(0, 9)) else 0, len(lines) - 1))
        kind = draw(st.sampled_from(["swap", "drop", "double", "field", "blank", "digit", "digit"]))
        fields = lines[row].split(b",")
        if kind == "swap":
            i, j = (draw(st.integers(0, len(fields) - 1)) for _ in range(2))
            fields[i], fields[j] = fields[j], fields[i]
            lines[row] = b",".join(fields)
        elif kind == "drop":
            del lines[row]
            lines = lines or [b""]
        elif kind == "double":
            lines.insert(row, lines[row])
        elif kind == "field":
            fields[draw(st.integers(0, len(fields) - 1))] = draw(PIECES)
            lines[row] = b",".join(fields)
        elif kind == "blank":
            lines.insert(row, b"")
        elif lines[row]:
            where = draw(st.integers(0, len(lines[row]) - 1))
            lines[row] = lines[row][:where] + draw(st.sampled_from([b"1", b"2", b".", b"5"])) + lines[row][where + 1 :]
    end, last = draw(st.sampled_from([b"\n", b"\r\n"])), draw(st.sampled_from([b"", b"\n", b"\n\r\n"]))
    data = bytearray(end.join(lines) + last)
    for _ in range(draw(st.integers(0, 3))):
        after = min(len(HEADER) + 1, len(data))  # mostly behind the header, whose damage hides all else
        start = draw(st.integers(after if draw(st.integers(0, 9)) else 0, len(data)))
        piece = draw(PIECES)
        stop = start + draw(st.sampled_from([0, len(piece), 5, 40]))
        data[start:stop] = piece if draw(st.booleans()) else b""
    if draw(st.integers(0, 19)) == 0:
        data = bytearray(bytes(data).decode("utf-8", "replace").encode(draw(st.sampled_from(["utf-16", "utf-8-sig"]))))
    return bytes(data)


def check_plain(path, data: bytes) -> None:
    path.write_bytes(data)
    line, puzzles = expected(data)
    try:
        rows = read_csv(path)
    except UserError as error:
        named = re.match(rf"{re.escape(str(path))}:(\d+): \S", str(error))
        assert named and str(error).isprintable(), str(error)
        assert int(named[1]) == line, f"{error} against line {line}"
    else:
        assert line == 0 and len(rows.questions) == puzzles


def check_gzip(path, data: bytes, change, position: int, bit: int) -> None:
    """Damage to the compressed bytes: the whole set, or a refusal that names the file (gzip's checksum decides)."""
    packed = bytearray(gzip.compress(data, mtime=0))
    position %= len(packed)
    if change == "cut":
        del packed[position:]
    elif change == "flip":
        packed[position] ^= 1 << bit
    elif change == "tail":
        packed += b"\x1f\x8b" + bytes([bit]) * bit
    path.write_bytes(packed)
    line, puzzles = expected(data)
    try:
        rows = read_csv(path)
    except UserError as error:
        assert re.match(rf"{re.escape(str(path))}:\d+: \S", str(error)) and str(error).isprintable(), str(error)
    else:
        assert line == 0 and len(rows.questions) == puzzles


def files(examples: int):
    def decorate(test):
        changes = st.sampled_from(["none", "cut", "flip", "tail"])
        mutated = given(damaged(), changes, st.integers(0, 10_000), st.integers(0, 7), st.integers(0, 4))
        return settings(max_examples=examples, **COMMON)(mutated(test))

    return decorate


def one_file(folder, data, change, position, bit, packed) -> None:
    if packed == 0:
        check_gzip(folder / "fuzz.csv.gz", data, change, position, bit)
    else:
        check_plain(folder / "fuzz.csv", data)


@files(QUICK)
def test_puzzle_files(tmp_path_factory, data, change, position, bit, packed):
    one_file(tmp_path_factory.getbasetemp(), data, change, position, bit, packed)


@pytest.mark.slow
@files(LONG)
def test_ten_thousand_puzzle_files(tmp_path_factory, data, change, position, bit, packed):
    one_file(tmp_path_factory.getbasetemp(), data, change, position, bit, packed)


def test_the_checker_of_lines():
    """The control: the independent checker knows good from bad."""
    assert [fault_of(line.encode()) for line in GOOD] == [None] * 3
    assert expected(HEADER + b"\n" + GOOD[0].encode()) == (0, 1) and expected(HEADER) == (2, 0)
    bad = {"a,b": "fields", f"x,{'.' * 16},{ANSWER},x": "rating", f"x,2{'.' * 15},{ANSWER},0": "givens",
           f"x,{'.' * 16},{'1' * 16},0": "answer", f'"x,{"." * 16},{ANSWER},0': "quotes"}  # fmt: skip
    for line, fault in bad.items():
        assert fault_of(line.encode()) == fault


# --- files of settings --------------------------------------------------------------------------------------

NAMES = [*TrainConfig.__dataclass_fields__]
INNER = {"optim": [*OptimConfig.__dataclass_fields__], "core": [*CoreConfig.__dataclass_fields__]}
SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 100), st.integers(), st.floats(), st.floats(0, 1), st.just(10**40),
    st.text(string.printable, max_size=8), st.text(max_size=5), st.dates(), st.binary(max_size=3),
    st.sampled_from(["joint", "q", "auto", "on", "cpu", "1e-3", "grid", "float32", "none", "[1, 2]", "--seed=1",
                     "{a: 1}"]),
)  # fmt: skip
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=5,
)  # fmt: skip


def mappings(names: list[str]):
    keys = st.one_of(st.sampled_from(names), st.sampled_from(names), st.sampled_from(names).map(lambda n: n[:-1]))
    odd = st.one_of(st.text(max_size=4), st.integers(), st.none(), st.floats(), st.booleans())
    return st.dictionaries(st.one_of(keys, keys, keys, odd), VALUES, max_size=2)


SENSIBLE = st.fixed_dictionaries({}, optional={
    "size": st.sampled_from([4, 6, 9]), "num_envs": st.integers(1, 100), "augment": st.booleans(),
    "clues": st.tuples(st.integers(0, 8), st.integers(8, 16)).map(list), "objective": st.sampled_from(["joint", "q"]),
    "seed": st.integers(0, 2**62), "name": st.text(string.ascii_letters, max_size=5), "time_budget": st.floats(0, 1e6),
})  # fmt: skip


@st.composite
def settings_files(draw) -> bytes:
    values = dict(draw(SENSIBLE))
    if draw(st.booleans()):
        values |= draw(mappings(NAMES))
    for group, names in INNER.items():
        if draw(st.booleans()):
            values[group] = draw(mappings(names))
    style = draw(st.sampled_from([None, True]))
    text = yaml.safe_dump(values, allow_unicode=draw(st.booleans()), default_flow_style=style)
    extra = [
        "", "", "", "x: &a [*a]\n", "agent_args: &a {k: *a}\n", "data: !!python/name:os.system\n", "<<: {seed: 1}\n",
        "<<: [{seed: 1}, {sed: 2}]\n", "<<: 3\n", "? [a]\n: 1\n", "data: !x y\n", "seed: 0o7\n", "---\nseed: 1\n",
        "data: *nothing\n", "seed: 1:30\n", "num_envs: 0x10\n", "\t\n", "%YAML 9.9\n", "agent_args: {1: 2, [a]: b}\n",
        "time_budget: .inf\n", "optim: {lr: .nan}\n", "core: {expansion: -.inf}\n", "data: 2020-99-99\n",
        "agent_args: {d: 2020-99-99}\n", "agent_args: {? {a: 1} : 2}\n", "agent_args: {a: .nan, 1: [null]}\n",
    ]  # fmt: skip
    data = bytearray((text if text != "{}\n" else "").encode() + draw(st.sampled_from(extra)).encode())
    for _ in range(draw(st.integers(0, 2))):
        start = draw(st.integers(0, len(data)))
        data[start : start + draw(st.integers(0, 3))] = draw(st.one_of(st.just(b""), st.binary(max_size=3)))
    return bytes(data)


PARSER = build_parser()


def one_config(path, data: bytes) -> None:
    path.write_bytes(data)
    try:
        config, _, _ = read_options(cli.parse(PARSER, ["--config", str(path)]))
    except UserError as error:
        assert str(error).splitlines()[1:] == [], str(error)
    else:
        assert TrainConfig.from_values(config.to_values()) == config
        path.write_text(yaml.safe_dump(config.to_values()))
        assert read_options(cli.parse(PARSER, ["--config", str(path)]))[0] == config


@pytest.mark.slow
@settings(max_examples=QUICK // 2, **COMMON)
@example(b"")
@example(b"\x00\x01\xff")
@example(b"\x00")
@example(b"seed: 1\n...\nseed: 2\n")
@example(b"data: {a: 1}\n")
@given(settings_files())
def test_settings_files(tmp_path_factory, data):
    one_config(tmp_path_factory.getbasetemp() / "fuzz.yaml", data)


@pytest.mark.slow
@settings(max_examples=1500, **COMMON)
@given(settings_files())
def test_many_settings_files(tmp_path_factory, data):
    one_config(tmp_path_factory.getbasetemp() / "fuzz.yaml", data)


@settings(max_examples=QUICK, **COMMON)
@given(mappings(NAMES), mappings(INNER["optim"]), mappings(INNER["core"]))
def test_values_given_in_python(values, optim, core):
    for nested in (values, values | {"optim": optim}, {"core": core}):
        try:
            config = TrainConfig.from_values(nested)
        except UserError as error:
            assert "\n" not in str(error)
        else:
            assert TrainConfig.from_values(config.to_values()) == config


# --- environments -------------------------------------------------------------------------------------------

PUZZLES = small_puzzles(6)
CORE = HRMCore(small_core(), torch.Generator().manual_seed(0)).eval()
ACTION = st.sampled_from((HALT, CONTINUE))
COSTS = st.sampled_from([0.0, 0.01, 0.5])
PROCESS = {"max_steps": st.integers(1, 5), "ponder_cost": COSTS, "seed": st.integers(0, 2**62)}
KINDS = st.sampled_from(["z_H", "q_token", "mean"])


@settings(max_examples=40, **COMMON)
@given(**PROCESS, kind=KINDS, actions=st.lists(ACTION, max_size=12))
def test_single_environment(max_steps, ponder_cost, seed, kind, actions):
    """Ends exactly once an episode; rewards, steps and observations stay in their ranges; a seed repeats it all."""
    env = SudokuHaltEnv(data=PUZZLES, core=CORE, max_steps=max_steps, ponder_cost=ponder_cost, observation=kind)

    def play() -> list:
        seen = [env.reset(seed=seed)[0]]
        step = 1
        for action in actions:
            observation, reward, terminated, truncated, info = env.step(action)
            assert terminated is (action == HALT or step == max_steps) and truncated is False
            assert reward == (float(info["is_correct"]) if terminated else -ponder_cost)
            step += not terminated
            assert info["steps"] == step <= max_steps and 0 <= info["token_accuracy"] <= 1
            seen += [observation, reward]
            if terminated:
                with pytest.raises(Exception, match="ended"):  # never a second end of the same episode
                    env.step(HALT)
                seen.append(env.reset()[0])
                step = 1
        return seen

    first, again = play(), play()
    for mine, theirs in zip(first, again, strict=True):
        np.testing.assert_array_equal(mine, theirs)
        if isinstance(mine, np.ndarray):
            assert mine in env.observation_space and np.isfinite(mine).all()


@pytest.mark.slow
@settings(max_examples=40, **COMMON)
@given(**PROCESS, kind=KINDS, slots=st.integers(1, 5), data=st.data(), form=st.sampled_from(["numpy", "torch"]))
def test_vector_agrees_with_single_environments(max_steps, ponder_cost, seed, kind, slots, data, form):
    """Transition by transition, in both forms."""
    common = {"data": PUZZLES, "core": CORE, "max_steps": max_steps, "ponder_cost": ponder_cost, "observation": kind}
    vector = SudokuHaltVectorEnv(slots, tensors=form, **common)
    singles = [SudokuHaltEnv(**common) for _ in range(slots)]
    plan = data.draw(st.lists(st.lists(ACTION, min_size=slots, max_size=slots), max_size=7))

    def plain(value):
        return value.detach().numpy() if isinstance(value, torch.Tensor) else value

    batch = plain(vector.reset(seed=seed)[0])
    for i, env in enumerate(singles):
        np.testing.assert_allclose(batch[i], env.reset(seed=seed + i)[0], atol=1e-5)
    for actions in plan:
        chosen = torch.tensor(actions) if form == "torch" else np.array(actions)
        batch, rewards, terminated, truncated, infos = vector.step(chosen)
        batch = plain(batch)
        assert np.isfinite(batch).all() and batch in vector.observation_space and not truncated.any()
        for i, env in enumerate(singles):
            observation, reward, ended, _, info = env.step(actions[i])
            assert bool(terminated[i]) is ended and float(rewards[i]) == pytest.approx(reward, abs=1e-6)
            if ended:
                np.testing.assert_allclose(plain(infos["final_obs"][i]), observation, atol=1e-5)
                for name in ("steps", "puzzle", "forced_halt", "is_correct"):
                    assert infos["final_info"][name][i].item() == info[name]
                observation, info = env.reset()
            np.testing.assert_allclose(batch[i], observation, atol=1e-5)
            assert infos["steps"][i].item() == info["steps"] <= max_steps
            assert infos["puzzle"][i].item() == info["puzzle"]
