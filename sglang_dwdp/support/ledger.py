"""Whether the sources of SGLang that this package changes or leans on are those that it was validated with.

`srt_patches/ledger.md` has the hash of each of them for each release. A build of the same release may have others: a
patched fork, a source tree, or a function that another plugin has replaced.
"""

from __future__ import annotations

import hashlib
import inspect
import itertools
import logging
import os
import pkgutil
import re
import sys
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

from sglang_dwdp.errors import DwdpConfigError
from sglang_dwdp.support import release

LEDGER = Path(__file__).resolve().parent.parent / "srt_patches" / "ledger.md"
ALLOW_PATCHED = "SGLANG_DWDP_ALLOW_PATCHED"
_ROW = re.compile(r"^\| `(?P<target>[\w.]+)` \|.*\|.*\| (?P<hashes>[^|]*) \|$")
_HASH = re.compile(r"([\w.]+): `([0-9a-f]{12})`")
logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Entry:
    """One symbol of SGLang in the ledger.

    Attributes:
        target: its dotted path.
        hashes: of its source, by SGLang release.
        is_hooked: whether a hook is put there; otherwise it is called, or overridden SGLang's official way.
    """

    target: str
    hashes: dict[str, str]
    is_hooked: bool


def entries() -> list[Entry]:
    """All rows of the ledger."""
    found, is_hooked = [], False
    for line in LEDGER.read_text().splitlines():
        if line.startswith("## "):
            is_hooked = line.startswith("## Hooked")
        elif row := _ROW.match(line):
            found.append(Entry(row["target"], dict(_HASH.findall(row["hashes"])), is_hooked))
    return found


def source_hash(target: str) -> str:
    """The first 12 hex digits of the SHA-256 of a symbol's source, as SGLang has it (not as hooks left it).

    Raises:
        ImportError: its module cannot be imported.
        AttributeError: the module lacks it.
        OSError: there is no source of it.
        TypeError: it is no function or class any more.
    """
    symbol = inspect.unwrap(pkgutil.resolve_name(target))
    return hashlib.sha256(inspect.getsource(symbol).encode()).hexdigest()[:12]


def changed(chosen: Iterable[Entry]) -> list[str]:
    """The targets whose source is not the one of the supported release, or is not there."""
    return [entry.target for entry in chosen if not _is_verified(entry)]


def _is_verified(entry: Entry) -> bool:
    try:
        return source_hash(entry.target) == entry.hashes[release.SGLANG]
    except (ImportError, AttributeError, OSError, TypeError):
        return False


def _is_loaded(target: str) -> bool:
    """Whether this process has imported the module of a target, whose classes alone begin with a capital letter."""
    parts = target.split(".")[:-1]
    return ".".join(itertools.takewhile(lambda part: not part.lstrip("_")[0].isupper(), parts)) in sys.modules


def check_sources(hooked: Collection[str]) -> None:
    """Check what this process is about to hook, and what else of the ledger it has imported.

    Takes about a tenth of a second for all rows. Nothing is checked where any release is allowed.

    Args:
        hooked: the dotted paths of the targets.

    Raises:
        DwdpConfigError: some have another source than the supported release, and the variable ALLOW_PATCHED is not 1.
    """
    if os.environ.get(release.OVERRIDE) == "1":
        return
    used = [entry for entry in entries() if (entry.target in hooked if entry.is_hooked else _is_loaded(entry.target))]
    found = changed(used)
    if not found:
        return
    what = (
        f"the source of {', '.join(found)} in this SGLang is not that of the release {release.SGLANG}, for which this "
        "plugin was written: it is a patched build, or another plugin replaced something"
    )
    if os.environ.get(ALLOW_PATCHED) != "1":
        raise DwdpConfigError(
            f"--enable-dwdp cannot be used here: {what}. Install sglang=={release.SGLANG}, leave the other plugin out "
            f"(SGLANG_PLUGINS), or set {ALLOW_PATCHED}=1 to try, and compare tokens before trusting it."
        )
    logger.warning("DWDP: %s. %s=1 allows it: compare tokens before trusting it.", what, ALLOW_PATCHED)


if __name__ == "__main__":
    for row in entries():
        sys.stdout.write(f"{source_hash(row.target)}  {row.target}\n")
