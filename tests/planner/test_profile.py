"""Profiles: fitting finds the constants that made the points; the torch layer is right."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from sglang_dwdp.planner import kernels
from sglang_dwdp.planner.errors import PlannerError
from sglang_dwdp.planner.fit import fit
from sglang_dwdp.planner.formats import FORMATS
from sglang_dwdp.planner.gpus import Gpu, get_gpu
from sglang_dwdp.planner.measure import measure
from sglang_dwdp.planner.models import ModelShape, load_model
from sglang_dwdp.planner.profile import (
    AttentionPoint,
    CopyPoint,
    GemmPoint,
    Profile,
    SmallPoint,
    load_profile,
)

MEASURED = Path(__file__).parents[2] / "benchmarks" / "results" / "profile_h100.json"
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
    copies = (CopyPoint(1, 400e9, 300e9, 1.1), CopyPoint(2, 400e9, 320e9, 1.3))
    found = fit(Profile("H100", "test", "0", "m", copies=copies), get_gpu("H100"))
    assert found.pair_bandwidth == pytest.approx(310e9)
    assert found.copy_bandwidth == pytest.approx(310e9)
    assert found.copy_interference == pytest.approx(0.2)


def test_the_shipped_profile_loads_and_applies() -> None:
    profile = load_profile(str(MEASURED))
    gpu = profile.apply(get_gpu("H100"))
    assert "measured on NVIDIA H100" in gpu.sources["efficiency"]
    assert 0.2 < gpu.efficiency.grouped_gemm < 1
    with pytest.raises(PlannerError, match="measured on H100, not on GB200"):
        profile.apply(get_gpu("GB200"))


def test_predictions_from_the_shipped_profile_still_match_the_measured_layers() -> None:
    """Guards the model: profiled on one shape, within 12 % of each measured layer of four."""
    import sys

    sys.path.insert(0, str(MEASURED.parents[1]))
    from planner_vs_gpu import predict

    gpu = load_profile(str(MEASURED)).apply(get_gpu("H100"))
    rows = json.loads(COMPARED.read_text())["rows"]
    errors = [predict(load_model(r["model"]), gpu, r["tokens"])["total"] / r["measured_seconds"] - 1 for r in rows]
    assert len(errors) == 16
    assert max(abs(e) for e in errors) < 0.12
    assert float(np.mean(np.abs(errors))) < 0.05


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON"),
        ('{"version": 99}', "measure it again"),
        ('{"version": 1, "gpu": "H100"}', "malformed"),
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


def test_latent_attention_cannot_be_profiled_with() -> None:
    pytest.importorskip("torch")
    with pytest.raises(PlannerError, match="grouped-query"):
        measure(load_model("deepseek-r1"), device="cpu")
