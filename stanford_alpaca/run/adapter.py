"""Builds the LoRA adapter that a run's flags describe, and summarises what it trains."""

from peft import PeftModel
from peft.tuners.lora import LoraLayer
from transformers import PreTrainedModel

from stanford_alpaca.models.lora import add_lora, expert_parameters
from stanford_alpaca.run.arguments import LoraArguments


def adapt(model: PreTrainedModel, lora: LoraArguments) -> PeftModel:
    """Returns the model with the LoRA adapter that the flags describe.

    Raises:
        UserError: the model cannot have such an adapter.
    """
    return add_lora(
        model,
        lora.lora_r,
        lora.lora_alpha,
        lora.lora_dropout,
        lora.lora_target_modules,
        lora.lora_embeddings,
        lora.lora_target_parameters,
    )


def told_adapter(model: PeftModel) -> str:
    """Returns one line: what the adapter trains, and which expert weights stay frozen."""
    layers = [name for name, module in model.named_modules() if isinstance(module, LoraLayer)]
    kinds = sorted({name.rpartition(".")[2] for name in layers} - {"base_layer"})
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    adapted = tuple(
        name for of in model.peft_config.values() for name in of.target_parameters or []
    )
    frozen = [
        name for name in expert_parameters(model.get_base_model()) if not name.endswith(adapted)
    ]
    experts = (
        f"; experts stay frozen ({', '.join(frozen)}): --lora_target_parameters reaches them"
        if frozen
        else ""
    )
    total = model.num_parameters()
    return (
        f"LoRA trains {trained:,} of {total:,} parameters, "
        f"beside {len(layers)} layers ({', '.join(kinds)}){experts}"
    )
