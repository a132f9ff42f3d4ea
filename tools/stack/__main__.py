"""Run the embedded stack in the foreground: `make stack`.

Guarantees: `stack.env` in the state folder exists only once every part has answered, and is put there by one rename.
On SIGINT, SIGTERM and SIGHUP everything that was started is stopped. A server that ends by itself is started again on
its port with its data, and the terminal says so.
"""

import argparse
import logging
import signal
import sys
import threading
import time
from pathlib import Path
from types import FrameType

from settings import environment
from tools.stack.errors import StackError
from tools.stack.stack import ALL, PARTS, Stack
from tools.stack.state import ENV_FILE, render, write_by_rename

_RESTARTS = 5  # within _RESTART_WINDOW_SECONDS; a server that ends more often than that is not going to stay
_RESTART_WINDOW_SECONDS = 60.0


def main(arguments: list[str] | None = None) -> int:
    """Run the stack until a signal; 0, or 1 with a message when it could not start or a part would not stay."""
    variables = environment()
    parser = argparse.ArgumentParser(prog="python -m tools.stack", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--state",
        type=Path,
        default=Path(variables.get("HEADRACE_STATE") or ".headrace"),
        metavar="FOLDER",
        help="data, logs and stack.env (default: HEADRACE_STATE, else .headrace)",
    )
    parser.add_argument(
        "--without",
        action="append",
        default=[],
        choices=sorted(ALL),
        metavar="PART",
        help=f"leave a part out ({', '.join(sorted(ALL))}); its setting is passed on as you have set it",
    )
    options = parser.parse_args(arguments)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    logging.getLogger("aiokafka").setLevel(logging.CRITICAL)  # the probe's failures are reported by the part

    ended = threading.Event()
    stack = Stack(options.state, ALL - set(options.without), report=lambda line: print(f"stack: {line}"))

    def end(number: int, _frame: FrameType | None) -> None:
        if not ended.is_set():
            print(f"stack: {signal.Signals(number).name}, stopping")
        ended.set()
        stack.cancel()

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, end)
    env_file = stack.folder / ENV_FILE
    try:
        stack.acquire()
        env_file.unlink(missing_ok=True)
        print(f"stack: starting in {stack.folder} (logs: {stack.folder / 'logs'})")
        stack.start()
        own = {
            part.variable: variables[part.variable]
            for part in PARTS
            if part.name in options.without and variables.get(part.variable)
        }
        lines = render(stack.env | own)
        write_by_rename(env_file, lines)
        print(f"stack: ready; these settings are in {env_file}, Ctrl-C stops\n{lines}", end="")
        _watch(stack, ended)
    except StackError as error:
        if not ended.is_set():
            print(f"stack: error: {error}", file=sys.stderr)
            return 1
    finally:
        if stack.held:
            env_file.unlink(missing_ok=True)
            stack.stop()
    print("stack: stopped; the data stay")
    return 0


def _watch(stack: Stack, ended: threading.Event) -> None:
    restarts: list[float] = []
    while not ended.wait(0.5):
        for part in stack.ended():
            now = time.monotonic()
            restarts = [at for at in restarts if now - at < _RESTART_WINDOW_SECONDS] + [now]
            if len(restarts) > _RESTARTS:
                raise StackError(f"{part.title} keeps ending by itself; its log: {part.log}")
            print(f"stack: {part.title} ended by itself (log: {part.log}), starting it again")
            stack.start(part.name)


if __name__ == "__main__":
    sys.exit(main())
