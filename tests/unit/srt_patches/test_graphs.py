"""Which graphs are turned off, by whatever argument they were asked for."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from sglang_dwdp.srt_patches.graphs import graphs_off


def arguments(**given: Any) -> SimpleNamespace:
    unset = {"cuda_graph_config": None, "cuda_graph_backend_decode": None, "cuda_graph_backend_prefill": None}
    return SimpleNamespace(**{**unset, **given})


def test_the_backends_of_phases_are_resolved() -> None:
    assert graphs_off(arguments(), ("prefill",)) == {"cuda_graph_backend_prefill": "disabled"}
    view = arguments(cuda_graph_backend_decode="full")
    assert graphs_off(view, ("decode", "prefill")) == {
        "cuda_graph_backend_decode": "disabled",
        "cuda_graph_backend_prefill": "disabled",
    }


def test_an_explicit_config_keeps_all_else() -> None:
    config = {"decode": {"backend": "full", "max_bs": 8}, "prefill": {"backend": "breakable", "max_bs": 64}}
    off = graphs_off(arguments(cuda_graph_config=config), ("prefill",))
    assert off["cuda_graph_config"] == {**config, "prefill": {"backend": "disabled", "max_bs": 64}}
    assert config["prefill"]["backend"] == "breakable"


def test_sglang_lets_nothing_win_over_it() -> None:
    """Through SGLang's own parser, with the config as an object too."""
    from sglang.srt.arg_groups.cuda_graph_hook import parse_cuda_graph_config
    from sglang.srt.arg_groups.overrides import declare_resolution, resolving_view
    from sglang.srt.model_executor.cuda_graph_config import CudaGraphConfig
    from sglang.srt.server_args import ServerArgs

    wanted = CudaGraphConfig.from_dict({"prefill": {"backend": "full", "max_bs": 64}})
    args = ServerArgs(model_path="dummy", cuda_graph_config=wanted, cuda_graph_backend_decode="full")
    declare_resolution(args, "test", **graphs_off(resolving_view(args), ("decode", "prefill")))
    parse_cuda_graph_config(args)
    parsed = resolving_view(args).cuda_graph_config
    assert (parsed.decode.backend, parsed.prefill.backend, parsed.prefill.max_bs) == ("disabled", "disabled", 64)
