"""A synthetic profile in the form that torch's profiler gives it: what is read, what counts as exposed, the picture."""

from __future__ import annotations

import gzip
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_dwdp.cli import main
from sglang_dwdp.errors import DwdpError
from sglang_dwdp.timeline.draw import closed
from sglang_dwdp.timeline.exposed import exposed, overlaps
from sglang_dwdp.timeline.trace import Gpu, Interval, Stream, gpus_of, read_trace, union

COMPUTE, FIRST, SECOND = 7, 20, 24


def event(kind: str, name: str, stream: int, start: float, end: float, **about: Any) -> dict[str, Any]:
    args = {"device": 0, "stream": stream, **about}
    return {"ph": "X", "cat": kind, "name": name, "pid": 0, "ts": start, "dur": end - start, "args": args}


def kernel(start: float, end: float, stream: int = COMPUTE) -> dict[str, Any]:
    return event("kernel", "void kernel()", stream, start, end)


def copy(start: float, end: float, stream: int = FIRST) -> dict[str, Any]:
    return event("gpu_memcpy", "Memcpy PtoP (Device -> Device)", stream, start, end, bytes=1000)


# Layer 1's experts are there in time; layer 2's are waited for; a slow host keeps layer 3 waiting, while copies run.
EVENTS = [
    {"ph": "M", "name": "process_name", "pid": 0, "args": {"name": "python"}},
    {"ph": "X", "cat": "cpu_op", "name": "aten::mm", "pid": 1, "tid": 1, "ts": 1000, "dur": 5},
    event("gpu_memcpy", "Memcpy HtoD (Pageable -> Device)", COMPUTE, 1000, 1001),
    event("gpu_memcpy", "Memcpy HtoD (Pinned -> Device)", 30, 1000, 1001),
    kernel(1001, 1100),
    copy(1010, 1090),
    copy(1015, 1080, SECOND),
    kernel(1100, 1200),
    copy(1105, 1350),
    copy(1105, 1340, SECOND),
    kernel(1355, 1400),
    copy(1360, 1500),
    kernel(1700, 1800),
    kernel(1000, 1020, 31),  # another stream's
]


@pytest.fixture(params=["trace.json", "trace.json.gz"])
def profile(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    path = tmp_path / str(request.param)
    raw = json.dumps({"schemaVersion": 1, "traceEvents": EVENTS}).encode()
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)
    return path


def test_streams_are_told_apart(profile: Path) -> None:
    [gpu] = read_trace(profile)
    assert gpu.compute == Stream(COMPUTE, (Interval(1001, 1200), Interval(1355, 1400), Interval(1700, 1800)))
    assert [stream.number for stream in gpu.copies] == [FIRST, SECOND]
    assert [stream.copied_bytes for stream in gpu.copies] == [3000, 2000]


def test_what_is_exposed() -> None:
    [gpu] = gpus_of(EVENTS)
    assert exposed(gpu) == [Interval(1200, 1350)]  # not the 5 us that it took to go on, nor the host's pause
    assert exposed(gpu, goes_on_us=4.0) == []
    assert exposed(gpu, goes_on_us=300.0) == [Interval(1200, 1350), Interval(1400, 1500)]


def test_a_wait_begins_with_its_copy() -> None:
    [gpu] = gpus_of([kernel(0, 10), copy(40, 60), kernel(61, 70)])
    assert exposed(gpu) == [Interval(40, 60)]


def test_copies_in_slices_are_waited_for_once() -> None:
    [gpu] = gpus_of([kernel(0, 10), copy(5, 20), copy(21, 30), copy(31, 40), kernel(42, 50)])
    assert exposed(gpu) == [Interval(10, 40)]


def test_gpus_are_told_apart() -> None:
    events = [kernel(0, 10), copy(10, 20), kernel(21, 30)]
    others = [{**one, "args": {**one["args"], "device": 1}, "ts": one["ts"] + 5} for one in events]
    first, second = gpus_of([*others, *events])
    assert (first.number, second.number) == (0, 1)
    assert exposed(second) == [Interval(15, 25)]


intervals = st.lists(st.tuples(st.integers(0, 50), st.integers(1, 9)), max_size=12).map(
    lambda found: [Interval(start, start + length) for start, length in found]
)


def covered(found: list[Interval] | tuple[Interval, ...]) -> set[int]:
    return {moment for one in found for moment in range(int(one.start), int(one.end))}


@given(intervals)
def test_union(found: list[Interval]) -> None:
    joined = union(found)
    assert covered(joined) == covered(found)
    assert all(before.end < after.start for before, after in pairwise(joined))


@given(intervals, st.integers(0, 50), st.integers(1, 20))
def test_overlaps(found: list[Interval], start: int, length: int) -> None:
    within = Interval(start, start + length)
    assert covered(overlaps(union(found), within)) == covered(found) & covered([within])


@given(intervals, intervals)
def test_compute_stands_still_while_it_is_exposed(busy: list[Interval], copies: list[Interval]) -> None:
    gpu = Gpu(0, Stream(1, union(busy)), (Stream(2, union(copies)),))
    waits = exposed(gpu)
    assert not covered(waits) & covered(busy)
    starts, ends = {one.start for one in (*busy, *copies)} | {one.end for one in busy}, {one.end for one in copies}
    assert all(wait.start in starts and wait.end in ends for wait in waits)


def test_pauses_that_are_too_narrow_are_not_drawn() -> None:
    found = [Interval(0, 1), Interval(1.5, 2), Interval(5, 6)]
    assert closed(found, 1.0) == [Interval(0, 2), Interval(5, 6)]


@pytest.mark.parametrize("ending", ["png", "svg"])
def test_the_command(profile: Path, tmp_path: Path, ending: str, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / f"picture.{ending}"
    assert main(["timeline", str(profile), "-o", str(picture)]) == 0
    assert picture.stat().st_size > 1000
    said = capsys.readouterr().out
    assert said == (
        "GPU 0: 0.799 ms, compute 0.344 ms (43%), copies 0.465 ms (58%), exposed 0.150 ms (18.8%) in 1 waits\n"
    )


def test_a_part_of_it(profile: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = str(tmp_path / "picture.png")
    assert main(["timeline", str(profile), "-o", picture, "--start-ms", "0.3", "--end-ms", "0.45"]) == 0
    assert "exposed 0.000 ms" in capsys.readouterr().out
    assert main(["timeline", str(profile), "-o", picture, "--start-ms", "5"]) == 1
    assert "no kernel ran" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("{", "no trace of torch's profiler"),
        ("[]", "no kernel of a GPU"),
        ('{"events": []}', "no trace of torch's profiler"),
        (json.dumps({"traceEvents": [{"ph": "X", "cat": "kernel", "name": "k", "ts": 1, "dur": 1}]}), "no trace"),
    ],
)
def test_what_is_no_profile(content: str, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    path.write_text(content)
    with pytest.raises(DwdpError, match=reason):
        read_trace(path)


def test_a_picture_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["timeline", "nothing", "-o", str(tmp_path / "picture.txt")]) == 1
    assert "ending in .pdf, .png, .svg" in capsys.readouterr().err
    assert main(["timeline", str(tmp_path / "nothing"), "-o", str(tmp_path / "picture.png")]) == 1
    assert "nothing" in capsys.readouterr().err
    assert main(["timeline", str(tmp_path), "-o", str(tmp_path / "none" / "picture.png")]) == 1
