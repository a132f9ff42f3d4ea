"""settings.py: what is accepted, what is refused, and how it is said."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from settings import (
    STAGES,
    Address,
    BrokerProfile,
    Problem,
    Settings,
    SettingsError,
    broker_profile,
    declarations,
    endpoint,
    masked,
)
from tools import settings_reference

ROOT = Path(__file__).resolve().parent.parent

# The contract's table: every variable with its default, in the spelling of the environment.
CONTRACT = {
    "KAFKA_BOOTSTRAP_SERVERS": "localhost:9092",
    "KAFKA_SECURITY_PROTOCOL": "PLAINTEXT",
    "KAFKA_SASL_MECHANISM": "PLAIN",
    "KAFKA_SASL_USERNAME": "",
    "KAFKA_SASL_PASSWORD": "",
    "KAFKA_SSL_CAFILE": "",
    "KAFKA_SSL_CERTFILE": "",
    "KAFKA_SSL_KEYFILE": "",
    "BROKER_PROFILE": "resilient",
    "APP_ID": "headrace",
    "TOPIC_PREFIX": "",
    "TOPIC_PARTITIONS": "4",
    "TOPIC_REPLICATION": "1",
    "DATA_DIR": ".headrace/data",
    "MAX_MESSAGE_BYTES": "1MiB",
    "STAGES": "",
    "DATABASE_URL": "postgresql://localhost/headrace",
    "REDIS_URL": "redis://localhost:6379/0",
    "MQTT_URL": "mqtt://localhost:1883",
    "MQTT_TOPICS": "",
    "MQTT_CLIENT_ID": "{APP_ID}-mqtt",
    "MQTT_SHARE": "",
    "COAP_BIND": "127.0.0.1:5683",
    "SMTP_URL": "smtp://localhost:25",
    "MAIL_FROM": "alerts@localhost",
    "MAIL_RATE_PER_MINUTE": "60",
    "MAIL_LANGUAGE": "en",
    "CONFIG_PATH": "config/",
    "API_KEYS": "",
    "WEB_BIND": "127.0.0.1:6066",
    "LOG_LEVEL": "INFO",
    "LOG_FORMAT": "text",
}


def problems(**env: str) -> list[Problem]:
    """Return what is wrong with ``env``; fails where nothing is."""
    with pytest.raises(SettingsError) as caught:
        Settings.from_env(env)
    return list(caught.value.problems)


@pytest.mark.parametrize(("variable", "default"), CONTRACT.items())
def test_contract_default(variable: str, default: str) -> None:
    """Each variable of the contract exists with the contract's default."""
    declared = next(declared for declared in declarations() if declared.variable == variable)
    assert declared.default("resilient") == default


def test_an_empty_environment_is_valid() -> None:
    """Without any variable all stages run against this machine."""
    settings = Settings.from_env({})
    assert settings.stages == STAGES
    assert settings.kafka_bootstrap_servers == ("localhost:9092",)
    assert settings.mqtt_client_id == "headrace-mqtt"
    assert settings.web_bind == Address("127.0.0.1", 6066)
    assert settings.max_message_bytes == 1024 * 1024


def test_an_empty_variable_counts_as_unset() -> None:
    """``VARIABLE=`` in an environment file means its default."""
    names = {declared.variable: " " for declared in declarations()}
    assert Settings.from_env(names) == Settings.from_env({})


def test_resilient_has_the_tuned_values() -> None:
    """90 s session, 30 s heartbeat, 120 s request, 64 s backoff, 10 min poll interval, compressed."""
    broker = Settings.from_env({}).broker
    assert broker == broker_profile("resilient")
    assert (broker.session_timeout_seconds, broker.heartbeat_interval_seconds) == (90, 30)
    assert (broker.request_timeout_seconds, broker.max_poll_interval_seconds) == (120, 600)
    assert broker.reconnect_backoff_max_seconds == 64
    assert broker.compression == "zstd"
    assert Settings.from_env({}).retry_cap_seconds == 64


def test_fast_fails_over_in_seconds() -> None:
    """The ``fast`` profile keeps a dead worker's partitions for no more than 6 s."""
    settings = Settings.from_env({"BROKER_PROFILE": "fast"})
    assert settings.broker == broker_profile("fast")
    assert settings.broker.session_timeout_seconds == 6
    assert settings.retry_cap_seconds <= 5
    assert settings.health_interval_seconds <= 5


@pytest.mark.parametrize("profile", ["resilient", "fast"])
def test_every_profile_value_has_a_variable(profile: str) -> None:
    """A variable beats the profile, for each of its values."""
    for declared in declarations():
        if declared.section != "Broker profile":
            continue
        other = declared.default("fast" if profile == "resilient" else "resilient")
        kafka = {"KAFKA_HEARTBEAT_INTERVAL_SECONDS": "0.1"} if "HEARTBEAT" not in declared.variable else {}
        wide = {"DRAIN_SECONDS": "0", "KAFKA_REQUEST_TIMEOUT_SECONDS": "3600", "KAFKA_FETCH_MAX_BYTES": "64MiB"}
        env = {"BROKER_PROFILE": profile, **wide, **kafka}
        if "HEARTBEAT" in declared.variable:
            env["KAFKA_SESSION_TIMEOUT_SECONDS"] = "1800"
        if declared.variable == "KAFKA_REQUEST_TIMEOUT_SECONDS":
            env |= {"KAFKA_SESSION_TIMEOUT_SECONDS": "5", "KAFKA_REBALANCE_TIMEOUT_SECONDS": "5"}
        settings = Settings.from_env(env | {declared.variable: other})
        assert getattr(settings.broker, declared.attribute) == declared.kind.parse(other), declared.variable


@pytest.mark.parametrize(
    ("env", "attribute", "value"),
    [
        ({"STAGES": "caching, mqtt,caching"}, "stages", ("mqtt", "caching")),
        ({"MAX_MESSAGE_BYTES": "65536"}, "max_message_bytes", 65536),
        ({"MAX_MESSAGE_BYTES": "512KiB"}, "max_message_bytes", 524288),
        ({"MAX_MESSAGE_BYTES": "2 mib"}, "max_message_bytes", 2097152),
        ({"COMMIT_INTERVAL_SECONDS": "0.25"}, "commit_interval_seconds", 0.25),
        ({"KAFKA_BOOTSTRAP_SERVERS": "a:1,b , [::1]:9"}, "kafka_bootstrap_servers", ("a:1", "b:9092", "[::1]:9")),
        ({"COAP_BIND": "[::]:5683"}, "coap_bind", Address("::", 5683)),
        ({"WEB_BIND": "localhost:0"}, "web_bind", Address("localhost", 0)),
        ({"APP_ID": "two"}, "mqtt_client_id", "two-mqtt"),
        ({"MQTT_CLIENT_ID": "edge-7"}, "mqtt_client_id", "edge-7"),
        ({"MQTT_TOPICS": "a/+/b/#,c"}, "mqtt_topics", ("a/+/b/#", "c")),
        ({"MAIL_LANGUAGE": "FR"}, "mail_language", "fr"),
        ({"LOG_LEVEL": "debug"}, "log_level", "DEBUG"),
        ({"DLQ_GUARD": "off"}, "dlq_guard", False),
        ({"MAIL_FROM": "Pump house <a@b.example>"}, "mail_from", "Pump house <a@b.example>"),
        ({"DATABASE_URL": "postgresql://u:@/db?host=/tmp/s"}, "database_url", "postgresql://u:@/db?host=/tmp/s"),
        ({"SMTP_URL": "smtp+starttls://u:p@h:587"}, "smtp_url", "smtp+starttls://u:p@h:587"),
        ({"WEB_BIND": "0.0.0.0:80", "API_KEYS": "k1,k2"}, "api_keys", ("k1", "k2")),
        ({"PUBLIC_URL": "https://iot.example/"}, "link_base", "https://iot.example"),
    ],
)
def test_accepted(env: dict[str, str], attribute: str, value: object) -> None:
    """What the reference allows is read into its type."""
    assert getattr(Settings.from_env(env), attribute) == value


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("KAFKA_BOOTSTRAP_SERVERS", "a:b"),
        ("KAFKA_BOOTSTRAP_SERVERS", ","),
        ("KAFKA_BOOTSTRAP_SERVERS", "kafka://a:9092"),
        ("KAFKA_BOOTSTRAP_SERVERS", "a:70000"),
        ("KAFKA_SECURITY_PROTOCOL", "TLS"),
        ("KAFKA_SSL_CAFILE", "/no/such/file"),
        ("BROKER_PROFILE", "turbo"),
        ("KAFKA_SESSION_TIMEOUT_SECONDS", "90s"),
        ("APP_ID", "head race"),
        ("TOPIC_PREFIX", "a/b"),
        ("TOPIC_PARTITIONS", "0"),
        ("TOPIC_PARTITIONS", "4.5"),
        ("STAGES", "mqtt,normaliser"),
        ("MAX_MESSAGE_BYTES", "1MB"),
        ("MAX_MESSAGE_BYTES", "-1"),
        ("RETRY_CAP_SECONDS", "nan"),
        ("RETRY_CAP_SECONDS", "inf"),
        ("DATABASE_URL", "mysql://h/db"),
        ("REDIS_URL", "localhost:6379"),
        ("MQTT_URL", "mqtt://"),
        ("MQTT_URL", "mqtt://h:99999"),
        ("MQTT_URL", "http://h"),
        ("MQTT_TOPICS", "#"),
        ("MQTT_TOPICS", "devices/+/t,+/#"),
        ("MQTT_TOPICS", "a/#/b"),
        ("MQTT_TOPICS", "a/b+"),
        ("MQTT_TOPICS", "$share/g/a"),
        ("MQTT_SHARE", "a/b"),
        ("COAP_BIND", "5683"),
        ("COAP_BIND", "::1:5683"),
        ("SMTP_URL", "smtp+tls://h"),
        ("MAIL_FROM", "nobody"),
        ("MAIL_FROM", "a@b\r\nBcc: c@d"),
        ("MAIL_LANGUAGE", "de"),
        ("MAIL_TIME_ZONE", "Europe/Pariss"),
        ("MAIL_TIME_ZONE", "../etc/passwd"),
        ("DLQ_GUARD", "maybe"),
        ("DLQ_GUARD_SHARE", "0"),
        ("LOG_FORMAT", "xml"),
    ],
)
def test_refused(variable: str, value: str) -> None:
    """What the reference doesn't allow is one problem that names variable, value and what is allowed."""
    (problem,) = problems(**{variable: value})
    assert problem.variable == variable
    assert problem.found == value
    assert problem.allowed.startswith(next(d for d in declarations() if d.variable == variable).kind.allowed)


@pytest.mark.parametrize(
    ("env", "variable", "word"),
    [
        ({"KAFKA_HEARTBEAT_INTERVAL_SECONDS": "31"}, "KAFKA_HEARTBEAT_INTERVAL_SECONDS", "third"),
        (
            {"KAFKA_SESSION_TIMEOUT_SECONDS": "130"},
            "KAFKA_SESSION_TIMEOUT_SECONDS",
            "KAFKA_REQUEST_TIMEOUT_SECONDS=120",
        ),
        ({"KAFKA_REBALANCE_TIMEOUT_SECONDS": "110"}, "KAFKA_REQUEST_TIMEOUT_SECONDS", "and 10 s"),
        ({"DRAIN_SECONDS": "90"}, "DRAIN_SECONDS", "KAFKA_REBALANCE_TIMEOUT_SECONDS=90"),
        ({"RETRY_BASE_SECONDS": "3", "RETRY_CAP_SECONDS": "2"}, "RETRY_BASE_SECONDS", "RETRY_CAP_SECONDS=2"),
        (
            {"KAFKA_FETCH_PARTITION_MAX_BYTES": "32MiB"},
            "KAFKA_FETCH_PARTITION_MAX_BYTES",
            "KAFKA_FETCH_MAX_BYTES=16MiB",
        ),
        ({"MAX_MESSAGE_BYTES": "8MiB"}, "IN_FLIGHT_BYTES", "MAX_MESSAGE_BYTES=8MiB"),
        ({"KAFKA_SECURITY_PROTOCOL": "SASL_SSL", "KAFKA_SASL_USERNAME": "u"}, "KAFKA_SASL_PASSWORD", "SASL_SSL"),
        ({"WEB_BIND": "0.0.0.0:6066"}, "WEB_BIND", "API_KEYS"),
        ({"WEB_BIND": "[::]:6066"}, "WEB_BIND", "API_KEYS"),
        ({"WEB_BIND": "somehost:6066"}, "WEB_BIND", "API_KEYS"),
    ],
)
def test_settings_that_disagree(env: dict[str, str], variable: str, word: str) -> None:
    """Two values, each allowed, that cannot be used together are one problem that names both."""
    (problem,) = problems(**env)
    assert problem.variable == variable
    assert word in problem.allowed


def test_all_problems_at_once() -> None:
    """One run tells everything that is wrong, values and disagreements."""
    found = problems(
        STAGES="mqtt,x",
        TOPIC_PARTITIONS="none",
        REDIS_URL="nowhere",
        KAFKA_HEARTBEAT_INTERVAL_SECONDS="45",
        WEB_BIND="0.0.0.0:1",
    )
    assert [problem.variable for problem in found] == [
        "TOPIC_PARTITIONS",
        "STAGES",
        "REDIS_URL",
        "KAFKA_HEARTBEAT_INTERVAL_SECONDS",
        "WEB_BIND",
    ]


def test_the_message_lists_every_problem() -> None:
    """The error's text has a line per problem with variable, value and what is allowed."""
    with pytest.raises(SettingsError) as caught:
        Settings.from_env({"STAGES": "x", "LOG_FORMAT": "xml"})
    lines = str(caught.value).splitlines()
    assert lines[0].startswith("2 setting(s)")
    assert "LOG_FORMAT=xml: allowed is one of text, json" in lines[2]


def test_a_value_already_refused_causes_no_second_problem() -> None:
    """A disagreement with a value that couldn't be read isn't reported."""
    assert [p.variable for p in problems(KAFKA_SESSION_TIMEOUT_SECONDS="x", KAFKA_HEARTBEAT_INTERVAL_SECONDS="31")] == [
        "KAFKA_SESSION_TIMEOUT_SECONDS"
    ]


def test_secrets_are_never_shown() -> None:
    """Neither errors nor the settings' own text hold a password or a key."""
    secret = "s3cret"  # noqa: S105
    env = {
        "KAFKA_SASL_PASSWORD": secret,
        "API_KEYS": secret,
        "WEBHOOK_SECRET": secret,
        "MQTT_URL": f"mqtts://user:{secret}@h",
        "DATABASE_URL": f"postgresql://h/db?user=u&password={secret}",
        "REDIS_URL": f"redis://:{secret}@h",
    }
    settings = Settings.from_env(env)
    assert secret not in repr(settings)
    assert "mqtts://user:***@h" in repr(settings)
    wrong = problems(
        MQTT_URL=f"http://user:{secret}@h", SMTP_URL=f"x://:{secret}@h", KAFKA_SASL_PASSWORD=f"{secret}\x01"
    )
    assert len(wrong) == 3
    assert secret not in str(wrong)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://:p@h:1/0", "redis://:***@h:1/0"),
        ("mqtt://u:p@w@h", "mqtt://u:***@h"),
        ("mqtt://h:1883", "mqtt://h:1883"),
        ("postgresql:///db?password=p&host=/x", "postgresql:///db?password=***&host=/x"),
        ("localhost:6379", "localhost:6379"),
    ],
)
def test_masked(url: str, shown: str) -> None:
    """Only the secret of a URL is replaced."""
    assert masked(url) == shown


def test_endpoint() -> None:
    """User and password are unquoted, ports come from the scheme."""
    assert endpoint("mqtts://u%40x:p%2Fw@h") == ("mqtts", "h", 8883, "u@x", "p/w", "")
    assert endpoint("smtp+starttls://h").port == 587
    assert endpoint("redis://h:7/2") == ("redis", "h", 7, None, None, "/2")


def test_topic_prefix() -> None:
    """The prefix stands before every topic's name."""
    assert Settings.from_env({"TOPIC_PREFIX": "plant2."}).topic("iot_raw_data") == "plant2.iot_raw_data"


def test_kafka_client_options() -> None:
    """Plain connections carry no credentials, SASL_SSL carries them and a checking TLS context."""
    assert Settings.from_env({}).kafka_client_options() == {
        "bootstrap_servers": ["localhost:9092"],
        "security_protocol": "PLAINTEXT",
    }
    env = {
        "KAFKA_SECURITY_PROTOCOL": "sasl_ssl",
        "KAFKA_SASL_MECHANISM": "scram-sha-512",
        "KAFKA_SASL_USERNAME": "u",
        "KAFKA_SASL_PASSWORD": "p",
    }
    options = Settings.from_env(env).kafka_client_options()
    assert options["sasl_mechanism"] == "SCRAM-SHA-512"
    assert (options["sasl_plain_username"], options["sasl_plain_password"]) == ("u", "p")
    assert options["ssl_context"].check_hostname


def test_a_record_holds_the_largest_message() -> None:
    """A device message of the largest size fits a record however much of it JSON must escape."""
    settings = Settings.from_env({})
    assert settings.max_record_bytes > 6 * settings.max_message_bytes


def test_the_reference_is_true() -> None:
    """docs/settings.md is what the declarations make; `python -m tools.settings_reference` writes it."""
    assert settings_reference.TARGET.read_text(encoding="utf-8") == settings_reference.render()


def test_every_declaration_is_complete() -> None:
    """Each has a type, bounds and a sentence of help; its defaults are valid; no variable is declared twice."""
    found = declarations()
    assert len({declared.variable for declared in found}) == len(found)
    for declared in found:
        assert declared.help.endswith((".", ")")), declared.variable
        assert declared.kind.allowed
        for default in declared.defaults:
            declared.kind.parse(default.replace("{APP_ID}", "x"))
    assert BrokerProfile.__doc__


def test_nothing_else_reads_the_environment() -> None:
    """Outside settings.py nobody asks os.environ or os.getenv for a variable that settings.py declares."""
    names = "|".join(declared.variable for declared in declarations())
    asks = re.compile(
        rf"environ(?:\.get\(|\[)\s*[\"'](?:{names})[\"']\s*[\]),](?!\s*=[^=])|getenv\(\s*[\"'](?:{names})"
    )
    rooms = ("streams", "agents", "tables", "devices", "tools")
    sources = [path for room in rooms for path in (ROOT / room).rglob("*.py")]
    assert [str(path) for path in sources if asks.search(path.read_text(encoding="utf-8"))] == []


def test_load_reads_the_process_environment_once() -> None:
    """`load` takes os.environ and gives the same object again."""
    code = "import settings, sys; s = settings.load(); print(s.app_id, settings.load() is s, 'faust' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, "APP_ID": "from-env"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == ["from-env", "True", "False"]
