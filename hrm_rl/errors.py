"""The exception for mistakes a user can mend: commands print it as one line and exit with 2."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable


class UserError(ValueError):
    """Bad input. The message is one line that names what is wrong and where."""


class NonFiniteError(UserError):
    """A loss, a gradient, a weight or an agent's score is not a number; training cannot go on."""


def nearest(name: str, choices: Iterable[str]) -> str:
    """A hint ("; did you mean 'x'?") for a misspelt name, or an empty string."""
    close = difflib.get_close_matches(name, list(choices), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


def near_class(error: Exception, name: str, fits: Callable[[type], bool]) -> str:
    """`nearest` among the classes of a module that has no attribute `name`, as `error` says; empty for other errors."""
    module = getattr(error, "obj", None) if isinstance(error, AttributeError) else None
    there = vars(module) if inspect.ismodule(module) else {}
    return nearest(name, [known for known, held in there.items() if isinstance(held, type) and fits(held)])
