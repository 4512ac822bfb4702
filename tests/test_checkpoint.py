"""Checkpoints are written whole or not at all, and a damaged one says so by name."""

from __future__ import annotations

import json
import os
import shutil
import signal

import pytest
import torch
from hrm_testing import small_trainer

from hrm_rl import checkpoint
from hrm_rl.checkpoint import list_checkpoints, load_checkpoint, save_checkpoint, write_atomically
from hrm_rl.core import CoreConfig, HRMCore
from hrm_rl.core.io import MODEL_FILE, load_core, model_bytes
from hrm_rl.errors import UserError

FILES = (checkpoint.STATE_FILE, checkpoint.TRAIN_FILE, MODEL_FILE)


def small(run, step=4):
    tensors = {"a": torch.arange(6.0).view(2, 3), "b": torch.tensor([True, False]), "c": torch.tensor(2**40)}
    return save_checkpoint(run, step, b"model", tensors, {"elapsed": 1.25, "list": [1, 2], "nested": {"x": None}})


def test_what_is_written_is_read(tmp_path):
    path = small(tmp_path)
    tensors, state = load_checkpoint(path)
    assert path.name == "step-00000004" and {f.name for f in path.iterdir()} == set(FILES)
    assert torch.equal(tensors["a"], torch.arange(6.0).view(2, 3)) and tensors["a"].dtype == torch.float32
    assert tensors["b"].tolist() == [True, False] and tensors["c"].item() == 2**40
    assert (state["elapsed"], state["list"], state["nested"], state["step"]) == (1.25, [1, 2], {"x": None}, 4)


def flip(content: bytes, where: float) -> bytes:
    index = int(where * (len(content) - 1))
    return content[:index] + bytes([content[index] ^ 1]) + content[index + 1 :]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "missing", "foreign"])
def test_damage_is_named(tmp_path, name, damage):
    trainer = small_trainer()
    trainer.update()
    path = save_checkpoint(tmp_path, 1, trainer.model(), *trainer.state())
    content = (path / name).read_bytes()
    for where in (0.0, 0.02, 0.3, 0.5, 0.7, 0.99) if damage == "flip" else (0.5,):
        spoilt = {"flip": flip(content, where), "cut": content[: len(content) // 2], "empty": b"", "foreign": b"[1, 2]",
                  "missing": None}[damage]  # fmt: skip
        (path / name).unlink(missing_ok=True)
        if spoilt is not None:
            (path / name).write_bytes(spoilt)
            if name == checkpoint.STATE_FILE and damage == "flip" and same_values(spoilt, content):
                continue  # a space that became another one
        with pytest.raises(UserError) as error:
            load_checkpoint(path)
        assert str(path / name) in str(error.value)
        assert "\n" not in str(error.value)


def same_values(a: bytes, b: bytes) -> bool:
    try:
        return json.loads(a) == json.loads(b)
    except ValueError:
        return False


def test_every_value_of_the_state_is_guarded(tmp_path):
    path = small(tmp_path)
    file = path / checkpoint.STATE_FILE
    state = json.loads(file.read_bytes())
    for change in ({"step": 5}, {"elapsed": 1.5}, {"list": [2, 1]}, {"more": 0}):
        file.write_text(json.dumps(state | change))
        with pytest.raises(UserError, match=r"state\.json: damaged"):
            load_checkpoint(path)
    file.write_text(json.dumps(state))
    load_checkpoint(path)


def test_the_newest_two_are_kept(tmp_path):
    for step in (2, 10, 100, 1000):
        small(tmp_path, step)
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step-00000100", "step-00001000"]
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["step-00000100", "step-00001000"]
    small(tmp_path, 1000)  # the same step again replaces it
    assert len(list_checkpoints(tmp_path)) == 2
    assert list_checkpoints(tmp_path / "elsewhere") == []


def test_a_full_disk_leaves_the_last_good_one(tmp_path, monkeypatch):
    good = small(tmp_path, 1)
    own = checkpoint._write

    def full(path, content):
        if path.name == checkpoint.STATE_FILE:
            raise OSError(28, "No space left on device")
        own(path, content)

    monkeypatch.setattr(checkpoint, "_write", full)
    with pytest.raises(OSError, match="No space left"):
        small(tmp_path, 2)
    assert list_checkpoints(tmp_path) == [good]
    assert os.listdir(tmp_path / "checkpoints") == [good.name]
    load_checkpoint(good)


def test_a_half_written_one_is_not_taken_for_a_checkpoint(tmp_path):
    good = small(tmp_path, 1)
    (tmp_path / "checkpoints" / ".writing-1").mkdir()
    half = tmp_path / "checkpoints" / "step-00000009"
    half.mkdir()
    (half / MODEL_FILE).write_bytes(b"half")
    assert list_checkpoints(tmp_path) == [good]


def killed_while_saving(run, step: int, point: int, half: bool) -> bool:
    """Save in a forked process that dies by SIGKILL at its `point`-th call of the file system; True if it died.

    half: die after the call instead of before it, and in the middle of the content where it writes.
    """
    pid = os.fork()
    if pid:
        status = os.waitpid(pid, 0)[1]
        assert status in (0, signal.SIGKILL), status
        return status != 0
    try:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(60)  # should it ever wait for a lock that a thread of the parent held
        save_and_die(run, step, point, half)
        os._exit(0)
    finally:
        os._exit(1)  # nothing of the tests goes on in this process


def save_and_die(run, step: int, point: int, half: bool) -> None:
    calls = 0

    def deadly(function):
        def call(*arguments, **keywords):
            nonlocal calls
            calls += 1
            if calls == point and not half:
                os.kill(os.getpid(), signal.SIGKILL)
            try:
                return function(*arguments, **keywords)
            finally:
                if calls == point:
                    os.kill(os.getpid(), signal.SIGKILL)

        return call

    def write(path, content):
        with open(path, "wb", buffering=0) as file:
            file.write(content[: len(content) // 2])
            deadly(file.write)(content[len(content) // 2 :])

    for name in ("mkdir", "rename", "fsync"):
        setattr(os, name, deadly(getattr(os, name)))
    checkpoint._write = write
    shutil.rmtree = deadly(shutil.rmtree)
    small(run, step)


@pytest.mark.parametrize("half", [False, True])
def test_a_kill_at_any_point_of_writing_a_checkpoint(tmp_path, half):
    """What is listed always loads, nothing is lost, and the next one clears up."""
    deaths = 0
    for point in range(1, 50):
        run = tmp_path / str(point)
        for step in (1, 2, 3):
            small(run, step)
        if not killed_while_saving(run, 4, point, half):
            break
        deaths += 1
        found = list_checkpoints(run)
        assert found[-1].name in ("step-00000003", "step-00000004")
        for path in found[-2:]:
            load_checkpoint(path)
        small(run, 5)
        assert sorted(os.listdir(run / "checkpoints")) == [found[-1].name, "step-00000005"]
    assert deaths >= 8  # mkdir, three files, two folders flushed, rename, the oldest removed


def test_a_damaged_one_of_the_same_step_is_replaced_and_a_whole_one_kept(tmp_path):
    path = small(tmp_path, 7)
    before = (path / checkpoint.STATE_FILE).stat().st_mtime_ns
    assert small(tmp_path, 7) == path and (path / checkpoint.STATE_FILE).stat().st_mtime_ns == before
    (path / MODEL_FILE).write_bytes(b"cut")
    assert not checkpoint.is_whole(path)
    small(tmp_path, 7)
    assert checkpoint.is_whole(path)


def test_write_atomically(tmp_path, monkeypatch):
    path = tmp_path / "report.json"
    write_atomically(path, b"one")
    write_atomically(path, b"two")
    assert path.read_bytes() == b"two"

    def full(path, content):
        path.write_bytes(content[:1])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "_write", full)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, b"three")
    assert path.read_bytes() == b"two" and os.listdir(tmp_path) == ["report.json"]


# --- model files --------------------------------------------------------------------------------------------


def test_a_model_is_read_from_a_run_a_checkpoint_or_a_file(tmp_path):
    trainer = small_trainer(optim={"ema": 0.5})
    for step in (1, 2):
        trainer.update()
        path = save_checkpoint(tmp_path, step, trainer.model({"note": step}), *trainer.state())
    core, agent = trainer.evaluation_models()
    for source in (tmp_path, path, path / MODEL_FILE):
        loaded = load_core(source)
        assert loaded.meta.items() >= {"note": 2, "max_steps": 4, "bootstrap": "shared_prefix"}.items()
        assert loaded.core.config == core.config
        assert all(torch.equal(t, core.state_dict()[n]) for n, t in loaded.core.state_dict().items())
        assert all(torch.equal(t, agent.q_head.state_dict()[n]) for n, t in loaded.q_head.state_dict().items())


def test_a_model_without_a_q_head(tmp_path):
    core = small_trainer().core
    (tmp_path / "core.safetensors").write_bytes(model_bytes(core, None))
    assert load_core(tmp_path / "core.safetensors").q_head is None


def test_what_is_wrong_with_a_model_file_is_said(tmp_path):
    from safetensors.torch import load, save

    trainer = small_trainer()
    file = tmp_path / "m.safetensors"
    good = model_bytes(trainer.core, trainer.agent.q_head)
    tensors = load(good)

    def rejected(content: bytes, said: str) -> None:
        file.write_bytes(content)
        with pytest.raises(UserError, match=said) as error:
            load_core(file)
        assert str(file) in str(error.value) and "\n" not in str(error.value)

    file.write_bytes(good)
    load_core(file)
    from safetensors import safe_open

    with safe_open(file, framework="pt") as opened:
        header = opened.metadata()
    rejected(good[: len(good) // 2], "not a readable safetensors file")
    rejected(save(tensors), "not a model of this project")
    rejected(save(tensors, header | {"core": '{"hidden_sise": 16}'}), "hidden_size")
    rejected(save({n: t for n, t in tensors.items() if n != "core.lm_head.weight"}, header), "lm_head.weight")
    rejected(save(tensors | {"core.extra": torch.zeros(1)}, header), "extra")
    rejected(save(tensors | {"core.lm_head.weight": torch.zeros(7, 16)}, header), r"\(7, 16\)")
    with pytest.raises(UserError, match="no such file"):
        load_core(tmp_path / "nothing.safetensors")
    with pytest.raises(UserError, match="holds no model.safetensors"):
        load_core(tmp_path)


def test_a_flipped_bit_in_the_model_of_a_checkpoint_is_noticed(tmp_path):
    config = CoreConfig(vocab_size=6, seq_len=16, hidden_size=16, num_heads=2, inner_multiple=16, puzzle_emb_ndim=16)
    folder = save_checkpoint(tmp_path, 3, model_bytes(HRMCore(config), None), {}, {})
    load_core(tmp_path)  # as written it loads
    content = bytearray((folder / MODEL_FILE).read_bytes())
    content[-5] ^= 4
    (folder / MODEL_FILE).write_bytes(content)
    with pytest.raises(UserError, match="model.safetensors: damaged"):
        load_core(tmp_path)
