"""Servers over several hosts (--nnodes): where their ranks meet, what all have to agree on, and who notices an end.

The ranks of all hosts meet before weights are read, at a port that SGLang's distributed group tells them together with
the secret. A group of ranks that lies within a host then works as on a single one. One over several hosts meets by TCP
too, and tries first whether its memory can be read across hosts.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import signal
import uuid
from collections.abc import Iterator
from functools import partial
from importlib.metadata import version
from typing import Any

import psutil
import torch
import torch.distributed
from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE
from sglang.srt.plugins.hook_registry import HookType
from sglang.srt.runtime_context import get_parallel
from sglang.srt.utils.network import NetworkAddress

from sglang_dwdp import __version__
from sglang_dwdp.config import DwdpConfig, flag_of, transports_of
from sglang_dwdp.memory import memory_for
from sglang_dwdp.memory.agreement import check_same
from sglang_dwdp.memory.crossing import check_crossing
from sglang_dwdp.memory.handshake import Exchange
from sglang_dwdp.memory.places import TcpPlace, own_address
from sglang_dwdp.memory.presence import Presence
from sglang_dwdp.srt_patches.attached import config_of
from sglang_dwdp.srt_patches.hooks import Hook

logger = logging.getLogger(__name__)
# SGLang's arguments that have to be the same on all hosts, since ranks share weights and requests go to any of them.
_ARGUMENTS = (
    "tp_size",
    "dwdp_size",
    "attn_dp_size",
    "dtype",
    "quantization",
    "kv_cache_dtype",
    "context_length",
    "chunked_prefill_size",
    "moe_runner_backend",
    "attention_backend",
    "load_format",
    "disaggregation_mode",
)
_SAMPLE = 64  # elements of a parameter that stand for it


class Hosts:
    """What a rank knows of the other hosts, from the time when all have met."""

    def __init__(self, everybody: Exchange, place: TcpPlace | None) -> None:
        self.everybody = everybody
        self.place = place  # of this rank's group; None: within a host
        self.presence: Presence | None = None


_current: list[Hosts] = []  # of this process: none on a single host, or one


def host_of(rank: int) -> int:
    """The `--node-rank` that a rank is on."""
    return rank // (int(get_parallel().tp_size) // int(get_parallel().nnodes))


def is_group_across() -> bool:
    """Whether this rank's group lies on several hosts."""
    size, rank = int(get_parallel().dwdp_size), int(get_parallel().tp_rank)
    first = rank // size * size
    return host_of(first) != host_of(first + size - 1)


def place_of_group() -> TcpPlace | None:
    """Where this rank's group meets; None: within the host."""
    return _current[0].place if _current else None


def meet(runner: Any) -> None:
    """Before `ModelRunner.load_model`.

    Raises:
        DwdpConfigError: The memory of a group cannot be read across hosts.
        DwdpSetupError: Hosts were started with other options or models, or a rank did not come.
    """
    parallel = get_parallel()
    if parallel.nnodes == 1 or runner.is_draft_worker or _current:
        return
    config = config_of(runner.server_args)
    assert config is not None
    rank, size, group_size = int(parallel.tp_rank), int(parallel.tp_size), int(parallel.dwdp_size)
    there = NetworkAddress.parse(parallel.dist_init_addr)
    here = own_address(there.host, there.port)
    place = TcpPlace.open(here) if rank == 0 else None
    secret, host, port = _from_first(parallel.tp_group, (uuid.uuid4().hex, here, place.port if place else 0))
    everybody = Exchange(secret, rank, size, config.timeout_s, place or TcpPlace(host, port))
    everybody.connect()
    if place is not None:
        place.close()
    try:
        check_same(everybody, list(_options(runner, config)), "was started with another model or other options")
        own = TcpPlace.open(here) if is_group_across() and rank % group_size == 0 else None
        places = everybody.all_gather(json.dumps([own.host, own.port] if own else None).encode())
    except BaseException as error:
        everybody.fail(str(error))
        everybody.close()
        raise
    first = rank // group_size * group_size
    found = json.loads(places[first])
    _current.append(Hosts(everybody, own or (TcpPlace(*found) if found else None)))
    if is_group_across():
        _try_memory(runner, config, f"{secret}.{first}")


def _from_first(group: Any, value: Any) -> Any:
    values = [value]
    torch.distributed.broadcast_object_list(values, src=group.ranks[0], group=group.cpu_group)
    return values[0]


def _options(runner: Any, config: DwdpConfig) -> Iterator[str]:
    """What has to be the same on all hosts, a line each."""
    yield f"SGLang {version('sglang')}"
    yield f"sglang-dwdp {__version__}"
    for field in dataclasses.fields(config):
        yield f"{flag_of(field.name)} {getattr(config, field.name)}"
    for name in _ARGUMENTS:
        yield f"--{name.replace('_', '-')} {getattr(runner.server_args, name)}"
    model = runner.model_config.hf_config.to_dict()
    for name in sorted(model.keys() - {"_name_or_path", "transformers_version"}):
        yield f"{name} of the model {json.dumps(model[name], default=str, sort_keys=True)}"


def _try_memory(runner: Any, config: DwdpConfig, secret: str) -> None:
    rank, size, on_gpu = int(get_parallel().tp_rank), int(get_parallel().dwdp_size), runner.device == "cuda"
    index = torch.cuda.current_device() if on_gpu else 0

    def state() -> str:
        from sglang_dwdp.memory.cuda_fabric import fabric_state

        return fabric_state(index)

    exchange = Exchange(secret, rank % size, size, config.timeout_s, place_of_group())
    try:
        exchange.connect()
        transport: str = config.transport
        if transport == "auto":
            transport = transports_of(runner.device, across_hosts=True)[0]
        make = partial(memory_for, runner.device, index, transport)
        check_crossing(transport, make, exchange, state if on_gpu else None)
    except BaseException as error:
        exchange.fail(str(error))
        raise
    finally:
        exchange.close()


def check_weights(model: torch.nn.Module) -> None:
    """Compare a sample of the weights that every rank has, on all hosts; all ranks call this together.

    Raises:
        DwdpSetupError: They differ: another checkpoint of the same shape.
    """
    if _current:
        check_same(_current[0].everybody, [f"weights {_sample(model)}"], "loaded another checkpoint")


def _sample(model: torch.nn.Module) -> str:
    """A hash of the first elements of each weight that is no routed expert's."""
    experts = {
        id(weight) for module in model.modules() if isinstance(module, FusedMoE) for weight in module.parameters()
    }
    found = hashlib.sha256()
    for name, weight in model.named_parameters():
        if name.split(".")[-1] == "weight" and id(weight) not in experts:
            part = weight.detach().flatten()[:_SAMPLE].contiguous().cpu()
            found.update(name.encode() + part.view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]


def watch() -> None:
    """From now on, end this host's part of the server when another host's ends."""
    if not _current:
        return
    hosts = _current[0]
    if hosts.place is not None:
        hosts.place.close()
    own = host_of(int(get_parallel().tp_rank))
    connections = hosts.everybody.take_connections()
    hosts.presence = Presence({rank: one for rank, one in connections.items() if host_of(rank) != own}, _end_server)


def _end_server(rank: int) -> None:
    logger.error("DWDP: rank %d on host %d is gone, so this host's part of the server ends too.", rank, host_of(rank))
    parent = psutil.Process().parent()
    if parent is not None:
        parent.send_signal(signal.SIGQUIT)  # as SGLang's schedulers do when they fail


def leave(_scheduler: Any, *_args: Any, **_kwargs: Any) -> None:
    """Before `Scheduler.handle_shutdown`: the server ends as it should."""
    if _current and _current[0].presence is not None:
        _current[0].presence.leave()


HOOKS = (
    Hook("sglang.srt.model_executor.model_runner.ModelRunner.load_model", HookType.BEFORE, meet),
    Hook("sglang.srt.managers.scheduler.Scheduler.handle_shutdown", HookType.BEFORE, leave),
)
