"""A small chart of the last readings, as a PNG.

Not to be called on an event loop: a drawing takes some 100 ms of CPU, the first one a second more.
"""

from __future__ import annotations

import io
import math
import threading
from collections.abc import Sequence
from datetime import datetime
from typing import Any, Final
from zoneinfo import ZoneInfo

WIDTH_PIXELS: Final = 560
HEIGHT_PIXELS: Final = 180
# Twice the pixels: mails are read on dense screens.
_SCALE: Final = 2
_DPI: Final = 96

Point = tuple[datetime, float]

# matplotlib's font manager and text layout are not made for several threads at once.
_lock = threading.Lock()


def usable(history: Sequence[tuple[datetime, Any]]) -> list[Point]:
    """Return the finite numbers of ``history``, in the order of time."""
    found = [
        (moment, float(value))
        for moment, value in history
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    ]
    return sorted(found)


def draw(points: Sequence[Point], threshold: Any, unit: str, zone: ZoneInfo) -> bytes:
    """Draw at least two points with a line at the threshold (a number, or a range of two); returns a PNG."""
    # Loading matplotlib takes a second and 40 MB; a mailer that sends no chart does without.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.dates import AutoDateLocator, ConciseDateFormatter, date2num
    from matplotlib.figure import Figure
    from PIL import Image

    with _lock:
        figure = Figure(figsize=(WIDTH_PIXELS / _DPI, HEIGHT_PIXELS / _DPI), dpi=_DPI * _SCALE, layout="constrained")
        canvas = FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        times = [float(date2num(moment)) for moment, _ in points]
        values = [value for _, value in points]
        axes.plot(
            times,
            values,
            color="#0b5cad",
            linewidth=1.4,
            drawstyle="steps-post" if len(set(values)) <= 2 else "default",
        )
        axes.plot(times[-1:], values[-1:], "o", color="#0b5cad", markersize=4)
        for line in _lines(threshold):
            axes.axhline(line, color="#c62828", linewidth=1, linestyle="--")
        locator = AutoDateLocator(tz=zone, minticks=3, maxticks=7)
        axes.xaxis.set_major_locator(locator)
        axes.xaxis.set_major_formatter(ConciseDateFormatter(locator, tz=zone, show_offset=False))
        axes.set_ylabel(unit.replace("$", r"\$"), fontsize=8)
        axes.tick_params(labelsize=8, colors="#444444")
        axes.grid(visible=True, color="#e4e4e4", linewidth=0.6)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        for side in ("left", "bottom"):
            axes.spines[side].set_color("#bbbbbb")
        canvas.draw()
        picture = Image.frombuffer("RGBA", canvas.get_width_height(), bytes(canvas.buffer_rgba())).convert("RGB")
        out = io.BytesIO()
        # A palette makes it a quarter as large.
        picture.quantize(48).save(out, format="png", optimize=True)
        return out.getvalue()


def _lines(threshold: Any) -> list[float]:
    many = threshold if isinstance(threshold, list | tuple) else [threshold]
    return [
        float(line)
        for line in many
        if isinstance(line, int | float) and not isinstance(line, bool) and math.isfinite(line)
    ]
