"""Restoring tables and setting positions after a rebalance, through brokers that fail meanwhile.

Guarantee: a step that fails or takes too long is begun anew. Faust takes a step that timed out for the end of its
service (the app then never resumes its streams), and lets a step that raised end the worker.
"""

from __future__ import annotations

from typing import Any

from aiokafka.errors import IllegalStateError
from faust.tables.manager import TableManager as FaustTableManager
from faust.tables.recovery import RebalanceAgain, ServiceStopped
from faust.tables.recovery import Recovery as FaustRecovery

#: Between a step that failed and the next try.
AGAIN_SECONDS = 0.5


class Recovery(FaustRecovery):
    """Faust's recovery, whose steps may fail."""

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

    @property
    def recovery(self) -> Recovery:
        """Recovery service used by this table manager."""
        if self._recovery is None:
            self._recovery = Recovery(self.app, self, beacon=self.beacon, loop=self.loop)
        found: Any = self._recovery
        recovery: Recovery = found
        return recovery
