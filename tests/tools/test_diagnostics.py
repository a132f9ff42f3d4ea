"""The diagnostics and the quick check, against real brokers."""

from __future__ import annotations

import asyncio
import json
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from aiokafka.admin import AIOKafkaAdminClient, NewTopic

from streams.resilience import AsyncResilientKafkaConsumer
from streams.resilience.cluster import ClusterInfo, PartitionInfo
from tests.resilience.consumers.conftest import QUICK, broker, eventually  # noqa: F401 - a fixture
from tools.diagnostics.cluster import check_profile, check_topics, read_settings
from tools.diagnostics.command import diagnose, parser
from tools.diagnostics.findings import Level
from tools.diagnostics.groups import Group, Member, PartitionLag, check, describe
from tools.stack import Stack
from tools.stack.ports import choose

ROOT = Path(__file__).resolve().parents[2]
rng = random.Random()


def run(tool: str, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Run a tool as a user does."""
    return subprocess.run(
        [sys.executable, f"tools/{tool}", *arguments],
        cwd=ROOT,
        env={"PATH": "/usr/bin:/bin", "HEADRACE_STATE": "/nonexistent", **env},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def found(result: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    """Return the JSON of a run."""
    assert result.stdout, result.stderr
    whole: dict[str, Any] = json.loads(result.stdout)
    assert whole["exit_code"] == result.returncode
    return whole


def test_a_wrong_port() -> None:
    """An unreachable broker is an error that says what to do, within 10 s; exit 2."""
    port = choose(set(), rng)
    result = found(run("kafka_diagnostics.py", "--json", "--bootstrap-servers", f"127.0.0.1:{port}"))
    (finding,) = result["findings"]
    assert f"127.0.0.1:{port} cannot be used (tcp)" in finding["what"]
    assert "listeners" in finding["do"]
    assert result["exit_code"] == 2
    assert result["seconds"] < 10


def test_a_port_that_never_answers() -> None:
    """A port that takes connections and says nothing is reported within 10 s as well."""
    import socket

    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        result = found(run("kafka_diagnostics.py", "--json", "--bootstrap-servers", address))
    assert "cannot be used (kafka)" in result["findings"][0]["what"]
    assert result["seconds"] < 10


def test_a_good_cluster(kafka: str) -> None:
    """Nothing to do (but what a busy machine's latency may say), latency measured, the topic for it deleted."""
    result = found(run("kafka_diagnostics.py", "--json", "--test-duration", "1", KAFKA_BOOTSTRAP_SERVERS=kafka))
    assert [finding for finding in result["findings"] if finding["check"] != "latency"] == []
    assert result["exit_code"] == len(result["findings"])
    assert result["latency"]["records"] >= 1
    text = run("kafka_diagnostics.py", "--test-duration", "1", "--bootstrap-servers", kafka)
    assert text.stdout.startswith(("OK  ", "WARNING  latency")), text.stderr
    assert "cluster  " in text.stdout

    async def topics() -> list[str]:
        admin = AIOKafkaAdminClient(bootstrap_servers=kafka)
        await admin.start()
        try:
            return [name for name in await admin.list_topics() if name.startswith("headrace-diagnostics-")]
        finally:
            await admin.close()

    async def gone() -> bool:
        return not await topics()

    asyncio.run(eventually(gone, "the topic's deletion"))


def test_heartbeat_over_a_third_of_the_session(kafka: str) -> None:
    """Settings that bite each other are found, with the rule."""
    result = found(
        run(
            "kafka_diagnostics.py",
            "--json",
            "--test-duration",
            "1",
            KAFKA_BOOTSTRAP_SERVERS=kafka,
            KAFKA_SESSION_TIMEOUT_SECONDS="60",
            KAFKA_HEARTBEAT_INTERVAL_SECONDS="30",
        )
    )
    assert result["exit_code"] == 2
    assert "KAFKA_HEARTBEAT_INTERVAL_SECONDS=30" in result["findings"][0]["what"]
    assert "at most a third" in result["findings"][0]["do"]


def test_settings_and_the_broker() -> None:
    """A session outside of the broker's bounds and a handler beyond the poll interval are found."""
    settings, none = read_settings({})
    assert none == []
    bounds = {"group.min.session.timeout.ms": 6000, "group.max.session.timeout.ms": 60000}
    session, poll = check_profile(settings.broker, bounds, 700)
    assert "6 to 60 s" in session.what
    assert "KAFKA_MAX_POLL_INTERVAL_SECONDS=600" in poll.what
    assert check_profile(settings.broker, {**bounds, "group.max.session.timeout.ms": 300000}, 10) == []


async def test_a_stuck_group(broker: Any) -> None:  # noqa: F811
    """A group whose lag does not move is found, its members and offsets are as before."""
    topic, group = await broker.topic("stuck", partitions=2), broker.group()
    hang = asyncio.Event()

    async def handle(message: Any) -> None:
        if message.value == 2:
            await hang.wait()

    consumer = AsyncResilientKafkaConsumer(topic, group, broker.servers, **{**QUICK, "drain_timeout": 0.1})
    task = asyncio.create_task(consumer.consume_messages(handle))
    await broker.send(topic, [1, 2, 3], partition=0)

    async def committed() -> bool:
        return await broker.committed(group) == {(topic, 0): 1}

    await eventually(committed, "the first commit")
    before = await describe(broker.admin, group)
    result = found(
        await asyncio.to_thread(
            run,
            "kafka_diagnostics.py",
            "--json",
            "--group-id",
            group,
            "--bootstrap-servers",
            broker.servers,
            "--test-duration",
            "2",
        )
    )
    assert await describe(broker.admin, group) == before
    assert await committed()
    (finding,) = [finding for finding in result["findings"] if finding["check"] == "group"]
    assert f"{topic}[0] (lag 2, aiokafka" in finding["what"]
    assert result["group"]["state"] == "Stable"
    assert len(result["group"]["members"]) == 1
    hang.set()
    await consumer.stop()
    await task
    empty = found(
        await asyncio.to_thread(
            run,
            "kafka_diagnostics.py",
            "--json",
            "--group-id",
            "nobody",
            "--bootstrap-servers",
            broker.servers,
            "--test-duration",
            "1",
        )
    )
    assert "group nobody does not exist" in empty["findings"][0]["what"]


def test_what_a_group_can_be() -> None:
    """Rebalancing, without members, falling behind: each has its finding; a good one has none."""
    member = Member("m", "c", "/h", ("t[0]",))
    good = Group("g", "Stable", [member], [PartitionLag("t[0]", 5, 9, moved=4, produced=4)])
    assert check(good, 1) == []
    (behind,) = check(Group("g", "Stable", [member], [PartitionLag("t[0]", 5, 9, moved=1, produced=4)]), 1)
    assert "falls behind: t[0] (+3" in behind.what
    (empty,) = check(Group("g", "Empty", [], [PartitionLag("t[0]", 5, 9)]), 1)
    assert (empty.level, "4 record(s) wait" in empty.what) == (Level.ERROR, True)
    (moving,) = check(Group("g", "PreparingRebalance", [member], []), 1)
    assert "rebalancing" in moving.what


def test_under_replicated_partitions() -> None:
    """A partition with a replica behind is a warning, one without a leader an error that names the nodes."""
    info = ClusterInfo("c", 1, (), {"t": (PartitionInfo(0, 1, (1, 2), (1,)), PartitionInfo(1, -1, (2,), (2,)))})
    leaderless, behind = check_topics(info)
    assert (leaderless.level, "t[1]" in leaderless.what, "node 2" in leaderless.do) == (Level.ERROR, True, True)
    assert (behind.level, "t[0]" in behind.what) == (Level.WARNING, True)
    assert "does not exist" in check_topics(info, "u")[0].what


@pytest.fixture
def second_broker() -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """A cluster of two; the second broker advertises an address where nobody listens."""
    stack = Stack.temporary({"kafka"})
    child = None
    try:
        stack.start()
        first: Any = stack.part("kafka")
        logs = stack.folder / "second"
        properties = stack.folder / "second.properties"
        port = choose({first.port(), first.port("controller")}, rng)
        dead = choose({first.port(), first.port("controller"), port}, rng)
        lines = [line for line in first._properties.read_text().splitlines() if "=" in line]
        values = dict(line.split("=", 1) for line in lines)
        values |= {
            "process.roles": "broker",
            "node.id": "2",
            "listeners": f"PLAINTEXT://127.0.0.1:{port}",
            "advertised.listeners": f"PLAINTEXT://127.0.0.1:{dead}",
            "log.dirs": str(logs),
        }
        properties.write_text("".join(f"{name}={value}\n" for name, value in values.items()))
        cluster_id = first._cluster_id()
        command = [str(part) for part in first._java("-Xmx256m")]
        subprocess.run(
            [*command, "kafka.tools.StorageTool", "format", "-t", cluster_id, "-c", str(properties)],
            check=True,
            capture_output=True,
        )
        child = subprocess.Popen(
            [*command, "kafka.Kafka", str(properties)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        yield first.address(), child
    finally:
        if child is not None:
            child.kill()
            child.wait()
        stack.stop(discard=True)


async def test_advertised_address_and_leaderless(second_broker: Any) -> None:
    """An advertised address that cannot be reached, then a partition that its broker's death leaves leaderless."""
    servers, child = second_broker
    admin = AIOKafkaAdminClient(bootstrap_servers=servers)
    await admin.start()

    async def two() -> bool:
        return len((await admin.describe_cluster())["brokers"]) == 2

    await eventually(two, "the second broker")
    options = parser().parse_args(["--bootstrap-servers", servers, "--test-duration", "0.5"])
    findings, _ = await diagnose(options, {})
    advertised = [finding for finding in findings if finding.check == "advertised addresses"]
    assert "broker 2 advertises 127.0.0.1:" in advertised[0].what
    assert "advertised.listeners" in advertised[0].do
    await admin.create_topics([NewTopic("orphan", -1, -1, replica_assignments={0: [2]})])
    child.kill()
    child.wait()

    async def leaderless() -> bool:
        described = [t for t in await admin.describe_topics() if t["topic"] == "orphan"]
        return bool(described) and described[0]["partitions"][0]["leader"] < 0

    await eventually(leaderless, "the loss of the leader")
    await admin.close()
    findings, _ = await diagnose(options, {})
    (finding,) = [finding for finding in findings if finding.check == "topics"]
    assert "1 partition(s) have no leader: orphan[0]" in finding.what
    assert "node 2" in finding.do


def test_quick_check(kafka: str) -> None:
    """Every check holds against a broker; against nothing it says so and exits 1."""
    result = run("test_kafka_improvements.py", KAFKA_BOOTSTRAP_SERVERS=kafka)
    assert result.returncode == 0, result.stdout + result.stderr
    assert [line.split(":")[0] for line in result.stdout.splitlines()[:-1]] == [
        "ok      tuned values",
        "ok      broker",
        "ok      helpers",
        "ok      recreation",
    ]
    port = choose(set(), rng)
    nothing = run("test_kafka_improvements.py", KAFKA_BOOTSTRAP_SERVERS=f"127.0.0.1:{port}")
    assert nothing.returncode == 1
    assert f"FAILED  broker: no broker of 127.0.0.1:{port} can be reached" in nothing.stdout
    assert "make stack" in nothing.stdout
    assert "Traceback" not in nothing.stderr
