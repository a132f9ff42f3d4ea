"""``faust -A streams decode``: the readings that one message gives, and what validation says; connects to nothing."""

from __future__ import annotations

import sys
from datetime import UTC, datetime

import click

import settings as configuration
from devices.decode_cli import explain, payload_of
from devices.registry import DRIVERS, Registry


@click.command()
@click.option("--driver", required=True, type=click.Choice(sorted(DRIVERS)), help="The family to read the message as.")
@click.option(
    "--topic", help="MQTT topic or CoAP path that it came on; default: one that the driver's profile matches."
)
@click.option("--device", help="Device id; default: as the topic or the message says.")
@click.argument("message", metavar="HEX|TEXT|FILE")
def decode(driver: str, topic: str | None, device: str | None, message: str) -> None:
    """Print the readings of one message; exit 1 where it would be a dead letter."""
    registry, errors = Registry.read(configuration.load().config_path, with_inactive=True)
    for error in errors:
        click.echo(f"{error}", err=True)
    try:
        data = payload_of(message, driver)
    except OSError as exc:
        raise click.BadParameter(f"{message}: {exc.strerror}", param_hint="HEX|TEXT|FILE") from exc
    found = explain(driver, data, registry, topic=topic, device_id=device, received_at=datetime.now(UTC))
    click.echo(found.text)
    sys.exit(0 if found.accepted else 1)
