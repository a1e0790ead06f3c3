"""Which images are built how; building them is tests/images."""

from __future__ import annotations

import pytest

from scripts.images import Build, ImageError, command, main, plan, read_variant


def builds(variant: str, **options: object) -> dict[str, Build]:
    found = plan(read_variant(variant), "r.example.com/hat", "1.2", "abc", **options)  # type: ignore[arg-type]
    return {build.image: build for build in found}


def test_cpu_and_cuda_have_the_tags_that_the_operator_asks_for() -> None:
    for variant in ("cpu", "cuda"):
        found = builds(variant)
        assert {build.reference for build in found.values()} == {
            f"r.example.com/hat/hat-{image}:1.2" for image in ("operator", "cloud", "edge")
        }
        assert all(
            build.args["REVISION"] == "abc" and build.args["VERSION"] == "1.2" for build in found.values()
        )
    assert "/cpu" in builds("cpu")["edge"].args["TORCH_INDEX_URL"]
    assert "TORCH_INDEX_URL" not in builds("cuda")["edge"].args
    assert "TORCH_INDEX_URL" not in builds("cpu")["operator"].args


def test_a_jetsons_image_needs_its_base() -> None:
    with pytest.raises(ImageError, match="--base-image"):
        builds("l4t-r36.4")
    (build,) = builds("l4t-r36.4", base="l4t:36").values()
    assert build.reference == "r.example.com/hat/hat-edge:1.2-l4t-r36.4"
    assert build.platform == "linux/arm64"
    assert (build.args["BASE_IMAGE"], build.args["TORCH"]) == ("l4t:36", "")


@pytest.mark.parametrize("wrong", ["gpu", "l4t", "l4t-36", "cpu-r36.4", ""])
def test_unknown_variants_are_named(wrong: str) -> None:
    with pytest.raises(ImageError, match=f"--variant: '{wrong}'"):
        read_variant(wrong)


def test_wrong_options_are_named() -> None:
    with pytest.raises(ImageError, match="--image: 'server'"):
        builds("cpu", only=["server"])
    with pytest.raises(ImageError, match="--build-arg: 'TORCH'"):
        builds("cpu", build_args=["TORCH"])
    assert main(["--push"]) == 1


def test_commands_of_both_tools() -> None:
    build = builds("cpu", only=["edge"], build_args=["TORCH=torch==2.8.0"], platform="linux/arm64")["edge"]
    for tool, begin in (("docker", ["docker", "build"]), ("buildah", ["buildah", "bud"])):
        words = command(tool, build)
        assert words[:2] == begin
        assert words[-1] == "."
        for option, value in (
            ("--file", "images/edge/Dockerfile"),
            ("--tag", build.reference),
            ("--platform", "linux/arm64"),
            ("--build-arg", "BASE_IMAGE=python:3.11-slim"),
        ):
            assert words[words.index(option) + 1] == value
        assert "TORCH=torch==2.8.0" in words
