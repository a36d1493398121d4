"""Which graphs are turned off or unsupported, by whatever argument they were asked for."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from sglang_dwdp.errors import DwdpConfigError
from sglang_dwdp.srt_patches.graphs import check_graph_backends, graph_arguments


def arguments(**given: Any) -> SimpleNamespace:
    unset = {
        "device": "cuda",
        "cuda_graph_config": None,
        "cuda_graph_backend_decode": None,
        "cuda_graph_backend_prefill": None,
    }
    return SimpleNamespace(**{**unset, **given})


def test_with_direct_views_all_graphs_stay() -> None:
    assert graph_arguments(arguments(), has_direct=True) == {}


def test_without_direct_views_decode_graphs_are_off_and_prefill_graphs_stay() -> None:
    assert graph_arguments(arguments(), has_direct=False) == {"cuda_graph_backend_decode": "disabled"}


def test_the_cpu_engine_has_none() -> None:
    assert graph_arguments(arguments(device="cpu", cuda_graph_backend_decode="full"), has_direct=True) == {
        "disable_cuda_graph": True,
        "cuda_graph_backend_decode": "disabled",
        "cuda_graph_backend_prefill": "disabled",
    }


def test_an_explicit_config_keeps_all_else() -> None:
    config = {"decode": {"backend": "full", "max_bs": 8}, "prefill": {"backend": "breakable", "max_bs": 64}}
    off = graph_arguments(arguments(cuda_graph_config=config), has_direct=False)
    assert off["cuda_graph_config"] == {**config, "decode": {"backend": "disabled", "max_bs": 8}}
    assert config["decode"]["backend"] == "full"


@pytest.mark.parametrize("backend", ["full", "tc_piecewise"])
def test_prefill_graphs_without_our_breaks_are_unsupported(backend: str) -> None:
    for asked in (
        {"cuda_graph_backend_prefill": backend},
        {"cuda_graph_config": {"prefill": {"backend": backend}}},
    ):
        with pytest.raises(DwdpConfigError, match=f"--cuda-graph-backend-prefill {backend} is unsupported"):
            check_graph_backends(arguments(**asked))
        check_graph_backends(arguments(device="cpu", **asked))  # they are turned off there
    for supported in (None, "breakable", "disabled"):
        check_graph_backends(arguments(cuda_graph_backend_prefill=supported))


def test_sglang_lets_nothing_win_over_it() -> None:
    """Through SGLang's own parser, with the config as an object too."""
    from sglang.srt.arg_groups.cuda_graph_hook import parse_cuda_graph_config
    from sglang.srt.arg_groups.overrides import declare_resolution, resolving_view
    from sglang.srt.model_executor.cuda_graph_config import CudaGraphConfig
    from sglang.srt.server_args import ServerArgs

    wanted = CudaGraphConfig.from_dict({"prefill": {"backend": "full", "max_bs": 64}})
    args = ServerArgs(model_path="dummy", device="cpu", cuda_graph_config=wanted, cuda_graph_backend_decode="full")
    declare_resolution(args, "test", **graph_arguments(resolving_view(args), has_direct=True))
    parse_cuda_graph_config(args)
    parsed = resolving_view(args).cuda_graph_config
    assert (parsed.decode.backend, parsed.prefill.backend, parsed.prefill.max_bs) == ("disabled", "disabled", 64)
