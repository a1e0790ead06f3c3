"""Certificates, tokens and kubeconfigs of a control plane that lives for a few minutes on loopback."""

from __future__ import annotations

import base64
import json
import secrets
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tests.harness.binaries import MissingProgramError
from tests.harness.gobuild import run

_CURVE = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
_NAMES = ("DNS:localhost", "DNS:kubernetes", "DNS:kubernetes.default", "DNS:kubernetes.default.svc")
# Python's strict checks, the default from 3.13 on, want all of these.
_PURPOSE = """
basicConstraints = critical, CA:FALSE
keyUsage = critical, digitalSignature
extendedKeyUsage = {usage}
subjectKeyIdentifier = hash
authorityKeyIdentifier = keyid
"""


@dataclass(frozen=True)
class Credentials:
    """Files in `folder`: ca.crt and ca.key, server.crt and server.key, kubelet-client.crt and .key (the apiserver's
    own, for logs and exec), accounts.key and .pub (service accounts), tokens.csv."""

    folder: Path
    addresses: tuple[str, ...] = ("127.0.0.1",)
    """Under which the apiserver is reached."""
    users: Mapping[str, str] = field(default_factory=dict)
    """Further users and the group of each."""
    admin: str = field(default_factory=lambda: secrets.token_hex(16), repr=False)
    controllers: str = field(default_factory=lambda: secrets.token_hex(16), repr=False)
    tokens: dict[str, str] = field(default_factory=dict, repr=False)
    """Those of `users`, once written."""

    def write(self) -> None:
        """Makes all files. Raises MissingProgramError without openssl."""
        if shutil.which("openssl") is None:
            raise MissingProgramError("openssl is not on PATH")
        _openssl(
            self.folder,
            *("req", "-x509", *_CURVE, "-keyout", "ca.key", "-out", "ca.crt", "-days", "2"),
            *("-subj", "/CN=test-ca", "-addext", "keyUsage=critical,keyCertSign,cRLSign"),
        )
        names = ", ".join((*_NAMES, *(f"IP:{address}" for address in self.addresses)))
        self._sign("server", "/CN=kube-apiserver", "serverAuth", f"subjectAltName = {names}")
        self._sign("kubelet-client", "/O=system:masters/CN=kube-apiserver", "clientAuth")
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
        self.tokens.update({user: secrets.token_hex(16) for user in self.users})
        known = [("admin", self.admin, "system:masters"), ("controllers", self.controllers, "system:masters")]
        known += [(user, self.tokens[user], group) for user, group in self.users.items()]
        lines = [f'{token},{user},{user},"{group}"\n' for user, token, group in known]
        (self.folder / "tokens.csv").write_text("".join(lines))

    def _sign(self, name: str, subject: str, usage: str, more: str = "") -> None:
        """NAME.key and NAME.crt, by the CA."""
        (self.folder / f"{name}.cnf").write_text(more + _PURPOSE.format(usage=usage))
        request = ("-keyout", f"{name}.key", "-out", f"{name}.csr", "-subj", subject)
        _openssl(self.folder, "req", *_CURVE, *request)
        authority = ("-CA", "ca.crt", "-CAkey", "ca.key", "-CAcreateserial", "-days", "2")
        files = ("-in", f"{name}.csr", "-out", f"{name}.crt", "-extfile", f"{name}.cnf")
        _openssl(self.folder, "x509", "-req", *files, *authority)

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
