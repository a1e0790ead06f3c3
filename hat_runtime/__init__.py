"""HAT's runtime, shared by device and cloud: one model, cut in two, over one gRPC session protocol."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("hat-platform")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0+unknown"
