import importlib
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from sglang_dwdp.cpu import engine as cpu_engine
from tests.fixtures.environment import plain_environment


@pytest.fixture
def two_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with two cores on one NUMA node, without a CUDA driver."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: {0, 1})
    monkeypatch.setattr(cpu_engine, "numa_nodes", lambda _cores: 1)
    monkeypatch.setattr(cpu_engine, "has_cuda_driver", lambda: False)


@pytest.fixture
def stub_importable(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(cpu_engine.STUBS)
    real = sys.modules.pop("sgl_kernel", None)
    yield
    sys.modules.pop("sgl_kernel", None)
    if real is not None:
        sys.modules["sgl_kernel"] = real


@pytest.mark.parametrize(
    ("num_ranks", "cores", "binding"),
    [
        (1, [0, 1], "0,1"),
        (2, [0, 1], "0|1"),
        (3, [0, 1], "0|1|0"),
        (2, [4, 5, 6, 7], "4,5|6,7"),
        (3, [0, 1, 2, 3, 4, 5, 6, 7], "0,1|2,3,4|5,6,7"),
    ],
)
def test_every_rank_gets_cores(num_ranks: int, cores: list[int], binding: str) -> None:
    assert cpu_engine.thread_binding(num_ranks, cores) == binding


@pytest.mark.usefixtures("two_cores")
class TestEnvironment:
    def test_one_rank_needs_no_thread_binding(self) -> None:
        assert cpu_engine.environment(1, {}) == {
            "SGLANG_USE_CPU_ENGINE": "1",
            "SGLANG_NCCL_SO_PATH": "/nonexistent/libnccl.so.2",
            "SGLANG_ENABLE_TP_MEMORY_INBALANCE_CHECK": "0",
            "PYTHONPATH": str(cpu_engine.STUBS),
        }

    def test_more_ranks_than_numa_nodes_are_bound_and_do_not_share_all_cores(self) -> None:
        additions = cpu_engine.environment(2, {})
        assert additions["SGLANG_CPU_OMP_THREADS_BIND"] == "0|1"
        assert additions["OMP_NUM_THREADS"] == "1"

    def test_more_ranks_than_cores(self) -> None:
        assert cpu_engine.environment(4, {})["OMP_NUM_THREADS"] == "1"

    def test_what_the_user_set_is_left_alone(self) -> None:
        base = {"SGLANG_NCCL_SO_PATH": "/opt/nccl.so", "SGLANG_CPU_OMP_THREADS_BIND": "all"}
        additions = cpu_engine.environment(2, base)
        assert not base.keys() & additions.keys()
        assert additions["SGLANG_USE_CPU_ENGINE"] == "1"

    def test_the_stub_goes_in_front_of_the_users_path(self) -> None:
        path = cpu_engine.environment(1, {"PYTHONPATH": "/users"})["PYTHONPATH"]
        assert path == os.pathsep.join((str(cpu_engine.STUBS), "/users"))

    def test_it_asks_for_nothing_twice(self) -> None:
        base = cpu_engine.environment(2, {})
        assert cpu_engine.environment(2, base) == {}

    def test_no_stub_where_the_real_package_can_be_imported(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(cpu_engine, "has_cuda_driver", lambda: True)
        assert "PYTHONPATH" not in cpu_engine.environment(1, {})

    def test_a_server_without_ranks_is_an_error(self) -> None:
        with pytest.raises(ValueError, match="num_ranks=0"):
            cpu_engine.environment(0, {})

    def test_arrange_changes_this_process_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        environ: dict[str, str] = {}
        path = ["/first"]
        monkeypatch.setattr(os, "environ", environ)
        monkeypatch.setattr(sys, "path", path)
        cpu_engine.arrange(2)
        after = dict(environ)
        cpu_engine.arrange(2)
        assert environ == after
        assert environ["SGLANG_USE_CPU_ENGINE"] == "1"
        assert path == [str(cpu_engine.STUBS), "/first"]


@pytest.mark.parametrize(
    ("device", "variable", "expected"),
    [("cpu", None, True), ("cuda", "1", False), (None, "1", True), (None, None, False), (None, "0", False)],
)
def test_needed(monkeypatch: pytest.MonkeyPatch, device: str | None, variable: str | None, expected: bool) -> None:
    monkeypatch.delenv("SGLANG_USE_CPU_ENGINE", raising=False)
    if variable is not None:
        monkeypatch.setenv("SGLANG_USE_CPU_ENGINE", variable)
    assert cpu_engine.needed(device) is expected


def test_the_numa_nodes_of_no_known_core_count_as_one() -> None:
    assert cpu_engine.numa_nodes([]) == 1
    assert cpu_engine.numa_nodes(sorted(os.sched_getaffinity(0))) >= 1


@pytest.mark.usefixtures("stub_importable")
class TestStub:
    def test_importing_a_kernel_says_what_the_package_is(self) -> None:
        with pytest.raises(ImportError, match=r"silu_and_mul was asked for.*stub"):
            from sgl_kernel import silu_and_mul  # noqa: F401

    def test_a_cpu_kernel_can_be_imported_but_not_called(self) -> None:
        from sgl_kernel import copy_all_layer_kv_cache_cpu

        with pytest.raises(NotImplementedError, match="copy_all_layer_kv_cache_cpu"):
            copy_all_layer_kv_cache_cpu()

    def test_it_can_be_inspected_like_any_module(self) -> None:
        stub = importlib.import_module("sgl_kernel")
        assert not hasattr(stub, "__wrapped__")
        assert stub.__file__ is not None
        assert stub.__file__.startswith(str(cpu_engine.STUBS))


def test_the_module_imports_neither_torch_nor_sglang() -> None:
    code = "import sys, sglang_dwdp.cpu.engine; sys.exit(bool({'torch', 'sglang'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_stubs_cannot_be_imported_by_way_of_the_package() -> None:
    assert not (cpu_engine.STUBS / "__init__.py").exists()
    assert (cpu_engine.STUBS / "sgl_kernel" / "__init__.py").is_file()


def test_the_default_flags_bound_the_cache() -> None:
    flags = cpu_engine.default_flags()
    assert flags["attention_backend"] == "torch_native"
    assert isinstance(flags["max_total_tokens"], int)


def test_importing_the_package_changes_nothing() -> None:
    """Every process of SGLang's imports it, with DWDP and without."""
    program = "import sglang_dwdp.cpu.engine, os, sys; print(sys.path, dict(os.environ))"
    environment = {**plain_environment(), "SGLANG_USE_CPU_ENGINE": "1"}
    done = subprocess.run([sys.executable, "-P", "-c", program], env=environment, capture_output=True, text=True)
    assert done.returncode == 0
    assert str(cpu_engine.STUBS) not in done.stdout


def test_a_plain_environment_has_nothing_of_what_was_arranged(two_cores: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_engine, "_arranged", {})
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in (*cpu_engine.environment(2, {}), "PYTHONPATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "7")  # the user's own
    before = dict(os.environ)
    cpu_engine.arrange(2)
    assert os.environ["SGLANG_USE_CPU_ENGINE"] == "1"
    assert str(cpu_engine.STUBS) in os.environ["PYTHONPATH"]
    assert plain_environment() == before
    for name in cpu_engine.environment(2, {}):
        os.environ.pop(name, None)
