"""Questions of four choices from the held-out instructions: is another word for truthful honest, or one of other records'?"""

from datasets import Dataset

KINDS = ("synonym", "antonym", "capital")  # of sentences whose last word is the fact


def process_docs(data: Dataset) -> Dataset:
    """A row per record of these kinds: beginning, choices (each with its space), answer (the place of the right one)."""
    rows = []
    for kind in KINDS:
        sentences = [
            record["output"].rstrip(".").rpartition(" ")
            for record in data
            if record["id"].startswith(f"{kind}/")
        ]
        words = sorted({word for _, _, word in sentences})
        for number, (beginning, _, word) in enumerate(sentences):
            place = words.index(word)
            choices = [words[(place + step) % len(words)] for step in (1, 2, 3)]
            choices.insert(number % 4, word)
            rows.append({"beginning": beginning, "choices": choices, "answer": number % 4})
    return Dataset.from_list(rows)
