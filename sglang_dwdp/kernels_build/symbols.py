"""What object files define and lack, by `nm` and `c++filt` (binutils, which every C++ compiler comes with)."""

from __future__ import annotations

import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path

# Everything of FlashInfer's module itself has this in its mangled name; CUDA, the C++ library and TVM-FFI do not.
_OURS = "12tensorrt_llm"


def missing(objects: Sequence[Path]) -> list[str]:
    """Mangled names of FlashInfer's symbols that some object refers to and none defines, sorted."""
    wanted: set[str] = set()
    defined: set[str] = set()
    for line in _run(["nm", *map(str, objects)]).splitlines():
        kind, _, name = line[17:].partition(" ")
        if _OURS not in name:
            continue
        if kind in "Uvw":
            wanted.add(name)
        else:
            defined.add(name)
    return sorted(wanted - defined)


def undefined(library: Path) -> list[str]:
    """Mangled names that a shared library expects others to define."""
    return sorted(line.split()[-1] for line in _run(["nm", "-D", "-u", str(library)]).splitlines())


def of_flashinfer(names: Iterable[str]) -> list[str]:
    """Those names that only the module itself could define."""
    return [name for name in names if _OURS in name]


def demangle(names: Sequence[str]) -> list[str]:
    """The C++ names, in the same order."""
    return _run(["c++filt"], "\n".join(names)).splitlines() if names else []


def _run(command: list[str], text: str | None = None) -> str:
    return subprocess.run(command, input=text, capture_output=True, text=True, check=True).stdout
