"""What mkdocs does not know of this repository: documents outside docs/, and links to its files.

A link in a document is relative to the place of the document in the repository, as GitHub reads it.
The site turns it into a link to the page of that document, or else to the file in the repository.
The environment variable REPOSITORY is the address of the repository. Without it such links open
the files of this checkout.
"""

from __future__ import annotations

import os
import posixpath
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
ELSEWHERE = {  # the page, and the document that it shows
    "index.md": "README.md",
    "examples.md": "examples/README.md",
    "benchmarks.md": "benchmarks/README.md",
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
}
PAGE_OF = {document: page for page, document in ELSEWHERE.items()}
LINK = re.compile(r"(?<=\]\()(?!\w+:|#)([^)#\s]+)(?=[)#])")
CODE = re.compile(r"(^```.*?^```$)", re.MULTILINE | re.DOTALL)


def site_link(page: str, target: str, repository: str) -> str:
    """The link of a page of the site for a relative link of its document, without the anchor.

    page: such as "cuda.md". repository: an address, or "" for this checkout.

    FileNotFoundError: the repository has no such file.
    """
    folder = posixpath.dirname(ELSEWHERE.get(page, f"docs/{page}"))
    path = posixpath.normpath(posixpath.join(folder, target))
    if not (ROOT / path).exists():
        raise FileNotFoundError(f"{page} has a link to {target}, and there is no {path} in the repository")
    if path in PAGE_OF or path.startswith("docs/"):
        return posixpath.relpath(PAGE_OF.get(path, path.removeprefix("docs/")), posixpath.dirname(page) or ".")
    if not repository:
        return f"{ROOT.as_uri()}/{path}"
    return f"{repository}/{'tree' if (ROOT / path).is_dir() else 'blob'}/main/{path}"


def site_markdown(page: str, markdown: str, repository: str) -> str:
    """The text of a document as the site reads it: its links, and tables after comments.

    The markdown of the site does not begin a table in the line after a comment, as GitHub does.
    """
    parts = CODE.split(markdown)
    for i in range(0, len(parts), 2):
        text = LINK.sub(lambda found: site_link(page, found[1], repository), parts[i])
        parts[i] = re.sub(r"^(<!-- .* -->)$", r"\1\n", text, flags=re.MULTILINE)
    return "".join(parts)


def on_files(files: Any, *, config: Any) -> Any:
    """Add the documents from outside docs/ as pages (called by mkdocs)."""
    from mkdocs.structure.files import File

    for page, document in ELSEWHERE.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / document)))
    return files


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Any) -> str:
    """Rewrite the links of a page (called by mkdocs)."""
    return site_markdown(page.file.src_uri, markdown, os.environ.get("REPOSITORY", ""))
