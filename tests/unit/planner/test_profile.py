"""Profiles: fitting finds the constants that made the points; the torch layer is right."""

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from sglang_dwdp.planner import kernels
from sglang_dwdp.planner.copies import BLOCK, COPIES, PRODUCTS, jobs, measure_copies
from sglang_dwdp.planner.errors import PlannerError
from sglang_dwdp.planner.fit import fit
from sglang_dwdp.planner.formats import FORMATS
from sglang_dwdp.planner.gpu import Gpu
from sglang_dwdp.planner.gpus import get_gpu
from sglang_dwdp.planner.measure import _reads, measure
from sglang_dwdp.planner.models import load_model
from sglang_dwdp.planner.profile import (
    ALL_PEERS,
    AttentionPoint,
    CopyPoint,
    GemmPoint,
    Profile,
    SmallPoint,
    load_profile,
)
from sglang_dwdp.planner.reads import TorchReadBench, measure_reads
from sglang_dwdp.planner.report import profile_lines
from sglang_dwdp.planner.shape import ModelShape
from sglang_dwdp.planner.torch_layer import median_seconds
from tests import ROOT

MEASURED = ROOT / "benchmarks" / "results" / "profile_h100.json"
COMPARED = MEASURED.with_name("planner_vs_gpu_h100.json")
BF16 = FORMATS["bf16"]


def _synthetic(truth: Gpu) -> Profile:
    """Points that the cost model itself would produce on ``truth``."""
    efficiency = truth.efficiency
    grouped = tuple(
        GemmPoint(rows, 128, depth, width, kernels.grouped_product(truth, BF16, rows, 128, depth, width))
        for rows in (512, 8192, 32768, 131072)
        for depth, width in ((2048, 1536), (768, 2048))
    )
    dense = tuple(
        GemmPoint(rows, 1, 2048, 5120, kernels.dense_gemm(truth, BF16, rows, 2048 * 5120)) for rows in (64, 1024, 16384)
    )
    attention = []
    for heads in (16, 64):
        for dim in (64, 128):
            for length in (1024, 4096, 16384):
                pairs = heads * length * (length + 1) / 2
                work = pairs * (4 * dim / (efficiency.attention * truth.peak(BF16)) + efficiency.softmax_pair)
                short = efficiency.attention_half / length + efficiency.attention_fill / (heads * length)
                attention.append(AttentionPoint(length, heads, heads, dim, work * (1 + short)))
    small = tuple(
        SmallPoint(
            n,
            n * 4e5,
            45,
            n * 4e5 / (truth.hbm_bandwidth * efficiency.elementwise) + 45 * truth.kernel_gap,
        )
        for n in (64, 1024, 16384)
    )
    return Profile("H100", "test", "0", "m", grouped, dense, (), tuple(attention), small)


def test_fit_recovers_the_constants_behind_the_points() -> None:
    gpu = get_gpu("H100")
    efficiency = replace(
        gpu.efficiency,
        grouped_gemm=0.8,
        dense_gemm=0.7,
        attention=0.5,
        elementwise=0.5,
        weight_read=0.8,
        tile_rows=128,
        half_depth=400.0,
        gemm_cap=1.0,
        gemm_latency=0.0,
        overlap_power=2.0,
        attention_half=500.0,
        attention_fill=30000.0,
        softmax_pair=2.5e-13,
    )
    truth = replace(gpu, efficiency=efficiency, kernel_gap=2.5e-6)
    found = fit(_synthetic(truth), replace(gpu, efficiency=replace(gpu.efficiency, gemm_cap=1.0)))
    for name in ("grouped_gemm", "dense_gemm", "attention", "elementwise", "weight_read"):
        assert getattr(found.efficiency, name) == pytest.approx(getattr(efficiency, name), rel=0.03)
    for name in ("half_depth", "attention_half", "attention_fill", "softmax_pair"):
        assert getattr(found.efficiency, name) == pytest.approx(getattr(efficiency, name), rel=0.15)
    assert found.efficiency.tile_rows == 128
    assert found.kernel_gap == pytest.approx(2.5e-6, rel=0.05)


def test_copies_replace_bandwidth_and_interference() -> None:
    copies = (CopyPoint(1, 400e9, 300e9, 1.25), CopyPoint(0, 400e9, 320e9, 2.0, device=1))
    found = fit(Profile("H100", "test", "0", "m", copies=copies), get_gpu("H100"))
    assert found.pair_bandwidth == pytest.approx(310e9)
    assert found.copy_bandwidth == pytest.approx(310e9)
    # slowed to 1.25 and 2 times: of each second of copying 0.2 and 0.5 of compute are lost
    assert found.copy_interference == pytest.approx(0.35)
    assert found.sources["copy_bandwidth"] == "measured on test"
    together = CopyPoint(ALL_PEERS, 420e9, 350e9, 1.25)
    found = fit(Profile("H100", "test", "0", "m", copies=(*copies, together)), get_gpu("H100"))
    assert (found.pair_bandwidth, found.copy_bandwidth) == (pytest.approx(310e9), pytest.approx(350e9))


def test_copies_within_a_gpu_say_nothing_of_the_link() -> None:
    gpu = get_gpu("H100")
    found = fit(Profile("H100", "test", "0", "m", copies=(CopyPoint(0, 1.5e12, 1.2e12, 1.5),)), gpu)
    for name in ("pair_bandwidth", "copy_bandwidth", "copy_interference"):
        assert getattr(found, name) == getattr(gpu, name)
    assert found.sources["copy_bandwidth"] == gpu.sources["copy_bandwidth"]


class FakeBench:
    """GPUs whose port gives 400 GB/s, 300 under compute, and whose 1 ms products copies slow by a quarter."""

    def __init__(self, devices: int, unreachable: tuple[tuple[int, int], ...] = ()) -> None:
        self.devices = devices
        self.unreachable = unreachable
        self.runs: list[tuple[int, tuple[int, ...], int, int]] = []

    def reaches(self, reader: int, source: int) -> bool:
        return (reader, source) not in self.unreachable

    def run(self, reader: int, sources: Sequence[int], copies: int, products: int) -> tuple[float, float]:
        self.runs.append((reader, tuple(sources), copies, products))
        seconds = copies * len(sources) * BLOCK / (300e9 if products else 400e9)
        return seconds, products * (1.25e-3 if copies else 1e-3)


@pytest.mark.parametrize(
    ("devices", "expected"),
    [
        (1, [(0, 0)]),
        (2, [(0, 1), (1, 0)]),
        (3, [(0, 1), (0, 2), (1, 0), (1, 2), (2, 0), (2, 1), (0, -1), (1, -1), (2, -1)]),
    ],
)
def test_every_pair_is_measured_alone_and_under_compute(devices: int, expected: list[tuple[int, int]]) -> None:
    bench = FakeBench(devices)
    points = measure_copies(bench)
    assert [(point.device, point.peer) for point in points] == expected
    for point in points:
        assert point.alone == pytest.approx(400e9)
        assert point.under_compute == pytest.approx(300e9)
        assert point.compute_slowdown == pytest.approx(1.25)
        assert point.crosses_link == (devices > 1)
    # whichever is judged has company to its end: what it is judged by lasts less
    for _, sources, copies, products in bench.runs:
        if copies == COPIES and products:
            assert products * 1e-3 < copies * len(sources) * BLOCK / 400e9
        elif products == PRODUCTS and copies > 1:
            assert copies * len(sources) * BLOCK / 400e9 < products * 1e-3


class FakeReads:
    """GPUs whose kernels read 1 GB of a peer's weights at 250 GB/s, and at 200 with many rows."""

    weight_bytes = 10**9

    def __init__(self, devices: int, unreachable: tuple[tuple[int, int], ...] = ()) -> None:
        self.devices = devices
        self.unreachable = unreachable

    def reaches(self, reader: int, source: int) -> bool:
        return (reader, source) not in self.unreachable

    def seconds(self, reader: int, source: int, rows_per_expert: int) -> float:
        if reader == source:
            return 1 / 2500
        return 1 / 250 if rows_per_expert < 10 else 1 / 200


def test_every_pair_reads_in_place() -> None:
    assert measure_reads(FakeReads(1)) == []
    points = measure_reads(FakeReads(2))
    assert [(p.device, p.peer, p.rows_per_expert) for p in points] == [(0, 1, 4), (0, 1, 32), (1, 0, 4), (1, 0, 32)]
    assert [p.bytes_per_second for p in points[:2]] == [pytest.approx(250e9), pytest.approx(200e9)]
    assert {(p.device, p.peer) for p in measure_reads(FakeReads(2, ((1, 0),)))} == {(0, 1)}
    gpu = get_gpu("H100")
    found = fit(Profile("H100", "test", "0", "m", reads=tuple(points)), gpu)
    assert found.direct_read_bandwidth == pytest.approx(225e9)
    assert found.sources["direct_read"] == "measured on test"
    assert fit(Profile("H100", "test", "0", "m"), gpu).direct_read == gpu.direct_read


def test_reads_that_cannot_be_are_no_measurement() -> None:
    """As where a product was captured on another GPU's stream, and so never ran."""

    class Empty(FakeReads):
        def seconds(self, reader: int, source: int, rows_per_expert: int) -> float:
            return 1e-5 if source == 0 and reader == 1 else super().seconds(reader, source, rows_per_expert)

    with pytest.raises(OSError, match="GPU 1 seemed to read GPU 0's memory faster than its own"):
        measure_reads(Empty(2))


@pytest.mark.gpu(1)
def test_a_product_reads_mapped_weights() -> None:
    """Of another GPU where there is one, else of this one; the memory is given back."""
    torch = pytest.importorskip("torch")
    model = load_model("qwen3-30b-a3b")
    bench = TorchReadBench(torch, model, lambda call: median_seconds(torch, "cuda", call))
    source = bench.devices - 1
    free = torch.cuda.mem_get_info(source)[0]
    seconds = bench.seconds(0, source, 4)
    assert 5e9 < bench.weight_bytes / seconds < 4e12
    torch.cuda.empty_cache()
    assert torch.cuda.mem_get_info(source)[0] > free - bench.weight_bytes // 2


def test_reads_that_fail_leave_the_rest_of_the_profile() -> None:
    class Refuses:
        @property
        def cuda(self) -> None:
            raise RuntimeError("no mapped memory\nmore")

    points, why = _reads(Refuses(), _tiny(), lambda call: 1.0)
    assert (points, why) == ((), "no mapped memory")
    profile = Profile("H100", "test", "0", "m", reads_failed=why)
    assert profile_lines(profile)[-1] == "reading in place: not measured: no mapped memory"


def test_pairs_without_peer_access_are_left_out() -> None:
    bench = FakeBench(3, unreachable=((0, 1), (1, 0)))
    assert jobs(bench) == [(0, (2,)), (1, (2,)), (2, (0,)), (2, (1,)), (2, (0, 1))]
    assert measure_copies(FakeBench(2, unreachable=((0, 1), (1, 0)))) == []


def test_a_profile_tells_what_it_replaces() -> None:
    one, many, none = (
        Profile("H100", "NVIDIA H100", "2.14", "m", copies=tuple(copies))
        for copies in (measure_copies(FakeBench(1)), measure_copies(FakeBench(3)), ())
    )
    assert "GPU 0 copies from itself (no link is crossed" in "\n".join(profile_lines(one))
    lines = profile_lines(many)
    assert "GPU 2 copies from GPU 1: 400 GB/s alone, 300 GB/s under compute, which it slows by 25.0%" in lines
    assert any("GPU 2 copies from all peers at once" in line for line in lines)
    assert "no GPU reaches another's memory" in profile_lines(none)[-1]
    assert "not one that the planner knows" in profile_lines(replace(none, gpu="unknown"))[0]


def test_the_shipped_profile_loads_and_applies() -> None:
    profile = load_profile(str(MEASURED))
    gpu = profile.apply(get_gpu("H100"))
    assert "measured on NVIDIA H100" in gpu.sources["efficiency"]
    assert 0.2 < gpu.efficiency.grouped_gemm < 1
    with pytest.raises(PlannerError, match="measured on H100, not on GB200"):
        profile.apply(get_gpu("GB200"))


def test_predictions_from_the_shipped_profile_still_match_the_measured_layers() -> None:
    """Guards the model: profiled on one shape, within 12 % of each measured layer of four."""
    sys.path.insert(0, str(ROOT))
    from benchmarks.planner_vs_gpu import predict

    gpu = load_profile(str(MEASURED)).apply(get_gpu("H100"))
    rows = json.loads(COMPARED.read_text())["rows"]
    errors = [predict(load_model(r["model"]), gpu, r["tokens"])["total"] / r["measured_seconds"] - 1 for r in rows]
    assert len(errors) == 16
    assert max(abs(e) for e in errors) < 0.12
    assert float(np.mean(np.abs(errors))) < 0.05


def test_the_documentation_quotes_what_was_measured() -> None:
    text = (ROOT / "docs" / "planner.md").read_text()
    for row in json.loads(COMPARED.read_text())["rows"]:
        predicted, measured = 1e3 * row["predicted"]["total"], 1e3 * row["measured_seconds"]
        assert f"{predicted:.2f} / {measured:.2f}, {100 * row['error']:+.1f} %" in text, row


def _json(**changes: object) -> str:
    return json.dumps({**Profile("H100", "test", "0", "m").to_json(), **changes})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON"),
        ('{"version": 99}', "measure it again"),
        ('{"version": 1, "gpu": "H100"}', "malformed"),
        ("[]", "must hold a JSON object"),
        (_json(small=[{"tokens": 1, "counted_bytes": 1.0, "kernels": 1, "seconds": 0}]), "seconds must be positive"),
        (_json(small=[3]), "3 is no SmallPoint"),
        (_json(copies=[{"peer": 1, "alone": "fast", "under_compute": 1, "compute_slowdown": 1}]), "alone must be a"),
        (_json(reads=[{"device": 0, "peer": 1, "rows_per_expert": 4}]), "bytes_per_second"),
        (_json(reads=7), "malformed"),
        (_json(gpu=3), "gpu must be a text"),
    ],
)
def test_bad_profiles_are_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "p.json"
    path.write_text(text)
    with pytest.raises(PlannerError, match=message):
        load_profile(str(path))
    with pytest.raises(PlannerError, match="does not exist"):
        load_profile(str(tmp_path / "none.json"))


def _tiny() -> ModelShape:
    return replace(
        load_model("qwen3-30b-a3b"),
        name="tiny",
        hidden=64,
        heads=4,
        kv_heads=2,
        qk_dim=16,
        v_dim=16,
        experts=8,
        top_k=2,
        moe_intermediate=32,
    )


def test_the_torch_layer_computes_a_mixture_of_experts() -> None:
    """Against a token-by-token loop in float64."""
    torch = pytest.importorskip("torch")
    from sglang_dwdp.planner.torch_layer import TorchLayer

    model = _tiny()
    layer = TorchLayer(model, "cpu")
    h = layer.tokens(33)
    weights, order, ends = layer.route(h @ layer.router)
    rows = layer.grouped(h[order // model.top_k], layer.up, ends)
    got = layer.combine(layer.grouped(layer.activate(rows), layer.down, ends), weights, order)
    scores = (h @ layer.router).float().softmax(-1)
    top, chosen = scores.topk(model.top_k, dim=-1)
    expected = torch.zeros(33, model.hidden, dtype=torch.float64)
    for t in range(33):
        for j in range(model.top_k):
            e = int(chosen[t, j])
            gate, up = (h[t].double() @ layer.up[e].double()).chunk(2)
            out = (torch.nn.functional.silu(gate) * up) @ layer.down[e].double()
            expected[t] += float(top[t, j] / top[t].sum()) * out
    error = (got.double() - expected).norm() / expected.norm()
    assert 0 < float(error) < 1e-2


def test_measuring_works_end_to_end_on_a_cpu(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    profile = measure(_tiny(), quick=True, device="cpu")
    assert profile.gpu == "unknown"
    assert all(p.seconds > 0 for p in (*profile.grouped, *profile.dense, *profile.attention, *profile.small))
    path = tmp_path / "p.json"
    path.write_text(json.dumps(profile.to_json()))
    assert load_profile(str(path)) == profile


@pytest.mark.parametrize(
    ("failure", "message"),
    [
        ("OutOfMemoryError", "not enough free GPU memory to measure with tiny: 40 GiB. Stop what else runs there"),
        ("RuntimeError", "the measurement failed: 40 GiB."),
    ],
)
def test_failures_of_a_measurement_are_one_line(monkeypatch: pytest.MonkeyPatch, failure: str, message: str) -> None:
    torch = pytest.importorskip("torch")
    from sglang_dwdp.planner import torch_layer

    def fail(*_: object) -> None:
        kind = torch.OutOfMemoryError if failure == "OutOfMemoryError" else RuntimeError
        raise kind("40 GiB.\nCUDA kernel errors might be reported elsewhere")

    monkeypatch.setattr(torch_layer, "TorchLayer", fail)
    with pytest.raises(PlannerError) as caught:
        measure(_tiny(), device="cpu")
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_latent_attention_cannot_be_profiled_with() -> None:
    pytest.importorskip("torch")
    with pytest.raises(PlannerError, match="grouped-query"):
        measure(load_model("deepseek-r1"), device="cpu")


@pytest.mark.gpus(2)
def test_copies_between_all_pairs_of_these_gpus() -> None:
    import torch

    from sglang_dwdp.planner.copies import TorchCopyBench

    points = measure_copies(TorchCopyBench(torch))
    count = torch.cuda.device_count()
    pairs = {(point.device, point.peer) for point in points if point.peer != ALL_PEERS}
    assert pairs == {(reader, peer) for reader in range(count) for peer in range(count) if reader != peer}
    for point in points:
        assert point.crosses_link
        assert 1e9 < point.under_compute <= 1.1 * point.alone < 2e12
        assert 0.8 < point.compute_slowdown < 3
