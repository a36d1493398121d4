"""Steps of a rank: each is the rank's own, so its kind and its CUDA graph are chosen without the others.

With attention data parallelism SGLang's schedulers tell each other in every step what they are about to run, and
choose graphs by the largest batch of all. DWDP's ranks never wait for each other.
"""

from __future__ import annotations

from typing import Any

from sglang.srt.managers.scheduler_components.recv_skipper import SchedulerRecvSkipper
from sglang.srt.plugins.hook_registry import HookType

from sglang_dwdp.srt_patches.hooks import Hook


def is_local(_model_runner: Any) -> bool:
    """In place of `DecodeCudaGraphRunner._forward_is_dp_local`: a graph fits the rank's own batch."""
    return True


def gathers_nothing(**_kwargs: Any) -> bool:
    """In place of `require_mlp_tp_gather` and `require_gathered_buffer`, where a draft model's graphs are made.

    They fit the rank's own batch too.
    """
    return False


def decide_alone(_adapter: Any, batch: Any) -> Any:
    """In place of `SchedulerDPAttnAdapter.prepare_mlp_sync_batch`, as if the all-gather had found no other rank.

    Args:
        batch: A `ScheduleBatch`; None in an idle step, which stays one.
    """
    if batch is not None:
        mode = batch.forward_mode
        batch.is_extend_in_batch = mode.is_extend()
        # --scheduler-recv-interval weighs prefills and decodes differently.
        batch.recv_skipper_forward_mode = SchedulerRecvSkipper.derive_forward_mode([mode.value])
        batch.can_run_decode_cuda_graph = mode.is_decode_or_idle() or mode.is_prebuilt()
        batch.can_run_dp_draft_cuda_graph = batch.spec_info is None or batch.spec_info.cuda_graph_compatible
    return batch


_DRAFT_RUNNERS = ("eagle_draft_cuda_graph_runner", "eagle_draft_extend_cuda_graph_runner")
GPU_HOOKS = tuple(
    Hook(f"sglang.srt.speculative.{module}.{name}", HookType.REPLACE, gathers_nothing)
    for module in _DRAFT_RUNNERS
    for name in ("require_mlp_tp_gather", "require_gathered_buffer")
)
HOOKS = (
    Hook(
        "sglang.srt.model_executor.runner.decode_cuda_graph_runner.DecodeCudaGraphRunner._forward_is_dp_local",
        HookType.REPLACE,
        is_local,
    ),
    Hook(
        "sglang.srt.managers.scheduler_components.dp_attn.SchedulerDPAttnAdapter.prepare_mlp_sync_batch",
        HookType.REPLACE,
        decide_alone,
    ),
)
