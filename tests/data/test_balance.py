"""Balancing: each step keeps its examples, and ranks and micro-batches get about equal work."""

import numpy as np
import pytest
from accelerate.data_loader import BatchSamplerShard, SeedableRandomSampler
from torch.utils.data import BatchSampler

from stanford_alpaca.data.balance import BalancedSampler, balanced_order

BATCH, RANKS, ACCUMULATION = 4, 3, 5
STEP = BATCH * RANKS * ACCUMULATION
LENGTHS = np.random.default_rng(0).lognormal(np.log(120), 0.6, 4 * STEP).astype(int).clip(2, 512)


def shuffled(epoch: int = 0) -> SeedableRandomSampler:
    sampler = SeedableRandomSampler(range(len(LENGTHS)), data_seed=3)
    sampler.set_epoch(epoch)
    return sampler


def balanced(padded: bool, epoch: int = 0) -> BalancedSampler:
    sampler = BalancedSampler(shuffled(), LENGTHS, BATCH, RANKS, ACCUMULATION, padded)
    sampler.set_epoch(epoch)
    return sampler


def dealt(make, epoch: int) -> np.ndarray:
    """Returns [steps, accumulation, ranks, batch] indices as accelerate deals them out.

    Each rank has its own sampler.
    """
    shards = [
        BatchSamplerShard(BatchSampler(make(epoch), BATCH, False), RANKS, rank)
        for rank in range(RANKS)
    ]
    return (
        np.stack([np.array(list(shard)) for shard in shards])
        .transpose(1, 0, 2)
        .reshape(-1, ACCUMULATION, RANKS, BATCH)
    )


@pytest.mark.parametrize("padded", [True, False])
def test_steps_keep_their_examples_in_every_epoch(padded):
    for epoch in (0, 1):
        plain, ours = [dealt(make, epoch) for make in (shuffled, lambda e: balanced(padded, e))]
        assert not np.array_equal(plain, ours)
        for step in range(4):
            assert sorted(plain[step].ravel()) == sorted(ours[step].ravel())
    assert len(balanced(padded)) == len(LENGTHS)


def test_tokens_of_ranks_and_micro_batches_are_nearly_equal_without_padding():
    plain, ours = (
        LENGTHS[dealt(shuffled, 0)].sum(-1),
        LENGTHS[dealt(lambda e: balanced(False, e), 0)].sum(-1),
    )
    for sums in (lambda x: x, lambda x: x.sum(1)):  # per micro-batch, per rank in a step
        assert np.ptp(sums(ours), axis=-1).max() < 0.2 * np.ptp(sums(plain), axis=-1).max()
    assert np.ptp(ours.sum(1), axis=-1).max() <= 0.02 * ours.sum(1).mean()


def test_with_padding_micro_batches_have_similar_lengths_and_ranks_the_same_to_do():
    plain, ours = dealt(shuffled, 0), dealt(lambda e: balanced(True, e), 0)
    # Padded tokens, [steps, accumulation, ranks].
    cost = [LENGTHS[order].max(-1) * BATCH for order in (plain, ours)]
    assert cost[1].sum() < 0.7 * cost[0].sum()
    assert np.ptp(cost[1].sum(1), axis=-1).max() < 0.2 * np.ptp(cost[0].sum(1), axis=-1).max()


def test_orders_by_hand():
    lengths = np.array([1, 8, 2, 7, 3, 6, 4, 5])
    # The longest is paired with the shortest, so every pair sums to 9.
    assert lengths[balanced_order(lengths, 2, 2, padded=False)].reshape(4, 2).sum(1).tolist() == [
        9,
        9,
        9,
        9,
    ]
    # Neighbours stay together. The rank that gets the longest first gets the shortest next.
    assert lengths[balanced_order(lengths, 2, 2, padded=True)].tolist() == [8, 7, 6, 5, 2, 1, 4, 3]
