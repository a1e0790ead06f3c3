"""A pod's way to its cluster's API server: two requests, without a client library, which would be most of the program.

The token is read anew for each request, because kubelet replaces it.
"""

from __future__ import annotations

import json
import os
import ssl
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
PATH = "/apis/certificates.k8s.io/v1/certificatesigningrequests"
TIMEOUT_S = 10.0


class ApiError(Exception):
    """The API server did not do what it was asked for; status 0: it did not answer."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Requests:
    """CertificateSigningRequests of the cluster that this pod runs in."""

    def __init__(self, account: Path = ACCOUNT, server: str | None = None) -> None:
        """Nothing is sent yet; `server` is https://HOST:PORT, by default the one in the environment."""
        host = os.environ.get("KUBERNETES_SERVICE_HOST", "kubernetes.default.svc")
        shown = f"[{host}]" if ":" in host else host
        self._server = server or f"https://{shown}:{os.environ.get('KUBERNETES_SERVICE_PORT', '443')}"
        self._account = account

    def create(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """File a request; returns it as it was stored. Raises ApiError."""
        return self._send("POST", PATH, body)

    def get(self, name: str) -> dict[str, Any]:
        """A request as it is now. Raises ApiError, with status 404 where there is none."""
        return self._send("GET", f"{PATH}/{name}", None)

    def _send(self, method: str, path: str, body: Mapping[str, Any] | None) -> dict[str, Any]:
        try:
            headers = {
                "Authorization": f"Bearer {(self._account / 'token').read_text().strip()}",
                "Accept": "application/json",
                "Content-Type": "application/json",
                "User-Agent": "hat-identity",
            }
            data = None if body is None else json.dumps(body).encode()
            asked = urllib.request.Request(self._server + path, data, headers, method=method)  # noqa: S310 (https, see above)
            context = ssl.create_default_context(cafile=str(self._account / "ca.crt"))
            # No proxy of the environment and no redirect: the token goes to the API server and nowhere else.
            opener = urllib.request.build_opener(
                urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=context), _NoRedirect()
            )
            with opener.open(asked, timeout=TIMEOUT_S) as answer:
                found: dict[str, Any] = json.load(answer)
                return found
        except urllib.error.HTTPError as error:
            raise ApiError(error.code, f"{method} {path}: {error.code} {_said(error)}") from None
        except (OSError, ValueError) as error:
            raise ApiError(0, f"{method} {self._server}{path}: {error}") from None


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        """None, for any."""
        return


def _said(error: urllib.error.HTTPError) -> str:
    try:
        return str(json.loads(error.read(1 << 16))["message"])
    except (OSError, ValueError, KeyError, TypeError):
        return str(error.reason)
