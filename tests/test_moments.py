"""Sums over samples: every layout and length against float64, merging, thinning out."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bnp_optim.moments import Moments, merge_moments, moments, thinned

SHAPES = [
    (1, 5),
    (2, 7),
    (60, 33),
    (512, 6),
    (513, 6),  # folded, with a rest
    (5000, 3),
    (4096, 4),  # folded, without one
    (1, 4, 9, 7),
    (3, 4, 9, 7),
    (16, 4, 9, 7),
    (40, 3, 11),
    (700, 2, 3),
    (6, 4, 1, 1),
]


def exact(values: Tensor) -> tuple[Tensor, Tensor]:
    rows = values.double().movedim(1, -1).reshape(-1, values.shape[1])
    return rows.mean(0), rows.var(0, correction=0)


@pytest.mark.parametrize("layout", ["contiguous", "channels last", "strided"])
@pytest.mark.parametrize("center", [0.0, 1000.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_moments_against_float64(shape: tuple[int, ...], center: float, layout: str) -> None:
    values = torch.randn(shape) + center
    if layout == "channels last":
        values = values.movedim(1, -1).contiguous().movedim(-1, 1)
    elif layout == "strided":
        values = torch.stack([values, values], dim=-1)[..., 0]
    mean, variance = exact(values)
    for dtype, tolerance in ((torch.float32, 2e-6), (torch.float64, 1e-14)):
        found = moments(values, 17, dtype)
        assert (found.samples, found.observations) == (17, values.numel() // shape[1])
        assert found.mean.dtype == dtype
        size = center + 1
        torch.testing.assert_close(found.mean.flatten().double(), mean, rtol=0, atol=tolerance * size)
        if values.numel() == shape[1]:
            assert found.variance is None
            continue
        assert found.variance is not None
        # float32 rounds the deviations of values near 1000 to 6e-5 of their standard deviation
        torch.testing.assert_close(found.variance.double(), variance, rtol=tolerance * max(1, center / 2), atol=0)


def test_long_columns_keep_their_digits() -> None:
    """Added up one after the other, 200,000 float32 rows near 1000 lose more than the variance."""
    values = torch.randn(200_000, 2) + 1000
    mean, variance = exact(values)
    found = moments(values, 1, torch.float32)
    assert found.variance is not None
    torch.testing.assert_close(found.mean.double(), mean, rtol=1e-6, atol=0)
    torch.testing.assert_close(found.variance.double(), variance, rtol=1e-4, atol=0)


def test_a_single_observation_is_a_copy_or_a_view() -> None:
    values = torch.randn(1, 4)
    copied, viewed = moments(values, 1, torch.float32), moments(values, 1, torch.float32, view=True)
    values.zero_()
    assert torch.count_nonzero(copied.mean) == 4 and torch.count_nonzero(viewed.mean) == 0


def test_merged_moments_are_those_of_the_whole() -> None:
    values = torch.randn(23, 4, dtype=torch.float64) * 3 + 50
    pieces = values.split([1, 1, 7, 1, 13])
    merged = merge_moments([moments(x, len(x), torch.float64) for x in pieces])
    mean, variance = exact(values)
    assert (merged.samples, merged.observations) == (23, 23)
    torch.testing.assert_close(merged.mean, mean, rtol=1e-14, atol=0)
    torch.testing.assert_close(merged.variance, variance, rtol=1e-12, atol=0)


def test_the_device_path_has_the_moments_of_the_cpu() -> None:
    """Elsewhere ``torch.var_mean`` does it; a graph uses two passes: all agree."""
    values = torch.randn(6, 3, 4) + 2
    variance, mean = torch.var_mean(values, (0, 2), correction=0)
    found = moments(values, 6, torch.float32)
    torch.testing.assert_close(found, Moments(6, 24, mean, variance), rtol=1e-5, atol=1e-6)
    on_meta = moments(values.to("meta"), 6, torch.float32)
    assert on_meta.variance is not None
    assert (on_meta.mean.shape, on_meta.variance.shape, on_meta.observations) == ((3,), (3,), 24)


@pytest.mark.parametrize(
    ("shape", "limit", "kept"),
    [
        ((4, 3, 8, 5), None, (4, 3, 8, 5)),
        ((4, 3, 8, 5), 160, (4, 3, 8, 5)),  # 160 observations are no more than 160
        ((4, 3, 8, 5), 80, (4, 3, 4, 5)),
        ((4, 3, 8, 5), 1, (4, 3, 1, 5)),  # no fewer than one row of positions
        ((100, 3), 10, (10, 3)),
        ((100, 3), 33, (25, 3)),
        ((4, 3, 0), 1, (4, 3, 0)),
    ],
    ids=str,
)
def test_thinning_out(shape: tuple[int, ...], limit: int | None, kept: tuple[int, ...]) -> None:
    assert thinned(torch.zeros(shape), limit, 0).shape == kept


def test_thinning_out_goes_round() -> None:
    """Over k calls every row of positions is measured once."""
    values = torch.arange(8.0).expand(2, 1, 8).contiguous()
    seen = torch.cat([thinned(values, 4, call)[0, 0] for call in range(4)])
    assert sorted(seen.tolist()) == list(range(8))
