"""What a comparison of servers runs, as a YAML file says it; msgspec checks types and unknown keys."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import yaml

from benchmarks.variants import KINDS

SERVER_KINDS = (*KINDS, "single")  # single: one rank with all experts


class ScenarioError(ValueError):
    """A scenario cannot work; the message says where and why."""


class Strict(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """A mapping of the file; other keys than its fields are errors."""


class Model(Strict):
    """Either `path` (a folder, or a name on the hub), or `make`, the arguments of `benchmarks.checkpoints.make`."""

    path: str = ""
    make: dict[str, Any] = {}


class Bursty(Strict):
    """Lognormal prompt lengths, in tokens, in the worst order for balancing by count.

    Every N-th request, N the number of ranks, is one of the longest: handing requests out by count gives one rank all
    of them.
    """

    mean: int
    std: int
    limit: int


class Load(Strict):
    """The requests of a run.

    Attributes:
        input_tokens: The longest prompt.
        output_tokens: The longest answer.
        ratio: Lengths of prompts and answers are uniform from this part of the longest on.
        bursty: Other lengths of prompts.
        requests: How many are sent at each load.
        rates: Loads, in requests per second, Poisson.
        in_flight: Loads, in requests at a time.
        seed: Of all that is drawn.
    """

    output_tokens: int
    requests: int
    input_tokens: int = 0
    ratio: float = 1.0
    bursty: Bursty | None = None
    rates: list[float] = []
    in_flight: list[int] = []
    seed: int = 1

    def points(self) -> list[tuple[str, list[str]]]:
        """Every load: its name, and the options of SGLang's benchmark for it."""
        rates = [(f"{rate:g} req/s", ["--request-rate", f"{rate:g}"]) for rate in self.rates]
        flying = [
            (f"{count} in flight", ["--request-rate", "inf", "--max-concurrency", str(count)])
            for count in self.in_flight
        ]
        return rates + flying


class Decode(Strict):
    """The decode server of a disaggregated variant, whose prefill server is the variant itself."""

    ranks: int = 1
    transfer_backend: str = "nixl"
    flags: dict[str, Any] = {}


class ServedVariant(Strict):
    """One way to serve: a kind, and flags and variables that win over the scenario's."""

    kind: str
    flags: dict[str, Any] = {}
    environment: dict[str, str] = {}
    decode: Decode | None = None


class Scenario(Strict):
    """A comparison.

    Attributes:
        gpus: 0 for SGLang's CPU engine; with 1, the ranks share it.
        ranks: Of each variant.
        loads: By name.
        variants: By name.
        reference: The variant whose tokens count as right; empty where none are compared.
        same_tokens: A difference is a failure. In half precision rounding may decide ties.
        chunk_tokens: Of a rank's prefill, for every variant alike; 0 for SGLang's default.
        together: How many variants' servers run at the same time and take turns; all have to fit the GPUs together.
    """

    name: str
    model: Model
    gpus: int
    loads: dict[str, Load]
    variants: dict[str, ServedVariant]
    description: str = ""
    ranks: int = 2
    reference: str = ""
    same_tokens: bool = False
    chunk_tokens: int = 0
    together: int = 1
    start_timeout_s: float = 900.0
    run_timeout_s: float = 3600.0
    flags: dict[str, Any] = {}
    environment: dict[str, str] = {}


def load_scenario(path: Path) -> Scenario:
    """The scenario of a file, which gets the file's name.

    Raises:
        ScenarioError: It cannot be read, or cannot work.
    """
    try:
        scenario = msgspec.convert({"name": path.stem, **(yaml.safe_load(path.read_text()) or {})}, Scenario)
    except (OSError, yaml.YAMLError, msgspec.ValidationError, TypeError) as error:
        raise ScenarioError(f"{path}: {error}") from None
    problem = _problem(scenario)
    if problem:
        raise ScenarioError(f"{path}: {problem}")
    return scenario


def _problem(scenario: Scenario) -> str | None:
    for name, variant in scenario.variants.items():
        if variant.kind not in SERVER_KINDS:
            return f"variants.{name}.kind: {variant.kind!r} is none of {', '.join(SERVER_KINDS)}"
        for flag in variant.flags:
            if flag.startswith("-"):
                return f"variants.{name}.flags: write {flag.lstrip('-')} without dashes"
    if bool(scenario.model.path) == bool(scenario.model.make):
        return "model: give either path or make"
    for name, load in scenario.loads.items():
        if not load.points():
            return f"loads.{name}: give rates, in_flight, or both"
        if (load.input_tokens > 0) == (load.bursty is not None):
            return f"loads.{name}: give either input_tokens or bursty"
        if min(load.requests, load.output_tokens) < 1:
            return f"loads.{name}: requests and output_tokens are at least 1"
    if scenario.reference and scenario.reference not in scenario.variants:
        return f"reference: {scenario.reference!r} is no variant"
    if scenario.same_tokens and not scenario.reference:
        return "same_tokens needs a reference"
    if min(scenario.ranks, scenario.together, len(scenario.loads), len(scenario.variants)) < 1:
        return "ranks, together, and the numbers of loads and variants are at least 1"
    return None
