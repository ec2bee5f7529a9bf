"""Measures against a known oracle equal those computed from dense distributions.

Optimal transport costs less than the independent coupling.
"""

import itertools
import math

import numpy as np
import pytest
import torch
from datasets import Dataset
from scipy.optimize import linprog

from stanford_alpaca.cost import CostEmbedding
from stanford_alpaca.evaluation.measures.oracle import (
    distances,
    optimal_transport,
    oracle_perplexity,
)

V = 12


def distributions(model, row):
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0, :-1].double()
    return logits.softmax(1)[[label != -100 for label in row["labels"][1:]]]


@pytest.fixture
def pair(make_model):
    rows = [[1, 2, 3, 4, 5], [6, 7, 8], [9, 1, 4, 2, 2, 7]]
    examples = Dataset.from_dict(
        {"input_ids": rows, "labels": [[-100, -100, *row[2:]] for row in rows]}
    )
    models = [
        make_model(family, vocab_size=V, initializer_range=0.3).eval()
        for family in ("llama", "gpt2")
    ]
    return *models, examples


@pytest.mark.parametrize("kind", ["cosine", "identity"])
def test_distances_are_those_of_dense_distributions(pair, kind):
    model, oracle, examples = pair
    rows = torch.randn(V, 4, generator=torch.Generator().manual_seed(2))
    rows[3] = 0.0
    cost = CostEmbedding(rows, kind)
    found = distances(model, oracle, examples, cost, positions=0, batch_size=2)
    p, q = (torch.cat([distributions(one, row) for row in examples]) for one in (model, oracle))
    prices = cost.costs(torch.arange(V), V).double()
    wanted = {
        "forward_cross_entropy": -(q * p.log()).sum(1).mean(),
        "reverse_cross_entropy": -(p * q.log()).sum(1).mean(),
        "total_variation": (p - q).abs().sum(1).mean() / 2,
        "transport_cost": torch.einsum("ni,nj,ij->n", p, q, prices).mean(),
    }
    assert {name: items.measured().value for name, items in found.items()} == pytest.approx(
        {name: value.item() for name, value in wanted.items()}, rel=1e-5
    )
    assert [len(items.sums) for items in found.values()] == [3] * 4


def test_optimal_transport_is_the_linear_programs_and_below_the_independent_coupling(pair):
    pytest.importorskip("ot", reason="needs POT")
    model, oracle, examples = pair
    cost = CostEmbedding(torch.randn(V, 4, generator=torch.Generator().manual_seed(3)))
    p, q = (distributions(one, examples[0])[0] for one in (model, oracle))
    prices = cost.costs(torch.arange(V), V).double().numpy()
    marginals = [
        [float(i == a) for i, _ in itertools.product(range(V), repeat=2)] for a in range(V)
    ]
    marginals += [
        [float(j == a) for _, j in itertools.product(range(V), repeat=2)] for a in range(V)
    ]
    solved = linprog(prices.ravel(), A_eq=np.array(marginals), b_eq=np.concatenate([p, q])).fun
    assert optimal_transport(p, q, cost) == pytest.approx(solved, abs=4e-3)
    assert optimal_transport(p, p, cost) == pytest.approx(0.0, abs=1e-9)
    found = distances(model, oracle, examples, cost)
    assert found["optimal_transport"].measured().value < found["transport_cost"].measured().value
    # All positions are taken, since there are fewer than were asked for.
    assert found["optimal_transport"].sums[:, 1].tolist() == [3, 1, 4]
    some = [
        distances(model, oracle, examples, cost, positions=2, seed=s)["optimal_transport"]
        for s in (0, 1)
    ]
    assert [items.sums[:, 1].sum() for items in some] == [2, 2] and some[0].value != some[1].value
    assert distances(oracle, oracle, examples, cost)["optimal_transport"].measured().value < 1e-6


def test_the_oracles_perplexity_is_that_of_its_own_nll(pair):
    oracle, prompts, responses = pair[1], [[1, 2], [3]], [[4, 5, 6], [7]]
    rows = [
        {"input_ids": [1, 2, 4, 5, 6], "labels": [-100, -100, 4, 5, 6]},
        {"input_ids": [3, 7], "labels": [-100, 7]},
    ]
    nll = [
        -distributions(oracle, row)[i, token].log()
        for row, ids in zip(rows, responses, strict=True)
        for i, token in enumerate(ids)
    ]
    found = oracle_perplexity(oracle, prompts, responses, pad_token_id=0).measured()
    assert found.value == pytest.approx(math.exp(torch.stack(nll).mean()), rel=1e-5)
