"""Certificates, authorities and API keys that change while answers are under way."""

from __future__ import annotations

import asyncio
import time
from datetime import timedelta
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.serialization import Encoding

from hat_runtime.device.connect import connect
from hat_runtime.device.generator import GenerationRequest, GeneratorConfig
from hat_runtime.device.link import CloudLink
from hat_runtime.errors import CloudUnavailable
from hat_runtime.security import keys
from hat_runtime.security.folder import CHECK_S, TlsFolder
from hat_runtime.security.pki import Authority
from hat_runtime.security.spiffe import CLOUD, DEVICE, SpiffeId
from tests.certificates import TRUST_DOMAIN, Site, replace
from tests.runtime.api_pair import MODEL, cloud_config, device_for, running_cloud, serving_pair
from tests.runtime.secured import admin, secured_cloud
from tests.runtime.test_generator import Reference, make_prompts
from tests.tiny_chat import make_tiny_chat_model

NEW_TOKENS = 12


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_chat_model(tmp_path_factory.mktemp("chat") / "model")


def pem(*authorities: Authority) -> bytes:
    return b"".join(one.certificate.public_bytes(Encoding.PEM) for one in authorities)


async def noticed() -> None:
    """Files are looked at again, at most once in CHECK_S."""
    await asyncio.sleep(CHECK_S + 0.1)


async def test_rotation_under_traffic_loses_no_answer(tiny_llama: Path, site: Site) -> None:
    """New certificates, then a new authority in the three steps that lose nothing; answers are greedy, in float32."""
    prompts = make_prompts(4, seed=3, low=20, high=60)
    whole = Reference(tiny_llama)
    want = [whole.greedy(prompt, NEW_TOKENS) for prompt in prompts]
    old, new = site.authority, Authority.create(TRUST_DOMAIN)
    device, cloud_files = site.device(), site.cloud()
    stale = site.device()
    config = GeneratorConfig(max_idle_conversations=2, min_reuse_tokens=10_000)

    def renew(authority: Authority, accepted: bytes) -> None:
        site.authority = authority
        replace(cloud_files, site.issue(CLOUD, "cloud-1"), accepted)
        replace(device, site.issue(DEVICE, "jetson-1"), accepted)

    async with secured_cloud(tiny_llama, site, cloud_files) as cloud:
        generator = await connect(
            tiny_llama, cloud.address, "float32", config=config, tls=TlsFolder(device, DEVICE)
        )
        answers = 0
        done = False

        async def keep_asking(index: int) -> None:
            nonlocal answers
            while not done:
                request = GenerationRequest(prompts[index], NEW_TOKENS)
                found = [event.token_id async for event in generator.generate(request)]
                assert found == want[index]
                answers += 1

        askers = asyncio.gather(*(keep_asking(index) for index in range(len(prompts))))
        channels = generator.link.channels
        try:
            serials = set()
            steps = ((old, (old,)), (old, (old, new)), (new, (old, new)), (new, (new,)))
            for authority, accepted in steps:
                renew(authority, pem(*accepted))
                await noticed()
                seen = answers
                while answers < seen + 2 * len(prompts):
                    assert not askers.done(), askers.exception()
                    await asyncio.sleep(0.01)
                serials.add(channels.newest.certificate.serial_number)
        finally:
            done = True
            await askers
        assert len(serials) == 4
        # The streams of earlier certificates are gone, and with the last of them their connections.
        generator.conversations.clear()
        await asyncio.sleep(0)
        assert not generator.link.sessions
        assert channels.retired == 0
        await generator.close()
        # The authority before is trusted no more.
        (stale / "ca.crt").write_bytes(pem(new))
        late = CloudLink(cloud.address, tls=TlsFolder(stale, DEVICE))
        with pytest.raises(CloudUnavailable, match="the cloud does not accept the certificate of spiffe://"):
            await late.describe()
        await late.close()


async def test_a_device_serves_through_mtls_until_it_is_denied(folder: Path, site: Site) -> None:
    ask = {
        "model": MODEL,
        "messages": [{"role": "user", "content": "Hello"}],
        "max_tokens": 5,
        "temperature": 0,
    }
    async with serving_pair(folder) as plain:
        want = (await plain.openai.chat.completions.create(**ask)).choices[0].message.content
    async with (
        running_cloud(cloud_config(folder, tls=site.cloud())) as cloud,
        device_for(cloud, folder, tls=site.device()) as pair,
    ):
        assert (await pair.openai.chat.completions.create(**ask)).choices[0].message.content == want
        for registry in (cloud.metrics.registry, pair.device.metrics.registry):
            left = (registry.get_sample_value("hat_certificate_expiry_timestamp_seconds") or 0) - time.time()
            assert 23 * 3600 < left <= 24 * 3600
        denied = [str(SpiffeId(TRUST_DOMAIN, "acme", DEVICE, "jetson-1"))]
        await admin(cloud, "/v1/denied", site.operator(), {"version": 1, "denied": denied})
        reply = await pair.http.post("/v1/chat/completions", json=ask)
        assert reply.status_code == 503
        assert reply.json()["error"]["code"] == "device_forbidden"
        assert "is on the deny-list" in reply.json()["error"]["message"]
        assert (await pair.http.get("/readyz")).status_code == 503
        await admin(cloud, "/v1/denied", site.operator(), {"version": 2, "denied": []})
        assert (await pair.openai.chat.completions.create(**ask)).choices[0].message.content == want


async def test_an_answer_outlives_a_session_whose_certificate_ended(tiny_llama: Path, site: Site) -> None:
    """A kept conversation's stream ends with its certificate; the next turn opens another with the new one."""
    prompt, whole = make_prompts(1, seed=9)[0], Reference(tiny_llama)
    async with secured_cloud(tiny_llama, site) as cloud:
        device = site.device(lifetime=timedelta(seconds=5))
        generator = await connect(tiny_llama, cloud.address, "float32", tls=TlsFolder(device, DEVICE))

        async def answer() -> list[int]:
            return [event.token_id async for event in generator.generate(GenerationRequest(prompt, 8))]

        want = whole.greedy(prompt, 8)
        assert await answer() == want
        (session,) = generator.link.sessions
        replace(device, site.issue(DEVICE, "jetson-1"))
        while session.alive:
            await asyncio.sleep(0.05)
        assert await answer() == want
        await generator.close()


async def test_api_keys_change_under_a_running_device(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# phone\nfirst-key\n")
    async with serving_pair(folder, api_key_file=file) as pair:

        async def status(key: str, path: str = "/v1/models") -> int:
            return (await pair.http.get(path, headers={"Authorization": f"Bearer {key}"})).status_code

        assert [await status("first-key"), await status("second-key"), await status("# phone")] == [
            200,
            401,
            401,
        ]
        file.write_text("second-key\n")
        await asyncio.sleep(keys.CHECK_S + 0.1)
        assert [await status("first-key"), await status("second-key")] == [401, 200]
        assert await status("second-key", "/v1/hat/stats") == 200
        assert await status("none", "/v1/hat/stats") == 401
        for path in ("/", "/page/page.js", "/healthz", "/readyz", "/metrics"):
            assert (await pair.http.get(path)).status_code == 200, path
        reply = await pair.http.get("/v1/models")
        assert reply.headers["www-authenticate"] == "Bearer"
        assert reply.json()["error"]["type"] == "authentication_error"
