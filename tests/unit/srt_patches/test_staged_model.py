"""Loading beside what is served: nothing of the model changes before it is written, and addresses never do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from sglang_dwdp.errors import DwdpUpdateError
from sglang_dwdp.srt_patches.staged_model import StagedModel
from sglang_dwdp.support.unwritten import has_marks


class Experts(torch.nn.Module):
    """4 experts, of which this rank stores two."""

    def __init__(self) -> None:
        super().__init__()
        self.w = torch.nn.Parameter(torch.arange(8.0).view(4, 2), requires_grad=False)
        self.scale = torch.ones(4)
        self.count = 4


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(3, 3)
        self.head = torch.nn.Linear(3, 3, bias=False)
        self.head.weight = self.linear.weight  # tied
        self.experts = Experts()
        self.register_buffer("bias", torch.zeros(3))
        self.register_buffer("table", torch.zeros(5), persistent=False)
        self.derived = self.linear.weight.detach() * 2
        self.alias = self.linear.weight.detach().t()
        self.requires_grad_(False)

    def load(self, value: float) -> None:
        self.linear.weight.fill_(value)
        self.derived.copy_(self.linear.weight * 2)
        self.bias.fill_(value)
        self.experts.w[1].fill_(value)


@contextmanager
def as_loaded(module: Any) -> Iterator[None]:
    module.count = 2
    yield
    module.count = 4


@pytest.fixture
def model() -> Model:
    return Model()


@pytest.fixture
def staged(model: Model) -> StagedModel:
    shard = {"w": model.experts.w[2:].clone(), "scale": model.experts.scale[2:].clone()}
    return StagedModel(model, {model.experts: shard}, as_loaded)


def state(model: Model) -> list[Any]:
    tensors = [*model.parameters(), *model.buffers(), model.derived, model.alias, model.experts.scale]
    return [(id(tensor), tensor.data_ptr(), tensor.tolist()) for tensor in tensors]


def test_nothing_changes_before_it_is_written(model: Model, staged: StagedModel) -> None:
    before = state(model)
    for value in (1.0, 2.0):
        with staged.loading():
            assert model.experts.w.shape == (2, 2)
            assert model.experts.scale.shape == (2,)
            assert model.experts.count == 2
            model.load(value)
            assert model.head.weight[0, 0] == value
        assert state(model) == before
        assert model.experts.count == 4


def test_what_was_loaded_is_written_where_it_is_served(model: Model, staged: StagedModel) -> None:
    before = state(model)
    with staged.loading():
        model.load(3.0)
    with staged.loading():
        model.linear.bias.fill_(4.0)
    staged.check()
    staged.write()
    assert [entry[:2] for entry in state(model)] == [entry[:2] for entry in before]
    assert model.linear.weight.unique().tolist() == [3.0]
    assert model.linear.bias.unique().tolist() == [4.0]
    assert model.derived.unique().tolist() == [6.0]
    assert model.alias.unique().tolist() == [3.0]  # a view of the weight, of which a copy was not loaded
    assert model.bias.unique().tolist() == [3.0]
    assert model.experts.w.tolist() == torch.arange(8.0).view(4, 2).tolist()  # others write these
    new = staged.experts(model.experts)
    assert new["w"].tolist() == [[4.0, 5.0], [3.0, 3.0]]
    assert new["scale"].tolist() == [1.0, 1.0]


def test_parameters_that_loading_replaces(model: Model, staged: StagedModel) -> None:
    """As post-processing of a weight format may."""
    before = state(model)
    with staged.loading():
        model.linear.weight = torch.nn.Parameter(torch.full((3, 3), 5.0), requires_grad=False)
        model.experts.w = torch.nn.Parameter(model.experts.w * 0, requires_grad=False)
    assert state(model) == before
    staged.write()
    assert model.linear.weight.unique().tolist() == [5.0]
    assert staged.experts(model.experts)["w"].tolist() == [[0.0, 0.0], [0.0, 0.0]]


def test_other_tensors_are_rejected(model: Model, staged: StagedModel) -> None:
    before = state(model)
    with pytest.raises(DwdpUpdateError, match=r"which tensors the model has: .*linear\.extra"), staged.loading():
        model.linear.extra = torch.zeros(1)
    with pytest.raises(DwdpUpdateError, match=r"which tensors the model has: .*linear\.bias"), staged.loading():
        del model.linear.bias
    assert state(model) == before
    assert not hasattr(model.linear, "extra")


def test_other_shapes_are_rejected(model: Model, staged: StagedModel) -> None:
    with staged.loading():
        model.linear.weight = torch.nn.Parameter(torch.zeros(3, 4), requires_grad=False)
    with pytest.raises(DwdpUpdateError, match=r"linear\.weight is served as .*\(3, 3\), not as .*\(3, 4\)"):
        staged.check()


def test_a_load_that_fails(model: Model, staged: StagedModel) -> None:
    before = state(model)

    def load() -> None:
        model.load(7.0)
        raise OSError("disk")

    with pytest.raises(OSError, match="disk"), staged.loading():
        load()
    assert state(model) == before


def test_marks(model: Model, staged: StagedModel) -> None:
    staged.mark(lambda name: name.endswith("weight"))
    with staged.loading():
        assert has_marks(model.linear.weight)
        assert not has_marks(model.linear.bias)
        model.load(1.0)
        assert not has_marks(model.linear.weight)
    assert not has_marks(model.linear.weight)


def test_experts_alone(model: Model) -> None:
    """A rank shows what it stores, and all else as it is."""
    before, shard = state(model), model.experts.w.detach()[2:]
    shown = StagedModel(model, {model.experts: {"w": shard}}, as_loaded, experts_only=True)
    weight = model.linear.weight.data_ptr()
    with shown.loading():
        assert model.experts.w.data_ptr() == shard.data_ptr()
        assert model.linear.weight.data_ptr() == weight
    assert state(model) == before
