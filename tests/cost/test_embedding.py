"""Which rows are an embedding, given or read from a file."""

import math

import pytest
import torch
from safetensors.torch import save_file

from stanford_alpaca import linear_emo_loss
from stanford_alpaca.cost import CostEmbedding


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (torch.ones(4, 2, dtype=torch.int64), "wanted floating-point numbers"),
        (torch.tensor([[1.0, float("nan")]]), "row 0 .* is not finite"),
        (torch.tensor([[1.0, float("inf")]]), "row 0 .* is not finite"),
        (torch.ones(4, 0), "wanted floating"),
        (torch.ones(4), r"an embedding \[vocabulary, width\], got shape \(4,\)"),
    ],
    ids=["whole", "nan", "inf", "empty", "flat"],
)
def test_a_file_without_an_embedding_is_refused(tmp_path, rows, message):
    save_file({"cost": torch.eye(3)}, tmp_path / "cost.safetensors")
    assert CostEmbedding.from_file(tmp_path / "cost.safetensors").costs(
        torch.tensor([1]), 3
    ).tolist() == [[1, 0, 1]]
    save_file({"cost": rows}, tmp_path / "cost.safetensors")
    with pytest.raises(ValueError, match=message):
        CostEmbedding.from_file(tmp_path / "cost.safetensors")


@pytest.mark.parametrize("kind", ["cosine", "shuffled", "centred"])
@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_rows_that_are_not_finite_are_refused(kind, wrong, dtype):
    rows = torch.randn(9, 4).to(dtype)
    rows[5, 2] = wrong
    with pytest.raises(ValueError, match="row 5 of the cost embedding is not finite"):
        CostEmbedding(rows, kind)
    hidden, weight = torch.randn(3, 4), torch.randn(9, 4)
    with pytest.raises(ValueError, match="row 5 of the cost embedding is not finite"):
        linear_emo_loss(hidden, weight, torch.tensor([1, 2, 5]), rows, mode="emd")
    rows[5, 2] = 0.0
    assert CostEmbedding(rows, kind).rows.isfinite().all()


def test_a_row_whose_norm_overflows_is_refused():
    with pytest.raises(ValueError, match="row 1 "):
        CostEmbedding(torch.tensor([[1.0, 2.0], [1e200, 0.0]], dtype=torch.float64))
    assert CostEmbedding(torch.tensor([[3e38, 0.0]])).rows.tolist() == [[1.0, 0.0]]
