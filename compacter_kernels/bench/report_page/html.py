"""The parts of a page: figures with their tables, and the document around them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from importlib.resources import files

from compacter_kernels.bench.report_page.svg import tag

POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"  # a page can load nothing


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return an HTML table. The cells are text, or elements that start with `<`."""

    def cell(text: str) -> str:
        return f"<td>{text if text.startswith('<') else escape(text)}</td>"

    top = "".join(tag("th", escape(text), scope="col") for text in head)
    body = "".join(f"<tr>{''.join(map(cell, row))}</tr>\n" for row in rows)
    return f"<table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"


def figure(caption: str, svg: str, numbers: str, group: str | None = None, tokens: int | None = None) -> str:
    """Return a chart with its caption and, folded, the table of its numbers.

    group, tokens: for a select that shows the figures of one token count.
    """
    folded = f"<details><summary>Numbers</summary><div class='scroll'>{numbers}</div></details>"
    attributes = {"data_group": group, "data_tokens": tokens} if group else {}
    return tag("figure", tag("figcaption", escape(caption)), svg, folded, **attributes) + "\n"


def grid(figures: Iterable[str]) -> str:
    """Return figures beside one another, as many as the window has room for."""
    return tag("div", *figures, class_="grid") + "\n"


def choice(group: str, tokens: Sequence[int], chosen: int) -> str:
    """Return a select of the token count of a group; the script shows it."""
    selected = {chosen: "selected"}
    options = (tag("option", f"{count:,}", value=count, selected=selected.get(count)) for count in tokens)
    return f"<p hidden><label>Tokens <select data-for='{group}'>{''.join(options)}</select></label></p>"


def section(identifier: str, title: str, text: str, *content: str) -> str:
    """Return a section with a heading and an explanation."""
    return tag("section", tag("h2", escape(title)), tag("p", text), *content, id=identifier) + "\n"


def document(title: str, *content: str) -> str:
    """Return the page, with its style and script inside."""
    folder = files(__package__)
    style, script = (folder.joinpath(name).read_text(encoding="utf-8") for name in ("style.css", "script.js"))
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<title>{escape(title)}</title>
<style>
{style}</style>
</head>
<body>
{"".join(content)}<script>
{script}</script>
</body>
</html>
"""
