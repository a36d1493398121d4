"""What a checkpoint lacks, or has twice, is an error before experts are shared, whatever the loader."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE

from sglang_dwdp.errors import DwdpSetupError
from sglang_dwdp.experts.placement import balanced
from sglang_dwdp.srt_patches import loading
from sglang_dwdp.srt_patches.loading import check_loaded, construct, load, load_fused

EXPERTS, HIDDEN, WIDTH = 5, 8, 6
OWN = balanced(EXPERTS, 2).shard(1)
TEXT = SimpleNamespace(num_experts=8)
MODEL_CONFIG = SimpleNamespace(
    hf_config=SimpleNamespace(architectures=["Model"]), hf_text_config=TEXT, is_draft_model=False
)


class Moe(FusedMoE):
    """A layer with the parameters of one rank's shard, and nothing else of FusedMoE."""

    def __init__(self, layer_id: int) -> None:
        torch.nn.Module.__init__(self)
        self.layer_id = layer_id
        for name, shape in {"w13_weight": (2 * WIDTH, HIDDEN), "w2_weight": (HIDDEN, WIDTH)}.items():
            setattr(self, name, torch.nn.Parameter(torch.empty(len(OWN), *shape), requires_grad=False))
        self.w13_scale = torch.nn.Parameter(torch.ones(len(OWN), 2), requires_grad=False)

    @property
    def num_global_routed_experts(self) -> int:
        return EXPERTS

    def take(self, name: str, expert: int, shard: str, value: torch.Tensor) -> None:
        """As SGLang's loader: experts of other ranks are passed over."""

        def original(_layer: Any, param: Any, loaded: torch.Tensor, _name: str, shard_id: str, number: int) -> None:
            if number in OWN:
                rows = param.data[number - OWN.start]
                half = len(rows) // 2
                {"w1": rows[:half], "w3": rows[half:], "w2": rows}[shard_id].copy_(loaded)

        load(original, self, getattr(self, name), value, name, shard, expert)


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(tie_word_embeddings=False)
        self.norm = torch.nn.LayerNorm(HIDDEN)
        self.qkv = torch.nn.Parameter(torch.empty(4, HIDDEN), requires_grad=False)
        self.k_scale = torch.nn.Parameter(torch.tensor(-1.0), requires_grad=False)
        self.moe = torch.nn.ModuleList([Moe(0), Moe(1)])

    def load_weights(self, weights: Iterator[Callable[[Model], None]]) -> None:
        for write in weights:
            write(self)


class Drafting(Model):
    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = torch.nn.Linear(HIDDEN, HIDDEN, bias=False)


def checkpoint() -> dict[str, Callable[[Model], None]]:
    """By name, what writes a tensor of the checkpoint into a model."""

    def expert(layer: int, name: str, number: int, shard: str, *shape: int) -> Callable[[Model], None]:
        return lambda model: model.moe[layer].take(name, number, shard, torch.ones(*shape))

    weights: dict[str, Callable[[Model], None]] = {
        "norm.weight": lambda model: model.norm.weight.data.fill_(1),
        "norm.bias": lambda model: model.norm.bias.data.fill_(0),
        "qkv": lambda model: model.qkv.data.fill_(1),
    }
    for layer in range(2):
        for number in range(EXPERTS):
            for shard, shape in (("w1", (WIDTH, HIDDEN)), ("w3", (WIDTH, HIDDEN)), ("w2", (HIDDEN, WIDTH))):
                name = "w2_weight" if shard == "w2" else "w13_weight"
                weights[f"{layer}.{number}.{shard}"] = expert(layer, name, number, shard, *shape)
            for shard in ("w1", "w3"):
                weights[f"{layer}.{number}.{shard}.scale"] = expert(layer, "w13_scale", number, shard, 1)
    return weights


@pytest.fixture(autouse=True)
def rank_1_of_2(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "placement_of", lambda _layer: balanced(EXPERTS, 2))
    monkeypatch.setattr(loading, "rank_in_group", lambda: 1)
    monkeypatch.setattr(loading, "check_constructed", lambda _model, **_how: None)


def constructed(load_format: str = "auto") -> Model:
    model = construct(lambda *_: Model(), MODEL_CONFIG, SimpleNamespace(load_format=load_format))
    assert isinstance(model, Model)
    return model


def test_a_complete_checkpoint() -> None:
    model = constructed()
    with pytest.raises(DwdpSetupError, match="did not come through its load_weights"):
        check_loaded(model)
    model.load_weights(iter(checkpoint().values()))
    check_loaded(model)
    assert "load_weights" not in vars(model)
    assert model.k_scale == -1  # a constructor's value, which checkpoints may leave out
    assert not [name for name in vars(model.moe[0]) if name == loading._ARRIVALS]


@pytest.mark.parametrize("name", [name for name in checkpoint() if name[2:3] == "" or not name[2].isdigit()])
def test_any_other_tensor_that_is_missing_is_named(name: str) -> None:
    weights = checkpoint()
    del weights[name]
    with pytest.raises(DwdpSetupError, match=rf"Model do not fit together: {name} was not loaded"):
        constructed().load_weights(iter(weights.values()))


@pytest.mark.parametrize("shard", ["w1", "w2", "w3", "w1.scale", "w3.scale"])
def test_an_experts_tensor_that_is_missing_is_named(shard: str) -> None:
    parameter = "w13_scale" if "scale" in shard else "w2_weight" if shard == "w2" else "w13_weight"
    weights = checkpoint()
    del weights[f"1.{OWN[0]}.{shard}"]
    with pytest.raises(DwdpSetupError, match=f"layer 1, {parameter}: {shard[:2]} of experts {OWN[0]} did not arrive"):
        constructed().load_weights(iter(weights.values()))


@pytest.mark.parametrize("is_draft", [True, False])
def test_a_draft_model_gets_its_embedding_from_the_model_that_it_drafts_for(is_draft: bool) -> None:
    config = SimpleNamespace(**vars(MODEL_CONFIG) | {"is_draft_model": is_draft})
    model = construct(lambda *_: Drafting(), config, SimpleNamespace(load_format="auto"))
    if is_draft:
        model.load_weights(iter(checkpoint().values()))
        check_loaded(model)
    else:
        with pytest.raises(DwdpSetupError, match=r"embed_tokens\.weight was not loaded"):
            model.load_weights(iter(checkpoint().values()))


def test_experts_of_other_ranks_are_not_asked_for() -> None:
    weights = {name: write for name, write in checkpoint().items() if not name.startswith(("0.0", "1.0"))}
    constructed().load_weights(iter(weights.values()))


def test_a_layer_of_which_nothing_arrives() -> None:
    names = ", ".join(map(str, OWN))
    weights = {name: write for name, write in checkpoint().items() if not (name[0] == "1" and name.endswith("scale"))}
    with pytest.raises(DwdpSetupError, match=f"layer 1, w13_scale: w1 of experts {names} did not arrive"):
        constructed().load_weights(iter(weights.values()))


def test_an_expert_that_arrives_twice() -> None:
    weights = list(checkpoint().values())
    again = checkpoint()[f"0.{OWN[1]}.w2"]
    with pytest.raises(DwdpSetupError, match=f"layer 0, w2_weight: w2 of expert {OWN[1]} arrived 2 times"):
        constructed().load_weights(iter([*weights, again]))


def test_a_part_of_a_tensor_that_is_missing() -> None:
    """As with files that were saved for another layout: qkv of fewer heads."""
    weights = checkpoint()
    weights["qkv"] = lambda model: model.qkv.data[:2].fill_(1)
    with pytest.raises(DwdpSetupError, match=r"qkv was not loaded \(or not all of it\)"):
        constructed().load_weights(iter(weights.values()))


def test_all_experts_at_once() -> None:
    weights = {name: write for name, write in checkpoint().items() if ".w2" not in name}

    def fused(model: Model) -> None:
        for layer in model.moe:
            load_fused(
                lambda _layer, param, loaded, *_: param.data.copy_(loaded),
                layer,
                layer.w2_weight,
                torch.ones(len(OWN), HIDDEN, WIDTH),
                "w2_weight",
                "w2",
            )

    constructed().load_weights(iter([*weights.values(), fused]))
    with pytest.raises(DwdpSetupError, match="w2 of all experts arrived 2 times"):
        constructed().load_weights(iter([*weights.values(), fused, fused]))


def test_a_tensor_of_all_experts_is_loaded_in_part() -> None:
    moe, weight = Moe(0), torch.arange(EXPERTS * 7).view(EXPERTS, 7)
    param = torch.zeros(len(OWN), 7)
    seen: list[torch.Tensor] = []

    def original(_layer: Any, _param: Any, loaded: torch.Tensor, *_rest: Any) -> None:
        seen.append(loaded)

    load_fused(original, moe, param, weight, "w13_weight", "w13")
    load(original, moe, param, weight, "w13_weight", "w13", None)
    load(original, moe, param, weight, "w13_weight", "w1", 4)  # one expert, that has as many rows as there are experts
    assert torch.equal(seen[0], weight[OWN.start :])
    assert torch.equal(seen[1], weight[OWN.start :])
    assert seen[2] is weight


def test_an_lm_head_that_is_the_embedding_need_not_come() -> None:
    model = constructed()
    model.lm_head = torch.nn.Linear(2, 2, bias=False)
    loading.mark(model.lm_head.weight)
    assert [name.split()[0] for name in loading.unwritten(model) if "lm_head" in name] == ["lm_head.weight"]
    model.config.tie_word_embeddings = True
    assert not [name for name in loading.unwritten(model) if "lm_head" in name]


def test_many_errors_are_cut_short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "_NAMED", 2)
    with pytest.raises(DwdpSetupError, match=r"and \d+ more\. SGLang would serve"):
        constructed().load_weights(iter(()))


def test_the_dummy_format_fills_everything_by_itself() -> None:
    model = constructed("dummy")
    assert "load_weights" not in vars(model)
    check_loaded(model)
