"""HTTPS whose clients show a certificate, for uvicorn, with files that may change under it."""

from __future__ import annotations

import ssl
from typing import Any

from cryptography import x509
from uvicorn.protocols.http.h11_impl import H11Protocol

from hat_runtime.security.folder import CA_FILE, CERTIFICATE_FILE, KEY_FILE, Material, TlsFolder

EXTENSION = "tls"
"""In an ASGI scope's "extensions", after ASGI's TLS extension, of which "client_cert_chain" is filled in."""


class NewestFiles(ssl.SSLContext):
    """A server's context: every connection gets the folder's newest files.

    A context's own authorities can only be added to, so each change makes another context, and this one hands
    connections on to it.
    """

    _folder: TlsFolder
    _material: Material
    _context: ssl.SSLContext

    @classmethod
    def of(cls, folder: TlsFolder) -> NewestFiles:
        """The context for a folder."""
        found = cls(ssl.PROTOCOL_TLS_SERVER)
        found._folder, found._material = folder, folder.current()
        found._context = _context(folder)
        return found

    def wrap_bio(self, *args: Any, **more: Any) -> ssl.SSLObject:
        """As SSLContext.wrap_bio; asyncio calls it for each connection."""
        material = self._folder.current()
        if material != self._material:
            self._context = _context(self._folder)
            self._material = material
        return self._context.wrap_bio(*args, **more)


def _context(folder: TlsFolder) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.verify_mode = ssl.CERT_REQUIRED
    context.num_tickets = 0  # a resumed session would show a certificate that nobody has checked again
    context.load_verify_locations(folder.path / CA_FILE)
    context.load_cert_chain(folder.path / CERTIFICATE_FILE, folder.path / KEY_FILE)
    return context


class CertifiedH11(H11Protocol):
    """uvicorn's HTTP/1.1, which also tells the application who the client is."""

    def connection_made(self, transport: Any) -> None:
        """Note the client's certificate for all requests of the connection."""
        super().connection_made(transport)
        certificate: bytes = transport.get_extra_info("ssl_object").getpeercert(binary_form=True)
        chain = [ssl.DER_cert_to_PEM_cert(certificate)]
        app = self.app

        async def with_certificate(scope: Any, receive: Any, send: Any) -> None:
            extensions = {**scope.get("extensions", {}), EXTENSION: {"client_cert_chain": chain}}
            await app({**scope, "extensions": extensions}, receive, send)

        self.app = with_certificate


def client_certificate(scope: Any) -> x509.Certificate:
    """Of the client of a request that CertifiedH11 has taken."""
    return x509.load_pem_x509_certificate(scope["extensions"][EXTENSION]["client_cert_chain"][0].encode())
