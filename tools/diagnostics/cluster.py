"""Do the topics stand: leaders, replicas; and do the settings fit each other and the broker."""

from collections.abc import Mapping
from typing import Any

from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType

from settings import PROFILES, BrokerProfile, Problem, Settings, SettingsError
from streams.resilience.cluster import ClusterInfo
from tools.diagnostics.findings import Finding, Level


def _named(pairs: list[tuple[str, int]]) -> str:
    shown = ", ".join(f"{topic}[{partition}]" for topic, partition in pairs[:10])
    return shown + (f" and {len(pairs) - 10} more" if len(pairs) > 10 else "")


def check_topics(info: ClusterInfo, topic: str | None = None) -> list[Finding]:
    """Look at every partition, or at those of ``topic``."""
    findings = []
    leaderless = [pair for pair in info.leaderless() if topic in {None, pair[0]}]
    behind = [pair for pair in info.under_replicated() if topic in {None, pair[0]} and pair not in leaderless]
    if topic is not None and topic not in info.topics:
        findings.append(
            Finding(Level.ERROR, "topics", f"topic {topic} does not exist", "Create it, or check TOPIC_PREFIX.")
        )
    if leaderless:
        findings.append(
            Finding(
                Level.ERROR,
                "topics",
                f"{len(leaderless)} partition(s) have no leader: {_named(leaderless)}",
                "They can be neither read nor written. Start the brokers that hold their replicas "
                f"({_holders(info, leaderless)}).",
            )
        )
    if behind:
        findings.append(
            Finding(
                Level.WARNING,
                "topics",
                f"{len(behind)} partition(s) are under-replicated: {_named(behind)}",
                "A further failure can cost data. Start the missing brokers, or see why a replica lags.",
            )
        )
    if info.controller < 0:
        what = "the cluster has no controller"
        findings.append(Finding(Level.ERROR, "cluster", what, "Look at the controllers' logs."))
    return findings


def _holders(info: ClusterInfo, pairs: list[tuple[str, int]]) -> str:
    wanted = set(pairs)
    nodes = {
        node
        for name, parts in info.topics.items()
        for p in parts
        if (name, p.partition) in wanted
        for node in p.replicas
    }
    return "node " + ", ".join(str(node) for node in sorted(nodes))


def read_settings(env: Mapping[str, str]) -> tuple[Settings, list[Finding]]:
    """Return the Kafka settings of ``env`` and a finding for each that cannot stand, which then has its default."""
    names = {"BROKER_PROFILE", "APP_ID", "TOPIC_PREFIX", "DRAIN_SECONDS", "RETRY_BASE_SECONDS", "RETRY_CAP_SECONDS"}
    mine = {name: value for name, value in env.items() if name.startswith("KAFKA_") or name in names}
    findings: list[Finding] = []
    while True:
        try:
            return Settings.from_env(mine), findings
        except SettingsError as exc:
            dropped = 0
            for problem in exc.problems:
                findings.append(_setting(problem))
                dropped += mine.pop(problem.variable, None) is not None
            if not dropped:
                mine = {k: v for k, v in mine.items() if k == "KAFKA_BOOTSTRAP_SERVERS"}
                if len(findings) > 50:
                    raise


def _setting(problem: Problem) -> Finding:
    return Finding(
        Level.ERROR,
        "settings",
        f"{problem.variable}={problem.found} bites another setting or cannot be",
        f"Allowed is {problem.allowed}.",
    )


def check_profile(profile: BrokerProfile, bounds: Mapping[str, int], handler_seconds: float | None) -> list[Finding]:
    """Compare the settings with the broker's bounds (ms) and with how long a handler takes."""
    findings = []
    session = profile.session_timeout_seconds * 1000
    least, most = bounds.get("group.min.session.timeout.ms"), bounds.get("group.max.session.timeout.ms")
    if least is not None and most is not None and not least <= session <= most:
        findings.append(
            Finding(
                Level.ERROR,
                "settings",
                f"KAFKA_SESSION_TIMEOUT_SECONDS={session / 1000:g} is outside of what the broker allows, "
                f"{least / 1000:g} to {most / 1000:g} s: no consumer can join a group",
                f"Set it within these, choose another BROKER_PROFILE ({', '.join(PROFILES)}), or change "
                "group.min.session.timeout.ms and group.max.session.timeout.ms on the brokers.",
            )
        )
    if handler_seconds is not None and handler_seconds >= profile.max_poll_interval_seconds:
        findings.append(
            Finding(
                Level.ERROR,
                "settings",
                f"a handler of {handler_seconds:g} s is longer than "
                f"KAFKA_MAX_POLL_INTERVAL_SECONDS={profile.max_poll_interval_seconds:g}: a hand-written loop is put "
                "out of its group each time",
                "Raise the interval, take fewer records per poll, or use the resilient consumers, which poll on.",
            )
        )
    return findings


async def broker_bounds(admin: AIOKafkaAdminClient, node: int) -> dict[str, int]:
    """Return the broker's bounds on sessions, in ms; empty when it does not tell."""
    found: dict[str, int] = {}
    for response in await admin.describe_configs([ConfigResource(ConfigResourceType.BROKER, str(node))]):
        for entry in response.resources:
            values: Any = entry[4]
            for value in values:
                if value[0] in {"group.min.session.timeout.ms", "group.max.session.timeout.ms"} and value[1]:
                    found[value[0]] = int(value[1])
    return found
