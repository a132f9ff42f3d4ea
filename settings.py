"""Every setting of Headrace, declared once: variable, type, unit, default, bounds, help.

Guarantees: the environment is read here and nowhere else; a :class:`Settings` that exists is valid, each value within
its bounds and all of them in agreement; what is wrong is reported all at once (:class:`SettingsError`), with the
variable, the value found and what is allowed, and never with a secret in it.

An attribute's variable is its name in capitals (those of :class:`BrokerProfile` have ``KAFKA_`` before it). An empty
variable counts as unset. Durations are seconds, sizes are bytes or ``512KiB``, ``1MiB``, ``2GiB``. A default of two
values is that of profile ``resilient`` and that of profile ``fast``. ``docs/settings.md`` is made from these
declarations, and a new setting is one more of them: that one place is why this file is longer than others.
"""

# ruff: noqa: RUF009  (a declaration is a call of _setting, which returns a dataclasses.field)
from __future__ import annotations

import dataclasses
import functools
import ipaddress
import os
import re
import ssl
import zoneinfo
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Generic, NamedTuple, TypeVar
from urllib.parse import unquote, urlsplit

T = TypeVar("T")
KIB: Final = 1024
MIB: Final = 1024 * KIB
STAGES: Final = ("mqtt", "coap", "normalizer", "ingestor", "caching", "alarms", "mailer", "commands")
PROFILES: Final = ("resilient", "fast")
MASK: Final = "***"


class Problem(NamedTuple):
    """One thing that is wrong: the variable, what was found (secrets masked), what is allowed."""

    variable: str
    found: str
    allowed: str

    def __str__(self) -> str:
        return f"{self.variable}={self.found}: allowed is {self.allowed}"


class SettingsError(Exception):
    """The environment holds settings that cannot be used; ``problems`` names every one of them."""

    def __init__(self, problems: list[Problem]) -> None:
        self.problems = tuple(problems)
        lines = "\n".join(f"  {problem}" for problem in problems)
        super().__init__(f"{len(problems)} setting(s) cannot be used; see docs/settings.md:\n{lines}")


class Address(NamedTuple):
    """Where a server listens."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def loopback(self) -> bool:
        """Whether nobody but this machine can reach it."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"


class Endpoint(NamedTuple):
    """The parts of a service's URL; user and password are unquoted, the port is the scheme's where none is given."""

    scheme: str
    host: str
    port: int
    username: str | None
    password: str | None
    path: str


_DEFAULT_PORTS: Final = {
    "mqtt": 1883,
    "mqtts": 8883,
    "smtp": 25,
    "smtp+starttls": 587,
    "smtps": 465,
    "redis": 6379,
    "rediss": 6379,
    "postgresql": 5432,
    "postgres": 5432,
    "http": 80,
    "https": 443,
}


def endpoint(url: str) -> Endpoint:
    """Take ``url`` apart. Raises ValueError for a port that is none."""
    parts = urlsplit(url)
    return Endpoint(
        scheme=parts.scheme,
        host=parts.hostname or "",
        port=parts.port or _DEFAULT_PORTS.get(parts.scheme, 0),
        username=None if parts.username is None else unquote(parts.username),
        password=None if parts.password is None else unquote(parts.password),
        path=parts.path,
    )


def masked(url: str) -> str:
    """Return ``url`` without its secrets: the password, and what stands in the query under a name like one."""
    hidden = re.sub(r"(://[^/?#]*?:)[^/?#]*@", rf"\g<1>{MASK}@", url)
    return re.sub(r"([?&](?:password|token|secret)=)[^&#]*", rf"\g<1>{MASK}", hidden, flags=re.IGNORECASE)


# --- kinds of values --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Kind(Generic[T]):
    """A type of setting: ``parse`` raises ValueError for what ``allowed`` doesn't describe."""

    name: str
    allowed: str
    parse: Callable[[str], T]
    unit: str = ""


def _number(low: float, high: float, unit: str, name: str = "number") -> Kind[float]:
    def parse(text: str) -> float:
        value = float(text)
        if not low <= value <= high:  # NaN fails every comparison
            raise ValueError(text)
        return value

    return Kind(name, f"a number from {low:.10g} to {high:.10g}{' ' + unit if unit else ''}", parse, unit)


def _seconds(low: float, high: float) -> Kind[float]:
    return _number(low, high, "s", "duration")


def _count(low: int, high: int, unit: str = "") -> Kind[int]:
    def parse(text: str) -> int:
        value = int(text)
        if not low <= value <= high:
            raise ValueError(text)
        return value

    return Kind("integer", f"a whole number from {low} to {high}", parse, unit)


_SIZE_UNITS: Final = {"": 1, "B": 1, "KIB": KIB, "MIB": MIB, "GIB": 1024 * MIB}


def human_size(size: int) -> str:
    """Write a number of bytes as the settings take it."""
    for unit, name in ((1024 * MIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")):
        if size and size % unit == 0:
            return f"{size // unit}{name}"
    return str(size)


def _size(low: int, high: int) -> Kind[int]:
    def parse(text: str) -> int:
        match = re.fullmatch(r"(\d+)\s*([a-zA-Z]*)", text)
        if match is None or (unit := _SIZE_UNITS.get(match[2].upper())) is None:
            raise ValueError(text)
        value = int(match[1]) * unit
        if not low <= value <= high:
            raise ValueError(text)
        return value

    return Kind("size", f"bytes or a number of KiB, MiB, GiB, from {human_size(low)} to {human_size(high)}", parse, "B")


def _choice(*names: str, fold: Callable[[str], str] = str.lower) -> Kind[str]:
    def parse(text: str) -> str:
        value = fold(text)
        if value not in names:
            raise ValueError(text)
        return value

    return Kind("choice", "one of " + ", ".join(names), parse)


def _text(pattern: str, allowed: str) -> Kind[str]:
    def parse(text: str) -> str:
        if re.fullmatch(pattern, text) is None:
            raise ValueError(text)
        return text

    return Kind("text", allowed, parse)


def _list(item: Callable[[str], str], allowed: str) -> Kind[tuple[str, ...]]:
    def parse(text: str) -> tuple[str, ...]:
        parts = (part.strip() for part in text.split(","))
        return tuple(dict.fromkeys(item(part) for part in parts if part))

    return Kind("list", allowed, parse)


def _url(*schemes: str, hostless: bool = False) -> Kind[str]:
    def parse(text: str) -> str:
        if not text:
            return text
        target = endpoint(text)
        if target.scheme not in schemes or re.search(r"[\s\x00-\x1f]", text) or not (target.host or hostless):
            raise ValueError(text)
        return text

    return Kind("URL", " or ".join(f"{scheme}://{'…' if hostless else 'host…'}" for scheme in schemes), parse)


def _address(text: str) -> Address:
    host, colon, port = text.rpartition(":")
    if not colon or not host or (":" in host) != (host[0] == "[" and host[-1] == "]"):
        raise ValueError(text)
    number = int(port)
    if not 0 <= number <= 65535 or re.search(r"[\s/@]", host):
        raise ValueError(text)
    return Address(host.strip("[]"), number)


def _server(text: str) -> str:
    address = _address(text if re.search(r":\d+$", text) else f"{text}:9092")
    if not address.port:
        raise ValueError(text)
    return str(address)


def _servers(text: str) -> tuple[str, ...]:
    found = _list(_server, "").parse(text)
    if not found:
        raise ValueError(text)
    return found


def _mqtt_filter(text: str) -> str:
    levels = text.split("/")
    # A filter of wildcards alone would bring back the commands that Headrace itself publishes.
    if all(level in ("#", "+") for level in levels) or levels[0].startswith("$"):
        raise ValueError(text)
    if "#" in levels[:-1] or any(len(level) > 1 and set(level) & set("#+\x00") for level in levels):
        raise ValueError(text)
    return text


def _stage(text: str) -> str:
    if text not in STAGES:
        raise ValueError(text)
    return text


def _stages(text: str) -> tuple[str, ...]:
    chosen = _list(_stage, "").parse(text)
    return tuple(stage for stage in STAGES if stage in chosen or not chosen)


def _zone(text: str) -> str:
    zoneinfo.ZoneInfo(text)  # ZoneInfoNotFoundError is a KeyError
    return text


def _file(text: str) -> Path | None:
    if not text:
        return None
    with Path(text).open("rb"):
        return Path(text)


_FLAGS: Final = {
    "true": True,
    "yes": True,
    "1": True,
    "on": True,
    "false": False,
    "no": False,
    "0": False,
    "off": False,
}

_FLAG: Final = Kind("flag", "true or false", lambda text: _FLAGS[text.lower()])
_FILE: Final = Kind("file", "a file that can be read", _file)
_FOLDER: Final = Kind("folder", "a path", lambda text: Path(text).expanduser())
_BIND: Final = Kind("address", "host:port, [ipv6]:port", _address)
_ANY: Final = _text(r"[^\x00-\x1f]*", "text without control characters")
_NAME: Final = _text(r"[a-zA-Z0-9._-]{1,100}", "letters, digits, '.', '_' and '-', at most 100")
_PREFIX: Final = _text(r"[a-zA-Z0-9._-]{0,100}", "letters, digits, '.', '_' and '-', at most 100")
_MAILBOX: Final = _text(r"[^\s@<>,;:\"]+@[^\s@<>,;:\"]+|[^\r\n<>@]+<[^\s@<>,;]+@[^\s@<>,;]+>", "a mail address")


# --- declarations -----------------------------------------------------------------------------------------------------


class Declaration(NamedTuple):
    """What is known of one setting. ``defaults`` holds one text, or one for each of :data:`PROFILES`."""

    variable: str
    attribute: str
    section: str
    kind: Kind[Any]
    defaults: tuple[str, ...]
    help: str
    secret: bool

    def default(self, profile: str) -> str:
        """Return the default's text under ``profile``."""
        return self.defaults[PROFILES.index(profile)] if len(self.defaults) > 1 else self.defaults[0]

    def shown(self, text: str) -> str:
        """Return ``text`` as it may be shown: no secret, no password of a URL."""
        if not text:
            return "(empty)"
        return MASK if self.secret else masked(text)


def _setting(
    section: str, default: str | tuple[str, str], kind: Kind[T], text: str, *, secret: bool = False, prefix: str = ""
) -> T:
    """Declare one setting; to mypy it is a value of its type, to ``dataclasses`` a field without default."""
    defaults = (default,) if isinstance(default, str) else default
    metadata = {"section": section, "kind": kind, "defaults": defaults, "help": text, "secret": secret}
    declared: T = dataclasses.field(metadata=metadata | {"prefix": prefix})
    return declared


_PROFILE: Final = "Broker profile"
_both = functools.partial(_setting, _PROFILE, prefix="KAFKA_")


@dataclass(frozen=True, slots=True, kw_only=True)
class BrokerProfile:
    """How Headrace speaks to Kafka; two sets of defaults, every value with a variable of its own.

    The trade-off is between patience and fail-over. With ``resilient`` a consumer outlives 90 s without a heartbeat, so
    slow networks, pauses of a virtual machine and broker restarts cost no rebalance; a worker that died without leaving
    keeps its partitions for those 90 s, and nobody reads them meanwhile. With ``fast`` they move in under 10 s, and a
    pause of 6 s is a rebalance.
    """

    session_timeout_seconds: float = _both(
        ("90", "6"),
        _seconds(1, 1800),
        "How long the group waits for a heartbeat before it gives a worker's partitions away; a dead worker's "
        "partitions wait this long. Within the broker's group.min.session.timeout.ms and group.max.session.timeout.ms.",
    )
    heartbeat_interval_seconds: float = _both(
        ("30", "2"), _seconds(0.1, 600), "Between two heartbeats; at most a third of the session."
    )
    rebalance_timeout_seconds: float = _both(
        ("90", "6"),
        _seconds(1, 1800),
        "How long the others wait for a worker that has to rejoin; a join may take as long on a broker that delays it.",
    )
    request_timeout_seconds: float = _both(
        ("120", "18"),
        _seconds(1, 3600),
        "For one request, and for the delivery of a batch of records. Not below the session; at least 10 s above the "
        "rebalance timeout, because a join is such a request.",
    )
    max_poll_interval_seconds: float = _both(
        ("600", "120"), _seconds(5, 86400), "Longest time between two polls before a consumer leaves its group."
    )
    reconnect_backoff_max_seconds: float = _both(
        ("64", "2"),
        _seconds(0.1, 3600),
        "Highest delay between two attempts to reconnect or to create a client anew; the first is RETRY_BASE_SECONDS.",
    )
    metadata_max_age_seconds: float = _both(
        ("60", "10"), _seconds(1, 3600), "How old the client's picture of the cluster may get."
    )
    compression: str = _both(
        ("zstd", "zstd"),
        _choice("none", "lz4", "snappy", "zstd", "gzip"),
        "Of what Headrace produces. aiokafka packs lz4 at its level 9, which costs five times the CPU of zstd and "
        "packs less; snappy costs a little less than zstd and packs a fifth as well.",
    )
    linger_seconds: float = _both(
        ("0.005", "0.002"), _seconds(0, 5), "How long a batch waits for more records before it is sent."
    )
    max_batch_bytes: int = _both(
        ("1MiB", "1MiB"),
        _size(16 * KIB, 16 * MIB),
        "Largest batch of one partition in one produce request, before compression; one request per broker is under "
        "way. Not above the topics' max.message.bytes, of which 1 MiB is Kafka's default.",
    )
    fetch_max_wait_seconds: float = _both(
        ("0.1", "0.05"),
        _seconds(0.001, 10),
        "How long a broker may hold a fetch while there is nothing new. One fetch per broker is under way, so idle "
        "partitions hold up busy ones for this long.",
    )
    fetch_max_bytes: int = _both(("16MiB", "8MiB"), _size(64 * KIB, 256 * MIB), "Most that one fetch brings.")
    fetch_partition_max_bytes: int = _both(
        ("2MiB", "1MiB"), _size(16 * KIB, 64 * MIB), "Most that one fetch brings of one partition."
    )


_KAFKA: Final = "Kafka"
_APP: Final = "Application and topics"
_RES: Final = "Resilience"
_GUARD: Final = "Dead-letter guard"
_STORES: Final = "Stores"
_MQTT: Final = "MQTT"
_COAP: Final = "CoAP"
_DEV: Final = "Devices and readings"
_CMD: Final = "Commands"
_MAIL: Final = "Alarms and mail"
_WEB: Final = "HTTP and logs"
_STACK: Final = "Embedded stack and demo"


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Everything that can be set, validated. Made by :meth:`from_env`; ``broker`` is the effective broker profile."""

    broker: BrokerProfile

    kafka_bootstrap_servers: tuple[str, ...] = _setting(
        _KAFKA,
        "localhost:9092",
        Kind("list", "host:port, several with commas", _servers),
        "Brokers to begin with; name several, one that answers is enough.",
    )
    kafka_security_protocol: str = _setting(
        _KAFKA,
        "PLAINTEXT",
        _choice("PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL", fold=str.upper),
        "How connections to Kafka are protected.",
    )
    kafka_sasl_mechanism: str = _setting(
        _KAFKA,
        "PLAIN",
        _choice("PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512", fold=str.upper),
        "Used with SASL_PLAINTEXT and SASL_SSL.",
    )
    kafka_sasl_username: str = _setting(_KAFKA, "", _ANY, "User for SASL.")
    kafka_sasl_password: str = _setting(_KAFKA, "", _ANY, "Password for SASL.", secret=True)
    kafka_ssl_cafile: Path | None = _setting(_KAFKA, "", _FILE, "Authorities to trust; the system's where it is empty.")
    kafka_ssl_certfile: Path | None = _setting(_KAFKA, "", _FILE, "Client certificate (PEM); with its key.")
    kafka_ssl_keyfile: Path | None = _setting(_KAFKA, "", _FILE, "Key of the client certificate (PEM).")
    broker_profile: str = _setting(
        _KAFKA,
        "resilient",
        _choice(*PROFILES),
        "Set of defaults: `resilient` for patience with slow networks and restarts (a dead worker's partitions wait "
        "90 s), `fast` for quick fail-over in small set-ups and tests (they wait 6 s).",
    )

    app_id: str = _setting(
        _APP,
        "headrace",
        _NAME,
        "Before the name of every consumer group and internal topic. Two Headraces on one cluster need two of them.",
    )
    topic_prefix: str = _setting(_APP, "", _PREFIX, "Before every topic's name, for several Headraces on one cluster.")
    topic_partitions: int = _setting(
        _APP, "4", _count(1, 1000), "Of topics that the worker creates; an existing topic is taken as it is."
    )
    topic_replication: int = _setting(_APP, "1", _count(1, 10), "Replicas of topics that the worker creates.")
    stages: tuple[str, ...] = _setting(
        _APP,
        "",
        Kind("list", "some of " + ", ".join(STAGES), _stages),
        "Stages that this worker runs; all of them where it is empty.",
    )
    data_dir: Path = _setting(_APP, ".headrace/data", _FOLDER, "Tables (RocksDB) and the like, one folder per stage.")
    config_path: Path = _setting(
        _APP, "config/", _FOLDER, "Folder with `profiles/*.yaml`, `devices.yaml`, `alarms.yaml` and their schemas."
    )
    max_message_bytes: int = _setting(
        _APP,
        "1MiB",
        _size(1 * KIB, 16 * MIB),
        "Largest device message. A larger one is refused at the edge (CoAP 4.13; MQTT: a dead letter with its size, "
        "hash and first KiB).",
    )
    retention_data_seconds: float = _setting(
        _APP,
        "604800",
        _seconds(60, 3.2e9),
        "Retention of `iot_raw_data` and `iot_validated_data` where the worker creates them. Data that no stage has "
        "read by then are gone.",
    )
    retention_events_seconds: float = _setting(
        _APP,
        "2592000",
        _seconds(60, 3.2e9),
        "Retention of `iot_alerts`, `iot_alert_actions`, `device_commands` and `iot_command_status`.",
    )
    retention_errors_seconds: float = _setting(
        _APP, "2592000", _seconds(60, 3.2e9), "Retention of `iot_errors`: how long a dead letter can be replayed."
    )
    rocksdb_cache_bytes: int = _setting(
        _APP, "32MiB", _size(1 * MIB, 16384 * MIB), "Block cache of all tables of one stage."
    )
    rocksdb_write_buffer_bytes: int = _setting(
        _APP,
        "2MiB",
        _size(1 * MIB, 1024 * MIB),
        "Memtable of one table's partition; it takes up to two of them, whatever it holds.",
    )
    table_standby_replicas: int = _setting(
        _APP,
        "0",
        _count(0, 10),
        "Warm copies of each table on other workers; quicker fail-over for more disk and traffic.",
    )

    commit_interval_seconds: float = _setting(
        _RES,
        "1",
        _seconds(0.05, 60),
        "Between two commits of the low-water mark; what a killed worker repeats is at most this much.",
    )
    health_interval_seconds: float = _setting(
        _RES, ("30", "2"), _seconds(0.5, 3600), "Between two health checks of every consumer and producer."
    )
    stuck_seconds: float = _setting(
        _RES,
        ("120", "20"),
        _seconds(2, 86400),
        "A stage with lag that reads or commits nothing for this long is stuck: its clients are created anew. One "
        "whose handler hangs is not well, and ends the worker after RECREATE_BUDGET_SECONDS.",
    )
    max_attempts: int = _setting(
        _RES, "5", _count(1, 1000), "Attempts for a failure that nobody has classified, then a dead letter `exhausted`."
    )
    retry_base_seconds: float = _setting(_RES, "1", _seconds(0.01, 60), "First delay of a backoff.")
    retry_cap_seconds: float = _setting(
        _RES, ("64", "2"), _seconds(0.1, 3600), "Highest delay between two attempts at the same message."
    )
    healthy_seconds: float = _setting(
        _RES, ("60", "10"), _seconds(0, 3600), "Stretch of health after which a backoff starts over."
    )
    drain_seconds: float = _setting(
        _RES,
        ("30", "3"),
        _seconds(0, 600),
        "How long a revocation waits for what is in flight before it commits the mark; below the rebalance timeout.",
    )
    shutdown_seconds: float = _setting(
        _RES, "20", _seconds(0, 600), "How long the end of a worker waits for what is in flight."
    )
    in_flight_bytes: int = _setting(
        _RES,
        "32MiB",
        _size(1 * MIB, 4096 * MIB),
        "Most that one stage holds in memory: read, and not yet complete. A partition that holds nothing is read in "
        "any case, one fetch of it.",
    )
    recreate_budget_seconds: float = _setting(
        _RES,
        "600",
        _seconds(1, 86400),
        "How long the last step of recreation may fail before the worker ends, non-zero, for its supervisor. A broker "
        "or sink that is away never counts.",
    )
    offset_out_of_range: str = _setting(
        _RES,
        "earliest",
        _choice("earliest", "latest", "stop"),
        "Where to go on when retention or a re-created topic has removed the committed offset; always logged and "
        "counted.",
    )
    connect_timeout_seconds: float = _setting(
        _RES, "10", _seconds(0.1, 300), "For a connection to any service other than Kafka."
    )

    dlq_guard: bool = _setting(
        _GUARD,
        "true",
        _FLAG,
        "Stop a stage when most of a window would be dead letters: a wrong deployment, not bad data.",
    )
    dlq_guard_messages: int = _setting(_GUARD, "1000", _count(10, 10_000_000), "Smallest window that is judged.")
    dlq_guard_devices: int = _setting(_GUARD, "10", _count(1, 1_000_000), "Devices that a window must have come from.")
    dlq_guard_share: float = _setting(
        _GUARD, "0.5", _number(0.01, 1, ""), "Share of dead letters in a window above which the stage stops."
    )
    dlq_guard_probe_seconds: float = _setting(
        _GUARD,
        "30",
        _seconds(0.5, 3600),
        "Longest time between two probes of a stopped stage; one that succeeds frees it.",
    )

    database_url: str = _setting(
        _STORES,
        "postgresql://localhost/headrace",
        _url("postgresql", "postgres", hostless=True),
        "PostgreSQL or TimescaleDB.",
    )
    db_pool_size: int = _setting(_STORES, "4", _count(1, 100), "Connections to the database per stage, at most.")
    db_chunk_rows: int = _setting(_STORES, "5000", _count(1, 100_000), "Rows in one COPY and upsert, at most.")
    db_statement_timeout_seconds: float = _setting(_STORES, "60", _seconds(1, 3600), "For one statement.")
    redis_url: str = _setting(
        _STORES, "redis://localhost:6379/0", _url("redis", "rediss", "unix", hostless=True), "Redis or Valkey."
    )
    redis_ttl_seconds: float = _setting(
        _STORES, "604800", _seconds(0, 3.2e9), "How long a device's last readings stay without a new one; 0: for ever."
    )
    redis_timeout_seconds: float = _setting(_STORES, "5", _seconds(0.1, 300), "For one round trip.")

    mqtt_url: str = _setting(
        _MQTT,
        "mqtt://localhost:1883",
        _url("mqtt", "mqtts"),
        "Broker, with user:password@ where it asks; `mqtts` is TLS.",
    )
    mqtt_topics: tuple[str, ...] = _setting(
        _MQTT,
        "",
        _list(
            _mqtt_filter,
            "topic filters, several with commas, none of wildcards alone ('#', '+/#') or beginning with '$'",
        ),
        "Filters to subscribe to; what the active profiles match where it is empty.",
    )
    mqtt_client_id: str = _setting(
        _MQTT,
        "{APP_ID}-mqtt",
        _text(r"[^\s/+#]{1,256}", "up to 256 characters without space, '/', '+' or '#'"),
        "Name of the persistent session. A second connector with the same one stands by and doesn't take over in turn.",
    )
    mqtt_share: str = _setting(
        _MQTT, "", _text(r"[^\s/+#]{0,100}", "a name without space, '/', '+' or '#'"), "Group of a shared subscription."
    )
    mqtt_inflight: int = _setting(
        _MQTT,
        "500",
        _count(1, 65535),
        "Messages that wait for Kafka before their PUBACK, at most (MQTT 5 receive maximum).",
    )
    mqtt_session_expiry_seconds: float = _setting(
        _MQTT, "604800", _seconds(0, 4294967295), "How long the broker keeps the session of an absent connector."
    )
    mqtt_keepalive_seconds: float = _setting(_MQTT, "30", _seconds(1, 65535), "Between two pings.")
    mqtt_tls_cafile: Path | None = _setting(_MQTT, "", _FILE, "Authorities to trust; the system's where it is empty.")
    mqtt_tls_certfile: Path | None = _setting(_MQTT, "", _FILE, "Client certificate (PEM); with its key.")
    mqtt_tls_keyfile: Path | None = _setting(_MQTT, "", _FILE, "Key of the client certificate (PEM).")

    coap_bind: Address = _setting(_COAP, "127.0.0.1:5683", _BIND, "Where the CoAP server listens (UDP).")
    coap_answer_seconds: float = _setting(
        _COAP, "30", _seconds(0.5, 240), "How long a request waits for Kafka before it is answered with 5.03."
    )
    coap_max_age_seconds: float = _setting(_COAP, "30", _seconds(1, 86400), "Max-Age of a 5.03: when to come again.")
    coap_max_pending: int = _setting(
        _COAP, "5000", _count(1, 1_000_000), "Requests in flight; NON beyond it are dropped (`overload`), CON get 5.03."
    )
    coap_oscore_keys: Path | None = _setting(_COAP, "", _FILE, "YAML file of OSCORE contexts, one per device.")
    coap_dtls_keys: Path | None = _setting(_COAP, "", _FILE, "YAML file of DTLS pre-shared keys, one per device.")
    coap_dtls_bind: Address = _setting(_COAP, "127.0.0.1:5684", _BIND, "Where `coaps` listens once there are keys.")

    unknown_devices: str = _setting(
        _DEV,
        "accept",
        _choice("accept", "reject"),
        "Messages of devices that `devices.yaml` and `iot_devices` don't name.",
    )
    reading_future_limit_seconds: float = _setting(
        _DEV, "86400", _seconds(0, 3.2e7), "A sample further ahead of the clock than this is refused."
    )
    driver_limit_seconds: float = _setting(
        _DEV, "0.05", _seconds(0.001, 10), "A driver's call that takes longer counts against the driver."
    )
    driver_aside_seconds: float = _setting(
        _DEV, "60", _seconds(1, 3600), "How long a driver that keeps exceeding its limit is set aside."
    )

    command_timeout_seconds: float = _setting(
        _CMD,
        "60",
        _seconds(1, 86400),
        "How long a sent command waits for the device's answer before it is tried again.",
    )
    command_attempts: int = _setting(_CMD, "3", _count(1, 100), "Attempts at a command that is safe to repeat.")
    command_expiry_seconds: float = _setting(
        _CMD, "86400", _seconds(1, 3.2e7), "Life of a command that doesn't say when it expires."
    )
    command_rate_per_minute: int = _setting(_CMD, "600", _count(1, 1_000_000), "Commands per API key.")
    command_batch_max: int = _setting(_CMD, "500", _count(1, 10_000), "Commands in one request to `/commands/batch`.")

    smtp_url: str = _setting(
        _MAIL,
        "smtp://localhost:25",
        _url("smtp", "smtp+starttls", "smtps"),
        "Mail server, with user:password@ where it asks.",
    )
    smtp_timeout_seconds: float = _setting(_MAIL, "30", _seconds(1, 600), "For one SMTP command.")
    smtp_tls_cafile: Path | None = _setting(_MAIL, "", _FILE, "Authorities to trust; the system's where it is empty.")
    mail_from: str = _setting(_MAIL, "alerts@localhost", _MAILBOX, "Sender of alarm mails.")
    mail_language: str = _setting(_MAIL, "en", _choice("en", "fr"), "Of alarm mails.")
    mail_time_zone: str = _setting(
        _MAIL, "UTC", Kind("time zone", "an IANA name like Europe/Paris", _zone), "Of the times in mails."
    )
    mail_rate_per_minute: int = _setting(_MAIL, "60", _count(1, 100_000), "Mails in all; the rest goes into a digest.")
    mail_rate_per_recipient_per_minute: int = _setting(_MAIL, "10", _count(1, 100_000), "Mails to one recipient.")
    mail_digest_seconds: float = _setting(
        _MAIL, "300", _seconds(1, 86400), "How long a digest gathers what the rate limit held back."
    )
    alarm_max_age_seconds: float = _setting(
        _MAIL, "86400", _seconds(1, 3.2e7), "Readings older than this are stored but raise no alarm."
    )
    webhook_secret: str = _setting(_MAIL, "", _ANY, "Key of the HMAC that signs webhooks.", secret=True)
    webhook_timeout_seconds: float = _setting(_MAIL, "10", _seconds(0.5, 120), "For one webhook call.")

    web_bind: Address = _setting(
        _WEB, "127.0.0.1:6066", _BIND, "Where health, metrics and the API listen; each process needs its own."
    )
    api_keys: tuple[str, ...] = _setting(
        _WEB,
        "",
        _list(str, "keys, several with commas"),
        "Keys that `/api/v1/*` takes in `X-API-Key`. Without any it is open on loopback and refuses to bind beyond it.",
        secret=True,
    )
    public_url: str = _setting(
        _WEB,
        "",
        _url("http", "https"),
        "Where people reach this server; for links in mails. `WEB_BIND` where it is empty.",
    )
    log_level: str = _setting(
        _WEB, "INFO", _choice("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL", fold=str.upper), "Least level logged."
    )
    log_format: str = _setting(_WEB, "text", _choice("text", "json"), "`json`: one object a line.")

    headrace_state: Path = _setting(
        _STACK, ".headrace", _FOLDER, "Data and logs of the embedded stack, and `stack.env`."
    )
    demo_seconds: float = _setting(
        _STACK, "0", _seconds(0, 1e7), "End the demo by itself after this long; 0: on Ctrl-C."
    )

    @classmethod
    def from_env(cls, env: Mapping[str, str]) -> Settings:
        """Read and check every setting of ``env``; variables that are none of ours are left alone.

        Raises:
            SettingsError: with every problem found, not the first alone.
        """
        problems: list[Problem] = []
        profile = _read(_by_attribute("broker_profile"), env, PROFILES[0], problems) or PROFILES[0]
        values = {
            declared.attribute: _read(declared, env, profile, problems)
            for declared in declarations()
            if declared.section != _PROFILE
        }
        broker = {d.attribute: _read(d, env, profile, problems) for d in declarations() if d.section == _PROFILE}
        # Reading the profile's name twice would report it twice.
        problems = list(dict.fromkeys(problems))
        settings = cls(broker=BrokerProfile(**broker), **values)
        failed = {problem.variable for problem in problems}
        # What disagrees with a value that is already refused will be judged once that one is right.
        disagreements = [problem for check in _CHECKS for problem in check(settings)]
        problems += [d for d in disagreements if not failed & set(_VARIABLE.findall(f"{d.variable} {d.allowed}"))]
        if problems:
            raise SettingsError(problems)
        return settings

    def topic(self, name: str) -> str:
        """Return the full name of the topic that the contract calls ``name``."""
        return f"{self.topic_prefix}{name}"

    @property
    def max_record_bytes(self) -> int:
        """Largest record of a topic (``max.message.bytes``, ``max_request_size``), in bytes.

        A device message becomes a JSON string, six times as long if every byte must be escaped (``\\u0001``), and an
        envelope.
        """
        return 6 * self.max_message_bytes + 128 * KIB

    @property
    def link_base(self) -> str:
        """Where people reach this server, without a slash at the end."""
        return (self.public_url or f"http://{self.web_bind}").rstrip("/")

    def kafka_client_options(self) -> dict[str, Any]:
        """Return brokers and security as aiokafka's clients take them. Raises ssl.SSLError for a bad certificate."""
        options: dict[str, Any] = {
            "bootstrap_servers": list(self.kafka_bootstrap_servers),
            "security_protocol": self.kafka_security_protocol,
        }
        if "SSL" in self.kafka_security_protocol:
            options["ssl_context"] = tls_context(self.kafka_ssl_cafile, self.kafka_ssl_certfile, self.kafka_ssl_keyfile)
        if "SASL" in self.kafka_security_protocol:
            options["sasl_mechanism"] = self.kafka_sasl_mechanism
            options["sasl_plain_username"] = self.kafka_sasl_username
            options["sasl_plain_password"] = self.kafka_sasl_password
        return options

    def shown(self) -> Iterator[tuple[str, str]]:
        """Yield every variable and its value as it may be printed: secrets are masked."""
        for declared in declarations():
            holder = self.broker if declared.section == _PROFILE else self
            value = getattr(holder, declared.attribute)
            text = ",".join(value) if isinstance(value, tuple) and not isinstance(value, Address) else str(value)
            yield declared.variable, declared.shown("" if value is None else text)

    def __repr__(self) -> str:
        return f"Settings({', '.join(f'{variable}={value}' for variable, value in self.shown())})"


def tls_context(cafile: Path | None, certfile: Path | None, keyfile: Path | None) -> ssl.SSLContext:
    """Make a client's TLS context that checks the server; raises ssl.SSLError or OSError for files that are no such."""
    context = ssl.create_default_context(cafile=None if cafile is None else str(cafile))
    if certfile is not None:
        context.load_cert_chain(certfile, keyfile)
    return context


@functools.cache
def declarations() -> tuple[Declaration, ...]:
    """Return every declaration, in the order of the reference: Kafka, the profile's values, then the rest."""
    found = [_declaration(field) for field in dataclasses.fields(Settings) if field.metadata]
    kafka = [declared for declared in found if declared.section == _KAFKA]
    profile = [_declaration(field) for field in dataclasses.fields(BrokerProfile)]
    return (*kafka, *profile, *(declared for declared in found if declared.section != _KAFKA))


def _declaration(field: dataclasses.Field[Any]) -> Declaration:
    data = dict(field.metadata)
    return Declaration(variable=f"{data.pop('prefix')}{field.name.upper()}", attribute=field.name, **data)


def _by_attribute(attribute: str) -> Declaration:
    return next(declared for declared in declarations() if declared.attribute == attribute)


def broker_profile(name: str) -> BrokerProfile:
    """Return the values of profile ``resilient`` or ``fast`` as they are without any override."""
    values = {d.attribute: d.kind.parse(d.default(name)) for d in declarations() if d.section == _PROFILE}
    return BrokerProfile(**values)


def _read(declared: Declaration, env: Mapping[str, str], profile: str, problems: list[Problem]) -> Any:
    default = declared.default(profile).replace("{APP_ID}", env.get("APP_ID", "").strip() or "headrace")
    text = env.get(declared.variable, "").strip()
    if text:
        try:
            return declared.kind.parse(text)
        except OSError as exc:
            problems.append(
                Problem(declared.variable, declared.shown(text), f"{declared.kind.allowed} ({exc.strerror})")
            )
        except (ValueError, KeyError, OverflowError):
            problems.append(Problem(declared.variable, declared.shown(text), declared.kind.allowed))
    try:
        return declared.kind.parse(default)
    except ValueError:  # a default made of another variable, which is reported where it is read
        return default


# --- agreement between settings ---------------------------------------------------------------------------------------

_VARIABLE: Final = re.compile(r"[A-Z]+(?:_[A-Z]+)+")


def _timeouts(settings: Settings) -> Iterator[Problem]:
    broker = settings.broker
    session, request = broker.session_timeout_seconds, broker.request_timeout_seconds
    if broker.heartbeat_interval_seconds > session / 3:
        yield Problem(
            "KAFKA_HEARTBEAT_INTERVAL_SECONDS",
            f"{broker.heartbeat_interval_seconds:g}",
            f"at most a third of KAFKA_SESSION_TIMEOUT_SECONDS={session:g}, so that two lost heartbeats are survived",
        )
    if session > request:
        yield Problem(
            "KAFKA_SESSION_TIMEOUT_SECONDS",
            f"{session:g}",
            f"at most KAFKA_REQUEST_TIMEOUT_SECONDS={request:g}",
        )
    if request <= broker.rebalance_timeout_seconds + 10:
        yield Problem(
            "KAFKA_REQUEST_TIMEOUT_SECONDS",
            f"{request:g}",
            f"more than KAFKA_REBALANCE_TIMEOUT_SECONDS={broker.rebalance_timeout_seconds:g} and 10 s, because joining "
            "a group is one request",
        )
    if settings.drain_seconds >= broker.rebalance_timeout_seconds:
        yield Problem(
            "DRAIN_SECONDS",
            f"{settings.drain_seconds:g}",
            f"less than KAFKA_REBALANCE_TIMEOUT_SECONDS={broker.rebalance_timeout_seconds:g}, or the group goes on "
            "without us",
        )
    if settings.retry_base_seconds > settings.retry_cap_seconds:
        yield Problem(
            "RETRY_BASE_SECONDS",
            f"{settings.retry_base_seconds:g}",
            f"at most RETRY_CAP_SECONDS={settings.retry_cap_seconds:g}",
        )


def _sizes(settings: Settings) -> Iterator[Problem]:
    if settings.broker.fetch_partition_max_bytes > settings.broker.fetch_max_bytes:
        yield Problem(
            "KAFKA_FETCH_PARTITION_MAX_BYTES",
            human_size(settings.broker.fetch_partition_max_bytes),
            f"at most KAFKA_FETCH_MAX_BYTES={human_size(settings.broker.fetch_max_bytes)}",
        )
    if settings.max_record_bytes > settings.in_flight_bytes:
        yield Problem(
            "IN_FLIGHT_BYTES",
            human_size(settings.in_flight_bytes),
            f"at least {human_size(settings.max_record_bytes)}, the largest record that "
            f"MAX_MESSAGE_BYTES={human_size(settings.max_message_bytes)} can make",
        )


def _security(settings: Settings) -> Iterator[Problem]:
    if "SASL" in settings.kafka_security_protocol:
        for variable in ("KAFKA_SASL_USERNAME", "KAFKA_SASL_PASSWORD"):
            if not getattr(settings, variable.lower()):
                yield Problem(
                    variable,
                    "(empty)",
                    f"a value, as KAFKA_SECURITY_PROTOCOL={settings.kafka_security_protocol} needs one",
                )
    for cert, key in (("KAFKA_SSL_CERTFILE", "KAFKA_SSL_KEYFILE"), ("MQTT_TLS_CERTFILE", "MQTT_TLS_KEYFILE")):
        found, paired = getattr(settings, cert.lower()), getattr(settings, key.lower())
        if paired is not None and found is None:
            yield Problem(cert, "(empty)", f"the certificate that belongs to {key}={paired}")
    if settings.coap_dtls_keys is not None and settings.coap_dtls_bind == settings.coap_bind:
        yield Problem("COAP_DTLS_BIND", str(settings.coap_dtls_bind), "another address than COAP_BIND")
    if not settings.web_bind.loopback and not settings.api_keys:
        yield Problem(
            "WEB_BIND",
            str(settings.web_bind),
            "an address of loopback (127.0.0.1, [::1], localhost) while API_KEYS is empty; set it to open the API",
        )


_CHECKS: Final[tuple[Callable[[Settings], Iterator[Problem]], ...]] = (_timeouts, _sizes, _security)


def environment() -> Mapping[str, str]:
    """Return the process's environment as it is, for ``faust -A streams check``, which reports on it."""
    return os.environ


@functools.cache
def load() -> Settings:
    """Read the process's environment, once. Raises SettingsError."""
    return Settings.from_env(environment())
