"""The embedded stack, against the real servers: they answer, their data last, and nothing of it is left behind."""

import asyncio
import json
import os
import signal
import smtplib
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import aiokafka
import aiomqtt
import asyncpg
import pytest
import redis.asyncio
from aiokafka.admin import AIOKafkaAdminClient, NewTopic

from tests.tools.support import CONNECTIONS, NAMES, ROOT, mails, until
from tools.stack import Stack, StackError, machine, processes
from tools.stack.processes import ProcessId


def mqtt(url: str, **options: object) -> aiomqtt.Client:
    """Return a client of the broker at `url`."""
    host, port = url.removeprefix("mqtt://").split(":")
    return aiomqtt.Client(host, int(port), **options)  # type: ignore[arg-type]


# -- one stack of all parts, shared


def test_environment_names_every_connection(stack: Stack) -> None:
    """The environment has every connection setting, on loopback, no two on one port, below the kernel's own range."""
    assert set(stack.env) == CONNECTIONS
    found = [stack.env[name].rsplit(":", 1)[-1].split("/")[0] for name in CONNECTIONS - {"DATA_DIR", "BROKER_PROFILE"}]
    assert len(set(found)) == len(found)
    outgoing = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    assert all(1024 < int(port) < outgoing for port in found)


def test_every_part_is_a_process_of_ours(stack: Stack) -> None:
    """Each part has a process of its own, and that process listens on the part's port."""
    pids = [stack.part(name).pid for name in NAMES]
    assert None not in pids
    assert len(set(pids)) == len(NAMES)
    for name in NAMES:
        recorded = ProcessId(stack.part(name).pid, processes.start_mark(stack.part(name).pid))
        assert processes.listens(recorded, stack.part(name).port())


@pytest.mark.parametrize("how", ["stop", "kill"])
async def test_kafka_keeps_its_records(stack: Stack, how: str) -> None:
    """An acknowledged record is there after an orderly stop and after SIGKILL, on the same port."""
    servers = stack.env["KAFKA_BOOTSTRAP_SERVERS"]
    topic = f"kept-{how}"
    admin = AIOKafkaAdminClient(bootstrap_servers=servers)
    await admin.start()
    await admin.create_topics([NewTopic(topic, 1, 1)])
    await admin.close()
    async with aiokafka.AIOKafkaProducer(bootstrap_servers=servers, acks="all") as producer:
        await producer.send_and_wait(topic, b"acknowledged")
    await asyncio.to_thread(getattr(stack.part("kafka"), how))
    assert stack.part("kafka").pid is None
    await asyncio.to_thread(stack.part("kafka").start)
    assert stack.env["KAFKA_BOOTSTRAP_SERVERS"] == servers
    async with aiokafka.AIOKafkaConsumer(topic, bootstrap_servers=servers, auto_offset_reset="earliest") as consumer:
        assert (await consumer.getone()).value == b"acknowledged"


@pytest.mark.parametrize("how", ["stop", "kill"])
async def test_postgresql_keeps_its_rows(stack: Stack, how: str) -> None:
    """A committed row is there after a stop and after SIGKILL of the whole server; the role is no superuser."""
    connection = await asyncpg.connect(stack.env["DATABASE_URL"])
    await connection.execute(f"CREATE TABLE kept_{how} (value int)")
    await connection.execute(f"INSERT INTO kept_{how} VALUES (42)")  # noqa: S608
    assert not await connection.fetchval("SELECT rolsuper FROM pg_roles WHERE rolname = current_user")
    await asyncio.to_thread(getattr(stack.part("postgresql"), how))
    await asyncio.to_thread(stack.part("postgresql").start)
    connection = await asyncpg.connect(stack.env["DATABASE_URL"])
    assert await connection.fetchval(f"SELECT value FROM kept_{how}") == 42  # noqa: S608
    await connection.execute(f"DROP TABLE kept_{how}")
    await connection.close()


@pytest.mark.parametrize("how", ["stop", "kill"])
async def test_valkey_keeps_its_keys(stack: Stack, how: str) -> None:
    """A key that the append-only file has is there after a restart."""
    async with redis.asyncio.from_url(stack.env["REDIS_URL"]) as client:
        await client.set(f"kept-{how}", "42")
        assert (await client.execute_command("WAITAOF", 1, 0, 30_000))[0] == 1
        await asyncio.to_thread(getattr(stack.part("valkey"), how))
        await asyncio.to_thread(stack.part("valkey").start)
    async with redis.asyncio.from_url(stack.env["REDIS_URL"]) as client:
        assert await client.get(f"kept-{how}") == b"42"
        await client.delete(f"kept-{how}")


async def test_broker_keeps_messages_for_an_absent_subscriber(stack: Stack) -> None:
    """What arrives while a persistent session is away, beyond mosquitto's own 1,000, is delivered after a restart."""
    session = {"identifier": "absent", "protocol": aiomqtt.ProtocolVersion.V311}
    async with mqtt(stack.env["MQTT_URL"], clean_session=False, **session) as subscriber:
        await subscriber.subscribe("kept/#", qos=1)
    async with mqtt(stack.env["MQTT_URL"]) as publisher:
        for number in range(1500):
            await publisher.publish("kept/x", str(number), qos=1)
    await asyncio.to_thread(stack.part("mqtt").stop)
    await asyncio.to_thread(stack.part("mqtt").start)
    received = []
    async with mqtt(stack.env["MQTT_URL"], clean_session=False, **session) as subscriber:
        async for message in subscriber.messages:
            received.append(int(message.payload))
            if len(received) == 1500:
                break
    async with mqtt(stack.env["MQTT_URL"], clean_session=True, **session):
        pass
    assert received == list(range(1500))


async def test_broker_passes_messages_above_the_largest_device_message(stack: Stack) -> None:
    """A message far above MAX_MESSAGE_BYTES reaches the subscriber, who is the one to refuse it."""
    async with mqtt(stack.env["MQTT_URL"]) as client:
        await client.subscribe("large", qos=1)
        await client.publish("large", b"x" * 10_000_000, qos=1)
        assert len((await anext(aiter(client.messages))).payload) == 10_000_000


def test_inbox_keeps_its_mails(stack: Stack) -> None:
    """A mail that SMTP accepted is listed after SIGKILL of the server."""
    before = len(mails(stack.env))
    with smtplib.SMTP("127.0.0.1", stack.part("smtp").port()) as client:
        client.sendmail("a@localhost", ["b@localhost"], b"Subject: kept\r\n\r\nbody\r\n")
    stack.part("smtp").kill()
    stack.part("smtp").start()
    assert [m["subject"] for m in mails(stack.env)[before:]] == ["kept"]


def test_a_paused_part_is_silent_and_goes_on(stack: Stack) -> None:
    """SIGSTOP keeps process and port but no answer comes; SIGCONT brings it back."""
    part = stack.part("mqtt")
    part.pause()
    assert part.alive
    with pytest.raises(TimeoutError), socket.create_connection(("127.0.0.1", part.port()), timeout=0.3) as connection:
        connection.sendall(b"\x10\x0c\x00\x04MQTT\x04\x02\x00\x3c\x00\x00")
        connection.recv(4)
    part.resume()
    part.wait_ready()


# -- small stacks of their own


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Stack]:
    """A stack with only Valkey, which starts in a tenth of a second."""
    stack = Stack(tmp_path / "state", {"valkey"})
    yield stack
    stack.stop(discard=True)


def test_a_port_taken_meanwhile_is_exchanged(small: Stack) -> None:
    """When a stranger has the remembered port, the part takes another one and never talks to the stranger."""
    small.start()
    remembered = small.part("valkey").port()
    small.stop()
    with socket.create_server(("127.0.0.1", remembered)) as stranger:
        stranger.settimeout(0)
        small.start()
        assert small.part("valkey").port() != remembered
        with pytest.raises(BlockingIOError):
            stranger.accept()


def test_a_restart_keeps_the_ports(small: Stack) -> None:
    """Where nobody took them, ports and environment are those of the last time."""
    small.start()
    first = small.env
    small.stop()
    small.start()
    assert small.env == first


def test_a_second_stack_on_a_folder_is_refused(small: Stack) -> None:
    """Two stacks never share a folder; the error names the process that has it."""
    small.start()
    with pytest.raises(StackError, match=rf"process {os.getpid()}\).*HEADRACE_STATE"):
        Stack(small.folder, {"valkey"}).start()
    assert small.part("valkey").alive


def test_a_process_with_another_start_time_is_left_alone(tmp_path: Path) -> None:
    """A recorded id that now belongs to somebody else is not touched."""
    with subprocess.Popen(["sleep", "600"]) as stranger:
        try:
            (tmp_path / "stack.json").write_text(json.dumps({"processes": {"valkey": [stranger.pid, "another"]}}))
            with Stack(tmp_path, {"valkey"}):
                assert stranger.poll() is None
            assert stranger.poll() is None
        finally:
            stranger.kill()


def test_a_program_does_not_run_unless_it_is_recorded(tmp_path: Path) -> None:
    """A stack that dies between starting a child and recording it leaves nothing behind."""
    marker = tmp_path / "ran"
    code = (
        "import os, pathlib; from tools.stack.processes import spawn\n"
        f"spawn(['touch', {str(marker)!r}], log=pathlib.Path({str(tmp_path / 'log')!r}), cwd=pathlib.Path('.'),"
        " record=lambda process: (print(process.pid, flush=True), os.kill(os.getpid(), 9)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == -signal.SIGKILL
    until(lambda: processes.start_mark(int(done.stdout)) is None, "the child is gone")
    assert not marker.exists()


def test_what_a_killed_test_session_left_is_cleared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A new temporary stack removes the folder of one whose process is gone, and leaves those of the living."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with subprocess.Popen(["true"]) as gone:
        pass
    dead, living = tmp_path / f"headrace-stack-{gone.pid}-x", tmp_path / f"headrace-stack-{os.getpid()}-x"
    dead.mkdir()
    living.mkdir()
    Stack.temporary(())
    assert (dead.exists(), living.exists()) == (False, True)


def test_start_can_be_cancelled(small: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    """A start that waits for an answer gives up when it is told to."""

    def never() -> None:
        raise ConnectionError

    monkeypatch.setattr(small.part("valkey"), "probe", never)
    threading.Timer(0.3, small.cancel).start()
    with pytest.raises(StackError, match="told to stop"):
        small.start()


async def test_amqtt_stands_in_for_mosquitto(small: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without mosquitto the broker is amqtt: QoS 1 works, and what it lacks is said."""
    monkeypatch.setattr(machine, "find_mosquitto", lambda: None)
    said: list[str] = []
    monkeypatch.setattr(small, "_report", said.append)
    await asyncio.to_thread(small.start, "mqtt")
    async with mqtt(small.env["MQTT_URL"], protocol=aiomqtt.ProtocolVersion.V311) as client:
        await client.subscribe("x", qos=1)
        await client.publish("x", b"1", qos=1)
        assert (await anext(aiter(client.messages))).payload == b"1"
    assert any(line.startswith("warning: mosquitto is not installed; amqtt") for line in said)


# -- errors say what to do


def test_missing_jars_say_what_to_run(small: Stack, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without Kafka's jars the error names `make install` and the variable for a broker of one's own."""
    monkeypatch.setattr(machine, "jars_folder", lambda *_: tmp_path)
    with pytest.raises(StackError, match=r"make install.*KAFKA_BOOTSTRAP_SERVERS"):
        small.start("kafka")


def test_a_server_that_ends_at_once_shows_its_last_words(small: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error has the log's path, its last lines, and the variable for a server of one's own."""
    command = ["sh", "-c", "echo no space left; exit 3"]
    monkeypatch.setattr(small.part("valkey"), "command", lambda: command)
    with pytest.raises(StackError, match=r"(?s)exit code 3.*valkey\.log.*no space left.*REDIS_URL.*--without valkey"):
        small.start()


def test_an_unknown_part_is_an_error(tmp_path: Path) -> None:
    """A part that does not exist is named, with those that do."""
    with pytest.raises(StackError, match="has no part rabbitmq; it has kafka"):
        Stack(tmp_path, {"rabbitmq"})
