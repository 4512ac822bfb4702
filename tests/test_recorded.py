"""A recording of a frozen core, its cache on disk, and that both say what a live run says. M segments, N puzzles."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hrm_testing import counting_core, small_core, small_puzzles

from agents import AGENTS, SIGNALS, HaltingAgent, QHaltingAgent, decide, make_agent, view_of
from agents.halt_logit import HaltLogitAgent
from envs import CONTINUE, HALT, SudokuHaltVectorEnv
from hrm_rl import evaluation, recorded
from hrm_rl.calibration import candidates, curve, for_steps
from hrm_rl.core import HRMCore
from hrm_rl.errors import UserError
from hrm_rl.recorded import Pass, from_recording, halted, recording_key, weights_sha256, wishes_of

M, N, B = 5, 23, 6


class PatientConfidence(HaltingAgent):
    """A plug-in with a memory: mean of the least confidences of this segment and the one before."""

    sees = ("previous_answer",)
    threshold = 0.33

    def score(self, view):
        now = view.logits.float().softmax(-1).amax(-1).amin(-1)
        before = self.recall("before", view, 0.0)
        self.keep("before", now)
        return (now + before) / 2


class EverySecond(HaltingAgent):
    """A plug-in without a score: an `act` of its own that remembers how often it was asked."""

    def act(self, view, q_logits=None, explore=False):
        count = self.recall("count", view, 0.0) + 1
        self.keep("count", count)
        late = self.max_steps is not None and view.steps >= self.max_steps
        return torch.where((count >= 1 + view.tokens.sum(-1) % 4) | late, HALT, CONTINUE)


PLUGINS = {"PatientConfidence": PatientConfidence, "EverySecond": EverySecond}
EVERY = {**AGENTS, **PLUGINS}
def made_core() -> HRMCore:
    core = HRMCore(small_core(), torch.Generator().manual_seed(1)).eval()
    core.lm_head.weight.data.mul_(2)
    return core


def some_puzzles():
    """Their answers are the core's own of segment 3 here and there, so that some are right now and then."""
    puzzles, core = small_puzzles(N), made_core()
    state, answers = core.initial_state(N), puzzles.answers.clone()
    for _ in range(3):
        state, logits = core(puzzles.questions.long(), state)
    answers[::2] = logits.argmax(-1).clamp(min=2).to(torch.uint8)[::2]
    return replace(puzzles, answers=answers, sha256="")


@pytest.fixture(scope="module")
def puzzles():
    found = some_puzzles()
    exact = evaluation.trajectories(made_core(), AGENTS["fixed"](M), found, M).exact
    assert exact.any() and not exact.all()
    return found


def build(name: str, core) -> HaltingAgent:
    torch.manual_seed(2)
    bias = {"bce": 0.0, "act": -1.0, "reinforce": 0.0}.get(name)
    agent = make_agent(EVERY[name], core, M, "shared_prefix", {} if bias is None else {"bias": bias})
    if isinstance(agent, HaltLogitAgent):
        agent.head.weight.data.normal_()
    if isinstance(agent, QHaltingAgent):
        agent.q_head.weight.data.normal_()
        agent.q_head.bias.data = torch.tensor([-0.5, 0.0])
    return agent.eval()


def a_pass(puzzles, folder=None, core=None, **changes) -> Pass:
    core = core or made_core()
    key = recording_key(core, weights_sha256(core), puzzles, M, "cpu")
    return Pass(core, puzzles, M, key, 8, folder=folder, **changes)


def set_in_the_middle(agent, the: Pass) -> None:
    """Set the threshold, where there is one, so that the mean steps come close to the middle of the budget."""
    recording, (wishes,) = wishes_of(the, [(agent, {})])
    if wishes.scores is not None:
        found = curve(wishes.scores, recording.exact, candidates(wishes.scores), agent.strict)
        agent.threshold = for_steps(found, 2.6).threshold


@torch.no_grad()
def in_the_environment(core, agent, puzzles) -> tuple[list[int], list[bool], list[list[int]]]:
    """(steps, exact, answers) of every puzzle in the Gymnasium vector environment, driven by `decide`.

    The first episode of every slot counts. What the environment does not know is put in: the keys that evaluation
    draws from, and the oracle's channel.
    """
    steps, exact, answers = ([None] * len(puzzles) for _ in range(3))
    envs = SudokuHaltVectorEnv(B, data=puzzles, core=core, max_steps=M, augment=False, tensors="torch")
    envs.engine.carry(agent.sees)
    for first in range(0, len(puzzles), B):
        index = torch.arange(first, first + B).clamp(max=len(puzzles) - 1)
        envs.reset(seed=first, options={"puzzle": index.numpy(), "augment": False})
        running = torch.ones(B, dtype=torch.bool)
        with agent.fresh_memory():
            while running.any():
                before = envs.slots
                view = view_of(before)
                view = view._replace(key=torch.where(running, evaluation.episode_keys(index), view.key))
                if "is_correct" in agent.sees:
                    view = view._replace(is_correct=before.is_correct)
                actions, _ = decide(agent, view, where="here")
                _, reward, ended, _, _ = envs.step(actions)
                for slot in (running & ended).nonzero()[:, 0].tolist():
                    i = int(index[slot])
                    steps[i], exact[i] = int(before.steps[slot]), bool(before.is_correct[slot])
                    assert float(reward[slot]) == float(exact[i])
                    answers[i] = before.logits[slot].argmax(-1).tolist()
                running &= ~ended
    return steps, exact, answers


@pytest.mark.parametrize("name", EVERY)
def test_cache_live_run_and_environment_say_the_same(name, puzzles, tmp_path):
    """Halting step, answer and correctness, puzzle by puzzle: from disk, from `solve`, from the environment."""
    core = made_core()
    agent = build(name, core)
    the = a_pass(puzzles, tmp_path, core)
    set_in_the_middle(agent, the)
    wishes_of(the, [(agent, {})])
    calls, real = [], evaluation.views
    evaluation.views = lambda *args: calls.append(1) or real(*args)
    try:
        recording, (wishes,) = wishes_of(the, [(agent, {})])
    finally:
        evaluation.views = real
    assert not calls and recording.seconds == 0, "read from disk, the core was not run"
    steps = wishes.steps()
    if agent.can_be_calibrated():
        assert torch.equal(wishes.steps(agent.threshold, agent.strict), steps)
    else:
        assert wishes.scores is None
    if name not in ("fixed", "oracle"):
        assert len(set(steps.tolist())) > 1, "all halt alike: nothing is shown"
    found = halted(recording, steps)
    solved = evaluation.solve(core, agent, puzzles, M, batch_size=5)
    assert torch.equal(found.steps, solved.steps) and torch.equal(found.exact, solved.exact)
    assert torch.equal(found.answers, solved.answers)
    in_env = in_the_environment(core, agent, puzzles)
    assert found.steps.tolist() == in_env[0] and found.exact.tolist() == in_env[1]
    assert found.answers.tolist() == in_env[2]


def test_another_rule_is_noticed(puzzles):
    """Negative control of the test above: a threshold a little off gives other halts."""
    core = made_core()
    agent = build("confidence", core)
    set_in_the_middle(agent, a_pass(puzzles))
    _, (wishes,) = wishes_of(a_pass(puzzles), [(agent, {})])
    assert torch.equal(wishes.steps(), evaluation.solve(core, agent, puzzles, M).steps)
    agent.threshold += 0.01
    assert not torch.equal(wishes.steps(), evaluation.solve(core, agent, puzzles, M).steps)


@pytest.mark.parametrize("name", [name for name in AGENTS if not AGENTS[name].can_be_calibrated() or name != "random"])
def test_rules_that_ship_need_no_live_pass_unless_they_learn_otherwise(name, puzzles):
    """From the recording where it is known how, and then the same as a live pass gives."""
    core = made_core()
    agent = build(name, core)
    recording, _ = recorded.recorded(a_pass(puzzles))
    wishes = from_recording(agent, recording)
    if wishes is None:
        assert AGENTS[name].learns, f"{name} looks at nothing that a recording lacks"
        return
    _, (live,) = recorded.recorded(a_pass(puzzles, core=core), [(agent, {})])
    assert torch.equal(wishes.wish, live.wish)
    for one, other in ((wishes.scores, live.scores), (wishes.q_halt, live.q_halt)):
        assert (one is None) == (other is None)
        assert one is None or torch.allclose(one, other, atol=1e-5)


def test_an_agent_with_methods_of_its_own_runs_live(puzzles):
    class Louder(AGENTS["residual"]):
        def score(self, view):
            return super().score(view) + 1

    class Later(AGENTS["residual"]):
        def halts(self, view, score):
            return super().halts(view, score) & (view.steps > 2)

    recording, _ = recorded.recorded(a_pass(puzzles))
    plain = from_recording(AGENTS["residual"](M), recording)
    for kind in (Louder, Later, *PLUGINS.values()):
        assert from_recording(kind(M), recording) is None
    _, (louder, later) = wishes_of(a_pass(puzzles), [(Louder(M), {}), (Later(M), {})])
    assert torch.allclose(louder.scores, plain.scores + 1, atol=1e-6)
    assert not later.wish[:2].any()


def test_no_agent_sees_what_another_has_asked_for(puzzles):
    class Nosy(HaltingAgent):
        def score(self, view):
            assert view.is_correct is None and view.previous_z_H is None and view.previous_logits is None
            return view.steps.float()

    class Oracle2(AGENTS["oracle"]):
        def score(self, view):
            assert view.previous_answer is None
            return view.is_correct.float() * 2

    recording, (_, oracle) = wishes_of(a_pass(puzzles), [(Nosy(M), {}), (Oracle2(M), {})])
    assert torch.equal(oracle.scores, recording.exact.float() * 2)


def test_the_users_cache_is_left_alone(tmp_path_factory):
    """Tests that name no cache of their own have that of the session (conftest.py)."""
    assert recorded.default_folder().is_relative_to(tmp_path_factory.getbasetemp())


# --- the cache --------------------------------------------------------------------------------------------------


def passes_run(the: Pass, chosen, monkeypatch) -> int:
    """How often the core was run from first to last puzzle, for the wishes of `chosen`."""
    calls, real = [], recorded.evaluation.views
    with monkeypatch.context() as patch:
        patch.setattr(recorded.evaluation, "views", lambda *args: calls.append(1) or real(*args))
        wishes_of(the, chosen)
    return len(calls)


def test_what_a_recording_depends_on(puzzles, tmp_path, monkeypatch):
    core, agent = made_core(), PatientConfidence(M)
    the = a_pass(puzzles, tmp_path, core)
    assert passes_run(the, [(agent, {})], monkeypatch) == 1  # one for both
    assert passes_run(the, [(agent, {})], monkeypatch) == 0
    assert passes_run(the, [(agent, {"x": 1})], monkeypatch) == 1  # other arguments
    assert passes_run(the, [(PatientConfidence(M, 0.5), {})], monkeypatch) == 1
    other = made_core()
    other.lm_head.weight.data[0, 0] += 1
    fewer = puzzles.select(torch.arange(N - 1))
    for changed in (a_pass(puzzles, tmp_path, other), a_pass(fewer, tmp_path, core)):
        assert changed.key != the.key
        assert passes_run(changed, [(agent, {})], monkeypatch) == 1
    sha = weights_sha256(core)
    keys = {the.key, recording_key(core, sha, puzzles, M + 1, "cpu"), recording_key(core, sha, puzzles, M, "cuda"),
            recording_key(core, "other", puzzles, M, "cpu")}  # fmt: skip
    twin = HRMCore(small_core(dtype="bfloat16"))
    keys.add(recording_key(twin, sha, puzzles, M, "cpu"))
    monkeypatch.setattr(recorded, "code_sha256", lambda: "another version")
    assert len({*keys, recording_key(core, sha, puzzles, M, "cpu")}) == 6


def test_weights_of_an_agent_are_in_its_key():
    core = made_core()
    agent = build("q", core)
    before = recorded.agent_key("key", agent, {})
    agent.q_head.bias.data[0] += 1
    assert before != recorded.agent_key("key", agent, {})


def test_an_agent_without_source_is_never_cached(puzzles, tmp_path, monkeypatch):
    space: dict = {"__name__": "nowhere"}
    exec("from agents import HaltingAgent\nclass X(HaltingAgent):\n def score(self, view): return view.steps.float()",
         space)  # fmt: skip
    the = a_pass(puzzles, tmp_path)
    for _ in range(2):
        assert passes_run(the, [(space["X"](M), {})], monkeypatch) == 1


@pytest.mark.parametrize("harm", ["cut", "flip", "empty", "text", "foreign", "folder"])
def test_a_damaged_cache_is_computed_anew(harm, puzzles, tmp_path):
    said = []
    the = a_pass(puzzles, tmp_path, notice=said.append)
    first, _ = recorded.recorded(the)
    (path,) = tmp_path.iterdir()
    content = bytearray(path.read_bytes())
    if harm == "folder":
        path.unlink()
        path.mkdir()
    elif harm == "foreign":  # a whole file, of another recording
        recorded._write(tmp_path, "0" * 64, {"exact": first.exact}, said.append)
        path.write_bytes((tmp_path / f"{'0' * 64}.safetensors").read_bytes())
    else:
        content[len(content) // 2] ^= 1
        path.write_bytes({"cut": content[:-100], "flip": content, "empty": b"", "text": b"no tensors"}[harm])
    again, _ = recorded.recorded(the)
    assert torch.equal(again.exact, first.exact) and torch.equal(again.q_token, first.q_token) and again.seconds > 0
    assert len(said) == 1 and "\n" not in said[0]
    assert ("cannot be written" if harm == "folder" else "damaged cache") in said[0]
    if harm != "folder":
        assert recorded.recorded(the)[0].seconds == 0  # and kept again


def test_a_cache_that_cannot_be_written_is_a_notice(puzzles, tmp_path):
    (tmp_path / "file").write_text("")
    said = []
    recording, _ = recorded.recorded(a_pass(puzzles, tmp_path / "file" / "cache", notice=said.append))
    assert recording.exact.shape == (M, N) and len(said) == 1 and "not cached" in said[0]


def test_signals_and_budget_by_hand():
    """A counting core is right from segment 3 on; its state is the count, its answer changes once."""
    found = small_puzzles(7)
    core = counting_core(found, 3)
    recording, _ = recorded.recorded(a_pass(found, core=core))
    assert recording.exact.float().mean(1).tolist() == [0, 0, 1, 1, 1]
    assert torch.equal(recording.answers[3], found.answers)
    assert recording.signals["stability"][:, 0].tolist() == [0, 1, 0, 1, 2]
    assert recording.q_token[:, 0, 0].tolist() == [1, 2, 3, 4, 5]
    assert set(recording.signals) == set(SIGNALS)


def test_unsound_agents_are_named(puzzles):
    class Nan(HaltingAgent):
        def score(self, view):
            return torch.full(view.steps.shape, float("nan"))

    with pytest.raises(UserError, match="agent Nan, step 1 of puzzles 0 and on"):
        wishes_of(a_pass(puzzles), [(Nan(M), {})])
