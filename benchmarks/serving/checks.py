"""Checks of single values in a scenario file; each raises `ScenarioError` with what was found and what is right."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from benchmarks.serving.errors import ScenarioError


def mapping(value: Any, what: str) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise ScenarioError(f"{what} must be a mapping of keys to values, not {shown(value)}")
    return {str(key): item for key, item in value.items()}


def items(value: Any, what: str) -> list[Any]:
    if not isinstance(value, list):
        raise ScenarioError(f"{what} must be a list such as [1, 2], not {shown(value)}")
    return value


def flag(value: Any, what: str) -> bool:
    if not isinstance(value, bool):
        raise ScenarioError(f"{what} must be true or false, not {shown(value)}")
    return value


def number(value: Any, what: str, kind: type[int] | type[float], least: float) -> Any:
    if isinstance(value, str) and kind is float and value == "inf":
        return float("inf")
    if isinstance(value, bool) or not isinstance(value, int if kind is int else int | float):
        raise ScenarioError(f"{what} must be a {'whole ' if kind is int else ''}number, not {shown(value)}")
    if not value >= least:
        raise ScenarioError(f"{what} must be at least {least:g}, not {shown(value)}")
    return kind(value)


def flags(value: Any, what: str) -> Mapping[str, Any]:
    found = mapping(value, what)
    for name, item in found.items():
        if name.startswith("-"):
            raise ScenarioError(f"{what}.{name}: write flags without dashes, as {name.lstrip('-')}")
        values = item if isinstance(item, list) else [item]
        if not all(isinstance(one, str | int | float | bool) for one in values):
            raise ScenarioError(f"{what}.{name} must be a value, a list of values, or true, not {shown(item)}")
    return {name.replace("_", "-"): item for name, item in found.items()}


def environment(value: Any, what: str) -> Mapping[str, str]:
    return {name: str(item) for name, item in mapping(value, what).items()}


def known(data: Mapping[str, Any], kind: Any, prefix: str, without: str = "") -> None:
    """Keys must be fields of the dataclass `kind`, except the one that a file does not give."""
    only(data, {field.name for field in dataclasses.fields(kind)} - {without}, prefix)


def only(data: Mapping[str, Any], known: set[str], prefix: str) -> None:
    for key in data:
        if key not in known:
            raise ScenarioError(f"unknown key {prefix}{key}; known: {', '.join(sorted(known))}")


def shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 60 else text[:57] + "..."
