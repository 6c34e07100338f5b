#!/usr/bin/env bash
# The whole test suite, on a machine with nothing but Python. Arguments go to pytest.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../samples/setup-venv.sh" all,test
cd "$ROOT"
exec "$VENV_BIN/python" -m pytest "$@"
