"""New weights while a server serves: `update_weights_from_disk`, `_from_tensor` and `_from_distributed`.

SGLang's loaders write to the model in place. Here they write to a copy on the host (`staged_model`), and all ranks meet
before anything that forwards read is changed (`experts.update`): either all of them take the new weights, between the
same two forwards, or none. Tensors that come in several calls, between `begin_weight_update` and `end_weight_update`,
are taken when the last has come; the old weights serve until then.
"""

from __future__ import annotations

import functools
import json
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from sglang.srt.managers import io_struct
from sglang.srt.plugins.hook_registry import HookType
from sglang.srt.runtime_context import get_parallel

from sglang_dwdp.errors import DwdpError, DwdpUpdateError
from sglang_dwdp.experts.update import agree
from sglang_dwdp.memory.handshake import Exchange
from sglang_dwdp.runtime import DwdpRuntime
from sglang_dwdp.srt_patches.experts import as_loaded
from sglang_dwdp.srt_patches.hooks import Hook
from sglang_dwdp.srt_patches.loading import forget_arrivals, load_and_check
from sglang_dwdp.srt_patches.staged_model import StagedModel
from sglang_dwdp.support.models import changed_sizes

logger = logging.getLogger(__name__)
_IN_BLOCKS = ("Fp8LinearMethod", "Fp8MoEMethod")
_SUPPORTED = ("UnquantizedLinearMethod", "UnquantizedFusedMoEMethod", "UnquantizedEmbeddingMethod", "Fp8KVCacheMethod")
_REFUSED = "The new weights were not taken, and the old ones serve on: "

Outcome = tuple[bool, str]


class WeightUpdates:
    """The updates of one scheduler's weights.

    Args:
        runtime: Of the target model.
        model: That model.
        secret: What only the ranks of this server know.
    """

    def __init__(self, runtime: DwdpRuntime, model: torch.nn.Module, secret: str) -> None:
        self.runtime = runtime
        self._model, self._secret = model, f"{secret}.weights"
        self._count = 0
        self._seconds = 0.0
        self._session: StagedModel | None = None
        self._error: str | None = None  # of the open session
        self._last: Any = None  # the open session's last request, for what SGLang does after an update
        runtime.add_part(self._report, lambda: None)

    def _report(self) -> dict[str, int | float | str]:
        return {"weight_updates": self._count, "weight_update_s": round(self._seconds, 3)}

    @contextmanager
    def meeting(self, *, of_group: bool = False) -> Iterator[Exchange]:
        """All ranks of the server, or those of this rank's group, between two forwards of each.

        Raises:
            DwdpUpdateError: One did not come in time.
        """
        parallel = get_parallel()
        secret, rank, size = self._secret, int(parallel.tp_rank), int(parallel.tp_size)
        if of_group:
            group, rank, size = rank // self.runtime.size, self.runtime.rank, self.runtime.size
            secret = f"{secret}.{group}"
        exchange = Exchange(secret, rank, size, self.runtime.config.timeout_s)
        try:
            exchange.connect()
        except DwdpError as error:
            exchange.fail(str(error))
            exchange.close()
            raise DwdpUpdateError(str(error)) from error
        try:
            yield exchange
        finally:
            exchange.close()

    def stage(self) -> StagedModel:
        """A copy of this rank's weights, on the host."""
        layers: list[Any] = self.runtime.layers()
        experts = {layer.fused: tensors for layer, tensors in zip(layers, self.runtime.read_experts(), strict=True)}
        return StagedModel(self._model, experts, as_loaded)

    def agree(self, error: str | None) -> None:
        """Hear from all ranks whether they have an error.

        Raises:
            DwdpUpdateError: One has.
        """
        with self.meeting() as exchange:
            agree(exchange, error)

    def commit(self, staged: StagedModel | None, error: str | None) -> None:
        """Take the staged weights, if no rank has an error; all ranks call this.

        Raises:
            DwdpUpdateError: One has; no rank has taken anything.
            DwdpRuntimeError: A rank was lost when some had written: the server has to end.
        """
        new: list[dict[str, torch.Tensor]] = []
        if staged is not None and error is None:
            layers: list[Any] = self.runtime.layers()
            new = [staged.experts(layer.fused) for layer in layers]
            try:
                staged.check()
                self.runtime.check_experts(new)
            except DwdpUpdateError as failure:
                error = str(failure)
        with self.meeting() as exchange:
            agree(exchange, error)
            assert staged is not None
            start = time.perf_counter()
            self.runtime.update_experts(exchange, new, staged.write)
        self._count += 1
        self._seconds = time.perf_counter() - start
        logger.info(
            "DWDP: all ranks have new weights; no forward ran for %.3f s while they were written", self._seconds
        )

    def at_once(self, load: Callable[[StagedModel], Outcome]) -> Outcome:
        """An update in one call.

        Args:
            load: Loads the weights; they are taken if it succeeds on all ranks.
        """
        staged: StagedModel | None = None
        try:
            if self._session is not None:
                raise DwdpUpdateError("another update was begun; end it with end_weight_update()")
            check_format(self._model)
            staged = self.stage()
            with staged.loading():
                is_loaded, message = load(staged)
        except Exception as failure:  # noqa: BLE001  (loaders fail in any way)
            is_loaded, message = False, described(failure)
        forget_arrivals(self._model)
        try:
            self.commit(staged, None if is_loaded else message)
        except DwdpUpdateError as failure:
            return False, f"{_REFUSED}{failure}"
        return True, message

    def open(self) -> None:
        """Begin an update in several calls; all ranks call this.

        Raises:
            DwdpUpdateError: A rank cannot.
        """
        self._error, self._last = None, None
        try:
            check_format(self._model)
            self._session = self.stage()
        except Exception as failure:  # noqa: BLE001  (the host may be out of memory, for instance)
            self._error = described(failure)
        try:
            self.agree(self._error)
        except DwdpUpdateError:
            self._session = None
            raise

    def in_session(self, run: Callable[[], Outcome]) -> Outcome:
        """A call of the open session, which works on the new weights; all ranks call this."""
        if self._error is not None or self._session is None:
            return False, f"{_REFUSED}{self._error or 'begin_weight_update() was not called'}"
        try:
            with self._session.loading():
                is_done, message = run()
        except Exception as failure:  # noqa: BLE001  (loaders fail in any way)
            is_done, message = False, described(failure)
        forget_arrivals(self._model)
        try:
            self.agree(None if is_done else message)
        except DwdpUpdateError as failure:
            self._error = str(failure)
            return False, f"{_REFUSED}{failure} End this update with end_weight_update()."
        return True, message

    def note(self, request: Any) -> None:
        """Keep what a call of the open session asks for beside its weights."""
        self._last = request

    def close(self) -> Any:
        """Take the open session's weights; all ranks call this.

        Returns:
            The session's last request; None if there was none.

        Raises:
            DwdpUpdateError: A rank cannot, or a call failed.
        """
        staged, self._session = self._session, None
        error, self._error = self._error, None
        if error is not None:  # all ranks know
            raise DwdpUpdateError(error)
        self.commit(staged, None)
        return self._last


def described(failure: BaseException) -> str:
    """An error in one line."""
    return " ".join(f"{type(failure).__name__}: {failure}".split())


def check_format(model: torch.nn.Module) -> None:
    """Check that what SGLang does with this model's weights after loading can be done again.

    Raises:
        DwdpUpdateError: A weight format is unsupported.
    """
    for name, module in model.named_modules():
        method = getattr(module, "quant_method", None)
        kind = type(method).__name__
        in_blocks = kind in _IN_BLOCKS and bool(getattr(method, "block_quant", False))
        # Done a second time to experts that an update leaves alone, and nothing undoes it.
        is_interleaved = bool(getattr(module, "w13_swiglu_interleaved", False))
        if is_interleaved or (method is not None and not in_blocks and kind not in _SUPPORTED):
            raise DwdpUpdateError(
                f"updating weights is unsupported with --enable-dwdp for {kind} ({name}): plain and block-FP8 weights "
                "can be updated, if SGLANG_OPT_FUSE_SWIGLU_INTERLEAVED is not set. Restart the server with the new weights."
            )


_current: list[WeightUpdates] = []  # of this process: none, or one


def set_up(runtime: DwdpRuntime, model: torch.nn.Module, secret: str) -> None:
    """Let this scheduler's weights be updated."""
    _current[:] = [WeightUpdates(runtime, model, secret)]


def current_updates() -> WeightUpdates:
    """Those of this process."""
    return _current[0]


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
        return io_struct.EndWeightUpdateReqOutput(success=False, message=f"{_REFUSED}{error}")
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
        with updates.stage().loading():
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
