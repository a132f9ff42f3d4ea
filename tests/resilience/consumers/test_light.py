"""What importing costs, and that names and numbers are where they should be."""

from __future__ import annotations

import importlib
import subprocess
import sys

import aiokafka
import pytest

import streams.resilience
from settings import broker_profile
from streams.resilience import (
    AsyncResilientKafkaConsumer,
    ResilientKafkaConsumer,
    get_optimized_consumer_config,
    get_optimized_producer_config,
    tuning,
)


def test_importing_is_light() -> None:
    """No name but that for Faust apps loads Faust or the settings; the package alone loads no client."""
    code = (
        "import sys, streams.resilience as r\n"
        "assert not {'aiokafka', 'faust', 'mode', 'settings'} & set(sys.modules), 'package'\n"
        "[getattr(r, name) for name in r.__all__ if name != 'ResilientTransport']\n"
        "import streams.resilience.sync\n"
        "bad = {'faust', 'mode', 'settings'} & set(sys.modules)\n"
        "assert not bad, bad\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_name_is_there() -> None:
    """Each name of the package can be imported; an unknown one is an AttributeError that says so."""
    for name in streams.resilience.__all__:
        assert callable(getattr(streams.resilience, name))
        assert name in dir(streams.resilience)
    with pytest.raises(AttributeError, match="nonsense"):
        _ = streams.resilience.nonsense
    sync = importlib.import_module("streams.resilience.sync")
    assert set(sync.__all__) <= set(streams.resilience.__all__)


def test_numbers_are_the_profile() -> None:
    """The tuned constants are those of the settings' profile `resilient`; compression alone is a choice of its own."""
    profile = broker_profile("resilient")
    pairs = {
        "SESSION_TIMEOUT_SECONDS": "session_timeout_seconds",
        "HEARTBEAT_INTERVAL_SECONDS": "heartbeat_interval_seconds",
        "REBALANCE_TIMEOUT_SECONDS": "rebalance_timeout_seconds",
        "REQUEST_TIMEOUT_SECONDS": "request_timeout_seconds",
        "MAX_POLL_INTERVAL_SECONDS": "max_poll_interval_seconds",
        "RECONNECT_BACKOFF_MAX_SECONDS": "reconnect_backoff_max_seconds",
        "METADATA_MAX_AGE_SECONDS": "metadata_max_age_seconds",
        "LINGER_SECONDS": "linger_seconds",
        "MAX_BATCH_BYTES": "max_batch_bytes",
        "FETCH_MAX_WAIT_SECONDS": "fetch_max_wait_seconds",
        "FETCH_MAX_BYTES": "fetch_max_bytes",
        "FETCH_PARTITION_MAX_BYTES": "fetch_partition_max_bytes",
    }
    assert {name: getattr(tuning, name) for name in pairs} == {
        name: getattr(profile, attribute) for name, attribute in pairs.items()
    }


async def test_aiokafka_takes_the_configuration() -> None:
    """aiokafka's own constructors take every key, and overrides win."""
    config = get_optimized_consumer_config("g", session_timeout_ms=45000)
    assert (config["session_timeout_ms"], config["heartbeat_interval_ms"]) == (45000, 30000)
    aiokafka.AIOKafkaConsumer(**config)
    aiokafka.AIOKafkaProducer(**get_optimized_producer_config())
    with pytest.raises(TypeError, match="no_such_thing"):
        get_optimized_consumer_config("g", no_such_thing=1)


# The keys that each client takes: kafka-python 3.0.12 (DEFAULT_CONFIG), librdkafka 2.12 (CONFIGURATION.md).
def test_other_clients_spell_differently() -> None:
    """The tuned values come in the named client's spelling; an unknown client is an error."""
    rdkafka = get_optimized_consumer_config("g", client="confluent-kafka", session_timeout_ms=1)
    assert rdkafka["group.id"] == "g"
    assert rdkafka["session.timeout.ms"] == 1
    assert rdkafka["reconnect.backoff.max.ms"] == 64000
    assert rdkafka["fetch.wait.max.ms"] == 100
    assert not any("_" in key for key in rdkafka)
    assert get_optimized_producer_config(client="confluent-kafka")["compression.type"] == "lz4"
    python = get_optimized_consumer_config("g", client="kafka-python")
    assert python["receive_buffer_bytes"] == 1024 * 1024
    assert "rebalance_timeout_ms" not in python
    with pytest.raises(ValueError, match="pykafka"):
        get_optimized_consumer_config("g", client="pykafka")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"topic": []}, "topic="),
        ({"topic": ""}, "topic="),
        ({"group_id": ""}, "group_id"),
        ({"bootstrap_servers": "localhost:x"}, "localhost:x"),
        ({"bootstrap_servers": ""}, "bootstrap_servers"),
        ({"bootstrap_servers": "kafka://h:1"}, "host:port"),
        ({"concurrency": 0}, "concurrency"),
        ({"max_retries": 0}, "max_retries"),
        ({"dead_letter_topic": "t"}, "dead_letter_topic"),
        ({"enable_auto_commit": True}, "enable_auto_commit"),
        ({"sesion_timeout_ms": 1}, "sesion_timeout_ms"),
    ],
)
def test_arguments_are_checked_first(change: dict[str, object], says: str) -> None:
    """What cannot be is refused before anything connects, with the argument's name."""
    arguments = {"topic": "t", "group_id": "g", "bootstrap_servers": "localhost:1", **change}
    for kind in (AsyncResilientKafkaConsumer, ResilientKafkaConsumer):
        with pytest.raises((ValueError, TypeError), match=says):
            kind(**arguments)  # type: ignore[arg-type]
