"""`faust -A streams decode`: prints readings, exits 1 for what would be a dead letter, names what is allowed."""

from pathlib import Path
from typing import Any

from click.testing import CliRunner

from streams.cli import lazy_commands
from streams.commands.decode import decode

FRAME = "098022000043454383000088137dd0077e7f7f7f7ffa2e9513b02e76170000000000000000000800000000"


def test_a_frame_is_decoded() -> None:
    """A frame given as digits prints its readings and exits 0; the command is one of faust's."""
    found = CliRunner().invoke(decode, ["--driver", "fluxor", FRAME])
    assert found.exit_code == 0, found.output
    assert "T_int  20.26 °C" in found.output
    assert "decode" in {command.name for command in lazy_commands()}


def test_a_file_is_decoded(tmp_path: Any) -> None:
    """A file is read as the message, on the topic that is given."""
    path = Path(tmp_path) / "message.json"
    path.write_text('{"ts": 1750000000, "air": {"t": 21.5}}')
    found = CliRunner().invoke(decode, ["--driver", "plain_json", "--topic", "devices/d7/telemetry", str(path)])
    assert found.exit_code == 0
    assert "air.t  2025-06-15T15:06:40+00:00  d7" in found.output


def test_a_dead_letter_exits_1() -> None:
    """What would be a dead letter says so and exits 1."""
    found = CliRunner().invoke(decode, ["--driver", "fluxor", "00"])
    assert found.exit_code == 1
    assert "dead letter (poison)" in found.output


def test_an_unknown_driver_is_told_what_there_is() -> None:
    """A driver that is not registered is an error that lists those that are."""
    found = CliRunner().invoke(decode, ["--driver", "nothing", "00"])
    assert found.exit_code == 2
    assert "'fluxor'" in found.output
