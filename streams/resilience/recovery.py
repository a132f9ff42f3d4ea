"""Restoring tables and setting positions after a rebalance, through brokers that fail meanwhile.

Guarantees: a step that fails or takes too long is begun anew. Faust takes a step that timed out for the end of its
service (the app then never resumes its streams), and lets a step that raised end the worker. What a fetch brought of a
changelog goes into its table at once and waits nowhere, so a restore takes the memory of one fetch. Faust queues an
event for each record, which costs ten times as much and, with a queue as long as ours, memory by the length of the
changelog.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from aiokafka.errors import IllegalStateError
from faust.stores.rocksdb import Store as RocksStore
from faust.tables.manager import TableManager as FaustTableManager
from faust.tables.recovery import RebalanceAgain, ServiceStopped
from faust.tables.recovery import Recovery as FaustRecovery
from faust.types import TP

#: Between a step that failed and the next try.
AGAIN_SECONDS = 0.5


class Change:
    """A record of a changelog as a store takes it: an event that is its own message."""

    __slots__ = ("key", "offset", "partition", "tp", "value")

    def __init__(self, tp: TP, record: Any) -> None:
        self.tp = tp
        self.partition = tp.partition
        self.offset = record.offset
        self.key = record.key
        self.value = record.value

    @property
    def message(self) -> Change:
        """This record."""
        return self


class Recovery(FaustRecovery):
    """Faust's recovery, whose steps may fail."""

    def _set_recovery_started(self) -> None:
        super()._set_recovery_started()
        # The end of an earlier round is not that of this one.
        self.signal_recovery_end.clear()

    def take(self, tp: TP, records: Iterable[Any]) -> bool:
        """Write records of a changelog, in order, into their table; False where it has to see them one by one."""
        table: Any = self.tp_to_table.get(tp)
        offsets = self.active_offsets if tp in self.active_tps else self.standby_offsets
        if table is None or tp not in self.active_tps | self.standby_tps:
            return False
        if table._on_changelog_event is not None or not isinstance(table.data, RocksStore):
            return False
        seen: int | None = offsets.get(tp)
        changes: list[Any] = [Change(tp, record) for record in records if seen is None or record.offset > seen]
        if changes:
            table.apply_changelog_batch(changes)
            offsets[tp] = changes[-1].offset
            # Faust's own loop looks for the end, here and after five seconds of silence; this one it has seen already.
            self.tables.changelog_queue.put_nowait(changes[-1])
        return True

    async def _wait(self, coro: Any, timeout: Any = None) -> None:
        try:
            result = await self.wait_first(coro, self.signal_recovery_start, timeout=timeout)  # type: ignore[arg-type]
        except IllegalStateError:
            # A partition was revoked in the meantime: the rebalance that did it brings the next recovery.
            raise
        except Exception as exc:
            await self._begin_anew(f"{type(exc).__name__}: {exc}")
        else:
            done: list[Any] = list(result.done)
            if self.signal_recovery_start in done:
                raise RebalanceAgain
            if result.stopped:
                if self.should_stop:
                    raise ServiceStopped
                await self._begin_anew(f"not done within {timeout} s")

    async def _begin_anew(self, why: str) -> None:
        self.log.warning("Positions and tables of group %s are set up anew: %s", self.app.conf.id, why)
        await self.sleep(AGAIN_SECONDS)
        if self.should_stop:
            raise ServiceStopped
        self.signal_recovery_start.set()
        raise RebalanceAgain


class TableManager(FaustTableManager):
    """Faust's table manager with a recovery that lasts."""

    async def on_start(self) -> None:
        """Begin at once: tables are declared when modules are imported, none comes in the second that Faust waits."""
        await self._update_channels()
        await self.recovery.start()

    @property
    def recovery(self) -> Recovery:
        """Recovery service used by this table manager."""
        if self._recovery is None:
            self._recovery = Recovery(self.app, self, beacon=self.beacon, loop=self.loop)
        found: Any = self._recovery
        recovery: Recovery = found
        return recovery
