"""CostAlias: it gives the costs of a copy, copies nothing, and reads the weight at each call."""

import pytest
import torch

from stanford_alpaca.cost import CostAlias, CostEmbedding
from stanford_alpaca.cost import embedding as module

TARGETS = torch.tensor([3, 0, 3, 5])


# Rows [11, 6] of very different norms. Two of them are parallel, and one is all zeros.
def awkward(dtype: torch.dtype) -> torch.Tensor:
    weight = (
        torch.randn(11, 6, dtype=torch.float64)
        * torch.logspace(-4, 3, 11, dtype=torch.float64)[:, None]
    )
    weight[7], weight[5] = 2 * weight[3], 0
    return weight.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_costs_are_those_of_a_copy(dtype, monkeypatch):
    monkeypatch.setattr(module, "TILE", 4)
    monkeypatch.setattr("stanford_alpaca.cost.alias.TILE", 4)
    weight = awkward(dtype)
    alias, copy = CostAlias(lambda: weight), CostEmbedding(weight)
    costs = alias.costs(TARGETS, 11)
    assert costs.dtype == copy.costs(TARGETS, 11).dtype
    torch.testing.assert_close(costs, copy.costs(TARGETS, 11), rtol=0, atol=5e-7)
    assert costs[0, 3] == 0 and costs[0, 7] == 0 and (costs[3, :5] == 1).all() and costs[3, 5] == 0
    rest = (
        torch.tensor([[1, 5], [2, 5], [4, 4], [0, 1]]),
        torch.tensor([[0.2, 0.1]] * 4, dtype=costs.dtype),
    )
    torch.testing.assert_close(
        alias.costs(TARGETS, 11, rest), copy.costs(TARGETS, 11, rest), rtol=0, atol=1e-6
    )


def test_nothing_is_copied_and_a_weight_that_moves_is_followed():
    held = [torch.randn(11, 6, device="meta")]
    alias = CostAlias(lambda: held[0])
    alias.check(11)
    with pytest.raises(ValueError, match="11 rows but there are 12 logits"):
        alias.check(12)
    held[0] = torch.randn(11, 6, requires_grad=True)
    assert alias.rows.data_ptr() == held[0].data_ptr() and not alias.rows.requires_grad
    want = alias.costs(TARGETS, 11)
    held[0] = held[0].detach().clone()  # as when an engine gathers the weight anew
    assert alias.to("cpu").rows.data_ptr() == held[0].data_ptr()
    assert torch.equal(alias.costs(TARGETS, 11), want)


def test_rows_are_kept_between_calls_as_those_of_a_copy():
    weight = awkward(torch.float32)
    alias = CostAlias(lambda: weight).cache(mib=1)
    first = alias.unique_rows(TARGETS)
    assert alias.unique_rows(TARGETS).table.data_ptr() == first.table.data_ptr()
    torch.testing.assert_close(
        alias.costs(TARGETS, 11),
        CostEmbedding(weight).cache(mib=1).costs(TARGETS, 11),
        rtol=0,
        atol=2**-7,
    )
