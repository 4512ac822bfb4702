"""Verdicts on studies whose truth is known: every claim with every outcome."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from synthetic_study import Made, judge, make_study, standard_arms

from hrm_rl.study.statistics import Interval
from hrm_rl.study.verdicts import OUTCOMES, Contrast, share_difference, verdicts, wilson

CLAIMS = ("bounded parameters", "weight decay", "post-norm", "no target network needed", "no replay needed")
WITHOUT = {
    "weight decay": {"weight_decay": 0.0}, "post-norm": {"head_norm": "rmsnorm"},
    "no target network needed": {"target": "polyak"}, "no replay needed": {"replay": "fifo"},
}  # fmt: skip


def outcomes(arms, baseline=None, **kwargs):
    info, results = make_study(arms, baseline, **kwargs)
    found = verdicts(info, results, judge, resamples=2000)
    assert tuple(v.claim for v in found) == CLAIMS and all(v.outcome in OUTCOMES and v.reason for v in found)
    return {v.claim: v for v in found}


def test_a_study_in_which_every_claim_holds():
    arms = standard_arms()
    norm = {"head": "mlp", "head_norm": "rmsnorm"}
    arms |= {"mlp+norm": Made(norm), "mlp": Made({"head": "mlp"}, 0.7)}
    del arms["head_norm=rmsnorm"]
    found = outcomes(arms)
    assert {v.outcome for v in found.values()} == {"held"}, {c: (v.outcome, v.reason) for c, v in found.items()}
    target = found["no target network needed"]
    assert {(c.present, c.absent) for c in target.contrasts} == {("target=polyak", "baseline"),
                                                                 ("target=hard", "baseline")}  # fmt: skip
    assert all(c.paired and c.seeds == (10, 10) for c in target.contrasts)
    assert "paired over puzzles" in target.measured and "unstable in 0 of 10" in target.measured
    assert [(c.present, c.absent) for c in found["weight decay"].contrasts] == [("baseline", "weight_decay=0")]
    assert [(c.present, c.absent) for c in found["post-norm"].contrasts] == [("mlp+norm", "mlp")]


def test_a_study_in_which_every_claim_fails():
    """The baseline is beyond the bound; decay and norm change nothing; a target network and replay help."""
    found = outcomes({
        "baseline": Made(ratio=1.5), "no decay": Made(WITHOUT["weight decay"]), "norm": Made(WITHOUT["post-norm"]),
        "target": Made(WITHOUT["no target network needed"], 0.86), "replay": Made(WITHOUT["no replay needed"], 0.86),
    }, puzzles=1000)  # fmt: skip
    assert {v.outcome for v in found.values()} == {"did not hold"}, {c: v.reason for c, v in found.items()}
    assert "with it the arm is better (target)" in found["no target network needed"].reason
    assert "beyond the bound" in found["bounded parameters"].reason


def test_an_unstable_baseline_refutes_stability_without():
    """A target network that helps nobody does not make an unstable baseline stable."""
    sick = dict(accuracy=0.8, collapsed=(0, 1, 2, 3, 4, 5))
    found = outcomes({"baseline": Made(**sick), "target": Made(WITHOUT["no target network needed"], **sick)})
    target = found["no target network needed"]
    assert target.outcome == "did not hold" and "baseline, without it, is unstable" in target.reason
    assert "unstable in 6 of 10" in target.measured
    assert found["bounded parameters"].outcome == "did not hold"
    assert found["bounded parameters"].reason == "the baseline is unstable"


def test_fewer_unstable_runs_are_help_at_equal_accuracy_of_the_rest():
    found = outcomes({
        "baseline": Made(diverged=range(6)), "target": Made(WITHOUT["no target network needed"]),
        "no decay": Made(WITHOUT["weight decay"], diverged=range(10)),
    })  # fmt: skip
    (contrast,) = found["no target network needed"].contrasts
    assert contrast.helps and contrast.unstable == (0, 6) and "regret" not in contrast.gains  # some have none
    assert found["no target network needed"].outcome == "did not hold"


def test_a_switch_that_harms_is_not_needed():
    found = outcomes({"baseline": Made(), "norm": Made(WITHOUT["post-norm"], 0.7),
                      "no decay": Made(WITHOUT["weight decay"], 0.86)})  # fmt: skip
    assert found["post-norm"].outcome == found["weight decay"].outcome == "did not hold"
    assert "the arm is better without it (no decay)" == found["weight decay"].reason


@pytest.mark.parametrize("claim", sorted(WITHOUT))
def test_few_seeds_and_wide_intervals_are_undecided(claim):
    for few in (Made(seeds=4), Made(accuracy=0.6, seeds=4)):
        found = outcomes({"baseline": Made(), "arm": replace(few, changes=WITHOUT[claim])})[claim]
        assert found.outcome == "undecided" and "too few seeds: 4" in found.reason
    wide = outcomes({"baseline": Made(spread=0.08), "arm": Made(WITHOUT[claim], spread=0.08)}, seed=2)[claim]
    assert wide.outcome == "undecided" and "too wide" in wide.reason
    for other, verdict in outcomes({"baseline": Made(), "arm": Made(WITHOUT[claim])}).items():
        assert (verdict.outcome == "not measured") == (other not in (claim, "bounded parameters"))


def test_arms_that_differ_in_more_than_the_switch_are_no_contrast():
    """Also not through settings that only count beside it, which may differ; and never with an unknown arm."""
    both = {"target": "polyak", "lr": 0.1}
    assert outcomes({"baseline": Made(), "arm": Made(both, 0.9)})["no target network needed"].outcome == "not measured"
    tuned = {"target": "polyak", "tau": 0.5}
    assert outcomes({"baseline": Made(), "arm": Made(tuned, 0.9)})["no target network needed"].outcome == "did not hold"
    layernorm = {"head_norm": "layernorm"}  # the claim is about RMSNorm
    assert outcomes({"baseline": Made(), "arm": Made(layernorm, 0.9)})["post-norm"].outcome == "not measured"
    info, results = make_study({"baseline": Made(), "arm": Made(WITHOUT["weight decay"])})
    for broken in (replace(info, arms={}), replace(info, baseline="gone")):
        assert {v.outcome for v in verdicts(broken, results, judge)[1:]} == {"not measured"}


def test_of_several_amounts_the_recipes_own_counts():
    """Weight decay of 1 harms; the recipe's 0.1 does not, and it is the one that is asked."""
    found = outcomes({"baseline": Made(), "decay 1": Made({"weight_decay": 1.0}, 0.5),
                      "no decay": Made(WITHOUT["weight decay"], 0.7)})["weight decay"]  # fmt: skip
    assert found.outcome == "held" and [c.present for c in found.contrasts] == ["baseline"]


@pytest.mark.parametrize(
    ("made", "outcome"),
    [(Made(ratio=0.5), "held"), (Made(ratio=1.2), "did not hold"), (Made(ratio=1.0), "undecided"),
     (Made(ratio=0.5, seeds=4), "undecided"), (Made(ratio=0.5, seeds=6), "undecided"),
     (Made(ratio=0.5, diverged=[1, 2, 3]), "did not hold"), (Made(ratio=math.nan), "not measured")],
)  # fmt: skip
def test_bounded_parameters(made, outcome):
    assert outcomes({"baseline": made})["bounded parameters"].outcome == outcome


def test_bounded_and_still_unstable_is_told():
    found = outcomes({"baseline": Made(), "sick": Made({"lr": 1.0}, collapsed=range(10))})["bounded parameters"]
    assert found.outcome == "held" and found.measured.endswith("within the bound and still unstable: sick")


def test_dotted_settings_of_live_arms():
    """Settings of hrm_rl.train have a group before the dot; a live arm that names no target network has none."""
    info, results = make_study({"baseline": Made(), "target": Made(accuracy=0.9), "no decay": Made(accuracy=0.7)})
    arms = {"baseline": {"optim.weight_decay": 0.1}, "no decay": {"optim.weight_decay": 0.0},
            "target": {"optim.weight_decay": 0.1, "agent_args.target": "polyak", "agent_args.tau": 0.1}}  # fmt: skip
    found = {v.claim: v for v in verdicts(replace(info, arms=arms), results, judge, 500)}
    assert found["weight decay"].outcome == "held" and found["no target network needed"].outcome == "did not hold"


def test_failed_runs_only_and_nothing_at_all():
    info, results = make_study({"baseline": Made(failed=range(10)), "arm": Made({"target": "hard"}, failed=range(10))})
    found = {v.claim: v for v in verdicts(info, results, judge, 500)}
    assert found["no target network needed"].outcome == "undecided"  # no run could be judged: none is stable
    assert "unstable in 0 of 0 runs" in found["no target network needed"].measured
    assert {v.outcome for v in found.values()} == {"not measured", "undecided"}
    assert {v.outcome for v in verdicts(info, [], judge, 500)} == {"not measured"}


# --- intervals of shares --------------------------------------------------------------------------------------


def test_shares_against_published_numbers():
    """Wilson for 0 of 10 by its closed form z^2 / (n + z^2); Newcombe (1998), table II, example (a): 56 / 70 against
    48 / 80 by method 10 is 0.0524 to 0.3339; ten against ten without a case is what the margin is taken from."""
    z = 1.959964
    assert wilson(0, 10).high == pytest.approx(z**2 / (10 + z**2), abs=1e-5) and wilson(0, 10).low == 0
    found = share_difference(56, 70, 48, 80)
    assert (found.low, found.high) == pytest.approx((0.0524, 0.3339), abs=1e-4)
    none = share_difference(0, 10, 0, 10)
    assert none.high == -none.low == pytest.approx(0.2775, abs=1e-4)
    assert math.isnan(share_difference(0, 0, 1, 2).value)


def test_a_gain_has_to_pass_margin_and_interval():
    def contrast(value, low, high):
        gain = {"accuracy": Interval(value, low, high)}
        return Contrast("a", "b", gain, gain, (10, 10), (0, 0), (10, 10), True)

    small, sure, unsure = contrast(0.005, 0.004, 0.006), contrast(0.02, 0.01, 0.03), contrast(0.02, -0.01, 0.05)
    assert (small.helps, small.useless) == (False, True) and (sure.helps, sure.useless) == (True, False)
    assert (unsure.helps, unsure.useless) == (False, False) and not sure.harms
    worse = contrast(-0.02, -0.03, -0.01)
    assert worse.harms and worse.useless and not worse.helps
    unknown = contrast(0.5, math.nan, math.nan)
    assert not (unknown.helps or unknown.harms or unknown.useless)


@pytest.mark.slow
def test_false_alarms_are_rare():
    """With ten target arms that do nothing, `did not hold` is wrong: Bonferroni keeps it to a few studies of 40."""
    wrong = 0
    for seed in range(40):
        arms = {"baseline": Made(spread=0.02)} | {
            f"tau {i}": Made({"target": "polyak", "tau": (i + 1) / 20}, spread=0.02) for i in range(10)}  # fmt: skip
        info, results = make_study(arms, seed=seed, puzzles=200)
        found = {v.claim: v.outcome for v in verdicts(info, results, judge)}
        wrong += found["no target network needed"] == "did not hold"
    assert wrong <= 6, wrong
    assert np.isfinite(wrong)
