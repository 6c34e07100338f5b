"""Validates the arguments of `AdapterSession.run`."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from ...errors import UsageError
from ...types import Array

Adapter = str | Sequence[str | None] | None


def check_inputs(
    arrays: Mapping[str, Array], inputs: Sequence[str], reserved: Collection[str]
) -> None:
    """Refuse missing and unknown inputs, and those that belong to the adapter (`reserved`)."""
    wrong = [f"{name}: missing" for name in inputs if name not in arrays]
    for name in arrays:
        if name in reserved:
            wrong.append(f"{name}: belongs to the adapter")
        elif name not in inputs:
            wrong.append(f"{name}: no such input")
    if wrong:
        raise UsageError("inputs", expected=", ".join(inputs), found=wrong[0], offenders=wrong)


def per_row(adapter: Adapter, arrays: Mapping[str, Array], first: str) -> list[str | None]:
    """The adapter of each row of the batch, whose size is that of the input `first`."""
    if adapter is None or isinstance(adapter, str):
        return [adapter] * (len(arrays[first]) if arrays[first].ndim else 0)
    sizes = {len(array) if array.ndim else 0 for array in arrays.values()}
    if sizes != {len(adapter)}:
        raise UsageError(
            "adapter",
            expected=f"one name for each of {' or '.join(map(str, sorted(sizes)))} rows",
            found=f"{len(adapter)} names",
        )
    return list(adapter)


def check_known(
    names: Collection[str | None], known: Collection[str | None], loaded: Sequence[str]
) -> None:
    """Refuse adapters that are not among `known`; `loaded` is for the message."""
    unknown = sorted({name for name in names if name is not None and name not in known})
    if unknown:
        raise UsageError(
            "adapter " + ", ".join(repr(name) for name in unknown),
            expected=f"one of {', '.join(loaded)}" if loaded else "a loaded one",
            found="no adapter of that name",
            remedy="load it first",
        )


def check_baked_in(adapter: Adapter, held: Sequence[str]) -> None:
    """Refuse to choose an adapter in a file in which the adapters `held` are fixed."""
    names = {adapter} if adapter is None or isinstance(adapter, str) else {*adapter}
    if not names <= {None, *(held if len(held) == 1 else ())}:
        raise UsageError(
            "adapter",
            expected=f"None: {', '.join(held)} is fixed in the file",
            found=", ".join(map(repr, names)),
            remedy="export in mode swappable, paired or bank to choose at run time",
        )
