"""Tests that what a model does around its output layer is recognized exactly or refused."""

import pytest
import torch
from torch import nn

from stanford_alpaca.losses.backends.reference import logits_of
from stanford_alpaca.objective.head import HeadForm, head_of, recognise_head

FORMS = {
    "gemma2": HeadForm(softcap=3.0),
    "cohere": HeadForm(logit_scale=0.0625),
    "granite": HeadForm(logit_scale=1 / 3),
}
IDS = torch.tensor([[5, 4, 90, 17, 8]])


def altered(model, change):
    """Returns the model as a subclass that changes its logits."""

    class Altered(type(model)):
        def forward(self, *args, **kwargs):
            outputs = super().forward(*args, **kwargs)
            outputs.logits = change(outputs.logits)
            return outputs

    model.__class__ = Altered
    return model


def assert_logits_are_those_of_the_head(model):
    with torch.no_grad():
        hidden = model.base_model(input_ids=IDS)[0]
        torch.testing.assert_close(
            logits_of(hidden, head_of(model)), model(input_ids=IDS).logits, rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_family_in_every_precision_exactly(make_model, family, dtype):
    model = make_model(family).to(dtype)
    assert recognise_head(model) == FORMS.get(family, HeadForm())
    if dtype == torch.float32:
        assert_logits_are_those_of_the_head(model)


@pytest.mark.parametrize(
    ("change", "form"),
    [
        (lambda z: 20 * torch.tanh(0.1 * z / 20), HeadForm(20.0, 0.1)),  # a scale, then a cap
        (lambda z: 0.25 * (20 * torch.tanh(z / 20)), HeadForm(5.0, 0.25)),  # a cap, then a scale
        (lambda z: 20 * torch.tanh(z.float() / 20), HeadForm(20.0, None)),
        (lambda z: z.to(torch.bfloat16), HeadForm()),
    ],
    ids=["scale and cap", "cap and scale", "float32", "bfloat16"],
)
def test_scales_and_caps_in_any_order_and_precision(make_model, change, form):
    softcap, scale = recognise_head(altered(make_model("llama"), change))
    assert (softcap or 0, scale or 1) == pytest.approx(
        (form.softcap or 0, form.logit_scale or 1), rel=1e-14
    )


def test_names_and_configurations_are_not_believed(make_model):
    assert recognise_head(make_model("gemma2", final_logit_softcapping=None)) == HeadForm()
    boast = make_model("llama")
    boast.config.final_logit_softcapping, boast.config.logit_scale = 30.0, 0.5
    assert recognise_head(boast) == HeadForm()


def test_a_factor_before_the_output_layer_joins_the_scale(make_model):
    model = make_model("cohere")
    model.lm_head.register_forward_pre_hook(lambda layer, inputs: (inputs[0] / 12,))
    form = recognise_head(model)
    assert form.softcap is None and form.logit_scale == pytest.approx(0.0625 / 12, rel=1e-6)
    assert_logits_are_those_of_the_head(model)
    with pytest.raises(
        ValueError, match=r"receives 0\.083\d* times the last hidden state: load it in float32"
    ):
        recognise_head(model.bfloat16())
    biased = make_model("llama")
    biased.lm_head.bias = nn.Parameter(torch.randn(97))
    assert_logits_are_those_of_the_head(biased)
    biased.lm_head.register_forward_pre_hook(lambda layer, inputs: (inputs[0] / 12,))
    with pytest.raises(ValueError, match=r"has a bias and receives 0\.08333333 times"):
        recognise_head(biased)


def test_a_model_in_training_is_probed_without_dropout_and_left_as_it_was(make_model):
    model = make_model("gpt2").train()  # dropout 0.1
    model.transformer.h[0].eval()
    modes, state = [module.training for module in model.modules()], torch.get_rng_state()
    assert recognise_head(model) == HeadForm()
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert not model.lm_head._forward_hooks


SCALE = nn.Parameter(torch.tensor(2.0))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda z: z + 0.01 * z**2, "unknown to its logits"),
        (
            lambda z: z.clamp(-50, 50),
            "unknown to its logits: with a scale of 1 and a cap of 50, .* would become",
        ),
        (lambda z: z.clamp(-1e6, 1e6), "unknown to its logits"),
        # a different bias for each token
        (lambda z: z + torch.linspace(0, 1e-9, 97), "unknown to its logits"),
        (lambda z: z * torch.linspace(1, 1 + 1e-6, 97), "unknown to its logits"),
        (lambda z: z.log_softmax(-1), "unknown to its logits"),
        (lambda z: z.masked_fill(torch.arange(97) == 96, -torch.inf), "unknown to its logits"),
        # all positions but the first are scaled
        (lambda z: torch.cat([z[:, :1], 2 * z[:, 1:]], 1), "unknown to its logits"),
        (lambda z: z * torch.nan, "unknown to its logits"),
        (lambda z: -z, "near 0 they are -1 times its output layer's output"),
        (lambda z: z * 0, "unknown to its logits"),
        (lambda z: z[..., :96], r"returns \(1, 4, 97\) and its logits are \(1, 4, 96\)"),
        (lambda z: (z / 2).bfloat16(), "too coarse"),
        (lambda z: z * SCALE, "trained parameters take part"),
    ],
)
def test_what_is_not_recognised_is_refused(make_model, change, message):
    with pytest.raises(ValueError, match=message):
        recognise_head(altered(make_model("llama"), change))


def test_an_infinite_scale_is_refused(make_model):
    # With 96 tokens the ramp has no 0, so there is no NaN either.
    with pytest.raises(ValueError, match="near 0 they are inf times"):
        recognise_head(altered(make_model("llama", vocab_size=96), lambda z: z * torch.inf))


def test_layers_that_are_not_what_they_seem_are_refused(make_model):
    model = make_model("llama")
    model.lm_head.register_forward_hook(
        lambda layer, inputs, output: output + 0.1 * inputs[0][..., :1]
    )
    with pytest.raises(ValueError, match="something else than input @ weight"):
        recognise_head(model)
    model = make_model("llama")
    model.lm_head.register_forward_pre_hook(lambda layer, inputs: (inputs[0] ** 2,))
    with pytest.raises(ValueError, match="something else than base_model's first output"):
        recognise_head(model)
    model = make_model("llama")
    model.base_model_prefix = "lm_head"  # then base_model is not the body of the model
    with pytest.raises(ValueError, match="LlamaForCausalLM cannot be probed"):
        recognise_head(model)
    # Then transformers' base_model is the model itself, so the body has to be searched for.
    model.base_model_prefix = "nothing"
    assert recognise_head(model) == HeadForm()
    model = make_model("llama")
    model.lm_head = nn.Sequential(model.lm_head)
    with pytest.raises(ValueError, match="no linear output layer"):
        recognise_head(model)
    with pytest.raises(ValueError, match="meta device"):
        recognise_head(make_model("llama").to("meta"))
