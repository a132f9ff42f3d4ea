"""Commands beside Faust's own, and the spelling ``faust worker -A streams`` beside ``faust -A streams worker``."""

from __future__ import annotations

import asyncio
import sys
from typing import Any

import click
import uvloop
from faust.cli.base import State, cli


def install() -> None:
    """Add the option ``-A`` to the worker command and Headrace's commands to ``faust``; twice is once."""
    import faust.cli.worker  # noqa: F401  (registers the command)

    if "worker" in sys.argv[1:]:
        # a fifth less CPU per message; a worker has nothing that needs asyncio's own loop
        asyncio.set_event_loop_policy(uvloop.EventLoopPolicy())

    worker = cli.commands["worker"]
    if not any(parameter.name == "app" for parameter in worker.params):
        worker.params.append(
            click.Option(["--app", "-A"], expose_value=False, callback=_set_app, help="Module of the Faust app.")
        )
    for command in (check, *lazy_commands()):
        if command.name not in cli.commands:
            cli.add_command(command)


def lazy_commands() -> list[click.Command]:
    """Return the commands that need no app; none of them starts it."""
    from streams.commands.alarms import alarms
    from streams.commands.decode import decode
    from streams.commands.dlq import dlq
    from streams.commands.look import accounts, tap, trace
    from streams.commands.simulate import simulate

    return [simulate, dlq, tap, trace, accounts, decode, alarms]


def _set_app(context: click.Context, _parameter: Any, value: str | None) -> str | None:
    if value:
        context.ensure_object(State).app = value
    return value


@click.command()
@click.option("--connect", is_flag=True, help="Try every service as well.")
def check(connect: bool) -> None:
    """Check settings, profiles, devices and alarm rules; exits 1 and lists everything that is wrong."""
    from streams.commands import check as checking

    sys.exit(checking.run(connect))
