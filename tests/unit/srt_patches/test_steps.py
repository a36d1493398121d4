"""What a rank decides alone is what SGLang's scheduler decides for a server of one rank."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from sglang.srt.managers.scheduler_components import dp_attn
from sglang.srt.model_executor.forward_batch_info import ForwardMode

from sglang_dwdp.srt_patches.steps import decide_alone

MODES = (ForwardMode.EXTEND, ForwardMode.MIXED, ForwardMode.DECODE, ForwardMode.IDLE, ForwardMode.PREBUILT)


def batch(mode: ForwardMode) -> SimpleNamespace:
    tokens = 0 if mode in (ForwardMode.IDLE, ForwardMode.PREBUILT) else 1
    return SimpleNamespace(
        forward_mode=mode,
        batch_size=lambda: tokens,
        extend_num_tokens=tokens,
        extend_lens=[1] * tokens,
        extend_logprob_start_lens=[0] * tokens,
        prefix_lens=[0] * tokens,
        return_logprob=True,
        reqs=[],
        encoder_swa_reset=None,
        spec_info=None,
        seq_lens_cpu=torch.ones(tokens, dtype=torch.int64),
        seq_lens_sum=tokens,
        is_extend_in_batch=None,
        can_run_decode_cuda_graph=None,
    )


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.name)
def test_as_a_single_rank_would(mode: ForwardMode, monkeypatch: pytest.MonkeyPatch) -> None:
    tbo = SimpleNamespace(prepare_all_gather=lambda _: (False, mode.value), compute_output=lambda _: (None, mode))
    monkeypatch.setattr(dp_attn, "TboDPAttentionPreparer", lambda: tbo)
    monkeypatch.setattr(dp_attn, "world_dp_gather_enabled", lambda: False)
    monkeypatch.setattr(dp_attn, "check_cuda_graph_backend", lambda *_: False)
    group = SimpleNamespace(cpu_group=None)
    parallel = SimpleNamespace(num_dp_ranks=1, attn_tp_size=1, attn_cp_size=1, tp_group=group)
    monkeypatch.setattr(dp_attn, "get_parallel", lambda: parallel)
    runner = SimpleNamespace(spec_algorithm=None, model_config=None, attn_backend=None)
    expected = dp_attn.prepare_mlp_sync_batch_raw(
        batch(mode),
        model_runner=runner,
        get_idle_batch=lambda: None,
        disable_cuda_graph=False,
        require_mlp_tp_gather=False,
        disable_overlap_schedule=False,
        offload_tags=set(),
    )
    decided = decide_alone(None, batch(mode))
    assert decided.is_extend_in_batch == expected.is_extend_in_batch
    assert decided.can_run_decode_cuda_graph == expected.can_run_decode_cuda_graph
    assert decided.can_run_dp_draft_cuda_graph == expected.can_run_dp_draft_cuda_graph
    assert decided.recv_skipper_forward_mode == expected.recv_skipper_forward_mode


def test_an_idle_step_stays_idle() -> None:
    assert decide_alone(None, None) is None
