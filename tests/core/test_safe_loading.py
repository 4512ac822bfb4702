"""Checkpoints from elsewhere: weights are read, nothing is run, and the rest is refused in one line."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import sys
import types
import warnings
import zipfile
from pathlib import Path

import pytest
import torch
import yaml
from hrm_testing import golden, released_model, small_core, tiny_config, within

from hrm_rl import evaluate, train
from hrm_rl.core import HRMCore
from hrm_rl.core.io import load_core, model_bytes
from hrm_rl.core.q_head import QHead
from hrm_rl.core.released import from_released, to_released
from hrm_rl.errors import UserError
from hrm_rl.tasks import load_puzzles
from hrm_rl.tasks.maze import CHARACTERS, Maze, MazeSpec

ARCH = {
    "name": "hrm.hrm_act_v1@HierarchicalReasoningModel_ACTV1", "H_cycles": 2, "L_cycles": 2, "H_layers": 2,
    "L_layers": 2, "hidden_size": 32, "num_heads": 2, "expansion": 4, "pos_encodings": "rope", "halt_max_steps": 4,
    "puzzle_emb_ndim": 32, "forward_dtype": "float32", "loss": {"name": "losses@ACTLossHead"},
}  # fmt: skip


SUDOKU, MAZE = "hf://sapientinc/HRM-checkpoint-sudoku-extreme", "hf://sapientinc/HRM-checkpoint-maze-30x30-hard"


def released_file(folder, tensors=None, arch=ARCH, name="step_26040", data="data/sudoku-4x4"):
    """A released checkpoint with the golden weights, named as the release names it."""
    tensors = golden("weights_tiny") if tensors is None else tensors
    named = {f"_orig_mod.model.{key}": value for key, value in tensors.items()}
    torch.save(named, folder / name)
    if arch is not None:
        settings = {"arch": arch, "epochs": 3, "lr": 1e-4} | ({"data_path": data} if data else {})
        (folder / "all_config.yaml").write_text(yaml.safe_dump(settings))
    return folder / name


def refused(path) -> str:
    with pytest.raises(UserError) as error:
        load_core(path)
    said = str(error.value)
    assert "\n" not in said and str(path) in said
    return said


def outputs(core, head, steps=2):
    tokens = golden("forward_tiny")["inputs"]
    state = core.initial_state(len(tokens))
    for _ in range(steps):
        state, logits = core(tokens, state)
    return state.z_H, logits, head(state.z_H)


@torch.no_grad()
def test_a_released_checkpoint_gives_the_same_outputs(tmp_path):
    core, head = released_model(golden("weights_tiny"))
    loaded = load_core(released_file(tmp_path))
    assert loaded.core.config == tiny_config() and loaded.meta["max_steps"] == 4
    for got, wanted in zip(outputs(loaded.core, loaded.q_head), outputs(core, head), strict=True):
        assert torch.equal(got, wanted)
    again = to_released(loaded.core.state_dict(), loaded.q_head.state_dict())
    torch.save(again, tmp_path / "again")
    assert from_released(again)[0].keys() == core.state_dict().keys()
    twin = load_core(tmp_path / "again")
    assert torch.equal(outputs(twin.core, twin.q_head)[1], outputs(core, head)[1])
    other = load_core(released_file(tmp_path, arch=ARCH | {"num_heads": 4}))  # the control: heads do matter
    assert not torch.equal(outputs(other.core, other.q_head)[1], outputs(core, head)[1])


@torch.no_grad()
def test_other_sizes_of_the_release(tmp_path):
    """Learned positions and fewer layers; no puzzle embedding; two puzzle positions (48 of 2 x 32 features)."""
    learned = within(golden("learned_pos"), "w.")
    arch = ARCH | {"H_layers": 1, "L_layers": 1, "L_cycles": 3, "pos_encodings": "learned"}
    config = load_core(released_file(tmp_path, learned, arch)).core.config
    assert (config.positions, config.seq_len, config.H_layers, config.L_cycles) == ("learned", 16, 1, 3)
    wide = within(golden("extras"), "wide.w.")
    arch = ARCH | {"puzzle_emb_ndim": 48, "H_layers": 1, "L_layers": 1}
    config = load_core(released_file(tmp_path, wide, arch)).core.config
    assert (config.prefix_len, config.num_puzzle_identifiers) == (2, 3)


def test_the_published_size_needs_no_configuration(tmp_path):
    from hrm_rl.core import CoreConfig

    config = CoreConfig(hidden_size=512, num_heads=8, H_layers=1, L_layers=1, puzzle_emb_ndim=512, dtype="float32")
    core, head = HRMCore(config), QHead(512)
    torch.save(to_released(core.state_dict(), head.state_dict()), tmp_path / "step_1")
    loaded = load_core(tmp_path / "step_1").core
    assert (loaded.config.seq_len, loaded.config.num_heads, loaded.config.H_cycles) == (81, 8, 2)
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), core.parameters(), strict=True))


def test_the_commands_take_it(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = released_file(tmp_path)
    words = [str(path), "--limit", "8", "--device", "cpu", "--dtype", "float32", "--out", "report.json"]
    assert evaluate.main(words) == 0
    assert json.loads((tmp_path / "report.json").read_text())["trained_with_max_steps"] == 4
    sizes = {"hidden_size": 32, "num_heads": 2, "puzzle_emb_ndim": 32, "dtype": "float32"}
    flags = ["--size", "4", "--init_core", str(path), "--total-steps", "1", "--eval-every", "0", "--num-envs", "4",
             "--compile", "off", "--device", "cpu", "--test-limit", "8", "--max-steps", "2", "--name", "r",
             *(f"--core.{name}={value}" for name, value in sizes.items())]  # fmt: skip
    assert train.main(flags) == 0 and (tmp_path / "runs" / "r" / "report.json").exists()
    assert len(load_puzzles("sudoku-4", split="test", limit=8)) == 8


# --- mazes, and the Hub -----------------------------------------------------------------------------------------


def tiny(vocab_size: int, seq_len: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """The released names and values of a tiny HRM for other puzzles."""
    generator = torch.Generator().manual_seed(seed)
    core, head = HRMCore(tiny_config(vocab_size=vocab_size, seq_len=seq_len), generator), QHead(32)
    return {name.removeprefix("model."): value
            for name, value in to_released(core.state_dict(), head.state_dict(), "model.inner.").items()}  # fmt: skip


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A Hub of two model repositories as the public ones are laid out, and of one data set; notes what is asked for."""
    asked = []
    for source, vocab, tokens, data in ((SUDOKU, 11, 81, "data/sudoku-extreme-1k-aug-1000"),
                                        (MAZE, 6, 900, "data/maze-30x30-hard-1k")):  # fmt: skip
        folder = tmp_path / source.removeprefix("hf://")
        folder.mkdir(parents=True)
        arch = {name: value for name, value in ARCH.items() if name != "forward_dtype"}
        released_file(folder, tiny(vocab, tokens), arch | {"halt_max_steps": 2}, "checkpoint", data)
    mazes = Maze.generate(MazeSpec(side=30, count=3, min_length=60, seed=5))
    folder = tmp_path / "sapientinc" / "maze-30x30-hard-1k"
    folder.mkdir()
    lines = [",".join(("maze", *("".join(CHARACTERS[place] for place in grid) for grid in pair), "60"))
             for pair in zip(mazes.questions, mazes.answers, strict=True)]  # fmt: skip
    (folder / "test.csv").write_text("\n".join(("source,question,answer,rating", *lines)) + "\n")

    def download(repo_id, filename, repo_type):
        asked.append((repo_id, filename, repo_type))
        return str(tmp_path / repo_id / filename)

    monkeypatch.setitem(sys.modules, "huggingface_hub", types.SimpleNamespace(hf_hub_download=download))
    return asked


def test_the_released_maze_checkpoint(hub, tmp_path, capsys):
    """30x30: the size stands in neither the weights nor the architecture, but in the name of its data."""
    out = tmp_path / "report.json"
    words = ["--core", MAZE, "--data", "hf://sapientinc/maze-30x30-hard-1k", "--device", "cpu", "--dtype", "float32",
             "--batch-size", "3"]  # fmt: skip
    assert evaluate.main([*words, "--out", str(out)]) == 0
    repo, data = MAZE.removeprefix("hf://"), "sapientinc/maze-30x30-hard-1k"
    assert hub == [(repo, "all_config.yaml", "model"), (repo, "checkpoint", "model"), (data, "test.csv", "dataset")]
    report = json.loads(out.read_text())
    assert report["test"].startswith("hf://sapientinc/maze-30x30-hard-1k") and report["trained_with_max_steps"] == 2
    assert report["puzzles"] == 3 and "learned, at most 2" in capsys.readouterr().out
    loaded = load_core(MAZE)
    assert (loaded.core.config.seq_len, loaded.core.config.vocab_size, loaded.core.num_positions) == (900, 6, 901)
    assert evaluate.task_of(loaded) == ("maze", 30)
    assert torch.equal(loaded.core.lm_head.weight, tiny(6, 900)["inner.lm_head.weight"])


def test_the_released_sudoku_checkpoint(hub, capsys):
    assert evaluate.main([SUDOKU, "--limit", "4", "--device", "cpu", "--dtype", "float32"]) == 0
    assert "sudoku-9 (test)" in capsys.readouterr().out
    assert evaluate.task_of(load_core(Path(SUDOKU))) == ("sudoku", 9)  # a Path loses a slash
    with pytest.raises(UserError, match="say once what to evaluate"):
        evaluate.main([SUDOKU, "--core", MAZE])


@pytest.mark.parametrize(
    ("values", "data", "arch", "tokens"),
    [(6, "data/maze-30x30-hard-1k", {}, 900), (6, "data/maze-30x30-hard-1k/", {}, 900), (6, "my/4x4", {}, 16),
     (6, "", {}, 0), (6, "data/maze-hard", {}, 0), (6, "30x30/mazes", {}, 0), (6, "", {"seq_len": 100}, 100),
     (6, "data/maze-30x30-hard-1k", {"seq_len": 100}, 100), (11, "", {}, 81), (11, "data/sudoku-1024x1024", {}, 81),
     (8, "", {}, 36), (12, "data/arc-aug-1000", {}, 0)],
)  # fmt: skip
def test_how_many_tokens_a_released_puzzle_has(tmp_path, values, data, arch, tokens):
    path = released_file(tmp_path, tiny(values, 4), ARCH | arch, data=data)
    if tokens:
        assert load_core(path).core.config.seq_len == tokens
    else:
        assert "seq_len (tokens of a puzzle) does not show in the weights; add it under arch:" in refused(path)


def test_a_hub_that_gives_nothing_is_one_line(monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    errors = pytest.importorskip("huggingface_hub.errors")

    def said(error: Exception, source: str = MAZE) -> str:
        def download(**_):
            raise error

        monkeypatch.setattr(hub, "hf_hub_download", download)
        with pytest.raises(UserError) as refusal:
            evaluate.main(["--core", source])
        return str(refusal.value)

    offline = errors.LocalEntryNotFoundError("cannot reach\nthe hub")
    reason = "the Hub cannot be reached, and no copy lies in the cache"
    assert said(offline) == f"{MAZE}: cannot fetch all_config.yaml ({reason})"
    assert said(offline, "hf://checkpoint") == "hf://checkpoint: must read hf://owner/name"
    missing = errors.EntryNotFoundError("404")
    assert said(missing) == f"{MAZE}: cannot fetch all_config.yaml (the model holds no such file)"
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match="needs huggingface_hub"):
        load_core(MAZE)


class Hostile:
    """Touches a file when it is unpickled."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return os.mkdir, (self.marker,)


def test_a_hostile_pickle_does_not_run(tmp_path):
    marker = tmp_path / "hacked"
    path = tmp_path / "step_1"
    torch.save({"inner.H_init": Hostile(marker)}, path)
    assert "refused: it asks for posix.mkdir, and loading a checkpoint runs no code" in refused(path)
    for content in (pickle.dumps(Hostile(marker)), pickle.dumps({"a": Hostile(marker)}, protocol=0)):
        path.write_bytes(content)
        assert "not a readable safetensors file" in refused(path)
    torch.save(Hostile(marker), path, _use_new_zipfile_serialization=False)
    assert "not a readable safetensors file" in refused(path)
    assert not marker.exists()
    torch.save({"inner.H_init": Hostile(marker)}, path)  # the control: whoever unpickles it runs it
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.load(path, weights_only=False)
    assert marker.exists()


def repacked(path, change):
    """Write the archive at `path` anew; change(name, content) -> [(ZipInfo or name, content)]."""
    with zipfile.ZipFile(path) as archive:
        members = [(name, archive.read(name)) for name in archive.namelist()]
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, content in members:
            for new_name, new_content, kind in change(name, content):
                archive.writestr(new_name, new_content, kind)
    path.write_bytes(buffer.getvalue())


@pytest.mark.parametrize("name", ["../x", "/etc/x", "a/../../x", "..\\x", "C:\\x"])
def test_a_member_that_leads_elsewhere(tmp_path, name):
    path = released_file(tmp_path)
    repacked(path, lambda n, c: [(n, c, 0), (name, b"x", 0)] if n.endswith("data.pkl") else [(n, c, 0)])
    assert "leads outside of the archive" in refused(path)
    assert not (tmp_path.parent / "x").exists()


def test_archives_that_torch_save_has_not_written(tmp_path):
    path = released_file(tmp_path)
    repacked(path, lambda n, c: [(n, c, zipfile.ZIP_DEFLATED)])
    assert "is packed" in refused(path)
    path = released_file(tmp_path)
    repacked(path, lambda n, c: [(n, c, 0), (n, c, 0)])
    assert "twice" in refused(path)
    path = released_file(tmp_path)
    whole = path.read_bytes()
    for cut in (5, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:cut])
        assert "archive" in refused(path)


def test_a_bit_flipped_archive_is_read_or_refused(tmp_path):
    path = released_file(tmp_path)
    whole = path.read_bytes()
    for position in range(60, len(whole), len(whole) // 60):
        turned = bytearray(whole)
        turned[position] ^= 0x10
        path.write_bytes(turned)
        try:
            load_core(path)
        except UserError as error:
            assert "\n" not in str(error) and str(path) in str(error)


def test_state_dicts_that_do_not_fit(tmp_path):
    def said(change, arch=ARCH):
        tensors = dict(golden("weights_tiny"))
        change(tensors)
        return refused(released_file(tmp_path, tensors, arch))

    base = "inner.H_level.layers.0.self_attn."
    assert "holds no tensor 'H_level.layers.0.self_attn.o_proj.weight'" in said(lambda t: t.pop(base + "o_proj.weight"))
    shape = said(lambda t: t.update({base + "o_proj.weight": torch.zeros(3, 32)}))
    assert "'H_level.layers.0.self_attn.o_proj.weight' has shape (3, 32), the model needs (32, 32)" in shape
    assert "'H_init' holds torch.int64" in said(lambda t: t.update({"inner.H_init": torch.zeros(32).long()}))
    assert "not finite" in said(lambda t: t.update({"inner.H_init": torch.full((32,), torch.nan)}))
    assert "'extra' has no place" in said(lambda t: t.update({"inner.extra": torch.zeros(1)}))
    assert "is not a name of the released HRM model" in said(lambda t: t.update({"../x": torch.zeros(1)}))
    assert "does not hold the values" in said(lambda t: t.update({"inner.H_init": torch.zeros(1).expand(1 << 40)}))
    assert "has 1 axes, not 2" in said(lambda t: t.update({"inner.embed_tokens.embedding_weight": torch.zeros(1)}))
    assert "num_heads does not show" in said(lambda t: (tmp_path / "all_config.yaml").unlink(missing_ok=True), None)
    assert "hidden_size is 32 in the weights and 64" in said(lambda t: None, ARCH | {"hidden_size": 64})
    with pytest.raises(UserError, match="arch.num_heads must be int, not 'x'"):
        load_core(released_file(tmp_path, None, ARCH | {"num_heads": "x"}))
    with pytest.raises(UserError, match="data_path must be str, not 3"):
        load_core(released_file(tmp_path, data=3))
    (tmp_path / "all_config.yaml").write_text("arch: !!python/object/apply:os.system [ls]\n")
    with pytest.raises(UserError, match="all_config.yaml:1: tag .* is refused"):
        load_core(tmp_path / "step_26040")
    torch.save([1, 2], tmp_path / "list")
    assert "holds no state dict, but list" in refused(tmp_path / "list")
    torch.save({"inner.H_init": 3}, tmp_path / "number")
    assert "is no tensor, but int" in refused(tmp_path / "number")


def our_file() -> bytes:
    return model_bytes(HRMCore(small_core(), torch.Generator().manual_seed(0)), QHead(16), {"max_steps": 3})


@pytest.mark.parametrize("claimed", [1 << 60, 200 << 20, (1 << 64) - 1, 0])
def test_a_header_too_large(tmp_path, claimed):
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", claimed) + our_file()[8:])
    assert "not a readable safetensors file" in refused(path)


def test_a_header_of_two_hundred_megabytes(tmp_path):
    path = tmp_path / "model.safetensors"
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", 200 << 20) + b"{")
        file.truncate((200 << 20) + 100)  # a sparse file: it takes no room
    assert "its header claims 209715200 bytes" in refused(path)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"H_layers": 1 << 22}, "claims more layers"), ({"hidden_size": 1 << 20}, "has shape"),
        ({"hidden_size": "x"}, "core.hidden_size must be a whole number, not 'x'"),
        ({"num_heads": 1.5}, "core.num_heads must be a whole number, not 1.5"), ({"H_cycles": None}, "H_cycles"),
        ({"hiden_size": 3}, "did you mean 'hidden_size'"), ({"expansion": 1e308}, "core.expansion must be"),
    ],
)  # fmt: skip
def test_a_header_that_lies(tmp_path, changes, said):
    path = tmp_path / "model.safetensors"
    content = our_file()
    length = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + length])
    meta = header["__metadata__"]
    meta["core"] = json.dumps(json.loads(meta["core"]) | changes)
    new = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(new)) + new + content[8 + length :])
    assert said in refused(path)


def test_links(tmp_path):
    """A link to a good model is followed; one that leads nowhere, to a device or in a circle is refused."""
    (tmp_path / "good.safetensors").write_bytes(our_file())
    (tmp_path / "link").symlink_to("good.safetensors")
    assert load_core(tmp_path / "link").core.config.hidden_size == 16
    for name, target in (("nowhere", "none"), ("circle", "circle"), ("device", "/dev/zero"), ("tty", "/dev/ptmx")):
        (tmp_path / name).symlink_to(target)
        refused(tmp_path / name)
        folder = tmp_path / f"{name}-folder" / "checkpoints" / "step-00000001"
        folder.mkdir(parents=True)
        (folder / "model.safetensors").symlink_to(target)
        with pytest.raises(UserError, match="regular file|holds no model.safetensors"):
            load_core(tmp_path / f"{name}-folder")
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / "model.safetensors").symlink_to("../good.safetensors")
    assert load_core(folder).core.config.hidden_size == 16
    os.mkfifo(folder / "state.json")
    with pytest.raises(UserError, match="state.json: not a regular file"):
        load_core(folder)
