"""What a patch did: a list that prints."""

from __future__ import annotations

from typing import NamedTuple


class Entry(NamedTuple):
    """A module's name, and what became of it or why nothing did."""

    name: str
    what: str


class Report(NamedTuple):
    """What `patch` or `unpatch` changed, and what it left as it was and why."""

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
