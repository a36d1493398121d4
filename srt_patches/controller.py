"""The controller process that hands requests to ranks: it waits for them, where SGLang's spins on a core, and it
knows which ranks have seen the beginning of a prompt.

A core that spins is missing to the ranks wherever there are few, as on a laptop, and slows its neighbours elsewhere.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable
from typing import Any

import zmq
from sglang.srt.arg_groups.overrides import resolving_view
from sglang.srt.plugins.hook_registry import HookType

from sglang_dwdp.srt_patches.hooks import Hook
from sglang_dwdp.srt_patches.prefixes import PrefixTable, cheapest
from sglang_dwdp.srt_patches.rank_traffic import traffic_of
from sglang_dwdp.watch import Notice

_POLL_MS = 1000  # the watchdog is fed at least this often


def event_loop(controller: Any) -> None:
    """In place of `DataParallelController.event_loop`: the same dispatch, asleep while nothing comes."""
    from sglang.srt.managers.io_struct import sock_recv

    socket, traffic = controller.recv_from_tokenizer, traffic_of(controller)
    while True:
        controller.soft_watchdog.feed()
        if not socket.poll(_POLL_MS):
            continue
        while True:
            try:
                request = sock_recv(socket, flags=zmq.NOBLOCK)
            except zmq.ZMQError:
                break
            if isinstance(request, Notice):
                traffic.heed(request)
            else:
                controller._request_dispatcher(request)
            controller.soft_watchdog.feed()


def choose_rank(original: Callable[..., None], controller: Any, request: Any) -> None:
    """Around `DataParallelController.total_tokens_scheduler`: a prompt whose beginning a rank has seen goes there, if
    that rank is not busier by more tokens than this saves.

    A request that comes as embeddings has no ids, whose length SGLang takes: it would end the server. It gets as many
    as a rank would give it later.
    """
    embeddings = getattr(request, "input_embeds", None)
    if request.input_ids is None and embeddings is not None:
        request.input_ids = array("q", [1]) * len(embeddings)
    elif not resolving_view(controller.server_args).disable_radix_cache:
        table = vars(controller).setdefault("_dwdp_prefixes", PrefixTable(len(controller.workers)))
        budget, ids = controller.dp_budget, array("q", request.input_ids)
        if request.routed_dp_rank is None:
            rank = cheapest(budget.total_tokens, budget.total_requests, table.hits(ids))
            budget.total_tokens[rank] += len(ids)
            budget.total_requests[rank] += 1
            request.routed_dp_rank = rank
        table.add(ids, request.routed_dp_rank)
    original(controller, request)


_CONTROLLER = "sglang.srt.managers.data_parallel_controller.DataParallelController"
HOOKS = (
    Hook(f"{_CONTROLLER}.event_loop", HookType.REPLACE, event_loop),
    Hook(f"{_CONTROLLER}.total_tokens_scheduler", HookType.AROUND, choose_rank),
)
