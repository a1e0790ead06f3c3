"""The `hat-operator` command."""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import sys
import time

import kopf
from kubernetes.config import ConfigException
from prometheus_client import start_http_server

from hat_operator import handlers
from hat_operator.admin import Doors
from hat_operator.cluster import Cluster
from hat_operator.denied_push import DeniedPush
from hat_operator.edges import EdgeClusters
from hat_operator.identity.authority import Authorities
from hat_operator.identity.service import Identities
from hat_operator.kubeconfig import own_client
from hat_operator.leader import Identity, Leader
from hat_operator.reconcile import Reconciler
from hat_operator.settings import PREFIX, Settings
from hat_operator.slow_loop import SlowLoop
from hat_operator.telemetry import Telemetry
from hat_operator.watches import EdgeWatches
from hat_operator.worker import Worker
from hat_runtime.errors import HatError

__all__ = ["handlers", "main", "run"]
log = logging.getLogger("hat_operator")
HOME_THREADS = 16


def main() -> None:
    """Run until a signal or the loss of the lease; exit status 2 for a wrong setting."""
    argparse.ArgumentParser(
        prog="hat-operator",
        description="Run the operator of HatDeployments in the cluster of its pod, or of KUBECONFIG.",
        epilog=f"Settings come from the environment, {PREFIX}...; the chart hat-operator sets them.",
    ).parse_args()
    try:
        settings = Settings.from_environment(os.environ)
        api_client = own_client()
    except HatError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
    except ConfigException as error:
        print(f"no cluster: neither a service account nor KUBECONFIG: {error}", file=sys.stderr)
        sys.exit(2)
    configure_logging(settings.log_format)
    start_http_server(settings.metrics_port)
    # A thread of its own: the lease must not wait behind the requests of many reconciles.
    leader = Leader(Cluster(api_client, 1), Identity.from_environment(os.environ))
    asyncio.run(run(settings, Cluster(api_client, HOME_THREADS), leader))


async def run(settings: Settings, home: Cluster, leader: Leader) -> None:
    """Wait for the lease, then work."""
    # Who only waits is alive as well; kopf's endpoint takes over the port.
    server = await asyncio.start_server(_alive, "0.0.0.0", settings.health_port)  # noqa: S104 (a pod; probes come from its node)
    await leader.acquire()
    server.close()
    await server.wait_closed()
    holding = asyncio.create_task(leader.hold(_end), name="lease")
    authorities = Authorities(home, settings.trust_domain)
    doors = Doors(settings, authorities)
    telemetry = Telemetry(home, settings.namespaces, doors, settings.resync_s / 2)
    # Only a pass makes a watch, so the worker is there when one asks it for another pass.
    watches = EdgeWatches(lambda namespace, name: worker.request(namespace, name))
    loop = SlowLoop(home, telemetry, lambda namespace, name: worker.request(namespace, name))
    denied = DeniedPush(
        home, settings.namespaces, doors, settings.resync_s / 2, lambda *key: worker.request(*key)
    )
    identities = Identities(home, settings, authorities, denied)
    reconciler = Reconciler(home, EdgeClusters(home), settings, telemetry, watches, loop, identities)
    worker = Worker(reconciler, home, settings.namespaces, settings.resync_s, watches)
    if settings.identities:  # else the rights for it may be missing
        handlers.watch_requests()
    asking = asyncio.create_task(telemetry.run(loop.round), name="telemetry")
    denying = asyncio.create_task(denied.run(), name="deny-lists")
    try:
        await kopf.operator(
            clusterwide=not settings.namespaces,
            namespaces=settings.namespaces,
            standalone=True,
            liveness_endpoint=f"http://0.0.0.0:{settings.health_port}/healthz",
            memo=kopf.Memo(worker=worker),
        )
    finally:
        asking.cancel()
        denying.cancel()
        holding.cancel()
        await leader.release()


class JsonFormatter(logging.Formatter):
    """One JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        """See logging.Formatter."""
        entry = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
            + f".{record.msecs:03.0f}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry, ensure_ascii=False)


def configure_logging(log_format: str) -> None:
    """Log to standard error, as text or as json."""
    handler = logging.StreamHandler()
    text = logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s")
    handler.setFormatter(JsonFormatter() if log_format == "json" else text)
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    logging.getLogger("kopf").setLevel(logging.WARNING)


def _end() -> None:
    log.error("the lease is lost: this process ends, so that two operators never write")
    logging.shutdown()
    os._exit(1)


async def _alive(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        async with asyncio.timeout(5):
            await reader.readuntil(b"\r\n\r\n")
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\nConnection: close\r\n\r\nok\n")
            await writer.drain()
    except (TimeoutError, OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
        pass  # a probe that went away
    finally:
        writer.close()
