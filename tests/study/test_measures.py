"""Diagnostics against numbers by hand and the slow definitions elsewhere. L learners, M segments, N puzzles."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hrm_rl import scoring
from hrm_rl.calibration import halting_steps, read_at
from hrm_rl.optim import linf_bound
from hrm_rl.study import exact, measures

NAN = float("nan")


def drawn(seed: int, L: int = 3, M: int = 4, N: int = 7, ties: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    q_logits = 3 * torch.randn(L, M, N, 2, generator=generator)
    correct = torch.rand(M, N, generator=generator) < 0.4
    return (q_logits.round() if ties else q_logits), correct


def one(found: dict[str, torch.Tensor], i: int = 0) -> dict[str, float]:
    return {name: float(value[i]) for name, value in found.items()}


def logit(p: float) -> float:
    return math.log(p / (1 - p))


# One learner, M = 2, N = 2. Puzzle 1 is right from segment 2 on, puzzle 2 never. gamma 0.9, cost 0.1.
CORRECT = torch.tensor([[False, False], [True, False]])
VALUES = torch.tensor([[[0.2, 0.6], [0.3, 0.1]], [[0.9, 0.7], [0.4, 0.2]]], dtype=torch.float64)  # (M, N, action)
LOGITS = torch.special.logit(VALUES)[None]


def test_by_hand():
    """Q*: (1, C) = 0.9 - 0.1, 0 - 0.1; (2, C) = 1, 0. The greedy policy goes on with puzzle 1 and halts puzzle 2."""
    metrics, by_step = measures.measure(LOGITS, CORRECT, 0.9, 0.1)
    got = one(metrics)
    assert got["accuracy"] == 0.5 and got["mean_steps"] == 1.5
    assert got["mean_return"] == pytest.approx((0.9 - 0.1 + 0) / 2) and got["regret"] == pytest.approx(0)
    halt, cont = [0.2, 0.3, -0.1, 0.4], [0.6 - 0.8, 0.1 + 0.1, 0.7 - 1, 0.2]
    assert got["bias_halt"] == pytest.approx(sum(halt) / 4)
    assert got["abs_bias_halt"] == pytest.approx(sum(map(abs, halt)) / 4)
    assert got["bias_continue"] == pytest.approx(sum(cont) / 4)
    assert got["abs_bias_continue"] == pytest.approx(sum(map(abs, cont)) / 4)
    assert got["policy_bias_continue"] == pytest.approx(got["bias_continue"])  # its policy is optimal from segment 2 on
    errors = sorted([abs(0.9 * 0.9 - 0.1 - 0.6), abs(0.9 * 0.4 - 0.1 - 0.1)])
    for name, share in (("td_error_p50", 0.5), ("td_error_p90", 0.9), ("td_error_p99", 0.99)):
        assert got[name] == pytest.approx(errors[0] + share * (errors[1] - errors[0]), rel=1e-5)
    assert got["gap"] == pytest.approx((logit(0.2) - logit(0.6) + logit(0.3) - logit(0.1)) / 2)
    assert got["logit_max_abs"] == pytest.approx(logit(0.9)) and got["value_max_abs"] == pytest.approx(0.9)
    assert math.isnan(got["target_drift"]) and math.isnan(got["sign_flips"])
    assert by_step["bias_continue"][0].tolist() == pytest.approx([0.0, -0.05])
    assert by_step["abs_bias_continue"][0].tolist() == pytest.approx([0.2, 0.25])
    assert by_step["q_halt"][0].tolist() == pytest.approx([0.25, 0.65])
    assert by_step["q_continue"][0].tolist() == pytest.approx([0.35, 0.45])
    assert by_step["accuracy"][0].tolist() == [0, 0.5] and by_step["halts"][0].tolist() == [0.5, 0.5]


def test_policy_bias_is_against_the_policy():
    """Puzzle 1 of M = 3, right at 2 alone; the learner goes on at 2, so what is worth 1 at best earns it 0."""
    correct = torch.tensor([[False], [True], [False]])
    q_logits = torch.tensor([[[[-1.0, 1.0]], [[-1.0, 1.0]], [[-1.0, 1.0]]]])
    metrics, by_step = measures.measure(q_logits, correct)
    value = torch.tensor(1.0).sigmoid().item()
    assert by_step["bias_continue"][0].tolist() == pytest.approx([value - 1, value, value])
    assert by_step["policy_bias_continue"][0].tolist() == pytest.approx([value, value, value])
    assert one(metrics)["regret"] == 1
    halts_at_2 = torch.tensor([[[False], [True], [False]]])
    metrics, by_step = measures.measure(q_logits, correct, wish=halts_at_2)  # the same values, another policy
    assert by_step["policy_bias_continue"][0].tolist() == pytest.approx([value - 1, value, value])
    assert one(metrics)["regret"] == 0 and one(metrics)["accuracy"] == 1 and one(metrics)["mean_steps"] == 2


def test_optimal_values_have_no_bias_and_no_error():
    _, correct = drawn(0, M=5, N=40)
    truth = exact.optimal_values(correct, 0.9, 0.05)
    metrics, _ = measures.measure(truth[None].float(), correct, 0.9, 0.05, "mse_logits")
    got = one(metrics)
    for name in ("abs_bias_halt", "abs_bias_continue", "abs_policy_bias_continue", "td_error_p99", "regret", "brier"):
        assert got[name] == pytest.approx(0, abs=1e-6), name
    assert got["auroc"] == 1
    wrong, _ = measures.measure(truth[None].float(), correct, 0.5, 0.05, "mse_logits")  # control: another gamma
    assert one(wrong)["td_error_p99"] > 0.1 and one(wrong)["abs_bias_continue"] > 0.1


@pytest.mark.parametrize("loss", ["bce", "mse_values", "mse_logits"])
def test_losses_say_what_a_logit_is_worth(loss):
    q_logits = torch.full((1, 2, 3, 2), 10.0)
    got = one(measures.measure(q_logits, torch.ones(2, 3).bool(), loss=loss)[0])
    assert got["logit_max_abs"] == got["logit_mean_abs"] == 10 and got["saturated"] == 1
    bounded = loss != "mse_logits"
    assert got["value_max_abs"] == (pytest.approx(1, abs=1e-4) if bounded else 10)
    assert got["bias_halt"] == (pytest.approx(0, abs=1e-4) if bounded else 9)
    assert got["brier"] == pytest.approx(0, abs=1e-6)  # a value above 1 is cut to a probability
    assert one(measures.measure(q_logits - 2.001, torch.ones(2, 3).bool())[0])["saturated"] == 0


@given(st.integers(0, 10_000), st.booleans(), st.sampled_from([(1, 1), (1, 6), (4, 7), (6, 1)]))
@settings(max_examples=40, deadline=None)
def test_halting_and_calibration_equal_scoring(seed, ties, shape):
    M, N = shape
    q_logits, correct = drawn(seed, 3, M, N, ties)
    cost = torch.tensor([0.0, 0.1, 0.5])
    metrics, _ = measures.measure(q_logits, correct, 1.0, cost)
    for i in range(3):
        gap = q_logits[i, ..., 0] - q_logits[i, ..., 1]
        steps = halting_steps(gap, 0.0, strict=True)
        p = q_logits[i, ..., 0].double().sigmoid()
        got = one(metrics, i)
        assert got["accuracy"] == pytest.approx(float(read_at(correct, steps).double().mean()))
        assert got["mean_steps"] == pytest.approx(float(steps.double().mean()))
        assert got["regret"] == pytest.approx(scoring.regret(correct, steps, float(cost[i])), abs=1e-7)
        assert got["brier"] == pytest.approx(scoring.brier(p, correct))
        assert got["ece"] == pytest.approx(scoring.ece(p, correct))
        area = scoring.auroc(q_logits[i, ..., 0], correct)
        assert math.isnan(got["auroc"]) if area is None else got["auroc"] == pytest.approx(area)


@given(st.integers(0, 10_000), st.booleans())
@settings(max_examples=40, deadline=None)
def test_frontier_area_is_that_of_every_threshold(seed, ties):
    """Against the slow way: halt by every threshold there is, the points in order of their mean steps, trapezoids."""
    q_logits, correct = drawn(seed, 2, 4, 6, ties)
    metrics, _ = measures.measure(q_logits, correct)
    for i in range(2):
        gap = (q_logits[i, ..., 0].double() - q_logits[i, ..., 1].double())
        points = []
        for threshold in [-math.inf, *gap.unique().tolist()]:
            steps = halting_steps(gap, threshold, strict=True)
            points.append((float(steps.double().mean()), float(read_at(correct, steps).double().mean())))
        points.sort(key=lambda point: point[0])
        x, y = torch.tensor(points, dtype=torch.float64).unbind(1)
        assert x[0] == 1 and x[-1] == 4
        got = one(metrics, i)
        area = float(torch.trapezoid(y, x)) / 3
        assert got["frontier_area"] == pytest.approx(area)
        fixed, best = exact.fixed_area(correct), exact.best_area(correct)
        assert area <= best + 1e-9
        if best > fixed:
            assert got["frontier_gap"] == pytest.approx((area - fixed) / (best - fixed))


def test_frontier_area_of_known_rules():
    """A clock has the area of fixed steps; nothing has more than the best; a gap that knows comes close to it."""
    generator = torch.Generator().manual_seed(0)
    correct = (torch.rand(8, 400, generator=generator) < 0.25).cummax(0).values
    clock = torch.arange(8.0)[:, None].expand(8, 400)
    knows = correct.float() + 1e-3 * clock
    against = -correct.float() + 1e-3 * clock
    gaps = torch.stack((clock, knows, against))
    metrics, _ = measures.measure(torch.stack((gaps, torch.zeros_like(gaps)), -1), correct)
    by_clock, by_answer, backwards = metrics["frontier_gap"].tolist()
    assert by_clock == pytest.approx(0, abs=1e-9)
    assert 0.5 < by_answer <= 1 and backwards < -0.05
    assert metrics["frontier_area"][0] == pytest.approx(exact.fixed_area(correct))


def test_what_compares_with_the_checkpoint_before():
    q_logits, correct = drawn(0, 1, 3, 5)
    same = one(measures.measure(q_logits, correct, previous=q_logits)[0])
    assert same["target_drift"] == same["sign_flips"] == 0
    moved = q_logits.flip(-1)  # all greedy actions change, the best values do not
    got = one(measures.measure(moved, correct, previous=q_logits)[0])
    assert got["sign_flips"] == 1 and got["target_drift"] == pytest.approx(0)
    up = one(measures.measure(q_logits + 1, correct, previous=q_logits)[0])
    want = ((q_logits + 1).sigmoid() - q_logits.sigmoid())[:, 1:].double()
    best = q_logits[:, 1:].argmax(-1, keepdim=True)
    assert up["target_drift"] == pytest.approx(float(want.gather(-1, best).mean()), rel=1e-5) and up["sign_flips"] == 0
    by = one(measures.measure(q_logits + 1, correct, 0.5, 0.3, previous=q_logits)[0])
    assert by["target_drift"] == pytest.approx(0.5 * up["target_drift"], rel=1e-5)


def test_a_learner_that_diverged_touches_no_other():
    q_logits, correct = drawn(1, 3)
    broken = q_logits.clone()
    broken[1, 2, 3, 0] = NAN
    broken[2, 0, 0, 1] = math.inf
    whole = [measures.measure(q_logits, correct, previous=q_logits), measures.measure(broken, correct, previous=broken)]
    for before, after in zip(*whole, strict=True):
        for name in before:
            assert torch.equal(before[name][0], after[name][0]), name
            assert after[name][1:].isnan().all(), name
    again = measures.measure(q_logits, correct, previous=broken)[0]
    assert again["target_drift"].isnan().tolist() == [False, True, True]
    assert not again["accuracy"].isnan().any()


def test_learners_in_chunks_are_those_alone(monkeypatch):
    q_logits, correct = drawn(2, 5)
    settings = torch.linspace(0.5, 1, 5), torch.linspace(0, 0.2, 5)
    losses = ["bce", "mse_logits", "mse_values", "bce", "mse_logits"]
    together = measures.measure(q_logits, correct, *settings, losses, q_logits + 0.1)
    monkeypatch.setattr(measures, "_CHUNK", 2)
    chunked = measures.measure(q_logits, correct, *settings, losses, q_logits + 0.1)
    for i in range(5):
        alone = measures.measure(q_logits[i : i + 1], correct, *(float(s[i]) for s in settings), losses[i],
                                 q_logits[i : i + 1] + 0.1)  # fmt: skip
        for one_by_one, batch, parts in zip(alone, together, chunked, strict=True):
            for name, value in one_by_one.items():
                assert torch.allclose(value[0], batch[name][i], atol=1e-6, equal_nan=True), name
                assert torch.equal(batch[name][i].nan_to_num(-1), parts[name][i].nan_to_num(-1)), name


def test_one_segment_leaves_nothing_to_choose():
    q_logits, correct = drawn(0, 2, 1, 6)
    metrics, _ = measures.measure(q_logits, correct, previous=q_logits)
    for name in ("frontier_area", "gap", "sign_flips", "target_drift", "td_error_p50"):
        assert metrics[name].isnan().all(), name
    assert (metrics["mean_steps"] == 1).all() and (metrics["regret"] == 0).all()


def test_every_metric_has_its_sentence():
    q_logits, correct = drawn(0)
    metrics, by_step = measures.measure(q_logits, correct)
    found = measures.head_measures(torch.rand(3, 9, 4), {"w": torch.rand(3, 4, 2)}, "adamw", 0.1)
    live = {"grad_norm", "grad_norm_supervised", "grad_norm_q", "grad_cosine"}
    assert set(metrics) | set(found) | live == set(measures.METRICS) and set(by_step) == set(measures.BY_STEP)
    assert all(value.dtype == torch.float64 and value.shape == (3,) for value in (metrics | found).values())
    assert all(value.dtype == torch.float64 and value.shape == (3, 4) for value in by_step.values())
    for metric in measures.METRICS.values():
        assert metric.better in ("higher", "lower", "none") and metric.meaning.endswith(".") and metric.unit


# --- parameters and features ------------------------------------------------------------------------------------


def test_effective_rank_and_dormant_units_by_hand():
    generator = torch.Generator().manual_seed(0)
    base = torch.linalg.qr(torch.randn(40, 6, generator=generator))[0]
    # Singular values 1, 1, 1, 0.02, 0, 0: three make up 99.3 %, two 66 %.
    thin = base * torch.tensor([1, 1, 1, 0.02, 0, 0])
    full = base.clone()
    wide = full.mT.contiguous()  # fewer rows than units
    ranks = [float(measures.feature_measures(x[None])["effective_rank"]) for x in (thin, full, wide)]
    assert ranks == [3, 6, 6]
    assert float(measures.feature_measures((base * torch.tensor([1, 1, 1, 0.04, 0, 0]))[None])["effective_rank"]) == 4
    hidden = torch.ones(2, 10, 4)
    hidden[0, :, 1] = 0.0
    hidden[0, :, 2] = 0.01
    got = measures.feature_measures(hidden)
    assert got["dormant"].tolist() == [0.5, 0] and got["effective_rank"].tolist() == [1, 1]
    nothing = measures.feature_measures(torch.zeros(1, 10, 4))
    assert float(nothing["dormant"]) == 1 and float(nothing["effective_rank"]) == 0


def test_rank_against_singular_values():
    features = torch.randn(3, 50, 8, generator=torch.Generator().manual_seed(1)) * torch.logspace(0, -4, 8)
    features[2, 3, 1] = NAN
    values = torch.linalg.svdvals(features[:2].double())
    held = values.cumsum(-1) / values.sum(-1, keepdim=True)
    want = [(row >= 0.99).int().argmax().item() + 1 for row in held]
    got = measures.feature_measures(features)
    assert got["effective_rank"][:2].tolist() == want and 1 < want[0] < 8
    assert got["effective_rank"][2].isnan() and got["dormant"][2].isnan()


def test_shared_features_are_those_of_each():
    features, biases = torch.randn(20, 5), torch.tensor([[-7.0, 0], [0, 0], [NAN, 0]])
    weights = {"w": torch.randn(3, 2, 5), "b": biases}
    shared = measures.head_measures(features, weights, ["adamw", "sgd", "adamw"], [0.1, 0.1, 0.1])
    each = measures.head_measures(features.expand(3, 20, 5), weights, ["adamw", "sgd", "adamw"], [0.1] * 3)
    for name in shared:
        assert torch.equal(shared[name].nan_to_num(-1), each[name].nan_to_num(-1)), name
    assert float(shared["param_inf_norm"][0]) == 7 and float(shared["param_bound_ratio"][0]) == pytest.approx(0.7)
    assert shared["param_bound_ratio"][1:].isnan().all()


def test_bounds():
    """Of a parameter of 1, by optimiser and decay; nothing where they imply none."""
    for name, decay, bound in (("adamw", 0.1, 10), ("adamw", 2.0, 0.5), ("adam_atan2", 1.0, math.pi / 4)):
        found = measures.parameter_measures({"p": torch.ones(1, 3)}, name, decay)["param_bound_ratio"]
        assert float(found) == pytest.approx(1 / bound), name
    for name, decay in (("adam", 0.1), ("sgd", 0.1), ("muon", 0.1), ("adamw", 0.0), ("none", 0.0)):
        assert measures.parameter_measures({"p": torch.ones(1, 3)}, name, decay)["param_bound_ratio"].isnan()


@pytest.mark.parametrize("decay", [0.5, 2.0])
def test_adamw_rests_on_its_bound(decay):
    """A gradient that keeps its sign pushes AdamW's weight to 1 / decay and no further; Adam's goes by it."""
    ends = {}
    for kind, weight_decay in ((torch.optim.AdamW, decay), (torch.optim.Adam, 0.0)):
        weight = torch.zeros(1, requires_grad=True)
        optimizer = kind([weight], lr=0.05, weight_decay=weight_decay)
        for _ in range(500):
            weight.grad = torch.full((1,), -3.0)
            optimizer.step()
        ends[kind] = weight.item()
    bound = linf_bound("adamw", decay)
    assert ends[torch.optim.AdamW] == pytest.approx(bound, rel=1e-3) and ends[torch.optim.Adam] > 5 * bound


@pytest.mark.parametrize(("b1", "b2", "most"), [(0.9, 0.999, 7.27), (0.9, 0.95, 1.165)])
def test_the_worst_step_of_adamw(b1, b2, most):
    """The gradient that Cauchy and Schwarz name: g(t - k) in proportion to (b1 / b2)^k, that is growing towards t.

    For torch's betas and for those of the study's learners."""
    steps = 200
    weight = torch.zeros(1, requires_grad=True, dtype=torch.float64)
    optimizer = torch.optim.AdamW([weight], lr=1.0, betas=(b1, b2), eps=0, weight_decay=0)
    before = 0.0
    for t in range(steps):
        before = weight.item()
        weight.grad = torch.full((1,), -((b1 / b2) ** (steps - t)), dtype=torch.float64)
        optimizer.step()
    correction = math.sqrt(1 - b2**steps) / (1 - b1**steps)  # Adam's own, for its short past
    step = (weight.item() - before) / correction
    assert step == pytest.approx(linf_bound("adamw", 1.0, betas=(b1, b2)), rel=1e-3) == pytest.approx(most, rel=1e-3)
