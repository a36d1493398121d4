"""The doctor's trial between GPUs."""

from __future__ import annotations

import pytest
import torch

from sglang_dwdp.doctor import examine, probes


@pytest.mark.gpus(2)
@pytest.mark.parametrize("transport", ["cuda-vmm", "cuda-ipc"])
def test_every_pair_of_gpus_copies_what_was_written(transport: str) -> None:
    count = torch.cuda.device_count()
    share = examine.try_transport(transport, count)
    assert share.error == ""
    assert len(share.copies) == count * (count - 1)
    assert min(copy.bytes_per_s for copy in share.copies) > 1e9  # of the slowest link there is


@pytest.mark.gpu(2)
def test_one_gpu_is_found_and_shared_by_two_processes() -> None:
    facts = probes.gpus()
    assert facts["driver"]
    assert facts["gpus"][0]["name"] == torch.cuda.get_device_name(0)
    for transport in ("cuda-vmm", "cuda-ipc"):
        assert examine.try_transport(transport, 1).error == ""


@pytest.mark.gpu(2)
def test_fabric_handles_work_or_the_doctor_says_why_not() -> None:
    share = examine.try_transport("cuda-fabric", 1)
    if share.error:
        for part in ("cuMem", "fabric handles for this GPU; fabric state by NVML: ", "IMEX", "nodes_config.cfg"):
            assert part in share.error
    else:
        assert len(share.copies) == 2
