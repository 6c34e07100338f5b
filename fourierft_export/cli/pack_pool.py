"""What `pack --pool` does: writes, extends or thins out a pool of adapters."""

from __future__ import annotations

import os
from collections.abc import Sequence

from ..errors import UsageError
from .console import Outcome, size_text


def write_pool(
    sources: Sequence[str],
    output: str,
    base: str | None,
    *,
    append: bool,
    remove: Sequence[str],
    force: bool,
) -> Outcome:
    """Packs sources, each a path or NAME=PATH, into the pool `output`, and removes adapters.

    Args:
        sources: bundles or PEFT adapter directories.
        output: the pool.
        base: directory of the base, for unbound adapters.
        append: add to a pool that exists.
        remove: names to remove from a pool that exists.
        force: replace a pool that exists.
    """
    from ..bundle.bundle import Bundle
    from ..bundle.peft import open_bundle
    from ..bundle.pool import Pool
    from ..files.staging import check_output
    from ..models.base_tensors import open_base

    if not sources and not remove:
        raise UsageError("pack --pool", expected="adapters to pack", found="none")
    if force and (append or remove):
        found = "--force with --append or --remove"
        raise UsageError("pack --pool", expected="one of them", found=found)
    named = [_split_name(source) for source in sources]
    paths = dict(named)
    if len(paths) < len(named):
        raise UsageError(
            "pack --pool",
            expected="another name for each adapter",
            found="a name twice",
            remedy="give names: NAME=PATH",
            offenders=[f"{name}: {path}" for name, path in named],
        )
    if not (append or remove):
        check_output(output, force=force, inputs=(*paths.values(), *((base,) if base else ())))
    opened = open_base(base) if base is not None and paths else None
    adapters: dict[str, Bundle] = {}
    for name, path in paths.items():
        bundle = open_bundle(path, bind=opened is None)
        adapters[name] = bundle if opened is None else bundle.bind(opened)
    if append or remove:
        pool = Pool(output)
        pool.update(adapters, remove)
    else:
        pool = Pool.create(output, adapters, force=force)
    with pool:
        size, count = os.stat(output).st_size, len(pool)
    data = {"path": output, "adapters": count, "bytes": size}
    data |= {"added": sorted(adapters), "removed": sorted(remove)}
    changes = [f"{len(adapters)} added"] if adapters and append else []
    changes += [f"{len(remove)} removed"] if remove else []
    shown = f"{output}: {count} adapters, {size_text(size)}"
    return Outcome({"pool": data}, [", ".join([shown, *changes])])


def _split_name(source: str) -> tuple[str, str]:
    """Name and path of an adapter, from NAME=PATH or from a path alone."""
    if "=" in source and not os.path.lexists(source):
        name, _, path = source.partition("=")
        return name, path
    return os.path.basename(os.path.normpath(source)).partition(".")[0], source
