"""The embedded stack that `make stack`, `make demo` and the tests run on.

    with Stack(folder, parts={"kafka", "postgresql"}) as stack:
        stack.env                         # KAFKA_BOOTSTRAP_SERVERS, DATABASE_URL, ...
        stack.part("kafka").kill()        # SIGKILL; .stop(), .pause(), .resume(), .kill(signal.SIGTERM)
        stack.part("kafka").start()       # the same port, the same data

Everything blocks and belongs to no event loop; `async with` works, and a coroutine calls
`await asyncio.to_thread(part.start)`.
"""

from tools.stack.errors import StackError
from tools.stack.part import Part
from tools.stack.stack import ALL, Stack

__all__ = ["ALL", "Part", "Stack", "StackError"]
