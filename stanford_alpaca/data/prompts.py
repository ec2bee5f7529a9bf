"""Alpaca's prompt template, the one place that training and generation take it from.

The wording is Stanford Alpaca's (Apache-2.0, https://github.com/tatsu-lab/stanford_alpaca), byte for byte, because models
tuned with it expect exactly this text. The response follows ``### Response:`` directly.
"""

from collections.abc import Mapping

WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)
WITHOUT_INPUT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)


def format_prompt(record: Mapping[str, str]) -> str:
    """The prompt of a record with an ``instruction`` and, unless absent or empty, an ``input``."""
    if record.get("input"):
        return WITH_INPUT.format(instruction=record["instruction"], input=record["input"])
    return WITHOUT_INPUT.format(instruction=record["instruction"])
