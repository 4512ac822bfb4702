"""The exception for mistakes a user can mend: commands print it as one line and exit with 2."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Bad input. The message is one line that names what is wrong and where."""


class NonFiniteError(UserError):
    """A loss, a gradient, a weight or an agent's score is not a number; training cannot go on."""


def nearest(name: str, choices: Iterable[str]) -> str:
    """A hint ("; did you mean 'x'?") for a misspelt name, or an empty string."""
    close = difflib.get_close_matches(name, list(choices), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""
