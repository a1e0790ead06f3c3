"""Starts a Kubernetes cluster with one node on this machine, and ends it at Ctrl-C.

Usage: scripts/cluster.py [--two] [--chart]   (root on Linux; CONTRIBUTING.md says what it needs)
"""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from hat_runtime.cli.processes import exits_on_sigterm  # noqa: E402
from hat_runtime.errors import HatError  # noqa: E402
from tests.e2e.product import REGISTRY, Product, load_images  # noqa: E402
from tests.harness.binaries import MissingProgramError  # noqa: E402
from tests.harness.cluster import Cluster, find_programs  # noqa: E402

_DEVICE = {"hat.dev/device": "true"}


def main(arguments: list[str]) -> int:
    """Runs until Ctrl-C. Returns 1 where something is missing or ends by itself."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--two", action="store_true", help="a second cluster for devices, joined to the first one"
    )
    parser.add_argument(
        "--chart",
        action="store_true",
        help="install the chart (with --two also the site's rights and Secret)",
    )
    args = parser.parse_args(arguments)
    try:
        programs = find_programs()
        with exits_on_sigterm(), ExitStack() as stack, tempfile.TemporaryDirectory() as folder:
            names = ("cloud", "edge") if args.two else ("cloud",)
            clusters = [Cluster(programs, name, _DEVICE) for name in names]
            for cluster in clusters:
                stack.callback(cluster.stop)
                cluster.start()
                load_images(cluster.node, Path(folder))
            if args.two:
                clusters[0].sandbox.join(clusters[1].sandbox)
            if args.chart:
                product = Product(clusters[0], clusters[-1], Path(folder))
                product.prepare()
                product.install()
            for cluster in clusters:
                print(f"{cluster.name}: export KUBECONFIG={cluster.kubeconfig}")
            print(f"Images: {REGISTRY}/hat-{{cloud,edge,operator}}:0.1.0, with this checkout's code")
            print("Ctrl-C ends it and leaves nothing behind", flush=True)
            signal.pause()
    except KeyboardInterrupt:
        return 0
    except (MissingProgramError, HatError, TimeoutError) as error:
        print(f"cluster.py: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
