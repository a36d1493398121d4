"""The subcommand `sglang-dwdp timeline`: what a profile shows, as a picture and in numbers."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from sglang_dwdp.errors import DwdpError
from sglang_dwdp.timeline.exposed import exposed, overlaps
from sglang_dwdp.timeline.trace import Gpu, Interval, Stream, read_trace, union

PICTURES = (".pdf", ".png", ".svg")


def run(args: argparse.Namespace) -> int:
    """Draw, and print a line for each GPU.

    Raises:
        DwdpError: the profile cannot be drawn, or the picture not be written.
    """
    picture = Path(args.output)
    if not picture.parent.is_dir() or picture.suffix.lower() not in PICTURES:
        raise DwdpError(f"cannot write {picture}: give a name in a folder that exists, ending in {', '.join(PICTURES)}")
    gpus = [gpu for gpu in read_trace(args.profile) if args.gpu in (None, gpu.number)]
    if not gpus:
        raise DwdpError(f"{args.profile} has no GPU {args.gpu}")
    start = min(gpu.compute.busy[0].start for gpu in gpus)
    shown = Interval(start + 1000 * args.start_ms, start + 1000 * (args.end_ms or 1e12))
    gpus = [cut(gpu, shown) for gpu in gpus]
    if not all(gpu.compute.busy for gpu in gpus):
        raise DwdpError(f"no kernel ran between --start-ms {args.start_ms:g} and --end-ms {args.end_ms or 'the end'}")
    waits = [exposed(gpu) for gpu in gpus]
    from sglang_dwdp.timeline.draw import draw  # imports matplotlib

    draw(gpus, waits, start, picture)
    for gpu, found in zip(gpus, waits, strict=True):
        sys.stdout.write(summary(gpu, found) + "\n")
    return 0


def cut(gpu: Gpu, within: Interval) -> Gpu:
    """What a GPU did in an interval."""

    def cut_stream(stream: Stream) -> Stream:
        return Stream(stream.number, tuple(overlaps(stream.busy, within)), stream.copied_bytes)

    return Gpu(gpu.number, cut_stream(gpu.compute), tuple(map(cut_stream, gpu.copies)))


def summary(gpu: Gpu, waits: list[Interval]) -> str:
    """One line on a GPU: busy and exposed milliseconds, and their part of the time from first to last kernel."""
    busy = gpu.compute.busy
    total = busy[-1].end - busy[0].start
    waited = sum(wait.end - wait.start for wait in waits)
    copied = sum(one.end - one.start for one in union(one for stream in gpu.copies for one in stream.busy))
    return (
        f"GPU {gpu.number}: {total / 1000:.3f} ms, compute {gpu.compute.busy_us / 1000:.3f} ms "
        f"({gpu.compute.busy_us / total:.0%}), copies {copied / 1000:.3f} ms ({copied / total:.0%}), "
        f"exposed {waited / 1000:.3f} ms ({waited / total:.1%}) in {len(waits)} waits"
    )
