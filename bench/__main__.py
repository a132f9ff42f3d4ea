"""``python -m bench [NAME …] [--quick]``: race and rows unless others are named."""

from __future__ import annotations

import argparse
import importlib
import signal
import sys

#: Measurements with ``run(options)`` and ``arguments(parser)``.
OURS = {
    "race": "the normalizer's work: Headrace beside plain Faust, aiokafka, Quix Streams, librdkafka",
    "rows": "raw topic to rows in PostgreSQL, and from device to row at 500 messages/s",
    "losses": "what plain Faust loses and Headrace does not: the same agent, broken in five ways",
    "memory": "highest memory with a large backlog",
    "coap": "confirmed CoAP requests a second into Kafka, and how long devices wait",
    "drivers": "what it costs to decode a message of each family",
    "outage": "memory while a sink is away for ten minutes, and what it takes to come back",
    "mail": "from a device over its threshold to its mail, at 500 messages/s",
    "restore": "a million alarm states back from the changelog: time and memory",
    "commands": "from POST to a connected device, and to its word",
}
#: Programs of their own: ``python -m bench.NAME``.
OTHERS = {
    "stores": "rows and readings a second into PostgreSQL and Valkey",
    "alarms": "what evaluating alarm rules costs",
    "consumers": "the resilient consumers beside a handwritten loop",
    "claims": "lines of code, errors, lost and repeated messages of six services in two forms",
}
DEFAULT = ("race", "rows")


def main() -> None:
    """Run what is named."""
    listing = "\n".join(f"  {name:<8} {text}" for name, text in OURS.items())
    more = "\n".join(f"  python -m bench.{name:<8} {text}" for name, text in OTHERS.items())
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description=f"Measure; without names: {' '.join(DEFAULT)}.\n\n{listing}\n\nprograms of their own:\n{more}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="measurements to make")
    parser.add_argument("--quick", action="store_true", help="a short run, for a first impression")
    parser.add_argument(
        "--seconds", type=float, help="rows: of traffic (30); mail: (60); outage: without the server (600)"
    )
    modules = {name: importlib.import_module(f"bench.{name}") for name in OURS}
    for module in modules.values():
        module.arguments(parser)
    options = parser.parse_args()
    if unknown := [name for name in options.names if name not in OURS]:
        parser.error(f"there is no measurement {', '.join(unknown)}; there is: {', '.join(OURS)}")
    # An orderly end, so that servers and workers end too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    for name in options.names or DEFAULT:
        modules[name].run(options)
    if not options.names:
        print("Others:\n" + more)


if __name__ == "__main__":
    sys.exit(main())
