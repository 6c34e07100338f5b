"""Estimate the cost of each path in the spectral core, and choose the cheapest.

Costs are nanoseconds on the machine the constants were fitted on (one x86-64 core with AVX-512);
only their ratios matter, and they hold for AVX2 as well. They follow from counts that anyone can
check: FFT butterflies, entries times rows. `samples/bench` runs every path and shows how far the
choice is from the best.

    with force(delta="columns"): ...   # take this path whatever the model says
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from math import log2

from ..errors import UsageError

DELTA_PATHS = ("rows", "columns")
FORMS = ("token", "dense")

_CALLS = {"rows": 50_000.0, "columns": 30_000.0}  # however small the layer
_FFT = 0.19  # one value of a real FFT, per log2 of its length
_ADD = 0.35  # one value of delta_W (and its mirror image) added to a weight
_ENTRY = 1.0  # one entry at one row: multiplied by its phase, added to its column
_PLACE = 1.1  # one complex value placed in a half-spectrum row
_COLUMN = 1.2  # one value of the column FFTs besides the transform: transposition, fresh memory
_FAR_COLUMN = 4.3  # the same where the half spectrum is larger than the cache
_CACHE = 4 << 20  # bytes
_FLOP = 0.011  # one floating point operation of a large matrix product
_VALUES_PER_THREAD = 1 << 17  # below this a second thread costs more than it brings
_TOKEN_FFT = 0.13  # as _FFT, in torch
_TOKEN_ENTRY = 1.0  # one entry at one token: gathered, multiplied, added to its bin
_TOKEN_VALUE = 0.5  # one value of a token's input or output, besides its transform
_TOKEN_TRAINING = 3.5  # forward and backward, as a multiple of the forward
_DENSE_VALUE = 1.0  # one value of W + delta_W, in fresh memory
_TOKEN_CALLS = 60_000.0  # the token form's calls, however few the rows
_DENSE_CALLS = 150_000.0

_forced: dict[str, str] = {}


def useful_threads(shape: tuple[int, int], layers: int, limit: int) -> int:
    """How many threads rebuilding `layers` delta_W of `shape` is worth, at most `limit`."""
    return max(1, min(limit, layers * shape[0] * shape[1] // _VALUES_PER_THREAD))


def delta_costs(
    shape: tuple[int, int], n_frequency: int, *, layers: int = 1, threads: int = 1
) -> dict[str, float]:
    """Estimated cost of `layers` delta_W over the same entries by each of `DELTA_PATHS`.

    Threads share rows or layers, but "columns" transforms a whole layer before its first row.
    """
    rows, columns = shape
    kept = rows // 2 + 1
    half_columns = columns // 2 + 1
    both = _ADD * rows * columns + _FFT * kept * columns * log2(columns + 1) / 2
    by_rows = kept * (_ENTRY * n_frequency + _PLACE * min(n_frequency, half_columns))
    each = _COLUMN if 8 * half_columns * rows < _CACHE else _FAR_COLUMN
    by_columns = half_columns * rows * (each + _FFT * log2(rows + 1) / 2) + 30.0 * n_frequency
    shared = useful_threads(shape, layers, threads)
    return {
        "rows": _CALLS["rows"] + layers * (both + by_rows) / shared,
        "columns": _CALLS["columns"] + layers * (both + by_columns) / min(shared, layers),
    }


def choose_delta_path(
    shape: tuple[int, int], n_frequency: int, *, layers: int = 1, threads: int = 1
) -> str:
    """The cheapest of `DELTA_PATHS`, or the forced one."""
    if "delta" in _forced:
        return _forced["delta"]
    costs = delta_costs(shape, n_frequency, layers=layers, threads=threads)
    return min(costs, key=costs.__getitem__)


def form_costs(
    rows: int, shape: tuple[int, int], n_frequency: int, training: bool = False
) -> dict[str, float]:
    """Estimated cost, above the bare layer's, of each of `FORMS` for `rows` tokens.

    Training adds the gradient in the spectrum: two more transforms a token in the token form; in
    the dense form a matrix product of the weight's size, the transform of that gradient, and a
    second use of delta_W.
    """
    out_size, in_size = shape
    transforms = _TOKEN_FFT * (in_size * log2(in_size + 1) + out_size * log2(out_size + 1)) / 2
    values = _TOKEN_VALUE * (in_size + out_size)
    token = rows * (transforms + _TOKEN_ENTRY * n_frequency + values)
    dense = min(delta_costs(shape, n_frequency).values()) + _DENSE_VALUE * out_size * in_size
    if training:
        gradient = rows * out_size * in_size * 2 * _FLOP
        half_transform = 2 * out_size * in_size * _FFT * log2(in_size + out_size)
        return {
            "token": 2 * _TOKEN_CALLS + _TOKEN_TRAINING * token,
            "dense": 2 * _DENSE_CALLS + dense + gradient + half_transform,
        }
    return {"token": _TOKEN_CALLS + token, "dense": _DENSE_CALLS + dense}


def _cheaper_form(rows: int, shape: tuple[int, int], n_frequency: int, training: bool) -> str:
    costs = form_costs(rows, shape, n_frequency, training)
    return "token" if costs["token"] <= costs["dense"] else "dense"


_remembered_form = lru_cache(maxsize=4096)(_cheaper_form)


def choose_form(
    rows: int,
    shape: tuple[int, int],
    n_frequency: int,
    training: bool = False,
    *,
    remember: bool = True,
) -> str:
    """How to apply an adapter to `rows` tokens: "token" (never builds delta_W) or "dense".

    Args:
        rows: product of the leading dimensions of the layer's input.
        shape: (out_features, in_features).
        n_frequency: number of coefficients.
        training: the gradient of the spectrum is needed.
        remember: keep the answer, as the estimate itself takes 30 us; torch.compile cannot.
    """
    if "form" in _forced:
        return _forced["form"]
    cheaper = _remembered_form if remember else _cheaper_form
    return cheaper(rows, shape, n_frequency, training)


def choose_rows_form(
    rows: Sequence[int], shape: tuple[int, int], n_frequency: int, training: bool = False
) -> str:
    """How to apply several adapters that share entries, each to its own number of tokens.

    The token form takes all of them in one product; the dense form builds each delta_W.
    """
    if "form" in _forced:
        return _forced["form"]
    token = form_costs(sum(rows), shape, n_frequency, training)["token"]
    dense = sum(form_costs(own, shape, n_frequency, training)["dense"] for own in rows)
    return "token" if token <= dense else "dense"


@contextmanager
def force(*, delta: str | None = None, form: str | None = None) -> Iterator[None]:
    """Take these paths inside the block, in the whole process (for tests and the bench)."""
    wanted = {what: name for what, name in (("delta", delta), ("form", form)) if name is not None}
    for what, name in wanted.items():
        names = DELTA_PATHS if what == "delta" else FORMS
        if name not in names:
            raise UsageError(f"{what} path", expected=" or ".join(names), found=repr(name))
    before = dict(_forced)
    _forced.update(wanted)
    try:
        yield
    finally:
        _forced.clear()
        _forced.update(before)
