"""Chooses the template for a record's prompts, and stores it in the tokenizer of a trained model.

The tokenizer has the template as its ``chat_template``, where every other program looks for it.
Its tokenizer_config.json also has the name of the template, under ``trained_prompts``. This
package's commands go by that name.
"""

import json
import os
from collections.abc import Iterable
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from stanford_alpaca.checkpoint.bounded import read_text, strange_file
from stanford_alpaca.data.chat import MORE, TRIED, ChatTemplate, named_templates, stop_ids
from stanford_alpaca.data.encode import READINGS, TextEncoder
from stanford_alpaca.data.prompts import (
    WITH_INPUT,
    WITHOUT_INPUT,
    TurnsTemplate,
    alpaca_turns,
    plain_turns,
)
from stanford_alpaca.data.sandbox import check_runs
from stanford_alpaca.errors import UserError, first_line

TEMPLATES = ("auto", "alpaca", "chat", "plain")
IN_WORDS = {
    "alpaca": "Alpaca's template",
    "chat": "the tokenizer's chat template",
    "plain": "no template: texts as they are",
    "auto": "a template for each form of record",
}
JINJA = (".jinja", ".jinja2", ".j2")
KEY = "trained_prompts"  # in tokenizer_config.json
ALPACA_JINJA = """\
BEFORE{%- set first = messages[0]['role'] == 'system' %}
{%- set system = messages[0]['content'] if first else '' %}
{%- for message in (messages[1:] if first else messages) %}
{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) or \
message['role'] not in ['user', 'assistant'] %}
{{- raise_exception('turns have to alternate: user, assistant, ...') }}
{%- endif %}
{%- if message['role'] == 'user' %}
{%- if loop.first %}
{{- system or ('WITH_INPUT' if '\\n\\n### Input:\\n' in message['content'] else 'WITHOUT_INPUT') }}
{%- endif %}
{{- '\\n\\n### Instruction:\\n' + message['content'] }}
{%- else %}
{{- '\\n\\n### Response:' + message['content'] + eos_token }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '\\n\\n### Response:' }}
{%- endif %}
""".replace("WITH_INPUT", WITH_INPUT).replace("WITHOUT_INPUT", WITHOUT_INPUT)
PLAIN_JINJA = """\
BEFORE{%- for message in messages %}
{{- message['content'] + (eos_token if message['role'] == 'assistant' else '') }}
{%- endfor %}
"""
PROBES = [
    [{"role": "user", "content": "Add."}],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Add 1\n\n### Input:\nto 2"},
    ],
    [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": " b "},
        {"role": "user", "content": "\nc"},
    ],
]

Template = TurnsTemplate | ChatTemplate


class Trained(NamedTuple):
    """The prompts that a model was trained with."""

    template: str  # one of TEMPLATES; auto: several, one for each form of record
    special_tokens: str  # one of READINGS


def check_template(name: str, special_tokens: str = "text") -> None:
    """Raises UserError for a template or a reading of special tokens that does not exist."""
    for flag, value, known in (
        ("prompt_template", name, TEMPLATES),
        ("special_tokens", special_tokens, READINGS),
    ):
        if value not in known:
            raise UserError(f"--{flag} {value}: choose from {', '.join(known)}")


def resolve_template(name: str, form: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """Returns the name of the template for records of a form.

    ``auto`` is Alpaca's template for the form ``alpaca``, and no template for ``completion`` and
    ``text``. For ``chat`` it is the tokenizer's chat template, or Alpaca's if there is none. If
    ``sign`` has written the chat template, ``chat`` is the template that it was written for.
    """
    if name == "chat":
        return _signed(tokenizer) or name
    if name != "auto":
        return name
    if form == "chat":
        return "chat" if has_own_template(tokenizer) else "alpaca"
    return "alpaca" if form == "alpaca" else "plain"


def has_own_template(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Returns whether the tokenizer has a chat template that ``sign`` did not write."""
    return tokenizer.chat_template is not None and _signed(tokenizer) is None


def _signed(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Returns which of our templates the tokenizer's chat template is, or None."""
    ours = {"alpaca": ALPACA_JINJA, "plain": PLAIN_JINJA}
    written = str(tokenizer.chat_template)
    return next(
        (name for name, jinja in ours.items() if written.endswith(jinja.partition("BEFORE")[2])),
        None,
    )


def make_template(
    name: str, form: str, tokenizer: PreTrainedTokenizerBase, encoder: TextEncoder
) -> Template:
    """Returns the template that ``resolve_template`` names.

    Raises:
        UserError: the tokenizer does not have the template, or it cannot write the form.
    """
    name = resolve_template(name, form, tokenizer)
    if form == "text" and name != "plain":
        raise UserError(f"--prompt_template {name} cannot write records of the form {form}")
    if name == "chat":
        if tokenizer.chat_template is None:
            raise UserError(
                "--prompt_template chat: the tokenizer has no chat template; "
                "use alpaca, or give one with --chat_template"
            )
        return ChatTemplate.of(tokenizer, encoder)
    return TurnsTemplate(alpaca_turns if name == "alpaca" else plain_turns, encoder)


def told_templates(
    names: Iterable[str], tokenizer: PreTrainedTokenizerBase, given: str | None = None
) -> list[str]:
    """Returns a line for each template that writes prompts of a run.

    If the run does not use the tokenizer's chat template, the line says how to use it.

    Args:
        given: where the chat template is from, if it is not the tokenizer's own.
    """
    names = list(names)
    unused = bool(names) and "chat" not in names and has_own_template(tokenizer)
    hint = (
        "; the tokenizer has a chat template, which is not used: --prompt_template chat uses it"
        if unused
        else ""
    )
    words = IN_WORDS | ({"chat": f"the chat template of {given}"} if given else {})
    return [f"prompts: {words[name]}{hint}" for name in names]


# ---- what a model was trained with ---------------------------------------------------------------


def sign(
    tokenizer: PreTrainedTokenizerBase, templates: Iterable[str], special_tokens: str = "text"
) -> list[str]:
    """Writes the template that a model is trained with, and its name, into the tokenizer.

    If there are several templates, the ``chat_template`` is the tokenizer's own if it is one of
    them, else Alpaca's.

    Args:
        templates: the resolved names of the templates that write the records.

    Returns:
        Lines for the user.
    """
    names = sorted(set(templates))
    if not names and special_tokens == "text":  # running text: the tokenizer stays as it is
        return []
    template = names[0] if len(names) == 1 else "auto"
    lines = []
    if named_templates(tokenizer).keys() == {"default"}:  # a saved one is read back as a string
        tokenizer.chat_template = named_templates(tokenizer)["default"]
    if names and "chat" not in names:
        if has_own_template(tokenizer):
            lines.append(
                "the saved chat_template writes the prompts that are trained; "
                "the tokenizer's own is not kept"
            )
        turns, jinja = (
            (alpaca_turns, ALPACA_JINJA) if "alpaca" in names else (plain_turns, PLAIN_JINJA)
        )
        if _write(tokenizer, jinja, TurnsTemplate(turns, TextEncoder.of(tokenizer))):
            lines.append(
                "the saved chat_template gives other ids than training for this tokenizer; "
                "generate with this package"
            )
    if len(names) > 1:
        served = "the tokenizer's own" if "chat" in names else "Alpaca's"
        lines.append(
            f"several templates write the prompts ({', '.join(names)}): "
            f"the saved chat_template is {served}"
        )
    tokenizer.init_kwargs[KEY] = {
        "template": template,
        "special_tokens": special_tokens,
        "chat_template": _digest(tokenizer.chat_template),
    }
    return lines


def trained_prompts(tokenizer: PreTrainedTokenizerBase) -> Trained | None:
    """Returns what ``sign`` wrote into the tokenizer.

    Returns None if it wrote nothing, or if the chat template has changed since.
    """
    said = tokenizer.init_kwargs.get(KEY)
    if not isinstance(said, dict) or said.get("chat_template") != _digest(tokenizer.chat_template):
        return None
    known = said.get("template") in TEMPLATES and said.get("special_tokens") in READINGS
    return Trained(said["template"], said["special_tokens"]) if known else None


def follow(
    tokenizer: PreTrainedTokenizerBase, form: str, prompt_template: str, special_tokens: str | None
) -> Trained:
    """Returns the prompts to use for records of a form with a trained model.

    They are what the arguments ask for, or else what the model was trained with.
    """
    trained = trained_prompts(tokenizer) or Trained("auto", "text")
    name = trained.template if prompt_template == "auto" else prompt_template
    return Trained(
        resolve_template("auto" if form == "text" else name, form, tokenizer),
        special_tokens or trained.special_tokens,
    )


def asked_otherwise(tokenizer: PreTrainedTokenizerBase, form: str, asked: Trained) -> str:
    """Returns in words how prompts differ from those of training, or "" if they do not."""
    trained = trained_prompts(tokenizer)
    if trained is None:
        return ""
    template = resolve_template(trained.template, form, tokenizer)
    if template != asked.template:
        return f"trained with {IN_WORDS[template]}, asked here with {IN_WORDS[asked.template]}"
    if trained.special_tokens != asked.special_tokens:
        return (
            f"trained with --special_tokens {trained.special_tokens}, "
            f"asked here with {asked.special_tokens}"
        )
    return ""


def _write(tokenizer: PreTrainedTokenizerBase, jinja: str, template: TurnsTemplate) -> bool:
    """Writes the chat template that gives the same ids as training. Returns True if none does."""
    first = template.encoder.first
    written = "bos_token" if first == tokenizer.bos_token else repr(first)
    # some tokenizers put a space before a text, but none after a beginning-of-sequence token
    for space in ("", " "):
        begin = f"{written} + '{space}'" if space else written
        tokenizer.chat_template = jinja.replace("BEFORE", f"{{{{- {begin} }}}}\n" if first else "")
        if all(_same_ids(tokenizer, template, messages) for messages in PROBES):
            return False
    return True


def _same_ids(
    tokenizer: PreTrainedTokenizerBase, template: TurnsTemplate, messages: list[dict[str, str]]
) -> bool:
    ((ours, _),) = template.encoder([template.prompt({"messages": messages})])
    return ours == tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_dict=False
    )


def _digest(chat_template: Any) -> str:
    # line ends as in a template that was saved and read back
    text = json.dumps(chat_template, sort_keys=True).replace("\\r\\n", "\\n")
    return sha256(text.encode()).hexdigest()


def set_stops(config: GenerationConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Makes generation with a trained model stop where its answers end, and where its base did."""
    before = [] if config.eos_token_id is None else config.eos_token_id
    stops = list(
        dict.fromkeys([*stop_ids(tokenizer), *(before if isinstance(before, list) else [before])])
    )
    config.eos_token_id = stops if len(stops) > 1 else stops[0]


# ---- --chat_template -----------------------------------------------------------------------------


def use_chat_template(
    tokenizer: PreTrainedTokenizerBase, source: str | None, remote_code: bool = False
) -> None:
    """Gives the tokenizer another chat template.

    Args:
        source: a Jinja file, the folder or hub name of another model, or the name of one of the
            tokenizer's own templates. None changes nothing.

    Raises:
        UserError: there is no template, or it is not valid.
    """
    if source is None:
        return
    if not source.strip():
        raise UserError(
            "--chat_template without a name, as of a variable that is not set; "
            "give a file, a folder or a hub name"
        )
    own, place = tokenizer.chat_template, Path(source).expanduser()
    if isinstance(own, dict) and source in own:
        template = own[source]
    elif os.path.isfile(place):
        try:
            template = read_text(place, encoding="utf-8-sig")
        except (OSError, ValueError) as error:
            raise UserError(
                f"--chat_template {source}: cannot be read ({first_line(error)})"
            ) from None
    elif os.path.isdir(place) and (strange := strange_file(place)):
        raise UserError(f"--chat_template {source}: {strange}; give another folder")
    elif source.endswith(JINJA):
        raise UserError(f"--chat_template {source}: no such file")
    else:
        try:
            template = AutoTokenizer.from_pretrained(
                source, trust_remote_code=remote_code
            ).chat_template
        except Exception as error:  # the hub raises many kinds of errors
            named = (
                f"; the tokenizer's own are named {', '.join(own)}" if isinstance(own, dict) else ""
            )
            raise UserError(
                f"--chat_template {source}: no file, and no tokenizer ({first_line(error)}){named}"
            ) from None
        if template is None:
            raise UserError(
                f"--chat_template {source}: its tokenizer has no chat template; give another"
            )
    try:
        for text in template.values() if isinstance(template, dict) else [template]:
            check_runs(text, [{"conversations": [each], **MORE} for each in TRIED])
    except UserError as error:
        raise UserError(f"--chat_template {source}: {error}") from None
    tokenizer.chat_template = template
