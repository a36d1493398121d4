"""Which kind of GPU this process uses."""

from __future__ import annotations

import torch

from sglang_dwdp.support.backends import BLACKWELL, HOPPER


def gpu_generation() -> str:
    """The generation of torch's current GPU, in the words of `backends.MOE_BACKENDS`."""
    major = torch.cuda.get_device_capability()[0]
    return {9: HOPPER, 10: BLACKWELL}.get(major, f"compute capability {major}")
