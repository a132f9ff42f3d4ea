"""``GET /``: a page for people, over what the HTTP API answers.

Guarantees: the page is one file that loads nothing from elsewhere, and its policy forbids that it could; every text of
a device or rule is set as text, never as markup; it knows no secrets, the API key is what its user enters.
"""

from __future__ import annotations

import base64
import hashlib
import re
from pathlib import Path
from typing import Any, Final

from aiohttp import web

from streams.core import app

PAGE: Final = Path(__file__).with_suffix(".html").read_text(encoding="utf-8")


def policy(page: str) -> str:
    """Return the Content-Security-Policy under which only the page's own scripts and styles run."""

    def hashes(tag: str) -> str:
        found = re.findall(f"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        return " ".join(
            f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'" for text in found
        )

    return (
        f"default-src 'none'; script-src {hashes('script')}; style-src {hashes('style')}; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


HEADERS: Final = {
    "Content-Security-Policy": policy(PAGE),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


@app.page("/")
async def dashboard(_view: Any, _request: Any) -> Any:
    """Answer the dashboard; ``?device=ID`` and ``?alert=ID``, as mails link to, show that one."""
    return web.Response(text=PAGE, content_type="text/html", headers=HEADERS)
