"""The resilience layer: ``ResilientTransport`` for any Faust app, and the names that services without Faust use.

Importing this package loads neither Faust, nor the settings, nor a Kafka client: each name is loaded when it is first
asked for. ``streams.resilience.sync`` has the helper functions for kafka-python and confluent-kafka clients.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from streams.resilience.adoption import ResilientTransport
    from streams.resilience.consumer_options import KafkaUnavailable
    from streams.resilience.consumers import AsyncResilientKafkaConsumer
    from streams.resilience.failures import Fatal, Poison, Rejected, Retryable
    from streams.resilience.helpers import (
        check_kafka_health,
        create_kafka_consumer,
        create_kafka_producer,
        get_kafka_cluster_info,
        is_consumer_healthy,
        publish_message,
        recreate_consumer_on_error,
        safe_kafka_commit,
        safe_kafka_poll,
        validate_bootstrap_servers,
    )
    from streams.resilience.threaded import ResilientKafkaConsumer
    from streams.resilience.tuning import get_optimized_consumer_config, get_optimized_producer_config

__all__ = [
    "AsyncResilientKafkaConsumer",
    "Fatal",
    "KafkaUnavailable",
    "Poison",
    "Rejected",
    "ResilientKafkaConsumer",
    "ResilientTransport",
    "Retryable",
    "check_kafka_health",
    "create_kafka_consumer",
    "create_kafka_producer",
    "get_kafka_cluster_info",
    "get_optimized_consumer_config",
    "get_optimized_producer_config",
    "is_consumer_healthy",
    "publish_message",
    "recreate_consumer_on_error",
    "safe_kafka_commit",
    "safe_kafka_poll",
    "validate_bootstrap_servers",
]

_ROOMS = {
    "AsyncResilientKafkaConsumer": "consumers",
    "ResilientKafkaConsumer": "threaded",
    "ResilientTransport": "adoption",
    "KafkaUnavailable": "consumer_options",
    "Fatal": "failures",
    "Poison": "failures",
    "Rejected": "failures",
    "Retryable": "failures",
    "get_optimized_consumer_config": "tuning",
    "get_optimized_producer_config": "tuning",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'streams.resilience' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"streams.resilience.{_ROOMS.get(name, 'helpers')}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
