"""What facts mean for a server with DWDP, and what to do. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum

from sglang_dwdp.config import TRANSPORTS
from sglang_dwdp.doctor.facts import Facts
from sglang_dwdp.memory.messages import MAX_FDS
from sglang_dwdp.support.flashinfer_modules import FORMATS
from sglang_dwdp.support.ledger import ALLOW_PATCHED
from sglang_dwdp.support.release import SGLANG

# Three quarters of what a layer's staged copies reach one way between two H100 with NVLink, 395 GB/s
# (docs/performance.md). PCIe 5.0 with 16 lanes carries 63 GB/s at most.
MIN_BYTES_PER_S = 0.75 * 395e9
SGLANG_OPEN_FILES = 65_535  # SGLang raises its soft limit to this, where the hard one allows it
MIN_SHM_BYTES = 1 << 30  # what NCCL's documentation gives containers (--shm-size=1g)
BATCHES_SINCE_CUDA = 13  # whose driver takes a layer's copies in one call (`memory.cuda_copy`)
HOPPER = 9  # the compute capability that was validated


class Status(StrEnum):
    """How a finding bears on serving."""

    OK = "ok"
    WARNING = "warning"
    ERROR = "error"
    UNCHECKED = "unchecked"


@dataclass(frozen=True, slots=True)
class Finding:
    """One answer.

    Attributes:
        check: what was looked at.
        status: how it bears on serving.
        found: what is there.
        meaning: what follows from it; empty where nothing does.
        advice: what to do; empty where there is nothing to do.
    """

    check: str
    status: Status
    found: str
    meaning: str = ""
    advice: str = ""


_OK, _WARNING, _ERROR, _UNCHECKED = Status


def findings(facts: Facts) -> list[Finding]:
    """All findings, in the order in which a server would run into them."""
    checks = (_sglang, _driver, _gpus, _transports, _bandwidth, _limits, _environment, _kernels)
    return [finding for check in checks for finding in check(facts)]


def verdict(facts: Facts, found: Sequence[Finding]) -> str:
    """One sentence: whether this machine can serve with DWDP."""
    errors = dict.fromkeys(finding.check for finding in found if finding.status is _ERROR)
    if errors:
        return f"This machine cannot serve with DWDP as it is: {', '.join(errors)}."
    if not facts.gpus:
        return "No GPU was found: DWDP runs here on SGLang's CPU engine only, which is for tests."
    if len(facts.gpus) < 2:
        return "This machine has one GPU, and DWDP needs at least two, one for each rank."
    is_unsure = any(finding.status is _UNCHECKED for finding in found)
    return f"This machine can serve with DWDP on {len(facts.gpus)} GPUs{', as far as it could be checked' * is_unsure}."


def _sglang(facts: Facts) -> Iterator[Finding]:
    name = facts.sglang or "not installed as a package"
    yield Finding("SGLang", _ERROR if facts.release_error else _OK, name, facts.release_error)
    if facts.changed is None:
        found = facts.failed.get("software", "")
        advice = f"Mend what it says, or pip install sglang=={SGLANG}."
        yield Finding("hooked sources", _ERROR, found, "SGLang cannot be imported.", advice)
    elif facts.changed:
        found = f"{', '.join(facts.changed)} differ from those of {SGLANG}"
        meaning = "A patched build, or another plugin; a server that uses these does not start unless it is told to."
        advice = f"Install sglang=={SGLANG}, or set {ALLOW_PATCHED}=1 and compare tokens before you trust it."
        yield Finding("hooked sources", _WARNING if facts.allow_patched else _ERROR, found, meaning, advice)
    else:
        yield Finding("hooked sources", _OK, f"all are those of {SGLANG}")


def _driver(facts: Facts) -> Iterator[Finding]:
    if facts.driver_cuda is None or facts.torch_cuda is None:
        found = f"no NVIDIA driver was found; PyTorch is for CUDA {facts.torch_cuda or '(none)'}"
        yield Finding("driver", _UNCHECKED, found, advice="In a container, pass the GPUs through (--gpus all).")
        return
    found = f"{facts.driver} (CUDA {facts.driver_cuda}); PyTorch is for CUDA {facts.torch_cuda}"
    driver, built_for = (int(text.split(".")[0]) for text in (facts.driver_cuda, facts.torch_cuda))
    if driver < built_for:
        meaning = "The driver is older than PyTorch's CUDA, so kernels may not load."
        advice = f"Install a driver for CUDA {built_for}, or a PyTorch for CUDA {driver}."
        yield Finding("driver", _ERROR, found, meaning, advice)
    elif driver < BATCHES_SINCE_CUDA:
        meaning = "The slices of a layer's copy are submitted one by one, which takes the host longer."
        yield Finding("driver", _WARNING, found, meaning, f"Install a driver for CUDA {BATCHES_SINCE_CUDA}.")
    else:
        yield Finding("driver", _OK, found)


def _gpus(facts: Facts) -> Iterator[Finding]:
    if not facts.gpus:
        meaning = "Links, handles of GPU memory and copies between GPUs could not be checked."
        advice = "Run this where the server will run."
        yield Finding("GPUs", _UNCHECKED, facts.failed.get("GPUs", "none"), meaning, advice)
        return
    names = dict.fromkeys(gpu.name for gpu in facts.gpus)
    links = ", ".join("?" if gpu.nvlinks is None else str(gpu.nvlinks) for gpu in facts.gpus)
    found, meaning, advice = f"{len(facts.gpus)}: {', '.join(names)}; NVLinks up: {links}", "", ""
    if len(facts.gpus) < 2:
        meaning = "There are at least two ranks, and each needs a GPU."
        advice = "Use more GPUs."
    elif any(gpu.nvlinks == 0 for gpu in facts.gpus):
        meaning = "Without NVLink experts travel over PCIe, at a sixth of the speed at best."
        advice = "Use GPUs with NVLink; nvidia-smi nvlink -s shows links that are down."
    elif len(names) > 1:
        meaning, advice = "Groups of different GPUs were never run.", "Use equal GPUs."
    elif any(gpu.capability != HOPPER for gpu in facts.gpus):
        meaning, advice = "DWDP was validated on Hopper only.", "Compare tokens before you trust it."
    yield Finding("GPUs", _WARNING if meaning else _OK, found, meaning, advice)
    if facts.no_peer_access:
        pairs = ", ".join(f"{here} → {there}" for here, there in facts.no_peer_access)
        meaning = "A rank on the first GPU of a pair cannot read experts on the second."
        advice = "Keep them in different groups (--dwdp-group-size); nvidia-smi topo -p2p r shows more."
        yield Finding("peer access", _ERROR, f"not for {pairs}", meaning, advice)
    elif len(facts.gpus) > 1:
        yield Finding("peer access", _OK, "between all GPUs")


def _transports(facts: Facts) -> Iterator[Finding]:
    hint = " under a seccomp filter" * bool(facts.seccomp) + " in a container" * facts.is_container
    for share in facts.shares:
        if not share.error:
            yield Finding(share.transport, _OK, "made, exported, imported and copied between processes")
            continue
        if "out of memory" in share.error.lower().replace("_", " "):
            meaning, advice = "It could not be checked beside what uses the GPUs now.", "Run this when they are free."
            yield Finding(share.transport, _UNCHECKED, share.error, meaning, advice)
            continue
        if TRANSPORTS[share.transport].crosses_hosts:  # which one host does not need
            yield Finding(share.transport, _OK, share.error, "The ranks of a group have to be on one host.")
            continue
        found = share.error + (f" (this process is{hint})" if hint else "")
        other = next(
            (one.transport for one in facts.shares if not one.error and not TRANSPORTS[one.transport].crosses_hosts),
            None,
        )
        if other is not None:
            meaning = f"--dwdp-transport {share.transport} does not work here, and {other} does."
            if not TRANSPORTS[other].maps:
                meaning += " With that, every forward is staged, and decoding is slow."
            yield Finding(share.transport, _WARNING, found, meaning, f"Use --dwdp-transport {other}.")
        else:
            meaning = "Processes cannot share memory here."
            advice = "Let all processes see all GPUs, in one IPC namespace; try it without the seccomp filter."
            yield Finding(share.transport, _ERROR, found, meaning, advice)


def _bandwidth(facts: Facts) -> Iterator[Finding]:
    if len(facts.gpus or ()) < 2:
        return  # then it says nothing of links
    for share in filter(lambda share: share.copies, facts.shares):
        rates = {f"{copy.reader} ← {copy.source}": copy.bytes_per_s for copy in share.copies}
        found = f"{min(rates.values()) / 1e9:.0f} to {max(rates.values()) / 1e9:.0f} GB/s"
        slow = [f"{pair} {rate / 1e9:.0f}" for pair, rate in rates.items() if rate < MIN_BYTES_PER_S]
        if slow:
            found += f"; {', '.join(slow)}"
            meaning = f"Below {MIN_BYTES_PER_S / 1e9:.0f} GB/s, three quarters of two H100's, prefills wait for copies."
            advice = "See nvidia-smi topo -m and nvlink -s, and what else uses the GPUs; use larger chunks."
            yield Finding(f"copies, {share.transport}", _WARNING, found, meaning, advice)
        else:
            yield Finding(f"copies, {share.transport}", _OK, found)


def _limits(facts: Facts) -> Iterator[Finding]:
    soft, hard = (float("inf") if limit < 0 else limit for limit in facts.open_files)
    usable = SGLANG_OPEN_FILES if soft < SGLANG_OPEN_FILES <= hard else soft
    need = 2 * MAX_FDS * max(len(facts.gpus or ()), 2)
    found = f"soft {soft}, hard {hard}"
    if usable < need:
        meaning = f"Ranks hand out up to {MAX_FDS} descriptors at a time; twice that for each rank, {need}, is safe."
        yield Finding("ulimit -n", _WARNING, found, meaning, f"Raise the hard limit to {SGLANG_OPEN_FILES}.")
    else:
        yield Finding("ulimit -n", _OK, found)
    found = f"{facts.shm_bytes / (1 << 20):.0f} MiB"
    if facts.shm_bytes < MIN_SHM_BYTES:
        meaning = "DWDP has no files there, but SGLang and NCCL do, and may fail."
        yield Finding("/dev/shm", _WARNING, found, meaning, "Start the container with --shm-size=1g or more.")
    else:
        yield Finding("/dev/shm", _OK, found)


def _environment(facts: Facts) -> Iterator[Finding]:
    found = "CUDA_VISIBLE_DEVICES is " + ("not set" if facts.visible is None else facts.visible or "empty")
    yield Finding("environment", _ERROR if facts.environment_error else _OK, found, facts.environment_error)


def _kernels(facts: Facts) -> Iterator[Finding]:
    kernels = facts.kernels
    if kernels is None:
        meaning = "gpt-oss then takes four times the memory on Hopper, and --dwdp-exchange does not work on GPUs."
        yield Finding("FlashInfer", _UNCHECKED, facts.failed.get("software", "not installed"), meaning)
        return
    missing = [name for name in FORMATS if name not in kernels.formats]
    found, worse = f"{kernels.version}; built: {', '.join(kernels.formats) or 'none'}", _WARNING if facts.gpus else _OK
    if missing:
        meaning = f"FlashInfer compiles {', '.join(missing)} at first use, which takes long"
        meaning += "; mxfp4 runs as bf16 instead." if "mxfp4" in missing else "."
        advice = f"Where a server needs it: python kernels/build.py --format {missing[-1]}, in a checkout."
        yield Finding("FlashInfer's MoE", worse, found, meaning, advice)
    else:
        yield Finding("FlashInfer's MoE", _OK, found)
    found = f"{'built' if kernels.all_to_all else 'not built'}; compiler: {kernels.compiler or 'none'}"
    if kernels.all_to_all or kernels.compiler:
        yield Finding("FlashInfer's all-to-all", _OK, found)
    else:
        advice = "Install flashinfer-jit-cache, or nvcc, and set CUDA_HOME."
        yield Finding("FlashInfer's all-to-all", worse, found, "--dwdp-exchange auto cannot start on GPUs.", advice)
