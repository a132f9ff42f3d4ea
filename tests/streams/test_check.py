"""streams.check: everything that is wrong, at once, with its place; services tried within a bound."""

from __future__ import annotations

import asyncio
import shutil
import socket
import time
from pathlib import Path

import pytest

from settings import Settings
from streams.check import collect, examine
from streams.commands import check as command
from streams.probes import probe_all

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A copy of the shipped configuration that a test may break."""
    return Path(shutil.copytree(ROOT / "config", tmp_path / "config"))


@pytest.fixture
def env(tmp_path: Path, config: Path) -> dict[str, str]:
    """Settings that a worker starts with."""
    return {"CONFIG_PATH": str(config), "DATA_DIR": str(tmp_path / "data")}


def closed_port() -> int:
    """Return a port on which nothing listens."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def everything_at(port: int) -> dict[str, str]:
    """Settings whose services are all at one port of loopback, with passwords in every URL that takes one."""
    return {
        "KAFKA_BOOTSTRAP_SERVERS": f"127.0.0.1:{port}",
        "DATABASE_URL": f"postgresql://u:geheim@127.0.0.1:{port}/db",
        "REDIS_URL": f"redis://:geheim@127.0.0.1:{port}/0",
        "MQTT_URL": f"mqtt://u:geheim@127.0.0.1:{port}",
        "SMTP_URL": f"smtp://u:geheim@127.0.0.1:{port}",
    }


VARIABLES = {"KAFKA_BOOTSTRAP_SERVERS", "DATABASE_URL", "REDIS_URL", "MQTT_URL", "SMTP_URL"}


def test_the_shipped_configuration_is_valid() -> None:
    """What is in the repository has no finding."""
    assert collect({"CONFIG_PATH": str(ROOT / "config")}, connect=False) == []


def test_settings_and_every_file_at_once(env: dict[str, str], config: Path) -> None:
    """Wrong settings, a wrong profile and a wrong devices file are reported together, with file and line."""
    (config / "profiles" / "broken.yaml").write_text(
        "profile: broken\ndriver: nothing\nmatch:\n  protocol: mqtt\n  topic: a/b\n"
    )
    (config / "devices.yaml").write_text("devices:\n  - device_id: a\n    profile: none_such\n")
    env |= {"STAGES": "nonsense", "LOG_FORMAT": "xml"}
    found = collect(env, connect=False)
    places = {(finding.file, finding.line, finding.what.split(":")[0]) for finding in found}
    assert ("environment", 0, "STAGES") in places
    assert ("environment", 0, "LOG_FORMAT") in places
    assert (str(config / "profiles" / "broken.yaml"), 2, "/driver") in places
    assert (str(config / "devices.yaml"), 3, "/devices/0/profile") in places
    driver = next(finding for finding in found if finding.what.startswith("/driver"))
    assert '"nothing"' in str(driver)
    assert "fluxor" in driver.allowed


def test_alarm_rules_are_checked_with_the_profiles(env: dict[str, str], config: Path) -> None:
    """A rule that contradicts itself, or names a profile that isn't there, is a finding at its line."""
    condition = "    index: T\n    math_operator: '>'\n    threshold: 5\n"
    (config / "alarms.yaml").write_text(
        f"alarms:\n  - id: hot\n    profile: none_such\n{condition}"
        f"  - id: cold\n    device_id: a\n{condition}    clear_threshold: 9\n"
    )
    found = collect(env, connect=False)
    assert [(finding.file, finding.line) for finding in found] == [
        (str(config / "alarms.yaml"), line) for line in (3, 12)
    ]
    assert "plain_json" in found[0].allowed


def test_what_is_not_yaml_names_its_line(env: dict[str, str], config: Path) -> None:
    """A file that YAML cannot read is one finding at the line where reading ended."""
    (config / "devices.yaml").write_text("devices:\n  - device_id: a\n   name: [\n")
    (finding,) = [found for found in collect(env, connect=False) if found.file.endswith("devices.yaml")]
    assert finding.line == 3


def test_a_missing_configuration_folder_is_a_finding(env: dict[str, str], tmp_path: Path) -> None:
    """CONFIG_PATH that leads nowhere says so."""
    env["CONFIG_PATH"] = str(tmp_path / "nowhere")
    assert any("CONFIG_PATH" in str(finding) for finding in collect(env, connect=False))


def test_a_file_that_is_no_certificate(env: dict[str, str], tmp_path: Path) -> None:
    """TLS files are read by the check, before a worker needs them."""
    wrong = tmp_path / "ca.pem"
    wrong.write_text("hello")
    env |= {"MQTT_TLS_CAFILE": str(wrong), "KAFKA_SSL_CERTFILE": str(wrong), "KAFKA_SSL_KEYFILE": str(wrong)}
    found = collect(env, connect=False)
    assert [finding.what for finding in found] == ["KAFKA_SSL_CERTFILE", "MQTT_TLS_CAFILE"]
    assert str(wrong) in found[0].found


def test_a_data_folder_below_a_file(env: dict[str, str], tmp_path: Path) -> None:
    """DATA_DIR where no folder can be made is a finding that names it."""
    (tmp_path / "file").write_text("")
    env["DATA_DIR"] = str(tmp_path / "file" / "data")
    (finding,) = collect(env, connect=False)
    assert (finding.what, finding.found) == ("DATA_DIR", env["DATA_DIR"])


def test_nothing_is_connected_unless_asked(env: dict[str, str]) -> None:
    """Without ``connect`` services that are away are no finding, and none is tried."""
    examined = examine(env | everything_at(closed_port()), connect=False)
    assert (examined.findings, examined.probes) == ([], [])


def test_every_service_that_is_away_is_named(env: dict[str, str]) -> None:
    """Each refused connection is a finding with variable and address, and without the password."""
    port = closed_port()
    found = collect(env | everything_at(port), connect=True)
    assert {finding.what.split("=")[0] for finding in found} == VARIABLES
    assert all(f"127.0.0.1:{port}" in finding.what for finding in found)
    assert all("connection refused" in finding.found for finding in found)
    assert "geheim" not in str(found)


def test_only_what_the_stages_need_is_tried(env: dict[str, str]) -> None:
    """A worker without connector and mailer needs neither MQTT nor SMTP."""
    found = collect(env | everything_at(closed_port()) | {"STAGES": "normalizer"}, connect=True)
    assert {finding.what.split("=")[0] for finding in found} == VARIABLES - {"MQTT_URL", "SMTP_URL"}


def test_every_broker_of_the_list_is_tried(env: dict[str, str]) -> None:
    """Each bootstrap server is a probe of its own."""
    servers = f"127.0.0.1:{closed_port()},127.0.0.1:{closed_port()}"
    found = collect(env | everything_at(closed_port()) | {"KAFKA_BOOTSTRAP_SERVERS": servers}, connect=True)
    assert sum(finding.what.startswith("KAFKA_BOOTSTRAP_SERVERS=") for finding in found) == 2


async def test_a_silent_service_is_given_up(env: dict[str, str]) -> None:
    """What accepts and never answers is reported once the bound has passed, all services together."""

    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    server = await asyncio.start_server(silent, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    began = time.monotonic()
    probes = await probe_all(Settings.from_env(env | everything_at(port)), bound_seconds=0.5)
    assert time.monotonic() - began < 5
    server.close()
    assert {probe.variable: probe.problem for probe in probes} == dict.fromkeys(VARIABLES, "no answer within 0.5 s")


def test_the_command_says_what_to_do(
    env: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 0 and one line for a set-up without findings, 1 and a line per finding otherwise."""
    monkeypatch.setattr(command, "environment", lambda: env)
    assert command.run(connect=False) == 0
    assert "All is well" in capsys.readouterr().out
    env["STAGES"] = "x"
    assert command.run(connect=True) == 1
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith("environment: STAGES; found x; allowed: some of mqtt")
    assert out[1:] == ["No service was tried, because the settings cannot be used.", "1 thing(s) to correct."]


@pytest.mark.stack
def test_every_service_of_the_stack_answers(env: dict[str, str], stack_env: dict[str, str]) -> None:
    """Against real servers there is no finding, and each says what it is."""
    examined = examine(env | stack_env | {"CONFIG_PATH": env["CONFIG_PATH"]}, connect=True)
    assert examined.findings == []
    details = {probe.variable: probe.detail for probe in examined.probes}
    assert set(details) == VARIABLES
    assert details["DATABASE_URL"].startswith("PostgreSQL ")
    assert details["REDIS_URL"].startswith(("Valkey ", "Redis "))
    assert details["KAFKA_BOOTSTRAP_SERVERS"] == "1 broker(s)"


@pytest.mark.stack
def test_an_unknown_database_is_named(env: dict[str, str], database_url: str) -> None:
    """A server that answers and refuses is a finding with the server's reason."""
    base, _, query = database_url.partition("?")
    wrong = base.rsplit("/", 1)[0] + "/none_such" + (f"?{query}" if query else "")
    settings = Settings.from_env(env | everything_at(closed_port()) | {"DATABASE_URL": wrong})
    probe = next(found for found in asyncio.run(probe_all(settings)) if found.variable == "DATABASE_URL")
    assert "none_such" in (probe.problem or "")
