"""New weights while a server serves: all ranks take them between the same two forwards, or none does.

SGLang's loaders write to the model in place. Here they write to a copy on the host (`staged_model`), and all ranks meet
before anything that forwards read is changed (`experts.update`). Tensors that come in several calls, between
`begin_weight_update` and `end_weight_update`, are taken when the last has come; the old weights serve until then.
`update_hooks.py` has the calls of SGLang that lead here.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from sglang.srt.runtime_context import get_parallel

from sglang_dwdp.errors import DwdpError, DwdpUpdateError
from sglang_dwdp.experts.update import agree
from sglang_dwdp.memory.handshake import Exchange
from sglang_dwdp.runtime import DwdpRuntime
from sglang_dwdp.srt_patches.experts import as_loaded
from sglang_dwdp.srt_patches.loading import forget_arrivals
from sglang_dwdp.srt_patches.staged_model import StagedModel

logger = logging.getLogger(__name__)
_IN_BLOCKS = ("Fp8LinearMethod", "Fp8MoEMethod")
_SUPPORTED = ("UnquantizedLinearMethod", "UnquantizedFusedMoEMethod", "UnquantizedEmbeddingMethod", "Fp8KVCacheMethod")
NOT_TAKEN = "The new weights were not taken, and the old ones serve on: "

Outcome = tuple[bool, str]


class WeightUpdates:
    """The updates of one scheduler's weights.

    Args:
        runtime: Of the target model.
        model: That model.
        secret: What only the ranks of this server know.
        has_draft: Whether another model drafts for it, whose weights would have to follow: no update is taken.
    """

    def __init__(self, runtime: DwdpRuntime, model: torch.nn.Module, secret: str, *, has_draft: bool = False) -> None:
        self.runtime, self._has_draft = runtime, has_draft
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
            DwdpUpdateError: One did not come in time, or the server is on several hosts.
        """
        parallel = get_parallel()
        if parallel.nnodes > 1:
            raise DwdpUpdateError(
                "ranks on several hosts cannot take new weights or release memory. Restart the server."
            )
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
        return StagedModel(self._model, self._by_module(self.runtime.weights.read()), as_loaded)

    def show(self, *, copied: bool) -> StagedModel:
        """What this rank stores, in place of tensors of all experts. Nothing must be written.

        Args:
            copied: On the host, and not where it lies: for copies, which must not touch the memory of two GPUs.
        """
        experts = self.runtime.weights.read() if copied else self.runtime.weights.view()
        return StagedModel(self._model, self._by_module(experts), as_loaded, experts_only=True)

    def _by_module(self, experts: Sequence[Mapping[str, torch.Tensor]]) -> dict[Any, Mapping[str, torch.Tensor]]:
        layers: list[Any] = self.runtime.weights.layers()
        return {layer.fused: tensors for layer, tensors in zip(layers, experts, strict=True)}

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
            layers: list[Any] = self.runtime.weights.layers()
            new = [staged.experts(layer.fused) for layer in layers]
            try:
                staged.check()
                self.runtime.weights.check(new)
            except DwdpUpdateError as failure:
                error = str(failure)
        with self.meeting() as exchange:
            agree(exchange, error)
            assert staged is not None
            start = time.perf_counter()
            self.runtime.weights.update(exchange, new, staged.write)
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
            self._check()
            staged = self.stage()
            with staged.loading():
                is_loaded, message = load(staged)
        except Exception as failure:  # noqa: BLE001  (loaders fail in any way)
            is_loaded, message = False, described(failure)
        forget_arrivals(self._model)
        try:
            self.commit(staged, None if is_loaded else message)
        except DwdpUpdateError as failure:
            return False, f"{NOT_TAKEN}{failure}"
        return True, message

    def _check(self) -> None:
        if self._has_draft:
            raise DwdpUpdateError(
                "updating weights is unsupported with --speculative-algorithm. Restart the server with the new weights."
            )
        check_format(self._model)

    def open(self) -> None:
        """Begin an update in several calls; all ranks call this.

        Raises:
            DwdpUpdateError: A rank cannot.
        """
        self._error, self._last = None, None
        try:
            self._check()
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
            return False, f"{NOT_TAKEN}{self._error or 'begin_weight_update() was not called'}"
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
            return False, f"{NOT_TAKEN}{failure} End this update with end_weight_update()."
        return True, message

    def note(self, request: Any) -> None:
        """Keep what a call of the open session asks for beside its weights, with what calls before it asked for."""
        if self._last is not None:
            request.flush_cache = request.flush_cache or self._last.flush_cache
            request.weight_version = request.weight_version or self._last.weight_version
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
                "can be updated, without SGLANG_OPT_FUSE_SWIGLU_INTERLEAVED. Restart the server with the new weights."
            )


_current: list[WeightUpdates] = []  # of this process: none, or one


def set_up(runtime: DwdpRuntime, model: torch.nn.Module, secret: str, *, has_draft: bool) -> None:
    """Let this scheduler's weights be updated."""
    _current[:] = [WeightUpdates(runtime, model, secret, has_draft=has_draft)]


def current_updates() -> WeightUpdates:
    """Those of this process."""
    return _current[0]
