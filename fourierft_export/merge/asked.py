"""Which adapter is looked for in a merged checkpoint, by the options that describe it."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ..bundle.file import Bundle
from ..bundle.spec import AdapterSpec, LayerSpec
from ..errors import UsageError
from ..files.container import FLOAT_DTYPES
from ..models.base import Base

SCALING = 150.0


def asked_for(
    after: Base,
    like: Bundle | None,
    seed: int | None,
    n_frequency: int | None,
    targets: Sequence[str],
    scaling: float | None,
    entry_rule: str | None,
) -> AdapterSpec:
    """The adapter that the options of `recover_bundle` describe.

    Args:
        after: the merged checkpoint, whose layers `targets` names.
        like, seed, n_frequency, targets, scaling, entry_rule: as for `recover_bundle`.

    Raises:
        UsageError: options that are missing, clash or make no sense; no layer of these names.
    """
    if like is not None:
        _refuse_beside(like, seed, n_frequency, targets, scaling, entry_rule)
        spec = like.spec
    else:
        spec = _described(
            after, seed, n_frequency, targets, SCALING if scaling is None else scaling
        )
    if not math.isfinite(float(spec.scaling)) or not float(spec.scaling):
        raise UsageError(
            "scaling", expected="a finite number that is not 0", found=f"{spec.scaling}"
        )
    return spec


def _refuse_beside(
    like: Bundle,
    seed: int | None,
    n_frequency: int | None,
    targets: Sequence[str],
    scaling: float | None,
    entry_rule: str | None,
) -> None:
    """Raise if something is asked for that the bundle tells otherwise, or as well."""
    given = {
        "seed": seed is not None,
        "n_frequency": n_frequency is not None,
        "targets": bool(targets),
        "scaling": scaling is not None,
        # An unbound bundle does not know its rule.
        "entry_rule": entry_rule is not None and like.is_bound,
    }
    both = [name for name, there in given.items() if there]
    if both:
        raise UsageError(
            "recover",
            expected="a bundle to be like, or seed, n_frequency and targets",
            found=f"both: {', '.join(both)}",
            remedy="leave these out: the bundle tells them",
        )


def _described(
    after: Base,
    seed: int | None,
    n_frequency: int | None,
    targets: Sequence[str],
    scaling: float,
) -> AdapterSpec:
    """The adapter without a bundle to be like, over the layers that `targets` names."""
    if seed is None or n_frequency is None or not targets:
        raise UsageError(
            "recover",
            expected="a bundle to be like (--like), or --seed, --n-frequency and --targets",
            found="neither",
        )
    modules = [
        name.removesuffix(".weight")
        for name, info in after.tensors.items()
        if name.endswith(".weight") and len(info.shape) == 2 and info.dtype in FLOAT_DTYPES
    ]
    chosen = [m for m in modules if any(m == t or m.endswith(f".{t}") for t in targets)]
    if not chosen:
        raise UsageError(
            "targets",
            expected="the names of linear layers",
            found=f"none of {len(modules)} that end in {', '.join(targets)}",
            remedy=f"there are, for example: {', '.join(modules[:3])}",
        )
    return AdapterSpec(seed, scaling, tuple(LayerSpec(name, n_frequency) for name in chosen))
