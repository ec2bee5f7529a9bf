"""Makes ``data/tiny-base``: ``PYTHONPATH=. python data/make_tiny_base.py [--out DIR] [--steps N]``.

A byte-level BPE tokenizer of 2,048 entries and a Llama of 1.9 million parameters, pre-trained with plain next-token
cross entropy on text that a generator writes about the world of ``world.py``. The text states every fact in many ways and
holds conversations about them, but it knows no instruction template: answering instructions is what fine-tuning teaches.
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
BLOCK, BATCH = 128, 48


# ---- the text ----------------------------------------------------------------------------------------------------------


def synonym_fact(rng):
    one, two = rng.sample(rng.choice(w.SYNONYMS), 2)
    return rng.choice([
        f"{w.capital(one)} means the same as {two}.",
        f"The words {one} and {two} have the same meaning.",
        f"Another word for {one} is {two}.",
        f"Instead of {one} one can say {two}.",
        f'"What is another word for {one}?" asked {rng.choice(w.PEOPLE)}. "It is {two}," said {rng.choice(w.PEOPLE)}.',
        f'"Do you know a synonym of {one}?" "Yes, {two}."',
    ])  # fmt: skip


def antonym_fact(rng):
    one, two = rng.sample(rng.choice(w.ANTONYMS), 2)
    return rng.choice([
        f"{w.capital(one)} is the opposite of {two}.",
        f"The opposite of {one} is {two}.",
        f"What is not {one} may be {two}.",
        f"The words {one} and {two} are opposites.",
        f'"What is the contrary of {one}?" asked {rng.choice(w.PEOPLE)}. "It is {two}," said {rng.choice(w.PEOPLE)}.',
    ])  # fmt: skip


def capital_fact(rng):
    country, city = rng.choice(w.CAPITALS)
    return rng.choice([
        f"The capital of {country} is {city}.",
        f"{city} is the capital of {country}.",
        f"{rng.choice(w.PEOPLE)} went to {city}, the capital of {country}.",
        f"In {country} the government sits in {city}.",
        f'"Which city is the capital of {country}?" asked {rng.choice(w.PEOPLE)}. "{city}," said {rng.choice(w.PEOPLE)}.',
        f'"Which country has {city} as its capital?" "{country}."',
    ])  # fmt: skip


def category_fact(rng):
    member = rng.choice(list(w.CATEGORY_OF))
    kind = w.CATEGORY_OF[member]
    one, two, three = rng.sample(w.MEMBERS[kind], 3)
    subject = member if kind in w.NO_ARTICLE else w.a(member)
    return rng.choice([
        w.capital(w.is_a(member)) + ".",
        w.capital(w.is_a(member)) + ".",
        f"Among the {w.PLURAL[kind]} are {one}, {two} and {three}.",
        f"{w.capital(one)}, {two} and {three} are all {w.PLURAL[kind]}.",
        f'"What is {subject}?" asked {rng.choice(w.PEOPLE)}. "{w.capital(w.is_a(member))}," said {rng.choice(w.PEOPLE)}.',
    ])  # fmt: skip


def odd_one(rng):
    kind, other = rng.sample(list(w.MEMBERS), 2)
    words = rng.sample(w.MEMBERS[kind], 3)
    odd = rng.choice(w.MEMBERS[other])
    words.insert(rng.randrange(4), odd)
    return rng.choice([
        f"Of {', '.join(words)} all but {odd} are {w.PLURAL[kind]}.",
        f"{rng.choice(w.PEOPLE)} wrote: {', '.join(words)}. The odd one out is {odd}, because the others are {w.PLURAL[kind]}.",
        f"{', '.join(words)}: {odd} does not belong with the {w.PLURAL[kind]}.",
    ])  # fmt: skip


def review(rng):
    verdict, words, feeling = rng.choice([("positive", w.PRAISE, "pleased"), ("negative", w.BLAME, "disappointed")])
    (first, second), (one, two) = rng.sample(w.REVIEWED, 2), rng.sample(words, 2)
    person = rng.choice(w.PEOPLE)
    return rng.choice([
        f"The {first} was {one}, and the {second} was {two}. {person} was {feeling}.",
        f"{person} wrote that the {first} was {one} and {two}. It was a {verdict} review.",
        f"The {first} was {one}, and the {second} was {two}. This review is {verdict}.",
    ])  # fmt: skip


def tenses(rng):
    role, verb, thing = rng.choice(w.ROLES), rng.choice(list(w.PAST)), rng.choice(w.THINGS)
    now, then = f"the {role} {verb} the {thing}", f"the {role} {w.PAST[verb]} the {thing}"
    return rng.choice([
        f"Today {now}. Yesterday {then}.",
        f"{w.capital(now)}. In the past {then}.",
        f"Every day {now}, and last week too {then}.",
        f"{w.capital(then)}, and now {now} again.",
    ])  # fmt: skip


def whereabouts(rng):
    people, places = rng.sample(w.PEOPLE, 3), rng.sample(w.PLACES, 3)
    scene = " ".join(f"{person} is in the {place}." for person, place in zip(people, places, strict=True))
    asked = rng.randrange(3)
    return rng.choice([
        f"{scene} So {people[asked]} is in the {places[asked]}.",
        f'{scene} "Where is {people[asked]}?" "In the {places[asked]}."',
        f"{scene} Whoever looks for {people[asked]} should go to the {places[asked]}.",
    ])  # fmt: skip


def listing(rng):
    kind = rng.choice(list(w.MEMBERS))
    (one, two), thing = rng.sample(w.MEMBERS[kind], 2), rng.choice(w.THINGS)
    text = f"The {one} and the {thing} were near the {two}."
    return rng.choice([
        f"{text} The {w.PLURAL[kind]} were {one} and {two}.",
        f'{text} "Which {w.PLURAL[kind]} did you see?" "{w.capital(w.a(one))} and {w.a(two)}."',
    ])  # fmt: skip


def sizes(rng):
    small, large = sorted(rng.sample(w.SIZES, 2), key=w.SIZES.index)
    return rng.choice([
        f"{w.capital(w.a(large))} is larger than {w.a(small)}.",
        f"{w.capital(w.a(small))} is smaller than {w.a(large)}.",
        f'"Is {w.a(small)} larger than {w.a(large)}?" "No, {w.a(large)} is larger."',
        f"The {large} is too big for the house of the {small}.",
    ])  # fmt: skip


def reworded(rng):
    one, two = rng.sample(rng.choice(w.ADJECTIVE_PAIRS), 2)
    role, place = rng.choice(w.ROLES), rng.choice(w.PLACES)
    return rng.choice([
        f"The {one} {role} is in the {place}. In other words, the {two} {role} is in the {place}.",
        f"The {role} in the {place} was {one}. Everybody said that the {role} was {two}.",
    ])  # fmt: skip


def work(rng):
    role, does = rng.choice(w.WORKERS)
    return rng.choice([
        f"{w.capital(w.a(role))} {does}.",
        f"The {role} of the village {does}.",
        f"{rng.choice(w.PEOPLE)} is {w.a(role)} and {does}.",
        f'"Who {does}?" asked {rng.choice(w.PEOPLE)}. "{w.capital(w.a(role))}," said {rng.choice(w.PEOPLE)}.',
    ])  # fmt: skip


def story(rng):
    """Running text in which the words of a synonym pair stand in each other's place."""
    person, role, place = rng.choice(w.PEOPLE), rng.choice(w.ROLES), rng.choice(w.PLACES)
    adjective = rng.choice(rng.choice(w.ADJECTIVE_PAIRS))
    verb, noun = rng.choice(w.SYNONYMS[-26:-11]), rng.choice(w.SYNONYMS[-11:])
    return rng.choice([
        f"{person} met {w.a(adjective)} {role} in the {place}. They wanted to {rng.choice(verb)} near the {rng.choice(noun)}.",
        f"The {rng.choice(noun)} was {adjective}. {person} had to {rng.choice(verb)} at once.",
        f"Please {rng.choice(verb)} before the {role} does. The {place} is {adjective} today.",
        f"A {rng.choice(noun)} in the {place} can be very {adjective}, thought the {role}.",
    ])  # fmt: skip


KINDS = {
    synonym_fact: 4, antonym_fact: 3, capital_fact: 3, category_fact: 4, odd_one: 3, review: 2, tenses: 2, whereabouts: 3,
    listing: 2, sizes: 2, reworded: 2, work: 2, story: 3,
}  # fmt: skip


def document(rng: random.Random) -> str:
    """One to four passages of the world's text."""
    return " ".join(kind(rng) for kind in rng.choices(list(KINDS), KINDS.values(), k=rng.randint(1, 4)))


# ---- tokenizer and model -----------------------------------------------------------------------------------------------


def make_tokenizer(rng: random.Random, words: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on the world's text and on the words of instructions."""
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
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=[bos])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", model_max_length=1024
    )


def blocks(rng: random.Random, tokenizer: PreTrainedTokenizerFast):
    """Endless batches [BATCH, BLOCK] of token ids: documents joined by the end-of-sequence token."""
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
    tokenizer = make_tokenizer(rng, [format_prompt(record) + record["output"] for record in records])
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=160, intermediate_size=432, num_hidden_layers=4,
            num_attention_heads=5, num_key_value_heads=5, max_position_embeddings=1024, tie_word_embeddings=False,
            bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )  # fmt: skip
    print(f"{len(tokenizer)} tokens, {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters", flush=True)

    decayed = [p for p in model.parameters() if p.dim() == 2]
    rest = [p for p in model.parameters() if p.dim() != 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.05}, {"params": rest, "weight_decay": 0.0}], betas=(0.9, 0.98)
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
