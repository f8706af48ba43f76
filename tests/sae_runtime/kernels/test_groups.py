"""Finding large entries by group maxima, against comparing every entry."""

import pytest
import torch
from torch import Tensor

from sae_runtime.kernels.groups import BITS, Groups, as_bits, ordered_bits


def random_values(m: int, dtype: torch.dtype, *, by_column: bool) -> Tensor:
    values = torch.randn(19, m, generator=torch.Generator().manual_seed(m)).to(dtype)
    return values.t().contiguous().t() if by_column else values


@pytest.mark.parametrize("dtype", BITS)
@pytest.mark.parametrize("by_column", [False, True])
@pytest.mark.parametrize("m", [2048, 1000, 999])  # groups of 32, of 8, and single entries
def test_entries_that_reach_a_bound(m: int, by_column: bool, dtype: torch.dtype) -> None:
    values = random_values(m, dtype, by_column=by_column)
    groups = Groups(as_bits(values))
    per_row, per_column = torch.linspace(0.01, 4, 19)[:, None], torch.linspace(0.01, 4, m)
    for bound in (torch.tensor(1.5), per_row, per_column):
        bound = bound.to(dtype)
        rows, columns = groups.at_least(as_bits(bound))
        assert torch.equal(torch.stack([rows, columns], 1), (values >= bound).nonzero())


@pytest.mark.parametrize("by_column", [False, True])
@pytest.mark.parametrize(("m", "k"), [(2048, 4), (2048, 100), (999, 5)])
def test_the_kth_maximum_is_at_most_the_kth_largest_entry(m: int, k: int, by_column: bool) -> None:
    values = random_values(m, torch.float32, by_column=by_column)
    groups = Groups(as_bits(values), k)
    bound = groups.kth_maximum(k).view(torch.float32)
    assert (bound <= values.topk(k, dim=1).values[:, -1:]).all()
    # With enough groups for each of the k it leaves few more than k entries.
    assert k <= ((values >= bound).sum(1)).float().mean() < 1.5 * k + 2


@pytest.mark.parametrize("dtype", BITS)
def test_ordered_bits_are_ordered_like_the_floats(dtype: torch.dtype) -> None:
    values = torch.tensor([-torch.inf, -2.5, -1e-3, -0.0, 0.0, 1e-3, 7.0, torch.inf]).to(dtype)
    bits = ordered_bits(values)
    assert (bits.diff() > 0).tolist() == [True, True, True, False, True, True, True]
    assert bits[3] == bits[4]
    assert torch.signbit(values[3])  # the input is left alone
