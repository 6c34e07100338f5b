"""Entries against torch.randperm, which is what PEFT calls."""

import hashlib
import random

import numpy as np
import pytest
import torch

from fourierft_export.errors import UsageError
from fourierft_export.spectral.entries import (
    MAX_POSITIONS,
    R64_FROM,
    _r64_prefix,
    current_rule,
    entries_sha256,
    spectral_entries,
)


def randperm_entries(seed: int, shape: tuple[int, int], n: int) -> np.ndarray:
    generator = torch.Generator().manual_seed(seed)
    index = torch.randperm(shape[0] * shape[1], generator=generator)[:n].numpy()
    return np.stack([index // shape[1], index % shape[1]], axis=1)


def test_2000_random_cases_equal_randperm() -> None:
    choose = random.Random(5)
    for _ in range(2000):
        shape = (choose.choice([1, 2, 3, 16, 77, 384]), choose.choice([1, 2, 5, 64, 97, 256]))
        size = shape[0] * shape[1]
        n = choose.choice([1, size, choose.randint(1, size), min(size, 1000)])
        seed = choose.choice([0, 2024, 2**32 - 1, choose.randrange(2**32)])
        got = spectral_entries(seed, shape, n)
        assert np.array_equal(got, randperm_entries(seed, shape, n)), (seed, shape, n)


@pytest.mark.parametrize("seed", [777, -1, 2**40 + 3])
def test_big_layer_and_wrapped_seeds_equal_randperm(seed: int) -> None:
    shape = (4096, 1024)
    got = spectral_entries(seed, shape, 3000)
    assert np.array_equal(got, randperm_entries(seed, shape, 3000))


def test_large_rule_equals_what_randperm_gave() -> None:
    """The first of randperm(14654 * 14655), seed 777, in torch 2.13, and a hash of 2,000 of it."""
    shape = (14654, 14655)
    assert current_rule(shape) == "r64"
    entries = spectral_entries(777, shape, 2000)
    first = (entries[:6, 0] * shape[1] + entries[:6, 1]).tolist()
    assert first == [150358698, 199533091, 83306822, 145970095, 40813261, 111338416]
    digest = "557ed4b65ddb66515a0eb5330464d603c9d23d4c862721462ae2659dbbc99be2"
    assert entries_sha256(entries) == digest


@pytest.mark.slow
def test_large_rule_equals_randperm() -> None:
    """The smallest layer of the large rule; torch needs 1.7 GB and ten seconds."""
    shape = (4, R64_FROM // 4)
    assert current_rule(shape) == "r64"
    got = spectral_entries(11, shape, 2000)
    assert np.array_equal(got, randperm_entries(11, shape, 2000))


@pytest.mark.parametrize(("positions", "n"), [(1, 1), (50, 50), (50, 7), (3000, 999)])
def test_large_rule_equals_the_plain_loop(
    positions: int, n: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks of 64 draws against the shuffle written out, every place kept."""
    monkeypatch.setattr("fourierft_export.spectral.entries._BLOCK", 64)
    raw = np.random.RandomState(9).randint(0, 2**32, size=2 * positions, dtype=np.uint32)
    expected = [0] * positions
    for i in range(positions):
        z = ((int(raw[2 * i]) << 32) | int(raw[2 * i + 1])) % (i + 1)
        expected[i] = expected[z]
        expected[z] = i
    assert _r64_prefix(np.random.RandomState(9), positions, n).tolist() == expected[:n]


def test_rule_changes_where_torch_changes_it() -> None:
    assert current_rule((1, 214_748_363)) == "small"
    assert current_rule((1, 214_748_364)) == "r64"
    assert current_rule((28672, 8192)) == "r64"
    assert current_rule((MAX_POSITIONS // 4, 4)) == "r64"


def test_a_named_rule_is_followed() -> None:
    small = spectral_entries(3, (40, 50), 100, rule="small")
    large = spectral_entries(3, (40, 50), 100, rule="r64")
    assert np.array_equal(small, randperm_entries(3, (40, 50), 100))
    assert not np.array_equal(small, large)


def test_entries_are_distinct_shared_and_read_only() -> None:
    entries = spectral_entries(1, (30, 20), 600)
    assert len(np.unique(entries, axis=0)) == 600
    assert entries is spectral_entries(1 + 2**32, (30, 20), 600)
    with pytest.raises(ValueError, match="read-only"):
        entries[0, 0] = 1


def test_sha256_is_of_little_endian_uint64() -> None:
    entries = np.array([[1, 2], [3, 258]])
    data = b"".join(int(x).to_bytes(8, "little") for x in entries.ravel())
    assert entries_sha256(entries) == hashlib.sha256(data).hexdigest()
    assert entries_sha256(np.asfortranarray(entries)) == hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize(
    ("shape", "n", "rule", "where"),
    [
        ((0, 4), 1, None, "layer shape"),
        ((4,), 1, None, "layer shape"),
        ((2**17, 2**17), 1, None, "layer shape"),
        ((4.0, 4), 1, None, "layer shape"),
        ((4, 4), 0, None, "n_frequency"),
        ((4, 4), 17, None, "n_frequency"),
        ((4, 4), 2.5, None, "n_frequency"),
        ((4, 4), 2, "big", "entry rule"),
    ],
)
def test_impossible_layers_are_refused(shape: tuple, n: int, rule: str, where: str) -> None:
    with pytest.raises(UsageError) as caught:
        spectral_entries(0, shape, n, rule)
    assert caught.value.where == where
    assert caught.value.expected
    assert caught.value.found
