"""What a simulation runs: read from YAML, checked, with defaults."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from .cost import COPY_POLICIES, Group
from .dep import EXCHANGES
from .errors import PlannerError
from .formats import Precision, default_precision, get_format
from .gpus import Gpu, get_gpu
from .models import ModelShape, load_model
from .workload import Lengths

MODES = ("dwdp", "dep", "replica")
ROUTERS = ("round_robin", "least_tokens")
ORDERS = ("rotation", "random")


@dataclass(frozen=True)
class Scenario:
    """One simulated deployment and its load.

    Attributes:
        mode: ``dwdp``, ``dep`` (ranks of a group in step) or ``replica``.
        group_size, groups: ranks per group and number of groups behind the router.
        token_budget: tokens per forward and rank (``--chunked-prefill-size``).
        max_prefill_tokens: no further prompt joins a forward that has so many tokens
            (``--max-prefill-tokens``, by default 16,384 in SGLang); 0 for no such limit.
        chunked: cut prompts that do not fit (else they wait for the next forward).
        requests: number of requests.
        rate: Poisson arrivals per second; 0 for closed loop or all at once.
        concurrency: closed loop: so many requests in the system at any time; 0 for none.
        frontend: seconds that each request spends, one after another, between its client and a
            rank's queue (HTTP, tokenizer); what is not there yet cannot join a forward.
        order: peer order of serial copies: ``rotation`` from the next rank on, or ``random``.
        jitter: coefficient of variation of each layer's compute time (clocks, contention).
        slowdown: factor on all compute, for a throttled GPU.
        lockstep: replicas wait for each other before every forward and layer (for study).
        seed: of all draws.
    """

    model: ModelShape
    gpu: Gpu
    precision: Precision
    lengths: Lengths
    mode: str = "dwdp"
    group_size: int = 4
    groups: int = 1
    local_experts: int = 0
    copies: str = "sliced"
    order: str = "rotation"
    depth: int = 2
    ring_over_steps: bool = True
    merge_copy: bool = False
    exchange: str = "all-to-all"
    token_budget: int = 32768
    max_prefill_tokens: int = 0
    chunked: bool = True
    requests: int = 256
    rate: float = 0.0
    concurrency: int = 0
    router: str = "round_robin"
    frontend: float = 0.0
    jitter: float = 0.0
    slowdown: float = 1.0
    lockstep: bool = False
    seed: int = 0
    name: str = field(default="scenario", compare=False)

    def __post_init__(self) -> None:
        _choice("mode", self.mode, MODES)
        _choice("router", self.router, ROUTERS)
        _choice("order", self.order, ORDERS)
        _choice("copies", self.copies, COPY_POLICIES)
        _choice("exchange", self.exchange, EXCHANGES)
        for name in ("group_size", "groups", "token_budget", "requests", "depth"):
            if getattr(self, name) < 1:
                raise PlannerError(f"{name} must be at least 1, not {getattr(self, name)}")
        for name in ("rate", "concurrency", "jitter", "max_prefill_tokens", "frontend"):
            if getattr(self, name) < 0:
                raise PlannerError(f"{name} must not be negative, is {getattr(self, name)}")
        if self.rate and self.concurrency:
            raise PlannerError("give either rate (open loop) or concurrency (closed loop), not both")
        if self.slowdown <= 0:
            raise PlannerError(f"slowdown must be positive, is {self.slowdown}")
        if self.lockstep and self.mode != "replica":
            raise PlannerError("lockstep applies to mode replica only; dep is always in step")
        if self.mode == "dwdp":
            self.group.stored(self.model)

    @property
    def ranks(self) -> int:
        """GPUs in all."""
        return self.group_size * self.groups

    @property
    def group(self) -> Group:
        """The sharing of experts within one group."""
        return Group(
            self.group_size,
            self.local_experts,
            self.copies,
            self.depth,
            self.ring_over_steps,
            self.merge_copy,
        )


def _choice(what: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise PlannerError(f"unknown {what} {value!r}; known: {', '.join(known)}")


def scenario_from_mapping(data: Mapping[str, Any], name: str = "scenario") -> Scenario:
    """Build a scenario; ``model``, ``gpu`` and ``lengths`` are required.

    Raises:
        PlannerError: for an unknown or missing key, or a value of the wrong kind.
    """
    data = dict(data)
    missing = [key for key in ("model", "gpu", "lengths") if key not in data]
    if missing:
        raise PlannerError(f"scenario {name} lacks {', '.join(missing)}")
    model = load_model(str(data.pop("model")))
    gpu = get_gpu(str(data.pop("gpu")))
    precision = _precision(model, data)
    raw_lengths = data.pop("lengths")
    if not isinstance(raw_lengths, Mapping):
        raise PlannerError("lengths must be a mapping such as {kind: uniform, length: 8192, ratio: 0.8}")
    known_lengths = {f.name for f in fields(Lengths)}
    unknown = sorted(set(raw_lengths) - known_lengths)
    if unknown:
        raise PlannerError(f"unknown key lengths.{unknown[0]}; known: {', '.join(sorted(known_lengths))}")
    known = {f.name for f in fields(Scenario)} - {"model", "gpu", "precision", "lengths", "name"}
    unknown = sorted(set(data) - known)
    if unknown:
        raise PlannerError(f"unknown scenario key {unknown[0]!r}; known: {', '.join(sorted(known))}")
    try:
        lengths = Lengths(**raw_lengths)
        return Scenario(model, gpu, precision, lengths, name=name, **data)
    except TypeError as error:
        raise PlannerError(f"scenario {name}: {error}") from None


def _precision(model: ModelShape, data: dict[str, Any]) -> Precision:
    """Take ``weight_format``, ``projection_format`` and ``attention_format`` out of ``data``."""
    precision = default_precision(get_format(str(data.pop("weight_format", model.expert_format))))
    if "projection_format" in data:
        precision = replace(precision, projections=get_format(str(data.pop("projection_format"))))
    if "attention_format" in data:
        attention = str(data.pop("attention_format"))
        _choice("attention_format", attention, ("bf16", "fp8"))
        precision = replace(precision, attention=attention)
    if "dispatch_format" in data:
        dispatch = get_format(str(data.pop("dispatch_format"))).bytes_per_param
        precision = replace(precision, dispatch_bytes=dispatch)
    return precision


def load_scenarios(path: str) -> list[Scenario]:
    """Read a YAML file: one scenario, or ``scenarios: {name: {...}}`` over common ``defaults``.

    Raises:
        PlannerError: if the file is missing or malformed.
    """
    import yaml

    file = Path(path)
    if not file.is_file():
        raise PlannerError(f"scenario file {path} does not exist")
    try:
        data = yaml.safe_load(file.read_text())
    except yaml.YAMLError as error:
        raise PlannerError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(data, Mapping):
        raise PlannerError(f"{path} must hold a mapping")
    if "scenarios" not in data:
        return [scenario_from_mapping(data, file.stem)]
    if not isinstance(data["scenarios"], Mapping):
        raise PlannerError(f"{path}: scenarios must be a mapping of names to settings")
    defaults = data.get("defaults") or {}
    return [scenario_from_mapping({**defaults, **(own or {})}, name) for name, own in data["scenarios"].items()]
