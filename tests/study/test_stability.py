"""The verdict on synthetic series: each criterion, and for each a series that comes close and must pass."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from hrm_rl.study.results import RunResult
from hrm_rl.study.stability import StabilityThresholds, verdict

C = 21
NAN = float("nan")
#: What the standard arm of the packaged 6x6 core looked like, smoothed: nothing at the start, settled from 300 on.
GOOD = {
    "accuracy": [0.93] * C, "mean_return": [0.93] + [0.92] * (C - 1), "regret": [0.0] + [0.01] * (C - 1),
    "abs_bias_continue": [0.93, 0.65, 0.17] + [0.08] * (C - 3), "target_drift": [NAN, 0.73, 0.2] + [0.01] * (C - 3),
    "logit_max_abs": [5.0 + 0.1 * i for i in range(C)], "value_max_abs": [0.007] + [0.99] * (C - 1),
    "param_inf_norm": [5.0] * C,
}  # fmt: skip


def run(status: str = "finished", reason: str = "", puzzles: int = 1000, **series) -> RunResult:
    metrics = {n: torch.tensor(v, dtype=torch.float64) for n, v in (GOOD | series).items() if v is not None}
    return RunResult("arm", 0, status, reason, updates=100 * torch.arange(C), metrics=metrics,
                     right=torch.ones(puzzles).bool())  # fmt: skip


def returns(values: list[float], best: float = 0.93) -> dict[str, list[float]]:
    """A frozen core: what the return loses, the regret gains."""
    return {"mean_return": values, "accuracy": values, "regret": [best - v for v in values]}


def reason_of(result: RunResult) -> str:
    found = verdict(result)
    assert found.unstable and found.judged and len(found.reasons) == 1, found
    return found.reasons[0]


def test_the_standard_arm_is_stable():
    found = verdict(run())
    assert (found.unstable, found.reasons, found.collapse_update, found.judged) == (False, (), None, True)
    assert found.peak_accuracy == found.final_accuracy == 0.93


def test_slow_and_smooth_is_stable():
    """From nothing (0.93 by never halting, before the first update) to 0.7 at the end, as measured at lr 3e-5."""
    slow = [0.93] + [0.1 + 0.6 * (i / (C - 1)) ** 2 for i in range(1, C)]
    bias = [0.93 - 0.002 * i for i in range(C)]
    assert not verdict(run(**returns(slow), abs_bias_continue=bias, target_drift=[NAN] + [0.02] * (C - 1))).unstable
    # As fast as it can be and still not settled: targets move by 0.15 of the range, all of it towards the truth.
    fast = [3.1 - 0.15 * i for i in range(C)]
    moving = run(abs_bias_continue=fast, target_drift=[NAN] + [0.15] * (C - 1), value_max_abs=[1.0] * C)
    assert not verdict(moving).unstable
    # A policy that is wrong for a while because a small difference has the wrong sign, though every value improves.
    dip = [0.93] * 12 + [0.3] * 9
    assert not verdict(run(**returns(dip), abs_bias_continue=bias)).unstable
    assert "collapse" in reason_of(run(**returns(dip)))  # control: values that no longer improve


def test_collapse():
    down = [0.9] * 13 + [0.5] * 8
    found = verdict(run(**returns(down)))
    assert found.unstable and found.collapse_update == 1300
    assert (found.peak_accuracy, found.final_accuracy) == (0.9, 0.5)
    assert "collapse: return 0.900 at update 100, 0.500 in the last quarter" in found.reasons
    little = [0.9] * 13 + [0.79] * 8  # 0.11 below: within 0.1 and two standard errors of 1,000 puzzles at 90 %
    assert not verdict(run(**returns(little))).unstable
    assert verdict(run(puzzles=100_000, **returns(little))).unstable  # which many puzzles do not excuse
    early = [0.93, 0.1, 0.2] + [0.9] * 18  # lost and learned in the first half
    assert not verdict(run(**returns(early))).unstable


def test_a_core_that_collapses_is_no_step_on_the_way():
    """The best possible return falls as well: joint training lost its answers, whatever the values say."""
    down, bias = [0.9] * 13 + [0.5] * 8, [0.5 - 0.02 * i for i in range(C)]
    lost = {"mean_return": down, "accuracy": down, "regret": [0.02] * C, "abs_bias_continue": bias}
    assert "collapse" in reason_of(run(**lost))


def test_swings():
    swinging = [0.93] * 14 + [0.5] + [0.93] * 6
    assert "swing: return fell from 0.930 to 0.500 by update 1400" in reason_of(run(**returns(swinging)))
    assert verdict(run(**returns(swinging))).collapse_update is None
    lucky = [0.93] * 12 + [0.2, 0.9, 0.1, 0.2, 0.3, 0.1, 0.2, 0.1, 0.93]  # ends well by chance
    assert "swing" in reason_of(run(**returns(lucky)))
    jitter = [0.9 + 0.03 * (-1) ** i for i in range(C)]
    assert not verdict(run(**returns(jitter))).unstable


def test_explosion_of_values_and_of_logits():
    exploded = [1.0] * 10 + [50.0] + [1.0] * 10  # a peak counts though it went down again
    assert "explosion: a value of 50 at update 1000" in reason_of(run(value_max_abs=exploded))
    assert "explosion: a value of 3 at the end" in reason_of(run(value_max_abs=[1.0] * 20 + [3.0]))
    assert not verdict(run(value_max_abs=[5.0 - 0.15 * i for i in range(C)])).unstable  # began there, by its bias of -5
    assert not verdict(run(value_max_abs=[1.6] * C)).unstable  # an unbounded head's worst puzzle
    assert "explosion: a logit of 400" in reason_of(run(logit_max_abs=[5.0] * 20 + [400.0]))
    assert not verdict(run(logit_max_abs=[5.0 + 4 * i for i in range(C)])).unstable  # confidence grows without an end
    assert "a value of 400" in reason_of(run(logit_max_abs=[400.0] * C, value_max_abs=[5.0] + [400.0] * (C - 1)))


def test_restless_targets():
    restless = run(target_drift=[NAN] + [0.2] * (C - 1))
    assert "restless targets: they move by 0.200" in reason_of(restless)
    settled = run(target_drift=[NAN] + [0.5] * 14 + [0.02] * 6)  # moved while it learned
    assert not verdict(settled).unstable
    wide = run(target_drift=[NAN] + [0.15] * (C - 1), value_max_abs=[2.0] * C)  # half as much of their range
    assert not verdict(wide).unstable


def test_bias_that_grows():
    grown = [0.93, 0.3] + [0.1] * 12 + [0.5] * 7
    assert "bias grows: |bias| of CONTINUE was 0.100, and is 0.500" in reason_of(run(abs_bias_continue=grown))
    assert not verdict(run(abs_bias_continue=[0.93, 0.3] + [0.1] * 12 + [0.3] * 7)).unstable
    assert not verdict(run(abs_bias_continue=[0.01] + [0.8] * (C - 1))).unstable  # wrong, but so from the start


@pytest.mark.parametrize("unbounded", [False, True])
def test_numbers_that_are_lost(unbounded):
    name = "param_inf_norm" if unbounded else "logit_max_abs"
    broken = GOOD[name][:8] + [math.inf if unbounded else NAN] * 13
    found = verdict(run(**{name: broken}))
    assert found.unstable and found.collapse_update == 800 and found.reasons == ("diverged: not finite at update 800",)
    never = verdict(run(logit_max_abs=[NAN] * C, param_inf_norm=None))  # an agent without values has none
    assert not never.unstable


def test_status():
    diverged = verdict(run("diverged", "update 70: loss/total is not finite"))
    assert diverged.unstable and diverged.reasons == ("diverged: update 70: loss/total is not finite",)
    assert diverged.collapse_update == 2000
    failed = verdict(run("failed", "no memory"))
    assert not failed.unstable and not failed.judged and failed.reasons == ("not judged: no memory",)
    empty = verdict(RunResult("arm", 0, "failed", "no memory"))
    assert math.isnan(empty.peak_accuracy) and not empty.judged
    assert verdict(RunResult("arm", 0, "diverged", "at once")).unstable
    only_start = run()
    short = replace(only_start, updates=only_start.updates[:1],
                    metrics={n: v[:1] for n, v in only_start.metrics.items()})  # fmt: skip
    assert not verdict(short).judged and not verdict(short).unstable


def test_agents_without_values_are_judged_by_what_they_earn():
    without = dict.fromkeys([n for n in GOOD if n not in ("accuracy", "mean_return", "regret")])
    down = {"mean_return": [0.9] * 13 + [0.5] * 8, "regret": [0.0] * C}
    assert not verdict(run(**without)).unstable
    assert "collapse" in reason_of(run(**without | down))
    accuracy_alone = without | {"mean_return": None, "regret": None, "accuracy": [0.9] * 13 + [0.5] * 8}
    assert "collapse: accuracy" in reason_of(run(**accuracy_alone))


def test_thresholds_are_the_callers():
    mild = run(**returns([0.9] * 13 + [0.7] * 8))
    assert verdict(mild).unstable and not verdict(mild, StabilityThresholds(drop=0.5)).unstable


def live_run(live: bool = True, **changes) -> RunResult:
    """A core that learns: more is solved all along, the halting loses much in between, targets and biases move."""
    series = {
        "accuracy": [0.0, 0.0, 0.0, 0.1, 0.3, 0.5, 0.6, 0.65, 0.7, 0.72, 0.72],
        "regret": [0.0, 0.0, 0.05, 0.3, 0.35, 0.2, 0.15, 0.1, 0.1, 0.08, 0.08],
        "target_drift": [0.2] * 11, "abs_bias_continue": [0.0] * 3 + [0.5] * 8, "logit_max_abs": [5.0] * 11,
    }  # fmt: skip
    series |= {"mean_return": series["accuracy"]} | changes
    held = {name: torch.tensor(value).double() for name, value in series.items()}
    return RunResult("a", 0, "finished", updates=torch.arange(0, 110, 10), metrics=held, live=live)


def test_a_live_run_is_judged_by_its_accuracy():
    """Targets move while a core learns: that is no instability."""
    assert not verdict(live_run()).unstable
    assert verdict(live_run(live=False)).unstable  # negative control: on a frozen core this is not how learning looks
    accuracy = live_run().metrics["accuracy"].tolist()
    fallen = verdict(live_run(accuracy=[*accuracy[:8], 0.2, 0.2, 0.2]))
    assert fallen.unstable and fallen.reasons[0].startswith("collapse: accuracy")
    swing = verdict(live_run(accuracy=[*accuracy[:8], 0.7, 0.3, 0.72]))
    assert swing.unstable and swing.reasons[0].startswith("swing: accuracy")


def test_regret_that_grows_with_what_the_core_can_do_is_no_instability():
    """A core that solves nothing loses nothing by its halting, whenever it begins to solve something."""
    regret = [0.0] * 8 + [0.3, 0.35, 0.4]
    assert not verdict(live_run(accuracy=[0.0] * 8 + [0.3, 0.4, 0.5], regret=regret)).unstable
    frozen = dict.fromkeys(("target_drift", "abs_bias_continue"), [0.0] * 11) | {"mean_return": [0.9] * 8 + [0.5] * 3}
    assert verdict(live_run(live=False, regret=regret, **frozen)).unstable  # on a frozen core it is
