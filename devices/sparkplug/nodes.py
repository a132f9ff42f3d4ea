"""What a host has to remember of edge nodes: aliases, types and units from births, the sequence number, who is alive.

The memory is bounded (nodes least recently heard of go first) and belongs to one process: after a restart, or when
the node's messages move to another worker, it is empty until the node's next birth. Messages of one node come here in
order, because they are keyed by the node.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

from devices.model import DecodeError
from devices.sparkplug import payload as p

MAX_NODES: Final = 4_096
MAX_METRICS: Final = 10_000


class Definition(NamedTuple):
    """What a birth says of a metric."""

    name: str
    datatype: int
    unit: str


@dataclass
class Node:
    """One edge node since its last birth. Aliases are unique in a node, its devices included (specification 6.4.4)."""

    seq: int | None = None
    bd_seq: int | None = None
    born: bool = False
    aliases: dict[int, Definition] = field(default_factory=dict)
    names: dict[tuple[str, str], Definition] = field(default_factory=dict)

    def missed(self, seq: int | None) -> int:
        """Take the next sequence number; return how many messages are missing before it. The same again is a
        redelivery."""
        if seq is None:
            return 0
        gap = 0 if self.seq is None or seq == self.seq else (seq - self.seq - 1) % 256
        self.seq = seq
        return gap

    def define(self, device: str, metric: Any) -> None:
        """Remember what a birth says of a metric."""
        if not metric.name:
            return
        if len(self.names) >= MAX_METRICS:
            raise DecodeError(f"the node has more than {MAX_METRICS} metrics")
        unit = p.properties(metric).get("engUnit")
        found = Definition(metric.name, metric.datatype, unit if isinstance(unit, str) else "")
        self.names[device, metric.name] = found
        if metric.HasField("alias"):
            self.aliases[metric.alias] = found

    def definition(self, device: str, metric: Any) -> tuple[Definition, bool]:
        """Return what is known of a metric, and whether its name is: an alias that no birth named has none."""
        known = self.names.get((device, metric.name)) if metric.name else self.aliases.get(metric.alias)
        datatype = metric.datatype if metric.HasField("datatype") else None
        if known is not None:
            return (known if datatype is None else known._replace(datatype=datatype)), True
        return Definition(metric.name or f"alias_{metric.alias}", datatype or 0, ""), bool(metric.name)


class Nodes:
    """The nodes that this process has heard of."""

    def __init__(self) -> None:
        self._nodes: OrderedDict[str, Node] = OrderedDict()

    def __len__(self) -> int:
        return len(self._nodes)

    def get(self, name: str) -> Node:
        """Return the node, made where it is not known; the one heard of longest ago makes room."""
        node = self._nodes.get(name)
        if node is None:
            if len(self._nodes) >= MAX_NODES:
                self._nodes.popitem(last=False)
            node = self._nodes[name] = Node()
        else:
            self._nodes.move_to_end(name)
        return node

    def reborn(self, name: str) -> Node:
        """Return the node as a birth finds it: nothing known."""
        self._nodes.pop(name, None)
        return self.get(name)
