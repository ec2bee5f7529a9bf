"""Energy distances equal loops over pairs; p is uniform where there is no difference."""

import numpy as np
import pytest

from stanford_alpaca.evaluation.measures.energy import Clouds


def by_loops(references, responses):
    """Returns 2 E|x - y| - E|x - x'| - E|y - y'| over pairs of different records."""
    n = len(references)
    pairs = [(i, j) for i in range(n) for j in range(n) if i != j]

    def mean(one, other):
        return np.mean([np.linalg.norm(one[i] - other[j]) for i, j in pairs])

    cross = np.mean([mean(references, texts) for texts in responses])
    within = np.mean([mean(one, other) for one in responses for other in responses])
    return 2 * cross - mean(references, references) - within


@pytest.fixture
def random():
    return np.random.default_rng(0)


@pytest.mark.parametrize("seeds", [1, 3])
def test_the_distance_is_that_of_loops_over_pairs(random, seeds):
    references, responses = random.normal(size=(12, 4)), random.normal(size=(seeds, 12, 4)) + 0.3
    found = Clouds(references, responses)
    assert found.measured().value == pytest.approx(by_loops(references, responses))
    other = Clouds(references, random.normal(size=(seeds, 12, 4)) * 2)
    want = found.measured().value - other.measured().value
    assert found.minus(other).mean == pytest.approx(want)


def test_it_sees_a_shift_and_not_prompts(random):
    prompts = random.normal(size=(40, 3)) * 5  # what a record's texts have in common
    one, same, shifted = (prompts + random.normal(size=(40, 3)) for _ in range(3))
    shifted = shifted + 1.0
    assert Clouds(one, shifted[None]).p() < 0.01
    assert Clouds(one, same[None]).p() > 0.05
    difference = Clouds(one, shifted[None]).minus(Clouds(one, same[None]))
    assert difference.mean > 0 and difference.p < 0.01 and np.isnan(difference.low)


def test_without_a_difference_p_is_uniform_and_the_distance_0_on_average(random):
    ps, values = [], []
    for _ in range(60):
        prompts = random.normal(size=(20, 2)) * 3
        texts = [prompts + random.normal(size=(20, 2)) for _ in range(3)]
        clouds = Clouds(texts[0], np.stack(texts[1:2]))
        ps += [clouds.p(), clouds.minus(Clouds(texts[0], texts[2][None])).p]
        values.append(clouds.measured().value)
    assert 0.4 < np.mean(ps) < 0.6 and np.mean(np.array(ps) < 0.1) < 0.2
    assert abs(np.mean(values)) < 3 * np.std(values) / np.sqrt(len(values))
