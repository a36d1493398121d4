"""What the doctor knows of a machine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Gpu:
    """A GPU: its name, the major number of its compute capability, and how many NVLinks are up, if NVML says."""

    name: str
    capability: int
    nvlinks: int | None = None


@dataclass(frozen=True, slots=True)
class Copy:
    """What the process of one GPU copied of another's memory, in bytes per second."""

    reader: int
    source: int
    bytes_per_s: float


@dataclass(frozen=True, slots=True)
class Share:
    """Memory that processes shared by one transport, a process for each GPU, but at least two.

    Attributes:
        transport: a name of `config.TRANSPORTS`.
        error: the first error of a process; empty if all went well.
        copies: of each ordered pair.
    """

    transport: str
    error: str = ""
    copies: Sequence[Copy] = ()


@dataclass(frozen=True, slots=True)
class Kernels:
    """FlashInfer's kernels.

    Attributes:
        version: FlashInfer's.
        formats: weight formats whose fused MoE is built (see `flashinfer_modules.FORMATS`).
        all_to_all: whether the module of `--dwdp-exchange` is built.
        compiler: path of `nvcc`; None: there is none.
    """

    version: str
    formats: Sequence[str]
    all_to_all: bool
    compiler: str | None


@dataclass(frozen=True, slots=True)
class Facts:
    """All of it. What a probe could not find out is None, with the reason in `failed`.

    Attributes:
        sglang: the installed SGLang; None: there is none.
        release_error: why its release is unsupported; empty if it is supported.
        changed: symbols of the ledger with another source than the release has.
        allow_patched: whether a server would start with those nonetheless.
        kernels: of FlashInfer; None also if it is not installed.
        driver: version of NVIDIA's driver.
        driver_cuda: the CUDA that the driver supports, such as "13.0".
        torch_cuda: the CUDA that PyTorch was built for.
        gpus: those that this process sees.
        no_peer_access: pairs of GPUs of which the first cannot reach the second.
        shares: one for each transport that was tried.
        open_files: soft and hard limit; -1: none.
        shm_bytes: size of /dev/shm.
        seccomp: mode of this process (0 none, 1 strict, 2 a filter).
        is_container: whether there are signs of a container.
        visible: CUDA_VISIBLE_DEVICES; None: not set.
        environment_error: why environment variables are unsupported; empty if they are not.
        failed: errors of probes, by name.
    """

    sglang: str | None = None
    release_error: str = ""
    changed: Sequence[str] | None = None
    allow_patched: bool = False
    kernels: Kernels | None = None
    driver: str | None = None
    driver_cuda: str | None = None
    torch_cuda: str | None = None
    gpus: Sequence[Gpu] | None = None
    no_peer_access: Sequence[Sequence[int]] = ()
    shares: Sequence[Share] = ()
    open_files: tuple[int, int] = (-1, -1)
    shm_bytes: int = 0
    seccomp: int | None = None
    is_container: bool = False
    visible: str | None = None
    environment_error: str = ""
    failed: Mapping[str, str] = field(default_factory=dict)
