"""The ways to serve that are compared, as keywords of `sglang.Engine`: each as SGLang comes, nothing turned off.

What is set for all of them only limits what is captured and kept (the cases need no more), and keeps a prefill to one
prompt: the cache's size, the sizes of graphs, the number of running requests, and the chunk where a prompt is as long.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.cases import DECODE_PROMPT, PARITY_LONGEST, Case, graph_size, graph_sizes
from benchmarks.one_gpu import one_gpu_environment
from sglang_dwdp.cpu import engine as cpu_engine
from sglang_dwdp.demo.server import fewer_models

KINDS = ("dwdp", "dwdp-mixed", "dwdp-exchange", "in-tree", "dep", "replicas", "tp")
DEFAULT = ("dwdp", "in-tree", "dep", "replicas", "tp")
ON_CPU = ("dwdp", "dwdp-mixed", "dwdp-exchange", "replicas")
WAITING = ("dep", "tp")  # their ranks wait for each other in every forward
TIMED = ("dwdp-exchange",)  # their ranks time forwards while they start, so nothing else may start beside them
DIVIDED = ("in-tree", "dep")  # SGLang divides their chunk and running requests by the ranks
# SGLang's chunk on GPUs of 60 to 160 GB (arg_groups/memory_hook.py), which it divides by the ranks of attention data
# parallelism.
CHUNK = 8192
MAX_PREFILL_TOKENS = 16384
MODEL_MODULES = ("qwen3_moe", "glm4_moe", "glm4_moe_nextn")  # SGLang's, for made checkpoints and those in models/
# NVLink multicast stays off: not every host lets a process use it.
QUIET = {"NCCL_NVLS_ENABLE": "0", "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1", "NVSHMEM_DISABLE_NVLS": "1"}


@dataclasses.dataclass(frozen=True, slots=True)
class Variant:
    """One way to serve.

    Attributes:
        name: In tables and files.
        kind: One of `KINDS`.
        options: Keywords of `sglang.Engine` that win over the kind's.
        environment: Further variables.
    """

    name: str
    kind: str
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def is_dwdp(self) -> bool:
        """Whether it is this plugin."""
        return self.kind.startswith("dwdp")

    @property
    def routed(self) -> bool:
        """Whether prompts can be sent to a rank of choice."""
        return self.kind != "tp"


@dataclasses.dataclass(frozen=True, slots=True)
class Setting:
    """What all variants have in common.

    Attributes:
        ranks: Of each engine.
        devices: GPUs; 0 for the CPU engine, 1 for a GPU that all ranks share.
        model: A checkpoint folder.
        dummy: Whether SGLang draws the weights instead of reading them.
        cases: What is measured.
        prompts: Of a rank, in a prefill.
        decode_tokens: New tokens of each sequence of a decode.
        buckets: Sizes of prefill graphs in tokens; None for those that the cases use.
        parity: Whether tokens are compared too.
        mem_fraction: SGLang's `mem_fraction_static`, of what the GPU has free when an engine starts; None for SGLang's
            default, which leaves no room for further engines.
        several: Whether other engines run at the same time.
    """

    ranks: int
    devices: int
    model: str
    dummy: bool
    cases: Sequence[Case]
    prompts: int
    decode_tokens: int
    buckets: Sequence[int] | None = None
    parity: bool = False
    mem_fraction: float | None = 0.97
    several: bool = False

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt."""
        return max([case.longest for case in self.cases] + [self.parity_longest * self.parity])

    @property
    def parity_longest(self) -> int:
        """Tokens of the longest prompt whose tokens are compared."""
        return PARITY_LONGEST if self.devices else 256

    @property
    def sequences(self) -> int:
        """Of a rank, at most, in a decode."""
        return max([case.size for case in self.cases if case.kind == "decode"], default=1)

    @property
    def cached_tokens(self) -> int:
        """What a rank's KV cache must hold: a few of the longest prompts, or all sequences of the largest decode.

        One prompt is scheduled while another runs and a third ends.
        """
        decode = self.sequences * (DECODE_PROMPT + self.decode_tokens + 64)
        return max(3 * self.longest, decode) + 2048

    @property
    def prefill_graphs(self) -> list[int]:
        """Sizes of prefill graphs, in tokens."""
        if self.buckets is not None:
            return sorted(self.buckets)
        powers = [2**power for power in range(5, 15)] if self.parity else []
        return sorted({*graph_sizes(self.cases, self.ranks, self.prompts), *powers})


def kind_options(kind: str, ranks: int) -> dict[str, Any]:
    """What makes an engine that variant."""
    dwdp: dict[str, Any] = {"tp_size": ranks, "enable_dwdp": True}
    kinds: dict[str, dict[str, Any]] = {
        "dwdp": dwdp,
        "dwdp-mixed": dwdp | {"enable_mixed_chunk": True},
        "dwdp-exchange": dwdp | {"dwdp_exchange": "auto"},
        "in-tree": {"tp_size": ranks, "dwdp_size": ranks},
        "dep": {"tp_size": ranks, "dp_size": ranks, "enable_dp_attention": True, "ep_size": ranks},
        "replicas": {"tp_size": 1, "dp_size": ranks},
        "tp": {"tp_size": ranks},
    }
    return kinds[kind]


def engine_options(variant: Variant, setting: Setting) -> dict[str, Any]:
    """All keywords of the variant's engine.

    Raises:
        ValueError: The variant cannot run with this setting; the message says why.
    """
    kind, ranks = variant.kind, setting.ranks
    if not setting.devices and kind not in ON_CPU:
        raise ValueError("it needs GPUs")
    if 1 < setting.devices < ranks:
        raise ValueError(f"{ranks} ranks need {ranks} GPUs, there are {setting.devices}")
    # With tensor parallelism the ranks' requests share one batch and one cache.
    together = ranks if kind == "tp" else 1
    divided = ranks if kind in DIVIDED else 1
    options: dict[str, Any] = {
        "model_path": setting.model,
        "skip_tokenizer_init": True,
        "random_seed": 1,
        "log_level": "info",
        "disable_radix_cache": True,  # random prompts would share prefixes of a token or two
        "prefill_max_requests": 1,
        "max_total_tokens": setting.cached_tokens * together,
    }
    if setting.dummy:
        options["load_format"] = "dummy"
    # Above the longest prompt: with mixed chunks, one of the chunk's size leaves a token for a forward of its own.
    chunk = (setting.longest // 512 + 1) * 512
    if not setting.devices or setting.longest >= CHUNK // divided:
        options["chunked_prefill_size"] = chunk * divided
    if setting.longest > MAX_PREFILL_TOKENS:
        options["max_prefill_tokens"] = chunk
    if setting.devices:
        decodes = {case.size * together for case in setting.cases if case.kind == "decode"}
        options["cuda_graph_bs_decode"] = sorted(decodes | {1})
        # Of all ranks, where SGLang divides it by them. A request that ends may still count while the next one runs.
        per_rank = max(16, 2 * setting.sequences * together)
        options["max_running_requests"] = per_rank * (1 if kind in ("replicas", "tp") else ranks)
        sizes = {*setting.prefill_graphs}
        if decodes:
            sizes.add(graph_size(DECODE_PROMPT))
        options["cuda_graph_bs_prefill"] = sorted(sizes)
        if setting.devices == 1 and ranks > 1:
            options["disable_custom_all_reduce"] = True  # it takes a GPU for each rank
        if setting.mem_fraction is not None:
            options["mem_fraction_static"] = setting.mem_fraction
        # Engines that wait leave the cores to the one that is measured. Ranks that wait for each other would sleep
        # through a peer's request.
        if setting.several and kind not in WAITING:
            options["sleep_on_idle"] = True
    else:
        options |= cpu_engine.default_flags() | {"dtype": "float32", "skip_server_warmup": True}
        options["max_total_tokens"] = setting.cached_tokens
        if variant.is_dwdp:
            options["dwdp_direct_max_tokens"] = 64  # so that longer prefills are staged, as they are on GPUs
    return options | kind_options(kind, ranks) | dict(variant.options)


def environment(
    kind: str, *, ranks: int, devices: int, several: bool, made: bool, folder: Path, base: Mapping[str, str]
) -> dict[str, str]:
    """All variables of the processes of an engine or a server.

    Args:
        kind: One of `KINDS`.
        ranks: Of the engine.
        devices: As `Setting`'s.
        several: As `Setting`'s.
        made: Whether the checkpoint is one of `benchmarks.checkpoints` or models/, which need few of SGLang's models.
        folder: Where a plugin for ranks that share a GPU is written.
        base: The variables that others are added to.
    """
    added = {"HF_HUB_OFFLINE": "1"}
    if made:
        added |= fewer_models(MODEL_MODULES)
    if several or devices == 1:
        # Engines that load at the same time make GPUs look unevenly used, which SGLang takes for an error.
        added["SGLANG_ENABLE_TP_MEMORY_INBALANCE_CHECK"] = "0"
    result = {**base, **QUIET, **added}
    if not devices:
        result |= cpu_engine.environment(ranks, result)
    elif devices == 1 and ranks > 1:
        folder = folder / "one_gpu"
        folder.mkdir(exist_ok=True)
        result |= one_gpu_environment(folder, result)
    return result


def parse_variants(names: Iterable[str], overrides: Iterable[Sequence[str]]) -> list[Variant]:
    """Variants from the command line's words.

    Args:
        names: Each a kind, or NAME=KIND for a kind with options of its own.
        overrides: Each a variant's name, or `all`, and then KEY=VALUE. Values are JSON where they can be; a key in
            capitals is a variable of the processes.

    Raises:
        ValueError: A kind or a name is unknown, or a setting has no value.
    """
    kinds = {}
    for text in names:
        name, _, kind = text.partition("=")
        kinds[name] = kind or name
        if kinds[name] not in KINDS:
            raise ValueError(f"{text!r}: {kinds[name]!r} is none of {', '.join(KINDS)}")
    options: dict[str, dict[str, Any]] = {name: {} for name in kinds}
    variables: dict[str, dict[str, str]] = {name: {} for name in kinds}
    for to, *settings in sorted(overrides, key=lambda words: words[0] != "all"):
        if to not in (*kinds, "all"):
            raise ValueError(f"--set {to}: the variants are {', '.join(kinds)}")
        for setting in settings:
            key, equals, value = setting.partition("=")
            if not equals:
                raise ValueError(f"--set {to} {setting}: it has to be KEY=VALUE")
            for name in kinds if to == "all" else (to,):
                if key.isupper():
                    variables[name][key] = value
                else:
                    options[name][key.replace("-", "_")] = _value(value)
    return [Variant(name, kind, options[name], variables[name]) for name, kind in kinds.items()]


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text
