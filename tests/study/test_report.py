"""The report of a study, looked at as a reader's browser does, and its table read back."""

from __future__ import annotations

import base64
import csv
import math
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from synthetic_study import METRICS, Made, judge, make_study, standard_arms

from hrm_rl.errors import UserError
from hrm_rl.study import table
from hrm_rl.study.plots import SERIES, seeds_in_words, shortened
from hrm_rl.study.report import groups, pages, render, write_report
from hrm_rl.study.results import RunResult
from hrm_rl.study.statistics import by_arm

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
NASTY = "<script>alert('x')</script> & \"q\" $\\frac{ #0068a8 \x07\nend"


class _Reader(HTMLParser):
    """Tags as a browser's parser sees them."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.words.append(data)

    def images(self) -> list[str]:
        """The SVG documents of all images."""
        uris = [a["src"] for tag, a in self.tags if tag == "img"]
        assert all(uri.startswith("data:image/svg+xml;base64,") for uri in uris)
        return [base64.b64decode(uri.split(",", 1)[1]).decode() for uri in uris]

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.words))


def read(info, results) -> _Reader:
    return _Reader(render(info, results, judge, METRICS))


# --- what stands in it ----------------------------------------------------------------------------------------


def test_a_whole_report(tmp_path):
    info, results = make_study(standard_arms(), title="A study")
    path = write_report(tmp_path / "new", info, results[::-1], judge, METRICS)
    text = path.read_text()
    assert path == tmp_path / "new" / "report.html"
    assert not re.search(r"https?:|//[a-z]|url\(|@import|<link|src=\"(?!data:)", text)
    page = _Reader(text)
    quote = ("1 of 7 arms was unstable in at least one run (wild in 10 of 10 runs); the baseline solved")
    assert quote in page.text and "unstable in 0 of 10 runs" in page.text
    assert "Of 70 runs 5 diverged." in page.text and "not finished" not in page.text
    order = [page.text.index(word) for word in ("What the paper claims", "Every arm", "Every seed thin",
             "Q minus the exact optimum", "All metrics against", "Peak and final accuracy", "What the metrics mean",
             info.command)]  # fmt: skip
    assert order == sorted(order)
    for claim, outcome in (("bounded parameters", "held"), ("weight decay", "held"), ("post-norm", "did not hold")):
        assert re.search(f"{claim} .{{0,200}} {outcome}", page.text), claim
    for svg in page.images():
        ET.fromstring(svg)
        assert "mathdefault" not in svg and "$" not in svg
        assert "10 seeds" in svg and "prefers-color-scheme:dark" in svg and "var(--ink)" in svg
    forests = [svg for svg in page.images() if "at the last checkpoint" in svg]
    assert len(forests) == 15 and sum("minus the baseline" in svg for svg in forests) == 5
    for sentence, _, _ in METRICS.values():
        assert sentence.split("<")[0][:30] in page.text


def test_every_name_is_escaped():
    """Also in the figures, where mathematics and control characters would break the image."""
    arms = {NASTY: Made(seeds=5), NASTY + "2": Made({"lr": 0.5}, seeds=5, diverged=[1])}
    info, results = make_study(arms, title=NASTY)
    info = replace(info, command=NASTY, machine=NASTY, question=NASTY, versions={NASTY: NASTY})
    results = [replace(run, reason=NASTY, changes={NASTY: NASTY}) for run in results]
    text = render(info, results, judge, METRICS)
    assert "<script>alert" not in text and "&lt;script&gt;alert" in text
    page = _Reader(text)
    assert [tag for tag, _ in page.tags].count("script") == 1
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    for svg in page.images():
        ET.fromstring(svg)
        assert "<script" not in svg
    odd = "a\x00b\nc\ud800d"
    assert shortened(odd, 20).isprintable() and len(shortened("x" * 99, 20)) == 20
    render(replace(info, arms={}, baseline="?"), [replace(r, arm=odd) for r in results], judge, METRICS)


def test_few_seeds_are_said_in_words():
    info, results = make_study({"baseline": Made(seeds=3), "arm": Made({"lr": 0.5}, seeds=10)})
    page = read(info, results)
    assert "1 of 2 arms have fewer than 5 seeds (3)" in page.text
    assert any("3 to 10 seeds an arm, fewer than 5" in svg for svg in page.images())
    assert any("3 seeds (few)" in svg for svg in page.images())
    assert "All arms have fewer" in read(*make_study({"baseline": Made(seeds=1)})).text
    assert "fewer than" not in read(*make_study({"baseline": Made(seeds=5)})).text
    assert seeds_in_words([1]) == "1 seed, fewer than 5" and seeds_in_words([10, 10]) == "10 seeds an arm"


@pytest.mark.slow
@pytest.mark.filterwarnings("error")  # numbers that are not there may not even warn
@pytest.mark.parametrize(
    "case", ["one run", "failed", "nan", "none", "no baseline", "huge", "no metrics", "unfinished"])
def test_odd_studies(case):
    info, results = make_study({"baseline": Made(seeds=2), "arm": Made({"lr": 0.5}, seeds=2)})
    words = {
        "one run": "No run of 1 arm was unstable", "failed": "All 4 runs of 2 arms failed", "nan": "has no accuracy",
        "none": "No run of this study has a result yet", "no baseline": "the baseline gone has no run",
        "huge": "No run of 2 arms was unstable", "no metrics": "No run was measured",
        "unfinished": "not finished: 4 of 40 planned",
    }[case]  # fmt: skip
    if case == "one run":
        info, results = make_study({"baseline": Made(seeds=1)}, checkpoints=1)
    elif case == "failed":
        results = [RunResult(run.arm, run.seed, "failed", "no memory") for run in results]
    elif case in ("nan", "huge"):
        value = math.nan if case == "nan" else 1e300
        results = [replace(run, right=None, by_step={k: torch.full_like(v, value) for k, v in run.by_step.items()},
                           metrics={k: v if case == "huge" and k == "accuracy" else torch.full_like(v, value)
                                    for k, v in run.metrics.items() if case == "huge" or k != "accuracy"})
                   for run in results]  # fmt: skip
    elif case == "none":
        results = []
    elif case == "no baseline":
        info = replace(info, baseline="gone")
    elif case == "no metrics":
        results = [replace(run, metrics={}, by_step={}, right=None) for run in results]
    elif case == "unfinished":
        info = replace(info, planned=40)
    page = read(info, results)
    assert words in page.text
    for svg in page.images():
        ET.fromstring(svg)


def test_pages_of_many_arms():
    info, results = make_study({"baseline": Made(seeds=1)} | {
        f"{kind} {i}": Made(changes | {"gamma": i / 10}, seeds=1) for i in range(8)
        for kind, changes in (("t", {"target": "polyak", "tau": 0.5}), ("l", {"lr": 0.1}), ("w", {"lr": 1, "lam": 0.1}))
    })  # fmt: skip
    found = groups(info, by_arm(results))
    assert set(found) == {"target and gamma", "lr and gamma", "several settings"}
    assert [len(members) for members in found.values()] == [8, 8, 8]
    assert [len(part) for part in pages(list(range(30)), 14)] == [10, 10, 10] and pages([], 4) == [[]]
    assert sorted(arm for members in found.values() for part in pages(members, len(SERIES)) for arm in part) == sorted(
        arm for arm in info.arms if arm != "baseline")  # fmt: skip


# --- in a browser ---------------------------------------------------------------------------------------------


def dom(path: Path, profile: Path) -> str:
    """The page after its script ran, in headless Chromium that reaches no network. Its images: root's data-images."""
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
               "--disable-background-networking", "--proxy-server=127.0.0.1:9", "--host-resolver-rules=MAP * ~NOTFOUND",
               f"--user-data-dir={profile}", "--virtual-time-budget=5000", "--dump-dom", path.as_uri()]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


def decoded(text: str) -> tuple[int, int]:
    """Images that the browser decoded, and all."""
    found = re.search(r'<html[^>]* data-images="(\d+)/(\d+)"', text)
    assert found, text[:300]
    return int(found[1]), int(found[2])


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no chromium or chrome on PATH to open the report in")
def test_in_a_browser_without_network(tmp_path):
    arms = standard_arms(6) | {NASTY: Made({"lr": 0.5}, seeds=6, failed=[2])}
    path = write_report(tmp_path, *make_study(arms), judge, METRICS)
    whole = dom(path, tmp_path / "profile")
    assert 'data-ready="1"' in whole and 'role="button"' in whole
    right, total = decoded(whole)
    assert right == total > 30 and "could not be decoded" not in whole.split("<script>")[0]

    text = path.read_text()  # the negative control: one image whose content is cut off
    uri = re.search(r'src="(data:[^"]{2000})[^"]*"', text)
    path.write_text(text.replace(uri[0], f'src="{uri[1]}"'))
    broken = dom(path, tmp_path / "profile")
    assert decoded(broken) == (total - 1, total) and f"1 of {total} figures could not be decoded" in broken

    # sorting: click on the worst seed of the table of arms, twice; runs without a number stay last
    click = "<script>window.addEventListener('load',function(){var t=[].slice.call(document.querySelectorAll('th'))" \
        ".filter(function(h){return h.textContent=='worst seed'})[0];t.click();t.click();document.documentElement" \
        ".dataset.order=[].map.call(t.closest('table').tBodies[0].rows,function(r){return r.cells[5].dataset.v})" \
        ".join(' ')})</script></body>"  # fmt: skip
    path.write_text(text.replace("</body>", click))
    order = re.search(r'data-order="([^"]+)"', dom(path, tmp_path / "profile"))[1].split()
    values = [float(word) for word in order]
    assert len(values) == 8 and values == sorted(values, reverse=True) and values[0] > values[-1]


@pytest.mark.slow
def test_a_hundred_arms_stay_small(tmp_path):
    arms = {"baseline": Made()} | {
        f"arm {i}": Made({("lr", "gamma", "epsilon", "tau", "ponder_cost")[i % 5]: (i + 1) / 200}) for i in range(100)}
    info, results = make_study(arms)
    extra = {f"metric_{k}": torch.from_numpy(np.random.default_rng(k).random(20)) for k in range(20)}
    results = [replace(run, metrics=run.metrics | extra) for run in results]
    path = write_report(tmp_path, info, results, judge, METRICS)
    assert path.stat().st_size < 15e6, path.stat().st_size
    assert len(_Reader(path.read_text()).images()) > 100


# --- the table ------------------------------------------------------------------------------------------------


def test_the_table_reads_back(tmp_path):
    import pyarrow.parquet as pq

    info, results = make_study({"baseline": Made(seeds=2), "a,\"b\"\n": Made({"lr": 0.5}, seeds=3, diverged=[0],
                                                                             failed=[2])}, checkpoints=4)  # fmt: skip
    results[0] = replace(results[0], metrics=results[0].metrics | {"only here": torch.arange(4).double() / 3})
    paths = table.write_tables(tmp_path / "new", info, results)
    assert [p.name for p in paths] == ["table.csv", "by_step.csv", "table.parquet", "by_step.parquet"]
    with open(paths[0], newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 4 * 4 + 1  # four measured runs, and the one that failed before its first checkpoint
    assert list(rows[0])[:8] == ["arm", "seed", "status", "reason", "seconds", "puzzles", "update", "arm.target"]
    by_key = {(row["arm"], row["seed"], row["update"]): row for row in rows}
    for run in results:
        for c, update in enumerate(run.updates.tolist()):
            row = by_key[run.arm, str(run.seed), str(update)]
            assert row["status"] == run.status and float(row["arm.lr"]) == info.arms[run.arm]["lr"]
            for name, series in run.metrics.items():
                value = float(row[name])
                assert value == float(series[c]) or math.isnan(value) and math.isnan(series[c])
    failed = by_key['a,"b"\n', "2", ""]
    assert failed["accuracy"] == "" and failed["reason"].startswith("worker was killed")
    assert rows[-1]["only here"] == "" and float(rows[3]["only here"]) == 1.0
    held = pq.read_table(paths[2]).to_pylist()
    assert [str(row["arm"]) for row in held] == [row["arm"] for row in rows]
    for plain, row in zip(held, rows, strict=True):
        for name, value in plain.items():
            same = row[name] == "" if value is None else row[name] == str(value)
            assert same or value == float(row[name]), (name, value, row[name])
    assert type(held[0]["arm.lr"]) is float and type(held[0]["seed"]) is int and held[-1]["update"] is None
    steps = pq.read_table(paths[3]).to_pylist()
    run = results[3]
    (one,) = [r for r in steps if (r["arm"], r["seed"], r["step"], r["update"]) == (run.arm, run.seed, 5, 2000)]
    assert one["bias_continue"] == float(run.by_step["bias_continue"][3, 4]) and len(steps) == 4 * 4 * 16


@pytest.mark.slow
def test_nothing_depends_on_the_order_of_the_runs(tmp_path):
    info, results = make_study({"b": Made(seeds=3), "a": Made({"lr": 0.5}, seeds=3)}, checkpoints=2)
    assert render(info, results, judge, METRICS) == render(info, results[::-1], judge, METRICS)
    first = [p.read_bytes() for p in table.write_tables(tmp_path, info, results)]
    assert [p.read_bytes() for p in table.write_tables(tmp_path, info, results[::-1])] == first
    assert first[0].split(b"\n")[1].startswith(b"b,0,")  # the study's order, not the alphabet's


def test_settings_of_mixed_types():
    info, results = make_study({"a": Made(seeds=1), "b": Made(seeds=1), "c": Made(seeds=1)}, checkpoints=1)
    values = [{"x": 1, "y": True, "z": 1, "n": None}, {"x": 2.5, "y": False, "z": "no"}, {"x": 3, "z": [1, 2]}]
    found = table.columns(replace(info, arms=dict(zip("abc", values, strict=True))), results)
    assert found["arm.x"] == (float, [1.0, 2.5, 3.0]) and found["arm.y"] == (bool, [True, False, None])
    assert found["arm.z"] == (str, ["1", "no", "[1, 2]"]) and found["arm.n"] == (str, [None, None, None])
    assert table.to_parquet(found, Path("x"))


def test_without_pyarrow_the_csv_is_there(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match="needs pyarrow .pip install pyarrow.; the CSV is there"):
        table.write_tables(tmp_path, *make_study({"baseline": Made(seeds=1)}))
    assert (tmp_path / "table.csv").stat().st_size > 1000 and not list(tmp_path.glob("*.parquet"))
