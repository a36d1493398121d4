"""What all tests share: SGLang on a machine without a GPU, and which tests need one."""

import pytest
from hypothesis import settings

from sglang_dwdp.cpu import engine as cpu_engine

settings.register_profile("no deadline", deadline=None)  # a busy machine is no failure
settings.load_profile("no deadline")

if not cpu_engine.has_cuda_driver():
    # Some tests import SGLang. No more than one rank: servers that tests start arrange the rest by their number.
    cpu_engine.arrange(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Servers first, so that what is short comes last and fills the gaps; skip what needs more GPUs than there are.

    One is enough for all ranks of a test marked `gpu(ranks)`; `gpus(count)` asks for so many, that reach each other.
    """
    import torch

    items.sort(key=lambda item: item.get_closest_marker("e2e") is None)
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for item in items:
        if (mark := item.get_closest_marker("gpu")) and not found:
            item.add_marker(pytest.mark.skip(reason=f"needs a GPU (for up to {mark.args[0]} ranks): make test-gpu"))
        if (mark := item.get_closest_marker("gpus")) and found < mark.args[0]:
            item.add_marker(pytest.mark.skip(reason=f"needs {mark.args[0]} GPUs, there are {found}: make test-gpus"))
