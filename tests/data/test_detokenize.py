"""Word tokens become plain text by the stated rule."""

import pytest

from stanford_alpaca.data.detokenize import plain_text
from stanford_alpaca.data.formats import load_records


@pytest.mark.parametrize(
    ("text", "want"),
    [
        (
            " It weighs 0 @.@ 7 to 2 @,@ 200 kg , in a well @-@ known way . ",
            "It weighs 0.7 to 2,200 kg, in a well-known way.",
        ),
        (" A <unk> lobster . It is blue ( 24 in ) ; so ! ", "It is blue (24 in); so!"),
        (' He said " lobster red " and " no " . ', 'He said "lobster red" and "no".'),
        (
            " The players ' union did n't see the cat 's £ 5 . ",
            "The players' union didn't see the cat's £5.",
        ),
        (" = Title = \n \n <unk> only . \n Plain . ", "= Title =\n\nPlain."),
        ("Already plain, isn't it?", "Already plain, isn't it?"),
        ("", ""),
    ],
)
def test_by_hand(text, want):
    assert plain_text(text) == want
    assert plain_text(want) == want


def test_documents_are_found_before_their_titles_change(tmp_path):
    (tmp_path / "wiki.txt").write_text(
        " = One = \n \n It is red @-@ blue . \n \n = Two = \n \n A <unk> . \n It is old . \n"
    )
    cache = str(tmp_path / "cache")
    found = load_records(tmp_path / "wiki.txt", cache, detokenize=True)["text"]
    assert list(found) == ["= One =\n\nIt is red-blue.", "= Two =\n\nIt is old."]
    plain = load_records(tmp_path / "wiki.txt", cache)["text"]
    assert len(plain) == 2 and "@-@" in plain[0]
