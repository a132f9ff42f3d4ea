"""The embedded Kafka broker.

Guarantees: what it has acknowledged survives its own end, orderly or by SIGKILL (the pages are the kernel's; a power
cut is another matter, there is one replica). A new port does not disturb the data: the controller's address is in the
configuration alone.
"""

import asyncio
import uuid
from base64 import urlsafe_b64encode
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from aiokafka.admin import AIOKafkaAdminClient

from tools.stack import machine
from tools.stack.errors import StackError
from tools.stack.part import NotReadyError, Part

_HERE = Path(__file__).parent
_QUICK_COMPILER = "-XX:TieredStopAtLevel=1"

# One node holds every internal topic. Few partitions of them: each costs a folder and some start-up time.
# message.max.bytes: MAX_MESSAGE_BYTES is 1 MiB, hexadecimal doubles it, JSON and headers come on top.
# broker.session.timeout.ms: a broker that was killed is not let in again before this time is over (Kafka's own: 9 s).
# group.min.session.timeout.ms: tests scale session time-outs down to a second.
_PROPERTIES = """\
process.roles=broker,controller
node.id=1
listeners=PLAINTEXT://127.0.0.1:{port},CONTROLLER://127.0.0.1:{controller}
advertised.listeners=PLAINTEXT://127.0.0.1:{port}
controller.listener.names=CONTROLLER
controller.quorum.voters=1@127.0.0.1:{controller}
inter.broker.listener.name=PLAINTEXT
listener.security.protocol.map=PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT
log.dirs={logs}
auto.create.topics.enable=false
num.partitions=4
default.replication.factor=1
offsets.topic.replication.factor=1
offsets.topic.num.partitions=4
transaction.state.log.replication.factor=1
transaction.state.log.min.isr=1
transaction.state.log.num.partitions=4
share.coordinator.state.topic.replication.factor=1
share.coordinator.state.topic.min.isr=1
share.coordinator.state.topic.num.partitions=1
group.initial.rebalance.delay.ms=0
broker.heartbeat.interval.ms=500
broker.session.timeout.ms=3000
group.min.session.timeout.ms=1000
message.max.bytes=8388608
replica.fetch.max.bytes=8388608
log.cleaner.dedupe.buffer.size=33554432
num.network.threads=2
num.io.threads=4
"""


class Kafka(Part):
    """Apache Kafka 4.1 from Maven Central's jars (`make install` fetches them)."""

    name: ClassVar[str] = "kafka"
    title: ClassVar[str] = "Kafka"
    port_names: ClassVar[Sequence[str]] = ("port", "controller")
    variable: ClassVar[str] = "KAFKA_BOOTSTRAP_SERVERS"
    #: Where the broker writes the classes that it has loaded, at its orderly end, for those that start later.
    write_classes_to: ClassVar[Path | None] = None
    #: For brokers that live for minutes, as those of tests: Java's quick compiler alone, which takes somewhat more than
    #: half of the CPU for the start and the first minute. In the long run it is the slower one.
    brief: ClassVar[bool] = False

    def prepare(self) -> None:
        """Format the log folder the first time, under its name only when it is complete; write server.properties."""
        if not self._logs.exists():
            draft = self.fresh_draft()
            self._write_properties(draft)
            self.run(
                *self._java("-Xmx128m", _QUICK_COMPILER),
                "kafka.tools.StorageTool",
                "format",
                "-t",
                self._new_cluster_id(),
                "-c",
                self._properties,
            )
            draft.rename(self._logs)
        self._write_properties(self._logs)

    def command(self) -> Sequence[str | Path]:
        """Return the broker's command: a small heap, and the collector that leaves the cores to the work."""
        write = [f"-XX:ArchiveClassesAtExit={self.write_classes_to}"] if self.write_classes_to else []
        compiler = [_QUICK_COMPILER] if self.brief else []
        return [
            *self._java("-Xms256m", "-Xmx512m", "-XX:+UseSerialGC", *compiler, *write),
            "kafka.Kafka",
            self._properties,
        ]

    def probe(self) -> None:
        """Ask for the cluster's metadata: our cluster, and its broker registered."""
        asyncio.run(self._probe())

    def env(self) -> dict[str, str]:
        """KAFKA_BOOTSTRAP_SERVERS."""
        return {"KAFKA_BOOTSTRAP_SERVERS": self.address()}

    @property
    def _logs(self) -> Path:
        return self.data / "logs"

    def _cluster_id(self) -> str | None:
        lines = (self._logs / "meta.properties").read_text().splitlines()
        return dict(line.split("=", 1) for line in lines if "=" in line).get("cluster.id")

    def _new_cluster_id(self) -> str:
        # A UUID as Kafka writes it; a leading "-" would be taken for an option.
        raw = uuid.UUID(int=self._rng.getrandbits(128)).bytes
        return urlsafe_b64encode(raw).decode().rstrip("=").replace("-", "A")

    def _write_properties(self, logs: Path) -> None:
        text = _PROPERTIES.format(port=self.port(), controller=self.port("controller"), logs=logs)
        self._properties.write_text(text)

    @property
    def _properties(self) -> Path:
        return self.data / "server.properties"

    def _java(self, *options: str) -> list[str]:
        jars = machine.kafka_jars()
        log4j = f"-Dlog4j2.configurationFile={_HERE / 'log4j2.properties'}"
        # With its classes as Java keeps them a broker starts with half the CPU. Java takes no archive but its own.
        classes = machine.class_archive()
        if classes.exists():
            options = (*options, f"-XX:SharedArchiveFile={classes}")
        return [machine.java(), *options, "-XX:-UsePerfData", log4j, "-cp", f"{jars}/*"]

    async def _probe(self) -> None:
        admin = AIOKafkaAdminClient(bootstrap_servers=self.address(), request_timeout_ms=5000)
        try:
            await admin.start()
            cluster = await admin.describe_cluster()
        finally:
            await admin.close()
        if cluster["cluster_id"] != (ours := self._cluster_id()):
            raise StackError(f"{self.address()} answers as cluster {cluster['cluster_id']}, ours is {ours}")
        if not cluster["brokers"]:
            raise NotReadyError("the broker is not registered yet")
