"""Imported once, in the process that ranks are forked from.

It imports or computes what each rank would otherwise import or compute again.
"""

# ruff: noqa: F401

import contextlib

import datasets.io.generator
import scipy.io
import torch.distributed.checkpoint
import torch.distributed.fsdp
import transformers.models.llama.modeling_llama
from transformers import conversion_mapping

with contextlib.suppress(ImportError):
    import deepspeed  # accelerate imports it, also in runs without DeepSpeed

import stanford_alpaca.train
import tests.ranks

# compiles hundreds of regular expressions
conversion_mapping.get_checkpoint_conversion_mapping("llama")
