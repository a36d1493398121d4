"""Updates of a group of ranks, as SGLang's calls make them: one that fails anywhere changes nothing anywhere."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sglang_dwdp.config import DwdpConfig
from sglang_dwdp.errors import DwdpUpdateError
from sglang_dwdp.runtime import DwdpRuntime
from sglang_dwdp.srt_patches import update_hooks, updates
from sglang_dwdp.srt_patches.update_hooks import Unreadable, load_bucket
from sglang_dwdp.srt_patches.updates import WeightUpdates, check_format
from tests.fixtures.ranks import PlainLayer, checkpoint, run_ranks, visit

RANKS, EXPERTS = 2, 6


class Experts(torch.nn.Module):
    """A layer of `EXPERTS` experts, as FusedMoE has them: its shard first, and all of them when it is bound."""

    def __init__(self, shard: torch.Tensor) -> None:
        super().__init__()
        self.w = torch.nn.Parameter(shard, requires_grad=False)


class Layer(PlainLayer):
    """As `SglangLayer`."""

    def __init__(self, rank: int) -> None:
        super().__init__(3, checkpoint(1, EXPERTS, {"w": (40, 70)})[0], rank, RANKS)
        self.fused = Experts(self.tensors["w"])

    def bind(self, tensors: Mapping[str, torch.Tensor]) -> None:
        super().bind(tensors)
        self.use(tensors)

    def use(self, tensors: Mapping[str, torch.Tensor]) -> None:
        super().use(tensors)
        self.fused.w.data = tensors["w"]


class Model(torch.nn.Module):
    def __init__(self, experts: Experts) -> None:
        super().__init__()
        self.norm = torch.nn.LayerNorm(4).requires_grad_(requires_grad=False)
        self.experts = experts

    def load(self, value: float) -> tuple[bool, str]:
        """What a loader does: it fills this rank's experts, and everything else."""
        assert len(self.experts.w) == EXPERTS // RANKS
        self.experts.w.fill_(value)
        self.norm.weight.fill_(value)
        return True, "loaded"


Step = Callable[[int, WeightUpdates, Model, Callable[[], Any]], Any]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[[Step], list[Any]]:
    """Run something on all ranks: (rank, its updates, its model, what a forward sees)."""
    of_thread = threading.local()
    monkeypatch.setattr(updates, "get_parallel", lambda: of_thread.parallel)
    monkeypatch.setattr(updates, "as_loaded", lambda _module: nullcontext())
    secret = uuid.uuid4().hex

    def run_all(step: Step) -> list[Any]:
        def one(runtime: DwdpRuntime, layers: list[Any]) -> Any:
            of_thread.parallel = SimpleNamespace(tp_rank=runtime.rank, tp_size=RANKS, nnodes=1)
            model = Model(layers[0].fused)

            def seen() -> Any:
                def mean(layer: Any) -> float:
                    return float(layer.fused.w.float().mean())

                [direct], [staged] = (visit(runtime, layers, tokens, mean) for tokens in (1, 999))
                return direct if direct == staged else (direct, staged), float(model.norm.weight.mean())

            return step(runtime.rank, WeightUpdates(runtime, model, secret), model, seen)

        config = DwdpConfig(timeout_s=20)
        results = run_ranks(
            RANKS, checkpoint(1, EXPERTS, {"w": (40, 70)}), one, config, layers_of=lambda rank: [Layer(rank)]
        )
        for result in results:
            if isinstance(result, Exception):
                raise result
        return results

    return run_all


def test_all_ranks_take_what_all_could_load(run: Callable[[Step], list[Any]]) -> None:
    def step(_rank: int, own: WeightUpdates, model: Model, seen: Callable[[], Any]) -> Any:
        outcomes = [own.at_once(lambda _staged, value=value: model.load(value)) for value in (2.0, 3.0)]
        return outcomes, seen(), own.runtime.report()["weight_updates"]

    assert run(step) == [([(True, "loaded")] * 2, (3.0, 3.0), 2)] * RANKS


def test_none_takes_what_one_could_not_load(run: Callable[[Step], list[Any]]) -> None:
    def step(rank: int, own: WeightUpdates, model: Model, seen: Callable[[], Any]) -> Any:
        def load(_staged: Any) -> tuple[bool, str]:
            model.load(2.0)
            if rank == 1:
                raise OSError("disk\nis gone")
            return True, ""

        before = seen()
        is_taken, message = own.at_once(load)
        assert seen() == before
        return is_taken, message

    reason = f"{updates.NOT_TAKEN}rank 1: OSError: disk is gone"
    assert run(step) == [(False, reason)] * RANKS


def test_calls_of_a_session_are_one_update(run: Callable[[Step], list[Any]]) -> None:
    def step(_rank: int, own: WeightUpdates, model: Model, seen: Callable[[], Any]) -> Any:
        before = seen()
        own.open()
        for value in (2.0, 4.0):
            assert own.in_session(lambda value=value: model.load(value)) == (True, "loaded")
            assert seen() == before
        assert "another update was begun" in own.at_once(lambda _staged: model.load(9.0))[1]
        for flush, version in ((True, None), (False, "7"), (False, None)):
            own.note(SimpleNamespace(flush_cache=flush, weight_version=version))
        last = own.close()
        assert (last.flush_cache, last.weight_version) == (True, "7")
        return seen()

    assert run(step) == [(4.0, 4.0)] * RANKS


def test_a_call_that_fails_ends_its_session_only(
    run: Callable[[Step], list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    of_thread = threading.local()
    monkeypatch.setattr(update_hooks, "current_updates", lambda: of_thread.updates)

    def step(rank: int, own: WeightUpdates, model: Model, seen: Callable[[], Any]) -> Any:
        of_thread.updates, before = own, seen()
        assert "begin_weight_update() was not called" in own.in_session(lambda: model.load(2.0))[1]
        own.open()
        assert own.in_session(lambda: model.load(2.0))[0]
        tensors = Unreadable(IndexError("no tensors")) if rank == 0 else [1]
        said = [load_bucket(lambda *_: model.load(4.0), None, tensors) for _ in range(2)]
        assert all("rank 0: IndexError: no tensors" in message and not is_taken for is_taken, message in said)
        with pytest.raises(DwdpUpdateError, match="rank 0: IndexError"):
            own.close()
        assert seen() == before
        own.open()
        assert own.in_session(lambda: model.load(5.0))[0]
        own.close()
        return seen()

    assert run(step) == [(5.0, 5.0)] * RANKS


def test_formats() -> None:
    def model(**method: Any) -> torch.nn.Sequential:
        module = torch.nn.Linear(1, 1)
        name = method.pop("name")
        vars(module)["quant_method"] = type(name, (), method)()
        return torch.nn.Sequential(torch.nn.ReLU(), module)

    check_format(model(name="UnquantizedFusedMoEMethod"))
    check_format(model(name="Fp8MoEMethod", block_quant=True))
    interleaved = model(name="UnquantizedFusedMoEMethod")
    vars(interleaved[1])["w13_swiglu_interleaved"] = True
    for unsupported in (interleaved, model(name="Fp8MoEMethod", block_quant=False), model(name="Mxfp4MoEMethod")):
        with pytest.raises(DwdpUpdateError, match=r"unsupported with --enable-dwdp for \w+ \(1\)"):
            check_format(unsupported)
