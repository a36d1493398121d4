"""What DWDP cannot be combined with, each with the reason and the way out (pure; no SGLang import)."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from sglang_dwdp.errors import DwdpConfigError


@dataclass(frozen=True, slots=True)
class Conflict:
    """A combination of server arguments that DWDP does not support.

    Attributes:
        names: The arguments that it looks at.
        applies: Whether their values, in this order, conflict.
        reason: Why; `{args.x}` stands for an argument's value.
        way_out: What to do instead.
    """

    names: tuple[str, ...]
    applies: Callable[..., bool]
    reason: str
    way_out: str


def _is_set(*values: Any) -> bool:
    return any(values)


def _above_one(*values: Any) -> bool:
    return any((value or 1) > 1 for value in values)


def _other_than_one_or(size: int | None, all_ranks: int) -> bool:
    return (size or 1) not in (1, all_ranks)


# Their loaders hand checkpoints to the model's `load_weights`, which knows what belongs to which expert; "dummy" fills
# every parameter. Others copy whatever a file or a peer has over the parameters, keep weights elsewhere, or bring a
# format of their own.
LOAD_FORMATS = frozenset(
    {
        "auto",
        "dummy",
        "fastsafetensors",
        "instanttensor",
        "mistral",
        "npcache",
        "pt",
        "runai_streamer",
        "safetensors",
    }
)


# Of speculative decoding. NEXTN is EAGLE with the checkpoint's own draft layers (multi-token prediction).
ALGORITHMS = ("NEXTN", "EAGLE", "EAGLE3")


CONFLICTS: tuple[Conflict, ...] = (
    Conflict(
        ("tp_size",),
        lambda size: size < 2,
        "--tp-size {args.tp_size} leaves no peer to share experts with",
        "Set --tp-size to the number of ranks in the group (2 or more), or drop --enable-dwdp.",
    ),
    Conflict(
        ("dwdp_size", "tp_size"),
        _other_than_one_or,
        "--dwdp-size {args.dwdp_size} is SGLang's own DWDP, and it names another group than --tp-size {args.tp_size}",
        "Drop --dwdp-size: --enable-dwdp takes all --tp-size ranks as the group, or --dwdp-group-size of them.",
    ),
    Conflict(
        ("pp_size",),
        _above_one,
        "--pp-size {args.pp_size}: with pipeline parallelism the ranks of a group would hold different layers",
        "Set --pp-size 1.",
    ),
    Conflict(
        ("dp_size",),
        _above_one,
        "--dp-size {args.dp_size}: every DWDP rank already serves its own requests",
        "Drop --dp-size; --tp-size alone sets the number of ranks.",
    ),
    Conflict(
        ("attn_dp_size", "tp_size"),
        _other_than_one_or,
        "--attn-dp-size {args.attn_dp_size} differs from --tp-size {args.tp_size}",
        "Drop --attn-dp-size: DWDP sets it to --tp-size.",
    ),
    Conflict(
        ("ep_size", "tp_size"),
        _other_than_one_or,
        "--ep-size {args.ep_size}: DWDP places the experts itself",
        "Drop --ep-size.",
    ),
    Conflict(
        ("moe_dp_size",),
        _above_one,
        "--moe-dp-size {args.moe_dp_size}: DWDP places the experts itself",
        "Drop --moe-dp-size.",
    ),
    Conflict(
        ("moe_dense_tp_size",),
        lambda size: (size or 1) != 1,
        "--moe-dense-tp-size {args.moe_dense_tp_size} splits dense layers over ranks, and a DWDP rank runs them alone",
        "Drop --moe-dense-tp-size: DWDP sets it to 1.",
    ),
    Conflict(
        ("attn_cp_size", "dcp_size"),
        _above_one,
        "context parallelism splits one request over several ranks, and a DWDP rank runs its requests alone",
        "Drop --attn-cp-size and --dcp-size.",
    ),
    Conflict(
        ("moe_a2a_backend", "speculative_moe_a2a_backend"),
        lambda *backends: any((backend or "none") != "none" for backend in backends),
        "--moe-a2a-backend {args.moe_a2a_backend} sends tokens to experts, and DWDP brings experts to tokens",
        "Drop --moe-a2a-backend and --speculative-moe-a2a-backend.",
    ),
    Conflict(
        ("enable_eplb", "ep_num_redundant_experts", "init_expert_location"),
        lambda eplb, redundant, location: bool(eplb or redundant or location not in (None, "trivial")),
        "EPLB and expert locations move experts between ranks while others read them in place",
        "Drop --enable-eplb, --ep-num-redundant-experts and --init-expert-location: every rank runs all experts of its "
        "own tokens.",
    ),
    Conflict(
        ("elastic_ep_backend",),
        _is_set,
        "--elastic-ep-backend changes the set of ranks while they share memory",
        "Drop --elastic-ep-backend.",
    ),
    Conflict(
        ("speculative_algorithm", "enable_multi_layer_eagle"),
        lambda algorithm, layers: bool(algorithm and (layers or algorithm.upper() not in ALGORITHMS)),
        "--speculative-algorithm {args.speculative_algorithm}: SGLang has no attention data parallelism for it "
        "(STANDALONE, NGRAM), or it has not been run with DWDP (any other, and --enable-multi-layer-eagle)",
        f"Use {' or '.join(ALGORITHMS)} with one draft layer.",
    ),
    Conflict(
        ("enable_two_batch_overlap", "enable_single_batch_overlap"),
        _is_set,
        "two-batch and single-batch overlap visit the MoE layers in an order that slots are not filled for",
        "Drop --enable-two-batch-overlap and --enable-single-batch-overlap.",
    ),
    Conflict(
        ("enable_lora", "lora_paths"),
        _is_set,
        "LoRA adapters on experts are sized by the experts that a rank stores",
        "Merge the adapter into the checkpoint, or drop --enable-lora and --lora-paths.",
    ),
    Conflict(
        ("enable_weights_cpu_backup", "enable_draft_weights_cpu_backup"),
        _is_set,
        "the memory saver does not know of the experts that ranks share, so they would be missing in its backup",
        "Drop --enable-weights-cpu-backup, and update the weights after memory was released.",
    ),
    Conflict(
        ("cpu_offload_gb", "offload_group_size", "enable_paged_experts", "kt_weight_path"),
        lambda gb, group, paged, path: bool((gb or 0) > 0 or (group or -1) > 0 or paged or path),
        "offloaded or paged experts are moved while peers read them in place",
        "Drop the offload options (--cpu-offload-gb, --offload-group-size, --enable-paged-experts, --kt-*).",
    ),
    Conflict(
        ("load_format", "speculative_draft_load_format"),
        lambda load_format, draft: load_format not in LOAD_FORMATS or (draft or "auto") not in LOAD_FORMATS,
        "--load-format {args.load_format} loads past the model's own loader of weights, so DWDP could not tell whether "
        "every rank got its experts",
        f"Use the checkpoint as it was published, with --load-format auto (or {', '.join(sorted(LOAD_FORMATS))}), and "
        "drop --speculative-draft-load-format.",
    ),
    Conflict(
        ("use_ray",),
        _is_set,
        "--use-ray: its scheduler actors load no plugins, so ranks would serve without DWDP's hooks",
        "Drop --use-ray.",
    ),
    Conflict(
        ("tokenizer_worker_num",),
        _above_one,
        "--tokenizer-worker-num {args.tokenizer_worker_num}: the workers load no plugins, so requests that send "
        "weights would not be answered with an error",
        "Drop --tokenizer-worker-num.",
    ),
    Conflict(
        ("language_only", "encoder_only"),
        _is_set,
        "with a server of its own for the encoder, ranks gather from all ranks for each request, and DWDP ranks do not "
        "wait for each other",
        "Drop --language-only and --encoder-only.",
    ),
    Conflict(
        ("mm_enable_dp_encoder",),
        _is_set,
        "--mm-enable-dp-encoder spreads a request's images over all ranks, and DWDP ranks do not wait for each other",
        "Drop --mm-enable-dp-encoder: every rank encodes the images of its own requests.",
    ),
    Conflict(
        ("enable_waterfill", "enforce_shared_experts_fusion"),
        _is_set,
        "fused shared experts would be one more row of the expert tensors, replicated on every rank",
        "Drop --enable-waterfill and --enforce-shared-experts-fusion.",
    ),
    Conflict(
        ("enable_symm_mem",),
        _is_set,
        "--enable-symm-mem allocates MoE outputs in memory that all ranks register together, and DWDP ranks do not "
        "wait for each other",
        "Drop --enable-symm-mem.",
    ),
    Conflict(
        ("weight_cache_mode", "startup_weight_load_mode"),
        lambda cache, load: (cache or "off") != "off" or load == "overlap",
        "weights that arrive after start-up would be written into memory that peers already read",
        "Drop --weight-cache-mode and --startup-weight-load-mode overlap.",
    ),
    Conflict(
        ("remote_instance_weight_loader_start_seed_via_transfer_engine",),
        _is_set,
        "--remote-instance-weight-loader-start-seed-via-transfer-engine hands out weights, which may be those of "
        "a slot",
        "Drop it: other servers can read the checkpoint.",
    ),
    Conflict(
        ("checkpoint_engine_wait_weights_before_ready",),
        _is_set,
        "--checkpoint-engine-wait-weights-before-ready waits for weights that arrive by IPC, which is unsupported",
        "Drop it, and give --model-path the weights.",
    ),
    Conflict(
        ("expert_balancedness_report_mode",),
        lambda mode: (mode or "off") != "off",
        "--expert-balancedness-report-mode sums over all ranks after every forward, and DWDP ranks do not wait for "
        "each other",
        "Drop --expert-balancedness-report-mode.",
    ),
    Conflict(
        ("expert_distribution_recorder_mode",),
        _is_set,
        "--expert-distribution-recorder-mode sums what each forward counted over all ranks, and DWDP ranks run "
        "different numbers of forwards",
        "Drop --expert-distribution-recorder-mode.",
    ),
    Conflict(
        ("enable_torch_compile",),
        _is_set,
        "--enable-torch-compile would compile the addresses of one layer's experts into its code",
        "Drop --enable-torch-compile.",
    ),
    Conflict(
        ("device", "quantization"),
        lambda device, quantization: bool(device == "cpu" and quantization),
        "--quantization {args.quantization}: the CPU engine has no kernels for quantized experts that need no AMX",
        "Drop --quantization, or serve on GPUs.",
    ),
    Conflict(
        ("enable_return_routed_experts",),
        _is_set,
        "--enable-return-routed-experts cuts a rank's tokens out of those of all ranks, which DWDP does not gather",
        "Drop --enable-return-routed-experts.",
    ),
    Conflict(
        ("enable_pdmux",),
        _is_set,
        "--enable-pdmux runs layers of a prefill between decodes, out of the order that slots are filled for",
        "Drop --enable-pdmux.",
    ),
    Conflict(
        ("enable_prefill_delayer",),
        _is_set,
        "the prefill delayer waits for all ranks in every scheduling round, and DWDP ranks do not wait for each other",
        "Drop --enable-prefill-delayer.",
    ),
    Conflict(
        ("disaggregation_mode", "enable_pd_role_switch"),
        lambda mode, switch: bool(mode == "decode" or switch),
        "--disaggregation-mode decode, and --enable-pd-role-switch to it, have not been run with DWDP",
        "Use --enable-dwdp on the prefill server (or without disaggregation) and a plain decode server.",
    ),
)


def conflicts_of(args: Any, decided: Collection[str] = ()) -> Iterator[str]:
    """The conflicts of server arguments.

    Args:
        args: An object with the attributes of SGLang's ServerArgs.
        decided: Arguments whose values DWDP decided. Conflicts that look at one of them are passed over.

    Yields:
        One or two sentences for each conflict.

    Raises:
        DwdpConfigError: `args` lacks an attribute that the table looks at, so that a conflict would go unnoticed.
    """
    unknown = unknown_names(args)
    if unknown:
        raise DwdpConfigError(
            f"--enable-dwdp cannot be used here: this SGLang has no server argument {', '.join(unknown)}, by which "
            "DWDP tells what it does not support. Install a release that docs/support.md names."
        )
    for conflict in CONFLICTS:
        if decided and not set(decided).isdisjoint(conflict.names):
            continue
        if conflict.applies(*(getattr(args, name) for name in conflict.names)):
            yield f"{conflict.reason.format(args=args)}. {conflict.way_out}"


def unknown_names(args: Any) -> list[str]:
    """The names in the table that `args` has no attribute of."""
    names = {name for conflict in CONFLICTS for name in conflict.names}
    return sorted(name for name in names if not hasattr(args, name))


def check_environment(variables: Mapping[str, str]) -> None:
    """Check the environment of a server.

    Args:
        variables: Such as `os.environ`.

    Raises:
        DwdpConfigError: It has something that DWDP does not support.
    """
    reasons = {
        "SGLANG_ONE_VISIBLE_DEVICE_PER_PROCESS": "a rank does not see the GPUs that its peers' experts lie on",
        "SGLANG_ENABLE_DP_SPEC_PREFILL_COORDINATION": "ranks would wait for each other in every step",
    }
    for name, reason in reasons.items():
        if variables.get(name, "").lower() in ("1", "true", "yes", "y", "t", "on"):
            raise DwdpConfigError(f"--enable-dwdp cannot be used here: with {name} {reason}. Unset it.")


def check_conflicts(args: Any, decided: Collection[str] = ()) -> None:
    """Check that DWDP supports these server arguments together.

    Args:
        args: An object with the attributes of SGLang's ServerArgs.
        decided: As in `conflicts_of`.

    Raises:
        DwdpConfigError: It does not; all conflicts are named.
    """
    found = list(conflicts_of(args, decided))
    if found:
        raise DwdpConfigError("--enable-dwdp cannot be used here: " + "  Also: ".join(found))
