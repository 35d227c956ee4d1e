"""What report.html carries compressed."""

from __future__ import annotations

import base64
import gzip
import re


def unpacked(page: str, name: str) -> str:
    """Return the text that the page's script unpacks: ``plotly`` or ``plots``."""
    found = re.search(rf'<script type="text/plain" id="{name}" data-bytes="(\d+)">([^<]*)</script>', page)
    assert found is not None
    return gzip.decompress(base64.b85decode(found[2].replace(",", "<"))[: int(found[1])]).decode()
