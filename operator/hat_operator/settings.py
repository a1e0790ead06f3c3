"""The operator's own settings, from the environment."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from ipaddress import ip_network
from string import Formatter

from hat_runtime.errors import UsageError
from hat_runtime.security.spiffe import OPERATOR, IdentityError, SpiffeId

PREFIX = "HAT_OPERATOR_"
DEVICES_URL = "http://{ip}:7071/v1/devices"
TRUST_DOMAIN = "hat.internal"
DAY_S = 86400


def package_version() -> str:
    """Version of the installed distribution, "0.0.0" for a source tree that was never installed."""
    try:
        return version("hat-platform")
    except PackageNotFoundError:
        return "0.0.0"


@dataclass(frozen=True)
class Settings:
    """How one operator runs."""

    registry: str = ""
    """Put before the names of images with a slash; "" for plain names."""
    version: str = ""
    """Tag of the images of a HatDeployment without runtime.version; "" becomes the package's."""
    namespaces: tuple[str, ...] = ()
    """Namespaces that are watched; none means all."""
    resync_s: float = 30.0
    metrics_port: int = 8080
    health_port: int = 8081
    log_format: str = "text"
    devices_url: str = DEVICES_URL
    """Where a pod of the cloud lists its devices; {ip}, {namespace} and {pod} are the pod's. Beside it, at /v1/policy
    instead of /v1/devices, the pod takes its chunk policy. Written by the user, it is where pods with certificates are
    asked as well."""
    identities: bool = True
    """Whether certificates are signed, for which the operator needs rights in the whole cluster."""
    trust_domain: str = TRUST_DOMAIN
    """In all identities."""
    certificate_s: int = DAY_S
    """Longest life of a certificate."""
    api_ports: tuple[int, ...] = (443, 6443)
    api_cidrs: tuple[str, ...] = ("0.0.0.0/0", "::/0")
    """Where API servers are, for the pods' NetworkPolicies."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "version", self.version or package_version())

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> Settings:
        """Read HAT_OPERATOR_REGISTRY, _VERSION, _NAMESPACES, _RESYNC_SECONDS, _METRICS_PORT, _HEALTH_PORT, _LOG_FORMAT,
        _DEVICES_URL, _IDENTITIES, _TRUST_DOMAIN, _CERTIFICATE_SECONDS, _API_PORTS and _API_CIDRS.

        Raises:
            UsageError: names the variable and echoes its value.
        """

        def value(name: str, default: str) -> str:
            return environment.get(PREFIX + name, "").strip() or default

        def port(name: str, default: int) -> int:
            return _port(name, value(name, str(default)))

        resync = value("RESYNC_SECONDS", "30")
        try:
            resync_s = float(resync)
        except ValueError:
            resync_s = 0.0
        if not 1 <= resync_s <= 86400:
            raise UsageError(f"{PREFIX}RESYNC_SECONDS: {resync!r} is not a number of seconds from 1 to 86400")
        log_format = value("LOG_FORMAT", "text")
        if log_format not in ("text", "json"):
            raise UsageError(f"{PREFIX}LOG_FORMAT: {log_format!r} is neither text nor json")
        devices_url = value("DEVICES_URL", DEVICES_URL)
        if not _is_devices_url(devices_url):
            text = (
                "is not an http:// or https:// URL that ends with /v1/devices and in which only {ip}, {namespace} "
                "and {pod} stand in braces"
            )
            raise UsageError(f"{PREFIX}DEVICES_URL: {devices_url!r} {text}")
        identities = value("IDENTITIES", "true")
        if identities not in ("true", "false"):
            raise UsageError(f"{PREFIX}IDENTITIES: {identities!r} is neither true nor false")
        trust_domain = value("TRUST_DOMAIN", TRUST_DOMAIN)
        try:
            SpiffeId(trust_domain, "default", OPERATOR, "operator")
        except IdentityError as error:
            raise UsageError(f"{PREFIX}TRUST_DOMAIN: {error}") from error
        lifetime = value("CERTIFICATE_SECONDS", str(DAY_S))
        if not lifetime.isdigit() or not 30 <= int(lifetime) <= DAY_S:
            raise UsageError(
                f"{PREFIX}CERTIFICATE_SECONDS: {lifetime!r} is not a whole number from 30 to {DAY_S}"
            )
        ports = value("API_PORTS", "443,6443").split(",")
        cidrs = value("API_CIDRS", "0.0.0.0/0,::/0").split(",")
        return cls(
            registry=value("REGISTRY", "").rstrip("/"),
            version=value("VERSION", ""),
            namespaces=tuple(name.strip() for name in value("NAMESPACES", "").split(",") if name.strip()),
            resync_s=resync_s,
            metrics_port=port("METRICS_PORT", 8080),
            health_port=port("HEALTH_PORT", 8081),
            log_format=log_format,
            devices_url=devices_url,
            identities=identities == "true",
            trust_domain=trust_domain,
            certificate_s=int(lifetime),
            api_ports=tuple(_port("API_PORTS", item.strip()) for item in ports),
            api_cidrs=tuple(_cidr("API_CIDRS", item.strip()) for item in cidrs),
        )

    def image(self, name: str, tag: str) -> str:
        """Full name of one of HAT's images."""
        return f"{self.registry}/{name}:{tag}" if self.registry else f"{name}:{tag}"


def _port(name: str, text: str) -> int:
    if not text.isdigit() or not 1 <= int(text) <= 65535:
        raise UsageError(f"{PREFIX}{name}: {text!r} is not a port from 1 to 65535")
    return int(text)


def _cidr(name: str, text: str) -> str:
    """A range of addresses without the bits of the host that it was found by, which Kubernetes lets stand."""
    try:
        return str(ip_network(text, strict=False))
    except ValueError as error:
        raise UsageError(f"{PREFIX}{name}: {text!r} is no range of addresses: {error}") from error


def _is_devices_url(text: str) -> bool:
    try:
        fields = [name for _, name, _, _ in Formatter().parse(text) if name is not None]
    except ValueError:
        return False
    whole = text.startswith(("http://", "https://")) and text.endswith("/v1/devices")
    return whole and set(fields) <= {"ip", "namespace", "pod"}
