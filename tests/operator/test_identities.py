"""Certificates on a real API server: the pod's own program asks, the operator checks, signs, denies and replaces."""

from __future__ import annotations

import asyncio
import base64
import json
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from prometheus_client import CollectorRegistry

from hat_operator import metrics, names
from hat_operator.admin import Doors
from hat_operator.cluster import Cluster
from hat_operator.denied_push import DeniedPush
from hat_operator.edges import EdgeClusters
from hat_operator.identity import who
from hat_operator.identity.api import Requests
from hat_operator.identity.authority import SECRET_NAME, Authorities
from hat_operator.identity.pod import DeniedError, Identity
from hat_operator.identity.service import Identities
from hat_operator.kinds import CERTIFICATE_REQUEST, CONFIG_MAP, EVENT, HATDEPLOYMENT, NODE, POD, SECRET
from hat_operator.reconcile import Reconciler
from hat_operator.settings import Settings
from hat_operator.spec import HatDeployment
from hat_runtime.cloud.access import Access
from hat_runtime.cloud.admin import health_routes
from hat_runtime.cloud.ports import serving_http
from hat_runtime.http import bind
from hat_runtime.security.folder import TlsFolder
from hat_runtime.security.spiffe import CLOUD, DEVICE, SpiffeId
from tests.harness.controlplane import ControlPlane
from tests.harness.release import Helm
from tests.operator.devices import Devices
from tests.operator.home import SELECTOR, Home, inline, remote, store_kubeconfig

SETTINGS = Settings(version="9.9")
Object = dict[str, Any]


def asking_is_allowed(plane: ControlPlane, folder: Path) -> None:
    """The chart's rights of pods, and no others."""
    objects = Helm(plane.kubeconfig, "default", folder).template("hat", "--set", "crds.enabled=false")
    chosen = [item for item in objects if item["metadata"]["name"].endswith("-requester")]
    assert {item["kind"] for item in chosen} == {"ClusterRole", "ClusterRoleBinding"}
    body = {"apiVersion": "v1", "kind": "List", "items": chosen}
    plane.kubectl("apply", "-f", "-", stdin=json.dumps(body))


class EndedError(Exception):
    """As kubelet's signal."""


class Pod:
    """The program in one pod's sidecar, with the token and folders that kubelet would give it."""

    def __init__(
        self, plane: ControlPlane, namespace: str, account: str, pod: str, identity: SpiffeId, labels: dict[str, str],
        folder: Path,
    ) -> None:  # fmt: skip
        bound = ("--bound-object-kind=Pod", f"--bound-object-name={pod}") if pod else ()
        token = plane.kubectl("-n", namespace, "create", "token", account, *bound).stdout
        secrets = folder / "account"
        secrets.mkdir(parents=True)
        (secrets / "token").write_text(token)
        (secrets / "ca.crt").write_bytes((plane.folder / "ca.crt").read_bytes())
        self.folder = folder / "tls"
        self.folder.mkdir()
        self._ended = threading.Event()
        self.failure: Exception | None = None
        self.identity = Identity(identity, self.folder, Requests(secrets, plane.server), labels, self._sleep)

    def _sleep(self, seconds: float) -> None:
        if self._ended.wait(seconds):
            raise EndedError

    @contextmanager
    def running(self) -> Iterator[None]:
        """Like the sidecar, in a thread."""

        def run() -> None:
            try:
                self.identity.keep()
            except DeniedError as error:
                self.failure = error
            except EndedError:
                return

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._ended.set()
            thread.join(20)
            assert not thread.is_alive()

    @property
    def serial(self) -> int:
        """Of the certificate in the folder; 0 without one."""
        if not (self.folder / "tls.crt").exists():
            return 0
        kind = DEVICE if "/device/" in str(self.identity._identity) else CLOUD
        return TlsFolder(self.folder, kind).current().certificate.serial_number


@dataclass
class World:
    """A HatDeployment whose pods exist as far as a control plane without kubelets has them."""

    home: Home
    plane: ControlPlane
    devices: Devices
    tmp: Path
    identities: Identities
    authorities: Authorities
    site: ControlPlane | None = None
    site_namespace: str = ""

    async def hat(self) -> HatDeployment:
        return HatDeployment.parse(await self.home.hat())

    async def device(self, index: int = 0) -> Pod:
        """The pod of a device."""
        hat, node = await self.hat(), self.devices.nodes[index]
        await self.devices.run_pods()
        (found,) = [pod for pod in await self.devices.pods() if pod["spec"].get("nodeName") == node]
        return Pod(
            self.site or self.plane, names.edge_namespace(hat), names.edge(hat), found["metadata"]["name"],
            who.device(hat, SETTINGS, node), who.request_labels(hat, names.EDGE), self.tmp / f"{node}-{time.time_ns()}",
        )  # fmt: skip

    async def replica(self) -> Pod:
        """A pod of the cloud, on a node."""
        hat = await self.hat()
        (found,) = await self.home.cluster.list(POD, hat.namespace, f"{names.LABEL_COMPONENT}={names.CLOUD}")
        if not found["spec"].get("nodeName"):
            path = POD.path(hat.namespace, found["metadata"]["name"], "binding")
            target = {"apiVersion": "v1", "kind": "Node", "name": self.devices.nodes[0]}
            meta = {"name": found["metadata"]["name"]}
            binding = {"apiVersion": "v1", "kind": "Binding", "metadata": meta, "target": target}
            await self.home.cluster._request("post", path, body=binding)
        return Pod(
            self.plane, hat.namespace, names.cloud(hat), found["metadata"]["name"],
            who.cloud(hat, SETTINGS), who.request_labels(hat, names.CLOUD), self.tmp / f"cloud-{time.time_ns()}",
        )  # fmt: skip

    async def until(self, holds: Callable[[], Any], what: str, timeout_s: float = 40) -> None:
        """Reconcile until something holds."""
        deadline = time.monotonic() + timeout_s
        while not holds():
            assert time.monotonic() < deadline, what
            await self.home.reconcile()
            await asyncio.sleep(0.1)

    async def requests(self) -> list[Object]:
        cluster = self.devices._cluster
        return await cluster.list(CERTIFICATE_REQUEST, None, f"{names.LABEL_NAMESPACE}={self.home.namespace}")

    async def denied(self) -> Object:
        found = await self.home.cluster.get(CONFIG_MAP, "chat-cloud-denied", self.home.namespace)
        assert found is not None
        listed: Object = json.loads(found["data"]["denied.json"])
        return listed


def reconciler(home: Home, settings: Settings = SETTINGS) -> tuple[Identities, Authorities]:
    """Let the home go on as another process."""
    authorities = Authorities(home.cluster, settings.trust_domain)
    identities = Identities(home.cluster, settings, authorities)
    home.reconciler = Reconciler(home.cluster, EdgeClusters(home.cluster), settings, identities=identities)
    return identities, authorities


@pytest.fixture
async def world(home: Home, control_plane: ControlPlane, tmp_path: Path) -> AsyncIterator[World]:
    """Two devices in the cloud's own cluster, and one replica."""
    asking_is_allowed(control_plane, tmp_path)
    async with Devices(home.cluster, home.namespace, 2) as devices:
        identities, authorities = reconciler(home)
        found = World(home, control_plane, devices, tmp_path, identities, authorities)
        await home.create(edge={"deviceSelector": {"matchLabels": devices.labels}})
        await pods_are_there(found)
        yield found


async def pods_are_there(world: World) -> None:
    deadline = time.monotonic() + 40
    while True:
        await world.home.reconcile()
        replicas = await world.home.cluster.list(
            POD, world.home.namespace, f"{names.LABEL_COMPONENT}={names.CLOUD}"
        )
        if replicas and len(await world.devices.pods()) == 2:
            return
        assert time.monotonic() < deadline
        await asyncio.sleep(0.2)


async def test_new_hatdeployments_are_mutual_and_older_ones_stay_as_they_were(home: Home) -> None:
    await home.create()
    await home.reconcile()
    assert (await home.hat())["spec"]["security"]["tls"] == "mutual"
    assert (await home.conditions())["IdentitiesSigned"] == ("True", "Signing")
    body = await home.hat()
    await home.cluster.delete(body)
    while await home.cluster.get(HATDEPLOYMENT, "chat", home.namespace) is not None:
        await asyncio.sleep(0.1)
    # As an object whose status an operator has written, and whose spec does not know the field.
    await home.create()
    await home.cluster.patch(await home.hat(), {"status": {"cloud": {"ready": 1}}}, "status")
    await home.reconcile()
    assert (await home.hat())["spec"]["security"]["tls"] == "off"
    assert "IdentitiesSigned" not in await home.conditions()


async def test_one_that_was_invalid_at_first_is_mutual_once_it_is_mended(home: Home) -> None:
    twice = [{"name": "a", "arch": "amd64"}, {"name": "b", "arch": "amd64"}]
    await home.create(edge={**SELECTOR, "images": twice})
    await home.reconcile()
    assert (await home.conditions())["Ready"] == ("False", "InvalidSpec")
    await home.patch(edge={"images": twice[:1]})
    await home.reconcile()
    assert (await home.hat())["spec"]["security"]["tls"] == "mutual"
    (deployment,) = await home.deployments()
    (cloud,) = deployment["spec"]["template"]["spec"]["containers"]
    assert "--tls" in cloud["args"]


async def test_what_the_operator_cannot_add_is_told(home: Home) -> None:
    reconciler(home, Settings(version="9.9", identities=False))  # writes tls: off
    await home.create(security={"deniedDevices": ["stolen"]})
    assert await home.reconcile() is None
    assert (await home.conditions())["Ready"] == ("False", "InvalidSpec")
    (message,) = {item["message"] for item in (await home.hat())["status"]["conditions"]}
    assert "security.deniedDevices: without certificates nobody can tell devices apart" in message
    await home.patch(security={"deniedDevices": []})
    await home.reconcile()
    assert (await home.hat())["spec"]["security"]["tls"] == "off"
    assert (await home.conditions())["Ready"][1] != "InvalidSpec"


async def test_device_and_cloud_get_certificates_that_the_runtime_takes(world: World) -> None:
    device, replica = await world.device(), await world.replica()
    with device.running(), replica.running():
        await world.until(lambda: device.serial and replica.serial, "both have a certificate")
    one, other = TlsFolder(device.folder, DEVICE).current(), TlsFolder(replica.folder, CLOUD).current()
    assert (
        str(one.identity)
        == f"spiffe://hat.internal/tenant/{world.home.namespace}/device/{world.devices.nodes[0]}"
    )
    assert other.tenants == {one.identity.tenant}
    assert one.authorities == other.authorities
    left = one.certificate.not_valid_after_utc.timestamp() - time.time()
    assert 23 * 3600 < left <= 24 * 3600
    for path in device.folder.iterdir():
        assert path.is_symlink() or path.stat().st_mode & 0o777 == 0o700
    assert (device.folder / "tls.key").stat().st_mode & 0o777 == 0o600
    # What the API server has seen of it holds no private key.
    assert "PRIVATE" not in json.dumps(await world.requests())
    filed = [item for item in await world.requests() if item["spec"]["signerName"] == "hat.dev/device"]
    assert filed[0]["spec"]["extra"]["authentication.kubernetes.io/node-name"] == [world.devices.nodes[0]]
    conditions = [(item["type"], item["reason"]) for item in filed[0]["status"]["conditions"]]
    assert conditions == [("Approved", "HatIdentity")]
    # A restarted sidecar goes on with what is there.
    assert device.identity.held() is not None
    assert replica.identity.held() is not None


async def test_a_foreign_account_is_denied_and_told_why(world: World) -> None:
    hat = await world.hat()
    node = world.devices.nodes[0]
    foreign = Pod(
        world.plane, hat.namespace, "default", "", who.device(hat, SETTINGS, node),
        who.request_labels(hat, names.EDGE), world.tmp / "foreign",
    )  # fmt: skip
    with foreign.running():
        await world.until(lambda: foreign.failure, "the foreign one is told")
    assert f"filed by 'system:serviceaccount:{hat.namespace}:default'" in str(foreign.failure)
    assert foreign.serial == 0
    (filed,) = await world.requests()
    (condition,) = filed["status"]["conditions"]
    assert (condition["type"], condition["reason"]) == ("Denied", "CertificateRefused")
    assert "certificate" not in filed["status"]
    events = await world.home.events()
    assert events["CertificateRefused"] == "Warning"


async def test_a_device_that_claims_another_ones_name_is_denied(world: World) -> None:
    pod, hat = await world.device(0), await world.hat()
    pod.identity._identity = who.device(hat, SETTINGS, world.devices.nodes[1])
    with pod.running():
        await world.until(lambda: pod.failure, "it is denied")
    assert "must ask for exactly that" in str(pod.failure)


async def test_approval_by_hand_is_no_certificate(world: World) -> None:
    hat = await world.hat()
    foreign = Pod(
        world.plane, hat.namespace, "default", "", who.device(hat, SETTINGS, world.devices.nodes[0]),
        who.request_labels(hat, names.EDGE), world.tmp / "foreign",
    )  # fmt: skip
    with foreign.running():
        deadline = time.monotonic() + 30
        while not (filed := await world.requests()):
            assert time.monotonic() < deadline
            await asyncio.sleep(0.1)
        world.plane.kubectl("certificate", "approve", filed[0]["metadata"]["name"])
        await world.until(lambda: foreign.failure, "the foreign one is told")
    (found,) = await world.requests()
    assert sorted(item["type"] for item in found["status"]["conditions"]) == ["Approved", "Failed"]


async def test_certificates_are_replaced_before_they_end(world: World) -> None:
    reconciler(world.home, Settings(version="9.9", certificate_s=6))
    device = await world.device()
    with device.running():
        await world.until(lambda: device.serial, "the first one")
        first, keys = device.serial, {(device.folder / "tls.key").read_bytes()}
        await world.until(lambda: device.serial != first, "the second one")
        keys.add((device.folder / "tls.key").read_bytes())
    assert len(keys) == 2
    assert len(list(device.folder.glob("..2*"))) + len(list(device.folder.glob("..1*"))) == 1


async def test_what_was_approved_before_a_kill_is_signed_by_the_next_process(world: World) -> None:
    device = await world.device()
    with device.running():
        deadline = time.monotonic() + 30
        while not (filed := await world.requests()):
            assert time.monotonic() < deadline
            await asyncio.sleep(0.1)
        world.plane.kubectl("certificate", "approve", filed[0]["metadata"]["name"])
        world.home.restart()
        await world.until(lambda: device.serial, "it is signed")


async def test_who_leaves_the_fleet_is_refused_and_gets_no_more(world: World) -> None:
    one, two = world.devices.nodes
    await world.home.reconcile()
    assert await world.denied() == {"version": 0, "denied": []}
    device = await world.device(1)  # its token is still good
    node = await world.home.cluster.get(NODE, two)
    assert node is not None
    await world.home.cluster.patch(node, {"metadata": {"labels": {"hat.dev/device": None}}})
    world.home.restart()  # a process that starts knows who was a device before
    await world.home.reconcile()
    uri = f"spiffe://hat.internal/tenant/{world.home.namespace}/device/"
    assert await world.denied() == {"version": 1, "denied": [uri + two]}
    assert (await world.home.events())["DevicesDenied"] == "Warning"
    with device.running():
        await world.until(lambda: device.failure, "it gets no certificate")
    assert "does not match" in str(device.failure) or "is none of" in str(device.failure)
    await world.home.patch(security={"deniedDevices": [one]})
    await world.home.reconcile()
    assert await world.denied() == {"version": 2, "denied": sorted([uri + one, uri + two])}
    await world.home.cluster.patch(node, {"metadata": {"labels": {"hat.dev/device": world.home.namespace}}})
    await world.home.patch(security={"deniedDevices": []})
    await world.home.reconcile()
    assert await world.denied() == {"version": 3, "denied": []}


async def test_the_list_is_pushed_whatever_becomes_of_other_objects(home: Home) -> None:
    identities, authorities = reconciler(home)
    push = DeniedPush(home.cluster, [home.namespace], Doors(SETTINGS, authorities), 60.0, lambda *_: None)
    identities._push = push
    await home.create(observability={"podMonitor": "enabled"})  # an API that this cluster does not have
    await home.reconcile()
    await home.patch(security={"deniedDevices": ["stolen"]})
    await home.reconcile()
    assert (await home.conditions())["CloudReady"] == ("False", "ApplyNotFound")
    assert [one.name for one in push._lists[home.namespace, "chat"].identities] == ["stolen"]
    assert (await home.events())["DevicesDenied"] == "Warning"


async def test_an_invalid_spec_holds_up_neither_certificates_nor_denials(world: World) -> None:
    device = await world.device()
    push = DeniedPush(
        world.home.cluster, [world.home.namespace], Doors(SETTINGS, world.authorities), 60.0, lambda *_: None
    )
    world.identities._push = push
    twice = [{"name": "a", "arch": "amd64"}, {"name": "b", "arch": "amd64"}]
    await world.home.patch(edge={"images": twice}, security={"deniedDevices": ["stolen"]})
    with device.running():
        await world.until(lambda: device.serial, "the device has a certificate")
    assert (await world.home.conditions())["Ready"] == ("False", "InvalidSpec")
    assert (await world.denied())["version"] == 1
    assert [one.name for one in push._lists[world.home.namespace, "chat"].identities] == ["stolen"]
    assert (await world.home.events())["DevicesDenied"] == "Warning"
    assert len(await world.devices.pods()) == 2


async def test_a_cloud_gets_the_list_at_once_and_from_nobody_else(world: World, unused_tcp_port: int) -> None:
    """The real admin port, with the certificate that the operator has signed for the replica."""
    replica = await world.replica()
    with replica.running():
        await world.until(lambda: replica.serial, "the replica has a certificate")
    access = Access.of(replica.folder, None)
    registry = CollectorRegistry()
    (pod,) = await world.home.cluster.list(POD, world.home.namespace, f"{names.LABEL_COMPONENT}=cloud")
    status = {"phase": "Running", "podIP": "127.0.0.1", "podIPs": [{"ip": "127.0.0.1"}]}
    await world.home.cluster.patch(pod, {"status": status}, "status")
    url = f"https://{{ip}}:{unused_tcp_port}/v1/devices"
    doors = Doors(SETTINGS, world.authorities, url)
    asked: list[tuple[str, str]] = []
    push = DeniedPush(world.home.cluster, [world.home.namespace], doors, 60.0, lambda *key: asked.append(key))
    world.identities._push = push
    health = health_routes(registry, lambda: None)
    with bind("127.0.0.1", 0, "--http-listen") as plain:
        async with serving_http(health, [], plain, ("127.0.0.1", unused_tcp_port), access):
            running = asyncio.create_task(push.run())
            try:
                await world.home.patch(security={"deniedDevices": ["node-x"]})
                await world.until(lambda: access.denied.current.version == 1, "the list is there")
                (identity,) = access.denied.current.identities
                assert identity.name == "node-x"
                # Another list with a higher version, as of a lost ConfigMap: the operator's is put above it.
                access.denied.put(b'{"version": 9, "denied": []}')
                await world.home.patch(security={"deniedDevices": ["node-x", "node-y"]})
                await world.until(lambda: access.denied.current.version == 10, "the list is above the other")
                assert asked == [(world.home.namespace, "chat")]
                # The device of the same tenant is no operator, and without a certificate there is no answer.
                door = await doors.of(pod | {"status": status})
                assert door.url.startswith("https://127.0.0.1:")
                async with aiohttp.ClientSession() as session:
                    async with session.get(door.at("/v1/denied"), **door.options) as response:
                        assert (await response.json())["version"] == 10
                    options = {**door.options, "server_hostname": "other.hat.internal.hat-cloud.hat.internal"}
                    with pytest.raises(aiohttp.ClientError):
                        await session.get(door.at("/v1/denied"), **options)
                    with pytest.raises(aiohttp.ClientError):
                        await session.get(door.at("/v1/denied"), ssl=False)
                # The ConfigMap is lost, and the list that is written anew has the version of the pod's.
                failed = metrics.DENIED_PUSHES.labels("failed")._value.get()
                lost = await world.home.cluster.get(CONFIG_MAP, "chat-cloud-denied", world.home.namespace)
                assert lost is not None
                await world.home.cluster.delete({"apiVersion": "v1", "kind": "ConfigMap", **lost})
                await world.home.patch(security={"deniedDevices": ["node-z"]})
                await world.until(lambda: access.denied.current.version == 11, "the list is there")
                assert [identity.name for identity in access.denied.current.identities] == ["node-z"]
                assert metrics.DENIED_PUSHES.labels("failed")._value.get() > failed
            finally:
                running.cancel()


async def test_the_authority_stays_and_a_broken_one_is_told(world: World) -> None:
    home = world.home
    before = await home.cluster.get(SECRET, SECRET_NAME, home.namespace)
    assert before is not None
    assert before["type"] == "kubernetes.io/tls"
    home.restart()
    await home.reconcile()
    after = await home.cluster.get(SECRET, SECRET_NAME, home.namespace)
    assert after == before
    kind = {"apiVersion": "v1", "kind": "Secret"}
    await home.cluster.patch({**kind, **before}, {"metadata": {"annotations": {"hat.dev/rotate": "now"}}})
    await home.reconcile()
    announced = await home.cluster.get(SECRET, SECRET_NAME, home.namespace)
    assert announced is not None
    assert "annotations" not in announced["metadata"]
    assert set(announced["data"]) == {"tls.crt", "tls.key", "ca.crt", "next.crt", "next.key"}
    assert announced["data"]["tls.crt"] == before["data"]["tls.crt"]
    await home.cluster.patch({**kind, **before}, {"data": {"tls.key": base64.b64encode(b"x").decode()}})
    await home.reconcile()
    assert (await home.conditions())["IdentitiesSigned"] == ("False", "AuthorityInvalid")
    assert (await home.conditions())["Ready"] == ("False", "AuthorityInvalid")
    messages = [item["message"] for item in await home.cluster.list(EVENT, home.namespace)]
    assert any("tls.key is no private key" in message for message in messages)


async def test_devices_of_a_site_ask_there(
    home: Home,
    site: tuple[Cluster, str],
    control_plane: ControlPlane,
    edge_plane: ControlPlane,
    tmp_path: Path,
) -> None:
    cluster, namespace = site
    asking_is_allowed(edge_plane, tmp_path)
    async with Devices(cluster, namespace, 2) as devices:
        await store_kubeconfig(home, inline(edge_plane))
        identities, authorities = reconciler(home)
        world = World(home, control_plane, devices, tmp_path, identities, authorities, edge_plane, namespace)
        wanted = remote(namespace, deviceSelector={"matchLabels": devices.labels})
        await home.create(**wanted)
        await home.reconcile()
        await home.serve(names.revision(await world.hat(), SETTINGS))
        deadline = time.monotonic() + 40
        while len(await devices.pods()) < 2:
            await home.reconcile()
            assert time.monotonic() < deadline
            await asyncio.sleep(0.2)
        device = await world.device()
        with device.running():
            await world.until(lambda: device.serial, "the device has a certificate")
        found = TlsFolder(device.folder, DEVICE).current()
        assert found.identity.tenant == home.namespace  # not the site's namespace
        signing = await authorities.get(home.namespace)
        assert found.authorities.decode() == signing.bundle
        assert await cluster.get(SECRET, SECRET_NAME, namespace) is None
        # With a site it has a finalizer: left alone, it would stay in this control plane for ever.
        await home.cluster.delete(await home.hat())
        while await home.cluster.get(HATDEPLOYMENT, "chat", home.namespace) is not None:
            await home.reconcile()
            await asyncio.sleep(0.2)
