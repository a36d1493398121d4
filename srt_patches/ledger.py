"""Reading ledger.md, and hashing what it speaks of in the installed SGLang."""

from __future__ import annotations

import hashlib
import inspect
import pkgutil
import re
from dataclasses import dataclass
from pathlib import Path

LEDGER = Path(__file__).with_name("ledger.md")
_ROW = re.compile(r"^\| `(?P<target>[\w.]+)` \|.*\|.*\| (?P<hashes>[^|]*) \|$")
_HASH = re.compile(r"([\w.]+): `([0-9a-f]{12})`")


@dataclass(frozen=True, slots=True)
class Entry:
    """One symbol of SGLang in the ledger.

    hashes: of its source, by SGLang release.
    """

    target: str
    hashes: dict[str, str]


def entries() -> list[Entry]:
    """All rows of the ledger."""
    rows = (_ROW.match(line) for line in LEDGER.read_text().splitlines())
    return [Entry(row["target"], dict(_HASH.findall(row["hashes"]))) for row in rows if row]


def source_hash(target: str) -> str:
    """The first 12 hex digits of the SHA-256 of a symbol's source, as SGLang has it (not as hooks left it)."""
    symbol = inspect.unwrap(pkgutil.resolve_name(target))
    return hashlib.sha256(inspect.getsource(symbol).encode()).hexdigest()[:12]


if __name__ == "__main__":
    for entry in entries():
        print(f"{source_hash(entry.target)}  {entry.target}")  # noqa: T201
