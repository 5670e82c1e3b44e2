"""The workflows: pinned actions, least permissions, and only commands and files that are there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / ".github" / "workflows"
FILES = sorted(FOLDER.glob("*.yml"))
PINNED = re.compile(r"[\w./-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+( # zizmor: .+)?")


@pytest.fixture(params=FILES, ids=lambda file: file.stem)
def workflow(request: pytest.FixtureRequest) -> Path:
    file: Path = request.param
    return file


def jobs(file: Path) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(file.read_text(encoding="utf-8"))["jobs"]
    return found


def commands(file: Path) -> list[list[str]]:
    """The words of each line that a step runs."""
    steps = [step for job in jobs(file).values() for step in job["steps"] if "run" in step]
    return [shlex.split(line) for step in steps for line in step["run"].splitlines()]


def test_every_action_is_pinned_by_its_hash(workflow: Path) -> None:
    used = re.findall(r"uses: (.+)", workflow.read_text(encoding="utf-8"))
    assert used
    assert [action for action in used if not PINNED.fullmatch(action)] == []


def test_a_version_of_an_action_is_the_same_everywhere() -> None:
    used = {action for file in FILES for action in re.findall(r"uses: (\S+ # \S+)", file.read_text(encoding="utf-8"))}
    assert len(used) == len({action.partition("@")[0] for action in used})


def test_jobs_ask_for_what_they_need_and_end(workflow: Path) -> None:
    assert yaml.safe_load(workflow.read_text(encoding="utf-8"))["permissions"] == {}
    for name, job in jobs(workflow).items():
        assert job["timeout-minutes"] <= 120, name
        writes = {what for what, access in job["permissions"].items() if access == "write"}
        assert not writes or name in ("publish", "results"), name


def test_commands_and_files_are_there(workflow: Path) -> None:
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    for words in commands(workflow):
        if words[:1] == ["make"]:
            assert set(words[1:]) <= set(targets)
        if words[:1] == ["bash"]:
            assert (ROOT / words[1]).is_file()


def test_the_core_tests_are_there() -> None:
    names = re.search(r"^CORE := .*test_%\.py,(.+)\)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert names is not None
    assert all((ROOT / "tests" / f"test_{name}.py").is_file() for name in names[1].split())
