"""The command lines of a variant's servers (pure)."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from benchmarks.serving.scenario import Flags, Scenario, Variant
from sglang_dwdp.cpu import engine as cpu_engine

# What SGLang divides by the ranks of attention data parallelism, its own DWDP included, and this plugin does not.
_DIVIDES_CHUNK = ("in-tree", "dep")


def kind_flags(variant: Variant) -> dict[str, Any]:
    """The flags that make a server one of its kind."""
    ranks = variant.ranks
    return {
        "dwdp": {"tp-size": ranks, "enable-dwdp": True},
        "in-tree": {"tp-size": ranks, "dwdp-size": ranks},
        # As SGLang's own DWDP and this plugin set them: no rank waits for another outside of MoE layers.
        "dep": {
            "tp-size": ranks,
            "attn-dp-size": ranks,
            "ep-size": ranks,
            "enable-dp-lm-head": True,
            "moe-dense-tp-size": 1,
        },
        "replicas": {"dp-size": ranks},
        "single": {"tp-size": 1},
    }[variant.kind]


def server_flags(scenario: Scenario, variant: Variant) -> dict[str, Any]:
    """All flags of a variant's server but model, host and port: the scenario's, then the variant's own."""
    flags: dict[str, Any] = {}
    if scenario.cpu:
        flags |= {name.replace("_", "-"): value for name, value in cpu_engine.default_flags().items()}
    if scenario.chunk_tokens:
        factor = variant.ranks if variant.kind in _DIVIDES_CHUNK else 1
        flags["chunked-prefill-size"] = scenario.chunk_tokens * factor
    return flags | dict(scenario.flags) | kind_flags(variant) | dict(variant.flags)


def prefill_flags(scenario: Scenario, variant: Variant, bootstrap_port: int) -> dict[str, Any]:
    """The flags of the prefill side of a disaggregated variant."""
    assert variant.decode is not None
    return server_flags(scenario, variant) | {
        "disaggregation-mode": "prefill",
        "disaggregation-transfer-backend": variant.decode.transfer_backend,
        "disaggregation-bootstrap-port": bootstrap_port,
    }


def decode_flags(scenario: Scenario, variant: Variant) -> dict[str, Any]:
    """The flags of its decode side, a plain server."""
    assert variant.decode is not None
    plain = Variant(
        variant.name, "single" if variant.decode.ranks == 1 else "dep", variant.decode.ranks, variant.decode.flags
    )
    flags = server_flags(scenario, plain)
    if not scenario.cpu and not scenario.one_gpu:  # on the GPUs after those that prefill
        flags.setdefault("base-gpu-id", int(flags.get("base-gpu-id", 0)) + variant.ranks)
    return flags | {
        "disaggregation-mode": "decode",
        "disaggregation-transfer-backend": variant.decode.transfer_backend,
    }


def server_command(model: str, port: int, flags: Flags) -> list[str]:
    """`python -m sglang.launch_server …`."""
    command = [sys.executable, "-m", "sglang.launch_server", "--model-path", model]
    return [*command, "--host", "127.0.0.1", "--port", str(port), *as_arguments(flags)]


def router_command(prefill: str, bootstrap_port: int, decode: str, port: int) -> list[str]:
    """SGLang's mini load balancer in front of one prefill and one decode server, given by their URLs."""
    command = [sys.executable, "-m", "sglang_router.launch_router", "--pd-disaggregation", "--mini-lb"]
    command += ["--prefill", prefill, str(bootstrap_port), "--decode", decode]
    return [*command, "--host", "127.0.0.1", "--port", str(port)]


def as_arguments(flags: Mapping[str, Any]) -> list[str]:
    """`{"tp-size": 2, "enable-dwdp": True}` as `--tp-size 2 --enable-dwdp`; False leaves a flag out."""
    arguments: list[str] = []
    for name, value in flags.items():
        if value is True:
            arguments.append(f"--{name}")
        elif value is not False:
            values = value if isinstance(value, list) else [value]
            arguments += [f"--{name}", *map(str, values)]
    return arguments


def server_environment(scenario: Scenario, variant: Variant, base: Mapping[str, str]) -> dict[str, str]:
    """Variables for a variant's servers: what the CPU engine needs, then the scenario's and the variant's own."""
    added = {**scenario.environment, **variant.environment}
    if variant.decode is not None:  # both sides are on this host, which need not have a network
        added.setdefault("SGLANG_HOST_IP", "127.0.0.1")
    if scenario.cpu:
        if variant.kind == "dwdp":  # the plugin arranges the rest
            added.setdefault("SGLANG_USE_CPU_ENGINE", "1")
        else:
            ranks = max(variant.ranks, variant.decode.ranks if variant.decode else 1)
            added = cpu_engine.environment(ranks, {**base, **added}) | added
    return added
