"""The cost model: what it chooses, and that the choice can be forced."""

import pytest

from fourierft_export.errors import UsageError
from fourierft_export.spectral import cost


@pytest.mark.parametrize(
    ("shape", "n", "path"),
    [
        ((4096, 4096), 1000, "rows"),
        ((4096, 4096), 2_000_000, "columns"),
        ((4096, 4096), 10, "rows"),
        ((768, 768), 20, "rows"),
        ((384, 384), 1000, "columns"),
    ],
)
def test_many_entries_take_columns(shape, n, path) -> None:
    assert {cost.choose_delta_path(shape, n, threads=threads) for threads in (1, 2)} == {path}


@pytest.mark.parametrize(
    ("rows", "shape", "form"),
    [
        (1, (4096, 4096), "token"),
        (512, (4096, 4096), "token"),
        (32, (768, 768), "token"),
        (4096, (384, 384), "dense"),
        (20_000, (384, 384), "dense"),
    ],
)
@pytest.mark.parametrize("training", [False, True])
def test_few_rows_take_the_token_form(rows, shape, form, training) -> None:
    assert cost.choose_form(rows, shape, 1000, training) == form


def test_forcing_ends_with_the_block_and_nests() -> None:
    free = cost.choose_delta_path((768, 768), 1000)
    with cost.force(delta="rows", form="dense"):
        assert cost.choose_delta_path((768, 768), 1000) == "rows"
        with cost.force(delta="columns"):
            assert cost.choose_delta_path((768, 768), 1000) == "columns"
            assert cost.choose_form(1, (768, 768), 1000) == "dense"
        assert cost.choose_delta_path((768, 768), 1000) == "rows"
    assert cost.choose_delta_path((768, 768), 1000) == free
    assert cost.choose_form(1, (768, 768), 1000) == "token"


def test_unknown_paths_are_refused_and_change_nothing() -> None:
    with pytest.raises(UsageError, match="rows or columns"), cost.force(delta="fast"):
        pass
    with pytest.raises(UsageError, match="token or dense"), cost.force(form="both"):
        pass
    assert cost.choose_form(1, (4096, 4096), 1000) == "token"
