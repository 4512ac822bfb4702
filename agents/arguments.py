"""The arguments of an agent: from the command line (`--agent.NAME value`) to its constructor, by its annotations."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from hrm_rl.errors import UserError, nearest

#: What the builder of an agent passes by itself (`agents.make_agent`): no flags.
OFFERED = ("core", "max_steps", "bootstrap")
_FLAG = "--agent."


def split_flags(argv: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """(the other words, {NAME: value as text}) of a command line with `--agent.NAME value` or `--agent.NAME=value`.

    A name may be spelt with - or _. UserError for a flag without a value.
    """
    rest, found, words = [], {}, iter(argv)
    for word in words:
        if not word.startswith(_FLAG):
            rest.append(word)
            continue
        name, equals, value = word[len(_FLAG) :].partition("=")
        if not equals:
            value = next(words, None)
        if value is None or (not equals and value.startswith("--")):
            raise UserError(f"{_FLAG}{name}: needs a value")
        found[name.replace("-", "_")] = value
    return rest, found


def check_arguments(agent_class: type, values: dict[str, Any]) -> dict[str, Any]:
    """`values` (text of flags, or plain values of YAML) as the types that the constructor names.

    UserError, one line, for a name it does not take (with the nearest one) or a value that does not fit.
    """
    parameters = inspect.signature(agent_class).parameters
    open_ended = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    takes = [name for name in parameters if name not in OFFERED and name not in ("args", "kwargs")]
    for name in values:
        if name not in parameters and not open_ended:
            known = ", ".join(takes) or "none"
            raise UserError(f"agent_args of {agent_class.__name__}: unknown {name!r}{nearest(name, takes)} "
                            f"(it takes: {known})")  # fmt: skip
    typed = {name: value for name, value in values.items() if name in takes}
    return values | {name: _parse(agent_class, name, value) for name, value in typed.items()}


def _parse(agent_class: type, name: str, value: Any) -> Any:
    """One argument, read by jsonargparse as the constructor annotates it."""
    from jsonargparse import ArgumentError, ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    others = {p for p in inspect.signature(agent_class).parameters if p != name}
    try:
        parser.add_class_arguments(agent_class, skip=others, fail_untyped=False)
    except Exception:  # an annotation that nothing can make sense of: the constructor is asked as it is
        return value
    if not any(action.dest == name for action in parser._actions):
        return value
    try:
        if isinstance(value, str):
            return parser.parse_args([f"--{name}={value}"])[name]
        return parser.parse_object({name: value})[name]
    except (ArgumentError, TypeError, ValueError) as error:
        annotation = inspect.signature(agent_class).parameters[name].annotation
        wanted = getattr(annotation, "__name__", None) or str(annotation)
        raise UserError(f"agent_args of {agent_class.__name__}: {name} must be {wanted}, not {value!r}") from error
