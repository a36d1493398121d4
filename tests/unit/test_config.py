import argparse
from typing import Any, get_args

import pytest

from sglang_dwdp import config as options
from sglang_dwdp.config import DwdpConfig
from sglang_dwdp.errors import DwdpConfigError


def parse(*argv: str) -> DwdpConfig | None:
    parser = argparse.ArgumentParser()
    options.add_flags(parser)
    return options.from_options(vars(parser.parse_args(argv)))


def test_without_the_flag_there_is_no_config() -> None:
    assert parse() is None


def test_defaults() -> None:
    assert parse("--enable-dwdp") == DwdpConfig()


def test_every_option_has_a_flag() -> None:
    config = parse(
        *[
            "--enable-dwdp",
            "--dwdp-view",
            "staged",
            "--dwdp-direct-max-tokens",
            "7",
            "--dwdp-depth",
            "3",
        ],
        *["--dwdp-transport", "host-shm", "--dwdp-timeout-s", "1.5", "--dwdp-audit"],
        *["--dwdp-group-size", "4", "--dwdp-local-experts", "33"],
    )
    assert config == DwdpConfig(
        view="staged",
        direct_max_tokens=7,
        depth=3,
        transport="host-shm",
        timeout_s=1.5,
        audit=True,
        group_size=4,
        local_experts=33,
    )


def test_an_option_without_enable_dwdp_is_an_error() -> None:
    with pytest.raises(DwdpConfigError, match=r"--dwdp-depth, --dwdp-audit given without --enable-dwdp"):
        parse("--dwdp-depth", "3", "--dwdp-audit")


@pytest.mark.parametrize(
    ("options_given", "message"),
    [
        ({"view": "near"}, "--dwdp-view is not one of auto, direct, staged .got 'near'"),
        ({"transport": "smoke"}, "--dwdp-transport is not one of"),
        ({"depth": 0}, "--dwdp-depth must be a whole number of at least 1 .got 0"),
        ({"depth": True}, "--dwdp-depth must be"),
        ({"depth": 2.0}, "--dwdp-depth must be"),
        ({"direct_max_tokens": -1}, "--dwdp-direct-max-tokens must be"),
        ({"timeout_s": 0}, "--dwdp-timeout-s must be a number of seconds above 0"),
        ({"timeout_s": "5"}, "--dwdp-timeout-s must be"),
        ({"timeout_s": 1e9}, "and of at most 86400"),
        ({"audit": "yes"}, "--dwdp-audit must be true or false"),
        ({"group_size": 1}, "--dwdp-group-size must be a whole number of at least 2"),
        ({"local_experts": 0}, "--dwdp-local-experts must be a whole number of at least 1"),
        ({"memory_gib": 0}, "--dwdp-memory-gib must be a number of GiB above 0"),
        ({"memory_gib": float("nan")}, "--dwdp-memory-gib must be"),
        ({"memory_gib": 2.5, "local_experts": 3}, "--dwdp-memory-gib decides the same as --dwdp-local-experts"),
        ({"transport": "cuda-ipc", "view": "direct"}, "--dwdp-view needs mapped memory"),
        ({"transport": "cuda-ipc", "local_experts": 3}, "--dwdp-local-experts and --dwdp-memory-gib need mapped"),
    ],
)
def test_bad_values(options_given: dict[str, Any], message: str) -> None:
    with pytest.raises(DwdpConfigError, match=message):
        DwdpConfig(**options_given)


@pytest.mark.parametrize(
    ("view", "maps", "tokens", "direct"),
    [
        ("auto", True, 12, True),
        ("auto", True, 13, False),
        ("auto", False, 1, False),
        ("direct", True, 10**6, True),
        ("staged", True, 1, False),
        ("staged", True, 0, False),
    ],
)
def test_views_of_forwards(view: options.ViewMode, maps: bool, tokens: int, direct: bool) -> None:
    views = DwdpConfig(view=view, direct_max_tokens=12).views(maps=maps)
    assert views.is_direct(tokens) is direct
    assert views.direct or not direct
    assert views.staged or direct


def test_which_views_there_are() -> None:
    config = DwdpConfig()
    assert (config.views().direct, config.views().staged) == (True, True)
    assert (config.views(maps=False).direct, config.views(maps=False).staged) == (False, True)
    assert DwdpConfig(transport="cuda-ipc").views() == config.views(maps=False)
    assert not DwdpConfig(view="direct").views().staged
    assert not DwdpConfig(view="staged").views().direct


def test_a_server_outlives_ranks_whose_memory_can_be_mapped() -> None:
    assert DwdpConfig().outlives_ranks
    assert not DwdpConfig(on_rank_loss="exit").outlives_ranks
    assert not DwdpConfig(transport="cuda-ipc").outlives_ranks


def test_transports() -> None:
    assert set(options.TRANSPORTS) == set(get_args(options.Transport)) - {"auto"}
    assert options.transports_of("cuda") == ["cuda-vmm", "cuda-fabric", "cuda-ipc"]
    assert options.transports_of("cpu") == ["host-shm", "host-path"]
    assert options.transports_of("cpu", across_hosts=True) == ["host-path"]
    assert options.transports_of("cuda", across_hosts=True) == ["cuda-fabric"]
    assert options.transports_of("npu") == []


@pytest.mark.parametrize("other", [{"view": "staged"}, {"transport": "cuda-ipc"}])
def test_exchange_steps_need_experts_that_can_be_read_in_place(other: dict[str, Any]) -> None:
    """A rank whose peers do not come decodes alone, on direct views."""
    with pytest.raises(DwdpConfigError, match="--dwdp-exchange needs experts that can be read in place"):
        DwdpConfig(exchange="auto", **other)
    with pytest.raises(DwdpConfigError, match="--dwdp-exchange is not one of off, auto "):
        DwdpConfig(exchange="on")  # type: ignore[arg-type]
