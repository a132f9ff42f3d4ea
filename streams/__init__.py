"""The Faust app of Headrace (``faust -A streams worker``), its topics, messages and resilience layer.

Importing this package loads neither Faust nor the settings: ``streams.resilience`` is for services without them too.
``streams.app`` is made when it is first asked for.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from streams.core import app

__all__ = ["app"]


def __getattr__(name: str) -> Any:
    if name != "app":
        raise AttributeError(f"module 'streams' has no attribute {name!r}")
    # Faust has the current folder on the path only while it looks for the app, and takes it off again.
    root = str(Path(__file__).resolve().parent.parent)
    if sys.path[-1] != root:
        sys.path.append(root)
    from settings import SettingsError
    from streams import cli

    cli.install()
    try:
        from streams.core import app as host
    except SettingsError as exc:
        # ``check`` tells of wrong settings together with all else that is wrong; any other command cannot go on.
        if "check" in sys.argv[1:]:
            from streams.commands import check

            raise SystemExit(check.run("--connect" in sys.argv)) from None
        raise SystemExit(str(exc)) from None
    globals()["app"] = host
    return host
