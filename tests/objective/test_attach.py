"""Tests an attached objective.

Loss and gradients inside the model are the reference's, and the model is otherwise unchanged.
"""

import copy
import pickle
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from stanford_alpaca import Objective, attach_objective, emo_loss
from stanford_alpaca.cost import CostEmbedding
from stanford_alpaca.cost.embedding import full_precision

ROUTER_COEFFICIENT = 0.5  # router_aux_loss_coef of the family mixtral-routed


@pytest.fixture
def batch():
    """Returns ids, a mask with right padding, and labels with a masked prompt: [3, 12]."""
    ids = torch.randint(3, 97, (3, 12))
    mask = torch.ones_like(ids)
    labels = ids.clone()
    labels[:, :4] = -100
    for row, length in enumerate((12, 9, 6)):
        ids[row, length:], mask[row, length:], labels[row, length:] = 0, 0, -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("cost", ["frozen", "adaptive"])
def test_loss_and_gradients_are_those_of_the_logits(make_model, batch, family, cost):
    plain, attached = make_model(family), make_model(family)
    embedding = plain.get_output_embeddings().weight.detach().clone()
    if cost == "frozen":  # computed from the embedding now; later changes do not matter
        attach_objective(attached, "emo", cost)
    with torch.no_grad():
        for model in (plain, attached):
            model.get_output_embeddings().weight.copy_(embedding.roll(1, 0))
    if cost == "adaptive":
        attach_objective(attached, "emo", cost)
        embedding = plain.get_output_embeddings().weight.detach().clone()
    labels = batch.pop("labels")
    outputs = plain(**batch)
    want = emo_loss(outputs.logits[:, :-1], labels[:, 1:], embedding)
    if family == "mixtral-routed":
        want = want + ROUTER_COEFFICIENT * outputs.aux_loss
    want.backward()
    out = attached(**batch, labels=labels)
    out.loss.backward()
    torch.testing.assert_close(out.loss, want, rtol=1e-5, atol=1e-6)
    assert out.logits is None
    theirs, ours = gradients(plain), gradients(attached)
    assert theirs.keys() == ours.keys()
    for name, grad in theirs.items():
        torch.testing.assert_close(ours[name], grad, rtol=1e-3, atol=1e-6)


def test_mle_equals_the_models_own_loss(make_model, batch, family):
    model = make_model(family)
    want = model(**batch).loss
    counted = model(**batch, num_items_in_batch=torch.tensor(31)).loss
    attach_objective(model, "mle", None)
    torch.testing.assert_close(model(**batch).loss, want, rtol=1e-5, atol=1e-6)
    # transformers adds the whole router loss to every micro-batch
    if family != "mixtral-routed":
        torch.testing.assert_close(
            model(**batch, num_items_in_batch=torch.tensor(31)).loss, counted, rtol=1e-5, atol=1e-6
        )


def test_generation_and_plain_calls_are_untouched_and_detach_restores(make_model, batch, family):
    model = make_model(family)
    prompt = {
        "input_ids": batch["input_ids"][:1, :6],
        "attention_mask": batch["attention_mask"][:1, :6],
    }
    logits, text = (
        model(**prompt).logits,
        model.generate(**prompt, max_new_tokens=8, do_sample=False),
    )
    keys, forward = set(model.state_dict()), type(model).forward
    handle = attach_objective(model, "emo")
    assert torch.equal(model(**prompt).logits, logits)
    assert torch.equal(model.generate(**prompt, max_new_tokens=8, do_sample=False), text)
    assert set(model.state_dict()) == keys  # the cost is not saved
    with pytest.raises(ValueError, match="detach it first"):
        attach_objective(model, "emo")
    handle.detach()
    assert model.forward.__func__ is forward and not hasattr(model, "emo_objective")
    assert model(**batch).logits is not None


def test_a_forward_that_computes_another_loss_is_an_error_and_a_wrapped_one_is_not(
    make_model, batch
):
    model = make_model("llama")
    handle = attach_objective(model, "mix")
    want, attached = model(**batch).loss, model.forward
    model.forward = lambda **kwargs: attached(**kwargs)  # as accelerate's mixed precision does
    assert torch.equal(model(**batch).loss, want)
    model.forward = lambda **kwargs: type(model).forward(model, **kwargs)  # as Liger and TRL do
    with pytest.raises(ValueError, match="not that of attach_objective"):
        model(**batch)
    assert model(input_ids=batch["input_ids"]).logits is not None
    model.forward = attached
    assert torch.equal(model(**batch).loss, want)
    handle.detach()
    assert model(**batch).loss != want


def test_the_routers_loss_of_micro_batches_adds_up_by_their_targets(make_model, batch):
    plain, attached = make_model("mixtral-routed"), make_model("mixtral-routed")
    handle = attach_objective(attached, "emo")
    embedding = plain.lm_head.weight.detach().clone()
    batch["labels"][1] = -100  # a micro-batch without targets
    total = (batch["labels"][:, 1:] != -100).sum()
    want, auxiliary, nll = 0.0, 0.0, 0.0
    for row in range(3):
        micro = {name: tensor[row : row + 1] for name, tensor in batch.items()}
        labels = micro.pop("labels")
        outputs, count = plain(**micro), (labels[:, 1:] != -100).sum()
        nll = (
            nll
            + emo_loss(outputs.logits[:, :-1], labels[:, 1:], embedding, reduction="sum") / total
        )
        auxiliary = auxiliary + count / total * outputs.aux_loss
        ours = attached(**micro, labels=labels, num_items_in_batch=total)
        torch.testing.assert_close(ours.aux_loss, outputs.aux_loss)
        ours.loss.backward()
        want = want + ours.loss.detach()
        if row == 1:
            assert ours.loss == 0
    torch.testing.assert_close(want, nll + ROUTER_COEFFICIENT * auxiliary, rtol=1e-5, atol=1e-6)
    (nll + ROUTER_COEFFICIENT * auxiliary).backward()
    theirs, ours = gradients(plain), gradients(attached)
    assert theirs.keys() == ours.keys() and any("gate" in name for name in theirs)
    for name, grad in theirs.items():
        torch.testing.assert_close(ours[name], grad, rtol=1e-3, atol=1e-6)
    sums = handle.train_meter.drain("cpu")
    # The meters count the objective only, without the router's loss.
    assert sums.loss / sums.tokens == pytest.approx(nll.item(), rel=1e-5)


def test_the_routers_loss_is_added_when_the_model_would_add_it(make_model, batch):
    model = make_model("mixtral", router_aux_loss_coef=0.5)
    losses = {asked: model(**batch, output_router_logits=asked).loss for asked in (None, True)}
    assert losses[True] > losses[None] + 0.1
    attach_objective(model, "mle", None)
    for asked, want in losses.items():
        torch.testing.assert_close(
            model(**batch, output_router_logits=asked).loss, want, rtol=1e-5, atol=1e-6
        )
    model.config.output_router_logits = True
    torch.testing.assert_close(model(**batch).loss, losses[True], rtol=1e-5, atol=1e-6)


def test_a_router_loss_that_cannot_be_told_apart_is_refused(make_model):
    model = make_model("mixtral-routed")
    model.loss_function = lambda logits, labels, *args, **kwargs: logits.sum() * torch.nan
    with pytest.raises(ValueError, match="its own loss without targets is nan"):
        attach_objective(model, "emo")


@pytest.mark.parametrize("trained", [True, False])
def test_a_copied_model_computes_with_its_own_weights(make_model, batch, trained):
    model = make_model("llama").requires_grad_(trained)
    attach_objective(model, "emd")
    before = model(**batch).loss
    twin = copy.deepcopy(model)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    torch.testing.assert_close(twin(**batch).loss, before)
    assert not torch.allclose(model(**batch).loss, before)
    twin.emo_objective.detach()
    assert twin(**batch).logits is not None and model(**batch).logits is None


def test_a_model_is_detached_before_it_is_pickled(make_model, batch):
    model = make_model("llama")
    handle = attach_objective(model, "emo")
    with pytest.raises(TypeError, match=r"call emo_objective\.detach\(\) first"):
        pickle.dumps(model)
    before = model(**batch).loss
    handle.detach()
    again = pickle.loads(pickle.dumps(model))
    attach_objective(again, "emo")
    assert torch.equal(again(**batch).loss, before)


@pytest.mark.parametrize("name", ["llama", "mixtral-routed"])
def test_threads_that_share_a_model_get_their_own_losses_and_count_every_token(
    make_model, batch, name
):
    """Two threads meet inside the model, whatever the scheduler does."""
    model = make_model(name)
    handle = attach_objective(model, "emd", head_gradient="sampled")
    rows = [{key: value[row : row + 1] for key, value in batch.items()} for row in range(2)]
    want = [model(**row).loss.item() for row in rows]
    handle.train_meter.drain("cpu")
    handle.seeds.call = 0
    meet = threading.Barrier(2, timeout=60)

    def wait(*_):
        meet.wait()

    model.model.embed_tokens.register_forward_hook(wait)
    model.model.register_forward_hook(wait)
    model.register_forward_hook(wait)
    switching = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(2) as pool:
            found = list(pool.map(lambda row: model(**row).loss.item(), rows * 20))
    finally:
        sys.setswitchinterval(switching)
    assert found == pytest.approx(want * 20, rel=1e-6)
    assert handle.train_meter.drain("cpu").tokens == 20 * (8 + 5)
    assert handle.seeds.call == 40


def test_threads_leave_the_precision_of_products_as_it_was():
    products = torch.backends.mkldnn.matmul
    before, inside, leave = products.fp32_precision, threading.Event(), threading.Event()

    def second() -> None:
        with full_precision("cpu"):
            inside.set()
            leave.wait(60)

    thread = threading.Thread(target=second)
    products.fp32_precision = "bf16"
    try:
        with full_precision("cpu"):
            thread.start()
            assert inside.wait(60)
        assert products.fp32_precision == "ieee"  # the second thread still needs it
        leave.set()
        thread.join()
        assert products.fp32_precision == "bf16"
    finally:
        products.fp32_precision = before


def test_training_under_mle_computes_no_emo_and_evaluation_does(make_model, batch):
    model = make_model("llama")
    handle = attach_objective(model, "mle")
    model(**batch)
    with torch.no_grad():
        model(**batch)
    train, evaluation = handle.train_meter.drain("cpu"), handle.eval_meter.drain("cpu")
    assert train.tokens == evaluation.tokens == 8 + 5 + 2
    assert train.emo == 0 and evaluation.emo > 0
    assert train.nll == pytest.approx(evaluation.nll, rel=1e-6)
    assert handle.eval_meter.drain("cpu").tokens == 0


def test_costs_of_every_kind(make_model, batch):
    model = make_model("llama")
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[
        :, :-1
    ]
    wide = torch.randn(97, 80)
    for cost, kind, embedding in [
        (wide, "cosine", wide),
        (CostEmbedding(wide), "cosine", wide),
        (None, "identity", CostEmbedding(None, "identity")),
    ]:
        cost = CostEmbedding(None, kind) if kind == "identity" else cost
        handle = attach_objective(model, Objective("emd"), cost)
        want = emo_loss(logits, batch["labels"][:, 1:], embedding, mode="emd")
        torch.testing.assert_close(model(**batch).loss, want, rtol=1e-5, atol=1e-6)
        handle.detach()
    handle = attach_objective(model, "emd", "frozen", cost_kind="identity")
    torch.testing.assert_close(model(**batch).loss, want, rtol=1e-5, atol=1e-6)


def test_models_that_cannot_be_served_and_bad_arguments(make_model):
    model = make_model("llama")
    with pytest.raises(ValueError, match="unknown cost 'frosen'"):
        attach_objective(model, "emo", "frosen")
    with pytest.raises(ValueError, match="unknown mode"):
        attach_objective(model, "emoo")
    with pytest.raises(ValueError, match="needs a cost"):
        attach_objective(model, "emo", None)
    with pytest.raises(ValueError, match="96 rows but there are 97 logits"):
        attach_objective(model, "emo", torch.randn(96, 4))
    with pytest.raises(ValueError, match="unknown backend"):
        attach_objective(model, "emo", backend="cuda")
    assert not hasattr(model, "emo_objective")
    with pytest.raises(ValueError, match="cannot be served"):
        attach_objective(make_model("llama").to("meta"), "emo")
