"""Checks of what users give: pydantic's, each error in one line."""

from __future__ import annotations

import functools
import importlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import ConfigDict, Field, ValidationError

from sglang_dwdp.planner.errors import PlannerError

T = TypeVar("T")
FIGURES = (".pdf", ".png", ".svg")
STRICT = ConfigDict(strict=True, extra="forbid", arbitrary_types_allowed=True)
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0)]
AtLeastOne = Annotated[int, Field(ge=1)]


def one_line(error: ValidationError) -> str:
    """The first of pydantic's complaints, with the name of its field."""
    first = error.errors(include_url=False)[0]
    where = ".".join(map(str, first["loc"]))
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] not in ("value_error", "missing", "unexpected_keyword_argument"):
        message += f", not {first['input']!r}"
    return " ".join((f"{where}: {message}" if where else message).split())


def checked(kind: type[T]) -> type[T]:
    """A pydantic dataclass whose constructor raises PlannerError in place of pydantic's error."""
    construct: Callable[..., None] = kind.__init__

    @functools.wraps(construct)
    def init(self: T, *args: Any, **kwargs: Any) -> None:
        try:
            construct(self, *args, **kwargs)
        except ValidationError as error:
            raise PlannerError(f"{kind.__name__.lower()}: {one_line(error)}") from None

    kind.__init__ = init  # type: ignore[assignment]
    return kind


def read_text(path: Path) -> str:
    """The text of a file.

    Raises:
        PlannerError: if it cannot be read, or is not text.
    """
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise PlannerError(f"cannot read {path}: {error}") from None


def read_mapping(path: Path, what: str, *, yaml: bool = False) -> dict[str, Any]:
    """The mapping in a JSON or YAML file.

    Raises:
        PlannerError: if the file cannot be read, is malformed, or holds something else than a mapping.
    """
    text = read_text(path)
    try:
        data = importlib.import_module("yaml").safe_load(text) if yaml else json.loads(text)
    except Exception as error:
        if yaml and type(error).__module__.partition(".")[0] != "yaml":
            raise
        raise PlannerError(
            f"{what} {path} is not valid {'YAML' if yaml else 'JSON'}: {' '.join(str(error).split())}"
        ) from None
    if not isinstance(data, dict):
        raise PlannerError(f"{what} {path} must hold a mapping, not {type(data).__name__}")
    return data


def writable(path: str) -> Path:
    """``path`` if a figure can be written there, before anything is computed for it.

    Raises:
        PlannerError: if its folder does not exist, it cannot be written, or its name does not end in one of ``FIGURES``.
    """
    file = Path(path)
    if not file.parent.is_dir():
        raise PlannerError(f"cannot write {file}: {file.parent} is not a directory")
    if file.is_dir() or not os.access(file if file.exists() else file.parent, os.W_OK):
        raise PlannerError(f"cannot write {file}: it is a directory, or permission is denied")
    if file.suffix.lower() not in FIGURES:
        raise PlannerError(f"cannot write {path!r}: the name of a figure ends in {', '.join(FIGURES)}")
    return file


def optional(module: str) -> Any:
    """A module of the optional dependencies.

    Raises:
        PlannerError: if it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError:
        raise PlannerError(
            f"{module.partition('.')[0]} is not installed; run: pip install sglang-dwdp[planner]"
        ) from None
