"""Reading cost embeddings from files."""

import pytest
import torch
from safetensors.torch import save_file

from stanford_alpaca.cost import CostEmbedding


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (torch.ones(4, 2, dtype=torch.int64), "wanted finite floating-point numbers"),
        (torch.tensor([[1.0, float("nan")]]), "wanted finite"),
        (torch.tensor([[1.0, float("inf")]]), "wanted finite"),
        (torch.ones(4, 0), "wanted finite"),
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
