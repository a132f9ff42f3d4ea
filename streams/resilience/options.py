"""What the resilience layer has to know, as plain values: the app that owns a transport carries one of these."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from streams.resilience.backoff import Backoff
from streams.resilience.guard import Guard


@dataclass(frozen=True, slots=True)
class ResilienceOptions:
    """Options of one stage; durations in seconds, sizes in bytes.

    ``client``, ``consumer`` and ``producer`` are keyword arguments for aiokafka, over and above those that Faust gives.
    """

    stage: str
    dead_letter_topic: str
    client: dict[str, Any] = field(default_factory=dict)
    consumer: dict[str, Any] = field(default_factory=dict)
    producer: dict[str, Any] = field(default_factory=dict)
    in_flight_bytes: int = 32 * 1024 * 1024
    chunk_records: int = 2000
    #: chunks of one partition under way at once; while that many are, what comes in meanwhile gathers to one larger
    #: chunk
    chunks_in_flight: int = 4
    commit_timeout_seconds: float = 20.0
    drain_seconds: float = 10.0
    #: how long the end of the worker waits for what is in flight, all stages together
    shutdown_seconds: float = 20.0
    max_attempts: int = 5
    # what nobody has classified is tried again soon: it is either over at once or it is the message
    attempt_base_seconds: float = 0.1
    attempt_cap_seconds: float = 2.0
    retry_base_seconds: float = 1.0
    retry_cap_seconds: float = 64.0
    healthy_seconds: float = 30.0
    recreate_budget_seconds: float = 3600.0
    health_interval_seconds: float = 30.0
    stuck_seconds: float = 120.0
    offset_out_of_range: str = "earliest"
    guard: bool = True
    guard_messages: int = 1000
    guard_devices: int = 10
    guard_share: float = 0.5
    guard_probe_seconds: float = 30.0
    rng: Callable[[], random.Random] = random.Random

    def new_guard(self) -> Guard:
        """Return a dead-letter guard with nothing counted."""
        return Guard(self.guard_messages, self.guard_devices, self.guard_share, self.guard)

    def infrastructure_backoff(self) -> Backoff:
        """Return the backoff for what is away and will come back."""
        return Backoff(self.retry_base_seconds, self.retry_cap_seconds, self.healthy_seconds, self.rng())

    def attempt_backoff(self) -> Backoff:
        """Return the backoff between the capped attempts at what nobody has classified."""
        return Backoff(self.attempt_base_seconds, self.attempt_cap_seconds, self.healthy_seconds, self.rng())
