"""A loss of the user's own: what is refused, and what it equals."""

import os
import re
from functools import partial
from pathlib import Path

import pytest
import torch

from stanford_alpaca import attach_objective, emo_loss, linear_emo_loss
from stanford_alpaca.cost import CostEmbedding
from stanford_alpaca.losses import MODES, Objective, SoftTargets
from stanford_alpaca.losses import functional as linear
from stanford_alpaca.losses.backends import chunked, torch_kernels
from stanford_alpaca.losses.functional import linear_loss_and_stats
from stanford_alpaca.losses.own import read_loss, try_loss
from stanford_alpaca.losses.types import Head
from tests.helpers import triton_kernels
from tests.losses.backends.test_vocab_parallel import part
from tests.ranks import run_ranks

FILE = Path(__file__).with_name("own_modes.py")
BACKENDS = ["reference", "chunked", "triton"]
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.fixture(scope="module", autouse=True)
def small_chunks_and_interpreted_kernels():
    interpreted = triton_kernels()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(torch_kernels.CHUNK_LOGITS, "cpu", 16 * 50)
        patch.setitem(torch_kernels.SLICE_LOGITS, "cpu", 5 * 50)
        if interpreted.triton is not None:
            patch.setattr(interpreted, "CHUNK_LOGITS", {"cuda": 16 * 50})
            patch.setattr(interpreted, "BLOCK", 16)
            patch.setattr(linear, "triton_kernels", interpreted)
            served = partial(chunked.linear_loss, kernels=interpreted)
            patch.setitem(linear.BACKENDS, "triton", served)
        yield


def own(mode):
    return Objective(read_loss(f"{FILE}:{mode}"))


def computed(backend, mode, **options):
    """Returns losses, statistics and gradients of 40 tokens; 4 of them cost and weigh nothing."""
    make = torch.Generator().manual_seed(1)
    hidden = torch.randn(40, 8, generator=make)
    hidden[:4] *= 400  # nll, emo, or both are 0
    leaves = [hidden.requires_grad_(), torch.randn(50, 8, generator=make).requires_grad_()]
    targets = torch.randint(50, (40,), generator=make)
    targets[:4] = (leaves[0] @ leaves[1].T)[:4].argmax(1)
    cost = CostEmbedding(torch.randn(50, 5, generator=make))
    loss, stats = linear_loss_and_stats(
        leaves[0], Head(leaves[1]), targets, cost, mode, backend=backend, **options
    )
    loss.sum().backward()
    return [loss.detach(), *stats, *(leaf.grad for leaf in leaves)]


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_restated_mode_equals_the_built_in_one_to_the_bit(backend, mode, reduction):
    if backend == "triton" and linear.triton_kernels.triton is None:
        pytest.skip("triton is not installed")
    ours = computed(backend, own(mode), reduction=reduction)
    theirs = computed(backend, mode, reduction=reduction)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    other = computed(backend, "mle" if mode != "mle" else "emo", reduction=reduction)
    assert not torch.equal(ours[-1], other[-1])
    assert own(mode).needs_emo == Objective(mode).needs_emo


@pytest.mark.parametrize("mode", ["mle", "emo", "dft"])
def test_so_it_is_with_sampled_gradients_and_weights(mode):
    options = {
        "token_weights": torch.rand(40),
        "sampled": linear.sampled_as("sampled", 0.01)._replace(seed=3),
    }
    ours, theirs = (computed("chunked", each, **options) for each in (own(mode), mode))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_so_it_is_where_ranks_share_the_output_layer():
    modes = ["mle", "emo", "emo2", "mix", "tailr"]
    cases = [(mode, "cosine", "capped", False) for mode in modes]
    theirs = run_ranks(2, part, cases, torch.float32)
    ours = run_ranks(2, in_parts, modes, torch.float32)
    for one, two in zip(ours, theirs, strict=True):
        for a, b in zip(one, two, strict=True):
            assert torch.equal(a[0], b[0]) and torch.equal(a[1].nll, b[1].nll)
            pairs = zip(a[2], b[2], strict=True)
            assert all(torch.equal(x, y) for x, y in pairs if x is not None)


def in_parts(modes, dtype):
    """The same with losses from a file, which each rank reads for itself."""
    return part([(own(mode), "cosine", "capped", False) for mode in modes], dtype)


def test_a_function_is_a_mode_in_the_library(make_model):
    def focal(nll, log_emo):
        return (1 - torch.exp(-nll)) ** 2 * nll

    logits, targets = torch.randn(6, 9, requires_grad=True), torch.arange(6)
    losses = emo_loss(logits, targets, None, mode=focal, reduction="none")
    p = logits.softmax(1)[torch.arange(6), targets]
    torch.testing.assert_close(losses, (1 - p) ** 2 * -p.log())
    torch.testing.assert_close(
        linear_emo_loss(logits, torch.eye(9), targets, None, mode=focal, reduction="none"), losses
    )
    model, ids = make_model("llama"), torch.randint(97, (2, 12))
    handle = attach_objective(model, focal)
    loss = model(ids, labels=ids).loss
    loss.backward()
    handle.detach()
    nll = torch.nn.functional.cross_entropy(
        model(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none"
    )
    torch.testing.assert_close(loss, focal(nll, None).mean())


def test_a_loss_that_reads_emo_needs_costs_and_none_takes_soft_targets():
    rows, targets = torch.randn(3, 5), torch.arange(3)
    with pytest.raises(ValueError, match="mode emd needs a cost embedding"):
        emo_loss(rows, targets, None, mode=own("emd"))
    soft = SoftTargets(targets[:, None], torch.ones(3, 1))
    with pytest.raises(ValueError, match="mode mle needs the probability of one target"):
        emo_loss(rows, targets, None, soft, mode=own("mle"))
    # reads log emo only where it is not None, so it works without it and differs
    assert try_loss(lambda nll, emo: nll if emo is None else nll + emo.exp()).needs_emo
    hidden = try_loss(lambda nll, emo: nll if emo is None else nll + emo.exp() - emo.exp().detach())
    assert hidden.needs_emo
    assert not try_loss(lambda nll, emo: nll.square()).needs_emo


def in_place(nll, log_emo):
    nll.data.clamp_(max=5)  # behind the back of autograd
    return nll.square()


def seeded(nll, log_emo):
    torch.manual_seed(26)
    return nll.square()


def neighbours_in_the_gradient(nll, log_emo):
    mean = nll.mean().square()
    return nll + mean - mean.detach()


class Backwards(torch.autograd.Function):
    """Fails when it is differentiated."""

    @staticmethod
    def forward(ctx, nll):
        return nll.clone()

    @staticmethod
    def backward(ctx, grad):
        raise KeyError("no")


class Strange(torch.Tensor):
    pass


def running_mean(nll, log_emo):
    running_mean.calls += 1
    return nll * running_mean.calls


running_mean.calls = 0


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda nll, emo: nll.mean(), r"shape \(\) for 54 tokens, wanted \(54,\)"),
        (lambda nll, emo: nll[:, None], r"shape \(54, 1\) for 54 tokens"),
        (lambda nll, emo: nll.double(), "torch.float64, wanted that of nll, torch.float32"),
        (lambda nll, emo: 1.0, "returned float, wanted a tensor"),
        (lambda nll, emo: nll / emo.exp(), "the loss is nan where nll is 0 and log_emo -inf"),
        (lambda nll, emo: nll.sqrt(), "the derivative by nll is inf where nll is 0"),
        (lambda nll, emo: nll + emo.clamp(-5) * 0 + emo, "the loss is -inf where"),
        (
            lambda nll, emo: nll + torch.where(emo > -1e9, emo.exp(), 0 * emo.exp() + emo / emo),
            "the loss is nan",
        ),
        (lambda nll, emo: nll.detach(), "no gradient: its losses are constants"),
        (lambda nll, emo: nll * 0, "no gradient: its losses change with neither"),
        (lambda nll: nll, "TypeError: .*takes 1 positional argument but 2 were given"),
        (lambda nll, emo: nll * torch.rand_like(nll), "a second call returns other losses"),
        (running_mean, "a second call returns other losses"),
        (lambda nll, emo: nll - nll.mean(), "depends on the tokens beside it"),
        (lambda nll, emo: nll / nll.max(), "fails: .*|depends on the tokens beside it"),
        (lambda nll, emo: nll.mul_(2), "RuntimeError: .*in-place"),
        (in_place, "in_place changes its arguments in place"),
        (seeded, "seeded changes the random numbers, which the whole run shares"),
        (neighbours_in_the_gradient, "the gradient of a token depends on the tokens beside it"),
        (lambda nll, emo: Backwards.apply(nll), r"no gradient: KeyError: 'no' \(line \d+\)"),
        (lambda nll, emo: nll.to_sparse(), "in torch.sparse_coo, wanted that of nll, torch.str"),
        (lambda nll, emo: torch.empty_like(nll, device="meta"), "losses in meta, wanted that of"),
        (lambda nll, emo: nll.as_subclass(Strange), "returned Strange, wanted a tensor"),
        (lambda nll, emo: nll * {}["gamma"], r"KeyError: 'gamma' \(line \d+\)"),
        (3, "3 is no function but int"),
    ],
)
def test_strange_functions_are_found_on_the_probe(function, message):
    with pytest.raises(ValueError, match=message) as error:
        try_loss(function)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("source", "asked", "message"),
    [
        (None, "none.py:focal", "none.py cannot be read (No such file or directory)"),
        ("", "own.txt:focal", "give FILE.py:NAME, a file and a function in it"),
        ("", "own.py", "give FILE.py:NAME"),
        ("", "emo", "give FILE.py:NAME, a file and a function in it; --mode has built-in ones"),
        ("x = 1", "own.py:focal", "own.py has no focal, it has no function"),
        (
            "import torch\ndef focl(nll, e): return nll\n",
            "own.py:focal",
            "own.py has no focal, it has focl; did you mean focl?",
        ),
        ("focal = 3", "own.py:focal", "focal is no function but int"),
        ("def focal(nll, e):\n  return (", "own.py:focal", "SyntaxError: '(' was never closed (li"),
        ("import nothing_such", "own.py:focal", "ModuleNotFoundError: No module named 'nothing_s"),
        ("x = 1\nraise SystemExit(3)", "own.py:focal", "does not run: SystemExit: 3 (line 2)"),
        (
            "def focal(nll, e):\n  y = nll\n  return y.no",
            "own.py:focal",
            "AttributeError: 'Tensor' object has no attribute 'no' (line 3)",
        ),
        (b"x = '\xff'\n", "own.py:focal", "own.py does not run: SyntaxError: "),
        ("import torch\ntorch.manual_seed(1)", "own.py:focal", "own.py changes the random numbers"),
    ],
)
def test_strange_files_are_told_in_one_line(tmp_path, monkeypatch, source, asked, message):
    monkeypatch.chdir(tmp_path)
    if source is not None:
        Path("own.py").write_bytes(source if isinstance(source, bytes) else source.encode())
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        read_loss(asked)
    assert "\n" not in str(error.value) and not list(tmp_path.rglob("*.pyc"))


def test_a_file_that_changes_the_dtype_of_all_is_refused(tmp_path):
    file = tmp_path / "own.py"
    file.write_text("import torch\ntorch.set_default_dtype(torch.float64)\n")
    try:
        with pytest.raises(ValueError, match=r"own\.py changes PyTorch's default dtype"):
            read_loss(f"{file}:focal")
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "own.py")
    with pytest.raises(ValueError, match=r"own\.py is no file"):
        read_loss(f"{tmp_path / 'own.py'}:focal")


def test_a_dataclass_with_postponed_annotations_is_a_loss(tmp_path):
    (tmp_path / "own.py").write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\n"
        "@dataclass\nclass Power:\n  k: float = 2.0\n"
        "  def __call__(self, nll, log_emo): return nll**self.k\nsquare = Power()\n"
    )
    loss = read_loss(f"{tmp_path / 'own.py'}:square")
    assert loss(torch.tensor([3.0]), None).tolist() == [9.0] and not loss.needs_emo


def test_losses_are_checked_at_every_call():
    function = own("mle").mode.function
    odd = Objective(lambda nll, emo: function(nll, emo) if len(nll) != 5 else nll.sum())
    with pytest.raises(ValueError, match=r"shape \(\) for 5 tokens"):
        emo_loss(torch.randn(5, 7), torch.arange(5), None, mode=odd)
