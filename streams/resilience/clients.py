"""What aiokafka's consumer leaves open: an end that is one, and what its errors say of offsets."""

from __future__ import annotations

import logging
from typing import Any

from aiokafka import TopicPartition
from aiokafka.errors import NoOffsetForPartitionError, OffsetOutOfRangeError

from streams.resilience.bounds import end, within

log = logging.getLogger(__name__)

#: What a fetch raises, once for each partition concerned, where ``auto_offset_reset`` is ``none``.
NO_POSITION = (OffsetOutOfRangeError, NoOffsetForPartitionError)
_TASKS = ("_coordination_task", "_heartbeat_task", "_commit_refresh_task")


def without_position(exc: BaseException) -> dict[TopicPartition, int | None]:
    """Return the partitions that one of ``NO_POSITION`` tells of: the offset that the log lacks, None without one."""
    told = exc.args[0]
    return dict(told) if isinstance(exc, OffsetOutOfRangeError) else {told: None}


async def close_consumer(consumer: Any, seconds: float) -> None:
    """Close ``consumer`` within ``seconds``, or end what its own ``stop`` leaves running when it is cut short.

    That is the metadata task, the fetches and the heartbeats: with a broker that is frozen, or a group that is joining.
    """
    try:
        await within(consumer.stop(), seconds)
    except Exception as exc:
        log.debug("the consumer of group %s was not closed in order: %r", consumer._group_id, exc)
    else:
        return
    coordinator, fetcher = consumer._coordinator, consumer._fetcher
    tasks = [getattr(coordinator, name, None) for name in _TASKS] + [getattr(fetcher, "_fetch_task", None)]
    await end(*[task for task in tasks if task is not None])
    for part in (fetcher, consumer._client):
        if part is not None:
            try:
                await within(part.close(), seconds)
            except Exception as exc:
                log.debug("a part of the consumer of group %s was not closed: %r", consumer._group_id, exc)
