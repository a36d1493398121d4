"""What DWDP cannot be combined with, each with the reason and the way out (pure; no SGLang import)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from sglang_dwdp.errors import DwdpConfigError


@dataclass(frozen=True, slots=True)
class Conflict:
    """A combination of server arguments that is refused at start."""

    applies: Callable[[Any], bool]
    reason: str
    way_out: str


def _set(name: str) -> Callable[[Any], bool]:
    return lambda args: bool(getattr(args, name, None))


def _above_one(name: str) -> Callable[[Any], bool]:
    return lambda args: (getattr(args, name, None) or 1) > 1


CONFLICTS: tuple[Conflict, ...] = (
    Conflict(
        lambda args: args.tp_size < 2,
        "--tp-size {args.tp_size} leaves no peer to share experts with",
        "Set --tp-size to the number of ranks in the group (2 or more), or drop --enable-dwdp.",
    ),
    Conflict(
        lambda args: args.dwdp_size not in (1, args.tp_size),
        "--dwdp-size {args.dwdp_size} is SGLang's own DWDP, and it names another group than --tp-size {args.tp_size}",
        "Drop --dwdp-size: --enable-dwdp takes all --tp-size ranks as the group, or --dwdp-group-size of them.",
    ),
    Conflict(
        _above_one("nnodes"),
        "--nnodes {args.nnodes}: ranks share memory through file descriptors, which do not cross hosts",
        "Run one server per host.",
    ),
    Conflict(
        _above_one("pp_size"),
        "--pp-size {args.pp_size}: with pipeline parallelism the ranks of a group would hold different layers",
        "Set --pp-size 1.",
    ),
    Conflict(
        _above_one("dp_size"),
        "--dp-size {args.dp_size}: every DWDP rank already serves its own requests",
        "Drop --dp-size; --tp-size alone sets the number of ranks.",
    ),
    Conflict(
        lambda args: (getattr(args, "attn_dp_size", None) or 1) not in (1, args.tp_size),
        "--attn-dp-size {args.attn_dp_size} differs from --tp-size {args.tp_size}",
        "Drop --attn-dp-size: DWDP sets it to --tp-size.",
    ),
    Conflict(
        lambda args: (getattr(args, "ep_size", None) or 1) not in (1, args.tp_size),
        "--ep-size {args.ep_size}: DWDP places the experts itself",
        "Drop --ep-size.",
    ),
    Conflict(
        _above_one("moe_dp_size"),
        "--moe-dp-size {args.moe_dp_size}: DWDP places the experts itself",
        "Drop --moe-dp-size.",
    ),
    Conflict(
        lambda args: (getattr(args, "moe_dense_tp_size", None) or 1) != 1,
        "--moe-dense-tp-size {args.moe_dense_tp_size} splits dense layers over ranks, and a DWDP rank runs them alone",
        "Drop --moe-dense-tp-size: DWDP sets it to 1.",
    ),
    Conflict(
        lambda args: (getattr(args, "attn_cp_size", None) or 1) > 1 or (getattr(args, "dcp_size", None) or 1) > 1,
        "context parallelism splits one request over several ranks, and a DWDP rank runs its requests alone",
        "Drop --attn-cp-size and --dcp-size.",
    ),
    Conflict(
        lambda args: (getattr(args, "moe_a2a_backend", None) or "none") != "none",
        "--moe-a2a-backend {args.moe_a2a_backend} sends tokens to experts, and DWDP brings experts to tokens",
        "Drop --moe-a2a-backend.",
    ),
    Conflict(
        lambda args: (
            args.enable_eplb
            or bool(getattr(args, "ep_num_redundant_experts", 0))
            or getattr(args, "init_expert_location", "trivial") not in (None, "trivial")
        ),
        "EPLB and expert locations move experts between ranks while others read them in place",
        "Drop --enable-eplb, --ep-num-redundant-experts and --init-expert-location: DWDP has no hot expert rank "
        "to relieve, since every rank runs all experts of its own tokens.",
    ),
    Conflict(
        _set("elastic_ep_backend"),
        "--elastic-ep-backend changes the set of ranks while they share memory",
        "Drop --elastic-ep-backend.",
    ),
    Conflict(
        _set("speculative_algorithm"),
        "--speculative-algorithm {args.speculative_algorithm}: draft workers run forwards of a second model whose "
        "experts are not shared",
        "Drop --speculative-algorithm.",
    ),
    Conflict(
        lambda args: args.enable_two_batch_overlap or bool(getattr(args, "enable_single_batch_overlap", False)),
        "two-batch and single-batch overlap visit the MoE layers in an order that slots are not filled for",
        "Drop --enable-two-batch-overlap and --enable-single-batch-overlap; there is no all-to-all left to hide.",
    ),
    Conflict(
        lambda args: bool(args.enable_lora or args.lora_paths),
        "LoRA adapters on experts are sized by the experts that a rank stores",
        "Merge the adapter into the checkpoint, or drop --enable-lora and --lora-paths.",
    ),
    Conflict(
        lambda args: bool(
            args.enable_memory_saver
            or getattr(args, "enable_weights_cpu_backup", False)
            or getattr(args, "enable_draft_weights_cpu_backup", False)
        ),
        "the memory saver cannot take back weights that peers have mapped",
        "Drop --enable-memory-saver and --enable-weights-cpu-backup.",
    ),
    Conflict(
        lambda args: bool(
            (getattr(args, "cpu_offload_gb", 0) or 0) > 0
            or (getattr(args, "offload_group_size", -1) or -1) > 0
            or getattr(args, "enable_paged_experts", False)
            or getattr(args, "kt_weight_path", None)
        ),
        "offloaded or paged experts are moved while peers read them in place",
        "Drop the offload options (--cpu-offload-gb, --offload-group-size, --enable-paged-experts, --kt-*).",
    ),
    Conflict(
        lambda args: getattr(args, "load_format", None) == "presharded",
        "--load-format presharded keeps a rank's prepared weights under a name that knows neither DWDP's shards nor "
        "the MoE backend that they were prepared for",
        "Drop --load-format presharded.",
    ),
    Conflict(
        _set("use_ray"),
        "--use-ray: its scheduler actors load no plugins, so ranks would serve without DWDP's hooks",
        "Drop --use-ray.",
    ),
    Conflict(
        _above_one("tokenizer_worker_num"),
        "--tokenizer-worker-num {args.tokenizer_worker_num}: the workers load no plugins, so requests that change "
        "weights would not be refused",
        "Drop --tokenizer-worker-num.",
    ),
    Conflict(
        lambda args: bool(getattr(args, "language_only", False) or getattr(args, "encoder_only", False)),
        "with a server of its own for the encoder, ranks gather from all ranks for each request, and DWDP ranks do not "
        "wait for each other",
        "Drop --language-only and --encoder-only.",
    ),
    Conflict(
        _set("mm_enable_dp_encoder"),
        "--mm-enable-dp-encoder spreads a request's images over all ranks, and DWDP ranks do not wait for each other",
        "Drop --mm-enable-dp-encoder: every rank encodes the images of its own requests.",
    ),
    Conflict(
        lambda args: bool(
            getattr(args, "enable_waterfill", False) or getattr(args, "enforce_shared_experts_fusion", False)
        ),
        "fused shared experts would be one more row of the expert tensors, replicated on every rank",
        "Drop --enable-waterfill and --enforce-shared-experts-fusion.",
    ),
    Conflict(
        _set("enable_symm_mem"),
        "--enable-symm-mem allocates MoE outputs in memory that all ranks register together, and DWDP ranks do not "
        "wait for each other",
        "Drop --enable-symm-mem: DWDP's forwards have no collectives that it could speed up.",
    ),
    Conflict(
        lambda args: (
            (getattr(args, "weight_cache_mode", "off") or "off") != "off"
            or getattr(args, "startup_weight_load_mode", "serial") == "overlap"
        ),
        "weights that arrive after start-up would be written into memory that peers already read",
        "Drop --weight-cache-mode and --startup-weight-load-mode overlap.",
    ),
    Conflict(
        _set("checkpoint_engine_wait_weights_before_ready"),
        "--checkpoint-engine-wait-weights-before-ready waits for weights, and DWDP refuses new ones",
        "Drop it, and give --model-path the weights.",
    ),
    Conflict(
        lambda args: (getattr(args, "expert_balancedness_report_mode", None) or "off") != "off",
        "--expert-balancedness-report-mode sums over all ranks after every forward, and DWDP ranks do not wait for "
        "each other",
        "Drop --expert-balancedness-report-mode: every rank runs all experts of its own tokens.",
    ),
    Conflict(
        _set("enable_return_routed_experts"),
        "--enable-return-routed-experts cuts a rank's tokens out of those of all ranks, which DWDP does not gather",
        "Drop --enable-return-routed-experts.",
    ),
    Conflict(
        _set("enable_pdmux"),
        "--enable-pdmux runs layers of a prefill between decodes, out of the order that slots are filled for",
        "Drop --enable-pdmux.",
    ),
    Conflict(
        _set("enable_prefill_delayer"),
        "the prefill delayer waits for all ranks in every scheduling round, and DWDP ranks do not wait for each other",
        "Drop --enable-prefill-delayer.",
    ),
    Conflict(
        lambda args: getattr(args, "disaggregation_mode", "null") == "decode" or _set("enable_pd_role_switch")(args),
        "--disaggregation-mode decode, and --enable-pd-role-switch to it, have not been run with DWDP",
        "Use --enable-dwdp on the prefill server (or without disaggregation) and a plain decode server.",
    ),
)


def conflicts_of(args: Any) -> Iterator[str]:
    """One sentence for each conflict of `args`, an object with SGLang's ServerArgs attributes."""
    for conflict in CONFLICTS:
        if conflict.applies(args):
            yield f"{conflict.reason.format(args=args)}. {conflict.way_out}"


def refuse_conflicts(args: Any) -> None:
    """
    Raises:
        DwdpConfigError: `args` has something that DWDP cannot be combined with; all of it is named.
    """
    found = list(conflicts_of(args))
    if found:
        raise DwdpConfigError("--enable-dwdp cannot be used here: " + "  Also: ".join(found))
