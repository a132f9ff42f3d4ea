"""The host app: what ``faust -A streams worker`` loads, whatever stages it is to run.

Guarantees: the web server answers from the start, before Kafka does; each stage that ``STAGES`` names runs as an app of
its own (group ``{APP_ID}-{stage}``) inside this worker; agents that a user adds to ``streams.app`` run in the host's
own group ``{APP_ID}``, with the same promise. An agent module that cannot be imported is an error, not a warning.
"""

from __future__ import annotations

import asyncio
import importlib
import pkgutil
from collections.abc import Callable, Iterable
from typing import Any, cast

from mode import Service

import settings as configuration
from devices.configfile import ConfigErrors
from streams import logs, metrics, topics
from streams.events import EVENTS
from streams.provision import TableNeeds, provision, table_partitions
from streams.resilience.bounds import within
from streams.resilience.failures import Fatal
from streams.resilience.health import LOOK_UP_SECONDS, HealthMonitor
from streams.resilience.watchdog import Culprits, Watchdog
from streams.stage import REGISTERED, Stage, StageApp, StageBoot, faust_options, resilience_options

SETTINGS = configuration.load()


class HostBoot(StageBoot):
    """Starts web and stages first; the host's own consumer only where somebody added an agent to it."""

    def server(self) -> Iterable[Any]:
        """Return the services of a worker that has agents of its own."""
        return self._chain(
            self.sensors(),
            self.web_server(),
            [cast(HostApp, self.app).pipeline],
            self.kafka_producer(),
            self.kafka_consumer(),
            self.agents(),
            self.kafka_conductor(),
            self.tables(),
        )

    def producer_only(self) -> Iterable[Any]:
        """Return the services of a worker that runs stages alone; its producer starts when somebody sends."""
        return self._chain(self.sensors(), self.web_server(), [cast(HostApp, self.app).pipeline])


class Pipeline(Service):
    """Prepares the topics and runs the stages."""

    def __init__(self, host: HostApp, **kwargs: Any) -> None:
        self.host = host
        self.problem: str | None = "starting"
        broker = SETTINGS.broker
        self.health = HealthMonitor(
            host.apps,
            interval_seconds=SETTINGS.health_interval_seconds,
            join_seconds=broker.session_timeout_seconds + broker.rebalance_timeout_seconds + 10.0,
            prepare=self.prepare_topics,
        )
        #: the changelogs of the stages' tables: made before a stage starts, so that its consumer knows them at once
        self.changelogs: list[topics.Declaration] = []
        self.culprits = Culprits(SETTINGS.data_dir / "culprits.json")
        super().__init__(**kwargs)

    async def on_stop(self) -> None:
        """End all stages at the same time, so that they share the bound of the end; watch nothing any longer."""
        self.watchdog.stop()
        await self.health.stop()
        stages = [stage for stage in self.host.stages() if stage.app.started]
        ends = await asyncio.gather(*(stage.app.stop() for stage in stages), return_exceptions=True)
        for stage, end in zip(stages, ends, strict=True):
            if isinstance(end, Exception):
                self.log.error("Stage %s did not end in order: %r; what is not committed comes again", stage.name, end)

    async def on_start(self) -> None:
        """Start the stages in the background: the web server tells meanwhile how far it is."""
        self.watchdog = Watchdog(SETTINGS.stuck_seconds, self.culprits)
        self.watchdog.start()
        self.add_future(self._run())

    async def prepare_topics(self) -> None:
        """Create what is missing of the topics, also after a broker came back without them."""
        declared = [*topics.ALL, *self.changelogs]
        await provision(SETTINGS, declared, sleep=self.sleep, stop=lambda: self.should_stop)

    async def missing_topics(self) -> list[str]:
        """Return the declared topics that Kafka does not have; none while there is no client to ask with."""
        for app in self.host.apps():
            client = app.producer.client if app.started and app._producer is not None else None
            if client is not None:
                known = (await within(client.fetch_all_metadata(), LOOK_UP_SECONDS)).topics()
                return [declared.name for declared in topics.ALL if declared.name not in known]
        return []

    @Service.task
    async def _declare_again(self) -> None:
        """Declare the topics that a broker has lost: no client of a worker that only produces would do so."""
        while not self.should_stop:
            await self.sleep(SETTINGS.health_interval_seconds)
            if self.problem is not None:
                continue
            try:
                missing = await self.missing_topics()
                if missing:
                    self.log.error("Kafka has no topic %s any more: declared again, empty", ", ".join(missing))
                    await self.prepare_topics()
            except Exception as exc:
                # Kafka is away, or refuses: the stages say so, and this is tried again.
                self.log.debug("Topics not looked up: %r", exc)

    async def _run(self) -> None:
        try:
            stages = self.host.stages()
            for stage in stages:
                stage.app.condemned = self.culprits.condemned()
                for preparation in stage.preparations:
                    self._prepare(stage, preparation)
            self.problem = "waiting for Kafka"
            await self.prepare_topics()
            if self.should_stop:
                return
            needs = [found for stage in stages if (found := table_needs(stage))]
            counts = await table_partitions(SETTINGS, needs)
            self.changelogs = [changelog for one in needs for changelog in changelog_topics(one)]
            if self.changelogs:
                await self.prepare_topics()
            for stage in stages:
                if stage.name in counts:
                    stage.app.conf.topic_partitions = counts[stage.name]
            self.problem = None
            for stage in stages:
                stage.app.finalize()
            await asyncio.gather(*(self.add_runtime_dependency(stage.app) for stage in stages))
            await self.add_runtime_dependency(self.health)
        except asyncio.CancelledError:
            raise
        except Exception as exc:
            self.problem = f"{type(exc).__name__}: {exc}"
            if not isinstance(exc, Fatal):
                self.log.exception("The stages cannot be started")
            else:
                self.log.error("The stages cannot be started: %s", exc)  # noqa: TRY400  (a known cause, in words)
            await self.crash(exc)

    @staticmethod
    def _prepare(stage: Stage, preparation: Callable[[], Any]) -> None:
        try:
            preparation()
        except ConfigErrors as exc:
            raise Fatal(f"stage {stage.name} cannot start; `faust -A streams check` tells the same:\n{exc}") from exc

    @Service.task
    async def _look(self) -> None:
        from streams.web import watch

        await watch(self)


def table_needs(stage: Stage) -> TableNeeds | None:
    """Return what a stage's tables follow; None for a stage without tables."""
    changelogs = sorted(stage.app.tables.changelog_topics)
    if not changelogs:
        return None
    return TableNeeds(stage.name, [declared.name for declared in stage.consumes if not declared.compacted], changelogs)


def changelog_topics(needs: TableNeeds) -> list[topics.Declaration]:
    """Return the declarations of a stage's changelogs, with as many partitions as the topics that its tables follow."""
    like = needs.sources[0] if needs.sources else None
    return [topics.Declaration(name, name, None, "forever", compacted=True, like=like) for name in needs.changelogs]


class HostApp(StageApp):
    """The app ``streams.app``."""

    BootStrategy = HostBoot

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.pipeline = Pipeline(self, beacon=self.beacon)
        self._loaded = False

    def on_init_dependencies(self) -> Iterable[Any]:
        """Return what a worker of the chosen stages has to start."""
        self.load()
        return super().on_init_dependencies()

    def load(self) -> None:
        """Import every module of ``agents`` and ``tables``; what cannot be imported is raised."""
        if self._loaded:
            return
        self._loaded = True
        for package in ("agents", "tables"):
            module = importlib.import_module(package)
            for found in sorted(info.name for info in pkgutil.iter_modules(module.__path__)):
                importlib.import_module(f"{package}.{found}")

    def discover(self, *extra_modules: str, **_: Any) -> None:
        """Load agents and tables, errors included; Faust's own scan only warns of them."""
        self.load()
        for name in extra_modules:
            importlib.import_module(name)

    def stages(self) -> list[Stage]:
        """Return the stages that ``STAGES`` names, in the order of the contract, each followed by its parts."""
        self.load()
        chosen = [name for name in configuration.STAGES if name in SETTINGS.stages]
        return [stage for name in chosen for stage in REGISTERED.values() if name in (stage.name, stage.part_of)]

    def apps(self) -> list[Any]:
        """Return the apps of this worker whose accounts count: those of its stages, and the host's if it has agents."""
        apps: list[Any] = [stage.app for stage in self.stages()]
        if self.agents:
            apps.append(self)
        return apps


app = HostApp(
    SETTINGS.app_id,
    resilience=resilience_options(SETTINGS, "host"),
    listener=EVENTS,
    **{
        **faust_options(SETTINGS, "host"),
        "web_enabled": True,
        "Worker": logs.worker_type(SETTINGS.log_level, SETTINGS.log_format),
    },
)
logs.calm_kafka()
metrics.REGISTRY.register(metrics.StageCollector(app.apps))

import streams.api  # noqa: E402
import streams.api_commands  # noqa: E402
import streams.dashboard  # noqa: E402
import streams.web  # noqa: E402, F401  (add the pages to ``app``)
