# Sourced by the scripts: `source samples/setup-venv.sh EXTRAS` makes .venv at the root of the
# repository if it is absent, installs the package there (editable) with EXTRAS and the pinned
# versions, and sets ROOT and VENV_BIN. Where nothing changed since the last time it does nothing.
# PYTHON names the interpreter to make .venv with; by default the first fitting one is taken.

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv="$ROOT/.venv"
constraints="$ROOT/samples/constraints.txt"
stamp="$venv/installed-extras"
extras=$1

find_python() {
    local candidate
    for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11 python3.10 python}; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "Python 3.10 or newer is needed; PYTHON=/path/to/python names one." >&2
    return 1
}

set_venv_bin() {
    VENV_BIN="$venv/bin"
    if [ -d "$venv/Scripts" ]; then VENV_BIN="$venv/Scripts"; fi # Windows
}

set_venv_bin
# One line per installed extra: the state it was installed from. Moving the folder changes it too.
state=$( (echo "$ROOT"; cat "$ROOT/pyproject.toml" "$constraints") | cksum | tr ' ' '-')
missing=""
for extra in ${extras//,/ }; do
    grep -qsx "$state $extra" "$stamp" || missing="$missing $extra"
done

if [ -n "$missing" ] || ! "$VENV_BIN/python" -c '' 2>/dev/null; then
    if ! "$VENV_BIN/python" -m pip --version >/dev/null 2>&1; then
        python=$(find_python)
        echo "Making .venv with $("$python" --version) ..." >&2
        "$python" -m venv --clear "$venv"
        set_venv_bin
    fi
    echo "Installing fourierft-export[$extras] and pinned dependencies (a few minutes the first time) ..." >&2
    pip_install=("$VENV_BIN/python" -m pip install --quiet --disable-pip-version-check -c "$constraints")
    # torch by itself first, so that its pin alone decides which of its builds is taken.
    "${pip_install[@]}" "$(grep '^torch==' "$constraints")"
    "${pip_install[@]}" -e "$ROOT[$extras]"
    for extra in ${extras//,/ }; do echo "$state $extra"; done >>"$stamp"
fi
