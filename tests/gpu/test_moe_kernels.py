"""SGLang's other MoE kernels on views give bitwise what they give on resident experts; one Hopper GPU is enough."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sglang_dwdp.config import DwdpConfig
from sglang_dwdp.runtime import DwdpRuntime
from tests.fixtures.moe_problems import ALPHA, LIMIT, Case, Experts, Shape, make, make_case, reference, relative_error
from tests.fixtures.ranks import PlainLayer, run_ranks
from tests.fixtures.sglang_kernels import deep_gemm, published
from tests.gpu.views import differences

pytestmark = pytest.mark.gpu(3)

QWEN = Shape("Qwen3-30B-A3B", 128, 2048, 768, 8)
GPT_OSS = Shape("gpt-oss, smaller", 32, 1536, 1408, 4)
TOKENS = (1, 7, 64, 1000, 4096)


@pytest.fixture(scope="module", autouse=True)
def sglang() -> Iterator[None]:
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("needs a Hopper GPU")
    with published():
        yield


def compare(
    full: list[dict[str, torch.Tensor]],
    run: Callable[[Case, Experts], torch.Tensor],
    shape: Shape,
    view: Any,
    skewed: bool,
) -> None:
    """Three layers on every rank of three, against the same layers resident."""
    cases = [make_case(shape, tokens, skewed=skewed) for tokens in TOKENS]
    expected = [[run(case, layer) for layer in full] for case in cases]
    assert all(result.isfinite().all() and result.any() for row in expected for result in row)

    def step(runtime: DwdpRuntime, layers: list[PlainLayer]) -> list[int]:
        return differences(runtime, layers, cases, expected, run)

    config = DwdpConfig(view=view)
    assert run_ranks(3, full, step, config) == [[]] * 3


@pytest.fixture
def scales(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scales of fewer bytes than the parameter are replicated, others are shared."""
    monkeypatch.setattr("sglang_dwdp.experts.layer.REPLICATE_BELOW_BYTES", request.param)


@pytest.fixture(scope="module")
def block_fp8() -> list[dict[str, torch.Tensor]]:
    return [make("fp8-block", QWEN, seed) for seed in range(3)]


# Scales shared like weights, and replicated. Both layouts build descriptors from addresses, which change with views.
@pytest.mark.parametrize("scales", [0, 8 << 20], ids=["shared-scales", "replicated-scales"], indirect=True)
@pytest.mark.parametrize("layout", ["masked", "compact"])
@pytest.mark.parametrize(("view", "skewed"), [("auto", False), ("staged", True)])
def test_deep_gemm_on_views_gpu(
    block_fp8: list[dict[str, torch.Tensor]], view: Any, skewed: bool, layout: str, scales: None
) -> None:
    pytest.importorskip("deep_gemm")
    compare(block_fp8, deep_gemm(QWEN, layout=layout), QWEN, view, skewed)


def test_deep_gemm_against_float64_gpu(block_fp8: list[dict[str, torch.Tensor]]) -> None:
    pytest.importorskip("deep_gemm")
    case = make_case(QWEN, 64)
    exact = reference("fp8-block", case, block_fp8[0])
    errors = {
        layout: relative_error(deep_gemm(QWEN, layout=layout)(case, block_fp8[0]), exact)
        for layout in ("masked", "compact")
    }
    print(f"block-FP8, 64 tokens: DeepGEMM {errors}")  # noqa: T201
    assert max(errors.values()) < 5e-2


class Mxfp4:
    """SGLang's MXFP4 method on Hopper, without the model around it: what it makes of a checkpoint's experts, and its
    runner."""

    def __init__(self, shape: Shape) -> None:
        from sglang.srt.layers.moe.moe_runner.base import MoeRunnerConfig
        from sglang.srt.layers.moe.moe_runner.runner import MoeRunner
        from sglang.srt.layers.moe.utils import MoeRunnerBackend
        from sglang.srt.layers.quantization.mxfp4 import Mxfp4MoEMethod

        self._config = MoeRunnerConfig(
            num_experts=shape.num_experts,
            num_local_experts=shape.num_experts,
            hidden_size=shape.hidden,
            intermediate_size_per_partition=shape.inter,
            layer_id=0,
            top_k=shape.top_k,
            params_dtype=torch.bfloat16,
            gemm1_alpha=ALPHA,
            gemm1_clamp_limit=LIMIT,
            layer=SimpleNamespace(moe_tp_size=1, moe_tp_rank=0, moe_ep_size=1, moe_ep_rank=0),
        )
        self._method = Mxfp4MoEMethod.__new__(Mxfp4MoEMethod)
        self._method._use_sm90_humming = False
        self._method._padded_intermediate = -(-shape.inter // 128) * 128
        self._method._padded_hidden = -(-shape.hidden // 128) * 128
        self._method.runner = MoeRunner(MoeRunnerBackend.FLASHINFER_MXFP4, self._config)

    def prepare(self, experts: Experts) -> dict[str, torch.Tensor]:
        """Experts as `make` gives them ([gate; up]), after loading; as many of them as there are."""
        layer = torch.nn.Module()
        layer.moe_runner_config = SimpleNamespace(gate_up_interleaved=False, gemm1_alpha=ALPHA, gemm1_clamp_limit=LIMIT)
        layer.num_local_experts = len(experts["w13"])
        for key, attribute in (("13", "w13"), ("2", "w2")):
            for kind, name in (("w", "weight"), ("s", "weight_scale"), ("b", "weight_bias")):
                parameter = torch.nn.Parameter(experts[f"{kind}{key}"].clone(), requires_grad=False)
                layer.register_parameter(f"{attribute}_{name}", parameter)
        self._method._process_weights_for_sm90_cutlass(layer)
        renamed = {"w13_weight": "w13", "w2_weight": "w2"}  # weights begin with w for `PlainLayer`, others do not
        return {renamed.get(name, f"x_{name}"): value.data for name, value in layer.named_parameters()}

    def run(self, case: Case, tensors: Experts) -> torch.Tensor:
        from sglang.srt.layers.moe.token_dispatcher.standard import StandardDispatchOutput
        from sglang.srt.layers.moe.topk import StandardTopKOutput

        layer = SimpleNamespace(w13_weight=tensors["w13"], w2_weight=tensors["w2"])
        vars(layer).update({name.removeprefix("x_"): value for name, value in tensors.items() if name[0] == "x"})
        given = StandardDispatchOutput(case.x, None, StandardTopKOutput(case.weights, case.ids, None))
        result: torch.Tensor = self._method._apply_sm90_cutlass(layer, given).hidden_states
        return result


@pytest.fixture(scope="module")
def mxfp4() -> tuple[Mxfp4, list[dict[str, torch.Tensor]]]:
    from sglang.srt.environ import envs

    from sglang_dwdp.support import flashinfer_modules

    if not flashinfer_modules.ready("mxfp4"):
        pytest.skip("needs `python kernels/build.py --format mxfp4`")
    flashinfer_modules.install()
    envs.SGLANG_FLASHINFER_MOE_FUSED_FINALIZE.set(False)  # its atomics give other bits in each call
    return Mxfp4(GPT_OSS), [make("mxfp4", GPT_OSS, seed) for seed in range(3)]


def test_mxfp4_experts_are_prepared_one_by_one_gpu(mxfp4: tuple[Mxfp4, list[dict[str, torch.Tensor]]]) -> None:
    """So a rank may prepare its shard by itself, and shards together are what all experts would have become."""
    layer, checkpoint = mxfp4
    whole = layer.prepare(checkpoint[0])
    parts = [
        layer.prepare({name: tensor[first:last] for name, tensor in checkpoint[0].items()})
        for first, last in ((0, 11), (11, 22), (22, 32))
    ]
    assert set(whole) >= {"w13", "w2", "x_w13_weight_scale", "x_w2_weight_bias", "x_swiglu_limit"}
    for name, tensor in whole.items():
        assert len(tensor) == 32
        assert torch.equal(torch.cat([part[name] for part in parts]), tensor)


@pytest.mark.parametrize("scales", [0, 8 << 20], ids=["shared-scales", "replicated-scales"], indirect=True)
@pytest.mark.parametrize(("view", "skewed"), [("auto", False), ("staged", True)])
def test_mxfp4_on_views_gpu(
    mxfp4: tuple[Mxfp4, list[dict[str, torch.Tensor]]], view: Any, skewed: bool, scales: None
) -> None:
    layer, checkpoint = mxfp4
    full = [layer.prepare(experts) for experts in checkpoint]
    compare(full, layer.run, GPT_OSS, view, skewed)


def test_mxfp4_against_float64_gpu(mxfp4: tuple[Mxfp4, list[dict[str, torch.Tensor]]]) -> None:
    layer, checkpoint = mxfp4
    case = make_case(GPT_OSS, 64)
    error = relative_error(layer.run(case, layer.prepare(checkpoint[0])), reference("mxfp4", case, checkpoint[0]))
    print(f"MXFP4, 64 tokens: SGLang's layer on FlashInfer {error:.2e}")  # noqa: T201
    assert error < 5e-2
