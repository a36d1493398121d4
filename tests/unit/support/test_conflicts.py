from types import SimpleNamespace
from typing import Any

import pytest

from sglang_dwdp.errors import DwdpConfigError
from sglang_dwdp.support.conflicts import CONFLICTS, LOAD_FORMATS, check_conflicts, check_environment, unknown_names

# What SGLang has where nothing was said; test_resolve.py looks whether it has all of them.
PLAIN = dict.fromkeys([name for conflict in CONFLICTS for name in conflict.names]) | {
    "tp_size": 2,
    "dwdp_size": 1,
    "device": "cpu",
    "disaggregation_mode": "null",
    "init_expert_location": "trivial",
    "load_format": "auto",
    "startup_weight_load_mode": "serial",
}


def arguments(**changes: Any) -> SimpleNamespace:
    return SimpleNamespace(**(PLAIN | changes))


CASES = [
    ({"tp_size": 1}, "--tp-size 1 leaves no peer"),
    ({"dwdp_size": 4}, "--dwdp-size 4"),
    ({"moe_dense_tp_size": 2}, "--moe-dense-tp-size 2"),
    ({"load_format": "presharded"}, "--load-format presharded"),
    ({"load_format": "sharded_state"}, "--load-format sharded_state"),
    ({"load_format": "bitsandbytes"}, "--load-format bitsandbytes"),
    ({"load_format": "a format that comes later"}, "--load-format a format that comes later"),
    ({"expert_distribution_recorder_mode": "stat"}, "--expert-distribution-recorder-mode"),
    ({"remote_instance_weight_loader_start_seed_via_transfer_engine": True}, "hands out weights"),
    ({"enable_torch_compile": True}, "--enable-torch-compile"),
    ({"quantization": "fp8"}, "--quantization fp8: the CPU engine"),
    ({"use_ray": True}, "--use-ray: its scheduler actors"),
    ({"tokenizer_worker_num": 2}, "--tokenizer-worker-num 2"),
    ({"language_only": True}, "a server of its own for the encoder"),
    ({"encoder_only": True}, "a server of its own for the encoder"),
    ({"mm_enable_dp_encoder": True}, "--mm-enable-dp-encoder"),
    ({"enable_waterfill": True}, "fused shared experts"),
    ({"enforce_shared_experts_fusion": True}, "fused shared experts"),
    ({"enable_symm_mem": True}, "--enable-symm-mem"),
    ({"pp_size": 2}, "--pp-size 2"),
    ({"dp_size": 2}, "--dp-size 2"),
    ({"tp_size": 4, "attn_dp_size": 2}, "--attn-dp-size 2 differs"),
    ({"tp_size": 4, "ep_size": 2}, "--ep-size 2"),
    ({"moe_dp_size": 2}, "--moe-dp-size 2"),
    ({"attn_cp_size": 2}, "context parallelism"),
    ({"dcp_size": 2}, "context parallelism"),
    ({"moe_a2a_backend": "deepep"}, "--moe-a2a-backend deepep"),
    ({"enable_eplb": True}, "EPLB"),
    ({"ep_num_redundant_experts": 8}, "EPLB"),
    ({"init_expert_location": "map.json"}, "EPLB"),
    ({"elastic_ep_backend": "mooncake"}, "--elastic-ep-backend"),
    ({"speculative_algorithm": "STANDALONE"}, "--speculative-algorithm STANDALONE"),
    ({"speculative_algorithm": "ngram"}, "--speculative-algorithm ngram"),
    ({"speculative_algorithm": "DFLASH"}, "--speculative-algorithm DFLASH"),
    ({"speculative_algorithm": "EAGLE", "enable_multi_layer_eagle": True}, "--enable-multi-layer-eagle"),
    ({"speculative_moe_a2a_backend": "deepep"}, "brings experts to tokens"),
    ({"speculative_draft_load_format": "presharded"}, "drop --speculative-draft-load-format"),
    ({"enable_two_batch_overlap": True}, "overlap"),
    ({"enable_single_batch_overlap": True}, "overlap"),
    ({"enable_lora": True}, "LoRA"),
    ({"lora_paths": ["a"]}, "LoRA"),
    ({"enable_weights_cpu_backup": True}, "memory saver"),
    ({"cpu_offload_gb": 1}, "offloaded"),
    ({"offload_group_size": 2}, "offloaded"),
    ({"enable_paged_experts": True}, "offloaded"),
    ({"kt_weight_path": "w"}, "offloaded"),
    ({"weight_cache_mode": "daemon"}, "after start-up"),
    ({"startup_weight_load_mode": "overlap"}, "after start-up"),
    ({"checkpoint_engine_wait_weights_before_ready": True}, "waits for weights"),
    ({"expert_balancedness_report_mode": "prometheus"}, "--expert-balancedness-report-mode"),
    ({"enable_return_routed_experts": True}, "--enable-return-routed-experts"),
    ({"enable_pdmux": True}, "--enable-pdmux"),
    ({"enable_prefill_delayer": True}, "prefill delayer"),
    ({"disaggregation_mode": "decode"}, "decode"),
    ({"enable_pd_role_switch": True}, "--enable-pd-role-switch"),
]


def test_plain_arguments_are_accepted() -> None:
    check_conflicts(arguments())
    check_conflicts(arguments(dwdp_size=2, ep_size=2, attn_dp_size=2, offload_group_size=-1))


@pytest.mark.parametrize(("changes", "reason"), CASES)
def test_each_conflict_is_an_error_with_a_reason_and_a_way_out(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(DwdpConfigError, match=reason) as error:
        check_conflicts(arguments(**changes))
    assert any(conflict.way_out in str(error.value) for conflict in CONFLICTS)


def test_every_conflict_has_a_case() -> None:
    for conflict in CONFLICTS:
        found = [arguments(**changes) for changes, _ in CASES]
        assert any(conflict.applies(*(getattr(args, name) for name in conflict.names)) for args in found), conflict


@pytest.mark.parametrize("load_format", sorted(LOAD_FORMATS))
def test_load_formats_that_use_the_models_own_loader_are_accepted(load_format: str) -> None:
    check_conflicts(arguments(load_format=load_format))


def test_an_argument_that_was_renamed_is_an_error() -> None:
    """It would have no value that conflicts, so what it asks for would go unnoticed."""
    args = arguments()
    del args.enable_pdmux
    assert unknown_names(args) == ["enable_pdmux"]
    with pytest.raises(DwdpConfigError, match="no server argument enable_pdmux"):
        check_conflicts(args)


def test_what_dwdp_decided_is_not_judged() -> None:
    args = arguments(tp_size=4, dwdp_size=2)  # --dwdp-group-size 2
    check_conflicts(args, decided={"dwdp_size"})
    with pytest.raises(DwdpConfigError, match="--dwdp-size 2"):
        check_conflicts(args)
    with pytest.raises(DwdpConfigError, match="--enable-pdmux"):
        check_conflicts(arguments(tp_size=4, dwdp_size=2, enable_pdmux=True), decided={"dwdp_size"})


def test_variables_that_are_unsupported() -> None:
    check_environment({})
    check_environment({"SGLANG_ONE_VISIBLE_DEVICE_PER_PROCESS": "0"})
    with pytest.raises(DwdpConfigError, match="does not see the GPUs"):
        check_environment({"SGLANG_ONE_VISIBLE_DEVICE_PER_PROCESS": "true"})
    with pytest.raises(DwdpConfigError, match="wait for each other"):
        check_environment({"SGLANG_ENABLE_DP_SPEC_PREFILL_COORDINATION": "1"})


def test_all_conflicts_are_named_at_once() -> None:
    with pytest.raises(DwdpConfigError, match=r"--pp-size 2.*Also: EPLB"):
        check_conflicts(arguments(pp_size=2, enable_eplb=True))
