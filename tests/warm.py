"""Imported once, in the process that ranks are forked from: what each of them would import or work out anew."""

# ruff: noqa: F401

import datasets.io.generator
import deepspeed  # by accelerate, also in runs without it
import scipy.io
import torch.distributed.checkpoint
import torch.distributed.fsdp
import transformers.models.llama.modeling_llama
from transformers import conversion_mapping

import stanford_alpaca.train
import tests.ranks

conversion_mapping.get_checkpoint_conversion_mapping("llama")  # hundreds of regular expressions
