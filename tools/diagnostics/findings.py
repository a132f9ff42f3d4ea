"""What a check finds: how bad it is, what was seen, what to do about it."""

import enum
from dataclasses import dataclass


class Level(enum.IntEnum):
    """How bad a finding is; the exit code of the whole is the worst one's."""

    NOTE = 0
    WARNING = 1
    ERROR = 2


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that somebody should know; ``check`` names where it was found."""

    level: Level
    check: str
    what: str
    do: str

    def as_dict(self) -> dict[str, str]:
        """Return it for JSON."""
        return {"level": self.level.name.lower(), "check": self.check, "what": self.what, "do": self.do}


def worst(findings: list[Finding]) -> int:
    """Return the exit code: 0 nothing to do, 1 warnings, 2 errors."""
    return max((int(finding.level) for finding in findings), default=0)
