"""Sparkplug B driver: births, data and deaths of edge nodes and their devices.

The uplink's device is the node, ``{group}/{node}``, so that all messages of a node stay in order; readings of a
device are of ``{group}/{node}/{device}``. Each metric is a reading under its name, at its own time. Births also give
``STATUS``/``online`` true, deaths false. Missing sequence numbers are told in ``metadata["seq_gap"]``; an alias that
no birth named is kept as ``alias_{n}`` with ``metadata["unresolved_alias"]``, until the node is born again (command
``rebirth``).
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any, ClassVar, Final, NamedTuple

from devices import jsontext, protobuf
from devices.driver import MAX_READINGS, CommandTraits, Downlink, Driver, JsonSchema
from devices.model import CommandError, DecodeError, Reading, Uplink, Value
from devices.profiles import Profile, usable_device_id
from devices.sparkplug import payload as p
from devices.sparkplug.nodes import Node, Nodes

REBIRTH: Final = "Node Control/Rebirth"
_KINDS: Final = frozenset({"NBIRTH", "NDEATH", "NDATA", "DBIRTH", "DDEATH", "DDATA"})


class Topic(NamedTuple):
    """The parts of ``namespace/group/kind/node[/device]``; ``device`` is empty for a node's own messages."""

    namespace: str
    group: str
    kind: str
    node: str
    device: str

    @property
    def node_id(self) -> str:
        return f"{self.group}/{self.node}"

    @property
    def device_id(self) -> str:
        return f"{self.node_id}/{self.device}" if self.device else self.node_id


def _topic(route: str) -> Topic:
    parts = route.split("/")
    kind = parts[2] if len(parts) in (4, 5) else ""
    if kind not in _KINDS or (kind[0] == "D") is not (len(parts) == 5) or not all(parts):
        raise DecodeError(f"the topic {route!r:.120} is none of a Sparkplug node or device")
    topic = Topic(parts[0], parts[1], kind, parts[3], parts[4] if len(parts) == 5 else "")
    if not usable_device_id(topic.device_id):
        raise DecodeError(f"{topic.device_id!r:.120} can be no device's id")
    return topic


class SparkplugDriver(Driver):
    """Reads Sparkplug B messages; one instance remembers the nodes of one process."""

    name = "sparkplug"
    commands: ClassVar[Mapping[str, JsonSchema]] = {
        "rebirth": {"type": "object", "additionalProperties": False, "properties": {}},
    }
    traits: ClassVar[Mapping[str, CommandTraits]] = {
        "rebirth": CommandTraits(repeatable=True, supersedes=True, confirmed=False),
    }

    def __init__(self) -> None:
        self.nodes = Nodes()

    def decode(self, uplink: Uplink, profile: Profile) -> list[Reading]:
        """Return a reading a metric, and the status that a birth or death tells."""
        topic = _topic(uplink.route)
        message = protobuf.parse(p.PAYLOAD, uplink.data, "Sparkplug B payload")
        if len(message.metrics) > MAX_READINGS:
            raise DecodeError(f"the payload has more than {MAX_READINGS} metrics")
        seq = message.seq if message.HasField("seq") else None
        about: dict[str, Any] = {"message_type": topic.kind}
        if topic.kind == "NDEATH":
            return self._death(topic, message, uplink, profile, about)
        node = self.nodes.reborn(topic.node_id) if topic.kind == "NBIRTH" else self.nodes.get(topic.node_id)
        if topic.kind == "NBIRTH":
            node.born = True
            node.bd_seq = _bd_seq(message)
        if seq is not None:
            about["seq"] = seq
            gap = node.missed(seq)
            if gap:
                about["seq_gap"] = gap
        if not node.born:
            about["birth_missing"] = True
        readings: list[Reading] = []
        if topic.kind == "DDEATH":
            _add_status(readings, topic, uplink, profile, about, online=False, at=_time(message, uplink.received_at))
            return readings
        births = topic.kind in ("NBIRTH", "DBIRTH")
        for metric in message.metrics:
            if births:
                node.define(topic.device, metric)
            if metric.name != "bdSeq":
                readings.append(_metric(metric, node, topic, message, uplink, profile, about))
        if births:
            _add_status(readings, topic, uplink, profile, about, online=True, at=_time(message, uplink.received_at))
        return readings

    def _death(
        self, topic: Topic, message: Any, uplink: Uplink, profile: Profile, about: dict[str, Any]
    ) -> list[Reading]:
        node = self.nodes.get(topic.node_id)
        bd_seq = _bd_seq(message)
        readings: list[Reading] = []
        if node.born and bd_seq is not None and node.bd_seq is not None and bd_seq != node.bd_seq:
            # The will of a connection before the last birth (specification 5.5): the node lives.
            _add_status(
                readings, topic, uplink, profile, {**about, "stale_death": True}, online=True, at=uplink.received_at
            )
            return readings
        node.born = False
        # A will is written when the node connects: its time is not that of the death.
        _add_status(readings, topic, uplink, profile, about, online=False, at=uplink.received_at)
        return readings

    def state_of(self, uplink: Uplink) -> dict[str, Any]:
        """Return the topic that commands to the node go to."""
        topic = _topic(uplink.route)
        return {"command_topic": f"{topic.namespace}/{topic.group}/NCMD/{topic.node}"}

    def encode(
        self,
        command_type: str,
        payload: Mapping[str, Any],
        *,
        request_id: str,  # noqa: ARG002 - Sparkplug answers a rebirth by being born, not by an id
        device_id: str,
        state: Mapping[str, Any],
        now: datetime,
    ) -> Downlink:
        """Build a node command; raises CommandError."""
        self.check(command_type, payload)
        if "command_topic" not in state:
            raise CommandError(f"node {device_id} has not been heard of yet; its topic comes from its last message")
        message: Any = p.PAYLOAD()
        message.timestamp = int(now.timestamp() * 1000)
        metric = message.metrics.add()
        metric.name, metric.datatype, metric.boolean_value = REBIRTH, p.BOOLEAN, True
        return Downlink(route=state["command_topic"], data=message.SerializeToString(), qos=0)


def _bd_seq(message: Any) -> int | None:
    for metric in message.metrics:
        if metric.name == "bdSeq":
            value = p.simple(metric, metric.datatype)
            return value if type(value) is int else None
    return None


def _time(holder: Any, otherwise: datetime) -> datetime:
    return jsontext.from_milliseconds(holder.timestamp) if holder.HasField("timestamp") else otherwise


def _metric(  # noqa: PLR0917 - a step of decode, its names are decode's
    metric: Any, node: Node, topic: Topic, message: Any, uplink: Uplink, profile: Profile, about: dict[str, Any]
) -> Reading:
    definition, named = node.definition(topic.device, metric)
    if not metric.name and not metric.HasField("alias"):
        raise DecodeError("a metric has neither name nor alias")
    value: Value = p.value_of(metric, definition.datatype)
    shape = profile.shape(definition.name, (definition.name,), units=(definition.unit,))
    metadata = {**shape.metadata, **about}
    if not named:
        metadata["unresolved_alias"] = metric.alias
    if metric.is_historical:
        metadata["historical"] = True
    if metric.HasField("properties"):
        quality = p.properties(metric).get("Quality")
        if quality is not None:
            metadata["quality"] = quality
    return Reading(
        request_id=uplink.request_id,
        timestamp=_time(metric, _time(message, uplink.received_at)),
        device_id=topic.device_id,
        index=definition.name,
        values=[value],
        labels=shape.labels,
        display_names=shape.display_names,
        metadata=metadata,
    )


def _add_status(
    out: list[Reading],
    topic: Topic,
    uplink: Uplink,
    profile: Profile,
    about: dict[str, Any],
    *,
    online: bool,
    at: datetime,
) -> None:
    shape = profile.shape("STATUS", ("online",), category="status", trusted=True)
    out.append(
        Reading(
            request_id=uplink.request_id,
            timestamp=at,
            device_id=topic.device_id,
            index="STATUS",
            values=[online],
            labels=shape.labels,
            display_names=shape.display_names,
            metadata={**shape.metadata, **about},
        )
    )
