"""Every recipe in configs/ reads, and says in its first lines how to run it."""

from pathlib import Path

import pytest

from hrm_rl import cli
from hrm_rl.study.spec import is_study
from hrm_rl.train import build_parser, read_options

FOLDER = Path(__file__).resolve().parents[1] / "configs"
CONFIGS = sorted(path for path in FOLDER.glob("*.yaml") if not is_study(path))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_recipe_reads(path):
    config, agent, arguments = read_options(cli.parse(build_parser(), ["--config", str(path)]))
    assert f"--config configs/{path.name}" in path.read_text()
    assert config.core.seq_len == config.rules.seq_len and isinstance(agent, type)
    assert bool(arguments) == path.stem.startswith("sb3_")


def test_the_paper_recipe_is_the_papers():
    """HRM's released Sudoku recipe: sizes from its README and configuration; 27 M parameters."""
    path = next(p for p in CONFIGS if p.stem == "sudoku-extreme-1k")
    config = read_options(cli.parse(build_parser(), ["--config", str(path)]))[0]
    assert (config.num_envs, config.max_steps, config.loss, config.bootstrap) == (768, 16, "stablemax", "extra_forward")
    o, c = config.optim, config.core
    assert (o.optimizer, o.lr, o.weight_decay, o.ema) == ("adam_atan2", 1e-4, 1.0, 0)
    assert (o.embedding, o.embedding_lr, o.embedding_weight_decay) == ("sign_sgd", 1e-4, 1.0)
    assert (o.warmup_steps, o.schedule, o.grad_clip) == (2000, "constant", 0)
    assert (c.token_mixing, c.positions, c.hidden_size, c.H_layers, c.L_layers) == ("attention", "rope", 512, 4, 4)
    assert config.curriculum == (0, 0) and config.clues == (0, 0)
    from hrm_rl.core import HRMCore

    assert 27.2e6 < sum(p.numel() for p in HRMCore(c).parameters()) < 27.4e6
