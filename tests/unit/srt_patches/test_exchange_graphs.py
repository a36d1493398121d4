"""Which graphs are captured for joint forwards, and which of a bucket's two is replayed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.model_executor.runner.shape_key import ShapeKey

from sglang_dwdp.srt_patches import exchange, exchange_graphs

JOINT = ShapeKey(512, variant_label="dwdp_exchange")


class Steps:
    """Of a rank, with its layers: `bucket` is that of the joint forward under way."""

    prefill_buckets = (512, 1024)
    copies_timed = False
    replays = 0  # that it was told of

    def __init__(self) -> None:
        self.bucket, self.helps, self.timed, self.copies = 0, list[int](), list[int](), True
        self.forwards, self.layers = SimpleNamespace(apart=self.apart), self

    @contextmanager
    def apart(self) -> Iterator[None]:
        bucket, self.bucket = self.bucket, 0
        yield
        self.bucket = bucket

    @contextmanager
    def capture(self, bucket: int) -> Iterator[None]:
        self.bucket = bucket
        yield
        self.bucket = 0

    def capture_help(self, bucket: int) -> None:
        assert self.bucket == bucket
        self.helps.append(bucket)

    def before_replay(self) -> None:
        self.replays += 1

    def time_copies(self, copies: Any) -> None:
        assert copies == ("copies" if self.copies else 1000)
        self.copies_timed = True

    def time_decode(self, bucket: int, alone: Any, joint: Any) -> None:
        assert self.copies_timed
        assert [alone(), joint()] == [(bucket, None), (bucket, "dwdp_exchange")]
        self.timed.append(bucket)

    def time_prefill(self, bucket: int) -> None:
        assert self.bucket == 0
        assert self.copies_timed
        self.timed.append(bucket)


@pytest.fixture
def steps() -> Iterator[Steps]:
    result = Steps()
    exchange._current[:] = [result]  # type: ignore[list-item]
    yield result
    exchange._current.clear()


def key_of(key: ShapeKey) -> Any:
    found: list[ShapeKey] = []
    exchange_graphs.capture_key(lambda _backend, key: found.append(key), None, key)
    assert exchange_graphs.replay_key(lambda _backend, key: key, None, key) == found[0]
    return found[0]


def test_a_joint_prefill_has_a_graph_of_its_own(steps: Steps) -> None:
    assert key_of(ShapeKey(512)) == ShapeKey(512)
    steps.bucket = 512
    assert key_of(ShapeKey(512)) == JOINT
    assert key_of(ShapeKey(8, variant_label="lora")) == ShapeKey(8, variant_label="lora")
    assert steps.replays == 3


@pytest.mark.parametrize("copies", [True, False])
@pytest.mark.parametrize(("size", "drafts", "graphs"), [(512, False, 2), (768, False, 1), (1024, True, 1)])
def test_some_prefill_buckets_are_captured_twice(
    monkeypatch: pytest.MonkeyPatch, steps: Steps, size: int, drafts: bool, graphs: int, copies: bool
) -> None:
    steps.copies = copies
    prefetcher = SimpleNamespace(depth=2 * copies, copy_all="copies")
    runtime = SimpleNamespace(
        in_exchange_step=False, staged=SimpleNamespace(prefetcher=prefetcher), copy_bytes=lambda: 376_000_000
    )
    monkeypatch.setattr(exchange_graphs, "current_runtime", lambda: runtime)
    captured: list[tuple[int, bool]] = []

    def original(_runner: Any, size: int) -> None:
        captured.append((steps.bucket, runtime.in_exchange_step))

    runner = SimpleNamespace(model_runner=SimpleNamespace(is_draft_worker=drafts))
    exchange_graphs.capture_prefill(original, runner, size)
    assert captured == [(0, False), (size, True)][:graphs]
    assert steps.helps == steps.timed == [size] * (graphs - 1)
    assert not runtime.in_exchange_step


@pytest.mark.parametrize(
    ("size", "drafts", "helps", "timed"),
    [(8, False, [8], [8]), (24, False, [24], []), (512, False, [], []), (8, True, [], [])],
)
def test_decodes_are_captured_twice_and_powers_of_two_timed(
    monkeypatch: pytest.MonkeyPatch, steps: Steps, size: int, drafts: bool, helps: list[int], timed: list[int]
) -> None:
    """What copies take is timed first, also where no prefill was captured."""
    prefetcher = SimpleNamespace(depth=2, copy_all="copies")
    runtime = SimpleNamespace(staged=SimpleNamespace(prefetcher=prefetcher))
    monkeypatch.setattr(exchange_graphs, "current_runtime", lambda: runtime)
    runner = SimpleNamespace(
        model_runner=SimpleNamespace(is_draft_worker=drafts, model_config=SimpleNamespace(vocab_size=9)),
        buffers=SimpleNamespace(input_ids=torch.full((size,), -1)),
        captured_req_width=1,
        backend=SimpleNamespace(replay=lambda key, _batch: key),
        _make_graph_key=lambda size, _stream, variant, _other: (size, variant),
    )
    captured: list[tuple[int, Any]] = []

    def original(_runner: Any, _size: int, _forward: Any, _stream: Any = None, variant: Any = None) -> None:
        captured.append((steps.bucket, variant))

    exchange_graphs.capture_decode(original, runner, size, "forward")
    assert captured == [(0, None), (size, "dwdp_exchange")][: 1 + len(helps)]
    assert (steps.helps, steps.timed) == (helps, timed)
    assert (runner.buffers.input_ids >= 0).all() == bool(timed)


def test_padding_is_judged_by_a_rank_s_own_tokens(steps: Steps) -> None:
    buckets = (128, 512, 2048)

    def padded(size: int) -> int:
        return exchange_graphs.padded_size(lambda raw, sizes: min(n for n in sizes if n >= raw), size, buckets)

    steps.bucket = 2048
    assert padded(100) == 2048
    assert exchange_graphs.can_run_prefill(lambda _runner: padded(100) <= 200, None)
    assert padded(100) == 2048
    steps.bucket = 0
    assert padded(100) == 128


def test_without_exchange_steps_nothing_changes() -> None:
    assert key_of(ShapeKey(512)) == ShapeKey(512)
    assert exchange_graphs.can_run_prefill(lambda _runner: True, None)
    assert exchange_graphs.padded_size(lambda raw, _sizes: raw, 5, (8,)) == 5
    assert exchange_graphs.decode_variant(lambda _runner, _batch: "lora", None, None) == "lora"
