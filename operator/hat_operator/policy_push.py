"""Brings a chunk policy to the cloud's pods (PUT /v1/policy, docs/operations.md)."""

from __future__ import annotations

import logging

import aiohttp

from hat_operator import metrics
from hat_operator.admin import Door

log = logging.getLogger(__name__)
POLICY_PATH = "/v1/policy"


async def push(session: aiohttp.ClientSession, door: Door, text: str) -> bool:
    """Give a policy, in JSON, to the pod behind a door; whether the pod has taken it.

    A pod that does not take it is logged, and tried again in the next round.
    """
    url, headers = door.at(POLICY_PATH), {"Content-Type": "application/json"}
    options = {**door.options, "allow_redirects": False}
    try:
        async with session.put(url, data=text.encode(), headers=headers, **options) as response:
            if response.status != 200:
                said = (await response.content.read(500)).decode(errors="replace")
                raise ValueError(f"status {response.status}: {said}")
    except (aiohttp.ClientError, TimeoutError, ValueError) as error:
        metrics.POLICY_PUSHES.labels("failed").inc()
        log.warning("%s: the policy was not taken: %s", url, error or type(error).__name__)
        return False
    metrics.POLICY_PUSHES.labels("ok").inc()
    return True
