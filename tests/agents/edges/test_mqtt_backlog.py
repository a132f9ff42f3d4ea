"""What a session kept for a connector that was killed must not keep the next one from subscribing."""

from tests.agents.edges.broker import Mosquitto, Rig, publish, until


async def test_a_window_full_of_redelivered_messages_does_not_hold_up_the_subscription(broker: Mosquitto) -> None:
    """A connector whose buffer is full before the SUBACK, with Kafka away, is active all the same; then it pauses."""
    payloads = [f"{number:03}".ljust(1000, ".") for number in range(40)]
    async with Rig(broker.url, keep=True) as first:
        await publish(broker.url, payloads)
        await until(lambda: len(first.payloads) == 40)
    async with Rig(broker.url, keep=True, buffer_bytes=10_000) as second:
        await until(lambda: len(second.payloads) == 40)
        assert second.source.status().paused
        second.keep = False
        for batch in second.batches:
            batch.acknowledge()
        assert second.payloads == payloads
        await until(lambda: not second.source.status().paused)
