"""What the resilient consumers have to know, checked before anything connects."""

from __future__ import annotations

import contextvars
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from streams.resilience.backoff import Backoff
from streams.resilience.failures import Retryable
from streams.resilience.options import ResilienceOptions
from streams.resilience.tuning import check_keys, get_optimized_consumer_config, get_optimized_producer_config

Topic = str | Sequence[str] | re.Pattern[str]
Handler = Callable[[Any], Any]
ErrorCallback = Callable[[BaseException, Any], Awaitable[None] | None]
Decoder = Callable[[bytes], Any]

#: What a consumer's configuration shares with the producer of its dead letters.
_CONNECTION = (
    "client_id",
    "security_protocol",
    "ssl_context",
    "sasl_mechanism",
    "sasl_plain_username",
    "sasl_plain_password",
    "sasl_kerberos_service_name",
    "sasl_kerberos_domain_name",
    "sasl_oauth_token_provider",
    "metadata_max_age_ms",
)


class KafkaUnavailable(Retryable):
    """No client could be created within the attempts that were allowed; the cause is the last one's failure."""


class NotDone(Retryable):
    """A handler returned False: its message comes again."""


class Undecodable(ValueError):
    """A key or a value that its decoder does not take."""


@dataclass(frozen=True, slots=True)
class ConsumerOptions:
    """Options of one resilient consumer; durations in seconds, sizes in bytes."""

    topics: tuple[str, ...]
    pattern: str | None
    group_id: str
    config: dict[str, Any]
    resilience: ResilienceOptions
    max_retries: int | None = None
    on_error_callback: ErrorCallback | None = None
    dead_letter_topic: str | None = None
    concurrency: int = 1
    decode_value: Decoder | None = None
    decode_key: Decoder | None = None
    batch_records: int = 2000
    commit_interval_seconds: float = 1.0
    connect_seconds: float = 60.0
    producer: dict[str, Any] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """The topics as log lines name them."""
        return self.pattern if self.pattern is not None else ",".join(self.topics)

    def retry_backoff(self) -> Backoff:
        """Return the backoff for a message that is to come again, and for what is away."""
        return self.resilience.infrastructure_backoff()

    def decode(self, record: Any) -> None:
        """Decode key and value of ``record`` in place; raises Undecodable, leaving it as it was."""
        value = record.value
        try:
            if self.decode_value is not None and value is not None:
                value = self.decode_value(value)
            if self.decode_key is not None and record.key is not None:
                record.key = self.decode_key(record.key)
        except Exception as exc:
            raise Undecodable(
                f"{record.topic}[{record.partition}] offset {record.offset}: does not decode "
                f"({type(exc).__name__}: {exc})"
            ) from exc
        record.value = value


#: Set within what runs code of the caller's, a handler or a callback: it may stop its own consumer, which must not wait
#: for it then.
inside_handler: contextvars.ContextVar[object] = contextvars.ContextVar("inside_handler", default=None)


def brokers(bootstrap_servers: str | Sequence[str]) -> list[str]:
    """Return ``bootstrap_servers`` as a list of ``host:port``; raises ValueError for what is no such thing."""
    parts = bootstrap_servers.split(",") if isinstance(bootstrap_servers, str) else list(bootstrap_servers)
    found = []
    for part in (part.strip() for part in parts):
        if not part:
            continue
        host, colon, port = part.rpartition(":")
        if not colon:
            host, port = part, "9092"
        if "://" in part or not host.strip("[]") or not port.isdigit() or not 0 < int(port) < 65536:
            raise ValueError(f"bootstrap_servers: {part!r} is not host:port (several are separated by commas)")
        found.append(f"{host}:{port}")
    if not found:
        raise ValueError(f"bootstrap_servers={bootstrap_servers!r} names no broker; give host:port, or a list of them")
    return found


def consumer_options(
    topic: Topic,
    group_id: str,
    bootstrap_servers: str | Sequence[str],
    *,
    auto_offset_reset: str,
    max_retries: int | None,
    base_delay: float,
    on_error_callback: ErrorCallback | None,
    raw: bool,
    dead_letter_topic: str | None,
    concurrency: int,
    max_delay: float,
    max_attempts: int,
    health_check_interval: float,
    stuck_after: float,
    drain_timeout: float,
    commit_interval: float,
    in_flight_bytes: int,
    overrides: Mapping[str, Any],
) -> ConsumerOptions:
    """Return checked options; raises ValueError or TypeError that names the argument, its value and what to give."""
    pattern = topic.pattern if isinstance(topic, re.Pattern) else None
    topics = () if pattern is not None else ((topic,) if isinstance(topic, str) else tuple(topic))  # type: ignore[arg-type]
    if pattern is None and (not topics or not all(isinstance(name, str) and name for name in topics)):
        raise ValueError(f"topic={topic!r}: give a name, a list of names or a compiled pattern")
    if dead_letter_topic is not None and dead_letter_topic in topics:
        raise ValueError(f"dead_letter_topic={dead_letter_topic!r} is a topic that is consumed; choose another one")
    if not group_id:
        raise ValueError("group_id is empty; commits need the name of a consumer group")
    for name, number, least in (
        ("base_delay", base_delay, 0),
        ("max_delay", max_delay, base_delay),
        ("concurrency", concurrency, 1),
        ("max_attempts", max_attempts, 1),
        ("max_retries", max_retries if max_retries is not None else 1, 1),
    ):
        if number < least:
            raise ValueError(f"{name}={number!r} is below {least}")
    for name, seconds in (("health_check_interval", health_check_interval), ("commit_interval", commit_interval)):
        if seconds <= 0:
            raise ValueError(f"{name}={seconds!r}: give seconds above 0")
    given = dict(overrides)
    if given.get("enable_auto_commit"):
        raise ValueError(
            "enable_auto_commit=True commits what no handler has seen yet; leave it out: what is handled is committed "
            "while consume_messages(commit_offset=True)"
        )
    decode_value = given.pop("value_deserializer", None) or (None if raw else msgspec.json.decode)
    decode_key = given.pop("key_deserializer", None)
    check_keys("consumer", given)
    servers = brokers(bootstrap_servers)
    batch_records = given.pop("max_poll_records", None) or 2000
    config = get_optimized_consumer_config(group_id, auto_offset_reset=auto_offset_reset, **given)
    config |= {"bootstrap_servers": servers, "enable_auto_commit": False}
    shared = {name: config[name] for name in _CONNECTION if name in config}
    return ConsumerOptions(
        topics=topics,
        pattern=pattern,
        group_id=group_id,
        config=config,
        resilience=ResilienceOptions(
            stage=group_id,
            dead_letter_topic=dead_letter_topic or "",
            in_flight_bytes=in_flight_bytes,
            drain_seconds=drain_timeout,
            max_attempts=max_attempts,
            attempt_base_seconds=min(0.1, base_delay),
            attempt_cap_seconds=min(2.0, max_delay),
            retry_base_seconds=base_delay,
            retry_cap_seconds=max_delay,
            health_interval_seconds=health_check_interval,
            stuck_seconds=stuck_after,
        ),
        max_retries=max_retries,
        on_error_callback=on_error_callback,
        dead_letter_topic=dead_letter_topic,
        concurrency=concurrency,
        decode_value=decode_value,
        decode_key=decode_key,
        batch_records=batch_records,
        commit_interval_seconds=commit_interval,
        producer=get_optimized_producer_config(**shared, bootstrap_servers=servers),
    )
