"""What kopf calls. Each handler only says which HatDeployment is to be looked at.

Only `on.event` handlers: kopf then writes nothing to any object, neither a finalizer nor annotations of its progress,
and a created, changed or resumed HatDeployment is the same thing: one to look at.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import kopf

from hat_operator import names
from hat_operator.worker import Worker

_CHILD = {names.LABEL_MANAGED_BY: names.FIELD_MANAGER}


@kopf.on.startup()
async def configure(settings: kopf.OperatorSettings, memo: kopf.Memo, **_: Any) -> None:
    """kopf's settings, and the resync loop."""
    settings.persistence.finalizer = f"{names.GROUP}/kopf"
    settings.persistence.progress_storage = kopf.AnnotationsProgressStorage(prefix=names.GROUP)
    settings.persistence.diffbase_storage = kopf.AnnotationsDiffBaseStorage(prefix=names.GROUP)
    settings.networking.request_timeout = 30
    settings.networking.connect_timeout = 10
    # The APIs are known and namespaces are not globs: no rights on CustomResourceDefinitions and namespaces.
    settings.scanning.disabled = True
    # Events are written by events.py, on changes of conditions only.
    settings.posting.enabled = False
    memo.worker.start()


@kopf.on.cleanup()
async def stop(memo: kopf.Memo, **_: Any) -> None:
    """End the resync loop and the reconciles."""
    await memo.worker.stop()


@kopf.on.login()
def login(**kwargs: Any) -> kopf.ConnectionInfo | None:
    """The pod's service account, or else KUBECONFIG's current context."""
    return kopf.login_via_client(**kwargs)


@kopf.on.probe(id="seconds_since_resync")
def resync_age(memo: kopf.Memo, **_: Any) -> float | None:
    """For people who look at the liveness endpoint."""
    last = memo.worker.last_resync
    return None if last is None else round(time.monotonic() - last, 1)


@kopf.on.event(names.GROUP, names.VERSION, names.PLURAL)
async def hat_deployment(name: str, namespace: str | None, memo: kopf.Memo, **_: Any) -> None:
    """A HatDeployment was created, changed, deleted, or was there when the operator started."""
    _request(memo.worker, namespace, name)


@kopf.on.event("apps", "v1", "deployments", labels=_CHILD)
@kopf.on.event("apps", "v1", "daemonsets", labels=_CHILD)
@kopf.on.event("v1", "services", labels=_CHILD)
@kopf.on.event("v1", "serviceaccounts", labels=_CHILD)
@kopf.on.event("policy", "v1", "poddisruptionbudgets", labels=_CHILD)
@kopf.on.event("networking.k8s.io", "v1", "networkpolicies", labels=_CHILD)
async def child(labels: Mapping[str, str], memo: kopf.Memo, **_: Any) -> None:
    """An object of a HatDeployment has changed or is gone."""
    _request(memo.worker, labels.get(names.LABEL_NAMESPACE), labels.get(names.LABEL_DEPLOYMENT))


def watch_requests() -> None:
    """From the next start of kopf on, look at a HatDeployment when one of its pods asks for a certificate."""
    kopf.on.event("certificates.k8s.io", "v1", "certificatesigningrequests", labels=_CHILD)(filed)


async def filed(labels: Mapping[str, str], memo: kopf.Memo, **_: Any) -> None:
    """A request for a certificate, which has no namespace: it may be for another operator."""
    namespace = labels.get(names.LABEL_NAMESPACE)
    if namespace and memo.worker.serves(namespace):
        _request(memo.worker, namespace, labels.get(names.LABEL_DEPLOYMENT))


def _request(worker: Worker, namespace: str | None, name: str | None) -> None:
    if namespace and name:
        worker.request(namespace, name)
