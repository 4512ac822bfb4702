"""Puts the repository root (so that tests run from a plain checkout) and the tests' own helpers on sys.path."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import settings

TESTS = Path(__file__).resolve().parent
for folder in (TESTS / "support", TESTS.parent):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

# The same examples in every run, so that a change is not refused for what chance found. A hunt for new ones (what it
# finds is worth an @example): python -m pytest --hypothesis-profile hunt
settings.register_profile("fixed", derandomize=True, deadline=None, print_blob=True)
settings.register_profile("hunt", settings.get_profile("default"), deadline=None, print_blob=True)
settings.load_profile("fixed")


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory):
    """Recordings that commands keep, here and in child processes, go to a folder of the session, not to the user's."""
    with pytest.MonkeyPatch.context() as patch:
        fonts = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "matplotlib"
        if "MPLCONFIGDIR" not in os.environ and fonts.is_dir():  # its list of fonts takes seconds to make
            patch.setenv("MPLCONFIGDIR", str(fonts))
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def _own_generator():
    """Every test starts from the same global generator and leaves the one it found."""
    state = torch.get_rng_state()
    torch.manual_seed(0)
    yield
    torch.set_rng_state(state)


@pytest.fixture
def puzzles():
    """Sixteen 4x4 Sudokus with six blanks each."""
    from hrm_testing import small_puzzles

    return small_puzzles(16)


@pytest.fixture(autouse=True, scope="session")
def _memory_as_it_is():
    """Commands tune malloc for their whole process; tests that run them in this one leave it alone."""
    from hrm_rl import cli

    own, cli.keep_freed_memory = cli.keep_freed_memory, lambda: None
    yield
    cli.keep_freed_memory = own
