"""Every option of DWDP: its flag, its default, its validation and its error message."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, Literal, get_args

from sglang_dwdp.errors import DwdpConfigError

ViewMode = Literal["auto", "direct", "staged"]
Transport = Literal["auto", "host-shm", "cuda-vmm", "cuda-ipc"]
ExchangeMode = Literal["off", "auto"]

ENABLE = "enable_dwdp"
PREFIX = "dwdp_"
KIB = 1024
MIB = 1024 * KIB
UNPLANNED_DIRECT_MAX_TOKENS = 256  # --dwdp-direct-max-tokens where the planner cannot choose it


_CHOICES = {"view": get_args(ViewMode), "exchange": get_args(ExchangeMode), "transport": get_args(Transport)}


def _option(default: Any, text: str, kind: type | None = None) -> Any:
    """An option whose value is a `kind`; by default what its default is."""
    return dataclasses.field(default=default, metadata={"help": text, "kind": kind or type(default)})


@dataclasses.dataclass(frozen=True, slots=True)
class DwdpConfig:
    """The options of one server; present only where DWDP is on.

    A field `x_y` is the flag `--dwdp-x-y`, the keyword `dwdp_x_y` of `sglang.Engine`, and the key
    `dwdp-x-y` of a `--config` file.

    Raises:
        DwdpConfigError: a value is out of its range.
    """

    view: ViewMode = _option(
        "auto",
        "How remote experts are read. direct: in place, in the peers' memory. staged: copied ahead into slots. "
        "auto: direct for forwards of up to --dwdp-direct-max-tokens tokens, staged above.",
    )
    direct_max_tokens: int | None = _option(
        None,
        "Largest forward, in tokens, that --dwdp-view auto runs on direct views; decode in CUDA graphs uses them at "
        "any size. Default: what the planner finds best for the model and the GPU; "
        f"{UNPLANNED_DIRECT_MAX_TOKENS} where it knows neither.",
        int,
    )
    exchange: ExchangeMode = _option(
        "off",
        "Whether ranks may decode together, by sending tokens to the experts instead of reading the experts. auto: "
        "where all ranks of a group are about to decode, and that is sooner than each alone; tokens are then those of "
        "another batch size, as in expert parallelism, not bitwise a single rank's. off: a rank waits for nobody.",
    )
    depth: int = _option(2, "Slots for staged experts, each with room for the remote experts of one MoE layer.")
    slice_kib: int = _option(
        32768, "Size in KiB of the slices that a layer's copies are cut into; peers take turns slice by slice."
    )
    replicate_below_kib: int = _option(
        1024,
        "Per-expert tensors other than the weights (scales, biases) are replicated on every rank when all "
        "experts' values together take less than this many KiB, and shared like the weights otherwise.",
    )
    transport: Transport = _option(
        "auto",
        "How ranks share memory. host-shm: memory files (the CPU engine). cuda-vmm: driver allocations that every "
        "rank maps (GPUs of one host). cuda-ipc: the older way, for drivers or containers that refuse to export "
        "cuda-vmm's; all experts are staged, the rank's own too. auto: host-shm or cuda-vmm, as fits the device.",
    )
    group_size: int | None = _option(
        None,
        "Ranks that share one set of experts; --tp-size must be a multiple of it. Default: all --tp-size ranks.",
        int,
    )
    local_experts: int | None = _option(
        None,
        "Experts of each layer that a rank keeps, its own shard included; it fetches the rest. More take more memory "
        "and less traffic. Default: its shard alone.",
        int,
    )
    memory_gib: float | None = _option(
        None,
        "Memory in GiB that a rank may take for experts, slots included: as many experts are kept as fit. Another "
        "way to say --dwdp-local-experts.",
        float,
    )
    timeout_s: float = _option(
        300.0, "Longest wait in seconds for a peer during set-up, and, on the CPU engine, for a copy during a forward."
    )
    audit: bool = _option(
        False,
        "Count, in every forward, calls into torch.distributed and the bytes of remote experts read in place, and "
        "report both in /server_info. Slows forwards down; replays of CUDA graphs are not counted.",
    )

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                self._refuse(name, f"is not one of {', '.join(choices)}")
        for name, least in (
            ("direct_max_tokens", 0),
            ("depth", 1),
            ("slice_kib", 4),
            ("replicate_below_kib", 0),
            ("group_size", 2),
            ("local_experts", 1),
        ):
            value = getattr(self, name)
            if value is None and _field(name).default is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                self._refuse(name, f"must be a whole number of at least {least}")
        if self.memory_gib is not None and not _is_above_0(self.memory_gib):
            self._refuse("memory_gib", "must be a number of GiB above 0")
        if self.memory_gib is not None and self.local_experts is not None:
            self._refuse("memory_gib", "is another way to say --dwdp-local-experts: leave one of them out")
        if self.exchange == "auto" and not self.has_direct:
            self._refuse("exchange", "needs experts that can be read in place: use --dwdp-view auto or direct")
        if self.transport == "cuda-ipc" and self.view == "direct":
            self._refuse("view", "needs memory that can be mapped; with --dwdp-transport cuda-ipc use auto or staged")
        if self.transport == "cuda-ipc" and (self.local_experts or self.memory_gib):
            raise DwdpConfigError(
                "--dwdp-local-experts and --dwdp-memory-gib need memory that can be mapped: "
                "leave them out with --dwdp-transport cuda-ipc."
            )
        if not _is_above_0(self.timeout_s):
            self._refuse("timeout_s", "must be a number of seconds above 0")
        if not isinstance(self.audit, bool):
            self._refuse("audit", "must be true or false")

    def _refuse(self, name: str, why: str) -> None:
        raise DwdpConfigError(f"{flag_of(name)} {why} (got {getattr(self, name)!r}).")

    @property
    def slice_bytes(self) -> int:
        return self.slice_kib * KIB

    @property
    def replicate_below_bytes(self) -> int:
        return self.replicate_below_kib * KIB

    @property
    def direct_limit(self) -> int:
        """--dwdp-direct-max-tokens, which is settled when a server resolves its arguments."""
        return UNPLANNED_DIRECT_MAX_TOKENS if self.direct_max_tokens is None else self.direct_max_tokens

    @property
    def memory_bytes(self) -> int | None:
        return None if self.memory_gib is None else int(self.memory_gib * KIB * MIB)

    @property
    def has_direct(self) -> bool:
        """Whether some forwards may read remote experts in place."""
        return self.view != "staged" and self.transport != "cuda-ipc"

    def wants_direct(self, num_tokens: int) -> bool:
        """Whether a forward of `num_tokens` tokens runs on direct views."""
        if self.view == "auto":
            return self.has_direct and num_tokens <= self.direct_limit
        return self.view == "direct"


def _field(name: str) -> dataclasses.Field[Any]:
    return next(field for field in dataclasses.fields(DwdpConfig) if field.name == name)


def _is_above_0(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < float("inf")


def flag_of(name: str) -> str:
    """The command-line flag of the field `name`."""
    return "--" + (PREFIX + name).replace("_", "-")


def option_names() -> Iterator[str]:
    """The keyword of every option, `enable_dwdp` first."""
    yield ENABLE
    for field in dataclasses.fields(DwdpConfig):
        yield PREFIX + field.name


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add `--enable-dwdp` and the `--dwdp-*` flags to SGLang's parser."""
    group = parser.add_argument_group("DWDP (Distributed Weight Data Parallelism)")
    group.add_argument(
        "--enable-dwdp",
        action="store_true",
        help="Serve with DWDP over the --tp-size ranks: every rank runs its own requests and reads the "
        "experts that it does not store from its peers. See also the --dwdp-* options.",
    )
    for field in dataclasses.fields(DwdpConfig):
        # None marks a flag that was not given, so that one given without --enable-dwdp can be refused.
        how: dict[str, Any] = {"default": None}
        kind = field.metadata["kind"]
        if kind is bool:
            how["action"] = "store_true"
        elif kind is str:
            how["choices"] = _CHOICES[field.name]
        else:
            how["type"] = kind
        text = field.metadata["help"]
        if field.default is not None:
            text += f" Default: {field.default}."
        group.add_argument(flag_of(field.name), help=text.replace("%", "%%"), **how)


def from_options(options: Mapping[str, Any]) -> DwdpConfig | None:
    """The config that flags or keywords ask for, or None where they do not enable DWDP.

    `options` may hold any other keys; a value of None means that the option was not given.

    Raises:
        DwdpConfigError: an option is out of range, or given without `enable_dwdp`.
    """
    given = {
        field.name: options[PREFIX + field.name]
        for field in dataclasses.fields(DwdpConfig)
        if options.get(PREFIX + field.name) is not None
    }
    if not options.get(ENABLE):
        if given:
            names = ", ".join(map(flag_of, given))
            raise DwdpConfigError(f"{names} given without --enable-dwdp. Add --enable-dwdp, or take it away.")
        return None
    return DwdpConfig(**given)
