"""Brings a chunk policy to the cloud's pods (PUT /v1/policy, docs/operations.md)."""

from __future__ import annotations

import logging

import aiohttp

from hat_operator import metrics

log = logging.getLogger(__name__)
DEVICES_PATH, POLICY_PATH = "/v1/devices", "/v1/policy"


def policy_url(devices_url: str) -> str:
    """Where a pod takes its policy, from where it lists its devices."""
    return devices_url.removesuffix(DEVICES_PATH) + POLICY_PATH


async def push(session: aiohttp.ClientSession, devices_url: str, text: str) -> bool:
    """Give a policy, in JSON, to the pod that lists its devices at a URL; whether the pod has taken it.

    A pod that does not take it is logged, and tried again in the next round.
    """
    url, headers = policy_url(devices_url), {"Content-Type": "application/json"}
    try:
        async with session.put(url, data=text.encode(), headers=headers, allow_redirects=False) as response:
            if response.status != 200:
                said = (await response.content.read(500)).decode(errors="replace")
                raise ValueError(f"status {response.status}: {said}")
    except (aiohttp.ClientError, TimeoutError, ValueError) as error:
        metrics.POLICY_PUSHES.labels("failed").inc()
        log.warning("%s: the policy was not taken: %s", url, error or type(error).__name__)
        return False
    metrics.POLICY_PUSHES.labels("ok").inc()
    return True
