"""When the certificates of a kubeconfig end."""

from __future__ import annotations

import base64
from collections.abc import Iterator

from cryptography import x509

from hat_operator.kubeconfig import checked_kubeconfig


def earliest_end(text: str, context: str = "") -> float | None:
    """Unix time at which the first certificate ends of those that `context` uses: the client's and the authority's.

    An authority of several certificates is as good as the one that ends last: one of them is enough. None where the
    kubeconfig holds no certificate that can be read.

    Args:
        text: the kubeconfig.
        context: of it; "": its current one.

    Raises:
        KubeconfigError: see checked_kubeconfig.
    """
    content = checked_kubeconfig(text, context)
    named = {
        kind: {entry["name"]: entry[kind] for entry in content[f"{kind}s"]}
        for kind in ("context", "user", "cluster")
    }
    chosen = named["context"][context or content["current-context"]]
    user, cluster = named["user"][chosen["user"]], named["cluster"][chosen["cluster"]]
    # Of a client's chain only the first one is its own.
    client = list(_ends(user.get("client-certificate-data")))[:1]
    authority = list(_ends(cluster.get("certificate-authority-data")))
    return min([*client, *([max(authority)] if authority else [])], default=None)


def _ends(data: object) -> Iterator[float]:
    if not isinstance(data, str):
        return
    try:
        found = x509.load_pem_x509_certificates(base64.b64decode(data))
    except (ValueError, x509.InvalidVersion):
        return
    for certificate in found:
        yield certificate.not_valid_after_utc.timestamp()
