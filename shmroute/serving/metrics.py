"""What a server counts, and what its runtime does, for Prometheus."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from shmroute.runtime import Runtime
from shmroute.serving.crew import Crew
from shmroute.serving.pager_keeper import PagerKeeper

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100)
"""Bounds of the histograms' buckets."""


class ServerMetrics:
    """Counters of requests, and a collector of what others count."""

    def __init__(self, crew: Crew, keeper: PagerKeeper, runtime: Runtime) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_Collector(crew, keeper, runtime))
        self._requests = Counter(
            "shmroute_requests", "HTTP requests to the model", ["route", "status"], registry=self._registry
        )
        self._tokens = Counter("shmroute_tokens", "Tokens of finished requests", ["of"], registry=self._registry)
        self._first = Histogram(
            "shmroute_time_to_first_token_seconds", "From a request to its first token", buckets=SECONDS,
            registry=self._registry,
        )  # fmt: skip
        self._duration = Histogram(
            "shmroute_request_seconds", "From a request to its end", buckets=SECONDS, registry=self._registry
        )

    def first_token(self, seconds: float) -> None:
        """A request's first token came."""
        self._first.observe(seconds)

    def done(self, route: str, status: int | str, usage: dict[str, int], seconds: float) -> None:
        """A request ended; the status is HTTP's, or what became of a stream."""
        self._requests.labels(route, str(status)).inc()
        self._tokens.labels("prompt").inc(usage["prompt_tokens"])
        self._tokens.labels("answer").inc(usage["completion_tokens"])
        self._duration.observe(seconds)

    def text(self) -> bytes:
        """In Prometheus' text format."""
        result: bytes = generate_latest(self._registry)
        return result


class _Collector:
    """Reads what crew, pager and runtime count, when asked."""

    def __init__(self, crew: Crew, keeper: PagerKeeper, runtime: Runtime) -> None:
        self._crew, self._keeper, self._runtime = crew, keeper, runtime

    def collect(self) -> Iterator[Any]:
        crew, runtime = self._crew, self._runtime
        metrics = runtime.metrics()
        total, pager = metrics.total.counters, metrics.pager.counters
        resident = sum(len(runtime.resident(layer)) for layer in range(runtime.config.num_layers))
        gauges = {
            "shmroute_workers_ready": ("Workers that have loaded the model", crew.ready),
            "shmroute_jobs_running": ("Choices that a worker is at", crew.running),
            "shmroute_jobs_waiting": ("Choices for which no worker is free", crew.waiting),
            "shmroute_experts_resident": ("Experts in slots", resident),
            "shmroute_slots": ("Experts that the slots may hold", runtime.config.slots),
        }
        counters = {
            "shmroute_worker_deaths": ("Workers that died", crew.counters.deaths),
            "shmroute_retries": ("Choices given to another worker", crew.counters.retries),
            "shmroute_pager_restarts": ("Pagers started after the death of one", self._keeper.restarts),
            "shmroute_routing_hits": ("Chosen experts that were resident when routed", total["hits"]),
            "shmroute_routing_misses": ("Chosen experts that were not", total["misses"]),
            "shmroute_expert_waits": ("Leases that had to wait for a load", total["waits"]),
            "shmroute_pager_loads": ("Experts loaded", pager["loads"]),
            "shmroute_pager_evictions": ("Experts evicted", pager["evictions"]),
            "shmroute_pager_bytes_read": ("Bytes of experts read", pager["bytes_read"]),
        }
        for name, (help_text, value) in gauges.items():
            yield GaugeMetricFamily(name, help_text, value=value)
        for name, (help_text, value) in counters.items():
            yield CounterMetricFamily(name, help_text, value=value)
