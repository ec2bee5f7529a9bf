"""Identities between the objectives that hold exactly."""

import pytest
import torch

from stanford_alpaca.cost import CostEmbedding
from stanford_alpaca.losses import Objective
from stanford_alpaca.losses.backends.reference import token_stats


def value_and_gradient(objective: Objective, cost: CostEmbedding | None):
    torch.manual_seed(3)
    logits = (3 * torch.randn(20, 40, dtype=torch.float64)).requires_grad_()
    targets = torch.randint(40, (20,))
    stats = token_stats(logits, targets, cost)
    loss = objective(*stats)
    loss.sum().backward()
    return (
        loss.detach(),
        logits.grad,
        stats.nll.detach(),
        None if stats.log_emo is None else stats.log_emo.detach().exp(),
    )


@pytest.fixture
def cost():
    return CostEmbedding(torch.randn(40, 9, dtype=torch.float64))


def test_dft_mixce_tailr_and_identity_emd_have_one_gradient():
    identity = CostEmbedding(None, "identity")
    grads = [
        value_and_gradient(Objective("dft"), None)[1],
        value_and_gradient(Objective("mixce", mixce_eta=0.0), None)[1],
        value_and_gradient(Objective("tailr", tailr_gamma=1.0, tailr_floor=0.0), None)[1],
        value_and_gradient(Objective("emd"), identity)[1],
    ]
    for grad in grads[1:]:
        torch.testing.assert_close(grad, grads[0], rtol=1e-6, atol=1e-9)


def test_emo_has_the_value_of_nll_and_emo2_twice_emo(cost):
    loss, _, nll, _ = value_and_gradient(Objective("emo"), cost)
    torch.testing.assert_close(loss, nll)
    loss, _, _, emo = value_and_gradient(Objective("emo2"), cost)
    torch.testing.assert_close(loss, 2 * emo)


def test_gradient_of_emo2_is_that_of_emo_times_two_emo_over_nll(cost):
    _, one, nll, emo = value_and_gradient(Objective("emo"), cost)
    _, two, _, _ = value_and_gradient(Objective("emo2"), cost)
    torch.testing.assert_close(two, (2 * emo / nll)[:, None] * one)


def test_upstream_weighting_replaces_emo_by_emo_plus_p(cost):
    _, d_nll, nll, emo = value_and_gradient(Objective("mle"), cost)
    _, d_emo, _, _ = value_and_gradient(Objective("emd"), cost)
    loss, grad, _, _ = value_and_gradient(Objective("emo", emo_weighting="upstream"), cost)
    published = emo + torch.exp(-nll)
    torch.testing.assert_close(
        grad, 0.5 * (d_nll + (nll / published)[:, None] * d_emo), rtol=1e-6, atol=1e-9
    )
    torch.testing.assert_close(loss, nll, rtol=1e-6, atol=1e-9)
    loss, grad, _, _ = value_and_gradient(Objective("emo2", emo_weighting="upstream"), cost)
    torch.testing.assert_close(
        grad, (published / nll)[:, None] * d_nll + d_emo, rtol=1e-6, atol=1e-9
    )


def test_emo_gradient_is_bounded_by_two_nll(cost):
    _, total, nll, _ = value_and_gradient(Objective("emo"), cost)
    _, d_nll, _, _ = value_and_gradient(Objective("mle"), cost)
    term = (2 * total - d_nll).abs().sum(1)
    assert (term <= 2 * nll + 1e-9).all()


def test_mix_is_linear_and_cap_caps(cost):
    _, d_nll, nll, emo = value_and_gradient(Objective("mle"), cost)
    _, d_emo, _, _ = value_and_gradient(Objective("emd"), cost)
    loss, grad, _, _ = value_and_gradient(Objective("mix", emo_weight=0.3), cost)
    torch.testing.assert_close(loss, 0.7 * nll + 0.3 * emo)
    torch.testing.assert_close(grad, 0.7 * d_nll + 0.3 * d_emo)
    loss, grad, _, _ = value_and_gradient(Objective("emo", emo_ratio_cap=2.0), cost)
    ratio = (nll / emo).clamp(max=2.0)
    assert (ratio == 2.0).any() and (ratio < 2.0).any()
    torch.testing.assert_close(loss, 0.5 * (nll + ratio * emo))
    torch.testing.assert_close(grad, 0.5 * (d_nll + ratio[:, None] * d_emo))


def test_tailr_weight():
    loss, _, nll, _ = value_and_gradient(
        Objective("tailr", tailr_gamma=0.3, tailr_floor=0.25), None
    )
    p = torch.exp(-nll)
    weight = (p / (0.3 + 0.7 * p)).clamp(min=0.25)
    assert (weight == 0.25).any() and (weight > 0.25).any()
    torch.testing.assert_close(loss, weight * nll)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "emoo"}, "unknown mode 'emoo'"),
        ({"mode": "emo", "emo_weighting": "x"}, "unknown emo_weighting"),
        ({"mode": "dft", "emo_weighting": "upstream"}, "belongs to the modes emo and emo2"),
        ({"mode": "emo2", "emo_ratio_cap": 3.0}, "belongs to mode emo"),
        ({"mode": "emo", "emo_ratio_cap": 0.0}, "above 0"),
        ({"mode": "mix", "emo_weight": 1.5}, "between 0 and 1"),
        ({"mode": "tailr", "tailr_gamma": 0.0}, "tailr_gamma"),
        ({"mode": "mixce", "mixce_eta": float("nan")}, "mixce_eta"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        Objective(**options)
