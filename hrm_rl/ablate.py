"""Run a study of the halting Q-learner and report on it: `python -m hrm_rl.ablate q_stability`.

Many arms and seeds, on this process, several of them or Ray. A study can be stopped at any time: the same command goes
on with it. What failed or diverged is part of the result.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from hrm_rl import cli
from hrm_rl.errors import UserError

FORMAT = "hrm_rl.study.v1"
STUDY_FILE = "study.json"
MOST_RUNS = 5000  # without --yes


def build_parser():
    """The parser of this command; its --help explains every flag."""
    parser = cli.make_parser("python -m hrm_rl.ablate", __doc__.split("\n")[0], config=False)
    add = parser.add_argument
    add("study", type=str, metavar="STUDY", help="Name of a study of configs/ (q_stability, joint_stability, "
        "joint_released, cores), or a YAML file (docs/STUDIES.md).")  # fmt: skip
    add("--out", type=str, default="", help="The study's folder; nothing: studies/NAME. One that holds a part of this "
        "very study is gone on with.")  # fmt: skip
    add("--seeds", type=int, default=0, help="Seeds of each arm; 0: as the study says. More can be added later.")
    add("--updates", type=int, default=0, help="Updates of each run; 0: as the study says.")
    add("--arms", type=str, nargs="+", default=[], help="Only these arms, by name or pattern ('target=*'), and the "
        "baseline.")  # fmt: skip
    add("--workers", type=int, default=0, help="Processes; 1 is this one alone. 0: this one for learners on "
        "recordings, which train together, and one for each core for live runs.")  # fmt: skip
    add("--threads", type=int, default=0, help="Threads of each process; 0: the cores, shared out.")
    add("--ray_address", type=str, default="", help="Run on Ray: local starts one here with --workers workers, auto or "
        "HOST:PORT joins one. All machines must see the folder of the study.")  # fmt: skip
    add("--device", type=str, default="auto", help="auto, cpu or cuda.")
    add("--cache", type=str, default="", help="Folder of the recordings; nothing: hrm_rl/recordings in the user's "
        "cache ($XDG_CACHE_HOME or ~/.cache).")  # fmt: skip
    add("--yes", action="store_true", help=f"Run it even if it has more than {MOST_RUNS:,} runs.")
    add("--retry_failed", action="store_true", help="Do failed runs again (those that diverged stay as they are).")
    add("--list", action="store_true", help="Print the arms and the number of runs, and stop.")
    add("--report", action="store_true", help="Only write the report of what is finished.")
    return parser


def main(argv: Sequence[str]) -> int:
    options = cli.parse(build_parser(), argv)
    for name in ("seeds", "updates", "workers", "threads"):
        if not 0 <= options[name] < 1 << 31:
            raise UserError(f"--{name} must be at least 0, not {options[name]}")
    from hrm_rl.study import spec

    study = spec.load_study(spec.find_study(options.study), options.seeds or None, options.updates or None)
    part = study.selected(options.arms) if options.arms else study
    if not options.report:
        for line in _without_effect(study):
            _notice(line)
    if options.list:
        return _list(part)
    if len(part.runs) > MOST_RUNS and not (options.yes or options.report):
        raise UserError(f"{study.name}: {_grid(part)} are more than {MOST_RUNS:,}; add --yes (of "
                        "hrm_rl.ablate) to run them all, or choose by --arms or --seeds")  # fmt: skip

    from hrm_rl.devices import pick_device

    device = str(pick_device(options.device))
    out = Path(options.out or Path("studies") / study.name).expanduser()
    files = _files(study)
    content = {"format": FORMAT, "name": study.name, "identity": spec.identity(study, files), "study": study.plain(),
               "files": files}  # fmt: skip
    if options.report:
        _refuse_another(out, content, must_be=True)
        return _report(study, part, out, device, _command(argv))
    cache = _cache_folder(options.cache) if study.kind == "q_only" else Path()
    with _owned(out, content):
        interrupted = _sweep(options, study, part, out, device, cache, argv)
    return interrupted or _report(study, part, out, device, _command(argv))


def _list(study) -> int:
    for arm in study.arms:
        print(arm.name)
    print(f"\n{study.name}: {_grid(study)}")
    return 0


def _without_effect(study) -> list[str]:
    """What was asked for and is no arm of its own, one line for each arm that it comes to."""
    asked: dict[str, list[str]] = {}
    for words, arm in study.without_effect:
        asked.setdefault(arm, []).append(words)
    more = {arm: f" and {len(words) - 5:,} more" if len(words) > 5 else "" for arm, words in asked.items()}
    return [f"without effect, the same as {arm}: {', '.join(words[:5])}{more[arm]}" for arm, words in asked.items()]


def _grid(study) -> str:
    parts = _counted(len(study.arms), "arm"), _counted(study.seeds, "seed"), _counted(len(study.runs), "run")
    return f"{parts[0]} x {parts[1]} = {parts[2]} of {_counted(study.updates, 'update')}"


def _counted(number: int, thing: str) -> str:
    """1 seed, 2,000 seeds."""
    return f"{number:,} {thing}{'s' * (number != 1)}"


def _command(words: Sequence[str]) -> str:
    return shlex.join([Path(sys.executable).name, "-m", "hrm_rl.ablate", *words])


# --- the folder -----------------------------------------------------------------------------------------------


def _files(study) -> dict[str, str]:
    """SHA-256 of what the runs depend on beside the settings: core and puzzles. UserError for a core not there."""
    from hrm_rl.core.io import find_model, packaged_core
    from hrm_rl.recorded import model_sha256

    if study.kind == "q_only":
        from hrm_rl.study.q_only import puzzles_of

        model = find_model(study.core) if study.core else packaged_core(study.size)
        train, probe = puzzles_of(study)
        return {"core": model_sha256(model), "train": train.sha256, "probe": probe.sha256}
    found = {}
    for arm in study.arms:
        values = arm.values
        paths = {values[name]: Path(values[name]).expanduser() for name in ("data", "test_data") if values.get(name)}
        if values.get("init_core"):
            paths[values["init_core"]] = find_model(values["init_core"])  # of a folder, the model that is read
        found |= {source: model_sha256(path) for source, path in paths.items() if path.is_file()}
    return found


def _refuse_another(out: Path, content: Mapping[str, Any], must_be: bool = False) -> bool:
    """Whether `out` holds this study already; UserError where it holds something else."""
    path = out / STUDY_FILE
    try:
        if not out.exists() or (out.is_dir() and all(_says_nothing(p) for p in out.iterdir())):
            if must_be:
                raise UserError(f"{out}: holds no study to report on")
            return False
        if not path.is_file():
            raise UserError(f"{out}: not the folder of a study (it holds no {STUDY_FILE}); choose another --out")
        held = json.loads(path.read_bytes())
        if held["format"] != FORMAT:
            raise UserError(f"{path}: of another version ({held['format']!r}); choose another --out")
        name, same = str(held["name"]), held["identity"] == content["identity"]
        difference = "" if same else _difference(held, content)
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
        raise UserError(f"{path}: cannot be read as that of a study ({reason})") from error
    if not same:
        other = f"another study, {name!r}" if name != content["name"] else f"study {name!r} with other settings"
        raise UserError(f"{out}: holds {other} ({difference}); choose another --out")
    return True


def _says_nothing(path: Path) -> bool:
    """Whether something in a study's folder is there before study.json is: the lock, and the folder for runs."""
    return path.name.startswith(".") or (path.name == "runs" and path.is_dir() and not any(path.iterdir()))


def _difference(held: Mapping[str, Any], content: Mapping[str, Any]) -> str:
    """The first thing in which two studies differ, in words."""
    for group in ("study", "files"):
        old, new = held[group], json.loads(json.dumps(content[group]))
        for name in [*new, *(name for name in old if name not in new)]:
            if name == "arms" and old.get(name) != new.get(name):
                arms = [arm for arm in {**old.get(name, {}), **new.get(name, {})}
                        if old.get(name, {}).get(arm) != new.get(name, {}).get(arm)]  # fmt: skip
                return f"its arms are not these: {arms[0]!r} differs"
            if old.get(name) != new.get(name):
                return f"its {name} is {old.get(name)}, here it is {new.get(name)}"
    return "its content differs"


@contextlib.contextmanager
def _owned(out: Path, content: Mapping[str, Any]) -> Iterator[None]:
    """The study's folder, made where it is not there, for this process alone. UserError where it is another's."""
    from hrm_rl.checkpoint import write_atomically
    from hrm_rl.study.sweep import clear_staging

    there = _refuse_another(out, content)
    made = [path for path in (out, *out.parents) if not path.exists()]
    try:
        out.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        raise UserError(f"--out {out}: cannot be written ({getattr(error, 'strerror', None) or error})") from None
    lock: IO[str] | None = None
    try:
        lock = _lock(out)
        if not there and not _refuse_another(out, content):  # looked again: another process may have made it
            write_atomically(out / STUDY_FILE, (json.dumps(content, indent=1) + "\n").encode())
        (out / "runs").mkdir(exist_ok=True)
        clear_staging(out / "runs")
        yield
    except UserError:
        if lock is not None and made and not any((out / "runs").glob("*")):  # nothing was done: leave nothing behind
            shutil.rmtree(out, ignore_errors=True)
            for path in made[1:]:
                with contextlib.suppress(OSError):
                    path.rmdir()
        raise
    finally:
        if lock is not None:
            lock.close()


def _lock(out: Path) -> IO[str]:
    from hrm_rl.checkpoint import lock_run

    try:
        return lock_run(out)
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written ({error.strerror})") from None
    except UserError as error:
        raise UserError(str(error).replace("the run is in use", "the study is in use")) from None


def _cache_folder(said: str) -> Path:
    from hrm_rl import recorded

    folder = Path(said).expanduser() if said else recorded.default_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(13, "Permission denied")
    except (OSError, ValueError) as error:
        raise UserError(f"--cache {folder}: cannot be written ({getattr(error, 'strerror', None) or error})") from None
    return folder


# --- the runs -------------------------------------------------------------------------------------------------


def _sweep(options, study, part, out: Path, device: str, cache: Path, argv: Sequence[str]) -> int:
    """Do what is left to do. 0 at the end, 128 + the signal's number where one came."""
    from hrm_rl.study import sweep

    there = sweep.results_in(out / "runs", _notice)
    wanted = [(arm.name, seed) for arm, seed in part.runs]
    kept = {run: there[run] for run in wanted if run in there}
    again = {run for run, result in kept.items() if result.status == "failed"} if options.retry_failed else set()
    todo = [run for run in wanted if run not in kept or run in again]
    before = [result for run, result in kept.items() if run not in again]
    print(f"{study.name}: {_grid(part)}; {len(before):,} are there already ({out})", flush=True)
    if not todo:
        return 0
    told = None
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(sweep.stopping())
            workers = stack.enter_context(contextlib.closing(_workers(options, study, len(todo), device)))
            if study.kind == "q_only":
                from hrm_rl.study import q_only

                data, _ = q_only.record(study, device, cache, _notice)
                tasks = q_only.tasks(study, todo, data.q_token.shape[-1], device, cache)
            else:
                from hrm_rl.study import joint

                tasks = joint.tasks(study, todo, out, device, again)
            print(f"on {workers.words}", flush=True)
            told = stack.enter_context(contextlib.closing(sweep.Told(tasks, len(wanted), before, _is_unstable)))
            sweep.sweep(tasks, workers, out / "runs", told)
        except sweep.Stopped as stopped:
            stack.close()
            done = told.finished if told is not None else len(before)
            print(f"\n{stopped}: {done:,} of {len(wanted):,} runs are finished and safe. Go on with:\n  "
                  f"{_command(argv)}", flush=True)  # fmt: skip
            return 128 + stopped.number
        except OSError as error:
            if error.strerror is None:
                raise
            raise UserError(f"{out}: cannot be written ({error.strerror}); what is finished is safe, go on with: "
                            f"{_command(argv)}") from error  # fmt: skip
    return 0


def _workers(options, study, todo: int, device: str):
    """Where the runs go: Ray, this process, or several."""
    from hrm_rl.study import sweep

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    together = study.kind == "q_only" or device.startswith("cuda")
    if options.ray_address:
        size = options.workers or cores
        return sweep.RayWorkers(options.ray_address, size, options.threads or max(1, cores // size))
    size = min(options.workers or (1 if together else cores), todo)
    if size == 1:
        if options.threads:
            import torch

            torch.set_num_threads(options.threads)
        return sweep.Here()
    return sweep.Pool(size, options.threads or max(1, cores // size))


def _is_unstable(run) -> bool:
    """The seam to `hrm_rl.study.stability`."""
    from hrm_rl.study.stability import verdict

    return verdict(run).unstable


# --- the report -----------------------------------------------------------------------------------------------


def _report(study, part, out: Path, device: str, command: str) -> int:
    """Write tables and report of all finished runs of the study, and print those of the chosen arms."""
    import torch

    from hrm_rl.devices import describe
    from hrm_rl.study import costs
    from hrm_rl.study.info import StudyInfo
    from hrm_rl.study.report import write_report
    from hrm_rl.study.spec import BASELINE
    from hrm_rl.study.sweep import results_in
    from hrm_rl.study.table import write_tables

    there = results_in(out / "runs", _notice)
    results = [there[arm.name, seed] for arm, seed in part.runs if (arm.name, seed) in there]
    if not results:
        raise UserError(f"{out}: holds no finished run to report on")
    puzzles = max((len(run.right) for run in results if run.right is not None), default=0)
    info = StudyInfo(
        title=study.title or study.name, question=study.question, command=command,
        date=time.strftime("%Y-%m-%d %H:%M %Z"), machine=describe(torch.device(device)), torch=torch.__version__,
        baseline=BASELINE, kind=study.kind, puzzles=puzzles, updates=study.updates, planned=len(part.runs),
        arms={arm.name: arm.values for arm in part.arms},
    )  # fmt: skip
    write_tables(out, info, results)
    report = write_report(out, info, results)
    print("\n" + (costs.text(costs.cost_rows(info, results)) if study.kind == "train" else short_table(info, results)))
    lost = sum(run.status == "failed" for run in results)
    if lost:
        print(f"\n{lost} of {len(results)} runs failed (see {out / 'failures.log'}); --retry-failed does them again")
    missing = len(part.runs) - len(results)
    print(f"\n{len(results)} runs{f', {missing} are missing' if missing else ''}. report: {report}")
    return 0


def short_table(info, results: Sequence) -> str:
    """One line an arm: accuracy and regret at the end with 95 % intervals over seeds, and how many are unstable."""
    from hrm_rl.study.measures import METRICS
    from hrm_rl.study.statistics import summarise

    ways = {"higher": 1, "lower": -1}
    summaries = summarise(results, info.baseline, {name: ways.get(m.better, 0) for name, m in METRICS.items()})
    unstable: dict[str, int] = {}
    for run in results:
        unstable[run.arm] = unstable.get(run.arm, 0) + _is_unstable(run)
    width = max(len("arm"), *(len(name) for name in summaries))
    lines = [f"{'arm':<{width}}  {'accuracy':>22}  {'regret':>26}  unstable"]
    for name in info.arms:
        if name in summaries:
            held = summaries[name]
            accuracy, regret = (_interval(held.metrics.get(metric), style) for metric, style in
                                (("accuracy", ".1%"), ("regret", ".4f")))  # fmt: skip
            lines.append(f"{name:<{width}}  {accuracy:>22}  {regret:>26}  {unstable[name]}/{len(held.seeds)}")
    return "\n".join(lines)


def _interval(summary: Any, style: str) -> str:
    if summary is None or summary.mean.value != summary.mean.value:
        return "-"
    mean = summary.mean
    return f"{mean.value:{style}}" + (f" [{mean.low:{style}}, {mean.high:{style}}]" if mean.known else "")


def _notice(line: str) -> None:
    print(f"note: {line}", file=sys.stderr)


if __name__ == "__main__":
    cli.run(main)
