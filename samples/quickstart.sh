#!/usr/bin/env bash
# The whole job on real data, on a machine with nothing but Python: makes .venv, installs, runs the
# demo. Arguments go to `fourierft-export demo`; without any, its folder is made anew each time.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup-venv.sh" all
if [ $# -eq 0 ]; then set -- --force; fi
exec "$VENV_BIN/fourierft-export" demo "$@"
