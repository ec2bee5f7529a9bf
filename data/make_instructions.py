"""Writes the shipped instruction set: ``python data/make_instructions.py [--out DIR] [--seed N]``.

It has twelve task families over the facts of ``world.py``, in Alpaca form. A *content key* names
what an example is about, whatever its wording: the pair of synonyms, the four words of an
odd-one-out, or the places of three people. Keys are split before any example is worded. So
``train.json`` never asks a question of ``held_out.json`` in other words.
"""

import argparse
import json
import random
from pathlib import Path

import world as w

TRAIN_PER_FAMILY, HELD_OUT_PER_FAMILY = 170, 21


def synonym(rng, pair):
    word, answer = rng.sample(pair, 2)
    ask = [
        "Give a synonym of {}.",
        "What is another word for {}?",
        "Which word has the same meaning as {}?",
    ]
    return rng.choice(ask).format(word), "", f"Another word for {word} is {answer}."


def antonym(rng, pair):
    word, answer = rng.sample(pair, 2)
    ask = [
        "Give the opposite of {}.",
        "What is the opposite of {}?",
        "Which word means the contrary of {}?",
    ]
    return rng.choice(ask).format(word), "", f"The opposite of {word} is {answer}."


def capital(rng, pair):
    country, city = pair
    if rng.random() < 0.5:
        ask = ["What is the capital of {}?", "Name the capital of {}."]
        return rng.choice(ask).format(country), "", f"The capital of {country} is {city}."
    ask = ["Of which country is {} the capital?", "Name the country whose capital is {}."]
    return rng.choice(ask).format(city), "", f"{city} is the capital of {country}."


def category(rng, member):
    subject = member if w.CATEGORY_OF[member] in w.NO_ARTICLE else w.a(member)
    ask = ["What kind of thing is {}?", "Say what {} is.", "Which category does {} belong to?"]
    return rng.choice(ask).format(subject), "", w.capital(w.is_a(member)) + "."


def odd_one_out(rng, words):
    (*_, odd), listed = words, rng.sample(words, len(words))
    others = w.PLURAL[w.CATEGORY_OF[words[0]]]
    ask = [
        "Find the odd one out.",
        "Which word does not belong with the others?",
        "Which of these words is different in kind?",
    ]
    reason = f"pieces of {others}" if others == "furniture" else others
    return (
        rng.choice(ask),
        ", ".join(listed),
        f"The odd one out is {odd}, because the others are {reason}.",
    )


def sentiment(rng, review):
    verdict, (first, one), (second, two) = review
    ask = [
        "Is the review positive or negative?",
        "Classify the sentiment of this review.",
        "Does the writer praise or blame?",
    ]
    text = f"The {first} was {one}, and the {second} was {two}."
    return rng.choice(ask), text, f"The review is {verdict}."


def past_tense(rng, sentence):
    role, verb, thing = sentence
    ask = [
        "Rewrite the sentence in the past tense.",
        "Put the sentence into the past.",
        "Change the verb to the past tense.",
    ]
    return (
        rng.choice(ask),
        f"The {role} {verb} the {thing}.",
        f"The {role} {w.PAST[verb]} the {thing}.",
    )


def where(rng, scene):
    whereabouts = list(scene)
    person, place = whereabouts[0]
    rng.shuffle(whereabouts)
    ask = ["Where is {}?", "In which place is {}?", "Use the text to say where {} is."]
    text = " ".join(f"{somebody} is in the {somewhere}." for somebody, somewhere in whereabouts)
    return rng.choice(ask).format(person), text, f"{person} is in the {place}."


def extract(rng, scene):
    kind, first, second, thing = scene
    ask = [
        "Which {} are in the sentence?",
        "List the {} that the sentence names.",
        "Extract the {}.",
    ]
    text = f"The {first} and the {thing} were near the {second}."
    return (
        rng.choice(ask).format(w.PLURAL[kind]),
        text,
        f"The {w.PLURAL[kind]} are {first} and {second}.",
    )


def larger(rng, pair):
    small, large = sorted(pair, key=w.SIZES.index)
    one, two = rng.sample(pair, 2)
    ask = [
        "Which is larger, {} or {}?",
        "Compare the size of {} and {}.",
        "Of {} and {}, which is the larger?",
    ]
    return (
        rng.choice(ask).format(w.a(one), w.a(two)),
        "",
        f"{w.capital(w.a(large))} is larger than {w.a(small)}.",
    )


def replace(rng, scene):
    pair, noun, place = scene
    word, answer = rng.sample(pair, 2)
    ask = [
        "Replace {} by a word with the same meaning.",
        "Rewrite the sentence without the word {}, keeping its meaning.",
    ]
    return (
        rng.choice(ask).format(word),
        f"The {word} {noun} is in the {place}.",
        f"The {answer} {noun} is in the {place}.",
    )


def worker(rng, pair):
    role, work = pair
    if rng.random() < 0.5:
        ask = ["What does {} do?", "Describe the work of {}."]
        return rng.choice(ask).format(w.a(role)), "", f"{w.capital(w.a(role))} {work}."
    ask = ["Who {}?", "Name the one who {}."]
    return rng.choice(ask).format(work), "", f"{w.capital(w.a(role))} {work}."


def contents(rng: random.Random) -> dict:
    """Returns the contents that each family can ask about.

    It lists all of them, or samples some where there are too many to list.
    """
    kinds = list(w.MEMBERS)

    def odd():
        kind, other = rng.sample(kinds, 2)
        return (*rng.sample(w.MEMBERS[kind], 3), rng.choice(w.MEMBERS[other]))

    def review():
        verdict, words = rng.choice([("positive", w.PRAISE), ("negative", w.BLAME)])
        return (verdict, *zip(rng.sample(w.REVIEWED, 2), rng.sample(words, 2), strict=True))

    def named():
        kind = rng.choice(["animal", "bird", "fruit", "tool", "vehicle", "garment"])
        return (kind, *rng.sample(w.MEMBERS[kind], 2), rng.choice(w.THINGS))

    def many(make):
        return list({key_of(content): content for content in (make() for _ in range(400))}.values())

    return {
        synonym: w.SYNONYMS,
        antonym: w.ANTONYMS,
        capital: w.CAPITALS,
        category: list(w.CATEGORY_OF),
        odd_one_out: many(odd),
        sentiment: many(review),
        past_tense: many(
            lambda: (rng.choice(w.ROLES), rng.choice(list(w.PAST)), rng.choice(w.THINGS))
        ),
        where: many(
            lambda: tuple(zip(rng.sample(w.PEOPLE, 3), rng.sample(w.PLACES, 3), strict=True))
        ),
        extract: many(named),
        larger: [[one, two] for i, one in enumerate(w.SIZES) for two in w.SIZES[i + 1 :]],
        replace: [(pair, rng.choice(w.ROLES), rng.choice(w.PLACES)) for pair in w.ADJECTIVE_PAIRS],
        worker: w.WORKERS,
    }


def key_of(content) -> str:
    """Returns a name for what an example is about, independent of order.

    Two examples with the same key differ only in their words.
    """
    if isinstance(content, str):
        return content
    return "+".join(sorted(key_of(part) for part in content))


def examples(rng: random.Random, make, chosen: list, count: int) -> list[dict]:
    """Returns up to ``count`` different examples about the chosen contents.

    Every content is used once before any is used again.
    """
    found: dict[tuple, dict] = {}
    for attempt in range(20 * count):
        content = chosen[attempt % len(chosen)]
        instruction, text, output = make(rng, content)
        name = f"{make.__name__}/{key_of(content).replace(' ', '_')}"
        found.setdefault(
            (instruction, text),
            {"instruction": instruction, "input": text, "output": output, "id": name},
        )
        if len(found) == count:
            break
    return list(found.values())


def build(seed: int = 0) -> dict[str, list[dict]]:
    """Returns the two sets, ``train`` and ``held_out``.

    They hold Alpaca records with an ``id`` made of the family and the content key.
    """
    rng = random.Random(seed)
    sets: dict[str, list[dict]] = {"train": [], "held_out": []}
    families = contents(rng)
    # `replace` also asks for synonyms, so both families hold out the same pairs.
    held_synonyms = rng.sample(w.SYNONYMS, 20)
    for make, everything in families.items():
        everything = rng.sample(everything, len(everything))
        if make in (synonym, replace):
            held = [
                content
                for content in everything
                if (content if make is synonym else content[0]) in held_synonyms
            ]
        else:
            held = everything[: min(HELD_OUT_PER_FAMILY, max(8, len(everything) // 6))]
        rest = [content for content in everything if content not in held]
        sets["held_out"] += examples(rng, make, held, HELD_OUT_PER_FAMILY)
        sets["train"] += examples(rng, make, rest, TRAIN_PER_FAMILY)
    for records in sets.values():
        rng.shuffle(records)
    return sets


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "instructions")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for name, records in build(args.seed).items():
        lines = ",\n".join(json.dumps(record, ensure_ascii=False) for record in records)
        (args.out / f"{name}.json").write_text(f"[\n{lines}\n]\n", encoding="utf-8")
        print(f"{args.out / name}.json: {len(records)} examples")


if __name__ == "__main__":
    main()
