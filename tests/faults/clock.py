"""The host's clock as one worker sees it, stepped from outside by a few lines of C (``clock.c``) that it preloads.

libfaketime does the same and more, but also answers ``clock_nanosleep`` on the monotonic clock wrongly where that clock
is to stay the kernel's, so that every ``time.sleep`` of Python raises.
"""

from __future__ import annotations

import mmap
import shutil
import struct
import subprocess
from pathlib import Path
from typing import Final

_SOURCE: Final = Path(__file__).with_name("clock.c")


class SteppedClock:
    """A clock whose ``env`` makes it that of the processes which are started with it."""

    def __init__(self, folder: Path) -> None:
        compiler = shutil.which("cc") or shutil.which("gcc")
        assert compiler, "this test compiles clock.c: apt-get install gcc libc6-dev"
        library, file = folder / "clock.so", folder / "clock.step"
        subprocess.run([compiler, "-shared", "-fPIC", "-O2", "-o", library, _SOURCE], check=True)
        file.write_bytes(bytes(8))
        with file.open("r+b") as opened:
            self._step = mmap.mmap(opened.fileno(), 8)
        self.env = {"LD_PRELOAD": str(library), "CLOCK_STEP_FILE": str(file)}

    def step(self, seconds: float) -> None:
        """Set the clock so far from the true time, at once."""
        self._step[:] = struct.pack("=q", round(seconds * 1_000_000))
