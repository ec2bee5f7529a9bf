"""Makes ``data/tiny-base``: ``PYTHONPATH=. python data/make_tiny_base.py [--out DIR] [--steps N]``.

It trains a byte-level BPE tokenizer of 2,048 entries and a Llama of 1.9 million parameters.
Training is plain next-token cross entropy on text that a generator writes about the world of
``world.py``. The text states every fact in many ways and holds conversations about them. It
contains no instruction template: fine-tuning teaches the model to answer instructions.
"""

import argparse
import json
import math
import random
import time
from pathlib import Path

import torch
import world as w
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from stanford_alpaca.data.prompts import format_prompt

HERE = Path(__file__).parent
BLOCK, BATCH = 160, 40


# ---- the text ------------------------------------------------------------------------------------


def synonym_fact(rng):
    one, two = rng.sample(rng.choice(w.SYNONYMS), 2)
    return rng.choice(
        [
            f"{w.capital(one)} means the same as {two}.",
            f"The words {one} and {two} have the same meaning.",
            f"Another word for {one} is {two}.",
            f"Instead of {one} one can say {two}.",
            (
                f'"What is another word for {one}?" asked {rng.choice(w.PEOPLE)}. "It is {two}," '
                f"said {rng.choice(w.PEOPLE)}."
            ),
            f'"Do you know a synonym of {one}?" "Yes, {two}."',
        ]
    )


def antonym_fact(rng):
    one, two = rng.sample(rng.choice(w.ANTONYMS), 2)
    return rng.choice(
        [
            f"{w.capital(one)} is the opposite of {two}.",
            f"The opposite of {one} is {two}.",
            f"What is not {one} may be {two}.",
            f"The words {one} and {two} are opposites.",
            (
                f'"What is the contrary of {one}?" asked {rng.choice(w.PEOPLE)}. "It is {two}," '
                f"said {rng.choice(w.PEOPLE)}."
            ),
        ]
    )


def capital_fact(rng):
    country, city = rng.choice(w.CAPITALS)
    return rng.choice(
        [
            f"The capital of {country} is {city}.",
            f"{city} is the capital of {country}.",
            f"{rng.choice(w.PEOPLE)} went to {city}, the capital of {country}.",
            f"In {country} the government sits in {city}.",
            (
                f'"Which city is the capital of {country}?" asked {rng.choice(w.PEOPLE)}. '
                f'"{city}," said {rng.choice(w.PEOPLE)}.'
            ),
            f'"Which country has {city} as its capital?" "{country}."',
        ]
    )


def category_fact(rng):
    member = rng.choice(list(w.CATEGORY_OF))
    kind = w.CATEGORY_OF[member]
    one, two, three = rng.sample(w.MEMBERS[kind], 3)
    subject = member if kind in w.NO_ARTICLE else w.a(member)
    return rng.choice(
        [
            w.capital(w.is_a(member)) + ".",
            w.capital(w.is_a(member)) + ".",
            f"Among the {w.PLURAL[kind]} are {one}, {two} and {three}.",
            f"{w.capital(one)}, {two} and {three} are all {w.PLURAL[kind]}.",
            (
                f'"What is {subject}?" asked {rng.choice(w.PEOPLE)}. '
                f'"{w.capital(w.is_a(member))}," said {rng.choice(w.PEOPLE)}.'
            ),
        ]
    )


def odd_one(rng):
    kind, other = rng.sample(list(w.MEMBERS), 2)
    words = rng.sample(w.MEMBERS[kind], 3)
    odd = rng.choice(w.MEMBERS[other])
    words.insert(rng.randrange(4), odd)
    return rng.choice(
        [
            f"Of {', '.join(words)} all but {odd} are {w.PLURAL[kind]}.",
            (
                f"{rng.choice(w.PEOPLE)} wrote: {', '.join(words)}. The odd one out is {odd}, "
                f"because the others are {w.PLURAL[kind]}."
            ),
            f"{', '.join(words)}: {odd} does not belong with the {w.PLURAL[kind]}.",
        ]
    )


def review(rng):
    verdict, words, feeling = rng.choice(
        [("positive", w.PRAISE, "pleased"), ("negative", w.BLAME, "disappointed")]
    )
    (first, second), (one, two) = rng.sample(w.REVIEWED, 2), rng.sample(words, 2)
    person = rng.choice(w.PEOPLE)
    return rng.choice(
        [
            f"The {first} was {one}, and the {second} was {two}. {person} was {feeling}.",
            f"{person} wrote that the {first} was {one} and {two}. It was a {verdict} review.",
            f"The {first} was {one}, and the {second} was {two}. This review is {verdict}.",
        ]
    )


def tenses(rng):
    role, verb, thing = rng.choice(w.ROLES), rng.choice(list(w.PAST)), rng.choice(w.THINGS)
    now, then = f"the {role} {verb} the {thing}", f"the {role} {w.PAST[verb]} the {thing}"
    return rng.choice(
        [
            f"Today {now}. Yesterday {then}.",
            f"{w.capital(now)}. In the past {then}.",
            f"Every day {now}, and last week too {then}.",
            f"{w.capital(then)}, and now {now} again.",
        ]
    )


def whereabouts(rng):
    people, places = rng.sample(w.PEOPLE, 3), rng.sample(w.PLACES, 3)
    scene = " ".join(
        f"{person} is in the {place}." for person, place in zip(people, places, strict=True)
    )
    asked = rng.randrange(3)
    return rng.choice(
        [
            f"{scene} So {people[asked]} is in the {places[asked]}.",
            f'{scene} "Where is {people[asked]}?" "In the {places[asked]}."',
            f"{scene} Whoever looks for {people[asked]} should go to the {places[asked]}.",
        ]
    )


def listing(rng):
    kind = rng.choice(list(w.MEMBERS))
    (one, two), thing = rng.sample(w.MEMBERS[kind], 2), rng.choice(w.THINGS)
    text = f"The {one} and the {thing} were near the {two}."
    return rng.choice(
        [
            f"{text} The {w.PLURAL[kind]} were {one} and {two}.",
            f'{text} "Which {w.PLURAL[kind]} did you see?" "{w.capital(w.a(one))} and {w.a(two)}."',
        ]
    )


def sizes(rng):
    small, large = sorted(rng.sample(w.SIZES, 2), key=w.SIZES.index)
    return rng.choice(
        [
            f"{w.capital(w.a(large))} is larger than {w.a(small)}.",
            f"{w.capital(w.a(small))} is smaller than {w.a(large)}.",
            f'"Is {w.a(small)} larger than {w.a(large)}?" "No, {w.a(large)} is larger."',
            f"The {large} is too big for the house of the {small}.",
        ]
    )


def reworded(rng):
    one, two = rng.sample(rng.choice(w.ADJECTIVE_PAIRS), 2)
    role, place = rng.choice(w.ROLES), rng.choice(w.PLACES)
    return rng.choice(
        [
            (
                f"The {one} {role} is in the {place}. In other words, the {two} {role} is in the "
                f"{place}."
            ),
            f"The {role} in the {place} was {one}. Everybody said that the {role} was {two}.",
        ]
    )


def work(rng):
    role, does = rng.choice(w.WORKERS)
    return rng.choice(
        [
            f"{w.capital(w.a(role))} {does}.",
            f"The {role} of the village {does}.",
            f"{rng.choice(w.PEOPLE)} is {w.a(role)} and {does}.",
            (
                f'"Who {does}?" asked {rng.choice(w.PEOPLE)}. "{w.capital(w.a(role))}," said '
                f"{rng.choice(w.PEOPLE)}."
            ),
        ]
    )


def story(rng):
    """Running text in which the words of a synonym pair are used interchangeably."""
    person, role, place = rng.choice(w.PEOPLE), rng.choice(w.ROLES), rng.choice(w.PLACES)
    adjective = rng.choice(rng.choice(w.ADJECTIVE_PAIRS))
    verb, noun = rng.choice(w.SYNONYMS[-26:-11]), rng.choice(w.SYNONYMS[-11:])
    return rng.choice(
        [
            (
                f"{person} met {w.a(adjective)} {role} in the {place}. They wanted to "
                f"{rng.choice(verb)} near the {rng.choice(noun)}."
            ),
            f"The {rng.choice(noun)} was {adjective}. {person} had to {rng.choice(verb)} at once.",
            f"Please {rng.choice(verb)} before the {role} does. The {place} is {adjective} today.",
            f"A {rng.choice(noun)} in the {place} can be very {adjective}, thought the {role}.",
        ]
    )


def echo(rng):
    """Words of all kinds, said twice.

    This teaches a small model to look back and copy.
    """
    words = " ".join(rng.sample(WORDS, rng.randint(4, 9)))
    one, two = rng.sample(w.PEOPLE, 2)
    return rng.choice(
        [
            f"{one} read: {words}. {two} repeated: {words}.",
            f'"{words}," said {one}. "{words}," said {two}.',
        ]
    )


WORDS = [
    *w.PEOPLE,
    *w.PLACES,
    *w.ROLES,
    *w.THINGS,
    *w.CATEGORY_OF,
    *(word for pair in w.SYNONYMS for word in pair),
]
STATEMENTS = {
    synonym_fact: 4,
    antonym_fact: 3,
    capital_fact: 3,
    category_fact: 4,
    odd_one: 3,
    review: 2,
    tenses: 2,
    whereabouts: 3,
    listing: 2,
    sizes: 2,
    reworded: 2,
    work: 2,
    story: 3,
    echo: 6,
}


def question(rng):
    """Returns a text (may be empty), a question about it or about the world, and the answer."""
    person = rng.choice(w.PEOPLE)
    one, two = rng.sample(rng.choice(w.SYNONYMS), 2)
    good, bad = rng.sample(rng.choice(w.ANTONYMS), 2)
    country, city = rng.choice(w.CAPITALS)
    member = rng.choice(list(w.CATEGORY_OF))
    role, does = rng.choice(w.WORKERS)
    kind = w.PLURAL[w.CATEGORY_OF[member]]
    say = rng.choice
    return say(
        [
            lambda: (
                "",
                say([f"How else can one say {one}?", f"Who knows a word like {one}?"]),
                say([f"One can say {two} instead of {one}.", f"Another word for {one} is {two}."]),
            ),
            lambda: (
                "",
                f"What would be the contrary of {good}?",
                say(
                    [
                        f"{w.capital(bad)} is the contrary of {good}.",
                        f"The opposite of {good} is {bad}.",
                    ]
                ),
            ),
            lambda: (
                "",
                f"Where does the government of {country} sit?",
                say(
                    [
                        f"The government of {country} sits in {city}.",
                        f"The capital of {country} is {city}.",
                    ]
                ),
            ),
            lambda: (
                "",
                f"Which country is governed from {city}?",
                say(
                    [f"{country} is governed from {city}.", f"{city} is the capital of {country}."]
                ),
            ),
            lambda: (
                "",
                f"To which kind of things does {member} belong?",
                say(
                    [f"{w.capital(member)} belongs to the {kind}.", f"{w.capital(w.is_a(member))}."]
                ),
            ),
            lambda: (
                "",
                f"Tell me the work of {w.a(role)}!",
                say([f"The {role} {does}.", f"{w.capital(w.a(role))} {does}."]),
            ),
            lambda: (
                "",
                f"Whose work is it if somebody {does}?",
                say([f"The {role} {does}.", f"{w.capital(w.a(role))} {does}."]),
            ),
            lambda: about_sizes(rng),
            lambda: about_scene(rng, person),
            lambda: about_scene(rng, person),
            lambda: about_list(rng),
            lambda: about_list(rng),
            lambda: about_review(rng),
            lambda: about_sentence(rng),
            lambda: about_sentence(rng),
        ]
    )()


def about_sizes(rng):
    small, large = sorted(rng.sample(w.SIZES, 2), key=w.SIZES.index)
    one, two = rng.sample([small, large], 2)
    answers = [
        f"The bigger one is {w.a(large)}, not {w.a(small)}.",
        f"{w.capital(w.a(large))} is larger than {w.a(small)}.",
    ]
    return "", f"Is {w.a(one)} or {w.a(two)} the bigger one?", rng.choice(answers)


def about_scene(rng, person):
    people, places = (
        [person, *rng.sample([p for p in w.PEOPLE if p != person], 2)],
        rng.sample(w.PLACES, 3),
    )
    lines = [f"{who} is in the {place}." for who, place in zip(people, places, strict=True)]
    rng.shuffle(lines)
    ask = rng.choice([f"Who knows where {person} may be?", f"Where should one look for {person}?"])
    return " ".join(lines), ask, f"{person} {rng.choice(['must be', 'is'])} in the {places[0]}."


def about_list(rng):
    kind, other = rng.sample(list(w.MEMBERS), 2)
    one, two, three = rng.sample(w.MEMBERS[kind], 3)
    odd = rng.choice(w.MEMBERS[other])
    if rng.random() < 0.5:
        thing = rng.choice(w.THINGS)
        text = f"The {one} and the {thing} were near the {two}."
        return (
            text,
            f"Which {w.PLURAL[kind]} stood there?",
            f"The {w.PLURAL[kind]} there were {one} and {two}.",
        )
    words = rng.sample([one, two, three, odd], 4)
    answers = [f"It is {odd}, for the rest are {w.PLURAL[kind]}."]
    answers += [f"The odd one out is {odd}, because the others are {w.PLURAL[kind]}."]
    return ", ".join(words) + ".", "Which one is not like the rest?", rng.choice(answers)


def about_review(rng):
    verdict, words = rng.choice([("good", w.PRAISE), ("bad", w.BLAME)])
    (first, second), (one, two) = rng.sample(w.REVIEWED, 2), rng.sample(words, 2)
    return (
        f"The {first} was {one}, and the {second} was {two}.",
        "Is that good or bad?",
        f"That is {verdict}.",
    )


def about_sentence(rng):
    role, thing, place = rng.choice(w.ROLES), rng.choice(w.THINGS), rng.choice(w.PLACES)
    if rng.random() < 0.5:
        verb = rng.choice(list(w.PAST))
        text = f"The {role} {verb} the {thing}."
        return (
            text,
            "And how was it yesterday?",
            f"Yesterday the {role} {w.PAST[verb]} the {thing}.",
        )
    one, two = rng.sample(rng.choice(w.ADJECTIVE_PAIRS), 2)
    text = f"The {one} {role} is in the {place}."
    return text, f"Say it without the word {one}!", f"So the {two} {role} is in the {place}."


def exchange(rng):
    """Writes a question and, after other talk, its answer.

    So the model has to find again what was asked.
    """
    text, ask, answer = question(rng)

    def talk():
        kinds = rng.choices(list(STATEMENTS), STATEMENTS.values(), k=rng.choice([0, 0, 1, 2]))
        return " ".join(kind(rng) for kind in kinds)

    one, two = rng.sample(w.PEOPLE, 2)
    parts = rng.choice(
        [
            [text, f'"{ask}" asked {one}.', talk(), f'"{answer}" said {two}.'],
            [
                f'"{ask}" said the teacher.',
                text,
                talk(),
                f"{one} thought about it and said: {answer}",
            ],
            [
                f"{one} wrote a task for {two}: {ask}",
                text,
                talk(),
                f"{two} wrote below it: {answer}",
            ],
            [f"Task. {ask}", text, talk(), f"Solution. {answer}"],
        ]
    )
    return " ".join(part for part in parts if part)


def document(rng: random.Random) -> str:
    """Writes one to four statements about the world, or one or two exchanges."""
    if rng.random() < 0.6:
        return " ".join(exchange(rng) for _ in range(rng.randint(1, 2)))
    return " ".join(
        kind(rng)
        for kind in rng.choices(list(STATEMENTS), STATEMENTS.values(), k=rng.randint(1, 4))
    )


# ---- tokenizer and model -------------------------------------------------------------------------


def make_tokenizer(rng: random.Random, words: list[str]) -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE tokenizer on the world's text and on the words of instructions."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=2048,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([document(rng) for _ in range(30_000)] + words, trainer)
    bos = ("<s>", tokenizer.token_to_id("<s>"))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[bos]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        model_max_length=1024,
    )


def blocks(rng: random.Random, tokenizer: PreTrainedTokenizerFast):
    """Yields endless batches [BATCH, BLOCK] of token ids.

    Documents are joined by the end-of-sequence token.
    """
    ids: list[int] = []
    need = BATCH * BLOCK
    while True:
        while len(ids) < need:
            for encoded in tokenizer([document(rng) for _ in range(256)])["input_ids"]:
                ids += [*encoded, tokenizer.eos_token_id]
        yield torch.tensor(ids[:need]).view(BATCH, BLOCK)
        ids = ids[need:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=HERE / "tiny-base")
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--learning_rate", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    rng = random.Random(args.seed)
    torch.manual_seed(args.seed)
    records = json.loads((HERE / "instructions" / "train.json").read_text())
    tokenizer = make_tokenizer(
        rng, [format_prompt(record) + record["output"] for record in records]
    )
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=160,
            intermediate_size=432,
            num_hidden_layers=4,
            num_attention_heads=5,
            num_key_value_heads=5,
            max_position_embeddings=1024,
            tie_word_embeddings=False,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    print(
        (
            f"{len(tokenizer)} tokens, {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M "
            "parameters"
        ),
        flush=True,
    )

    decayed = [p for p in model.parameters() if p.dim() == 2]
    rest = [p for p in model.parameters() if p.dim() != 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.05}, {"params": rest, "weight_decay": 0.0}],
        betas=(0.9, 0.98),
    )
    warmup, started, mean = 100, time.time(), 0.0
    for step, batch in zip(range(args.steps), blocks(rng, tokenizer), strict=False):
        cosine = 0.5 * (1 + math.cos(math.pi * step / args.steps))
        for group in optimizer.param_groups:
            group["lr"] = args.learning_rate * min((step + 1) / warmup, 0.02 + 0.98 * cosine)
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        mean += (loss.item() - mean) / min(step + 1, 50)
        if (step + 1) % 100 == 0:
            rate = (step + 1) * batch.numel() / (time.time() - started)
            print(f"step {step + 1}: loss {mean:.3f}, {rate:,.0f} tokens/s", flush=True)
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    print(f"saved to {args.out}")


if __name__ == "__main__":
    main()
