"""A scenario file, checked before anything starts.

A file that cannot work gives one `ScenarioError` that names the key, what is wrong and what would be right.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import yaml

from benchmarks.serving import checks
from benchmarks.serving.errors import ScenarioError
from benchmarks.serving.scenario import (
    DTYPES,
    KINDS,
    ORDERS,
    TRANSFER_BACKENDS,
    Check,
    Decode,
    Load,
    Model,
    Scenario,
    Variant,
)
from sglang_dwdp.demo.checkpoint import Shape
from sglang_dwdp.planner.errors import PlannerError
from sglang_dwdp.planner.workload import Lengths


def load_scenario(path: Path) -> Scenario:
    """Read and check a file.

    Raises:
        ScenarioError: it is missing or cannot work.
    """
    if not path.is_file():
        raise ScenarioError(f"there is no scenario file {path}")
    try:
        data = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ScenarioError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    try:
        return scenario_from(data, path.stem)
    except ScenarioError as error:
        raise ScenarioError(f"{path}: {error}") from None


def scenario_from(data: Any, name: str) -> Scenario:
    """A scenario from what its file holds.

    Raises:
        ScenarioError: a key is unknown or missing, or a value cannot work.
    """
    data = checks.mapping(data, "the file")
    checks.known(data, Scenario, "", "name")
    for key in ("model", "gpus", "load", "variants"):
        if key not in data:
            raise ScenarioError(f"{key} is missing")
    gpus = checks.number(data["gpus"], "gpus", int, 0)
    one_gpu = checks.flag(data.get("one_gpu", False), "one_gpu")
    if one_gpu and gpus != 1:
        raise ScenarioError(f"one_gpu needs gpus: 1, not {gpus}")
    variants = _variants(data["variants"], gpus, one_gpu)
    reference = str(data.get("reference", variants[0].name))
    if reference not in {variant.name for variant in variants}:
        raise ScenarioError(f"reference {reference!r} is none of the variants {', '.join(v.name for v in variants)}")
    together, port = checks.number(data.get("together", 1), "together", int, 1), _port(data.get("port", 0))
    if port and together > 1:
        raise ScenarioError("together above 1 takes a port for each server: leave port out to have free ones chosen")
    return Scenario(
        name=name,
        description=str(data.get("description", "")),
        model=_model(data["model"]),
        gpus=gpus,
        one_gpu=one_gpu,
        load=_load(data["load"]),
        variants=variants,
        reference=reference,
        chunk_tokens=checks.number(data.get("chunk_tokens", 0), "chunk_tokens", int, 0),
        port=port,
        together=together,
        start_timeout_s=checks.number(data.get("start_timeout_s", 900.0), "start_timeout_s", float, 1),
        run_timeout_s=checks.number(data.get("run_timeout_s", 3600.0), "run_timeout_s", float, 1),
        check=_check(data.get("check") or {}),
        flags=checks.flags(data.get("flags") or {}, "flags"),
        environment=checks.environment(data.get("environment") or {}, "environment"),
    )


def _model(data: Any) -> Model:
    data = checks.mapping(data, "model")
    checks.known(data, Model, "model.")
    path, make = str(data.get("path") or ""), data.get("make")
    if bool(path) == bool(make):
        raise ScenarioError("model needs either path (a folder, or a name on the hub) or make (a random checkpoint)")
    if make:
        make = checks.mapping(make, "model.make")
        known = {"family", "dtype", "seed", *(field.name for field in dataclasses.fields(Shape))}
        checks.only(make, known, "model.make.")
        if make.get("family", "qwen3_moe") != "qwen3_moe":
            raise ScenarioError(f"model.make.family {make['family']!r} is none of qwen3_moe")
        if make.get("dtype", "bfloat16") not in DTYPES:
            raise ScenarioError(f"model.make.dtype {make['dtype']!r} is none of {', '.join(DTYPES)}")
        for key in known - {"family", "dtype"}:
            if key in make:
                checks.number(make[key], f"model.make.{key}", int, 0)
        return Model(make=make)
    folder = Path(path).expanduser()
    if (path.startswith(("/", ".", "~")) or path.count("/") > 1 or folder.exists()) and not (
        folder / "config.json"
    ).is_file():
        raise ScenarioError(f"model.path {path} is no folder with a config.json; give a checkpoint or a hub name")
    return Model(path=str(folder) if folder.exists() else path)


def _load(data: Any) -> Load:
    data = checks.mapping(data, "load")
    checks.known(data, Load, "load.")
    for key in ("lengths", "output_tokens", "requests"):
        if key not in data:
            raise ScenarioError(f"load.{key} is missing")
    raw = checks.mapping(data["lengths"], "load.lengths")
    checks.known(raw, Lengths, "load.lengths.")
    try:
        lengths = Lengths(**raw)
    except (PlannerError, TypeError) as error:
        raise ScenarioError(f"load.lengths: {error}") from None
    order = str(data.get("order", "drawn"))
    if order not in ORDERS:
        raise ScenarioError(f"load.order {order!r} is none of {', '.join(ORDERS)}")
    rates = tuple(
        checks.number(value, "load.rates", float, 0) for value in checks.items(data.get("rates", []), "load.rates")
    )
    concurrencies = tuple(
        checks.number(value, "load.concurrencies", int, 1)
        for value in checks.items(data.get("concurrencies", []), "load.concurrencies")
    )
    if not rates and not concurrencies:
        raise ScenarioError("load needs rates (requests per second) or concurrencies (requests in flight)")
    if any(rate <= 0 for rate in rates):
        raise ScenarioError("load.rates must be above 0")
    if order != "drawn" and (concurrencies or float("inf") in rates):
        raise ScenarioError(
            f"load.order {order} needs finite rates alone: requests sent at once arrive in another order"
        )
    return Load(
        lengths=lengths,
        output_tokens=checks.number(data["output_tokens"], "load.output_tokens", int, 1),
        requests=checks.number(data["requests"], "load.requests", int, 1),
        rates=rates,
        concurrencies=concurrencies,
        order=order,
        seed=checks.number(data.get("seed", 1), "load.seed", int, 0),
        options=checks.flags(data.get("options") or {}, "load.options"),
    )


def _variants(data: Any, gpus: int, one_gpu: bool) -> tuple[Variant, ...]:
    data = checks.mapping(data, "variants")
    if not data:
        raise ScenarioError("variants is empty: name at least one")
    return tuple(_variant(str(name), raw, gpus, one_gpu) for name, raw in data.items())


def _variant(name: str, raw: Any, gpus: int, one_gpu: bool) -> Variant:
    where = f"variants.{name}"
    if not name or not all(letter.isalnum() or letter in "-_." for letter in name):
        raise ScenarioError(f"{where}: a name is made of letters, digits, '-', '_' and '.'")
    raw = checks.mapping(raw, where)
    checks.known(raw, Variant, where + ".", "name")
    kind = str(raw.get("kind", ""))
    if kind not in KINDS:
        raise ScenarioError(f"{where}.kind {kind!r} is none of {', '.join(KINDS)}")
    ranks = checks.number(raw.get("ranks", 1 if kind == "single" else max(gpus, 2)), f"{where}.ranks", int, 1)
    if kind == "single" and ranks != 1:
        raise ScenarioError(f"{where}: kind single has 1 rank, not {ranks}")
    if kind != "single" and ranks < 2:
        raise ScenarioError(f"{where}: kind {kind} needs 2 ranks or more, not {ranks}")
    decode = _decode(raw["decode"], where) if raw.get("decode") is not None else None
    needed = ranks + (decode.ranks if decode else 0)
    if gpus and not one_gpu and needed > gpus:
        raise ScenarioError(f"{where} needs {needed} GPUs, and gpus is {gpus}")
    return Variant(
        name,
        kind,
        ranks,
        checks.flags(raw.get("flags") or {}, f"{where}.flags"),
        checks.environment(raw.get("environment") or {}, f"{where}.environment"),
        decode,
    )


def _decode(raw: Any, where: str) -> Decode:
    raw = checks.mapping(raw, f"{where}.decode")
    checks.known(raw, Decode, f"{where}.decode.")
    backend = str(raw.get("transfer_backend", "mooncake"))
    if backend not in TRANSFER_BACKENDS:
        raise ScenarioError(f"{where}.decode.transfer_backend {backend!r} is none of {', '.join(TRANSFER_BACKENDS)}")
    return Decode(
        checks.number(raw.get("ranks", 1), f"{where}.decode.ranks", int, 1),
        backend,
        checks.flags(raw.get("flags") or {}, f"{where}.decode.flags"),
    )


def _check(data: Any) -> Check:
    data = checks.mapping(data, "check")
    checks.known(data, Check, "check.")
    check = Check(
        checks.number(data.get("requests", 8), "check.requests", int, 0),
        checks.number(data.get("new_tokens", 16), "check.new_tokens", int, 1),
        checks.flag(data.get("must_equal", False), "check.must_equal"),
    )
    if check.must_equal and not check.requests:
        raise ScenarioError("check.must_equal compares nothing with check.requests 0")
    return check


def _port(value: Any) -> int:
    port: int = checks.number(value, "port", int, 0)
    if port > 65000:
        raise ScenarioError(f"port must be at most 65000, not {port}")
    return port
