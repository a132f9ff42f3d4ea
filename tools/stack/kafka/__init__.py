"""Apache Kafka as one KRaft node: broker and controller in one process, no ZooKeeper, no container."""

from tools.stack.kafka.broker import Kafka

__all__ = ["Kafka"]
