"""Digests of base images, asked from a real registry."""

from __future__ import annotations

import shutil
import tomllib
from pathlib import Path

import pytest

from scripts import pin_images
from scripts.images import VARIANTS, read_variant
from tests.harness.ci import skip_or_fail
from tests.images.machine import Buildah
from tests.images.registry import registry

pytestmark = pytest.mark.timeout(400)
OLD = "sha256:" + "0" * 64
TEXT = """
[cpu]
images = ["edge"]
base = "BASE"
digest = ""
suffix = ""
args = {}

[cuda]
images = ["edge"]
base = "127.0.0.1:9/none:1"
digest = "OLD"
suffix = ""
args = {}

[l4t]
images = ["edge"]
base = ""
digest = ""
suffix = "-l4t-{release}"
args = {}
""".replace("OLD", OLD)


def test_what_a_registry_says_is_written_and_nothing_else(
    buildah: Buildah, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if shutil.which("skopeo") is None:
        skip_or_fail("images: no skopeo; on Debian and Ubuntu: apt-get install skopeo")
    with registry(tmp_path) as host:
        # Where both tools look for what an administrator allows: this registry speaks no TLS.
        config = tmp_path / ".config" / "containers"
        config.mkdir(parents=True)
        (config / "registries.conf").write_text(f'[[registry]]\nlocation = "{host}"\ninsecure = true\n')
        monkeypatch.setenv("HOME", str(tmp_path))
        monkeypatch.setitem(buildah.environment, "HOME", str(tmp_path))
        reference = f"{host}/team/base:1"
        name = buildah.run("from", "scratch").strip()
        try:
            buildah.run("commit", "--quiet", name, reference)
            buildah.run("push", "--quiet", "--digestfile", str(tmp_path / "digest"), reference)
        finally:
            buildah.run("rm", name)
            buildah.run("rmi", reference)
        digest = (tmp_path / "digest").read_text()

        file = tmp_path / "variants.toml"
        file.write_text(TEXT.replace("BASE", reference))
        assert pin_images.main(["--file", str(file)]) == 1
        said = capsys.readouterr()
        assert "127.0.0.1:9/none:1" in said.err
        assert reference not in said.err
        found = tomllib.loads(file.read_text())
        assert [found[name]["digest"] for name in found] == [digest, OLD, ""]
        assert file.read_text() == TEXT.replace("BASE", reference).replace(
            'digest = ""', f'digest = "{digest}"', 1
        )
        assert read_variant("cpu", file.read_text()).pinned_base == f"{reference}@{digest}"
        # What stands there now can be pulled.
        buildah.run("pull", "--quiet", f"{reference}@{digest}")
        buildah.run("rmi", f"{reference}@{digest}")


def test_the_repositorys_file_can_be_pinned() -> None:
    text = VARIANTS.read_text()
    new, problems = pin_images.pinned(text, lambda reference: OLD)
    assert problems == []
    assert {table["digest"] for table in tomllib.loads(new).values() if table["base"]} == {OLD}
