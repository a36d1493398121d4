"""What a simulation runs: read from YAML, checked, with defaults."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from pydantic.dataclasses import dataclass

from sglang_dwdp.errors import DwdpError
from sglang_dwdp.planner.checks import STRICT, AtLeastOne, Count, NotNegative, PlannerError, checked, read_mapping
from sglang_dwdp.planner.cost import Copies, Group
from sglang_dwdp.planner.dep import Exchange
from sglang_dwdp.planner.formats import Precision, default_precision, get_format
from sglang_dwdp.planner.gpus import Gpu, get_gpu
from sglang_dwdp.planner.memory import memory
from sglang_dwdp.planner.models import load_model
from sglang_dwdp.planner.shape import ModelShape
from sglang_dwdp.planner.workload import Lengths

MOST_GPUS = 65_536  # a simulated GPU takes some 10 kB
FORMAT_KEYS = ("weight_format", "projection_format", "attention_format", "dispatch_format")


@checked
@dataclass(frozen=True, config=STRICT)
class Scenario:
    """One simulated deployment and its load.

    Attributes:
        mode: `dwdp`, `dep` (ranks of a group in step) or `replica`.
        group_size: ranks per group.
        groups: behind the router.
        token_budget: tokens per forward and rank (`--chunked-prefill-size`).
        max_prefill_tokens: no further prompt joins a forward that has so many tokens (`--max-prefill-tokens`, by
            default 16,384 in SGLang); 0 for no such limit.
        chunked: cut prompts that do not fit (else they wait for the next forward).
        requests: number of requests.
        rate: Poisson arrivals per second; 0 for closed loop or all at once.
        concurrency: closed loop: so many requests in the system at any time; 0 for none.
        frontend: seconds that each request spends, one after another, between its client and a rank's queue (HTTP,
            tokenizer); what is not there yet cannot join a forward.
        seed: of all draws.
    """

    model: ModelShape
    gpu: Gpu
    precision: Precision
    lengths: Lengths
    mode: Literal["dwdp", "dep", "replica"] = "dwdp"
    group_size: AtLeastOne = 4
    groups: AtLeastOne = 1
    local_experts: Count = 0
    copies: Copies = "sliced"
    depth: AtLeastOne = 2
    ring_over_steps: bool = True
    exchange: Exchange = "all-to-all"
    token_budget: AtLeastOne = 32768
    max_prefill_tokens: Count = 0
    chunked: bool = True
    requests: AtLeastOne = 256
    rate: NotNegative = 0.0
    concurrency: Count = 0
    router: Literal["round_robin", "least_tokens"] = "round_robin"
    frontend: NotNegative = 0.0
    seed: Count = 0
    name: str = "scenario"

    def __post_init__(self) -> None:
        if self.ranks > MOST_GPUS:
            raise PlannerError(f"group_size x groups is {self.ranks:,} GPUs; at most {MOST_GPUS:,} can be simulated")
        if self.group_size > self.gpu.max_group:
            raise PlannerError(f"{self.gpu.name} links {self.gpu.max_group} GPUs; group_size is {self.group_size}")
        if self.rate and self.concurrency:
            raise PlannerError("give either rate (open loop) or concurrency (closed loop), not both")
        if self.mode == "dwdp":
            self.group.stored(self.model)

    @property
    def ranks(self) -> int:
        """GPUs in all."""
        return self.group_size * self.groups

    @cached_property
    def group(self) -> Group:
        """The sharing of experts within one group."""
        return Group(self.group_size, self.local_experts, self.copies, self.depth, self.ring_over_steps)


def scenario_from_mapping(data: Mapping[str, Any], name: str = "scenario") -> Scenario:
    """Build a scenario; `model`, `gpu` and `lengths` are required.

    Raises:
        PlannerError: for an unknown or missing key, a value of the wrong kind, or a model that does not fit.
    """
    missing = [key for key in ("model", "gpu", "lengths") if key not in data]
    if missing or not isinstance(data["lengths"], Mapping):
        raise PlannerError(f"missing: {', '.join(missing)}" if missing else "lengths must be a mapping, {length: 8192}")
    settings = {key: value for key, value in data.items() if key not in FORMAT_KEYS}
    model, gpu = load_model(str(data["model"])), get_gpu(str(data["gpu"]))
    precision = _precision(model, {key: str(data[key]) for key in FORMAT_KEYS if key in data})
    settings |= {"model": model, "gpu": gpu, "precision": precision, "name": name}
    scenario = Scenario(**(settings | {"lengths": Lengths(**data["lengths"])}))
    needed = memory(model, gpu, precision, scenario.mode, scenario.group, scenario.token_budget)
    if not needed.fits:
        wanted, there = (gpu.memory - needed.kv_cache) / 1e9, gpu.memory / 1e9
        what = f"{model.name} in {precision.experts.name} needs {wanted:.0f} GB for weights and activations"
        raise PlannerError(f"{what} and does not fit the {there:.0f} GB of {gpu.name}")
    return scenario


def _precision(model: ModelShape, formats: Mapping[str, str]) -> Precision:
    precision = default_precision(get_format(formats.get("weight_format", model.expert_format)))
    attention = formats.get("attention_format", precision.attention)
    if attention not in ("bf16", "fp8"):
        raise PlannerError(f"attention_format {attention!r} is none of bf16, fp8")
    if "dispatch_format" in formats:
        precision = replace(precision, dispatch_bytes=get_format(formats["dispatch_format"]).bytes_per_param)
    projections = get_format(formats.get("projection_format", precision.projections.name))
    return replace(precision, attention=attention, projections=projections)


def load_scenarios(path: str) -> list[Scenario]:
    """Read a YAML file: one scenario, or `scenarios: {name: {...}}` over common `defaults`.

    Raises:
        PlannerError: if the file is missing or malformed.
    """
    data = read_mapping(Path(path), "scenario file", yaml=True)
    scenarios, defaults = data.get("scenarios", {Path(path).stem: data}), data.get("defaults") or {}
    if "scenarios" not in data:
        defaults = {}
    elif data.keys() - {"scenarios", "defaults"} or not isinstance(scenarios, dict) or not scenarios:
        raise PlannerError(f"{path} must hold scenarios, a mapping of names to settings, and defaults; nothing else")
    if not all(isinstance(settings or {}, dict) for settings in (defaults, *scenarios.values())):
        raise PlannerError(f"{path}: defaults and each of the scenarios must be mappings of settings")
    found = []
    for name, own in scenarios.items():
        try:
            found.append(scenario_from_mapping({**defaults, **(own or {})}, str(name)))
        except DwdpError as error:
            raise PlannerError(f"{path}, scenario {name}: {error}") from None
    return found
