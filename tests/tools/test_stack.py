"""The embedded stack, against the real servers."""


async def test_smoke(stack, kafka):
    """Every part runs once the fixture is there."""
    assert kafka == stack.env["KAFKA_BOOTSTRAP_SERVERS"]
