"""Run a tool that was started with plain `python` in the project's own environment.

Guarantee: it uses nothing that any Python 3 does not have, so that it can say what is missing instead of failing on it.
"""

import importlib.util
import os
import sys
from pathlib import Path


def enter(root: Path) -> None:
    """Start anew in ``.venv`` where there is one; end with a clear message (exit 2) when what is needed is missing."""
    venv = root / ".venv"
    python = venv / "bin" / "python"
    if Path(sys.prefix).resolve() != venv.resolve() and python.exists():
        os.execv(str(python), [str(python), *sys.argv])  # noqa: S606 - nothing of it goes through a shell
    if sys.version_info < (3, 11) or importlib.util.find_spec("aiokafka") is None:
        tool = Path(sys.argv[0]).name
        sys.stderr.write(
            f"{tool}: needs Python 3.11 with aiokafka, and there is no .venv/ in {root}: run `make install` first\n"
        )
        sys.exit(2)
