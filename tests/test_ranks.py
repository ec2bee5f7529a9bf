"""Tests the harness of the distributed tests.

It returns results by rank, and an error of one rank ends all.
"""

import pytest

from tests.ranks import RanksFailed, run_ranks, start_gloo


def sum_over_ranks(factor: int) -> float:
    import torch

    start_gloo()
    value = torch.tensor(float(factor * (torch.distributed.get_rank() + 1)))
    torch.distributed.all_reduce(value)
    return value.item() + torch.distributed.get_rank()


def one_raises() -> None:
    import torch

    start_gloo()
    if torch.distributed.get_rank() == 1:
        raise ValueError("this rank is ill")
    torch.distributed.barrier()


def test_every_rank_returns_and_one_error_ends_all():
    assert run_ranks(3, sum_over_ranks, 10) == [60.0, 61.0, 62.0]
    with pytest.raises(RanksFailed, match="rank 1: ValueError: this rank is ill"):
        run_ranks(2, one_raises)
