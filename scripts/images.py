"""Builds the container images with docker or buildah, whichever is there.

Usage: scripts/images.py --registry PREFIX [--variant cpu|cuda|l4t-RELEASE] [--push] ...   (`make images` calls it)
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VARIANTS = ROOT / "images" / "variants.toml"
TOOLS = ("docker", "buildah")
_RELEASE = re.compile(r"r\d+\.\d+(\.\d+)?")


class ImageError(Exception):
    """Images cannot be built as asked; the text is one line that names the option and echoes its value."""


@dataclass(frozen=True)
class Variant:
    """One way of building, as images/variants.toml describes it."""

    name: str
    images: tuple[str, ...]
    base: str
    digest: str
    suffix: str
    platform: str = ""
    args: Mapping[str, str] = field(default_factory=dict)

    @property
    def pinned_base(self) -> str:
        """The base image with its digest where there is one."""
        return f"{self.base}@{self.digest}" if self.digest else self.base


@dataclass(frozen=True)
class Build:
    """One image to build."""

    image: str
    reference: str
    base: str
    platform: str
    args: Mapping[str, str]


def read_variant(name: str, text: str | None = None) -> Variant:
    """The variant called `name`; `text` replaces images/variants.toml. Raises ImageError."""
    table = tomllib.loads(VARIANTS.read_text() if text is None else text)
    key, _, release = name.partition("-")
    if key not in table or (key == "l4t") != bool(release) or (release and not _RELEASE.fullmatch(release)):
        known = ", ".join("l4t-RELEASE (such as l4t-r36.4)" if one == "l4t" else one for one in table)
        raise ImageError(f"--variant: {name!r} is none of {known}")
    found = table[key]
    return Variant(
        name=name,
        images=tuple(found["images"]),
        base=found["base"],
        digest=found["digest"],
        suffix=found["suffix"].format(release=release),
        platform=found.get("platform", ""),
        args=found["args"],
    )


def plan(
    variant: Variant,
    registry: str,
    version: str,
    revision: str,
    only: Sequence[str] = (),
    base: str = "",
    build_args: Sequence[str] = (),
    platform: str = "",
) -> list[Build]:
    """The builds of a variant.

    Args:
        variant: which.
        registry: put before the images' names; empty for local ones.
        version: tag, and the label that says it.
        revision: of the source.
        only: some of the variant's images; none means all.
        base: another base image.
        build_args: NAME=VALUE, over those of the variant.
        platform: OS/ARCH instead of the variant's.

    Raises:
        ImageError: an image that the variant has not, no base image, a build argument without =.
    """
    for image in only:
        if image not in variant.images:
            raise ImageError(
                f"--image: {image!r} is none of the variant {variant.name}: {', '.join(variant.images)}"
            )
    if not (base or variant.base):
        raise ImageError(
            f"--base-image: the variant {variant.name} needs one; images/variants.toml says which fit"
        )
    given = {}
    for text in build_args:
        name, sign, value = text.partition("=")
        if not (name and sign):
            raise ImageError(f"--build-arg: {text!r} is not NAME=VALUE")
        given[name] = value
    builds = []
    for image in only or variant.images:
        args = {"BASE_IMAGE": base or variant.pinned_base, "VERSION": version, "REVISION": revision}
        # The operator has neither torch nor, for that reason, arguments that choose it.
        args |= (
            {**variant.args, **given}
            if image != "operator"
            else {
                name: value for name, value in given.items() if "TORCH" not in name and name != "VENV_OPTIONS"
            }
        )
        reference = f"{registry.rstrip('/')}/" if registry else ""
        reference += f"hat-{image}:{version}{variant.suffix if image == 'edge' else ''}"
        builds.append(Build(image, reference, args["BASE_IMAGE"], platform or variant.platform, args))
    return builds


def find_tool(wanted: str = "") -> str:
    """docker where its engine answers, else buildah; or `wanted`. Raises ImageError."""
    for tool in (wanted,) if wanted else TOOLS:
        if shutil.which(tool) and (tool != "docker" or _engine_answers()):
            return tool
    raise ImageError(
        f"--tool: {wanted!r} is not installed, or its engine does not answer"
        if wanted
        else "neither a docker engine nor buildah is here; on Debian and Ubuntu: apt-get install buildah"
    )


def _engine_answers() -> bool:
    asked = subprocess.run(["docker", "version"], stdin=subprocess.DEVNULL, capture_output=True, check=False)
    return asked.returncode == 0


def command(tool: str, build: Build, volumes: Sequence[str] = ()) -> list[str]:
    """The command that builds one image from the repository's root; `volumes` only with buildah."""
    # OCI's own format has no HEALTHCHECK.
    begin = ["buildah", "bud", "--format", "docker", "--layers"] if tool == "buildah" else ["docker", "build"]
    options = ["--file", f"images/{build.image}/Dockerfile", "--tag", build.reference]
    if build.platform:
        options += ["--platform", build.platform]
    for volume in volumes:
        options += ["--volume", volume]
    for name, value in build.args.items():
        options += ["--build-arg", f"{name}={value}"]
    return [*begin, *options, "."]


def source_revision() -> str:
    """The commit that is checked out, with -dirty where files have been changed; unknown outside a repository."""
    said = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    return said.stdout.strip() if said.returncode == 0 else "unknown"


def project_version() -> str:
    """Version of the project, from pyproject.toml."""
    return str(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"])


def _run(words: list[str]) -> None:
    print("+", " ".join(words), flush=True)
    done = subprocess.run(words, cwd=ROOT, stdin=subprocess.DEVNULL, check=False)
    if done.returncode:
        raise ImageError(f"{' '.join(words[:2])} failed with exit code {done.returncode}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 0 when everything asked for was built, 1 when a build failed or cannot be made."""
    parser = argparse.ArgumentParser(prog="scripts/images.py", description="Build HAT's container images.")
    parser.add_argument("--registry", default="", metavar="PREFIX", help="registry, with or without a path")
    parser.add_argument(
        "--variant", default="cpu", metavar="NAME", help="cpu, cuda or l4t-RELEASE (default: cpu)"
    )
    parser.add_argument(
        "--image", action="append", default=[], metavar="NAME", help="operator, cloud or edge; default: all"
    )
    parser.add_argument(
        "--base-image", default="", metavar="REF", help="default: that of images/variants.toml"
    )
    parser.add_argument(
        "--platform", default="", metavar="OS/ARCH", help="default: that of the variant, or this machine's"
    )
    parser.add_argument(
        "--build-arg", action="append", default=[], metavar="NAME=VALUE", help="for the Dockerfiles"
    )
    parser.add_argument(
        "--volume", action="append", default=[], metavar="FROM:TO", help="mounted while building (buildah)"
    )
    parser.add_argument(
        "--tool", default="", choices=("", *TOOLS), help="default: docker if its engine answers"
    )
    parser.add_argument("--push", action="store_true", help="push each image after it is built")
    options = parser.parse_args(arguments)
    try:
        if options.push and not options.registry:
            raise ImageError("--push: needs --registry")
        variant = read_variant(options.variant)
        builds = plan(
            variant,
            options.registry,
            project_version(),
            source_revision(),
            options.image,
            options.base_image,
            options.build_arg,
            options.platform,
        )
        tool = find_tool(options.tool)
        if not (options.base_image or variant.digest):
            print(f"note: the base {variant.base} is not pinned; `make pin-images` does it", flush=True)
        for build in builds:
            _run(command(tool, build, options.volume))
            if options.push:
                _run([tool, "push", build.reference])
    except ImageError as error:
        print(f"images: {error}", file=sys.stderr)
        return 1
    print("built:", *(build.reference for build in builds), sep="\n  ")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
