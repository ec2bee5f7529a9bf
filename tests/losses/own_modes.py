"""The built-in modes, restated as a user would write them: for ``--loss``."""

import torch


def mle(nll, log_emo):
    return nll


def emo(nll, log_emo):
    alive = log_emo > -torch.inf
    safe = torch.where(alive, log_emo, 0.0)
    half = torch.where(alive, nll.detach() * torch.exp(safe - safe.detach()), 0.0)
    return 0.5 * (nll + half)


def emo2(nll, log_emo):
    emo, anchor = log_emo.exp(), nll.detach()
    return torch.where(anchor > 0, emo.detach() / anchor, 0.0) * nll + emo


def emd(nll, log_emo):
    return log_emo.exp()


def mix(nll, log_emo):
    return 0.5 * nll + 0.5 * log_emo.exp()


def tailr(nll, log_emo):
    p = torch.exp(-nll.detach())
    return (p / (1e-7 + (1 - 1e-7) * p)).clamp(0.2, 1) * nll


def mixce(nll, log_emo):
    return (0.5 + 0.5 * torch.exp(-nll.detach())) * nll


def dft(nll, log_emo):
    return torch.exp(-nll.detach()) * nll
