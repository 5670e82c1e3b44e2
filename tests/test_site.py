"""The documentation site: its links, and that a page loads nothing from another host."""

from __future__ import annotations

import html
import inspect
import re
from pathlib import Path

import pytest

import compacter_kernels as ck
import site_hook

ROOT = Path(__file__).resolve().parents[1]
REPOSITORY = "https://github.com/someone/compacter_kernels"


@pytest.mark.parametrize(
    ("page", "target", "link"),
    [
        ("cuda.md", "design.md", "design.md"),
        ("cuda.md", "../README.md", "index.md"),
        ("index.md", "docs/cuda.md", "cuda.md"),
        ("index.md", "docs/adapter.svg", "adapter.svg"),
        ("examples.md", "emea/README.md", f"{REPOSITORY}/blob/main/examples/emea/README.md"),
        ("models.md", "../benchmarks/README.md", "benchmarks.md"),
        ("models.md", "../examples", f"{REPOSITORY}/tree/main/examples"),
    ],
)
def test_a_link_leads_to_the_page_or_else_to_the_file(page: str, target: str, link: str) -> None:
    assert site_hook.site_link(page, target, REPOSITORY) == link


def test_without_a_repository_a_link_opens_the_file_of_this_checkout() -> None:
    assert site_hook.site_link("models.md", "../SECURITY.md", "") == (ROOT / "SECURITY.md").as_uri()


def test_a_link_to_nothing_is_an_error() -> None:
    with pytest.raises(FileNotFoundError, match=r"models\.md has a link to none\.md"):
        site_hook.site_link("models.md", "none.md", REPOSITORY)


def test_only_relative_links_outside_of_code_change() -> None:
    code = "```python\nx = f[0](../README.md)\n```\n"
    kept = f"[a](https://arxiv.org/abs/2106.04647) [b](#in-a-model)\n{code}"
    assert site_hook.site_markdown("bank.md", kept, REPOSITORY) == kept
    changed = site_hook.site_markdown("bank.md", "[c](../README.md#more) [d](peft.md)", REPOSITORY)
    assert changed == "[c](index.md#more) [d](peft.md)"


def test_a_table_may_follow_a_comment() -> None:
    assert site_hook.site_markdown("index.md", "<!-- results:begin -->\n| a |\n", "") == (
        "<!-- results:begin -->\n\n| a |\n"
    )


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the site, built as `make docs` builds it."""
    pytest.importorskip("mkdocs", reason="the extra docs is not installed")
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    folder = tmp_path_factory.mktemp("site")
    build(load_config(str(ROOT / "mkdocs.yml"), site_dir=str(folder), strict=True))
    return folder


def test_a_page_loads_nothing_from_another_host(site: Path) -> None:
    loaded = re.compile(r"<(?:script|img|iframe)[^>]*\ssrc=\"?(?:https?:)?//|<link[^>]*\shref=\"?(?:https?:)?//")
    pages = list(site.rglob("*.html"))
    assert len(pages) > 10
    assert [str(page) for page in pages if loaded.search(page.read_text(encoding="utf-8"))] == []


NAMES = sorted(set(ck.__all__) - {"__version__"})


def test_every_public_name_is_in_the_reference_once() -> None:
    pages = "".join(page.read_text(encoding="utf-8") for page in sorted((ROOT / "docs" / "api").glob("*.md")))
    paths = re.findall(r"^::: (compacter_kernels\.\S+)$", pages, re.MULTILINE)
    of_peft = [path for path in paths if path.startswith("compacter_kernels.peft.")]
    assert sorted(path.rpartition(".")[2] for path in paths if path not in of_peft) == NAMES
    assert all(path.endswith("Config") for path in of_peft)


def test_the_docstrings_of_the_public_names_are_on_the_site(site: Path) -> None:
    pages = "".join(page.read_text(encoding="utf-8") for page in (site / "api").glob("*.html"))
    text = html.unescape(re.sub(r"<[^>]*>", "", pages))
    for name in NAMES:
        first = (inspect.getdoc(getattr(ck, name)) or "").splitlines()[0].replace("`", "")
        assert first in text, f"the site lacks the docstring of {name}"
