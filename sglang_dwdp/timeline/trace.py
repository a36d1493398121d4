"""Reading a profile: what ran on which stream of which GPU, from the trace that torch's profiler and SGLang write."""

from __future__ import annotations

import gzip
import json
import zlib
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sglang_dwdp.errors import DwdpError

_KERNELS, _COPIES = ("kernel", "gpu_memset"), "gpu_memcpy"
_BETWEEN_GPUS = ("DtoD", "PtoP")  # as the profiler names copies that neither come from the host nor go there


@dataclass(frozen=True, slots=True, order=True)
class Interval:
    """A time in which a stream was busy, in microseconds of the profile's clock."""

    start: float
    end: float


@dataclass(frozen=True, slots=True)
class Stream:
    """What ran on one stream.

    Attributes:
        number: the driver's.
        busy: in order, without overlaps.
        copied_bytes: of copies within a GPU and between two.
    """

    number: int
    busy: tuple[Interval, ...]
    copied_bytes: int = 0

    @property
    def busy_us(self) -> float:
        """Microseconds in which it was busy."""
        return sum(interval.end - interval.start for interval in self.busy)


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU of a profile.

    Attributes:
        number: as the profile numbers it.
        compute: the stream whose kernels took longest.
        copies: streams with nothing but copies within the GPU and from others, on which experts are fetched.
    """

    number: int
    compute: Stream
    copies: tuple[Stream, ...]


def read_trace(path: str | Path) -> list[Gpu]:
    """The GPUs of a profile, by number.

    Args:
        path: a trace in Chrome's format, as JSON or compressed with gzip.

    Raises:
        DwdpError: it is no such trace, or no GPU was profiled.
        OSError: it cannot be read.
    """
    try:
        raw = Path(path).read_bytes()
        content = json.loads(gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw)
        events = content["traceEvents"] if isinstance(content, dict) else content
        gpus = gpus_of(events)
    except (ValueError, KeyError, TypeError, EOFError, zlib.error) as error:
        raise DwdpError(
            f"{path} is no trace of torch's profiler ({error!r}). Give a .trace.json or .trace.json.gz, as SGLang's "
            "/start_profile writes it."
        ) from error
    if not gpus:
        raise DwdpError(f'no kernel of a GPU is in {path}. Profile with "GPU" among the activities.')
    return gpus


def gpus_of(events: Iterable[Mapping[str, Any]]) -> list[Gpu]:
    """The GPUs of a trace's events that ran kernels, by number."""
    kernels: dict[tuple[int, int], list[Interval]] = defaultdict(list)  # by GPU and stream
    copies: dict[tuple[int, int], list[Interval]] = defaultdict(list)
    nbytes: dict[tuple[int, int], int] = defaultdict(int)
    others: set[tuple[int, int]] = set()  # with copies from or to the host
    for event in events:
        kind = event.get("cat")
        if event.get("ph") != "X" or (kind not in _KERNELS and kind != _COPIES):
            continue
        about = event["args"]
        stream = int(about["device"]), int(about["stream"])
        interval = Interval(float(event["ts"]), float(event["ts"]) + float(event["dur"]))
        if kind in _KERNELS:
            kernels[stream].append(interval)
        elif any(name in event["name"] for name in _BETWEEN_GPUS):
            copies[stream].append(interval)
            nbytes[stream] += int(about.get("bytes", 0))
        else:
            others.add(stream)
    result = []
    for number in sorted({gpu for gpu, _ in kernels}):
        streams = [Stream(stream, union(found)) for (gpu, stream), found in kernels.items() if gpu == number]
        fetching = sorted(key for key in copies if key[0] == number and key not in kernels and key not in others)
        result.append(
            Gpu(
                number,
                max(streams, key=lambda stream: stream.busy_us),
                tuple(Stream(key[1], union(copies[key]), nbytes[key]) for key in fetching),
            )
        )
    return result


def union(intervals: Iterable[Interval]) -> tuple[Interval, ...]:
    """The same times, in order and without overlaps."""
    result: list[Interval] = []
    for interval in sorted(intervals):
        if result and interval.start <= result[-1].end:
            result[-1] = Interval(result[-1].start, max(result[-1].end, interval.end))
        else:
            result.append(interval)
    return tuple(result)
