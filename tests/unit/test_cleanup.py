import mmap
import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sglang_dwdp import cleanup


def test_only_files_with_known_names_that_a_process_maps(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("sgl_shm_mq_2_a", "sglang_loads_b_c.shm", "sem.mp-x", "other.shm")]
    for path in paths:
        path.write_bytes(b"x" * 4096)
    fds = [os.open(path, os.O_RDWR) for path in paths]
    held = [mmap.mmap(fd, 4096) for fd in fds[1:]]
    assert cleanup.mapped([os.getpid()], tmp_path) == set(paths[1:3])
    assert cleanup.mapped([os.getppid()], tmp_path) == set()
    for one in held:
        one.close()
    assert cleanup.mapped([os.getpid()], tmp_path) == set()
    for fd in fds:
        os.close(fd)


def test_a_semaphore_of_multiprocessing_is_seen() -> None:
    before = cleanup.mapped([os.getpid()])
    lock = multiprocessing.get_context("spawn").Lock()
    (found,) = cleanup.mapped([os.getpid()]) - before
    assert found.name.startswith("sem.mp-")
    del lock


def test_processes_are_read_only_after_names_have_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads = []

    def read(pids: object, directory: Path) -> set[Path]:
        reads.append(directory)
        return real([os.getpid()], directory)

    real = cleanup.mapped
    monkeypatch.setattr(cleanup, "mapped", read)
    watcher = cleanup.Watcher(os.getpid(), tmp_path)
    watcher.look()
    (tmp_path / "other.shm").touch()
    watcher.look()
    assert reads == []

    first = tmp_path / "sgl_shm_mq_1"
    first.write_bytes(bytes(4096))
    watcher.look()
    assert watcher.files == set()
    with first.open("r+b") as file, mmap.mmap(file.fileno(), 4096):  # named first, mapped a moment later
        watcher.look()
        assert watcher.files == {first}
        for _ in range(10):
            watcher.look()
        assert len(reads) == cleanup._LOOKS
        second = tmp_path / "sem.mp-a"
        second.write_bytes(bytes(4096))
        with second.open("r+b") as file, mmap.mmap(file.fileno(), 4096):
            watcher.look()
    assert len(reads) == cleanup._LOOKS + 1
    assert watcher.files == {first, second}
    first.unlink()
    watcher.look()
    assert len(reads) == cleanup._LOOKS + 2


def test_descendants() -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    assert {os.getpid(), child.pid} <= cleanup.descendants(os.getpid())
    assert cleanup.descendants(child.pid) == {child.pid}
    child.communicate(b"\n")


@pytest.mark.parametrize("how", ["exit", "kill"])
def test_files_go_after_the_launcher_however_it_ends(how: str) -> None:
    """One mapped by a child of the launcher goes; one that no process of the launcher maps stays."""
    name = cleanup.SHM / f"sgl_shm_mq_{os.getpid()}_{how}"
    foreign = cleanup.SHM / f"sgl_shm_mq_{os.getpid()}_{how}_foreign"
    foreign.write_bytes(b"x")
    child = f"import mmap, time; f = open({str(name)!r}, 'r+b'); m = mmap.mmap(f.fileno(), 4096); time.sleep(4)"
    program = (
        f"import os, signal, subprocess, sys, time; open({str(name)!r}, 'wb').write(bytes(4096)); "
        f"subprocess.Popen([sys.executable, '-c', {child!r}]); time.sleep(0.5); "
        "from sglang_dwdp import cleanup; cleanup.watch(); time.sleep(2); "
        + ("os._exit(0)" if how == "exit" else "os.kill(os.getpid(), signal.SIGKILL)")
    )
    try:
        subprocess.run([sys.executable, "-c", program], check=False)
        assert name.exists()
        deadline = time.monotonic() + 20
        while name.exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not name.exists()
        assert foreign.exists()
    finally:
        foreign.unlink()


def test_one_cleaner_is_enough_for_all_servers_of_a_launcher() -> None:
    program = "from sglang_dwdp import cleanup\nfor _ in range(3): cleanup.watch()\nprint(len(cleanup._pipes))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "1\n"
