"""The computations of `torch_ops`, without autograd: tensors in, tensors out.

float32 tensors on the CPU go through the numpy core, whose memory they share: it works in blocks,
in place, and its threads wait for nobody. Everything else (other devices, float64, meta tensors)
takes the torch forms. Neither makes float64 tensors on a device that was given none: phases are
tables made on the host.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.weak import WeakTensorKeyDictionary

from . import delta as numpy_delta
from .delta import AnyFloat

Shape = tuple[int, int]
Tables = tuple[Tensor, Tensor, Tensor, Tensor]  # read, write, sign, factor

# entries tensor -> {what they depend on: tables on its device}
_tables: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def precision(*tensors: Tensor) -> torch.dtype:
    """What to compute in: float64 if any of the tensors is, else float32."""
    wide = any(tensor.dtype == torch.float64 for tensor in tensors)
    return torch.float64 if wide else torch.float32


def delta_weight(
    spectrum: Tensor,
    entries: Tensor,
    rows: int,
    columns: int,
    scaling: float,
    weight: Tensor | None = None,
) -> Tensor:
    """delta_W (M, N), or `weight` + delta_W, in `precision`."""
    wide = precision(spectrum, spectrum if weight is None else weight)
    if is_empty(spectrum):
        return spectrum.new_empty(rows, columns, dtype=wide)
    spectrum = spectrum.detach().to(wide)
    if on_host(spectrum, entries) and wide == torch.float32:
        target = np.empty((rows, columns), np.float32)
        source = None if weight is None else [host_array(weight, read_only=True)]
        put = numpy_delta.adder(source, [target])
        values = host_array(spectrum, read_only=True)[None]
        threads = torch.get_num_threads()
        numpy_delta.rebuild(target.shape, values, entries.numpy(), scaling, put, threads)
        return torch.from_numpy(target)
    delta = delta_by_fft(spectrum, entries, (rows, columns), scaling)
    return delta if weight is None else delta.add_(weight)


def delta_by_fft(spectrum: Tensor, entries: Tensor, shape: Shape, scaling: float) -> Tensor:
    """The half-spectrum form with one FFT down each column, on any device."""
    rows, columns = shape
    u, v = _fold(entries, shape)
    weight = 1.0 + ((v == 0) | (2 * v == columns)).to(spectrum.dtype)
    half = spectrum.new_zeros(columns // 2 + 1, rows)
    half.index_put_((v, u), spectrum * (scaling / (2 * rows)) * weight, accumulate=True)
    # The coefficients are real, so rows 0..M//2 of this transform say it all; likewise of delta_W.
    kept = torch.fft.rfft(half, dim=1).conj().resolve_conj().T.contiguous()
    # Backends differ on what an imaginary part in the self-mirrored columns would mean.
    ends = torch.view_as_real(kept)[:, :: max(1, columns // 2) if columns % 2 == 0 else columns]
    ends[..., 1] = 0
    top = torch.fft.irfft(kept, columns, dim=1)
    mirrored = top[1 : (rows + 1) // 2].flip(0, 1).roll(1, 1)
    delta: Tensor = torch.cat([top, mirrored])
    return delta


def at_entries(grad: Tensor, entries: Tensor, rows: int, columns: int, scaling: float) -> Tensor:
    """The adjoint of `delta_weight`: Re(fft2(G)) * scaling / (M N) at the entries, (n,)."""
    wide = precision(grad)
    if is_empty(grad):
        return grad.new_empty(entries.shape[0], dtype=wide)
    u, v = _fold(entries, (rows, columns))
    half = torch.fft.rfft(grad.to(wide), dim=1)
    if 2 * len(v) < half.shape[1]:  # then most columns hold no entry
        half, v = half[:, v], torch.arange(len(v), device=v.device)
    picked: Tensor = torch.fft.fft(half, dim=0)[u, v].real
    return picked * (scaling / (rows * columns))


def token(
    x: Tensor, spectrum: Tensor, entries: Tensor, rows: int, columns: int, scaling: float
) -> Tensor:
    """The product x delta_W^T (..., M) in x's dtype; shapes as `torch_ops.token_delta`."""
    if is_empty(x):
        return x.new_empty(*x.shape[:-1], rows)
    wide = precision(x, spectrum)
    tables = _token_tables(entries, (rows, columns), wide, scaling)
    chosen = _choose(torch.fft.rfft(x.detach().to(wide)), tables[0])
    return _to_values(chosen, spectrum, tables, rows).to(x.dtype)


def token_gradients(
    grad: Tensor,
    x: Tensor | None,
    spectrum: Tensor,
    entries: Tensor,
    rows: int,
    columns: int,
    scaling: float,
    wants_x: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients in x (empty unless wanted) and in the spectrum (empty unless `x` is given).

    grad delta_W is the token form with u and v exchanged; the gradient of c_k is the sum over
    tokens of Re(FFT(grad)[u_k] FFT(x)[v_k]) * scaling / (M N). Both start from the same transform
    of `grad`.
    """
    if is_empty(grad):
        grad_x = grad.new_empty(*grad.shape[:-1], columns) if wants_x else grad.new_empty(0)
        empty = spectrum.new_empty(0) if x is None else torch.zeros_like(spectrum)
        return grad_x, empty
    shape = (rows, columns)
    wide = precision(grad, spectrum)
    swapped = _token_tables(entries, shape, wide, scaling, swapped=True)
    chosen = _choose(torch.fft.rfft(grad.detach().to(wide)), swapped[0])
    grad_x, grad_spectrum = grad.new_empty(0), spectrum.new_empty(0)
    if x is not None:
        read, _, sign, _ = _token_tables(entries, shape, wide, scaling)
        both = torch.view_as_real(_choose(torch.fft.rfft(x.detach().to(wide)), read))
        products = both.mul_(torch.view_as_real(chosen))
        if spectrum.ndim > 1:
            products = products.sum_to_size((*spectrum.shape, 2))
        else:
            products = products.reshape(-1, *products.shape[-2:]).sum(0)
        # An imaginary part that the forward drops is zero here by itself.
        grad_spectrum = (products * sign).sum(-1) * (scaling / (rows * columns))
        grad_spectrum = grad_spectrum.to(spectrum.dtype)
    if wants_x:
        values = _to_values(chosen, spectrum, swapped, columns)
        grad_x = values.to(grad.dtype)
    return grad_x, grad_spectrum


def is_empty(tensor: Tensor) -> bool:
    """Whether a tensor has no values: on the meta device, while torch traces, or of size 0."""
    return tensor.is_meta or isinstance(tensor, FakeTensor) or not tensor.numel()


def _choose(half: Tensor, read: Tensor) -> Tensor:
    """half[..., read]; gather is several times faster than indexing or index_select here."""
    return half.gather(-1, read.expand(*half.shape[:-1], -1))


def _to_values(
    chosen: Tensor,
    spectrum: Tensor,
    tables: Tables,
    size: int,
) -> Tensor:
    """Multiply (..., n) spectral values by c (in place), add them up in bins, transform back."""
    _, write, _, factor = tables
    torch.view_as_real(chosen).mul_(spectrum.detach().to(factor.dtype).unsqueeze(-1) * factor)
    bins = chosen.new_zeros(*chosen.shape[:-1], size // 2 + 1).index_add_(-1, write, chosen)
    values: Tensor = torch.fft.irfft(bins, size)
    return values


def _token_tables(
    entries: Tensor, shape: Shape, dtype: torch.dtype, scaling: float, swapped: bool = False
) -> Tables:
    """Where the token form of delta_W (or, if `swapped`, of its transpose) reads and writes.

    For each token x, with X = FFT(x), the result is y = Re(IFFT_unnormalised(b)) with
    b[u] = scaling / (M N) * sum of c_k conj(X[v_k]) over u_k = u. x is real, so X at a folded v is
    read from half a spectrum; y is real, so b is folded, too.

    Returns:
        read (n,), v folded to 0..N // 2; write (n,), u folded to 0..M // 2; sign (n, 2), for the
        real and the imaginary part of X at `read`, where 0 drops an imaginary part; factor (n, 2):
        `sign` times scaling / N, and halved where the real inverse transform counts a bin and its
        mirror image.
    """
    kept = _tables.setdefault(entries, {})
    key = (shape, dtype, scaling, swapped)
    if key not in kept:
        host = entries.detach().cpu().numpy()
        u, v = (host[:, 1], host[:, 0]) if swapped else (host[:, 0], host[:, 1])
        rows, columns = shape[::-1] if swapped else shape
        fold_u, fold_v = 2 * u > rows, 2 * v > columns
        write = np.where(fold_u, rows - u, u)
        alone = (write == 0) | (2 * write == rows)
        # b holds conj(X); reading a folded v conjugates once more, and so does writing a folded u.
        imaginary = np.where(alone, 0.0, np.where(fold_u == fold_v, -1.0, 1.0))
        sign = np.stack([np.ones_like(imaginary), imaginary], axis=1)
        factor = sign * (scaling / columns * np.where(alone, 1.0, 0.5))[:, None]
        places = (np.where(fold_v, columns - v, v), write)
        kept[key] = (
            *(torch.from_numpy(array).to(entries.device) for array in places),
            *(torch.from_numpy(array).to(dtype).to(entries.device) for array in (sign, factor)),
        )
    tables: Tables = kept[key]
    return tables


def host_array(tensor: Tensor, *, read_only: bool = False) -> AnyFloat:
    """A CPU tensor as the numpy array over the same memory, bfloat16 included.

    If nobody writes to the array, say `read_only`: the tensor's storage can then be resized, as
    FSDP2 does to let go of a weight that it gathered; `Tensor.numpy` ends that for good.
    """
    tensor = tensor.detach()
    is_half = tensor.dtype == torch.bfloat16
    tensor = tensor.view(torch.uint16) if is_half else tensor
    array: AnyFloat = np.from_dlpack(tensor) if read_only else tensor.numpy()
    if is_half:
        import ml_dtypes

        return array.view(ml_dtypes.bfloat16)
    return array


def on_host(*tensors: Tensor) -> bool:
    """Whether all are plain tensors in the CPU's memory, which numpy can read."""
    plain = (Tensor, torch.nn.Parameter, torch.nn.Buffer)
    return all(t.device.type == "cpu" and type(t) in plain for t in tensors)


def _fold(entries: Tensor, shape: Shape) -> tuple[Tensor, Tensor]:
    """The u and v, each folded onto the mirror image that has v <= N // 2."""
    rows, columns = shape
    u, v = entries.unbind(1)
    mirrored = 2 * v > columns
    return torch.where(mirrored, -u % rows, u), torch.where(mirrored, columns - v, v)
