"""Every metric of Headrace, with its type, labels and meaning; ``GET /metrics`` shows them.

What a stage counts anyway (accounts, ledgers, clients) is read when somebody asks (:class:`StageCollector`), so that it
costs nothing per message.

=====================================  =========  ==================  =================================================
metric                                 type       labels              meaning
=====================================  =========  ==================  =================================================
headrace_received_total                counter    stage               messages received from Kafka
headrace_forwarded_total               counter    stage               messages handled, outputs acknowledged
headrace_dead_letters_total            counter    stage, class        messages that became dead letters
headrace_dropped_total                 counter    stage, reason,      messages that nothing comes of; ``intended`` says
                                                  intended            whether that was meant
headrace_returned_total                counter    stage               messages given back when a partition was revoked
headrace_in_flight                     gauge      stage               messages received and not complete
headrace_in_flight_bytes               gauge      stage               bytes of those
headrace_oldest_in_flight_seconds      gauge      stage               age of the oldest of those
headrace_lag                           gauge      stage, topic,       records between the committed offset and the end
                                                  partition
headrace_commits_total                 counter    stage               commits that the broker has taken
headrace_seconds_since_commit          gauge      stage               since the last commit that succeeded
headrace_assigned_partitions           gauge      stage               partitions that this worker holds
headrace_recreations_total             counter    stage               consumers and producers created anew
headrace_offset_resets_total           counter    stage               committed offsets that the log no longer had
headrace_guard_tripped                 gauge      stage               1 while the dead-letter guard has stopped a stage
headrace_retries_total                 counter    stage, class        handlers called again
headrace_rejected_values_total         counter    –                   values refused by validation
headrace_refused_messages_total        counter    reason              device messages refused as a whole
headrace_driver_slow_calls_total       counter    driver              calls longer than ``DRIVER_LIMIT_SECONDS``
headrace_driver_asides_total           counter    driver              times that a driver was set aside for being slow
headrace_handler_seconds               histogram  stage               time of one chunk in its handler
headrace_connector_acks_total          counter    connector           device messages acknowledged
headrace_connector_in_flight           gauge      connector           device messages received and not acknowledged
headrace_loop_delay_seconds            gauge      –                   how late the event loop ran its last check
=====================================  =========  ==================  =================================================
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from streams.resilience.accounts import INTENDED_DROPS

REGISTRY = CollectorRegistry()
RETRIES = Counter("headrace_retries", "Handlers called again", ["stage", "class"], registry=REGISTRY)
REJECTED_VALUES = Counter("headrace_rejected_values", "Values refused by validation", registry=REGISTRY)
REFUSED = Counter("headrace_refused_messages", "Device messages refused as a whole", ["reason"], registry=REGISTRY)
DRIVER_SLOW_CALLS = Counter(
    "headrace_driver_slow_calls", "Calls that took longer than DRIVER_LIMIT_SECONDS", ["driver"], registry=REGISTRY
)
DRIVER_ASIDES = Counter(
    "headrace_driver_asides", "Times that a driver was set aside for being slow", ["driver"], registry=REGISTRY
)
HANDLER_SECONDS = Histogram(
    "headrace_handler_seconds",
    "Time of one chunk in its handler",
    ["stage"],
    buckets=(0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100),
    registry=REGISTRY,
)
CONNECTOR_ACKS = Counter("headrace_connector_acks", "Device messages acknowledged", ["connector"], registry=REGISTRY)
CONNECTOR_IN_FLIGHT = Gauge(
    "headrace_connector_in_flight", "Device messages received, not acknowledged", ["connector"], registry=REGISTRY
)
LOOP_DELAY = Gauge("headrace_loop_delay_seconds", "How late the event loop ran its last check", registry=REGISTRY)


class StageCollector(Collector):
    """Reads the apps of a worker when somebody asks."""

    def __init__(self, apps: Callable[[], Iterable[Any]]) -> None:
        self._apps = apps

    def describe(self) -> Iterable[Metric]:
        """Describe nothing beforehand: what there is depends on the stages."""
        return []

    def collect(self) -> Iterable[Metric]:
        """Return the metrics of every stage as they are now."""
        counters = {
            name: CounterMetricFamily(f"headrace_{name}", text, labels=labels)
            for name, text, labels in (
                ("received", "Messages received from Kafka", ["stage"]),
                ("forwarded", "Messages handled, outputs acknowledged", ["stage"]),
                ("dead_letters", "Messages that became dead letters", ["stage", "class"]),
                ("dropped", "Messages that nothing comes of", ["stage", "reason", "intended"]),
                ("returned", "Messages given back on revocation", ["stage"]),
                ("recreations", "Clients created anew", ["stage"]),
                ("commits", "Commits that the broker has taken", ["stage"]),
                ("offset_resets", "Committed offsets that the log no longer had", ["stage"]),
            )
        }
        gauges = {
            name: GaugeMetricFamily(f"headrace_{name}", text, labels=labels)
            for name, text, labels in (
                ("in_flight", "Messages received and not complete", ["stage"]),
                ("in_flight_bytes", "Bytes received and not complete", ["stage"]),
                ("oldest_in_flight_seconds", "Age of the oldest message in flight", ["stage"]),
                ("lag", "Records between the committed offset and the end", ["stage", "topic", "partition"]),
                ("seconds_since_commit", "Since the last commit that succeeded", ["stage"]),
                ("assigned_partitions", "Partitions that this worker holds", ["stage"]),
                ("guard_tripped", "1 while the dead-letter guard has stopped a stage", ["stage"]),
            )
        }
        for app in self._apps():
            _collect_app(app, counters, gauges)
        return [*counters.values(), *gauges.values()]


def _collect_app(app: Any, counters: dict[str, Any], gauges: dict[str, Any]) -> None:
    accounts = app.accounts
    stage = accounts.stage
    counters["received"].add_metric([stage], accounts.received)
    counters["forwarded"].add_metric([stage], accounts.forwarded)
    counters["returned"].add_metric([stage], accounts.returned)
    counters["recreations"].add_metric([stage], accounts.recreations)
    counters["commits"].add_metric([stage], accounts.commits)
    counters["offset_resets"].add_metric([stage], accounts.offset_resets)
    for kind, count in accounts.dead_lettered.items():
        counters["dead_letters"].add_metric([stage, kind], count)
    for reason, count in accounts.dropped.items():
        counters["dropped"].add_metric([stage, reason, str(reason in INTENDED_DROPS).lower()], count)
    gauges["in_flight"].add_metric([stage], accounts.in_flight)
    gauges["guard_tripped"].add_metric([stage], float(app.guard.tripped is not None))
    consumer = app.typed_consumer
    if consumer is None:
        return
    now = time.monotonic()
    gauges["in_flight_bytes"].add_metric([stage], consumer.ledgers.in_flight_bytes)
    oldest = [span.delivered_at for _, ledger in consumer.ledgers.items() if (span := ledger.oldest_in_flight())]
    gauges["oldest_in_flight_seconds"].add_metric([stage], now - min(oldest) if oldest else 0.0)
    if consumer.last_commit_at is not None:
        gauges["seconds_since_commit"].add_metric([stage], now - consumer.last_commit_at)
    gauges["assigned_partitions"].add_metric([stage], len(app.assigned or ()))
    for tp, lag in consumer.lags().items():
        gauges["lag"].add_metric([stage, tp.topic, str(tp.partition)], lag)


def exposition() -> bytes:
    """Return all metrics in the Prometheus text format."""
    return generate_latest(REGISTRY)
