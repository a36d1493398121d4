import mmap
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sglang_dwdp import cleanup


def test_only_unmapped_new_files_with_sglangs_names_are_left_over(tmp_path: Path) -> None:
    old = tmp_path / "sgl_shm_mq_1_old"
    old.write_bytes(b"x")
    time.sleep(0.05)
    since = time.time()
    time.sleep(0.05)
    paths = [tmp_path / name for name in ("sgl_shm_mq_2_a", "sglang_loads_b_c.shm", "sgl_shm_mq_3_mapped", "other.shm")]
    for path in paths:
        path.write_bytes(b"x" * 4096)
    fd = os.open(paths[2], os.O_RDWR)
    with mmap.mmap(fd, 4096):
        assert cleanup.leftovers(since, tmp_path) == set(paths[:2])
    os.close(fd)
    assert cleanup.leftovers(since, tmp_path) == set(paths[:3])


@pytest.mark.parametrize("how", ["exit", "kill"])
def test_files_go_after_the_launcher_however_it_ends(how: str) -> None:
    name = cleanup.SHM / f"sgl_shm_mq_{os.getpid()}_{how}"
    program = (
        "import os, signal, time; from sglang_dwdp import cleanup; cleanup.watch(); time.sleep(0.1); "
        f"open({str(name)!r}, 'w').write('x'); "
        + ("os._exit(0)" if how == "exit" else "os.kill(os.getpid(), signal.SIGKILL)")
    )
    subprocess.run([sys.executable, "-c", program], check=False)
    assert name.exists()
    deadline = time.monotonic() + 20
    while name.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not name.exists()
