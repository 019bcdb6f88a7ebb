"""The facade's HTML pages, which are self-contained: they load no other resources or scripts."""

import base64
import hashlib
import re
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response


class Page:
    """An HTML file in this package, with the Content-Security-Policy that browsers enforce on it.

    The policy lists the hashes of the page's own script and style, so that a browser runs no
    others, and lets it connect to its own origin only.
    """

    def __init__(self, name: str) -> None:
        self._html = Path(__file__).with_name(name).read_text(encoding="utf-8")
        self._headers = {
            "content-security-policy": "; ".join(
                (
                    "default-src 'none'",
                    "connect-src 'self'",
                    "img-src data:",
                    f"script-src {self._hash('script')}",
                    f"style-src {self._hash('style')}",
                    "base-uri 'none'",
                    "form-action 'none'",
                    "frame-ancestors 'none'",
                )
            ),
            "cache-control": "no-cache",
            "referrer-policy": "no-referrer",
            "x-content-type-options": "nosniff",
        }

    def _hash(self, tag: str) -> str:
        (content,) = re.findall(f"<{tag}>(.*?)</{tag}>", self._html, re.DOTALL)
        digest = hashlib.sha256(content.encode()).digest()
        return f"'sha256-{base64.b64encode(digest).decode()}'"

    async def respond(self, request: Request) -> Response:
        """The page as a response."""
        return Response(self._html, media_type="text/html", headers=self._headers)
