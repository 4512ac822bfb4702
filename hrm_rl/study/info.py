"""What a study is, beside its results: where they come from, and the settings of its arms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hrm_rl.study.results import RunResult


@dataclass(frozen=True)
class StudyInfo:
    """One study. All text may hold anything: the report escapes it."""

    title: str
    command: str  # what was typed
    date: str
    machine: str  # in words: processor, cores, device
    torch: str  # version
    baseline: str  # name of the arm that all others are compared with
    kind: str  # q_only, joint or train
    puzzles: int  # that the metrics are measured on
    updates: int  # of each run
    planned: int  # runs the study asks for; fewer results are an unfinished study
    arms: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # name -> all settings, in the study's order
    question: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)  # other packages, for the provenance

    def in_order(self, results: Sequence[RunResult]) -> list[RunResult]:
        """By arm in the study's order (unknown ones behind, by name), then seed: the same whoever finished first."""
        place = {name: i for i, name in enumerate(self.arms)}
        return sorted(results, key=lambda run: (place.get(run.arm, len(place)), run.arm, run.seed))

    def changes(self, arm: str, runs: Sequence[RunResult] = ()) -> dict[str, Any]:
        """The settings of an arm that differ from the baseline's; of an arm not in `arms`, what its runs say."""
        if arm in self.arms and self.baseline in self.arms:
            base = self.arms[self.baseline]
            return {name: value for name, value in self.arms[arm].items() if name not in base or base[name] != value}
        return dict(next((run.changes for run in runs if run.arm == arm), {}))
