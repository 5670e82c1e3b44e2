"""The documents: their Python and their commands run, their links work, their lines wrap.

Python runs, and so does `compacter-kernels`, in the order of the document and in a folder of its
own. pip, make and the like set up a checkout: they are compared with the files of the project. A
document with other commands, or with some that take too long, says why it is `NOT_RUN`; these are
compared with the options that the scripts have.
"""

from __future__ import annotations

import ast
import importlib
import os
import re
import runpy
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

import compacter_kernels as ck
from compacter_kernels import cli

ROOT = Path(__file__).resolve().parents[1]
PATTERNS = ("*.md", "docs/**/*.md", "examples/**/*.md", "benchmarks/*.md", "benchmarks/results/**/README.md")
DOCUMENTS = [str(path.relative_to(ROOT)) for pattern in PATTERNS for path in sorted(ROOT.glob(pattern))]
GENERATED = re.compile(r"^<!-- (\w+):begin -->\n.*?^<!-- \1:end -->\n", re.MULTILINE | re.DOTALL)
NOT_RUN = re.compile(r"^<!-- commands are not run: (.+) -->$", re.MULTILINE)
ASSIGNMENT = re.compile(r"[A-Z_]+=.*")  # an environment variable before a command, or a variable of make


class Block(NamedTuple):
    """A fenced block of a document: its kind, its first line and its text."""

    kind: str
    line: int
    text: str


def read(document: str) -> str:
    return (ROOT / document).read_text(encoding="utf-8")


def blocks(document: str) -> list[Block]:
    text = read(document)
    fenced = re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [Block(match[1], text.count("\n", 0, match.start()) + 2, match[2]) for match in fenced]


def run_code(document: str, chosen: list[Block]) -> dict[str, Any]:
    """Run these blocks of a document in order. Returns the names of the Python blocks."""
    names: dict[str, Any] = {"__name__": document}
    not_run = NOT_RUN.search(read(document))
    for block in chosen:
        if block.kind == "python":
            lines = "\n" * (block.line - 1) + block.text  # so that an error names the line of the document
            exec(compile(lines, document, "exec"), names)
        elif block.kind == "console" and not not_run:
            for program, *arguments in commands_of(block):
                if program == "compacter-kernels":
                    assert cli.main(arguments) == 0, f"{document}: compacter-kernels {shlex.join(arguments)}"
                else:
                    assert program in CHECKS, f"{document} runs {program}, and does not say why it is not run"
    return names


def commands(document: str) -> Iterator[list[str]]:
    """The commands of the console blocks, without comments and environment variables."""
    for block in blocks(document):
        if block.kind == "console":
            yield from commands_of(block)


def commands_of(block: Block) -> Iterator[list[str]]:
    for line in block.text.replace("\\\n", " ").splitlines():
        assert line.startswith("$ "), f"line {block.line} shows output in a console block: {line}"
        words = shlex.split(line.removeprefix("$ "), comments=True)
        yield from split(words)


def split(words: list[str]) -> Iterator[list[str]]:
    """The commands between `&&`."""
    if "&&" in words:
        first = words.index("&&")
        yield from split(words[:first])
        yield from split(words[first + 1 :])
        return
    while ASSIGNMENT.fullmatch(words[0]):
        words = words[1:]
    yield words


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_block_is_python_or_console(document: str) -> None:
    """A block of another kind would not be tested. A citation needs no test."""
    assert {block.kind for block in blocks(document)} <= {"python", "console", "bibtex"}
    assert len(re.findall(r"^\s*```", read(document), re.MULTILINE)) == 2 * len(blocks(document))


WITH_CODE = [document for document in DOCUMENTS if {"python", "console"} & {block.kind for block in blocks(document)}]


@pytest.mark.parametrize("document", WITH_CODE)
def test_the_code_of_a_document_runs(document: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"weight": torch.ones(2)}, "pytorch_adapter.bin")  # the file that checkpoints.md converts
    run_code(document, blocks(document))


def test_the_first_block_of_the_readme_has_eight_lines() -> None:
    first = next(block for block in blocks("README.md") if block.kind == "python")
    assert len(first.text.strip().splitlines()) <= 8


def test_the_lines_that_the_readme_says_it_equals() -> None:
    readme = run_code("README.md", [block for block in blocks("README.md") if block.kind == "python"][:2])
    x = torch.randn(7, 32, dtype=torch.float64)  # so that rounding, which differs between machines, does not matter
    weights = ck.CompacterAdapter(32, reduction_factor=4, phm_rank=2, phm_init_range=1.0, dtype=torch.float64)
    down, up = weights.down.weights(), weights.up.weights()
    torch.testing.assert_close(readme["phm_linear"](x, *down), ck.phm_linear(x, down), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(readme["compacter_adapter"](x, down, up), weights(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_the_links_of_a_document_work(document: str) -> None:
    for file, anchor in re.findall(r"\]\((?!http)([^)#]*)(?:#([^)]*))?\)", read(document)):
        target = (ROOT / document).parent / file if file else ROOT / document
        assert target.exists(), f"{document} points to {file}, which does not exist"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in map(anchor_of, headings), f"{document} points to {file}#{anchor}, which does not exist"


def anchor_of(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("document", DOCUMENTS)
def test_lines_wrap_at_100(document: str) -> None:
    lines = GENERATED.sub("", read(document)).splitlines()
    assert not [line for line in lines if len(line) > 100 and not line.startswith("|")]


@pytest.mark.parametrize("document", [document for document in DOCUMENTS if list(commands(document))])
def test_the_commands_of_a_document_exist(document: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for command in commands(document):
        check(command, monkeypatch)


def check(command: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail if the project has no such command, or if the command does not take these arguments."""
    program, *arguments = command
    if program in CHECKS:
        CHECKS[program](arguments)
    elif program == "python":
        check_python(arguments)
    elif program == "compacter-kernels":
        check_own(arguments, monkeypatch)
    elif program == "torchrun":
        check_torchrun(arguments, monkeypatch)
    else:
        assert os.access(ROOT / program, os.X_OK), f"no check is known for {shlex.join(command)}"


def check_own(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Parse the arguments with the parser of the command, whose `run` is replaced."""
    module = importlib.import_module(cli.COMMANDS[arguments[0]][0])
    monkeypatch.setattr(module, "run", lambda args: 0)
    assert cli.main(arguments) == 0


def check_torchrun(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """torchrun starts this package with -m, or a script."""
    if "-m" in arguments:
        start = arguments.index("-m")
        assert arguments[start + 1] == "compacter_kernels"
        check_own(arguments[start + 2 :], monkeypatch)
    else:
        check_python(arguments[next(i for i, word in enumerate(arguments) if word.endswith(".py")) :])


def check_make(arguments: list[str]) -> None:
    if shutil.which("make") is None:
        pytest.skip("no make")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    done = subprocess.run(
        ["make", "--dry-run", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr


def check_pip(arguments: list[str]) -> None:
    """pip installs this project with extras that it has, or what the Makefile installs."""
    assert arguments[0] == "install"
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    extras = project.partition("[project.optional-dependencies]")[2].partition("\n[")[0]
    for requirement in arguments[1:]:
        match = re.fullmatch(r"\.(?:\[([\w,]+)\])?", requirement)
        if match is None:
            assert requirement in read("Makefile")
            continue
        for extra in (match[1] or "").split(","):
            assert not extra or f"\n{extra} = [" in extras, f"pyproject.toml has no extra {extra}"


def check_python(arguments: list[str]) -> None:
    """The script exists, and it or a module beside it declares these options."""
    script = ROOT / arguments[0]
    assert script.is_file(), f"{arguments[0]} does not exist"
    code = "\n".join(path.read_text(encoding="utf-8") for path in script.parent.glob("*.py"))
    for option in arguments[1:]:
        assert not option.startswith("--") or f'"{option}"' in code, f"{arguments[0]} has no option {option}"


def check_pytest(arguments: list[str]) -> None:
    for argument in arguments:
        assert argument.startswith("-") or (ROOT / argument).exists()


def check_cmake(arguments: list[str]) -> None:
    files = (ROOT / "CMakeLists.txt", *(ROOT / "csrc").rglob("*.cmake"))
    known = "\n".join(path.read_text(encoding="utf-8") for path in files)
    for name in re.findall(r"-D(COMPACTER_\w+)", " ".join(arguments)):
        assert name in known, f"CMake has no option {name}"


def accept(arguments: list[str]) -> None:
    """Commands of the shell and of git do not depend on this project."""


CHECKS = {
    "make": check_make,
    "pip": check_pip,
    "pytest": check_pytest,
    "cmake": check_cmake,
    "git": accept,
    ".": accept,
}


def test_the_page_on_options_has_every_option(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["option_tables.py", "--check"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / "docs" / "option_tables.py"), run_name="__main__")
    assert stop.value.code == 0, "run python docs/option_tables.py"


def test_the_page_on_options_has_every_environment_variable() -> None:
    sources = [*(ROOT / "compacter_kernels").rglob("*.py"), *(ROOT / "csrc").rglob("*.cpp"), ROOT / "setup.py"]
    code = "".join(path.read_text(encoding="utf-8") for path in sources)
    variable = r"\bCOMPACTER_KERNELS_[A-Z]+\b"
    assert set(re.findall(variable, read("docs/options.md"))) == set(re.findall(variable, code))


def messages() -> set[str]:
    """The strings of the package, with … for what is filled in."""
    found = set()
    for path in (ROOT / "compacter_kernels").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else "…" for part in node.values]
                found.add("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.add(re.sub(r"\{\w+\}", "…", node.value))
    return found


def fits(quoted: str, message: str) -> bool:
    """Whether the parts of the quotation, between its …, occur in the message in this order."""
    place = 0
    for part in quoted.split("…"):
        place = message.find(part, place)
        if place < 0:
            return False
        place += len(part)
    return True


def test_the_messages_of_troubleshooting_are_those_of_the_package() -> None:
    page, known = read("docs/troubleshooting.md").partition("## No message")[0], messages()
    quoted = re.findall(r"^\| `(.+?)` \| ", page, re.MULTILINE)
    assert len(quoted) == page.count("\n| `") > 30
    assert [quotation for quotation in quoted if not any(fits(quotation, message) for message in known)] == []


def test_the_files_that_extending_names_are_there() -> None:
    names = re.findall(r"`((?:csrc|compacter_kernels|tests)/[\w./]+)`", read("docs/extending.md"))
    assert len(names) > 10
    assert [name for name in names if not (ROOT / name).exists()] == []
