"""Several adapters in one batch: row i goes through adapter names[i]."""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from ...errors import UsageError
from .. import modules
from ..active import let_learn
from ..fourier_linear import FourierLinear
from ..saved_modules import versions_of
from .current_rows import ONE_BY_ONE, Names, OpenBlocks, RowAdapters, open_block


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
        UsageError: an unknown name or none at all; adapters whose heads hold modules that adapters
            change as well; the model is fused; while the model runs, a batch
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
    rows = () if isinstance(names, str) else tuple(names)
    if not rows:
        raise UsageError(
            "route",
            expected="an adapter's name, or None, for each row of the batch",
            found=repr(names),
        )
    if num_beams < 1:
        raise UsageError("route", expected="num_beams of 1 or more", found=str(num_beams))
    used = [name for name in dict.fromkeys(rows) if name is not None]
    modules.check_known(model, used)
    modules.check_not_fused(model, "route")
    plans: dict[nn.Module, tuple[OpenBlocks, RowAdapters]] = {}
    layers: list[str] = []  # paths of layers that change
    saved: list[str] = []  # of saved modules
    split: list[str] = []  # of those that are run once for each adapter
    for path, layer in modules.fourier_layers(model).items():
        known = _known(rows, layer.adapters.keys())
        if any(known):
            layers.append(path)
        plan = RowAdapters(path or "(the model)", known, _groups(layer, known), num_beams)
        plans[layer] = layer.blocks, plan
    for path, module in modules.adapted_modules(model).items():
        known = _known(rows, versions_of(module))
        if any(known):
            (split if len(set(known)) > 1 else saved).append(path)
        plans[module] = module._fourierft_blocks, RowAdapters(path, known, (), num_beams)
    _check_places(model, layers, saved, split)
    with open_block(plans):
        if torch.is_grad_enabled():
            let_learn(model, used)
        yield model


def _known(rows: Names, there: Container[str]) -> Names:
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


def _check_places(
    model: nn.Module, layers: Sequence[str], saved: Sequence[str], split: Sequence[str]
) -> None:
    """Refuse modules that would not get the batch's rows in their order.

    A module that is run once for each adapter (`split`) hands on parts of the batch; layers of
    torch itself say that they have the batch second.
    """
    inner = (*layers, *split)
    nested = [f"{i}: within {s}" for s in split for i in inner if i.startswith(f"{s}.")]
    if nested:
        raise UsageError(
            "route",
            expected="saved modules with nothing in them that adapters change as well",
            found=f"{len(nested)} modules within others",
            remedy=ONE_BY_ONE,
            offenders=nested,
        )
    second = [
        path
        for path, module in modules.base_modules(model)
        if _has_batch_second(modules.original(module))
    ]
    wrong = [
        p for p in dict.fromkeys((*inner, *saved)) if any(p.startswith(f"{s}.") for s in second)
    ]
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
