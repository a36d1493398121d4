"""Checks of what users give, with one way to say what is wrong."""

from __future__ import annotations

import json
import math
import os
from dataclasses import fields
from pathlib import Path
from typing import Any

from .errors import PlannerError

FIGURES = (".pdf", ".png", ".svg")


def whole(what: str, value: Any, least: int = 0, most: float = math.inf) -> int:
    """``value`` if it is an integer from ``least`` to ``most``.

    Raises:
        PlannerError: otherwise; the message names ``what``.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise PlannerError(f"{what} must be a whole number, not {value!r}")
    if value < least:
        raise PlannerError(f"{what} must be at least {least}, not {value}")
    if value > most:
        raise PlannerError(f"{what} must be at most {most:,}, not {value:,}")
    return value


def number(what: str, value: Any, *, positive: bool = False) -> float:
    """``value`` if it is a finite number, not negative; not 0 either if ``positive``.

    Raises:
        PlannerError: otherwise; the message names ``what``.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise PlannerError(f"{what} must be a finite number, not {value!r}")
    if value < 0:
        raise PlannerError(f"{what} must not be negative, is {value}")
    if positive and value == 0:
        raise PlannerError(f"{what} must be positive, is {value}")
    return float(value)


def choice(what: str, value: Any, known: tuple[str, ...]) -> None:
    """Raise PlannerError unless ``value`` is one of ``known``."""
    if value not in known:
        raise PlannerError(f"unknown {what} {value!r}; known: {', '.join(known)}")


def kinds_of_fields(settings: Any) -> None:
    """Check every plain field of a dataclass by its annotation: ``int``, ``float``, ``bool`` and ``str``.

    Raises:
        PlannerError: names the first field whose value is of another kind, not finite or negative.
    """
    for field in fields(settings):
        value = getattr(settings, field.name)
        if field.type == "int":
            whole(field.name, value)
        elif field.type == "float":
            number(field.name, value)
        elif (field.type == "bool" and not isinstance(value, bool)) or (
            field.type == "str" and not isinstance(value, str)
        ):
            kind = "true or false" if field.type == "bool" else "a text"
            raise PlannerError(f"{field.name} must be {kind}, not {value!r}")


def read_text(path: Path) -> str:
    """The text of a file that exists.

    Raises:
        PlannerError: if it cannot be read, or is no text.
    """
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise PlannerError(f"cannot read {path}: {error}") from None


def read_json(path: Path, what: str) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        PlannerError: if the file cannot be read, is no JSON, or holds something else than an object.
    """
    try:
        data = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise PlannerError(f"{what} {path} is not valid JSON: {error}") from None
    if not isinstance(data, dict):
        raise PlannerError(f"{what} {path} must hold a JSON object, not {type(data).__name__}")
    return data


def writable(path: str, suffixes: tuple[str, ...] = ()) -> Path:
    """``path`` if a file can be written there, before anything is computed for it.

    Raises:
        PlannerError: if its folder does not exist, it is a folder itself, or its name ends in none of ``suffixes``.
    """
    file = Path(path)
    if not file.parent.is_dir():
        raise PlannerError(f"cannot write {file}: {file.parent} is not a directory")
    if file.is_dir():
        raise PlannerError(f"cannot write {file}: it is a directory")
    if not os.access(file if file.exists() else file.parent, os.W_OK):
        raise PlannerError(f"cannot write {file}: permission denied")
    if suffixes and file.suffix.lower() not in suffixes:
        raise PlannerError(f"cannot write {path!r}: the name of a figure ends in {', '.join(suffixes)}")
    return file
