"""A second set of a model's weights, on the host: what is loaded goes there, and the served ones stay as they are.

Loaders write to a model's parameters in place, in as many calls as they like, and may fail in the middle. Here they
find memory of the host instead. What they leave there is written to the served tensors in one go, whose addresses do
not change, so CUDA graphs stay valid. It takes as much host memory as the rank's weights, and none of the GPU's.

Nothing here knows SGLang.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from sglang_dwdp.errors import DwdpUpdateError
from sglang_dwdp.support.unwritten import mark

Holder = dict[str, Any]  # what a module keeps tensors in: parameters, buffers, or plain attributes


@dataclass(slots=True)
class _Entry:
    """A tensor of the model.

    Attributes:
        name: the first of its names.
        tensor: what modules hold.
        staged: its new content, on the host.
        is_expert: it is of a rank's shard, and another part writes it.
        holders: where it is held, with its name there; several times where weights are tied.
    """

    name: str
    tensor: torch.Tensor
    staged: torch.Tensor
    is_expert: bool
    holders: list[tuple[Holder, str]] = field(default_factory=list)

    @property
    def is_parameter(self) -> bool:
        return isinstance(self.tensor, torch.nn.Parameter)


def _tensors_of(module: torch.nn.Module) -> Iterator[tuple[Holder, str, torch.Tensor]]:
    for holder in (module._parameters, module._buffers, vars(module)):
        for name, tensor in holder.items():
            derived = holder is module._buffers and name in module._non_persistent_buffers_set
            if isinstance(tensor, torch.Tensor) and not tensor.is_meta and not derived:
                yield holder, name, tensor


class StagedModel:
    """New weights of a model, which begin as a copy of those that it serves.

    Args:
        model: what serves.
        experts: this rank's shard of the experts, on the host, by module and name of the tensor in it. The model holds
            tensors of all experts in their place.
        as_loaded: what a module with experts has to run in while it has the shard.
        experts_only: leave all other tensors as they are: they are looked at, and not loaded.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        experts: Mapping[torch.nn.Module, Mapping[str, torch.Tensor]],
        as_loaded: Callable[[torch.nn.Module], AbstractContextManager[None]],
        *,
        experts_only: bool = False,
    ) -> None:
        self._model, self._modules, self._as_loaded = model, list(experts), as_loaded
        self._entries: dict[int, _Entry] = {}
        for path, module in model.named_modules():
            shard = experts.get(module, {})
            for holder, name, tensor in _tensors_of(module):
                if experts_only and name not in shard:
                    continue
                entry = self._entries.get(id(tensor))
                if entry is None:
                    staged = shard[name] if name in shard else tensor.detach().to("cpu", copy=True)
                    entry = _Entry(f"{path}.{name}", tensor, staged, name in shard)
                    self._entries[id(tensor)] = entry
                entry.holders.append((holder, name))

    @contextmanager
    def loading(self) -> Iterator[None]:
        """The model holds the new weights meanwhile, on the host.

        Raises:
            DwdpUpdateError: what ran here made or removed tensors of the model.
        """
        served = [(entry, entry.tensor.data) for entry in self._entries.values()]
        known = {(id(holder), name) for module in self._model.modules() for holder, name, _ in _tensors_of(module)}
        changed: list[str] = []
        with ExitStack() as stack:
            for module in self._modules:
                stack.enter_context(self._as_loaded(module))
            try:
                for entry, _ in served:
                    entry.tensor.data = entry.staged
                yield
            finally:
                for path, module in self._model.named_modules():
                    for holder, name, _ in list(_tensors_of(module)):
                        if (id(holder), name) not in known:
                            del holder[name]
                            changed.append(f"{path}.{name}")
                for entry, data in served:
                    held = [holder.get(name) for holder, name in entry.holders]
                    changed += [entry.name] if any(tensor is None for tensor in held) else []
                    staged = next((tensor for tensor in held if tensor is not None), entry.tensor)
                    entry.staged = staged.data
                    entry.tensor.data = data
                    for holder, name in entry.holders:
                        holder[name] = entry.tensor
        if changed:
            raise DwdpUpdateError(f"loading changes which tensors the model has: {', '.join(changed[:4])}")

    def mark(self, is_wanted: Callable[[str], bool]) -> None:
        """Mark the parameters of these names, experts apart, for `unwritten.has_marks` to tell what was not loaded."""
        for entry in self._entries.values():
            if entry.is_parameter and not entry.is_expert and is_wanted(entry.name):
                mark(entry.staged)

    def experts(self, module: torch.nn.Module) -> dict[str, torch.Tensor]:
        """The new experts of a module, `[len(shard), …]` by tensor name."""
        holders = (module._parameters, module._buffers, vars(module))
        return {
            name: entry.staged
            for entry in self._entries.values()
            if entry.is_expert
            for holder, name in entry.holders
            if any(holder is own for own in holders)
        }

    def check(self) -> None:
        """Check that the new weights can take the place of the served ones, experts apart.

        Raises:
            DwdpUpdateError: their shapes or dtypes differ.
        """
        for entry in self._entries.values():
            new, old = entry.staged, entry.tensor.data
            if not entry.is_expert and (new.dtype, new.shape) != (old.dtype, old.shape):
                raise DwdpUpdateError(
                    f"{entry.name} is served as {old.dtype} {tuple(old.shape)}, not as {new.dtype} {tuple(new.shape)}"
                )

    def write(self) -> None:
        """Write the new weights over the served ones, experts apart."""
        for entry in self._entries.values():
            if entry.is_expert:
                continue
            old = entry.tensor.data
            # What is no parameter may be a view of one, which loading a copy of it has not changed.
            if entry.is_parameter or not torch.equal(old.cpu(), entry.staged.cpu()):
                old.copy_(entry.staged)
