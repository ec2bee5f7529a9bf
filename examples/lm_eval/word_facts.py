"""Multiple-choice questions with four choices, made from the held-out instructions.

An example: is another word for truthful honest, or one of three words of other records?
"""

from datasets import Dataset

KINDS = ("synonym", "antonym", "capital")  # kinds of sentences whose last word is the fact


def process_docs(data: Dataset) -> Dataset:
    """Returns a row per record of these kinds.

    A row has the beginning of the sentence, the choices (each with its space), and the index of the
    right choice as the answer.
    """
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
