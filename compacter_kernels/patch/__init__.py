"""Making the Compacter adapters of other libraries run through the kernels, in place."""

from __future__ import annotations

from typing import NamedTuple


class Entry(NamedTuple):
    """The name of a module, and how it runs now or why it was left as it was."""

    name: str
    what: str


class Report(NamedTuple):
    """The modules that were patched, that were restored, and that were left as they were."""

    patched: tuple[Entry, ...] = ()
    restored: tuple[Entry, ...] = ()
    skipped: tuple[Entry, ...] = ()

    def __str__(self) -> str:
        lines = []
        for title, entries in zip(self._fields, self, strict=True):
            if entries:
                lines.append(f"{title} {len(entries)}:")
                lines += [f"  {name or '(the model)'}: {what}" for name, what in entries]
        return "\n".join(lines) or "nothing to do"
