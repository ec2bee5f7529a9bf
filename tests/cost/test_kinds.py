"""The kinds shuffled and centred equal plain computations, wherever the rows are."""

import pytest
import torch
from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

from stanford_alpaca.cost import CostEmbedding
from stanford_alpaca.objective.attach import attach_objective, live_cost
from tests.ranks import run_ranks, start_gloo

V = 23
ALL = torch.arange(V)


@pytest.fixture
def embedding():
    """Rows [V, 5] that share a direction. Two are zeros."""
    rows = torch.randn(V, 5, dtype=torch.float64) + torch.tensor([3.0, 0, 0, 0, 1])
    rows[[4, 11]] = 0
    return rows


def plain(rows):
    """Returns 1 - cos of every pair, with 1 for rows of zeros and 0 on the diagonal."""
    units = rows / rows.norm(dim=1, keepdim=True).clamp_min(1e-300)
    return (1 - units @ units.T).fill_diagonal_(0)


def by_hand(rows, kind, seed):
    filled = [i for i in range(V) if rows[i].any()]
    made = torch.zeros_like(rows)
    if kind == "centred":
        mean = sum(rows[i] for i in filled) / len(filled)
        for i in filled:
            made[i] = rows[i] - mean
    else:
        order = torch.randperm(len(filled), generator=torch.Generator().manual_seed(seed))
        for i, place in zip(filled, order.tolist(), strict=True):
            made[i] = rows[filled[place]]
    return plain(made)


@pytest.mark.parametrize("kind", ["shuffled", "centred"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_costs_are_those_by_hand(embedding, kind, dtype):
    rows = embedding.to(dtype)
    costs = CostEmbedding(rows, kind, 7).costs(ALL, V)
    torch.testing.assert_close(costs.double(), by_hand(rows.double(), kind, 7), rtol=0, atol=2e-6)
    assert (costs[4, :4] == 1).all() and costs[4, 4] == 0
    if kind == "shuffled":
        other = CostEmbedding(rows, kind, 8).costs(ALL, V)
        cosine = CostEmbedding(rows).costs(ALL, V)
        assert not torch.allclose(costs, other, atol=0.01)
        assert not torch.allclose(costs, cosine, atol=0.01)
        assert costs.sum().item() == pytest.approx(cosine.sum().item(), rel=1e-5)


@pytest.mark.parametrize("kind", ["shuffled", "centred"])
def test_soft_targets_and_kept_rows_have_the_same_costs(embedding, kind):
    dense = by_hand(embedding, kind, 0)
    ids, probs = torch.tensor([[1, 4], [2, 9]]), torch.tensor([[0.3, 0.1], [0.2, 0.0]]).double()
    targets = torch.tensor([6, 2])
    want = dense[targets] * (1 - probs.sum(1, keepdim=True))
    for k in range(2):
        want += probs[:, k : k + 1] * dense[ids[:, k]]
    found = CostEmbedding(embedding, kind).costs(targets, V, (ids, probs))
    torch.testing.assert_close(found, want, rtol=0, atol=2e-6)
    kept = CostEmbedding(embedding, kind).cache(1).costs(targets, V)
    torch.testing.assert_close(kept, dense[targets], rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize("kind", ["shuffled", "centred"])
def test_frozen_and_adaptive_costs_of_a_model_with_an_adapter_and_without(make_model, kind):
    for frozen_head in (False, True):
        model = make_model("llama", vocab_size=V)
        weight = model.lm_head.weight
        weight.requires_grad_(not frozen_head)
        attached = attach_objective(model, "emo", cost_kind=kind, cost_seed=3)
        before = weight.detach().double().clone()
        with torch.no_grad():
            weight.normal_()
        torch.testing.assert_close(
            attached.cost.costs(ALL, V).double(), by_hand(before, kind, 3), rtol=0, atol=3e-6
        )
        attached.detach()
        attached = attach_objective(model, "emo", "adaptive", cost_kind=kind, cost_seed=3)
        batch = {"input_ids": torch.tensor([[5, 6, 7, 8]]), "labels": torch.tensor([[5, 6, 7, 8]])}
        with torch.no_grad():
            weight.normal_()
        logits = make_model("llama", vocab_size=V)
        logits.load_state_dict(model.state_dict())
        z = logits(input_ids=batch["input_ids"]).logits[0, :-1].double()
        emo = z.softmax(1) * by_hand(weight.detach().double(), kind, 3)[batch["labels"][0, 1:]]
        with torch.no_grad():
            model(**batch)
        sums = attached.eval_meter.drain("cpu")
        assert sums.emo / sums.tokens == pytest.approx(emo.sum(1).mean().item(), rel=1e-4)


def sharded(rows, kind):
    start_gloo()
    mesh = init_device_mesh("cpu", (2,))
    cost = live_cost(distribute_tensor(rows, mesh, [Shard(0)]), kind, 3)
    found = cost.unique_rows(ALL)
    return found.table[found.which]


@pytest.mark.parametrize("kind", ["shuffled", "centred", "cosine"])
def test_a_layer_that_is_sharded_has_the_costs_of_the_whole(embedding, kind):
    rows = embedding.float()
    parts = run_ranks(2, sharded, rows, kind)
    want = CostEmbedding(rows, kind, 3).unique_rows(ALL)
    assert [part.shape[1] for part in parts] == [12, 11]
    torch.testing.assert_close(torch.cat(parts, dim=1), want.table[want.which], rtol=0, atol=1e-6)


def test_on_the_meta_device_there_is_a_shape_and_no_more():
    cost = CostEmbedding(torch.empty(V, 5, device="meta"), "shuffled")
    assert cost.rows.shape == (V, 5) and cost.rows.is_meta
    with pytest.raises(ValueError, match="a centred cost needs an embedding"):
        CostEmbedding(None, "centred")
    with pytest.raises(ValueError, match="choose from cosine, identity, shuffled, centred"):
        CostEmbedding(None, "other")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_tokens_that_were_added_cost_1_when_centred(dtype):
    """They have the mean row, of which centring leaves rounding alone."""
    rows = torch.randn(500, 16) + 2
    rows = torch.cat([rows, rows.mean(0).expand(3, 16)]).to(dtype)
    cost = CostEmbedding(rows, "centred")
    assert cost.directed.tolist() == [True] * 500 + [False] * 3
    assert (cost.costs(torch.tensor([500, 7]), 503)[:, 501:] == 1).all()
