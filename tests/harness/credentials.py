"""Certificates, tokens and kubeconfigs of a control plane that lives for a few minutes on loopback."""

from __future__ import annotations

import base64
import json
import secrets
import shutil
from dataclasses import dataclass, field
from pathlib import Path

from tests.harness.binaries import MissingProgramError
from tests.harness.gobuild import run

_CURVE = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
# Python's strict checks, the default from 3.13 on, want all of these.
_SERVER = """
subjectAltName = DNS:localhost, DNS:kubernetes, DNS:kubernetes.default, DNS:kubernetes.default.svc, IP:127.0.0.1
basicConstraints = critical, CA:FALSE
keyUsage = critical, digitalSignature
extendedKeyUsage = serverAuth
subjectKeyIdentifier = hash
authorityKeyIdentifier = keyid
"""


@dataclass(frozen=True)
class Credentials:
    """Files in `folder`: ca.crt and ca.key, server.crt and server.key, accounts.key and .pub
    (service accounts), tokens.csv."""

    folder: Path
    admin: str = field(default_factory=lambda: secrets.token_hex(16), repr=False)
    controllers: str = field(default_factory=lambda: secrets.token_hex(16), repr=False)

    def write(self) -> None:
        """Makes all files. Raises MissingProgramError without openssl."""
        if shutil.which("openssl") is None:
            raise MissingProgramError("openssl is not on PATH")
        _openssl(
            self.folder,
            *("req", "-x509", *_CURVE, "-keyout", "ca.key", "-out", "ca.crt", "-days", "2"),
            *("-subj", "/CN=test-ca", "-addext", "keyUsage=critical,keyCertSign,cRLSign"),
        )
        (self.folder / "server.cnf").write_text(_SERVER)
        _openssl(
            self.folder,
            *("req", *_CURVE, "-keyout", "server.key", "-out", "server.csr", "-subj", "/CN=kube-apiserver"),
        )
        _openssl(
            self.folder,
            *("x509", "-req", "-in", "server.csr", "-CA", "ca.crt", "-CAkey", "ca.key", "-CAcreateserial"),
            *("-out", "server.crt", "-days", "2", "-extfile", "server.cnf"),
        )
        _openssl(
            self.folder,
            *(
                "genpkey",
                "-algorithm",
                "EC",
                "-pkeyopt",
                "ec_paramgen_curve:prime256v1",
                "-out",
                "accounts.key",
            ),
        )
        _openssl(self.folder, "pkey", "-in", "accounts.key", "-pubout", "-out", "accounts.pub")
        (self.folder / "tokens.csv").write_text(
            f"{self.admin},admin,admin,system:masters\n{self.controllers},controllers,controllers,system:masters\n"
        )

    def kubeconfig(self, path: Path, server: str, token: str) -> Path:
        """Writes a kubeconfig for `server` (https://HOST:PORT) that names no other file; YAML reads its JSON."""
        authority = base64.b64encode((self.folder / "ca.crt").read_bytes()).decode()
        cluster = {"server": server, "certificate-authority-data": authority}
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "test", "cluster": cluster}],
            "users": [{"name": "test", "user": {"token": token}}],
            "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test"}}],
            "current-context": "test",
        }
        path.write_text(json.dumps(config, indent=2))
        path.chmod(0o600)
        return path


def _openssl(folder: Path, *arguments: str) -> None:
    run(["openssl", *arguments], folder)
