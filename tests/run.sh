#!/usr/bin/env bash
# The whole test suite, on a machine with nothing but Python. Arguments go to pytest.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../samples/setup-venv.sh" all,test
cd "$ROOT"
# A worker for each core (4 at most), with whole files, since fixtures are made once per file.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec "$VENV_BIN/python" -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile "$@"
