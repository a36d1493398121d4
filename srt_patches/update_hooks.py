"""SGLang's calls that update weights, or check them: `updates.WeightUpdates` does what they ask for."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from sglang.srt.managers import io_struct
from sglang.srt.plugins.hook_registry import HookType

from sglang_dwdp.errors import DwdpUpdateError
from sglang_dwdp.srt_patches.hooks import Hook
from sglang_dwdp.srt_patches.loading import load_and_check
from sglang_dwdp.srt_patches.staged_model import StagedModel
from sglang_dwdp.srt_patches.updates import NOT_TAKEN, Outcome, current_updates
from sglang_dwdp.support.models import changed_sizes


def from_disk(
    original: Callable[..., Outcome],
    updater: Any,
    model_path: str,
    load_format: str,
    weight_name_filter: Any = None,
    recapture_cuda_graph: bool = False,
) -> Outcome:
    """Around `WeightUpdater.update_weights_from_disk`. Graphs are not captured again: addresses stay what they are."""
    model, runner, config = updater.get_model(), updater.get_model_runner(), updater.model_config
    before = config.model_path, runner.load_config

    def load(staged: StagedModel) -> Outcome:
        # Some of SGLang's loaders cut tensors that are too large, or fill up those that are too small.
        changed = changed_sizes(*map(_config_json, (before[0], model_path)))
        if changed:
            return False, f"{model_path} is a model of another size: {', '.join(changed)}"
        if weight_name_filter is None:
            staged.mark(lambda name: name.endswith((".weight", ".bias")))
            vars(model)["load_weights"] = functools.partial(_load_once, model.load_weights, model)
        try:
            return original(updater, model_path, load_format, weight_name_filter)
        finally:
            vars(model).pop("load_weights", None)

    outcome = current_updates().at_once(load)
    if not outcome[0]:
        config.model_path = before[0]
        if runner.load_config is not before[1]:
            path, load_config = before
            updater.update_model_fields(
                model, model_path=path, load_format=load_config.load_format, load_config=load_config
            )
    return outcome


def _config_json(model_path: str) -> dict[str, Any]:
    """What a checkpoint's config.json says; nothing where it is not in a folder of this host."""
    try:
        found: dict[str, Any] = json.loads((Path(model_path) / "config.json").read_text())
    except OSError:
        return {}
    return found


def _load_once(load_weights: Callable[..., Any], model: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
    try:
        return load_and_check(load_weights, model, *args, **kwargs)
    except Exception:
        # SGLang loads again, to roll back. There is nothing to roll back: the model serves other memory.
        vars(model)["load_weights"] = lambda *_args, **_kwargs: None
        raise


@dataclass(frozen=True, slots=True)
class Unreadable:
    """In place of tensors that did not arrive on this rank: its peers have to hear of it where they wait for it."""

    failure: Exception


def receive(original: Callable[..., Any], receiver: Any, *args: Any, **kwargs: Any) -> Any:
    """Around `WeightUpdater.receive_weights_from_distributed` and `TpModelWorker.deserialize_own_rank`."""
    try:
        return original(receiver, *args, **kwargs)
    except Exception as failure:  # noqa: BLE001  (told to the peers by `load_bucket`)
        return Unreadable(failure)


def load_bucket(original: Callable[..., Outcome], updater: Any, *args: Any, **kwargs: Any) -> Outcome:
    """Around `WeightUpdater.update_weights_from_tensor` and `load_weights_from_distributed`."""

    def run() -> Outcome:
        for given in (*args, *kwargs.values()):
            if isinstance(given, Unreadable):
                raise given.failure
        return original(updater, *args, **kwargs)

    return current_updates().in_session(run)


def reject_ipc(_updater: Any, _request: Any) -> Outcome:
    """In place of `WeightUpdater.update_weights_from_ipc`."""
    return False, (
        "update_weights_from_ipc is unsupported with --enable-dwdp. Use update_weights_from_disk, _from_tensor or "
        "_from_distributed."
    )


def restore(original: Callable[..., None], updater: Any) -> None:
    """Around `WeightUpdater.begin_weight_update`, which undoes what was done to weights after loading."""

    def run() -> Outcome:
        original(updater)
        return True, ""

    current_updates().in_session(run)


def finish(original: Callable[..., None], updater: Any, *, run_post_load: bool) -> None:
    """Around `WeightUpdater.end_weight_update`, which does it to the new ones."""

    def run() -> Outcome:
        original(updater, run_post_load=run_post_load)
        return True, ""

    current_updates().in_session(run)


def begin(original: Callable[..., Any], manager: Any, request: Any) -> Any:
    """Around `SchedulerWeightUpdaterManager.begin_weight_update`."""
    if manager._session is None:
        try:
            current_updates().open()
        except DwdpUpdateError as error:
            return io_struct.BeginWeightUpdateReqOutput(success=False, message=str(error))
    return original(manager, request)


def defer(original: Callable[..., Any], manager: Any, request: Any) -> Any:
    """Around `SchedulerWeightUpdaterManager.update_weights_from_tensor` and `_from_distributed`: what follows an update
    follows its end, since the old weights serve until then."""
    flush, version = request.flush_cache, request.weight_version
    request.flush_cache, request.weight_version = False, None
    try:
        return original(manager, request)
    finally:
        request.flush_cache, request.weight_version = flush, version
        current_updates().note(request)


def end(original: Callable[..., Any], manager: Any, request: Any) -> Any:
    """Around `SchedulerWeightUpdaterManager.end_weight_update`: the new weights are taken."""
    is_open = manager._session is not None
    answer = original(manager, request)
    if not is_open:
        return answer
    try:
        last = current_updates().close()
    except DwdpUpdateError as error:
        return io_struct.EndWeightUpdateReqOutput(success=False, message=f"{NOT_TAKEN}{error}")
    if last is None:
        return answer
    manager.record_weight_version_after_update(last.weight_version)
    success, message = manager.flush_cache_after_weight_update(last, answer.success, answer.message)
    return io_struct.EndWeightUpdateReqOutput(success=success, message=message)


def check_weights(original: Callable[..., Any], runner: Any, action: str, *args: Any, **kwargs: Any) -> Any:
    """Around `ModelRunner.check_weights`: of the experts, a rank looks at those that it stores.

    Raises:
        DwdpUpdateError: Tensors could not be reset.
    """
    updates = current_updates()
    if action != "reset_tensors":
        with updates.show(copied=action == "snapshot").loading():
            return original(runner, action, *args, **kwargs)

    def reset(_staged: StagedModel) -> Outcome:
        original(runner, action, *args, **kwargs)
        return True, ""

    is_reset, message = updates.at_once(reset)
    if not is_reset:
        raise DwdpUpdateError(message)
    return None


_UPDATER = "sglang.srt.model_executor.model_runner_components.weight_updater.WeightUpdater"
_MANAGER = "sglang.srt.managers.scheduler_components.weight_updater.SchedulerWeightUpdaterManager"
HOOKS = (
    Hook(f"{_UPDATER}.update_weights_from_disk", HookType.AROUND, from_disk),
    Hook(f"{_UPDATER}.update_weights_from_tensor", HookType.AROUND, load_bucket),
    Hook(f"{_UPDATER}.load_weights_from_distributed", HookType.AROUND, load_bucket),
    Hook(f"{_UPDATER}.receive_weights_from_distributed", HookType.AROUND, receive),
    Hook("sglang.srt.managers.tp_worker.TpModelWorker.deserialize_own_rank", HookType.AROUND, receive),
    Hook(f"{_UPDATER}.update_weights_from_ipc", HookType.REPLACE, reject_ipc),
    Hook(f"{_UPDATER}.begin_weight_update", HookType.AROUND, restore),
    Hook(f"{_UPDATER}.end_weight_update", HookType.AROUND, finish),
    Hook(f"{_MANAGER}.begin_weight_update", HookType.AROUND, begin),
    Hook(f"{_MANAGER}.update_weights_from_tensor", HookType.AROUND, defer),
    Hook(f"{_MANAGER}.update_weights_from_distributed", HookType.AROUND, defer),
    Hook(f"{_MANAGER}.end_weight_update", HookType.AROUND, end),
    Hook("sglang.srt.model_executor.model_runner.ModelRunner.check_weights", HookType.AROUND, check_weights),
)
