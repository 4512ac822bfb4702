"""What the commands share: a parser that speaks in one line, and the frame around `main`."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Container, Sequence

from hrm_rl.errors import UserError, nearest


def make_parser(prog: str, description: str):
    """A jsonargparse parser whose errors are UserErrors and that takes a YAML file by --config."""
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(prog=prog, description=description, exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--config", action="config", help="YAML file with settings; flags after it win.")
    return parser


def parse(parser, argv: Sequence[str]):
    """Parse; flags may be spelt with - or _. UserError in one line for anything that does not fit."""
    from jsonargparse import ArgumentError

    own = {action.dest for action in parser._actions}
    argv = [_flag(word, own) for word in argv]
    try:
        return parser.parse_args(argv)
    except (ArgumentError, TypeError, ValueError) as error:
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from None
        raise UserError(_one_line(str(error), parser)) from error


#: Short spellings of nested flags.
ALIASES = {"dtype": "core.dtype"}


def _flag(word: str, own: Container[str] = ()) -> str:
    """--q-to-core=x -> --q_to_core=x, --dtype -> --core.dtype; values and single dashes stay as they are.

    A short spelling that is one of the parser's `own` flags is no alias.
    """
    match = re.match(r"--([A-Za-z][\w.\-]*)(=.*)?$", word, re.DOTALL)
    if match is None:
        return word
    name = match[1].replace("-", "_")
    return f"--{name if name in own else ALIASES.get(name, name)}{match[2] or ''}"


def _one_line(message: str, parser) -> str:
    """jsonargparse's message on one line, with the nearest name where a flag or key is unknown."""
    message = re.sub(r"\s*\n\s*", " ", message).strip()
    unknown = re.search(r"(?:arguments: --|[Oo]ption ['\"]|[Kk]ey:? ['\"]|nested key: ?['\"]?)([\w.]+)", message)
    known = [action.dest for action in parser._actions if "==" not in action.dest]
    if unknown and unknown[1] not in known:
        message += nearest(unknown[1], known)
    return message


def run(main: Callable[[Sequence[str]], int | None]) -> None:
    """Call `main(argv)`; a UserError is one line on stderr and exit code 2 (--debug shows where it arose)."""
    argv = sys.argv[1:]
    debug = "--debug" in argv
    if debug:
        argv.remove("--debug")
    try:
        sys.exit(main(argv) or 0)
    except UserError as error:
        if debug:
            raise
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except (MemoryError, RuntimeError) as error:
        if debug or not _is_out_of_memory(error):
            raise
        print("error: out of memory; lower num_envs (or batch-size), core.hidden_size or max_steps", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output has gone (`| head`)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


def _is_out_of_memory(error: Exception) -> bool:
    """torch.OutOfMemoryError on a GPU, a plain RuntimeError of the allocator on a CPU."""
    return isinstance(error, MemoryError) or "out of memory" in str(error) or "can't allocate memory" in str(error)
