"""A user's agent from its file to the report: found, given its arguments, run, checked and saved."""

from __future__ import annotations

import json
import re
import sys
from importlib import metadata

import pytest
import torch
import yaml
from hrm_testing import ROOT, small_core, small_puzzles, small_trainer
from torch import nn

from agents import AGENTS, HaltingAgent, QHaltingAgent, agent_names, find_agent, make_agent
from agents.arguments import check_arguments, split_flags
from agents.halt_logit import HaltLogitAgent
from envs import CONTINUE
from hrm_rl import evaluate, train
from hrm_rl.core import HRMCore
from hrm_rl.core.io import load_core, model_bytes
from hrm_rl.core.q_head import QHead
from hrm_rl.errors import UserError
from hrm_rl.evaluation import solve, trajectories

PAGE = (ROOT / "docs" / "PLUGINS.md").read_text(encoding="utf-8")
BLOCKS = {re.search(r"class (\w+)", text)[1]: text for text in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)}
RUN = ["--size", "4", "--num-envs", "4", "--max-steps", "3", "--device", "cpu", "--compile", "off",
       "--total-steps", "4", "--curriculum", "[0,0]", "--log-every", "2", "--eval-every", "4", "--eval-puzzles", "4",
       "--test-limit", "8", "--core.hidden_size", "16", "--core.num_heads", "2", "--core.inner_multiple", "16",
       "--core.puzzle_emb_ndim", "16"]  # fmt: skip


@pytest.fixture
def users_folder(tmp_path, monkeypatch):
    """A folder on sys.path with the agents of docs/PLUGINS.md, each in the file the page says."""
    for name, text in BLOCKS.items():
        module = {"ConfidentAgent": "my_agent"}.get(name, name.lower())
        (tmp_path / f"{module}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    for module in ("my_agent", "patientagent"):
        sys.modules.pop(module, None)


def test_the_first_example_is_short():
    assert len([line for line in BLOCKS["ConfidentAgent"].splitlines() if line.strip()]) <= 15


@pytest.mark.parametrize(
    ("path", "flag", "value"),
    [("my_agent.ConfidentAgent", "threshold", "0.4"),
     pytest.param("patientagent.PatientAgent", "patience", "1", marks=pytest.mark.slow)],
)  # fmt: skip
def test_the_pages_text_trains_evaluates_and_resumes(users_folder, capsys, path, flag, value):
    common = [*RUN, "--objective", "supervised", "--name", "mine", "--checkpoint-every", "2"]
    assert train.main([*common, "--agent", path, f"--agent.{flag}", value]) == 0
    noted = yaml.safe_load((users_folder / "runs/mine/config.yaml").read_text())
    assert noted["agent"] == path and noted["agent_args"] == {flag: float(value)}
    again = ["--config", "runs/mine/config.yaml", "--name", "again"]
    assert train.main(again) == 0
    assert train.main([*again[:2], "--name", "other", f"--agent.{flag}=3"]) == 0
    assert yaml.safe_load((users_folder / "runs/other/config.yaml").read_text())["agent_args"] == {flag: 3.0}
    assert train.main(["--resume", "runs/mine", "--total-steps", "6"]) == 0
    with pytest.raises(UserError, match="a resumed run keeps its configuration"):
        train.main(["--resume", "runs/mine", f"--agent.{flag}", "2"])
    capsys.readouterr()
    assert evaluate.main(["runs/mine", "--agent", path, f"--agent.{flag}", value, "--limit", "8", "--out", "r.json",
                          "--device", "cpu"]) == 0  # fmt: skip
    assert f"{path.rpartition('.')[2]}, at most 3" in capsys.readouterr().out
    assert json.loads((users_folder / "r.json").read_text())["agent"] == path


OWN_HEAD = [name for name, held in AGENTS.items() if issubclass(held, HaltLogitAgent)]
ON_Q_HEAD = [name for name, held in AGENTS.items() if issubclass(held, QHaltingAgent)]


@pytest.mark.parametrize("name", [name for name in AGENTS if name not in (*OWN_HEAD, *ON_Q_HEAD)])
def test_short_names_evaluate_the_core_that_ships(name, capsys):
    if name.startswith("sb3."):  # nobody has trained it: one line (tests/test_sb3.py evaluates trained ones)
        with pytest.raises(UserError, match="train with this agent first"):
            evaluate.main(["--agent", name, "--limit", "2"])
        return
    assert evaluate.main(["--agent", name, "--limit", "2", "--max-steps", "2", "--batch-size", "2"]) == 0
    assert f"{name}, at most 2" in capsys.readouterr().out


@pytest.mark.parametrize("name", ON_Q_HEAD)
def test_rules_on_the_q_head_that_ships(name, capsys):
    assert evaluate.main(["--agent", name, "--limit", "2", "--max-steps", "2", "--batch-size", "2"]) == 0


@pytest.mark.parametrize("name", OWN_HEAD)
def test_what_needs_a_head_of_its_own_says_so(name):
    with pytest.raises(UserError, match=r"holds no weights 'head\.weight' .* train with this agent first"):
        evaluate.main(["--agent", name, "--limit", "2"])


# --- the run's own agent ----------------------------------------------------------------------------------------


def evaluated(folder, capsys, *words) -> tuple[dict, str]:
    """(the report, what was printed) of `evaluate` on the run `folder`."""
    out = folder.parent.parent / "r.json"
    assert evaluate.main([str(folder), "--limit", "8", "--device", "cpu", "--out", str(out), *words]) == 0
    return json.loads(out.read_text()), capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "flags", "other"),
    [("ponder", ["rule", "cdf", "threshold", "-1"], ["threshold", "1"]), ("fixed", ["k", "2"], ["k", "3"]),
     ("lambda", ["threshold", "-9"], ["threshold", "9"])],
)  # fmt: skip
def test_a_run_is_evaluated_by_its_own_agent(users_folder, capsys, name, flags, other):
    """Threshold -1 halts at once: that it does says that the arguments are those of the run; flags win over them."""
    pairs = [[f"--agent.{a}", b] for a, b in zip(flags[::2], flags[1::2], strict=True)]
    objective = "supervised" if name == "fixed" else "joint"
    given = [word for pair in pairs for word in pair]
    assert train.main([*RUN, "--agent", name, *given, "--name", "mine", "--objective", objective]) == 0
    capsys.readouterr()
    run, first = users_folder / "runs/mine", 2 if name == "fixed" else 1
    for words in ([], ["--agent", name], ["--agent", f"{AGENTS[name].__module__}.{AGENTS[name].__qualname__}"]):
        result, printed = evaluated(run, capsys, *words)
        assert result["learned_halt"][0]["mean_steps"] == first
        assert ("learned, at most 3" in printed) == (not words and name != "fixed")
    result, _ = evaluated(run, capsys, f"--agent.{other[0]}", other[1])
    assert result["agent"] == name and result["learned_halt"][0]["mean_steps"] == 3
    result, _ = evaluated(run, capsys, "--agent", "stability")  # another agent gets none of the run's arguments
    assert result["agent"] == "stability"


def test_a_file_from_elsewhere_imports_nothing(users_folder, capsys):
    """An agent known by an import path is asked for by name; its arguments are then the run's."""
    own = ["--agent", "my_agent.ConfidentAgent"]
    assert train.main([*RUN, "--objective", "supervised", *own, "--agent.threshold", "0", "--name", "mine"]) == 0
    del sys.modules["my_agent"]
    with pytest.raises(UserError, match=r"was trained with my_agent.ConfidentAgent, .* --agent my_agent.Conf"):
        evaluate.main(["runs/mine"])
    assert "my_agent" not in sys.modules
    assert evaluated(users_folder / "runs/mine", capsys, *own)[0]["learned_halt"][0]["mean_steps"] == 1


def model_file(folder, **meta):
    core = HRMCore(small_core())
    (folder / "it.safetensors").write_bytes(model_bytes(core, QHead(16), {"max_steps": 3, **meta}))
    return folder / "it.safetensors"


def test_a_file_that_names_no_agent_is_read_with_q(tmp_path, capsys):
    assert evaluate.main([str(model_file(tmp_path)), "--limit", "4", "--out", str(tmp_path / "r.json")]) == 0
    assert "learned, at most 3" in capsys.readouterr().out
    assert json.loads((tmp_path / "r.json").read_text())["agent"] == "q"


@pytest.mark.parametrize(
    ("meta", "said"),
    [({"agent": 3}, "names no valid agent"), ({"agent": "q", "agent_args": [1]}, "names no valid agent"),
     ({"agent": "os.system"}, "must be asked for: --agent os.system"), ({"agent": ""}, "must be asked for"),
     ({"agent": "q", "agent_args": {"epsilom": 1}}, "did you mean 'epsilon'")],
)  # fmt: skip
def test_what_a_header_may_say_of_its_agent(tmp_path, meta, said):
    with pytest.raises(UserError, match=said):
        evaluate.main([str(model_file(tmp_path, **meta)), "--limit", "4"])


# --- by name ----------------------------------------------------------------------------------------------------


def test_an_entry_point_of_an_installed_package(users_folder):
    snippet = re.search(r"```toml\n\[project.entry-points.\"(.*?)\"\]\n(\w+) = \"(.*?)\"", PAGE)
    group, name, value = snippet.groups()
    assert value == "my_package.my_agent:ConfidentAgent"
    installed = users_folder / "my_package-1.0.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: my_package\nVersion: 1.0\n")
    broken = 'wrong = "my_package.gone:X"\nnothing = "my_package.my_agent:torch"'.replace('"', "")
    (installed / "entry_points.txt").write_text(f"[{group}]\n{name} = {value}\n{broken}\n")
    package = users_folder / "my_package"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "my_agent.py").write_text("import torch\n" + BLOCKS["ConfidentAgent"])
    assert metadata.entry_points(group=group, name=name)
    try:
        found = find_agent(name)
        assert found.__name__ == "ConfidentAgent" and found.__module__ == "my_package.my_agent"
        assert name in agent_names()
        with pytest.raises(UserError, match="did you mean 'confident'"):
            find_agent("confidant")
        with pytest.raises(UserError, match="'wrong' .entry point my_package.gone:X. cannot be imported"):
            find_agent("wrong")
        with pytest.raises(UserError, match="is not a subclass"):
            find_agent("nothing")
    finally:
        for module in ("my_package", "my_package.my_agent"):
            sys.modules.pop(module, None)


@pytest.mark.parametrize(("name", "said"), [
    ("confidnce", "did you mean 'confidence'"), ("agents.fixed.FixdAgent", "did you mean 'FixedAgent'"),
    ("agents.fixed_.FixedAgent", "cannot be imported"), ("broken_agent.X", "ZeroDivisionError"),
    ("unreadable_agent.X", "cannot be imported"), ("torch.nn.Linear", "not a subclass"),
])  # fmt: skip
def test_names_that_lead_nowhere(name, said, users_folder):
    (users_folder / "broken_agent.py").write_text("1 / 0\n")
    (users_folder / "unreadable_agent.py").write_text("def (\n")
    with pytest.raises(UserError, match=said):
        find_agent(name)


# --- arguments --------------------------------------------------------------------------------------------------


def test_flags_are_told_from_the_rest():
    words = ["--seed", "1", "--agent.q-bias", "-0.5", "--agent", "q", "--agent.epsilon=0.2", "RUN"]
    assert split_flags(words) == (["--seed", "1", "--agent", "q", "RUN"], {"q_bias": "-0.5", "epsilon": "0.2"})
    for words in (["--agent.k"], ["--agent.k", "--seed", "3"]):
        with pytest.raises(UserError, match="--agent.k: needs a value"):
            split_flags(words)


class Typed(HaltingAgent):
    def __init__(self, max_steps: int, alpha: float = 0.1, names: list[str] | None = None, deep: bool = False, free=3):
        super().__init__(max_steps)
        self.given = alpha, names, deep, free


@pytest.mark.parametrize(("text", "value"), [
    ({"alpha": "1"}, (1.0, None, False, 3)), ({"names": "[a, b]", "deep": "true"}, (0.1, ["a", "b"], True, 3)),
    ({"alpha": 2, "free": 7}, (2.0, None, False, 7)), ({"alpha": "-1e-3"}, (-1e-3, None, False, 3)),
])  # fmt: skip
def test_values_are_read_as_annotated(text, value):
    agent = make_agent(Typed, nn.Identity(), 4, "none", text)
    assert agent.given == value and [type(x) for x in agent.given] == [type(x) for x in value]


@pytest.mark.parametrize(("values", "said"), [
    ({"alhpa": 1}, "agent_args of Typed: unknown 'alhpa'; did you mean 'alpha'?"),
    ({"alpha": "much"}, "agent_args of Typed: alpha must be float, not 'much'"),
    ({"deep": "7"}, "deep must be bool, not '7'"), ({"x": 1}, "it takes: alpha, names, deep, free"),
])  # fmt: skip
def test_arguments_that_do_not_fit(values, said):
    with pytest.raises(UserError) as error:
        check_arguments(Typed, values)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_a_misspelt_flag_of_the_commands():
    with pytest.raises(UserError, match="did you mean 'tau'"):
        train.main([*RUN, "--agent", "confidence", "--agent.tua", "0.5"])
    with pytest.raises(UserError, match="did you mean 'tau'"):
        evaluate.main(["--agent", "confidence", "--agent.tua", "0.5", "--limit", "1"])


# --- what is not sound ------------------------------------------------------------------------------------------


def agent_that(act=None, score=None) -> type[HaltingAgent]:
    members = {}
    if act:
        members["act"] = lambda self, view, q_logits=None, explore=False: act(view)
    if score:
        members["score"] = lambda self, view: score(view)
    return type("Bad", (HaltingAgent,), members)


def late(view, sound, unsound):
    """Unsound from step 2 on."""
    return torch.where(view.steps > 1, unsound, sound)


BAD = [
    (agent_that(act=lambda v: v.steps[:1]), r"act\(\) must return a tensor \(\d,\), not \(1,\)", 1),
    (agent_that(act=lambda v: None), r"act\(\) must return a tensor \(\d,\), not NoneType", 1),
    (agent_that(act=lambda v: v.steps > 1), r"act\(\) must return torch.int64, not torch.bool", 1),
    (agent_that(act=lambda v: torch.zeros_like(v.steps, device="meta")), r"on cpu, not on meta", 1),
    (agent_that(act=lambda v: late(v, CONTINUE, 2)), r"act\(\) must return HALT \(0\) and CONTINUE \(1\) only", 2),
    (agent_that(act=lambda v: late(v, CONTINUE, -1)), r"act\(\) must return HALT \(0\) and CONTINUE \(1\) only", 2),
    (agent_that(score=lambda v: v.logits.amax(-1)), r"score\(\) must return a tensor \(\d,\), not \(\d, 16\)", 1),
    (agent_that(score=lambda v: v.steps), r"score\(\) must return torch.float32, not torch.int64", 1),
    (agent_that(score=lambda v: late(v, -1.0, float("nan"))), r"score\(\) must return numbers, but there is a NaN", 2),
]


@pytest.mark.parametrize(("agent_class", "said", "at"), BAD)
def test_unsound_agents_are_named_with_place_and_wish(agent_class, said, at):
    trainer = small_trainer(agent_class, objective="supervised")
    with pytest.raises(UserError, match=f"agent Bad, update {at}: .*{said}"):
        trainer.update()
        trainer.update()
    core = HRMCore(small_core(), torch.Generator().manual_seed(0))
    with pytest.raises(UserError, match=f"agent Bad, step {at} of puzzles 0 and on: .*{said}"):
        trajectories(core, agent_class(), small_puzzles(5), 3, 2)
    with pytest.raises(UserError, match=f"agent Bad, call {at}: .*{said}"):
        solve(core, agent_class(), small_puzzles(5), 3, 2)


def test_a_fault_on_a_device_that_must_not_be_waited_for(monkeypatch):
    """Where the values are not looked at in every update, the next logged one tells."""
    from agents import checks

    raised = []
    monkeypatch.setattr(checks, "raise_fault", lambda *arguments: raised.append(arguments))  # the look at every update
    own = checks.decide

    def as_on_a_gpu(agent, view, *rest, **keywords):
        actions, _ = own(agent, view, *rest, **keywords)
        return actions, raised[-1][1]

    monkeypatch.setattr("hrm_rl.trainer.decide", as_on_a_gpu)
    trainer = small_trainer(BAD[-1][0], objective="supervised")
    for _ in range(3):
        trainer.update()
    with pytest.raises(UserError, match="agent Bad, update 4 or one since the last logged update: .*NaN"):
        trainer.update(detailed=True)


# --- an agent that learns by its own loss -----------------------------------------------------------------------


LEARNER = '''
import torch
from torch import nn

from agents import AgentLoss, HaltingAgent


class Learner(HaltingAgent):
    """Learns whether the answer is right from the whole of z_H, with a head of its own."""

    learns, bootstraps, threshold = True, False, 0.5

    def __init__(self, core, max_steps: int, width: int = 8):
        super().__init__(max_steps)
        self.head = nn.Sequential(nn.Linear(core.hidden_size, width), nn.ReLU(), nn.Linear(width, 1))

    def logit(self, view):
        return self.head(view.z_H.float().mean(1))[:, 0]

    def score(self, view):
        return self.logit(view).sigmoid()

    def loss(self, transition):
        assert transition.next_z_H is None and transition.q_logits is None
        right = transition.is_correct.float()
        each = nn.functional.binary_cross_entropy_with_logits(self.logit(transition.view), right, reduction="none")
        total = (each * transition.view.valid).sum() / len(each)
        return AgentLoss(total, {"bce": total.detach()})
'''


def learner() -> type[HaltingAgent]:
    space: dict = {}
    exec(LEARNER, space)
    return space["Learner"]


@pytest.mark.parametrize("bootstrap", ["shared_prefix", "next_observation", "extra_forward"])
@pytest.mark.parametrize("objective", ["joint", "q", "supervised"])
def test_an_agent_with_its_own_loss(objective, bootstrap):
    trainer = small_trainer(learner(), objective=objective, bootstrap=bootstrap, optim={"lr": 0.05})
    before = {n: p.detach().clone() for n, p in (*trainer.core.named_parameters(), *trainer.agent.named_parameters())}
    for update in range(3):
        details = trainer.update(detailed=update == 2)
    values = trainer.line(details, 1.0)
    assert ("agent/bce" in values) == ("loss/agent" in values) == (objective != "supervised")
    if objective == "q":
        assert values["loss/total"] == pytest.approx(values["agent/bce"])
    moved = {n for n, p in (*trainer.core.named_parameters(), *trainer.agent.named_parameters())
             if not torch.equal(p, before[n])}  # fmt: skip
    assert any(n.startswith("head.") for n in moved) == (objective != "supervised")
    assert any(n.startswith("H_level.") for n in moved) == (objective != "q")


def test_its_weights_are_in_the_model_file(users_folder):
    (users_folder / "learner.py").write_text(LEARNER)
    assert train.main([*RUN, "--agent", "learner.Learner", "--name", "mine", "--optim.lr", "0.1"]) == 0
    held = load_core("runs/mine")
    names = ("0.weight", "0.bias", "2.weight", "2.bias")
    assert held.q_head is None and set(held.agent_tensors) == {f"head.{name}" for name in names}
    options = ["--limit", "4", "--device", "cpu", "--agent", "learner.Learner"]
    assert evaluate.main(["runs/mine", *options]) == 0
    with pytest.raises(UserError, match="holds no weights 'head.0.weight' .* of Learner; train with this agent first"):
        evaluate.main(options)
    sys.modules.pop("learner", None)

