"""The page on which people try texts; `jaxguard serve --demo-page`."""

import base64
import hashlib
import re
from pathlib import Path

from fastapi import Response

from jaxguard.serve.app import Api

PAGE = Path(__file__).with_name("page.html")


def add_routes(api: Api) -> None:
    """Register the page, under a policy by which nothing runs but its own script, and that asks this service only.

    It holds no data, so it takes no key; the page asks for one where checks need it.
    """
    text = PAGE.read_text(encoding="utf-8")
    policy = (
        f"default-src 'none'; script-src {_hash(text, 'script')}; style-src {_hash(text, 'style')}; img-src data:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
        "require-trusted-types-for 'script'; trusted-types 'none'"
    )
    headers = {
        "content-security-policy": policy,
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
        "cross-origin-opener-policy": "same-origin",
        "cache-control": "no-store",
    }

    @api.app.get("/", include_in_schema=False)
    async def page() -> Response:
        return Response(text, headers=headers, media_type="text/html; charset=utf-8")


def _hash(text: str, tag: str) -> str:
    """The source expression of CSP for the page's only element of a kind."""
    [content] = re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"
