"""A cloud and a device in this process, and a real Prometheus with the chart's rules that reads both once a second."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from hat_runtime.cloud.serve import running_cloud
from tests.certificates import Site
from tests.harness import binaries
from tests.harness.ci import skip_or_fail
from tests.harness.prometheus import Prometheus, pod
from tests.runtime.api_pair import Pair, cloud_config, device_for

EDGE_POD = "chat-edge-0"


@asynccontextmanager
async def pair_with_prometheus(
    model: Path, folder: Path, site: Site | None = None, **fields: Any
) -> AsyncIterator[tuple[Pair, Prometheus]]:
    """Prometheus finds both as pods of the HatDeployment team/chat; `fields` are the device's settings.

    With a site they have certificates.
    """
    cloud_tls = {} if site is None else {"tls": site.cloud()}
    device_tls = {} if site is None else {"tls": site.device()}
    try:
        program = binaries.find("prometheus")
    except binaries.MissingProgramError as error:
        skip_or_fail(str(error))
    async with (
        running_cloud(cloud_config(model, **cloud_tls)) as cloud,
        device_for(cloud, model, drafter=f"model:{model}", **device_tls, **fields) as pair,
    ):
        targets = [
            pod(cloud.http_url.removeprefix("http://"), "cloud", "chat-cloud-0"),
            pod(pair.device.url.removeprefix("http://"), "edge", EDGE_POD),
        ]
        prometheus = Prometheus(program, folder, targets)
        # Cloud and device answer in this event loop while Prometheus starts.
        await asyncio.to_thread(prometheus.__enter__)
        try:
            yield pair, prometheus
        finally:
            prometheus.__exit__()
