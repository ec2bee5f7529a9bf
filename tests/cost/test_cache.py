"""The cache of a frozen cost's rows: how exact the rows are, and which rows are kept.

Results do not depend on earlier calls.
"""

import pytest
import torch

from stanford_alpaca import linear_emo_loss
from stanford_alpaca.cost import CostEmbedding

V = 40
ROWS_MIB = 2 * V / 2**20  # MiB of one row in bfloat16


@pytest.fixture
def embedding():
    rows = torch.randn(V, 6)
    rows[4], rows[-2:] = 2 * rows[3], 0
    return rows


def computed(cost, monkeypatch):
    """Returns a list that collects the tokens whose rows the cost computes from now on."""
    seen, compute = [], cost._compute
    monkeypatch.setattr(
        cost, "_compute", lambda tokens: seen.extend(tokens.tolist()) or compute(tokens)
    )
    return seen


def test_every_cost_is_within_a_256th_and_zeros_stay_zero(embedding):
    tokens = torch.arange(V)
    exact, kept = (
        cost.costs(tokens, V)
        for cost in (CostEmbedding(embedding), CostEmbedding(embedding).cache(1))
    )
    assert (kept - exact).abs().max() > 0  # the kept rows are rounded
    assert ((kept - exact).abs() <= exact / 256).all()
    assert kept[3, 4] == 0 and (kept.diagonal() == 0).all()


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_emo_is_within_a_256th_and_so_is_the_gradient_of_its_term(embedding, backend):
    hidden, weight, targets = 3 * torch.randn(60, 8), torch.randn(V, 8), torch.randint(V, (60,))

    def run(cost, mode):
        z = (hidden @ weight.T).requires_grad_()
        loss = linear_emo_loss(
            z, torch.eye(V), targets, cost, mode=mode, reduction="none", backend=backend
        )
        return loss.detach(), torch.autograd.grad(loss.sum(), z)[0]

    exact, kept = (
        run(cost, "emd")[0]
        for cost in (CostEmbedding(embedding), CostEmbedding(embedding).cache(1))
    )
    assert ((kept - exact).abs() <= exact / 255).all()
    nll, _ = run(None, "mle")
    (_, exact), (_, kept) = (
        run(cost, "emo") for cost in (CostEmbedding(embedding), CostEmbedding(embedding).cache(1))
    )
    # The EMO term's gradient is nll (pi - p) / 2, and the rounded costs give pi within a factor of
    # (1 + 1/256) / (1 - 1/256).
    assert ((kept - exact).abs().sum(1) <= 0.5 * nll / 127).all()


def test_a_row_is_computed_once(embedding, monkeypatch):
    cost = CostEmbedding(embedding).cache(1)
    seen = computed(cost, monkeypatch)
    first = cost.costs(torch.tensor([5, 7, 5]), V)
    again = cost.costs(torch.tensor([7, 9, 5]), V)
    assert seen == [5, 7, 9]
    assert torch.equal(first[[1, 0]], again[[0, 2]])


def test_costs_do_not_depend_on_what_came_before_nor_on_the_room(embedding):
    tokens = torch.arange(V)
    costs = []
    for before, mib in (([], 1), ([9, 3], 1), ([9, 3], 3 * ROWS_MIB), ([1, 2, 3, 4], 3 * ROWS_MIB)):
        cost = CostEmbedding(embedding.double()).cache(mib)
        for token in before:
            cost.costs(torch.tensor([token]), V)
        costs.append(cost.costs(tokens, V))
    for other in costs[1:]:
        assert torch.equal(costs[0], other)


def test_without_room_for_all_the_most_frequent_targets_are_kept_else_the_first(
    embedding, monkeypatch
):
    counts = torch.zeros(V, dtype=torch.long)
    counts[[30, 20, 10]] = torch.tensor([5, 7, 6])
    for given, kept in ((counts, {30, 20, 10}), (None, {0, 1, 2})):
        cost = CostEmbedding(embedding).cache(3 * ROWS_MIB, given)
        cost.costs(torch.arange(V), V)
        seen = computed(cost, monkeypatch)
        cost.costs(torch.arange(V), V)
        assert set(range(V)) - set(seen) == kept


def test_rows_that_are_kept_while_evaluating_serve_training(embedding):
    cost = CostEmbedding(embedding).cache(1)
    with torch.inference_mode():
        first = cost.costs(torch.tensor([5]), V)
    assert torch.equal(cost.costs(torch.tensor([5, 7]), V)[:1], first)


def test_no_budget_means_exact_costs(embedding):
    tokens = torch.arange(V)
    assert torch.equal(
        CostEmbedding(embedding).cache(1).cache(0).costs(tokens, V),
        CostEmbedding(embedding).costs(tokens, V),
    )
    assert CostEmbedding(None, "identity").cache(1).costs(tokens, V).sum() == V * V - V


def test_budgets_and_counts_that_cannot_be_are_refused(embedding):
    for given, message in (
        ((float("inf"),), "inf MiB"),
        ((-1.0,), "-1.0 MiB"),
        ((0.5 / 2**20,), "hold no row of 40"),
        ((1, torch.ones(V + 1)), r"counts have shape \(41,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            CostEmbedding(embedding).cache(*given)


def test_another_device_begins_anew(embedding):
    cost = CostEmbedding(embedding).cache(1)
    first = cost.unique_rows(torch.tensor([3]))
    assert cost.to("cpu").unique_rows(torch.tensor([3])).table is first.table
    assert cost.to("meta")._cache is None


def test_costs_are_exact_products_where_others_are_asked_to_be_fast(embedding, monkeypatch):
    products, addmm, during = torch.backends.mkldnn.matmul, torch.addmm, []
    asked = products.fp32_precision
    monkeypatch.setattr(
        torch, "addmm", lambda *a, **k: during.append(products.fp32_precision) or addmm(*a, **k)
    )
    products.fp32_precision = "bf16"  # the CPU's counterpart of --tf32
    try:
        CostEmbedding(embedding).costs(torch.tensor([1]), V)
        assert (during, products.fp32_precision) == (["ieee"], "bf16")
    finally:
        products.fp32_precision = asked
