"""Tags with a meaning, sums that stay on the device, files that go back to a checkpoint."""

from __future__ import annotations

import pytest
import torch
from hrm_testing import ROOT

from hrm_rl.errors import UserError
from hrm_rl.metrics import TAGS, MetricsWriter, Sums, markdown, read_metrics


def test_the_page_is_up_to_date():
    page = (ROOT / "docs" / "METRICS.md").read_text(encoding="utf-8")
    assert page == markdown(), "write it anew: python -m hrm_rl.metrics > docs/METRICS.md"


def test_every_tag_has_one_row():
    rows = [line for line in markdown().splitlines() if line.startswith("| `")]
    assert len(rows) == len(TAGS)
    for row in rows:
        assert row.replace("\\|", "").count("|") == 3, row  # a bare | in the text would open a cell
    assert all(text.endswith(".") for text in TAGS.values())


def test_sums():
    sums = Sums(torch.device("cpu"))
    assert sums.take() == {}
    for value in (1.0, 2.0, 4.0):
        sums.add("a", torch.tensor(value, requires_grad=True))
        sums.largest("m", torch.tensor(-value))
    sums.add("n", torch.tensor(3))
    assert not any(t.requires_grad for t in sums.values.values())
    assert sums.take() == {"a": 7.0, "m": -1.0, "n": 3.0}
    assert sums.take() == {}


def test_sums_do_not_lose_small_numbers():
    """float64: a million updates of 1 with 1e-9 each (negative control: float32 stops counting at 2^24)."""
    sums, single = Sums(torch.device("cpu")), torch.tensor(2.0**24)
    sums.add("n", torch.tensor(2.0**24))
    sums.add("n", torch.tensor(1.0))
    assert sums.take()["n"] == 2**24 + 1 and single + 1 == single


def test_writer_refuses_unknown_tags(tmp_path):
    writer = MetricsWriter(tmp_path)
    with pytest.raises(KeyError, match="loss/mystery"):
        writer.write(1, {"loss/mystery": 1.0})
    writer.close()


def test_lines_and_resume(tmp_path):
    writer = MetricsWriter(tmp_path)
    writer.write(1, {"loss/total": 1.5})
    position = writer.position()
    writer.write(2, {"loss/total": 1.25})
    writer.close()
    assert read_metrics(tmp_path) == [{"step": 1, "loss/total": 1.5}, {"step": 2, "loss/total": 1.25}]
    again = MetricsWriter(tmp_path, position, 1)  # the checkpoint was taken after line 1
    again.write(2, {"loss/total": 9.0})
    again.close()
    assert read_metrics(tmp_path) == [{"step": 1, "loss/total": 1.5}, {"step": 2, "loss/total": 9.0}]
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(UserError, match=r"metrics\.jsonl: shorter"):
        MetricsWriter(tmp_path, position, 1)


def test_tensorboard_keeps_what_was_logged_before_the_checkpoint(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    writer = MetricsWriter(tmp_path)
    for step in (1, 2, 3):
        writer.write(step, {"loss/total": float(step)})
    writer.close()
    again = MetricsWriter(tmp_path, 0, 2)  # back to the checkpoint of update 2
    again.write(3, {"loss/total": 9.0})
    again.close()
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert [(e.step, e.value) for e in board.Scalars("loss/total")] == [(1, 1.0), (2, 2.0), (3, 9.0)]
