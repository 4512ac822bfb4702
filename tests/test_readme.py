"""What the README shows is what runs."""

import inspect
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_the_environment_example_runs(tmp_path):
    (example,) = [b for b in blocks("python") if "gym.make(" in b]
    done = subprocess.run([sys.executable, "-c", example.replace("num_envs=64", "num_envs=2")], cwd=ROOT, text=True,
                          capture_output=True, timeout=120)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Q halt" in done.stdout or "q_halt" in done.stdout


def test_the_agent_example_evaluates(tmp_path):
    (example,) = [b for b in blocks("python") if "class ConfidentAgent" in b]
    assert len([line for line in example.splitlines() if line.strip()]) <= 15
    (tmp_path / "my_agent.py").write_text(example)
    command = [sys.executable, "-m", "hrm_rl.evaluate", "--agent", "my_agent.ConfidentAgent", "--limit", "32",
               "--agent.threshold", "0.5"]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, env={"PYTHONPATH": str(tmp_path), "PATH": "/usr/bin:/bin"}, text=True,
                          capture_output=True, timeout=240)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "ConfidentAgent, at most" in done.stdout


def test_every_flag_it_shows_exists():
    from agents import HaltingAgent, find_agent
    from hrm_rl.ablate import build_parser as ablate_parser
    from hrm_rl.compare import build_parser as compare_parser
    from hrm_rl.evaluate import build_parser as evaluate_parser
    from hrm_rl.generate import build_parser as generate_parser
    from hrm_rl.train import build_parser as train_parser

    parsers = {"train": train_parser, "evaluate": evaluate_parser, "compare": compare_parser, "ablate": ablate_parser,
               "generate": generate_parser}  # fmt: skip
    known = {name: {action.dest for action in parser()._actions} for name, parser in parsers.items()}
    shown = re.findall(rf"-m hrm_rl\.({'|'.join(parsers)})((?: +[^\n#`]+)?)", README)
    assert len(shown) > 8
    for command, rest in shown:
        for flag in re.findall(r"--([a-z][a-z_.\-]*)", rest):
            if flag.startswith("agent."):  # an argument of the agent's own
                name = re.search(r"--agent ([\w.]+)", rest)
                agent_class = HaltingAgent if name and "my_agent" in name[1] else find_agent(name[1] if name else "q")
                assert flag.removeprefix("agent.") in inspect.signature(agent_class).parameters, flag
                continue
            assert flag.replace("-", "_") in known[command], f"{command} has no --{flag}"


def test_a_line_is_one_command_and_what_it_does():
    for line in "".join(blocks("bash")).splitlines():
        command, _, comment = line.partition("#")
        assert re.match(r"(python3? -m |torchrun |\. \.venv|pip |$)", command), line
        assert "-m hrm_rl" not in comment and (command.count("-m hrm_rl") < 2), line


def test_every_path_of_the_map_exists():
    section = README.split("## Map")[1]
    for line in section.splitlines():
        match = re.match(r"    ( *)(\w+)/", line)
        if match:
            parent = ROOT / "hrm_rl" if match[1] else ROOT
            assert (parent / match[2]).is_dir(), line
    for link in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / link).exists(), link
