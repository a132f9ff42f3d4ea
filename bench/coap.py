"""``python -m bench.coap``: confirmed requests a second into Kafka, and how long a device waits for its 2.04.

A worker with the stage ``coap``, a Kafka of its own, and 200 devices that each send the next message once the last one
is answered: as fast as that goes, then at a fixed rate. All on this machine, the devices in this process, so that their
work is part of what is measured.
"""

from __future__ import annotations

import argparse
import random
import socket
import sys
import tempfile
import time
from pathlib import Path

from tools.simulator.coap import Requester
from tools.simulator.message import Message
from tools.stack import Stack, ports
from tools.worker import Worker

DEVICES = 200


def run(requester: Requester, messages: int, first: int, rate: float) -> tuple[float, int]:
    """Send ``messages``, at ``rate`` a second (0: no limit); return seconds taken and how many were not answered."""
    begun = due = time.monotonic()
    for number in range(first, first + messages):
        if rate:
            due += 1 / rate
            wait = due - time.monotonic()
            if wait > 0.002:
                time.sleep(wait)
        device = f"d{number % DEVICES}"
        payload = b'{"seq":%d,"t":21.5,"ts":%d}' % (number, int(time.time() * 1000))
        requester.publish(Message(device_id=device, seq=number, route=f"telemetry/{device}", payload=payload))
    left = requester.drain(60)
    return time.monotonic() - begun, left


def measure(worker: Worker, address: str, messages: int, rate: float) -> None:
    """Warm up, measure without a limit and at ``rate``, print a line each."""
    refused: list[str] = []
    requester = Requester(
        f"coap://{address}",
        on_ack=lambda _message, _sends: None,
        on_refused=lambda _message, why: refused.append(why),
        inflight=DEVICES,
    )
    requester.start()
    try:
        run(requester, 1000, 0, 0)
        for number, wanted in enumerate((0.0, rate)):
            requester.latencies.clear()
            seconds, left = run(requester, messages, (number + 1) * 10_000_000, wanted)
            found = sorted(requester.latencies)
            p50, p99 = found[len(found) // 2] * 1000, found[int(len(found) * 0.99)] * 1000
            print(
                f"{f'{wanted:.0f}/s wanted' if wanted else 'no limit':>14}: {len(found) / seconds:.0f}/s confirmed, "
                f"p50 {p50:.0f} ms, p99 {p99:.0f} ms; {left} unanswered, {len(refused)} refused, "
                f"{requester.busy} times 5.03"
            )
    finally:
        requester.stop()
    worker.stop()


def main() -> None:
    """Start a Kafka and a worker, and measure."""
    parser = argparse.ArgumentParser(prog="python -m bench.coap", description=__doc__)
    parser.add_argument("--messages", type=int, default=20_000, help="of each run")
    parser.add_argument("--rate", type=float, default=1_500, help="of the second run, in requests/s")
    options = parser.parse_args()
    stack = Stack.temporary()
    with tempfile.TemporaryDirectory() as folder:
        try:
            stack.acquire()
            stack.start("kafka")
            address = f"127.0.0.1:{ports.choose(set(), random.SystemRandom(), socket.SOCK_DGRAM)}"
            env = {name: value for name, value in stack.env.items() if name not in ("WEB_BIND", "COAP_BIND")}
            env |= {"STAGES": "coap", "COAP_BIND": address, "DATA_DIR": f"{folder}/data"}
            worker = Worker(env, log=Path(folder) / "worker.log")
            try:
                measure(worker.start(), address, options.messages, options.rate)
            finally:
                worker.stop()
        finally:
            stack.stop(discard=True)


if __name__ == "__main__":
    sys.exit(main())
