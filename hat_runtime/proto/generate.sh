#!/usr/bin/env bash
# Regenerates the Python code of every .proto beside this file (tests/unit/test_proto_generated.py holds them in step).
# Usage: generate.sh [OUT_FOLDER], by default the repository.
set -euo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
out=${1:-$root}
cd "$root"
python -m grpc_tools.protoc -I . --python_out="$out" --grpc_python_out="$out" --mypy_out="$out" \
  hat_runtime/proto/hat/v1/runtime.proto
