"""Every option of DWDP: its flag, its default, its validation and its error message."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, Literal, get_args

from sglang_dwdp.errors import DwdpConfigError

ViewMode = Literal["auto", "direct", "staged"]
Transport = Literal["auto", "host-shm", "host-path", "cuda-vmm", "cuda-fabric", "cuda-ipc"]
ExchangeMode = Literal["off", "auto"]
OnRankLoss = Literal["continue", "exit"]

ENABLE = "enable_dwdp"
PREFIX = "dwdp_"
KIB = 1024
MIB = 1024 * KIB
DAY_S = 86_400
# --dwdp-direct-max-tokens where the model's config does not say how many experts a token chooses: about what
# `experts.direct_limit` gives for 8 of 128, at the low end of what models have. A limit that is too low costs little,
# since staged forwards hide their copies under compute.
DEFAULT_DIRECT_MAX_TOKENS = 32


@dataclasses.dataclass(frozen=True, slots=True)
class TransportKind:
    """How ranks share memory.

    Attributes:
        device: the `--device` that has it.
        maps: whether a peer's memory can be mapped, so that kernels can read experts in place.
        crosses_hosts: whether the ranks of a group may be on several hosts.
    """

    device: str
    maps: bool
    crosses_hosts: bool = False


TRANSPORTS: Mapping[str, TransportKind] = {  # of each device the default comes first
    "host-shm": TransportKind("cpu", maps=True),
    "host-path": TransportKind("cpu", maps=True, crosses_hosts=True),
    "cuda-vmm": TransportKind("cuda", maps=True),
    "cuda-fabric": TransportKind("cuda", maps=True, crosses_hosts=True),
    "cuda-ipc": TransportKind("cuda", maps=False),
}


def transports_of(device: str, *, across_hosts: bool = False) -> list[str]:
    """The transports of a device, the default first; none for a device whose memory ranks cannot share.

    Args:
        device: A value of `--device`.
        across_hosts: Whether the ranks of the group are on several hosts.
    """
    kinds = TRANSPORTS.items()
    return [name for name, kind in kinds if kind.device == device and (kind.crosses_hosts or not across_hosts)]


@dataclasses.dataclass(frozen=True, slots=True)
class Views:
    """Which views the forwards of a server read.

    Attributes:
        direct: whether some forwards read remote experts in place.
        staged: whether some forwards read copies.
        max_tokens: if both, the largest forward that reads in place, in tokens.
    """

    direct: bool
    staged: bool
    max_tokens: int

    def is_direct(self, num_tokens: int) -> bool:
        """Whether a forward of `num_tokens` tokens reads in place."""
        return self.direct and (not self.staged or num_tokens <= self.max_tokens)


_CHOICES = {
    "view": get_args(ViewMode),
    "exchange": get_args(ExchangeMode),
    "transport": get_args(Transport),
    "on_rank_loss": get_args(OnRankLoss),
}


def _option(default: Any, text: str, kind: type | None = None) -> Any:
    """An option whose value is of type `kind`; None: of its default's type."""
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
        "any size. Default: where reading the chosen experts takes as long as copying all of them, by the model's "
        "numbers of experts.",
        int,
    )
    exchange: ExchangeMode = _option(
        "off",
        "Whether ranks may run decodes and short prefills together, by sending tokens to the experts instead of "
        "reading the experts. auto: where that is sooner than each alone; tokens are then those of another batch size, "
        "as in expert parallelism, not bitwise a single rank's. Turns --enable-mixed-chunk on. off: a rank waits for "
        "nobody.",
    )
    depth: int = _option(2, "Slots for staged experts, each with room for the remote experts of one MoE layer.")
    transport: Transport = _option(
        "auto",
        "How ranks share memory. host-shm: memory files (the CPU engine). cuda-vmm: driver allocations that every "
        "rank maps (GPUs of one host). cuda-fabric: the same for GPUs of several hosts in one NVLink domain. cuda-ipc: "
        "for drivers or containers that do not let cuda-vmm's allocations be exported; all experts are staged, the "
        "rank's own too. host-path: for tests of groups over hosts, which have to be one machine. auto: as fits the "
        "device and the group.",
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
        "Memory in GiB that a rank may use for experts, slots included; as many experts are kept as fit. Replaces "
        "--dwdp-local-experts.",
        float,
    )
    timeout_s: float = _option(
        300.0, "Longest wait in seconds for a peer during set-up, and, up to 60, for a copy during a forward."
    )
    on_rank_loss: OnRankLoss = _option(
        "continue",
        "What the server does when a rank's process ends. continue: the other ranks serve on, and the requests of the "
        "lost one are answered with HTTP 503 (not with --dwdp-transport cuda-ipc). exit: the server ends.",
    )
    audit: bool = _option(
        False,
        "Count the bytes of remote experts that forwards read in place, and report them in /server_info. Slows "
        "forwards down; replays of CUDA graphs are not counted.",
    )

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                self._reject(name, f"is not one of {', '.join(choices)}")
        for name, least in (("direct_max_tokens", 0), ("depth", 1), ("group_size", 2), ("local_experts", 1)):
            value = getattr(self, name)
            if value is None and name != "depth":
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                self._reject(name, f"must be a whole number of at least {least}")
        if self.memory_gib is not None and not _is_positive(self.memory_gib):
            self._reject("memory_gib", "must be a number of GiB above 0")
        if self.memory_gib is not None and self.local_experts is not None:
            self._reject("memory_gib", "decides the same as --dwdp-local-experts: give one of them only")
        if self.exchange != "off" and not self.views().direct:
            self._reject("exchange", "needs experts that can be read in place: use --dwdp-view auto or direct")
        if not self._maps and self.view == "direct":
            self._reject("view", f"needs mapped memory; with --dwdp-transport {self.transport} use auto or staged")
        if not self._maps and (self.local_experts or self.memory_gib):
            raise DwdpConfigError(
                "--dwdp-local-experts and --dwdp-memory-gib need mapped memory: "
                f"leave them out with --dwdp-transport {self.transport}."
            )
        if not _is_positive(self.timeout_s) or self.timeout_s > DAY_S:
            self._reject("timeout_s", f"must be a number of seconds above 0 and of at most {DAY_S}")
        if not isinstance(self.audit, bool):
            self._reject("audit", "must be true or false")

    def _reject(self, name: str, why: str) -> None:
        raise DwdpConfigError(f"{flag_of(name)} {why} (got {getattr(self, name)!r}).")

    @property
    def _maps(self) -> bool:
        return self.transport == "auto" or TRANSPORTS[self.transport].maps

    @property
    def memory_bytes(self) -> int | None:
        return None if self.memory_gib is None else int(self.memory_gib * KIB * MIB)

    @property
    def outlives_ranks(self) -> bool:
        """Whether the server goes on when a rank is lost. With `cuda-ipc` that rank's experts go with its process."""
        return self.on_rank_loss == "continue" and self._maps

    def views(self, *, maps: bool = True) -> Views:
        """Which views forwards read.

        Args:
            maps: whether the memory in use can be mapped. Whatever it says, a transport that cannot map memory has
                staged views only.
        """
        maps = maps and self._maps
        direct = maps and self.view != "staged"
        limit = DEFAULT_DIRECT_MAX_TOKENS if self.direct_max_tokens is None else self.direct_max_tokens
        return Views(direct, staged=not maps or self.view != "direct", max_tokens=limit)


def _is_positive(value: object) -> bool:
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
        # None marks a flag that was not given, so that one given without --enable-dwdp is an error.
        keywords: dict[str, Any] = {"default": None}
        kind = field.metadata["kind"]
        if kind is bool:
            keywords["action"] = "store_true"
        elif kind is str:
            keywords["choices"] = _CHOICES[field.name]
        else:
            keywords["type"] = kind
        text = field.metadata["help"]
        if field.default is not None:
            text += f" Default: {field.default}."
        group.add_argument(flag_of(field.name), help=text.replace("%", "%%"), **keywords)


def from_options(options: Mapping[str, Any]) -> DwdpConfig | None:
    """The config that flags or keywords ask for, or None where they do not enable DWDP.

    Args:
        options: may hold any other keys; a value of None means that the option was not given.

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
            raise DwdpConfigError(f"{names} given without --enable-dwdp. Add --enable-dwdp, or leave them out.")
        return None
    return DwdpConfig(**given)
