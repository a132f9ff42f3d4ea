"""Free ports on loopback.

Ports are taken from below the kernel's range for outgoing connections. A port inside that range can be handed to a
client between a broker's death and its restart, and a client that keeps reconnecting to a dead port of that range
ends up connected to itself.
"""

import random
import socket
from pathlib import Path

LOWEST_PORT = 20_000
_RANGE_FILE = Path("/proc/sys/net/ipv4/ip_local_port_range")


def is_free(port: int, kind: socket.SocketKind = socket.SOCK_STREAM) -> bool:
    """Tell whether a server could bind `port` on 127.0.0.1; waiting connections of a former server don't count."""
    with socket.socket(socket.AF_INET, kind) as probe:
        if kind is socket.SOCK_STREAM:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def choose(taken: set[int], rng: random.Random, kind: socket.SocketKind = socket.SOCK_STREAM) -> int:
    """Return a port that is free now and not in `taken`; OSError when 1,000 draws found none."""
    highest = _first_outgoing_port() - 1
    for _ in range(1000):
        port = rng.randint(LOWEST_PORT, highest)
        if port not in taken and is_free(port, kind):
            return port
    raise OSError(f"no free port on 127.0.0.1 between {LOWEST_PORT} and {highest}")


def _first_outgoing_port() -> int:
    try:
        lowest = int(_RANGE_FILE.read_text().split()[0])
    except (OSError, ValueError, IndexError):
        lowest = 32_768
    return lowest if lowest > LOWEST_PORT + 2_000 else 65_536
