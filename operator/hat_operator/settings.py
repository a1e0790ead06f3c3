"""The operator's own settings, from the environment."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from string import Formatter

from hat_runtime.errors import UsageError

PREFIX = "HAT_OPERATOR_"
DEVICES_URL = "http://{ip}:7071/v1/devices"


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
    instead of /v1/devices, the pod takes its chunk policy."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "version", self.version or package_version())

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> Settings:
        """Read HAT_OPERATOR_REGISTRY, _VERSION, _NAMESPACES, _RESYNC_SECONDS, _METRICS_PORT, _HEALTH_PORT, _LOG_FORMAT
        and _DEVICES_URL.

        Raises:
            UsageError: names the variable and echoes its value.
        """

        def value(name: str, default: str) -> str:
            return environment.get(PREFIX + name, "").strip() or default

        def port(name: str, default: int) -> int:
            text = value(name, str(default))
            if not text.isdigit() or not 1 <= int(text) <= 65535:
                raise UsageError(f"{PREFIX}{name}: {text!r} is not a port from 1 to 65535")
            return int(text)

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
        return cls(
            registry=value("REGISTRY", "").rstrip("/"),
            version=value("VERSION", ""),
            namespaces=tuple(name.strip() for name in value("NAMESPACES", "").split(",") if name.strip()),
            resync_s=resync_s,
            metrics_port=port("METRICS_PORT", 8080),
            health_port=port("HEALTH_PORT", 8081),
            log_format=log_format,
            devices_url=devices_url,
        )

    def image(self, name: str, tag: str) -> str:
        """Full name of one of HAT's images."""
        return f"{self.registry}/{name}:{tag}" if self.registry else f"{name}:{tag}"


def _is_devices_url(text: str) -> bool:
    try:
        fields = [name for _, name, _, _ in Formatter().parse(text) if name is not None]
    except ValueError:
        return False
    whole = text.startswith(("http://", "https://")) and text.endswith("/v1/devices")
    return whole and set(fields) <= {"ip", "namespace", "pod"}
