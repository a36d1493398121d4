"""DWDP's counters among SGLang's metrics (--enable-metrics), and in its line on each prefill and some decode steps.

Nothing is added to a forward: counters are read where SGLang publishes its own.
"""

from __future__ import annotations

from typing import Any

from sglang.srt.plugins.hook_registry import HookType

from sglang_dwdp.counters import SETUP, WAIT_BUCKETS_S, WAITS, Growth, Report, log_part, reported
from sglang_dwdp.runtime import DwdpRuntime
from sglang_dwdp.srt_patches.forward import current_runtime
from sglang_dwdp.srt_patches.hooks import Hook


class Exporter:
    """This rank's counters, with the labels of SGLang's scheduler metrics.

    Args:
        collector: SGLang's `SchedulerMetricsCollector`, which may bring classes of its own, as Ray's.
        runtime: Whose counters these are.
    """

    def __init__(self, collector: Any, runtime: DwdpRuntime) -> None:
        # Not at the top: SGLang first says in which folder its processes share their metrics.
        from prometheus_client import Counter, Gauge, Histogram

        self._runtime = runtime
        self._growth = Growth()
        counter, gauge = collector._counter_cls or Counter, collector._gauge_cls or Gauge
        histogram = collector._histogram_cls or Histogram
        labels, report = collector.labels, self._report()
        self._counters: list[tuple[Any, str, float]] = []
        for metric in reported(report):
            names = [*labels, metric.label] if metric.label else [*labels]
            family = counter(name=f"sglang:{metric.name}", documentation=metric.help, labelnames=names)
            for value, key in metric.keys.items():
                own = {metric.label: value} if metric.label else {}
                self._counters.append((family.labels(**labels, **own), key, metric.unit))
        self._waits = _family(histogram, WAITS, labels, buckets=WAIT_BUCKETS_S)
        _family(gauge, SETUP, labels, multiprocess_mode="mostrecent").set(report["setup_s"])

    def publish(self) -> None:
        """Add what the counters grew by since the last call."""
        grown = self._growth.take(self._report())
        for counter, key, unit in self._counters:
            if grown[key]:
                counter.inc(grown[key] * unit)
        for seconds in self._runtime.take_waits():
            self._waits.observe(seconds)

    def _report(self) -> Report:
        report = dict(self._runtime.report())
        if not self._runtime.config.audit:
            del report["bytes_read_in_place"]  # nobody counts them
        return report


def _family(kind: Any, name_and_help: tuple[str, str], labels: dict[str, Any], **options: Any) -> Any:
    name, text = name_and_help
    return kind(name=f"sglang:{name}", documentation=text, labelnames=[*labels], **options).labels(**labels)


def publish(_result: None, collector: Any, *_args: Any, **_kwargs: Any) -> None:
    """After `SchedulerMetricsCollector.emit_constants` (at start) and `log_stats`."""
    if not hasattr(collector, "dwdp_exporter"):
        collector.dwdp_exporter = Exporter(collector, current_runtime())
    collector.dwdp_exporter.publish()


_logged = Growth()


def add_part(parts: list[str], _stats: Any) -> list[str]:
    """After `PoolStats.get_prefill_usage_msg_parts` and `get_decode_usage_msg_parts`, of which SGLang's line is made:
    forwards since the last line."""
    return [*parts, log_part(_logged.take(current_runtime().report()))]


_COLLECTOR = "sglang.srt.observability.metrics_collector.SchedulerMetricsCollector"
_POOLS = "sglang.srt.managers.scheduler_components.pool_stats_observer.PoolStats"
HOOKS = (
    Hook(f"{_COLLECTOR}.emit_constants", HookType.AFTER, publish),
    Hook(f"{_COLLECTOR}.log_stats", HookType.AFTER, publish),
    Hook(f"{_POOLS}.get_prefill_usage_msg_parts", HookType.AFTER, add_part),
    Hook(f"{_POOLS}.get_decode_usage_msg_parts", HookType.AFTER, add_part),
)
