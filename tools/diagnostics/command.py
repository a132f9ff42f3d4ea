"""`python tools/kafka_diagnostics.py`: every check, findings first, each with what to do.

Exit code: 0 nothing to do, 1 warnings, 2 errors (an unreachable broker among them) or a wrong argument. It never joins
a group, and writes only to a topic of its own that it deletes.
"""

import argparse
import asyncio
import json
import logging
import time
from collections.abc import Mapping
from typing import Any

import aiokafka
from aiokafka.errors import KafkaError

from settings import environment
from streams.resilience.bounds import within
from streams.resilience.cluster import describe, open_admin
from streams.resilience.consumer_options import brokers as split_servers
from tools.diagnostics import brokers, cluster, groups, latency
from tools.diagnostics.findings import Finding, Level, worst

REQUEST_SECONDS = 8.0


def parser() -> argparse.ArgumentParser:
    """Return the command's arguments."""
    made = argparse.ArgumentParser(
        prog="kafka_diagnostics.py",
        description="Look at a Kafka cluster, its topics and a consumer group; say what is wrong and what to do.",
        epilog="Exit code: 0 nothing to do, 1 warnings, 2 errors. Security settings are those of a worker, KAFKA_*.",
    )
    made.add_argument("--bootstrap-servers", metavar="S", help="host:port, a comma list; else KAFKA_BOOTSTRAP_SERVERS")
    made.add_argument("--topic", metavar="T", help="look at this topic's partitions only; it is not written to")
    made.add_argument("--group-id", metavar="G", help="look at this consumer group; it is not joined")
    made.add_argument(
        "--test-duration",
        type=float,
        default=5.0,
        metavar="N",
        help="seconds to watch the group, to measure latency (5)",
    )
    made.add_argument(
        "--handler-seconds", type=float, metavar="N", help="how long a handler takes, to compare with the poll interval"
    )
    made.add_argument("--json", action="store_true", help="print JSON")
    return made


async def diagnose(options: argparse.Namespace, env: Mapping[str, str]) -> tuple[list[Finding], dict[str, Any]]:
    """Make every check; return the findings, the worst first, and what was seen."""
    settings, findings = cluster.read_settings(env)
    servers = split_servers(options.bootstrap_servers or list(settings.kafka_bootstrap_servers))
    connection = settings.kafka_client_options()
    connection.pop("bootstrap_servers")
    seen: dict[str, Any] = {"bootstrap_servers": servers}
    found, contacts = await brokers.check(servers, connection)
    findings += found
    seen["brokers"] = [contact.as_dict() for contact in contacts]
    reached = [contact.server for contact in contacts if not contact.stopped_at]
    bounds: dict[str, int] = {}
    if reached:
        try:
            more, bounds = await _inside(options, reached, connection, seen)
            findings += more
        except (KafkaError, OSError, TimeoutError) as exc:
            what = f"the cluster stopped answering: {type(exc).__name__}: {exc}"
            do = "See the findings above; if there are none, look at the brokers' logs."
            findings.append(Finding(Level.ERROR, "cluster", what, do))
    findings += cluster.check_profile(settings.broker, bounds, options.handler_seconds)
    return sorted(findings, key=lambda finding: -finding.level), seen


async def _inside(
    options: argparse.Namespace, servers: list[str], connection: dict[str, Any], seen: dict[str, Any]
) -> tuple[list[Finding], dict[str, int]]:
    admin = await open_admin(servers, REQUEST_SECONDS, **connection)
    client = aiokafka.AIOKafkaConsumer(
        bootstrap_servers=servers, request_timeout_ms=int(REQUEST_SECONDS * 1000), **connection
    )
    try:
        info = await within(describe(admin), REQUEST_SECONDS)
        seen["cluster"] = info.as_dict()
        findings = cluster.check_topics(info, options.topic)
        bounds = await cluster.broker_bounds(admin, info.brokers[0].node_id) if info.brokers else {}
        if options.group_id:
            await client.start()
            group = await groups.look(admin, client, options.group_id, options.test_duration)
            seen["group"] = group.as_dict()
            findings += groups.check(group, options.test_duration)
        try:
            async with latency.own_topic(admin) as topic:
                seen["latency"] = await within(
                    latency.measure(servers, connection, topic, options.test_duration),
                    options.test_duration + 3 * REQUEST_SECONDS,
                )
            findings += latency.check(seen["latency"])
        except (KafkaError, OSError, TimeoutError) as exc:
            what = f"latency was not measured: {type(exc).__name__}: {exc}"
            do = (
                "Producing to a new topic must work: look at leaders, advertised addresses, the right to create topics."
            )
            findings.append(Finding(Level.WARNING, "latency", what, do))
    finally:
        await client.stop()
        await admin.close()
    return findings, bounds


def report(findings: list[Finding], seen: dict[str, Any]) -> str:
    """Return what a person reads: findings first."""
    lines = []
    for finding in findings:
        lines += [f"{finding.level.name:7}  {finding.check}: {finding.what}", f"         → {finding.do}"]
    if not findings:
        lines.append("OK       nothing to do")
    lines.append("")
    for contact in seen["brokers"]:
        steps = ", ".join(f"{name} {seconds * 1000:.1f} ms" for name, seconds in contact["steps"].items())
        lines.append(f"broker   {contact['server']}: {steps or 'not reached'}")
    if "cluster" in seen:
        info = seen["cluster"]
        count = sum(len(partitions) for partitions in info["topics"].values())
        lines.append(
            f"cluster  {info['cluster_id']}: {len(info['brokers'])} broker(s), controller {info['controller']}, "
            f"{len(info['topics'])} topic(s), {count} partition(s)"
        )
    if "group" in seen:
        group = seen["group"]
        members, lags = group["members"], group["lags"]
        lines.append(f"group    {group['group_id']}: {group['state']}, {len(members)} member(s), lag {group['lag']}")
        for m in members:
            lines.append(f"         {m['client_id']} on {m['host']}: {', '.join(m['partitions']) or 'no partition'}")
        for p in lags:
            moved = f"committed {p['committed']}, end {p['end']}, moved {p['moved']:+d}"
            lines.append(f"         {p['partition']}: {moved}")
    if "latency" in seen:
        for name in ("acknowledged", "delivered"):
            found = seen["latency"][name]
            numbers = f"median {found['median_ms']} ms, p99 {found['p99_ms']} ms, max {found['max_ms']} ms"
            lines.append(f"latency  {name}: {numbers}")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Run; return the exit code."""
    command = parser()
    options = command.parse_args(arguments)
    logging.getLogger("aiokafka").setLevel(logging.CRITICAL)  # its failures are findings
    begun = time.monotonic()
    try:
        findings, seen = asyncio.run(diagnose(options, environment()))
    except (ValueError, OSError) as exc:
        command.error(str(exc))
    code = worst(findings)
    if options.json:
        whole = {"exit_code": code, "findings": [f.as_dict() for f in findings], **seen}
        print(json.dumps(whole | {"seconds": round(time.monotonic() - begun, 2)}, indent=2))
    else:
        print(report(findings, seen))
    return code
