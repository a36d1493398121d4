"""Compiling and linking a slim module: in parallel, resumable, and checked before it takes its place."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from sglang_dwdp.errors import DwdpError
from sglang_dwdp.kernels_build import symbols
from sglang_dwdp.kernels_build.formats import stand_ins
from sglang_dwdp.kernels_build.recipe import MANIFEST, Recipe, Step, stand_ins_template
from sglang_dwdp.kernels_build.toolchain import Toolchain

GIB = 1 << 30
_MEMORY_OF_A_COMPILER = 8 * GIB  # the largest source of FlashInfer 0.7.2 takes 7.1 GiB


@dataclass(frozen=True, slots=True)
class Compiled:
    """One compiled source.

    cpu_s: processor time.  peak_bytes: the largest of its processes.  reused: it was there from a build before.
    """

    source: str
    cpu_s: float
    peak_bytes: int
    reused: bool


def default_jobs() -> int:
    """As many compilers as there are processors and memory for."""
    available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        available = int(next(line for line in lines if line.startswith("MemAvailable")).split()[1]) * 1024
    return max(1, min(len(os.sched_getaffinity(0)), available // _MEMORY_OF_A_COMPILER))


class Build:
    """One build; `run` does all of it."""

    def __init__(self, recipe: Recipe, tools: Toolchain, jobs: int, done: Callable[[Compiled], None]) -> None:
        self._recipe, self._tools, self._jobs, self._done = recipe, tools, jobs, done
        self._running: set[subprocess.Popen[bytes]] = set()
        self._lock = threading.Lock()
        self._stopped = False

    def run(self) -> list[Compiled]:
        """Compile what is not there yet, link, check, and write the manifest.

        Raises:
            DwdpError: another build of this module is under way; a compiler failed (with the end of what it said);
                the module lacks something that it may not lack.
        """
        start = time.perf_counter()
        with self._alone():
            (self._recipe.directory / MANIFEST).unlink(missing_ok=True)
            compiled = self._compile_all()
            self._link([step.target for step in self._recipe.steps])
            content = {
                "format": self._recipe.spec.name,
                "flashinfer": self._recipe.flashinfer,
                "cuda": self._tools.cuda_version,
                "jobs": self._jobs,
                "wall_s": round(time.perf_counter() - start, 1),
                "sources": [asdict(one) for one in compiled],
            }
            (self._recipe.directory / MANIFEST).write_text(json.dumps(content, indent=1) + "\n")
        return compiled

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        lock = FileLock(self._recipe.directory / "lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise DwdpError(f"another process is building {self._recipe.name}; wait for it to end.") from None
        try:
            yield
        finally:
            lock.release()

    def _compile_all(self) -> list[Compiled]:
        with ThreadPoolExecutor(self._jobs) as pool:
            futures = [pool.submit(self._compile, step) for step in self._recipe.steps]
            try:
                finished, _ = wait(futures, return_when=FIRST_EXCEPTION)
                for future in finished:
                    future.result()
            except BaseException:
                self._stop()
                pool.shutdown(cancel_futures=True)
                raise
        return [future.result() for future in futures]

    def _stop(self) -> None:
        with self._lock:
            self._stopped = True
            for process in self._running:
                process.terminate()

    def _compile(self, step: Step) -> Compiled:
        stamp = step.target.with_suffix(".stamp")
        wanted = _stamp(step, self._recipe.flashinfer)
        known = stamp.read_text().split() if stamp.exists() and step.target.exists() else []
        if len(known) == 3 and known[0] == wanted:
            result = Compiled(step.source.name, float(known[1]), int(known[2]), reused=True)
        else:
            stamp.unlink(missing_ok=True)
            cpu_s, peak = self._execute(step.command, step.source.name)
            stamp.write_text(f"{wanted} {cpu_s:.3f} {peak}\n")
            result = Compiled(step.source.name, round(cpu_s, 3), peak, reused=False)
        self._done(result)
        return result

    def _execute(self, command: Sequence[str], what: str) -> tuple[float, int]:
        """Run a compiler; its processor time in seconds and its peak memory in bytes."""
        log = self._recipe.directory / f"{what}.log"
        with log.open("wb") as output:
            with self._lock:
                if self._stopped:
                    raise DwdpError("the build was stopped")
                process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
                self._running.add(process)
            try:
                _, status, usage = os.wait4(process.pid, 0)
            finally:
                with self._lock:
                    self._running.discard(process)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode != 0:
            end = "\n".join(log.read_text(errors="replace").splitlines()[-20:])
            raise DwdpError(f"{what} could not be compiled (exit code {process.returncode}):\n{end}")
        log.unlink()
        return usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024

    def _link(self, objects: Sequence[Path]) -> None:
        recipe = self._recipe
        missing = symbols.missing(objects)
        names = symbols.demangle(missing)
        unexpected = recipe.spec.unexpected(names)
        if unexpected:
            raise DwdpError(
                f"FlashInfer {recipe.flashinfer} needs more for {recipe.spec.name} than is known here, {unexpected[0]} "
                f"and {len(unexpected) - 1} more. Use its full module (leave out build-kernels)."
            )
        stand_in = recipe.directory / "missing_kernels.cpp"
        stand_in.write_text(stand_ins(stand_ins_template(), recipe.spec, missing))
        # libcuda comes with the driver, so a machine that only builds has none: an empty library of that name is
        # enough to make the module ask for the real one when it is loaded.
        driver = recipe.directory / "libcuda.so.1"
        self._execute(
            [self._tools.cxx, "-shared", "-Wl,-soname,libcuda.so.1", "-x", "c++", os.devnull, "-o", str(driver)],
            "libcuda",
        )
        unchecked = recipe.library.with_suffix(".unchecked")
        command = [self._tools.cxx, "-shared", "-fPIC", "-Wl,--no-as-needed", str(stand_in), *map(str, objects)]
        self._execute([*command, *map(str, self._tools.libraries), str(driver), "-o", str(unchecked)], "link")
        driver.unlink()
        left = symbols.of_flashinfer(symbols.undefined(unchecked))
        if left:
            raise DwdpError(f"{recipe.name} was linked without {symbols.demangle(left)[0]} and {len(left) - 1} more.")
        unchecked.replace(recipe.library)


def _stamp(step: Step, flashinfer: str) -> str:
    parts = (flashinfer, *step.command, hashlib.sha256(step.source.read_bytes()).hexdigest())
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()
