"""The page at `/`: a chat that shows how its tokens came about, and plots of the device's figures.

Files as they are, without a build step; everything comes from this device, and the policy forbids anything else.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from fastapi import APIRouter
from starlette.responses import Response

FOLDER = Path(__file__).parent / "web"

MEDIA_TYPES = {
    ".css": "text/css",
    ".html": "text/html",
    ".js": "text/javascript",
    ".svg": "image/svg+xml",
}

HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",  # a device that was upgraded serves another page under the same name
}


def page_routes() -> APIRouter:
    """`/` and the files that it needs, under /page/. They hold no secret, so no API key is asked for."""
    router = APIRouter(include_in_schema=False)
    for file in sorted(FOLDER.iterdir()):
        path = "/" if file.name == "index.html" else f"/page/{file.name}"
        router.add_api_route(path, _sender(file.read_bytes(), MEDIA_TYPES[file.suffix]), response_model=None)
    return router


def _sender(content: bytes, media_type: str) -> Callable[[], Response]:
    return lambda: Response(content, media_type=media_type, headers=HEADERS)
