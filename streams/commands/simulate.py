"""``faust -A streams simulate``: a seeded fleet of devices over MQTT, and a ledger of what was acknowledged to them."""

from __future__ import annotations

from pathlib import Path

import click

_SHARE = click.FloatRange(0, 1)


@click.command()
@click.option("--devices", default=300, show_default=True, type=click.IntRange(1, 100_000), help="Size of the fleet.")
@click.option("--rate", default=200.0, show_default=True, type=click.FloatRange(0), help="Messages/s; 0: no limit.")
@click.option("--messages", type=click.IntRange(1), help="End after so many messages, copies not counted.")
@click.option("--seconds", type=click.FloatRange(0), help="End after so long; without either: on Ctrl-C.")
@click.option("--seed", default=1, show_default=True, type=click.IntRange(0), help="The same seed, the same devices.")
@click.option("--ledger", default="ledger.jsonl", show_default=True, type=click.Path(path_type=Path, dir_okay=False))
@click.option("--duplicates", default=0.0, type=_SHARE, help="Share of messages sent twice.")
@click.option("--poison", default=0.0, type=_SHARE, help="Share of messages that nobody can read.")
@click.option("--late", default=0.0, type=_SHARE, help="Share of messages sent after a younger one of their device.")
@click.option(
    "--coap",
    is_flag=False,
    flag_value=0.5,
    default=0.0,
    type=_SHARE,
    help="Share of devices that speak CoAP; --coap alone: half of them.",
)
@click.option("--check", "checking", is_flag=True, help="Wait for the store at the end, and say what is missing.")
def simulate(
    *,
    devices: int,
    rate: float,
    messages: int | None,
    seconds: float | None,
    seed: int,
    ledger: Path,
    duplicates: float,
    poison: float,
    late: float,
    coap: float,
    checking: bool,
) -> None:
    """Send the messages of a seeded fleet to MQTT_URL (and COAP_BIND), and write down what was acknowledged."""
    # Here, because every worker imports this module.
    from settings import load
    from tools.simulator.command import simulate as run
    from tools.simulator.fleet import Plan

    plan = Plan(
        devices=devices,
        seed=seed,
        rate=rate,
        messages=messages,
        seconds=seconds,
        duplicates=duplicates,
        poison=poison,
        late=late,
        coap=coap,
    )
    raise SystemExit(run(load(), plan, ledger, checking=checking))
