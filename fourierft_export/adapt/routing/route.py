"""Several adapters in one batch: row i goes through adapter names[i]."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise

import torch
from torch import nn

from ...errors import UsageError
from ..active import let_learn
from ..layer import FourierLinear
from ..modules import (
    adapted_modules,
    base_modules,
    check_known,
    check_not_fused,
    fourier_layers,
    original,
)
from ..saved_modules import AdaptedModule, module_under, state_tensors, versions_of
from .context import ONE_BY_ONE, Names, OpenBlocks, RowAdapters, open_block


@contextmanager
def route(
    model: nn.Module, names: Sequence[str | None], *, num_beams: int = 1
) -> Iterator[nn.Module]:
    """Lets row i of every batch use adapter `names[i]` within the block: spectra, head, biases.

    Each row gets what it would get alone under `activate(model, names[i])`, whatever the seeds,
    sizes, scalings and dtypes of the adapters; which ones are active does not matter meanwhile,
    and is as it was afterwards. Adapters of one seed and n share one product per layer.

    Rows are the first dimension of what each adapted module gets. Refused, rather than guessed:
    modules that get another number of rows, such as rows and tokens flattened into one dimension;
    `nn.TransformerEncoderLayer` and its like with `batch_first=False`; modules whose weights are
    read and never called. A model of your own that has the batch second is recognised only while
    that dimension differs from the number of rows.

    Training: gradients reach every trainable adapter among `names`, also when `backward` is
    called after the block; those adapters require gradients until the next `activate`.
    Under gradient checkpointing a module's second run uses the rows of its latest first run; with
    another forward pass in between, torch's non-reentrant checkpointing raises its
    CheckpointError, while the reentrant one cannot notice.

    Blocks nest; the inner one counts. A block holds for the thread or asynchronous task that opened
    it: others run the active adapters, or route the model in their own way at the same time.
    `torch.compile` leaves routed layers out of its graphs.

    Args:
        model: a model with adapters.
        names: one for each row; None is the base.
        num_beams: also accept batches with each row repeated so many times, as `generate` makes
            them for beam search (give it its num_return_sequences when it samples several).

    Yields:
        The model.

    Raises:
        UsageError: an unknown name or none at all; adapters whose heads differ in shape, or hold
            modules that adapters change as well; the model is fused; while the model runs, a batch
            with another number of rows, or nn.DataParallel.

    Example:
        >>> import fourierft_export as ff, torch
        >>> config = ff.FourierFTConfig(n_frequency=5, target_modules=["0"])
        >>> model = ff.inject(torch.nn.Sequential(torch.nn.Linear(8, 4)), config, "mine")
        >>> x = torch.rand(1, 8).expand(2, 8)
        >>> with ff.route(model, ["mine", None]):
        ...     rows = model(x)
        >>> torch.allclose(rows[0], model(x)[0], atol=1e-5), torch.equal(rows[0], rows[1])
        (True, False)
    """
    layers, saved = fourier_layers(model), adapted_modules(model)
    rows = _check_names(model, layers, saved, names, num_beams)
    plans: dict[nn.Module, tuple[OpenBlocks, RowAdapters]] = {}
    for path, layer in layers.items():
        known = _known(rows, layer.adapters.keys())
        plan = RowAdapters(path or "(the model)", known, _groups(layer, known), num_beams)
        plans[layer] = layer.blocks, plan
    for path, module in saved.items():
        plan = RowAdapters(path, _known(rows, versions_of(module)), (), num_beams)
        plans[module] = module._fourierft_blocks, plan
    with open_block(plans):
        if torch.is_grad_enabled():
            let_learn(model, dict.fromkeys(name for name in rows if name is not None))
        yield model


def _known(rows: Iterable[str | None], there: Container[str]) -> Names:
    """`rows` with None for adapters that are not `there`."""
    return tuple(name if name is not None and name in there else None for name in rows)


def _groups(layer: FourierLinear, known: Names) -> tuple[tuple[str, ...], ...]:
    """The adapters that count at `layer`, those together that share entries and precision."""
    groups: dict[tuple[bytes, bool], list[str]] = {}
    for name in dict.fromkeys(known):
        if name is not None:
            adapter = layer.adapter(name)
            wide = adapter.spectrum.dtype == torch.float64
            groups.setdefault((adapter.host_entries.tobytes(), wide), []).append(name)
    return tuple(map(tuple, groups.values()))


def _check_names(
    model: nn.Module,
    layers: Mapping[str, FourierLinear],
    saved: Mapping[str, AdaptedModule],
    names: Sequence[str | None],
    num_beams: int,
) -> Names:
    """`names` as a tuple, once the model can be routed by them.

    Raises:
        UsageError: as for `route`.
    """
    if isinstance(names, str) or not names:
        raise UsageError(
            "route",
            expected="an adapter's name, or None, for each row of the batch",
            found=repr(names),
        )
    if num_beams < 1:
        raise UsageError("route", expected="num_beams of 1 or more", found=str(num_beams))
    rows = tuple(names)
    check_known(model, dict.fromkeys(name for name in rows if name is not None))
    check_not_fused(model, "route")
    _check_heads(saved, rows)
    _check_not_nested(layers, saved, rows)
    routed = [path for path, layer in layers.items() if not set(rows).isdisjoint(layer.adapters)]
    routed += [path for path, head in saved.items() if not set(rows).isdisjoint(versions_of(head))]
    _check_batch_first(model, routed)
    return rows


def _check_heads(saved: Mapping[str, AdaptedModule], rows: Names) -> None:
    """Refuse heads of different shapes: the results of a batch are stacked."""
    unlike = []
    for path, module in saved.items():
        users: dict[str | None, str] = {}  # version -> who uses it
        for name, version in zip(rows, _known(rows, versions_of(module)), strict=True):
            users.setdefault(version, str(name))
        shapes = {
            user: _shapes_of(module_under(module, version)) for version, user in users.items()
        }
        for (one, mine), (other, its) in pairwise(shapes.items()):
            unlike += [
                f"{path}.{leaf}: {one} has {mine[leaf]}, {other} {its.get(leaf)}"
                for leaf in mine
                if mine[leaf] != its.get(leaf)
            ]
    if unlike:
        raise UsageError(
            "route",
            expected="adapters whose answers have one shape, to be stacked in one batch",
            found=f"{len(unlike)} tensors of different shapes",
            remedy="run these adapters in batches of their own",
            offenders=unlike,
        )


def _shapes_of(module: nn.Module) -> dict[str, list[int]]:
    return {name: list(tensor.shape) for name, tensor in state_tensors(module).items()}


def _check_not_nested(
    layers: Mapping[str, FourierLinear], saved: Mapping[str, AdaptedModule], rows: Names
) -> None:
    """A module that is run once for each adapter hands on parts of the batch, not rows in order."""
    split = [path for path, m in saved.items() if len(set(_known(rows, versions_of(m)))) > 1]
    inner = [path for path, layer in layers.items() if not set(rows).isdisjoint(layer.adapters)]
    nested = [f"{i}: within {s}" for s in split for i in (*inner, *split) if i.startswith(f"{s}.")]
    if nested:
        raise UsageError(
            "route",
            expected="saved modules with nothing in them that adapters change as well",
            found=f"{len(nested)} modules within others",
            remedy=ONE_BY_ONE,
            offenders=nested,
        )


def _check_batch_first(model: nn.Module, routed: Iterable[str]) -> None:
    """Layers of torch itself say where their batch is."""
    second = [path for path, module in base_modules(model) if _has_batch_second(original(module))]
    wrong = [p for p in dict.fromkeys(routed) if any(p.startswith(f"{s}.") for s in second)]
    if wrong:
        raise UsageError(
            "route",
            expected="layers that get the batch in the first dimension",
            found=f"{len(wrong)} within torch layers with batch_first=False",
            remedy="build these with batch_first=True",
            offenders=wrong,
        )


def _has_batch_second(module: nn.Module) -> bool:
    if isinstance(module, nn.TransformerEncoderLayer | nn.TransformerDecoderLayer):
        module = module.self_attn
    return isinstance(module, nn.MultiheadAttention) and not module.batch_first
