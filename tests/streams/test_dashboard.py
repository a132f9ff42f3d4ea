"""The dashboard is one file that can load nothing but itself and the API."""

from __future__ import annotations

import base64
import hashlib
import re

from streams import dashboard


def test_nothing_comes_from_elsewhere() -> None:
    """No address of another server, no inline style or handler that the policy would refuse."""
    assert not re.search(r"""(src|href)=["']?(https?:)?//""", dashboard.PAGE)
    assert not re.search(r"""<[^>]+ (style|on\w+)=""", dashboard.PAGE)
    assert "innerHTML" not in dashboard.PAGE


def test_the_policy_names_the_script() -> None:
    """The policy has the hash of the one script and of the one style, and nothing that allows others."""
    policy = dashboard.HEADERS["Content-Security-Policy"]
    for tag in ("script", "style"):
        (text,) = re.findall(f"<{tag}>(.*?)</{tag}>", dashboard.PAGE, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy
    assert "unsafe" not in policy
    assert "default-src 'none'" in policy
