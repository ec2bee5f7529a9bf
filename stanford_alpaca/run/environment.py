"""Environment variables that change the numbers of a training run.

Variables of accelerate are refused: a flag does the same, and the run's record would not show the
variable. The variables by which torch, transformers and their libraries compute have no flag. The
record holds their values, and a run that resumes with other values says so.
"""

import os
import re
from collections.abc import Mapping

from stanford_alpaca.errors import UserError

# words that accelerate reads as true (the first six) or false
WORDS = ("1", "true", "yes", "on", "y", "t", "0", "false", "no", "off", "n", "f")
# values that change nothing; `accelerate launch` sets them
OFF = ("", "none", "default", *WORDS[6:])
NEUTRAL = {
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": ("1", "auto"),
    "ACCELERATE_GRADIENT_CLIPPING": ("auto",),
}
# beginning of a name -> the flags to use instead; the first match counts
INSTEAD = {
    "ACCELERATE_MIXED_PRECISION": "--bf16 or --fp16",
    "ACCELERATE_DYNAMO_": "--torch_compile",
    "ACCELERATE_USE_CPU": "--use_cpu",
    "ACCELERATE_TORCH_DEVICE": "--use_cpu",
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "--gradient_accumulation_steps",
    "ACCELERATE_GRADIENT_CLIPPING": "--max_grad_norm",
    "ACCELERATE_USE_FSDP": "--fsdp",
    "FSDP_": "--fsdp and --fsdp_config",
    "ACCELERATE_USE_DEEPSPEED": "--deepspeed",
    "ACCELERATE_DEEPSPEED_": "--deepspeed",
    "ACCELERATE_CONFIG_DS_FIELDS": "--deepspeed",
    "ACCELERATE_": "",
    "PARALLELISM_CONFIG_": "",
    "XLA_USE_BF16": "",
    "XLA_DOWNCAST_BF16": "",
}
# accelerate's variables that change no number, with the values they may have; None: any value
HARMLESS = {
    "ACCELERATE_LOG_LEVEL": ("debug", "info", "warning", "error", "critical"),
    "ACCELERATE_DEBUG_MODE": WORDS,
    "ACCELERATE_CPU_AFFINITY": WORDS,
    "ACCELERATE_ENABLE_RICH": WORDS,
    "FSDP_CPU_RAM_EFFICIENT_LOADING": WORDS,
    "ACCELERATE_NUM_PROCESSES": None,
}
PRECISION = (
    "NVIDIA_TF32_OVERRIDE",
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE",
    "ONEDNN_DEFAULT_FPMATH_MODE",
    "DNNL_DEFAULT_FPMATH_MODE",
)
NUMERICS = (
    "OMP_NUM_THREADS", "MKL_NUM_THREADS", "MKL_CBWR", "MKL_ENABLE_INSTRUCTIONS",
    "ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "CUBLAS_WORKSPACE_CONFIG",
    "CUBLASLT_WORKSPACE_SIZE", "TORCH_BLAS_PREFER_CUBLASLT", "TORCH_LINALG_PREFER_CUSOLVER",
    "PYTORCH_TUNABLEOP_ENABLED", "PYTORCH_TUNABLEOP_FILENAME", "FLASH_ATTENTION_DETERMINISTIC",
    "TRANSFORMERS_SDPA_FORCE_GQA", "USE_HUB_KERNELS", "TRITON_INTERPRET", "NCCL_ALGO", "NCCL_PROTO",
    "PYTORCH_ENABLE_MPS_FALLBACK", "TORCHINDUCTOR_EMULATE_PRECISION_CASTS",
)  # fmt: skip
# a launcher sets these
NUMBERS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_PORT")
# huggingface_hub, datasets, torch and deepspeed read these on import, and a bad value ends in a
# traceback: name -> a pattern of the values that work, and a description of them
READ_AT_IMPORT = {
    "HF_HUB_ETAG_TIMEOUT": (r"\d*", "a whole number of seconds"),
    "HF_HUB_DOWNLOAD_TIMEOUT": (r"\d*", "a whole number of seconds"),
    "HF_DATASETS_IN_MEMORY_MAX_SIZE": (r"\d+(\.\d*)?", "a number of bytes"),
    "DS_ACCELERATOR": (
        r"cuda|cpu|xpu|npu|mps|hpu|mlu|sdaa|supa|klxpu",
        "cuda, cpu or another device of DeepSpeed's",
    ),
}


def check_imports(environment: Mapping[str, str] | None = None) -> None:
    """Raises UserError for a variable whose value keeps a library from being imported.

    Must be called before any of these libraries is imported.
    """
    for name, (form, wanted) in READ_AT_IMPORT.items():
        value = (os.environ if environment is None else environment).get(name)
        if value is not None and not re.fullmatch(form, value.strip()):
            raise UserError(f"{name}={value} in the environment: give {wanted}, or unset it")


def check_environment(environment: Mapping[str, str] | None = None) -> None:
    """Raises UserError for a variable that would replace a flag, or that has no valid value.

    Must be called before transformers reads the flags, because transformers sets such variables
    itself.
    """
    import torch

    for name, value in (os.environ if environment is None else environment).items():
        said = f"{name}={value} in the environment"
        if name in NUMBERS and not value.isdecimal():
            raise UserError(
                f"{said} is no number; a launcher (torchrun) sets it: unset it, or give it one"
            )
        if name in HARMLESS:
            known = HARMLESS[name]
            if known is not None and value.lower() not in known:
                raise UserError(f"{said}: choose from {', '.join(known)}, or unset it")
            continue
        flag = next((flag for start, flag in INSTEAD.items() if name.startswith(start)), None)
        if (
            name == "ACCELERATE_USE_CPU"
            and value.lower() in WORDS
            and not torch.accelerator.is_available()
        ):
            continue  # a CPU is all there is
        if flag is not None and value.lower() not in (*OFF, *NEUTRAL.get(name, ())):
            advice = f"unset it, and give {flag}" if flag else "unset it"
            raise UserError(
                f"{said} would change the training, and its record would not say so; {advice}"
            )


def recorded(environment: Mapping[str, str] | None = None) -> dict[str, str]:
    """Returns the variables that are set and that the numbers depend on."""
    of = os.environ if environment is None else environment
    return {name: of[name] for name in (*PRECISION, *NUMERICS) if of.get(name)}
