"""`hat render`: the objects of a HatDeployment, without a cluster."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hat_runtime.cli.command import Command

if TYPE_CHECKING:
    from hat_operator.desired import Desired

UNKNOWN_ENDPOINT = "203.0.113.1"
"""Stands for the load balancer's address, which only a cluster knows (an address for documentation, RFC 5737)."""


def _configure(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Print, as YAML, the Kubernetes objects that the operator would make for a HatDeployment: first those of the "
        "cloud's cluster, then those of the devices'. Nothing is sent anywhere. Where only a cluster knows the address "
        f"that devices dial, {UNKNOWN_ENDPOINT} stands for it."
    )
    parser.epilog = "example: hat render -f hatdeployment.yaml"
    parser.add_argument(
        "-f",
        "--file",
        required=True,
        metavar="FILE",
        help="a HatDeployment as YAML or JSON; - for standard input",
    )
    parser.add_argument(
        "--registry", default="", metavar="PREFIX", help="put before the images' names (default: nothing)"
    )
    parser.add_argument(
        "--version", default="", metavar="TAG", help="tag of the images (default: this version of hat)"
    )


def _run(args: argparse.Namespace) -> int:
    import yaml

    from hat_operator.plain_yaml import PlainDumper

    desired = render(_read(args.file), args.file, args.registry.rstrip("/"), args.version)
    documents = [*desired.cloud, *desired.edge]
    sys.stdout.write(yaml.dump_all(documents, Dumper=PlainDumper, sort_keys=False, width=10**6))
    return 0


def render(text: str, file: str = "FILE", registry: str = "", version: str = "") -> Desired:
    """The objects of the one HatDeployment in a YAML text.

    Raises:
        UsageError: it is no HatDeployment, or fields are wrong: one line for each, with its value.
    """
    from hat_operator import names
    from hat_operator.denials import Denials
    from hat_operator.desired import Observed, desired_objects
    from hat_operator.policy import adaptive
    from hat_operator.schema import apply_defaults, load_schema, problems
    from hat_operator.settings import Settings
    from hat_operator.spec import HatDeployment
    from hat_runtime.control.published import PublishedPolicy
    from hat_runtime.errors import UsageError

    schema = load_schema()
    body = apply_defaults(schema, _one_object(text, file))
    wrong = problems(schema, body)
    if wrong:
        raise UsageError("\n     ".join([f"{file}: not a valid {names.KIND}", *wrong]))
    hat = HatDeployment.parse(body)
    expose = hat.spec.cloud.expose
    stand_in = names.host_port(expose.host or UNKNOWN_ENDPOINT, expose.port)
    settings = Settings(registry, version)
    endpoints = {names.revision(hat, settings): stand_in}
    policy = PublishedPolicy().to_json() if adaptive(hat.spec.mode, hat.spec.chunking) else None
    denied = Denials().next(hat, settings, None, 0.0).data() if hat.spec.security.mutual else None
    observed = Observed(cloud_endpoint=stand_in, endpoints=endpoints, policy=policy, denied=denied)
    return desired_objects(hat, settings, observed)


def _read(file: str) -> str:
    from hat_runtime.errors import UsageError

    try:
        return sys.stdin.read() if file == "-" else Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"-f {file}: cannot be read: {error}") from error


def _one_object(text: str, file: str) -> dict[str, Any]:
    import yaml

    from hat_operator import names
    from hat_runtime.errors import UsageError

    try:
        documents = [document for document in yaml.safe_load_all(text) if document is not None]
    except yaml.YAMLError as error:
        raise UsageError(f"-f {file}: not YAML: {error}") from error
    if len(documents) != 1 or not isinstance(documents[0], dict):
        raise UsageError(f"-f {file}: {len(documents)} documents; write one {names.KIND}")
    body = documents[0]
    for field, wanted in (("apiVersion", names.API_VERSION), ("kind", names.KIND)):
        if body.get(field) != wanted:
            raise UsageError(f"-f {file}: {field}: {body.get(field)!r}: must be {wanted}")
    return body


COMMAND = Command("render", "print the Kubernetes objects of a HatDeployment", _configure, _run)
