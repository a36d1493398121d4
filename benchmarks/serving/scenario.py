"""What a comparison runs."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Any

from sglang_dwdp.planner.workload import Lengths

Flags = Mapping[str, Any]
KINDS = {
    "dwdp": "this plugin, --enable-dwdp over all ranks",
    "in-tree": "SGLang's own DWDP, --dwdp-size",
    "dep": "attention data parallelism with expert parallelism, --attn-dp-size and --ep-size",
    "replicas": "a full copy of the model on each rank behind SGLang's data-parallel controller, --dp-size",
    "single": "one rank with all experts",
}
ORDERS = ("drawn", "long_to_one_rank")
DTYPES = ("bfloat16", "float32", "float16")
TRANSFER_BACKENDS = ("mooncake", "mooncake_tcp", "nixl", "mori", "fake")


@dataclasses.dataclass(frozen=True, slots=True)
class Model:
    """Either `path` (a folder, or a name on the hub), or `make`, the arguments of `make_checkpoint`."""

    path: str = ""
    make: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, slots=True)
class Load:
    """The requests of every run.

    lengths: of prompts, in tokens.  output_tokens: the longest answer; with `uniform` lengths answers vary by
    the same ratio.  rates: requests per second, Poisson (`inf`: all at once).  concurrencies: requests in
    flight.  order: `drawn`, or `long_to_one_rank`: every N-th request is one of the longest, so that handing
    requests out by count over N ranks gives one rank all of them.
    """

    lengths: Lengths
    output_tokens: int
    requests: int
    rates: tuple[float, ...] = ()
    concurrencies: tuple[int, ...] = ()
    order: str = "drawn"
    seed: int = 1
    options: Flags = dataclasses.field(default_factory=dict)

    def points(self) -> tuple[Point, ...]:
        """Every run that a variant makes."""
        rates = (Point("rate", rate) for rate in self.rates)
        return (*rates, *(Point("concurrency", count) for count in self.concurrencies))


@dataclasses.dataclass(frozen=True, slots=True)
class Point:
    """One load level: a rate in requests per second, or a number of requests in flight."""

    kind: str
    value: float

    @property
    def label(self) -> str:
        """As tables show it."""
        if self.kind == "rate":
            return "all at once" if self.value == float("inf") else f"{self.value:g} requests/s"
        return f"{self.value:g} in flight"

    @property
    def key(self) -> str:
        """As file names have it."""
        return f"{self.kind}-{self.value:g}"


@dataclasses.dataclass(frozen=True, slots=True)
class Check:
    """Sampled requests whose tokens are compared with the reference's, each on every rank of an idle server.

    must_equal: a difference is a failure of the comparison (for float32; in bfloat16 rounding may decide ties).
    """

    requests: int = 8
    new_tokens: int = 16
    must_equal: bool = False


@dataclasses.dataclass(frozen=True, slots=True)
class Decode:
    """The decode side of a disaggregated variant, whose prefill side is the variant itself."""

    ranks: int = 1
    transfer_backend: str = "mooncake"
    flags: Flags = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, slots=True)
class Variant:
    """One way to serve the model. `flags` are added to the scenario's, and win over them."""

    name: str
    kind: str
    ranks: int
    flags: Flags = dataclasses.field(default_factory=dict)
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)
    decode: Decode | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Scenario:
    """A whole comparison.

    gpus: 0 for SGLang's CPU engine.  one_gpu: all ranks share the first GPU.  chunk_tokens: the chunked prefill
    size of a rank, for every variant alike (0: SGLang's default).  port: of the servers (0: a free one).
    reference: the variant whose tokens count as right.  together: how many variants' servers run at the same time;
    only one is measured at a time, and at every load point they take turns. It saves time where servers start
    slowly, and shows them in the same minutes of a host whose speed drifts; all have to fit the GPUs together.
    """

    name: str
    model: Model
    gpus: int
    load: Load
    variants: tuple[Variant, ...]
    reference: str
    description: str = ""
    one_gpu: bool = False
    chunk_tokens: int = 0
    port: int = 0
    together: int = 1
    start_timeout_s: float = 900.0
    run_timeout_s: float = 3600.0
    check: Check = dataclasses.field(default_factory=Check)
    flags: Flags = dataclasses.field(default_factory=dict)
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def cpu(self) -> bool:
        """Whether servers run on SGLang's CPU engine."""
        return self.gpus == 0

    def devices(self, variant: Variant) -> int:
        """What figures "per GPU" are divided by: GPUs, or ranks on the CPU engine."""
        ranks = variant.ranks + (variant.decode.ranks if variant.decode else 0)
        return 1 if self.one_gpu else ranks

    def fingerprint(self, variant: Variant) -> str:
        """Changes when anything changes that a result of `variant` depends on."""
        shared = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.name not in ("variants", "reference", "description", "port", "start_timeout_s", "run_timeout_s")
        }
        text = json.dumps([_plain(shared), _plain(variant)], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
