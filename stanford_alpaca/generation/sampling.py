"""The flags that decide how the next token is chosen, checked and converted for transformers."""

from dataclasses import dataclass
from typing import Any

from transformers import GenerationConfig, PreTrainedTokenizerBase

from stanford_alpaca.errors import UserError
from stanford_alpaca.flags import check_number, check_whole

MOST_BEAMS = 1000

GIVE_TEMPERATURE = "give --temperature too, 1.0 for example"
RANGES = {
    "temperature": (0.0, 100.0),
    "top_p": (0.0, 1.0),
    "typical_p": (0.001, 1.0),
    "min_p": (0.0, 1.0),
    "repetition_penalty": (0.01, 100.0),
}


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. Greedy unless a temperature above 0 is given.

    Raises:
        UserError: a value is out of range, or beam search is combined with sampling.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_k: int = 0  # 0: all tokens
    top_p: float = 1.0  # the likeliest tokens that together have this probability
    # like top_p, but starting with the tokens whose surprise is nearest to the entropy
    typical_p: float = 1.0
    min_p: float = 0.0  # tokens at least this likely, relative to the likeliest
    # divides positive logits of tokens in the prompt or the response; multiplies negative ones
    repetition_penalty: float = 1.0
    num_beams: int = 1

    def __post_init__(self) -> None:
        for name, least in (("max_new_tokens", 1), ("top_k", 0)):
            check_whole(name, getattr(self, name), least)
        check_whole("num_beams", self.num_beams, 1, MOST_BEAMS)
        for name, (low, high) in RANGES.items():
            check_number(name, getattr(self, name), low, high)
        if 0 < self.temperature < 0.001:  # logits divided by it would not be finite
            raise UserError(
                f"--temperature {self.temperature}: give at least 0.001, or 0 for greedy"
            )
        if self.num_beams > 1 and self.temperature > 0:
            raise UserError("--num_beams searches and --temperature samples: give one of them")
        for name, neutral in (("top_k", 0), ("top_p", 1), ("typical_p", 1), ("min_p", 0)):
            if self.temperature == 0 and getattr(self, name) != neutral:
                raise UserError(f"--{name} belongs to sampling: {GIVE_TEMPERATURE}")

    def config(
        self, tokenizer: PreTrainedTokenizerBase, stop_ids: list[int] | None = None
    ) -> GenerationConfig:
        """Returns the settings for transformers' ``generate``.

        It wants temperature and penalty as floats.
        """
        chosen: dict[str, Any] = {"do_sample": False}
        if self.temperature > 0:
            chosen = {"do_sample": True, "temperature": float(self.temperature)}
            chosen |= {
                name: getattr(self, name) for name in ("top_k", "top_p", "typical_p", "min_p")
            }
        return GenerationConfig(
            max_new_tokens=self.max_new_tokens,
            num_beams=self.num_beams,
            repetition_penalty=float(self.repetition_penalty),
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=stop_ids or tokenizer.eos_token_id,
            **chosen,
        )
