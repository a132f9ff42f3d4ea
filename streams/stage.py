"""A stage: one Faust app, so one consumer group, that the host app runs when ``STAGES`` names it.

    normalizer = Stage("normalizer")

    @normalizer.agent(topics.raw_data, chunks=True)
    async def normalize(stream):
        async for chunk in stream:
            await chunk.each(to_readings)

Why an app each: stages that share a group hold each other back (a partition paused for a dead database is paused for
the cache too). A stage that moves from the common worker to a process of its own goes on at its offset, with its
tables.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

from faust.app.base import BootStrategy
from faust.types import TopicT

import settings as configuration
from streams.codec import StructSchema
from streams.events import EVENTS
from streams.resilience.application import App
from streams.resilience.options import ResilienceOptions
from streams.topics import Declaration, errors

Check = Callable[[], Awaitable[None]]


class StageBoot(BootStrategy):
    """Starts a stage; one whose agents read channels alone (a connector) has no consumer and no group."""

    def producer_only(self) -> Iterable[Any]:
        """Return the services of a connector."""
        return self._chain(self.sensors(), self.kafka_producer(), self.agents())


class StageApp(App):
    """The app of one stage; it has no web server of its own, the host's shows all stages."""

    BootStrategy = StageBoot

    @property
    def reads_topics(self) -> bool:
        """Tell whether an agent or table of this app reads from Kafka."""
        return bool(self.tables) or any(isinstance(agent.channel, TopicT) for agent in self.agents.values())

    def on_init_dependencies(self) -> Iterable[Any]:
        """Return what this app has to start."""
        self.producer_only = not self.reads_topics
        return super().on_init_dependencies()

    async def on_start(self) -> None:
        """Start; channels of a connector flow at once, since no assignment is to be waited for."""
        await super().on_start()
        if self.producer_only:
            self.flow_control.resume()

    def _create_directories(self) -> None:
        self.conf.datadir.mkdir(parents=True, exist_ok=True)
        self.conf.appdir.mkdir(parents=True, exist_ok=True)
        self.conf.tabledir.mkdir(parents=True, exist_ok=True)


class Stage:
    """A named stage with its app, its topics and what has to answer before it is ready.

    ``part_of`` names the stage with which this one runs: a part has a group of its own and needs no word in ``STAGES``.
    """

    def __init__(self, name: str, *, chunks_in_flight: int = 4, part_of: str | None = None) -> None:
        self.name = name
        self.part_of = part_of
        self.settings = configuration.load()
        self.app: StageApp = StageApp(
            f"{self.settings.app_id}-{name}",
            resilience=dataclasses.replace(resilience_options(self.settings, name), chunks_in_flight=chunks_in_flight),
            listener=EVENTS,
            **faust_options(self.settings, name),
        )
        #: what must answer before the stage is ready, by name: coroutine functions that raise
        self.checks: dict[str, Check] = {}
        self.preparations: list[Callable[[], Any]] = []
        #: declared topics that agents of this stage consume, for the check of tables' changelogs
        self.consumes: list[Declaration] = []
        REGISTERED[name] = self

    def topic(self, declaration: Declaration) -> Any:
        """Return a Faust topic of this stage for ``declaration``, values as its message type, one event at a time."""
        return message_topic(self.app, declaration)

    def agent(self, source: Any, *, chunks: bool = False, **options: Any) -> Callable[[Any], Any]:
        """Make an agent of a function; with ``chunks`` its events are :class:`~streams.resilience.chunks.Chunk`.

        ``source`` is a declared topic, or any channel of ``stage.app``.
        """
        channel = source
        if isinstance(source, Declaration):
            self.consumes.append(source)
            channel = self.app.chunk_topic(source.name, source.decode) if chunks else self.topic(source)
        return self.app.agent(channel, **options)

    def service(self, cls: type[Any]) -> type[Any]:
        """Add a service that lives as long as the stage."""
        return self.app.service(cls)

    def prepare(self, function: Callable[[], Any]) -> Callable[[], Any]:
        """Have ``function`` called before the stage starts; what it raises (a profile that is wrong) ends the
        worker.
        """
        self.preparations.append(function)
        return function

    def check(self, name: str) -> Callable[[Check], Check]:
        """Register a coroutine function that raises while what the stage needs does not answer."""

        def register(function: Check) -> Check:
            self.checks[name] = function
            return function

        return register


REGISTERED: dict[str, Stage] = {}


def message_topic(app: Any, declaration: Declaration) -> Any:
    """Return a Faust topic of ``app`` whose events carry the declared message type."""
    return app.topic(declaration.name, value_type=None, key_type=str, schema=StructSchema(declaration.decode))


def faust_options(settings: configuration.Settings, folder: str) -> dict[str, Any]:
    """Return the options of a Faust app for ``settings``; its data lies in the folder of that name below
    ``DATA_DIR``.
    """
    broker = settings.broker
    return {
        "broker": [f"kafka://{server}" for server in settings.kafka_bootstrap_servers],
        # Faust would read BROKER_URL, TOPIC_PARTITIONS and more by itself, over what is said here
        "env_prefix": "HEADRACE_FAUST_",
        "datadir": str(settings.data_dir / folder),
        "store": "rocksdb://",
        "origin": "streams",
        "topic_partitions": settings.topic_partitions,
        "topic_replication_factor": settings.topic_replication,
        "topic_disable_leader": True,
        "table_standby_replicas": settings.table_standby_replicas,
        "recovery_consistency_check": False,
        "broker_session_timeout": broker.session_timeout_seconds,
        "broker_heartbeat_interval": broker.heartbeat_interval_seconds,
        "broker_rebalance_timeout": broker.rebalance_timeout_seconds,
        "broker_request_timeout": broker.request_timeout_seconds,
        "broker_max_poll_interval": broker.max_poll_interval_seconds,
        "broker_commit_interval": settings.commit_interval_seconds,
        "broker_client_id": f"{settings.app_id}-{folder}",
        "consumer_max_fetch_size": broker.fetch_partition_max_bytes,
        "consumer_auto_offset_reset": "earliest",
        "producer_linger": broker.linger_seconds,
        "producer_max_batch_size": broker.max_batch_bytes,
        "producer_max_request_size": settings.max_record_bytes,
        "producer_compression_type": None if broker.compression == "none" else broker.compression,
        "producer_request_timeout": broker.request_timeout_seconds,
        "producer_acks": -1,
        "web_enabled": False,
        "web_router_enabled": False,
        "web_tables_enabled": False,
        "web_host": settings.web_bind.host,
        "web_bind": settings.web_bind.host,
        "web_port": settings.web_bind.port,
        "worker_redirect_stdouts": False,
    }


def resilience_options(settings: configuration.Settings, stage: str) -> ResilienceOptions:
    """Return what the resilience layer has to know for ``stage``."""
    broker = settings.broker
    client = settings.kafka_client_options()
    client["metadata_max_age_ms"] = int(broker.metadata_max_age_seconds * 1000)
    return ResilienceOptions(
        stage=stage,
        dead_letter_topic=errors.name,
        client=client,
        consumer={
            "fetch_max_wait_ms": int(broker.fetch_max_wait_seconds * 1000),
            "fetch_max_bytes": broker.fetch_max_bytes,
            "fetch_min_bytes": 1,
        },
        producer={"enable_idempotence": True},
        in_flight_bytes=settings.in_flight_bytes,
        commit_timeout_seconds=broker.request_timeout_seconds,
        drain_seconds=settings.drain_seconds,
        shutdown_seconds=settings.shutdown_seconds,
        max_attempts=settings.max_attempts,
        retry_base_seconds=settings.retry_base_seconds,
        retry_cap_seconds=settings.retry_cap_seconds,
        healthy_seconds=settings.healthy_seconds,
        recreate_budget_seconds=settings.recreate_budget_seconds,
        health_interval_seconds=settings.health_interval_seconds,
        stuck_seconds=settings.stuck_seconds,
        offset_out_of_range=settings.offset_out_of_range,
        guard=settings.dlq_guard,
        guard_messages=settings.dlq_guard_messages,
        guard_devices=settings.dlq_guard_devices,
        guard_share=settings.dlq_guard_share,
        guard_probe_seconds=settings.dlq_guard_probe_seconds,
    )
