"""Topics exist, as they are declared, before a stage reads or writes them.

Guarantees: a missing topic is created with its configuration; one that exists is taken as it is, unless that would
break keys or tables, which is an error that names the topic, what was found and what to do; a broker that is away is
waited for.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable
from typing import Any, NamedTuple

from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType
from aiokafka.errors import KafkaError, TopicAlreadyExistsError, for_code

from settings import Settings
from streams.resilience.backoff import Backoff
from streams.resilience.failures import Fatal
from streams.topics import Declaration

log = logging.getLogger(__name__)

Sleep = Callable[[float], Awaitable[Any]]


async def provision(
    settings: Settings, topics: Iterable[Declaration], *, sleep: Sleep = asyncio.sleep, stop: Callable[[], bool]
) -> None:
    """Create or check ``topics``; waits for Kafka until ``stop()`` says that it is no longer wanted.

    Raises:
        Fatal: a topic exists in a form that would break keys or tables.
    """
    backoff = Backoff(settings.retry_base_seconds, settings.broker.reconnect_backoff_max_seconds)
    while not stop():
        try:
            await _provision(settings, list(topics))
        except (KafkaError, OSError, TimeoutError) as exc:
            delay = backoff.next()
            log.warning(
                "Kafka is not ready (%s: %s); trying again in %.1f s. KAFKA_BOOTSTRAP_SERVERS=%s",
                type(exc).__name__,
                exc,
                delay,
                ",".join(settings.kafka_bootstrap_servers),
            )
            await sleep(delay)
        else:
            return


async def _provision(settings: Settings, topics: list[Declaration]) -> None:
    admin = AIOKafkaAdminClient(
        **settings.kafka_client_options(), request_timeout_ms=int(settings.broker.request_timeout_seconds * 1000)
    )
    await admin.start()
    try:
        known = set(await admin.list_topics())
        missing = [topic for topic in topics if topic.name not in known]
        for group in ([topic for topic in missing if not topic.like], [topic for topic in missing if topic.like]):
            if group:
                await _create(admin, settings, group, await _counts(admin))
        await _check(admin, [topic for topic in topics if topic.name in known])
        await _wait_for_leaders(admin, [topic.name for topic in topics])
    finally:
        await admin.close()


async def _counts(admin: AIOKafkaAdminClient) -> dict[str, int]:
    """Return the number of partitions of every topic that exists."""
    names = await admin.list_topics()
    return {topic["topic"]: len(topic["partitions"]) for topic in (await admin.describe_topics(names) if names else [])}


async def _create(
    admin: AIOKafkaAdminClient, settings: Settings, missing: list[Declaration], counts: dict[str, int]
) -> None:
    response = await admin.create_topics(
        [
            NewTopic(
                topic.name,
                counts.get(topic.like or "", settings.topic_partitions),
                settings.topic_replication,
                topic_configs=topic.config(settings),
            )
            for topic in missing
        ]
    )
    for name, code, message in (entry[:3] for entry in response.topic_errors):
        if code and code != TopicAlreadyExistsError.errno:
            raise for_code(code)(f"topic {name} cannot be created: {message}")
        if not code:
            log.info("Created topic %s", name)


async def _check(admin: AIOKafkaAdminClient, topics: list[Declaration]) -> None:
    if not topics:
        return
    resources = [ConfigResource(ConfigResourceType.TOPIC, topic.name) for topic in topics]
    policies: dict[str, str] = {}
    for response in await admin.describe_configs(resources):
        for entry in response.resources:
            code, name, values = entry[0], entry[3], entry[4]
            if not code:
                policies[name] = next((value[1] for value in values if value[0] == "cleanup.policy"), "delete")
    wrong = []
    for topic in topics:
        policy = policies.get(topic.name, "delete")
        if topic.compacted and "compact" not in policy:
            wrong.append(
                f"topic {topic.name} has cleanup.policy={policy}, and its latest value per key must be kept: "
                f"set cleanup.policy=compact on it"
            )
        elif not topic.compacted and "compact" in policy:
            wrong.append(
                f"topic {topic.name} has cleanup.policy={policy}, and each of its records counts, also those with the "
                f"same key: set cleanup.policy=delete on it"
            )
    if wrong:
        raise Fatal("; ".join(wrong))


async def _wait_for_leaders(admin: AIOKafkaAdminClient, names: list[str]) -> None:
    """Wait out the moment in which a topic just created has no leader."""
    for _ in range(100):
        described = await admin.describe_topics(names)
        if all(
            not topic["error_code"] and all(partition["leader"] >= 0 for partition in topic["partitions"])
            for topic in described
        ):
            return
        await asyncio.sleep(0.05)
    raise TimeoutError(f"no leader for a partition of {', '.join(names)}")


class TableNeeds(NamedTuple):
    """The topics that agents of a stage with tables consume, and the changelogs of these tables."""

    stage: str
    sources: list[str]
    changelogs: list[str]


async def table_partitions(settings: Settings, needs: Iterable[TableNeeds]) -> dict[str, int]:
    """Return, for each stage with tables, how many partitions its tables have: as many as the topics that they follow.

    Raises:
        Fatal: these topics differ among themselves, or from a changelog that exists: rows would be looked for in the
            wrong partition.
    """
    needs = list(needs)
    if not needs:
        return {}
    admin = AIOKafkaAdminClient(**settings.kafka_client_options())
    await admin.start()
    try:
        counts = await _counts(admin)
    finally:
        await admin.close()
    found: dict[str, int] = {}
    for stage, sources, changelogs in needs:
        present = {name: counts[name] for name in sources if name in counts}
        if len(set(present.values())) > 1:
            raise Fatal(
                f"stage {stage} keeps tables of "
                f"{', '.join(f'{n} ({c} partitions)' for n, c in sorted(present.items()))}: "
                f"these topics need the same number of partitions; create the ones that are short anew, or add to them"
            )
        if not present:
            continue
        found[stage] = wanted = next(iter(present.values()))
        for changelog in changelogs:
            if counts.get(changelog, wanted) != wanted:
                raise Fatal(
                    f"topic {next(iter(present))} has {wanted} partitions and {changelog}, which keeps a table of what "
                    f"comes from it, has {counts[changelog]}: rows would be looked for in the wrong partition. Give "
                    f"both the same number, or delete {changelog} to build the table anew"
                )
    return found
