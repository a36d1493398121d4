"""Real servers on the CPU engine. Every server that a test stops is checked for what it left behind."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import torch

from sglang_dwdp.demo import server as demo_server
from sglang_dwdp.demo.server import Server
from tests.e2e.prompts import MAX_NEW_TOKENS, PROMPTS
from tests.fixtures.families import Family, make_checkpoint
from tests.fixtures.family_shapes import TWINS
from tests.fixtures.model_modules import FEWER_MODELS
from tests.fixtures.reference import greedy_tokens

# float32: in bf16 two tokens of a random model tie now and then.
FLAGS = ("--dtype", "float32", "--skip-server-warmup", "--random-seed", "1")
# On the CPU SGLang pads experts to multiples of 32, but loads a tensor of all of them unpadded.
# And it pads heads that do not divide evenly among ranks, where SGLang has no attention data parallelism.
_HEADS = {"num_heads": 6, "num_kv_heads": 6}
# Families which SGLang shards over all ranks, so that ranks construct them as if each were alone.
ALONE: tuple[Family, ...] = (
    "mixtral",
    "olmoe",
    "granitemoe",
    "granitemoeshared",
    "ernie4_5_moe",
    "hunyuan_v1_moe",
    "phimoe",
    "lfm2_moe",
    "hy_v3",
    "cohere2_moe",
    "granitemoe_swa",
    "granitemoehybrid",
)
SHAPES: dict[Family, dict[str, int]] = {
    "gpt_oss": {"moe_intermediate_size": 96},
    "laguna": _HEADS,  # which says for each layer how many it has
    "mimo_v2_flash": {"num_heads": 12, "num_kv_heads": 6},  # and 12 where it attends to a window
    **dict.fromkeys(ALONE, _HEADS),
}
STOPS = cycle((signal.SIGTERM, signal.SIGINT))

Running = Callable[..., AbstractContextManager[Server]]
Answers = list[list[int]]
Reference = Callable[..., Answers]
# Installs a plugin of SGLang's, of a name and with a source, beside those of an environment; the result is the
# environment in which they are found.
Plugin = Callable[..., dict[str, str]]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker(pytest.mark.e2e)
    # Those that take long have to be asked for: make test-serving, make test-models.
    for name in ("serving", "models"):
        if name not in config.option.markexpr:
            unwanted = [item for item in items if item.get_closest_marker(name)]
            config.hook.pytest_deselected(items=unwanted)
            items[:] = [item for item in items if item not in unwanted]


class Footprint:
    """What a server could leave behind: processes, shared memory, socket files, abstract sockets.

    Made before the server starts. What another server has while it sets up goes while this one waits.

    Args:
        directory: The server's TMPDIR, which also marks its processes.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.before = set(Path("/dev/shm").iterdir())

    def left(self, within_s: float = 40.0) -> set[str]:
        """What is there and does not go within some seconds."""
        deadline = time.monotonic() + within_s
        while (found := self._now()) and time.monotonic() < deadline:
            time.sleep(0.5)
        return found

    def _now(self) -> set[str]:
        # SGLang leaves files of its own, and other programs of the machine have some.
        files = {path for path in Path("/dev/shm").glob("*dwdp*") if path not in self.before}
        sockets = {path for path in self.directory.rglob("*") if path.is_socket()}
        names = re.findall(r"@sglang-dwdp\S*", Path("/proc/net/unix").read_text())
        return {str(path) for path in files | sockets} | set(names) | self._processes()

    def _processes(self) -> set[str]:
        mark = f"TMPDIR={self.directory}".encode()
        found = set()
        for entry in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if mark in (entry / "environ").read_bytes().split(b"\0"):
                    found.add(f"process {entry.name} " + (entry / "cmdline").read_text().replace("\0", " ")[:80])
        return found


@pytest.fixture(scope="session", autouse=True)
def _own_ports() -> None:
    """A range of ports for each of pytest-xdist's workers: servers that start at the same time see none in use."""
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    size = len(demo_server.PORTS) // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    # A server takes ports up to 240 above its own as well.
    demo_server.PORTS = demo_server.PORTS[size * worker : size * (worker + 1) - 240]


@pytest.fixture(scope="session")
def running(tmp_path_factory: pytest.TempPathFactory) -> Running:
    """A server with DWDP, ready; stopped in the end by SIGTERM and SIGINT in turn, after which nothing may be left."""

    @contextmanager
    def run(model: Path, ranks: int, *, dwdp: Sequence[str] = (), **how: Any) -> Iterator[Server]:
        directory = tmp_path_factory.mktemp("server")
        footprint = Footprint(directory)
        flags = (*FLAGS, *how.pop("flags", ()))
        environment = FEWER_MODELS | {"TMPDIR": str(directory), "OMP_NUM_THREADS": "1"} | how.pop("environment", {})
        dwdp = ("--dwdp-audit", *dwdp)
        server = Server(model, ranks, directory / "log", dwdp=dwdp, flags=flags, environment=environment, **how)
        try:
            server.wait()
            yield server
            server.stop(next(STOPS))
            assert footprint.left() == set()
        finally:
            server.kill()

    return run


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Family, int], Path]:
    """A checkpoint of a family with a number of experts, made when first asked for."""
    made: dict[tuple[Family, int], Path] = {}

    def model(family: Family, num_experts: int) -> Path:
        key = (family, num_experts)
        if key not in made:
            made[key] = tmp_path_factory.mktemp(f"{family}-{num_experts}")
            shape = SHAPES.get(family, {}) | {"num_experts": num_experts}
            make_checkpoint(made[key], family, dtype=torch.float32, **shape)
        return made[key]

    return model


@pytest.fixture(scope="session")
def reference(models: Callable[[Family, int], Path]) -> Reference:
    """The tokens of PROMPTS by transformers' implementation of the model, which knows nothing of ranks or of SGLang."""
    known: dict[tuple[Family, int], Answers] = {}

    def answers(family: Family, num_experts: int, change: Callable[[torch.nn.Module], None] | None = None) -> Answers:
        key = (family, num_experts)
        if key not in known:
            known[key] = greedy_tokens(models(TWINS.get(family, family), num_experts), PROMPTS, MAX_NEW_TOKENS, change)
            different = {tuple(tokens) for tokens in known[key]}
            assert len(different) > len(PROMPTS) // 2, "degenerate answers compare nothing"
        return known[key]

    return answers


@pytest.fixture(scope="session")
def plugin(tmp_path_factory: pytest.TempPathFactory) -> Plugin:
    """Installs a plugin of SGLang's for one server; returns the environment in which it is found, beside those of
    `base`."""

    def install(name: str, source: str, base: Mapping[str, str] = os.environ) -> dict[str, str]:
        folder = tmp_path_factory.mktemp("plugin")
        (folder / f"{name}.py").write_text(source)
        info = folder / f"{name}-0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0\n")
        (info / "entry_points.txt").write_text(f"[sglang.srt.plugins]\n{name} = {name}:register\n")
        return {"PYTHONPATH": os.pathsep.join(filter(None, (str(folder), base.get("PYTHONPATH"))))}

    return install
