"""Checks of what users give: pydantic's, each error in one line."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import ConfigDict, Field, ValidationError
from yaml import YAMLError, safe_load

from sglang_dwdp.errors import DwdpError

T = TypeVar("T")
STRICT = ConfigDict(strict=True, extra="forbid", arbitrary_types_allowed=True)
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0)]
AtLeastOne = Annotated[int, Field(ge=1)]


class PlannerError(DwdpError, ValueError):
    """Bad input: the message says what is wrong and what to do about it."""


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


def read_mapping(path: Path, what: str, *, yaml: bool = False) -> dict[str, Any]:
    """The mapping in a JSON or YAML file.

    Raises:
        PlannerError: if the file cannot be read, is malformed, or holds something else than a mapping.
    """
    try:
        text = path.read_text()
        data = safe_load(text) if yaml else json.loads(text)
    except OSError as error:
        raise PlannerError(f"cannot read {what} {path}: {error.strerror}") from None
    except (ValueError, YAMLError) as error:  # ValueError: not JSON, or not text
        reason = " ".join(str(error).split())
        raise PlannerError(f"{what} {path} is not valid {'YAML' if yaml else 'JSON'}: {reason}") from None
    if not isinstance(data, dict):
        raise PlannerError(f"{what} {path} must hold a mapping, not {type(data).__name__}")
    return data
