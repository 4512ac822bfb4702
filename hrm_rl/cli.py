"""What the commands share: a parser that speaks in one line, and the frame around `main`.

jsonargparse knows the flags, their types and their help. What a user has got wrong is said here: flags and the
settings of a YAML file are the same thing, so a file is read as the flags it stands for, each with its line.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from typing import Any, NamedTuple

from hrm_rl.errors import UserError, nearest
from hrm_rl.settings import in_words, is_optional, is_pair, shortened
from hrm_rl.yaml_files import compose, construct

#: Short spellings of nested flags.
ALIASES = {"dtype": "core.dtype"}
EPILOG = "Flags may be spelt with - or _. --debug shows where an error arose (a traceback)."


def make_parser(prog: str, description: str, config: bool = True):
    """A jsonargparse parser whose errors are UserErrors and that takes a YAML file by --config."""
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(prog=prog, description=description, exit_on_error=False, allow_abbrev=False)
    if config:
        parser.add_argument("--config", action="config", help="YAML file with settings; flags after it win.")
    parser.epilog = EPILOG
    return parser


def parse(parser, argv: Sequence[str]):
    """Parse; flags may be spelt with - or _. UserError in one line for anything that does not fit.

    `config` of the result, where the parser has it, is not the file's name but where each setting of a file stands
    (name -> "file:line"), which `blaming` makes use of."""
    from jsonargparse import ArgumentError

    known = _options(parser)
    aliases = {short: name for short, name in ALIASES.items() if short not in known and name in known}
    parser.epilog = EPILOG + "".join(f" --{short} is short for --{name}." for short, name in aliases.items())
    words, places = _expand(parser, _joined_pairs(known, [_flag(word, aliases) for word in argv]))
    try:
        options = parser.parse_args(words)
    except (ArgumentError, TypeError, ValueError) as error:
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from None
        raise UserError(_reworded(str(error), known, words, places)) from error
    if "config" in known:
        options["config"] = places
    return options


@contextmanager
def blaming(places: Mapping[str, str] | None) -> Iterator[None]:
    """Put "file:line: " before a UserError that begins with the name of a setting of a file (`config` of `parse`)."""
    try:
        yield
    except UserError as error:
        named = re.match(r"[A-Za-z]\w*(?:\.\w+)*", str(error))
        place = (places or {}).get(named[0]) if named else None
        if place is None:
            raise
        raise UserError(f"{place}: {error}") from error


def _options(parser) -> dict[str, Any]:
    """Name -> action of every flag that takes a value, --config among them."""
    groups = {action.dest.rpartition(".")[0] for action in parser._actions}
    left_out = groups | {"help", "print_config"}
    return {a.dest: a for a in parser._actions if a.option_strings and a.dest not in left_out}


def _hint(action: Any) -> Any:
    """The type that a flag's value must have."""
    return getattr(action, "_typehint", None) or action.type or str


def _flag(word: str, aliases: Mapping[str, str]) -> str:
    """--q-to-core=x -> --q_to_core=x, --dtype -> --core.dtype; values and single dashes stay as they are."""
    match = re.match(r"--([A-Za-z][\w.\-]*)(=.*)?$", word, re.DOTALL)
    if match is None:
        return word
    name = match[1].replace("-", "_")
    return f"--{aliases.get(name, name)}{match[2] or ''}"


def _joined_pairs(known: Mapping[str, Any], words: Sequence[str]) -> list[str]:
    """--clues 30 40 and --clues 30,40 -> --clues=[30,40]."""
    done, words = [], list(words)
    while words:
        name, equals, value = words.pop(0).partition("=")
        if not (name.startswith("--") and name[2:] in known and is_pair(_hint(known[name[2:]]))):
            done.append(name + equals + value)
            continue
        if not equals and words and not words[0].startswith("--"):
            equals, value = "=", words.pop(0)
            incomplete = re.fullmatch(r"\[?[^\[\],]+,?", value) is not None
            if incomplete and words and not words[0].startswith("--"):
                value = f"{value.rstrip(',')},{words.pop(0)}"
        done.append(f"{name}{equals}{_bracketed(value) if equals else ''}")
    return done


def _bracketed(text: str) -> str:
    return text if text.startswith("[") else f"[{text}]"


def _expand(parser, words: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """--config FILE -> the flags that the file stands for; and where each of them comes from ("file:line").

    Unknown flags are refused here. A setting that a later flag gives anew is left to the flag."""
    known = _options(parser)
    done: list[tuple[str | None, list[str]]] = []  # (setting of a file, words)
    places: dict[str, str] = {}
    position = 0
    while position < len(words):
        word = words[position]
        position += 1
        name, equals, value = word.partition("=")
        if re.match(r"--?[A-Za-z]", word) and name not in parser._option_string_actions:
            raise UserError(f"unknown flag {name!r}{nearest(name, [f'--{option}' for option in known])}")
        group = name.removeprefix("--")  # --optim FILE reads the settings of one group
        if (name == "--config" and "config" in known) or any(option.startswith(f"{group}.") for option in known):
            if not equals:
                if position == len(words):
                    raise UserError(f"{name} needs a value")
                value = words[position]
                position += 1
            group = "" if name == "--config" else f"{group}."
            for setting, (flag_words, line) in read_settings(value, known, group).items():
                done = [(held, old) for held, old in done if held != setting]
                done.append((setting, flag_words))
                places[setting] = f"{value}:{line}"
            continue
        setting = name.removeprefix("--")
        if setting in places:
            done = [(held, old) for held, old in done if held != setting]
            del places[setting]
        done.append((None, [word]))
    return [word for _, part in done for word in part], places


# --- YAML files ---------------------------------------------------------------------------------------------


class Setting(NamedTuple):
    """One setting of a file."""

    words: list[str]  # as flags
    line: int


def read_settings(path: str | Path, known: Mapping[str, Any], group: str = "") -> dict[str, Setting]:
    """The settings of a YAML file by name. Nothing but plain values is read; UserError names file and line.

    group: "optim." for a file that holds the settings of that group alone."""
    import yaml

    root = compose(path)
    found: dict[str, Setting] = {}
    groups = {name.partition(".")[0] for name in known if "." in name}

    def refuse(node, message: str):
        raise UserError(f"{path}:{node.start_mark.line + 1}: {message}")

    def walk(node, prefix: str, own: set[str]) -> None:
        for key, value in node.value:
            if key.tag == "tag:yaml.org,2002:merge":
                for merged in value.value if isinstance(value, yaml.SequenceNode) else [value]:
                    if not isinstance(merged, yaml.MappingNode):
                        refuse(key, "<< must name a mapping")
                    walk(merged, prefix, set())
                continue
            if not isinstance(key, yaml.ScalarNode):
                refuse(key, "a setting's name must be a word")
            name = prefix + key.value
            if name in own:
                refuse(key, f"setting {name!r} is given twice")
            own.add(name)
            if name in groups:
                if not isinstance(value, yaml.MappingNode):
                    refuse(key, f"{name} must hold settings of its own, as {name}: {{name: value}}")
                walk(value, f"{name}.", own)
            elif name in known and name != "config":
                found.pop(name, None)
                found[name] = Setting(_as_words(path, name, value, known[name], refuse), key.start_mark.line + 1)
            else:
                own_of_agent = name.startswith("agent.") and "agent_args" in known
                hint = f"; write agent_args: {{{name[6:]}: ...}}" if own_of_agent else nearest(name, known)
                refuse(key, f"unknown setting {name!r}{hint}")

    if not isinstance(root, yaml.MappingNode):
        raise UserError(f"{path}: must hold settings, one 'name: value' a line")
    if "arms" not in known and any(key.value == "arms" for key, _ in root.value):
        raise UserError(f"{path}: this is a study: python -m hrm_rl.ablate {path}")
    walk(root, group, set())
    return found


def _as_words(path: str | Path, name: str, node, action, refuse: Callable) -> list[str]:
    """One value of a file as the words of a flag."""
    import yaml

    hint = _hint(action)
    wrong = f"{name} must be {in_words(hint)}, not"
    flag = f"--{name}"
    if hint is dict:
        if not isinstance(node, yaml.MappingNode):
            refuse(node, f"{wrong} {_shown(node)}")
        values = construct(path, node)
        if not all(isinstance(key, str) for key in values):
            refuse(node, f"the names in {name} must be words")
        return [f"{flag}={json.dumps(values, default=str, skipkeys=True)}"]
    if isinstance(node, yaml.ScalarNode):
        if node.tag == "tag:yaml.org,2002:null" and not is_optional(hint):
            refuse(node, f"{wrong} nothing")
        if node.tag == "tag:yaml.org,2002:null":
            return [f"{flag}=null"]
        return [f"{flag}={_bracketed(node.value) if is_pair(hint) else node.value}"]
    listed = isinstance(node, yaml.SequenceNode) and all(isinstance(part, yaml.ScalarNode) for part in node.value)
    if listed and action.nargs in ("+", "*"):
        return [flag, *(part.value for part in node.value)]
    if listed and is_pair(hint) and len(node.value) == 2:
        return [f"{flag}=[{','.join(part.value for part in node.value)}]"]
    refuse(node, f"{wrong} {_shown(node)}")
    raise AssertionError


def _shown(node) -> str:
    import yaml

    if isinstance(node, yaml.ScalarNode):
        return shortened(node.value)
    if isinstance(node, yaml.MappingNode):
        return "a mapping"
    return f"a list of {len(node.value)}"


# --- wording ------------------------------------------------------------------------------------------------


def _reworded(message: str, known: Mapping[str, Any], words: Sequence[str], places: Mapping[str, str]) -> str:
    """jsonargparse's message as a user reads it: the flag or setting, what it must be, and what it is."""
    message = re.sub(r"\s*\n\s*", " ", message).strip()
    if match := re.match(r"argument --([\w.]+): expected (?:one|at least one) argument", message):
        return f"--{match[1]} needs a value"
    if match := re.match(r"unrecognized arguments: (.*)", message):
        return f"unexpected word {match[1].split()[0]!r}"
    if match := re.match(r"the following arguments are required: ([\w.]+)", message):
        return f"{f'--{match[1]}' if match[1] in known else match[1].upper()} must be given"  # STUDY is no flag
    match = re.search(r"[Kk]ey ['\"]([\w.]+)['\"]|argument (?:--)?([\w.]+):", message)
    name = match and (match[1] or match[2])
    if name in known:
        value = _given(name, words)
        wanted = in_words(_hint(known[name]))
        if name in places:
            return f"{places[name]}: {name} must be {wanted}, not {shortened(value)}"
        return f"--{name} must be {wanted}, not {shortened(value)}"
    return message


def _given(name: str, words: Sequence[str]) -> str:
    """The last value given to a flag."""
    value = ""
    for index, word in enumerate(words):
        flag, equals, text = word.partition("=")
        if flag == f"--{name}":
            value = text if equals else " ".join(_until_flag(words[index + 1 :]))
    return value


def _until_flag(words: Sequence[str]) -> Iterator[str]:
    for word in words:
        if word.startswith("--"):
            return
        yield word


# --- the frame ----------------------------------------------------------------------------------------------


def keep_freed_memory() -> None:
    """Let this process keep the memory that it frees (glibc; elsewhere nothing happens).

    By default glibc hands every large block back to the system, and each update asks for them again, page by page
    (docs/PERFORMANCE.md). For commands alone: a library has no say in it.
    """
    if sys.platform.startswith("linux"):
        with suppress(OSError, AttributeError):
            mallopt = ctypes.CDLL("libc.so.6").mallopt
            for option, size in ((_MMAP_THRESHOLD, 1 << 30), (_TRIM_THRESHOLD, (1 << 31) - 1), (_TOP_PAD, 1 << 28)):
                mallopt(option, size)


_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3  # of glibc's malloc.h


def run(main: Callable[[Sequence[str]], int | None]) -> None:
    """Call `main(argv)`; a UserError is one line on stderr and exit code 2 (--debug shows where it arose).

    Where the reader of the output goes away (`| head`), the work goes on to its end without a word, and the exit code
    is that of the work: a run or a study is not given up because nobody looks on.
    """
    with redirect_stdout(_patient(sys.stdout)), redirect_stderr(_patient(sys.stderr)):
        try:
            _run(main)
        finally:
            with suppress(OSError):  # what is left would else be written, and fail, as the interpreter ends
                print(end="", flush=True)


def _run(main: Callable[[Sequence[str]], int | None]) -> None:
    keep_freed_memory()
    argv = sys.argv[1:]
    debug = "--debug" in argv
    if debug:
        argv.remove("--debug")
    try:
        code = main(argv) or 0
        print(end="", flush=True)
        sys.exit(code)
    except UserError as error:
        if debug:
            raise
        print(f"error: {_printable(str(error))}", file=sys.stderr)
        sys.exit(2)
    except (MemoryError, RuntimeError) as error:
        if debug or not _is_out_of_memory(error):
            raise
        print("error: out of memory; lower num_envs (or batch_size), core.hidden_size or max_steps", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        sys.exit(130)
    except OSError as error:  # a full disk, a folder without rights
        if debug or error.strerror is None:
            raise
        where = f"{error.filename}: " if error.filename else ""
        print(f"error: {_printable(where + error.strerror)}", file=sys.stderr)
        sys.exit(2)


def _patient(stream):
    return None if stream is None else _Patient(stream)  # None: closed from the start (>&-)


class _Patient:
    """A stream of text whose reader may go away: what is written from then on is dropped."""

    def __init__(self, stream):
        self._stream = stream

    def write(self, text: str) -> int:
        with self._dropping():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._dropping():
            self._stream.flush()

    @contextmanager
    def _dropping(self) -> Iterator[None]:
        try:
            yield
        except BrokenPipeError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())  # where the stream itself will write what it still holds
            os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _printable(text: str) -> str:
    """One line without control characters, which a terminal would obey."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in " ".join(text.split()))


def _is_out_of_memory(error: Exception) -> bool:
    """torch.OutOfMemoryError on a GPU, a plain RuntimeError of the allocator on a CPU."""
    text = str(error)
    return isinstance(error, MemoryError) or any(
        said in text for said in ("out of memory", "can't allocate memory", "Storage size calculation overflowed")
    )
