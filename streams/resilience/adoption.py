"""The resilience layer for a Faust app that is not Headrace's.

    app = faust.App("orders", broker="kafka://localhost:9092")
    app.transport = ResilientTransport(app, dead_letters="orders-errors")

Guarantee: from that line on the agents, tables and topics of ``app`` are under the commit control that Headrace's
stages have (:mod:`streams.resilience.streams`), dead letters go to the topic that was named, and the clients are looked
after by a :class:`~streams.resilience.health.HealthMonitor`. Settings, stages and YAML of Headrace are neither needed
nor loaded.

How: Faust asks ``app`` itself what to do about a rebalance, a failed agent or the end, so that a transport alone cannot
keep the promise. The line makes ``app`` an instance of a class that is :class:`~streams.resilience.application.App` and
its former class; nothing of Faust is patched, and other apps of the process stay as they are.
"""

from __future__ import annotations

import warnings
from typing import Any

import faust
from faust.exceptions import AlreadyConfiguredWarning, ImproperlyConfigured
from faust.types import ProcessingGuarantee, TopicT
from yarl import URL

from streams.resilience.application import FAUST_OPTIONS, App, Listener
from streams.resilience.deadletter import Failure, Letter, describe
from streams.resilience.failures import FailureClass
from streams.resilience.health import HealthMonitor
from streams.resilience.options import ResilienceOptions
from streams.resilience.topics import Topic
from streams.resilience.transport import Transport

#: Between the bounds of session and rebalance and the moment when a group that has not settled counts as unwell.
JOIN_SPARE_SECONDS = 10.0


class LoggingListener(Listener):
    """Says in the app's log what happens to messages, one line each."""

    def retry(self, app: App, exc: BaseException, kind: FailureClass, delay_seconds: float) -> None:
        """A handler is called again."""
        app.log.warning(
            "%s: %s; the same events again in %.1f s (%s)", type(exc).__name__, describe(exc), delay_seconds, kind.value
        )

    def dead_letter(self, app: App, record: Any, failure: Failure) -> None:
        """A record becomes a dead letter."""
        app.log.warning(
            "Dead letter (%s) of %s[%d] offset %d: %s: %s",
            failure.kind,
            record.topic,
            record.partition,
            record.offset,
            type(failure.exception).__name__,
            describe(failure.exception),
        )

    def drop(self, app: App, record: Any, reason: str) -> None:
        """Nothing comes of a record."""
        app.log.warning("Dropped (%s): %s[%d] offset %d", reason, record.topic, record.partition, record.offset)

    def guard(self, app: App, reason: str | None) -> None:
        """The dead-letter guard has stopped the app, or lets it go on."""
        app.log.error("Dead-letter guard: %s", f"nothing more is taken: {reason}" if reason else "it goes on")

    def agent_failure(self, app: App, agent: Any, exc: BaseException) -> None:
        """An agent's body raised."""
        app.log.error("Agent %s raised %s; its body runs again", agent.name, type(exc).__name__, exc_info=exc)


class AdoptedApp(App):
    """What a Faust app becomes by :class:`ResilientTransport`; never made by itself."""

    letter_topic: Any

    def _prepare_compat_settings(self, options: Any) -> Any:
        return super()._prepare_compat_settings({**options, **FAUST_OPTIONS})

    async def on_start(self) -> None:
        """Refuse what the promise cannot be kept with, and look after the clients from now on."""
        await super().on_start()
        conf: Any = self.conf
        if conf.processing_guarantee == ProcessingGuarantee.EXACTLY_ONCE:
            raise ImproperlyConfigured(
                f"App {conf.id}: processing_guarantee=exactly_once goes with Faust's own transport alone; remove it"
            )
        for agent in self.agents.values():
            if isinstance(agent.channel, TopicT) and not isinstance(agent.channel, Topic):
                raise ImproperlyConfigured(
                    f"App {conf.id}: the topic of agent {agent.name} was made before app.transport was set; "
                    "set app.transport right after the app is made"
                )
        monitor = HealthMonitor(
            lambda: [self],
            interval_seconds=self.resilience.health_interval_seconds,
            join_seconds=conf.broker_session_timeout + conf.broker_rebalance_timeout + JOIN_SPARE_SECONDS,
            beacon=self.beacon,
        )
        await self.add_runtime_dependency(monitor)

    async def _write_letters(self, letters: list[Letter], wanted: Any) -> None:
        if not self.testing:
            await self.letter_topic.maybe_declare()
        await super()._write_letters(letters, wanted)


class ResilientTransport(Transport):
    """``app.transport`` of any Faust app; makes ``app`` one under commit control, see the module.

    ``dead_letters`` is the topic for what can never be handled; it is created unless ``topic_allow_declare`` is off.
    ``listener`` is told what happens to messages; the log says it where there is none.
    ``options`` are fields of :class:`~streams.resilience.options.ResilienceOptions`. Raises ImproperlyConfigured where
    agents or tables were made before.
    """

    def __init__(self, app: faust.App, *, dead_letters: str, listener: Listener | None = None, **options: Any) -> None:
        name = app._default_options[0]
        if not dead_letters:
            raise ImproperlyConfigured(f"App {name}: dead_letters is empty; name the topic that they go to")
        # ``topics`` and ``tables`` are cached where an agent or a table was made.
        if app.agents or {"topics", "tables"} & app.__dict__.keys():
            raise ImproperlyConfigured(
                f"App {name} has agents or tables already; set app.transport right after the app is made"
            )
        if isinstance(app, App):
            raise ImproperlyConfigured(f"App {name} is under commit control already")
        super().__init__([], app)
        kind = type(app)
        adopted: Any = app
        adopted.__class__ = type(kind.__name__, (AdoptedApp, kind), {"__module__": kind.__module__})
        adopted.begin_resilience(
            ResilienceOptions(
                stage=name,
                dead_letter_topic=dead_letters,
                **{"producer": {"enable_idempotence": True}, **options},
            ),
            listener or LoggingListener(),
        )
        if app._conf is not None:
            with warnings.catch_warnings():
                # That somebody has read the old values does not matter: on_start looks for what was made with them.
                warnings.simplefilter("ignore", AlreadyConfiguredWarning)
                for option, value in FAUST_OPTIONS.items():
                    setattr(app.conf, option, value)
        adopted._producer_transport = self
        adopted.letter_topic = app.topic(dead_letters, key_serializer="raw", value_serializer="raw")

    @property
    def url(self) -> list[URL]:
        """The brokers, as the app is configured when they are first asked for."""
        urls: list[URL] = self.app.conf.broker_consumer
        return urls

    @url.setter
    def url(self, _url: Any) -> None:
        """Leave it to the configuration."""
