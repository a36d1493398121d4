"""What all tests share: SGLang on a machine without a GPU, and which tests need one."""

import pytest
from hypothesis import settings

from sglang_dwdp import cpu_engine

settings.register_profile("no deadline", deadline=None)  # a busy machine is no failure
settings.load_profile("no deadline")

if not cpu_engine.has_cuda_driver():
    # Some tests import SGLang. No more than one rank: servers that tests start arrange the rest by their number.
    cpu_engine.arrange(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what is marked `gpu(ranks)` where there is no GPU; one is enough for all ranks of a test."""
    import torch

    if torch.cuda.is_available():
        return
    for item in items:
        if mark := item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason=f"needs a GPU (for up to {mark.args[0]} ranks): make test-gpu"))
