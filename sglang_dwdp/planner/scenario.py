"""What a simulation runs: read from YAML, checked, with defaults."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from .checks import choice, kinds_of_fields, number, read_text, whole
from .cost import COPY_POLICIES, Group
from .dep import EXCHANGES
from .errors import PlannerError
from .formats import Precision, default_precision, get_format
from .gpu import Gpu
from .gpus import get_gpu
from .memory import memory
from .models import load_model
from .shape import ModelShape
from .workload import Lengths

MODES = ("dwdp", "dep", "replica")
ROUTERS = ("round_robin", "least_tokens")
ORDERS = ("rotation", "random")
MOST_GPUS = 65_536  # a simulated GPU takes some 10 kB


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
        kinds_of_fields(self)
        choice("mode", self.mode, MODES)
        choice("router", self.router, ROUTERS)
        choice("order", self.order, ORDERS)
        choice("copies", self.copies, COPY_POLICIES)
        choice("exchange", self.exchange, EXCHANGES)
        for name in ("group_size", "groups", "token_budget", "requests", "depth"):
            whole(name, getattr(self, name), least=1)
        whole("the number of GPUs, group_size x groups,", self.ranks, most=MOST_GPUS)
        if self.group_size > self.gpu.max_group:
            known = f"{self.gpu.name} links {self.gpu.max_group} GPUs"
            raise PlannerError(f"{known}, so group_size cannot be {self.group_size}")
        if self.rate and self.concurrency:
            raise PlannerError("give either rate (open loop) or concurrency (closed loop), not both")
        number("slowdown", self.slowdown, positive=True)
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


def scenario_from_mapping(data: Mapping[str, Any], name: str = "scenario") -> Scenario:
    """Build a scenario; ``model``, ``gpu`` and ``lengths`` are required.

    Raises:
        PlannerError: for an unknown or missing key, a value of the wrong kind, or a model that does not fit.
    """
    data = dict(data)
    missing = [key for key in ("model", "gpu", "lengths") if key not in data]
    if missing:
        raise PlannerError(f"there is no {', no '.join(missing)}")
    model = load_model(str(data.pop("model")))
    gpu = get_gpu(str(data.pop("gpu")))
    precision = _precision(model, data)
    raw_lengths = data.pop("lengths")
    if not isinstance(raw_lengths, Mapping):
        raise PlannerError("lengths must be a mapping such as {kind: uniform, length: 8192, ratio: 0.8}")
    known_lengths = {f.name for f in fields(Lengths)}
    _known("lengths key", raw_lengths, known_lengths)
    known = {f.name for f in fields(Scenario)} - {"model", "gpu", "precision", "lengths", "name"}
    _known("scenario key", data, known)
    scenario = Scenario(model, gpu, precision, Lengths(**raw_lengths), name=name, **data)
    needed = memory(model, gpu, precision, scenario.mode, scenario.group, scenario.token_budget)
    if not needed.fits:
        raise PlannerError(
            f"{model.name} in {precision.experts.name} does not fit: {needed.used / 1e9:.0f} GB of weights, "
            f"activations and workspaces, {gpu.memory / 1e9:.0f} GB on {gpu.name}"
        )
    return scenario


def _known(what: str, found: Iterable[Any], known: set[str]) -> None:
    for key in found:
        choice(what, key, tuple(sorted(known)))


def _precision(model: ModelShape, data: dict[str, Any]) -> Precision:
    """Take ``weight_format``, ``projection_format`` and ``attention_format`` out of ``data``."""
    precision = default_precision(get_format(str(data.pop("weight_format", model.expert_format))))
    if "projection_format" in data:
        precision = replace(precision, projections=get_format(str(data.pop("projection_format"))))
    if "attention_format" in data:
        attention = str(data.pop("attention_format"))
        choice("attention_format", attention, ("bf16", "fp8"))
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
        data = yaml.safe_load(read_text(file))
    except yaml.YAMLError as error:
        raise PlannerError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(data, Mapping):
        raise PlannerError(f"{path} must hold a mapping")
    if "scenarios" not in data:
        return [_named(path, file.stem, data)]
    _known(f"key of {path}", data, {"defaults", "scenarios"})
    if not isinstance(data["scenarios"], Mapping) or not data["scenarios"]:
        raise PlannerError(f"{path}: scenarios must be a mapping of names to settings, with one at least")
    defaults = data.get("defaults") or {}
    found = []
    for name, own in data["scenarios"].items():
        if not isinstance(defaults, Mapping) or not isinstance(own or {}, Mapping):
            raise PlannerError(f"{path}: defaults and scenario {name} must be mappings of settings")
        found.append(_named(path, str(name), {**defaults, **(own or {})}))
    return found


def _named(path: str, name: str, settings: Mapping[str, Any]) -> Scenario:
    try:
        return scenario_from_mapping(settings, name)
    except PlannerError as error:
        raise PlannerError(f"{path}, scenario {name}: {error}") from None
