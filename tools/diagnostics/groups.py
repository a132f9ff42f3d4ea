"""How does a group do: state, members, assignment, lag per partition and whether it moves.

Guarantee: it only asks; it never joins a group and never commits.
"""

import asyncio
from dataclasses import asdict, dataclass, field
from typing import Any

import aiokafka
from aiokafka import TopicPartition
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.coordinator.protocol import ConsumerProtocolMemberAssignment

from tools.diagnostics.findings import Finding, Level


@dataclass(frozen=True, slots=True)
class Member:
    """One member of a group."""

    member_id: str
    client_id: str
    host: str
    partitions: tuple[str, ...]


@dataclass(slots=True)
class PartitionLag:
    """One partition of a group: what it committed, where the log ends, and what moved meanwhile."""

    partition: str
    committed: int
    end: int
    moved: int = 0
    produced: int = 0

    @property
    def lag(self) -> int:
        """Records that are not committed."""
        return max(0, self.end - self.committed)


@dataclass(slots=True)
class Group:
    """A group as seen over some seconds."""

    group_id: str
    state: str
    members: list[Member] = field(default_factory=list)
    lags: list[PartitionLag] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Return it for JSON."""
        return asdict(self) | {"lag": sum(lag.lag for lag in self.lags)}


async def describe(admin: AIOKafkaAdminClient, group_id: str) -> tuple[str, list[Member]]:
    """Return state and members of a group; ``Dead`` where there is none."""
    (response,) = await admin.describe_consumer_groups([group_id])
    entry = response.groups[0]
    members = []
    for raw in entry[5]:
        *first, client_id, host, _metadata, assignment = raw
        partitions: list[str] = []
        if assignment:
            decoded = ConsumerProtocolMemberAssignment.decode(assignment)
            partitions = [f"{topic}[{p}]" for topic, found in decoded.assignment for p in found]
        members.append(Member(first[0], client_id, host, tuple(sorted(partitions))))
    return entry[2], members


async def look(admin: AIOKafkaAdminClient, client: aiokafka.AIOKafkaConsumer, group_id: str, seconds: float) -> Group:
    """Look at a group twice, ``seconds`` apart. ``client``: a consumer without a group, for end offsets."""
    before = await _offsets(admin, client, group_id)
    await asyncio.sleep(seconds)
    after = await _offsets(admin, client, group_id)
    state, members = await describe(admin, group_id)
    group = Group(group_id, state, members)
    for tp, (committed, end) in sorted(after.items()):
        was, ended = before.get(tp, (committed, end))
        group.lags.append(PartitionLag(f"{tp.topic}[{tp.partition}]", committed, end, committed - was, end - ended))
    return group


async def _offsets(
    admin: AIOKafkaAdminClient, client: aiokafka.AIOKafkaConsumer, group_id: str
) -> dict[TopicPartition, tuple[int, int]]:
    committed = {
        tp: value.offset
        for tp, value in (await admin.list_consumer_group_offsets(group_id)).items()
        if value.offset >= 0
    }
    _, members = await describe(admin, group_id)
    # A partition that is assigned and was never committed has all of its records as lag.
    for name in (name for member in members for name in member.partitions):
        topic, _, number = name.rpartition("[")
        committed.setdefault(TopicPartition(topic, int(number[:-1])), -1)
    if not committed:
        return {}
    ends = await client.end_offsets(list(committed))
    begins = await client.beginning_offsets([tp for tp, offset in committed.items() if offset < 0])
    return {tp: (begins.get(tp, offset) if offset < 0 else offset, ends[tp]) for tp, offset in committed.items()}


def check(group: Group, seconds: float) -> list[Finding]:
    """Judge a group by what was seen over ``seconds``."""
    name, state = group.group_id, group.state
    lag = sum(partition.lag for partition in group.lags)
    if state == "Dead" and not group.lags:
        what = f"group {name} does not exist: no consumer has joined it and nothing was committed"
        return [Finding(Level.ERROR, "group", what, "Check the name: stages are called {APP_ID}-{stage}.")]
    if not group.members:
        level = Level.ERROR if lag else Level.NOTE
        what = f"group {name} has no members, and {lag} record(s) wait for it"
        return [Finding(level, "group", what, "Start its worker; if it runs, its log says why it cannot join.")]
    if state != "Stable":
        what = f"group {name} is rebalancing ({state}), still after {seconds:g} s"
        do = (
            "Look for a member that joins and leaves in turn: handlers longer than the poll interval, sessions that "
            "are too short, restarts."
        )
        return [Finding(Level.WARNING, "group", what, do)]
    findings = []
    stuck = [partition for partition in group.lags if partition.lag and not partition.moved]
    if stuck:
        owners = {p: member for member in group.members for p in member.partitions}
        shown = ", ".join(
            f"{p.partition} (lag {p.lag}, {owners[p.partition].client_id + ' on ' + owners[p.partition].host})"
            if p.partition in owners
            else f"{p.partition} (lag {p.lag}, nobody has it)"
            for p in stuck[:10]
        )
        findings.append(
            Finding(
                Level.ERROR,
                "group",
                f"group {name} is stuck: in {seconds:g} s nothing was committed of {shown}",
                "Look at that member's log and health: a handler that hangs, a message that is tried again and again, "
                "a sink that is away. A longer --test-duration tells stuck from slow.",
            )
        )
    growing = [p for p in group.lags if p.lag and p.moved and p.produced > p.moved]
    if growing:
        shown = ", ".join(f"{p.partition} (+{p.produced - p.moved} in {seconds:g} s)" for p in growing[:10])
        do = "Add workers (up to one per partition), or see what a handler waits for."
        findings.append(Finding(Level.WARNING, "group", f"group {name} falls behind: {shown}", do))
    return findings
