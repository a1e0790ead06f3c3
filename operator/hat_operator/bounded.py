"""Reading what others answer, up to a length."""

from __future__ import annotations

import aiohttp


async def read_at_most(response: aiohttp.ClientResponse, most: int) -> bytes:
    """The body of an answer, after its decompression.

    Raises:
        ValueError: it is longer than `most` bytes.
    """
    found = bytearray()
    async for part in response.content.iter_chunked(1 << 16):
        found += part
        if len(found) > most:
            raise ValueError(f"more than {most} bytes")
    return bytes(found)
