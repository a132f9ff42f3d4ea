"""Write ``docs/settings.md`` from the declarations in ``settings.py``.

``python -m tools.settings_reference`` writes the file; :func:`render` is the text that it must hold, and a test
compares the two.
"""

from __future__ import annotations

from itertools import groupby
from pathlib import Path

from settings import BrokerProfile, Declaration, declarations

TARGET = Path(__file__).resolve().parent.parent / "docs" / "settings.md"

_HEAD = """\
# Settings

Made from `settings.py` by `python -m tools.settings_reference`; a test keeps the two the same.

Every setting is an environment variable. An empty one counts as unset. Durations are seconds; sizes are bytes, or a
number with `KiB`, `MiB` or `GiB`; lists are separated by commas. Everything is checked before anything is connected;
`faust -A streams check` lists all that is wrong at once (`--connect` also tries every service).
"""


def _default(declared: Declaration) -> str:
    shown = [f"`{text}`" if text else "empty" for text in declared.defaults]
    if len(shown) == 1:
        return shown[0]
    return shown[0] if len(set(shown)) == 1 else f"{shown[0]} (fast: {shown[1]})"


def _row(declared: Declaration) -> str:
    kind = f"{declared.kind.name}, {declared.kind.unit}" if declared.kind.unit else declared.kind.name
    text = declared.help + (" Never shown in logs or errors." if declared.secret else "")
    cells = (f"`{declared.variable}`", kind, _default(declared), declared.kind.allowed, text)
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def render() -> str:
    """Return the reference as Markdown, one table per section in the order of the declarations."""
    parts = [_HEAD]
    for section, group in groupby(declarations(), key=lambda declared: declared.section):
        parts.append(f"## {section}\n")
        if section == "Broker profile":
            paragraphs = (BrokerProfile.__doc__ or "").split("\n\n")
            parts.append(
                "\n".join(line.strip().replace("``", "`") for line in paragraphs[1].strip().splitlines()) + "\n"
            )
        parts.append("| variable | type | default | allowed | |\n|---|---|---|---|---|")
        parts.append("\n".join(_row(declared) for declared in group) + "\n")
    return "\n".join(parts)


def main() -> None:
    """Write the reference."""
    TARGET.write_text(render(), encoding="utf-8")
    print(f"wrote {TARGET.name}: {len(declarations())} settings")


if __name__ == "__main__":
    main()
