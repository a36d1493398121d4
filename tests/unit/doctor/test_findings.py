"""What the doctor says of machines that are made up."""

from __future__ import annotations

import dataclasses

import pytest

from sglang_dwdp.doctor.facts import Copy, Facts, Gpu, Kernels, Share
from sglang_dwdp.doctor.findings import MIN_BYTES_PER_S, Finding, Status, findings, verdict
from sglang_dwdp.support.flashinfer_modules import FORMATS

H100 = Gpu("NVIDIA H100 80GB HBM3", 9, nvlinks=18)


def share(transport: str, *rates: float, error: str = "") -> Share:
    """Two GPUs that copied from each other at these rates, in bytes per second."""
    return Share(transport, error, [Copy(reader, 1 - reader, rate) for reader, rate in enumerate(rates)])


GOOD = Facts(
    sglang="0.5.23",
    changed=(),
    kernels=Kernels("0.7.2", tuple(FORMATS), all_to_all=True, compiler=None),
    driver="580.95.05",
    driver_cuda="13.0",
    torch_cuda="13.0",
    gpus=(H100, H100),
    shares=(share("cuda-vmm", 395e9, 395e9), share("cuda-ipc", 395e9, 395e9)),
    open_files=(1024, 1_048_576),
    shm_bytes=16 << 30,
    seccomp=0,
)
CANNOT_SHARE = share("cuda-vmm", error="OSError: cuMemExportToShareableHandle: CUDA_ERROR_NOT_SUPPORTED")


def said(**changes: object) -> dict[str, Finding]:
    """The findings that are not ok, by check, of a good machine with these changes."""
    found = findings(dataclasses.replace(GOOD, **changes))  # type: ignore[arg-type]
    assert len({one.check for one in found}) == len(found)
    return {one.check: one for one in found if one.status is not Status.OK}


def test_a_good_machine() -> None:
    assert said() == {}
    assert said(shares=[share("cuda-vmm", MIN_BYTES_PER_S, MIN_BYTES_PER_S)]) == {}
    assert verdict(GOOD, findings(GOOD)) == "This machine can serve with DWDP on 2 GPUs."


@pytest.mark.parametrize(
    ("check", "status", "text", "changes"),
    [
        ("SGLang", "error", "0.5.24 is installed", {"sglang": "0.5.24", "release_error": "SGLang 0.5.24 is installed"}),
        ("hooked sources", "error", "sglang.srt.x.f", {"changed": ["sglang.srt.x.f"]}),
        ("hooked sources", "warning", "sglang.srt.x.f", {"changed": ["sglang.srt.x.f"], "allow_patched": True}),
        ("hooked sources", "error", "No module", {"changed": None, "failed": {"software": "No module named 'sglang'"}}),
        ("driver", "error", "older than PyTorch's", {"driver_cuda": "12.8"}),
        ("driver", "warning", "one by one", {"driver_cuda": "12.8", "torch_cuda": "12.6"}),
        ("GPUs", "warning", "two ranks", {"gpus": [H100]}),
        ("GPUs", "warning", "PCIe", {"gpus": [H100, Gpu(H100.name, 9, nvlinks=0)]}),
        ("GPUs", "warning", "different", {"gpus": [H100, Gpu("NVIDIA H200", 9, nvlinks=18)]}),
        ("GPUs", "warning", "Hopper", {"gpus": [Gpu("NVIDIA B200", 10)] * 2}),
        ("peer access", "error", "1 → 0", {"no_peer_access": [[1, 0]]}),
        ("cuda-vmm", "warning", "--dwdp-transport cuda-ipc.", {"shares": [CANNOT_SHARE, GOOD.shares[1]]}),
        ("cuda-vmm", "error", "NOT_SUPPORTED", {"shares": [CANNOT_SHARE, share("cuda-ipc", error="OSError: no")]}),
        ("cuda-vmm", "error", "seccomp filter)", {"shares": [CANNOT_SHARE], "seccomp": 2}),
        ("cuda-vmm", "error", "in a container)", {"shares": [CANNOT_SHARE], "is_container": True}),
        ("cuda-vmm", "unchecked", "free", {"shares": [share("cuda-vmm", error="CUDA_ERROR_OUT_OF_MEMORY")]}),
        ("copies, cuda-vmm", "warning", "1 ← 0 55", {"shares": [share("cuda-vmm", MIN_BYTES_PER_S, 55e9)]}),
        ("ulimit -n", "warning", "1012", {"open_files": (1011, 4096)}),
        ("/dev/shm", "warning", "--shm-size", {"shm_bytes": 64 << 20}),
        ("environment", "error", "Unset it", {"environment_error": "Unset it."}),
        ("FlashInfer", "unchecked", "gpt-oss", {"kernels": None}),
        ("FlashInfer's MoE", "warning", "--format mxfp4", {"kernels": Kernels("0.7.2", ["bf16"], True, None)}),
        ("FlashInfer's all-to-all", "warning", "CUDA_HOME", {"kernels": Kernels("0.7.2", list(FORMATS), False, None)}),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named_with_what_to_do(check: str, status: str, text: str, changes: dict[str, object]) -> None:
    found = said(**changes)[check]
    assert found.status == status
    assert text in " ".join((found.found, found.meaning, found.advice))
    assert found.meaning
    facts = dataclasses.replace(GOOD, **changes)  # type: ignore[arg-type]
    assert (f"cannot serve with DWDP as it is: {check}" in verdict(facts, findings(facts))) == (status == "error")


@pytest.mark.parametrize("limits", [(1012, 4096), (1024, 65_535), (-1, -1), (100_000, 100_000)])
def test_open_files_that_suffice(limits: tuple[int, int]) -> None:
    assert said(open_files=limits) == {}


def test_the_verdict_says_if_something_could_not_be_checked() -> None:
    facts = dataclasses.replace(GOOD, shares=[share("cuda-vmm", error="CUDA out of memory")])
    assert verdict(facts, findings(facts)).endswith("on 2 GPUs, as far as it could be checked.")


def test_a_host_needs_no_fabric() -> None:
    """And one that has it is not told to use it in place of what does not work."""
    fabric = share("cuda-fabric", error="DwdpConfigError: CUDA_ERROR_NOT_PERMITTED")
    facts = dataclasses.replace(GOOD, shares=[*GOOD.shares, fabric])
    [finding] = [one for one in findings(facts) if one.check == "cuda-fabric"]
    assert (finding.status, finding.found) == (Status.OK, fabric.error)
    assert "on one host" in finding.meaning
    found = said(shares=[CANNOT_SHARE, share("cuda-fabric"), GOOD.shares[1]])
    assert found["cuda-vmm"].advice == "Use --dwdp-transport cuda-ipc."


def test_a_compiler_is_as_good_as_a_built_all_to_all() -> None:
    assert said(kernels=Kernels("0.7.2", list(FORMATS), False, "/usr/bin/nvcc")) == {}


def test_one_gpu_shared_by_two_processes_says_nothing_of_links() -> None:
    facts = dataclasses.replace(GOOD, gpus=[H100], shares=[share("cuda-vmm", 1e9, 1e9)])
    assert "copies, cuda-vmm" not in {one.check for one in findings(facts)}
    assert "one GPU" in verdict(facts, findings(facts))


def test_without_a_gpu_it_says_what_it_could_not_check() -> None:
    changes = {"gpus": (), "driver": None, "driver_cuda": None, "shares": [share("host-shm", 7e9, 7e9)]}
    found = said(**changes)
    assert {one.status for one in found.values()} == {Status.UNCHECKED}
    assert set(found) == {"driver", "GPUs"}
    facts = dataclasses.replace(GOOD, **changes)  # type: ignore[arg-type]
    assert "CPU engine only" in verdict(facts, findings(facts))
