"""Names of lists of words in front of labels."""

from pathlib import Path

import pytest

from replacement.demo.corpus import vocabulary
from replacement.demo.corpus import word_lists as demo_lists
from replacement.index.claims import Claim
from replacement.index.word_lists import heading, word_lists

LISTS = {
    "Texas": frozenset({"dallas", "houston", "austin", "texas"}),
    "city": frozenset({"dallas", "houston", "austin", "boston", "salem"}),
    "question": frozenset({"which", "who"}),
}


@pytest.mark.parametrize(
    ("conditions", "name"),
    [
        ({"word": ["Dallas", "Houston", "Texas"]}, "Texas: "),
        ({"word": ["Dallas", "Boston", "Salem"]}, "city: "),
        ({"word": ["Dallas", "Houston", "Austin"]}, "Texas: "),
        ({"word": ["Dallas", "the", "a"]}, ""),  # few values are in a list
        ({"word": ["Dallas"]}, ""),  # a list of one word needs no name
        ({"previous": ["which", "who"]}, "after question: "),
        ({"word": ["Boston", "Salem", "Austin"], "first": ["Who", "which"]}, "city in question sentences: "),
        ({"current": ["is"], "earlier": ["Dallas", "Texas"]}, "with Texas earlier: "),
    ],
)
def test_the_name_of_the_list_that_fits_best(conditions: dict[str, list[str]], name: str) -> None:
    assert heading(Claim.of(**conditions), LISTS) == name


def test_lists_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "lists.csv"
    file.write_text('Texas, Dallas, "El Paso"\n\nquestion,which,who\n')
    expected = {"Texas": frozenset({"dallas", "el paso"}), "question": frozenset({"which", "who"})}
    assert word_lists(str(file), "text.txt") == word_lists(str(file), "demo") == expected


@pytest.mark.parametrize("line", ["Texas", "Texas,Dallas", "Texas,Dallas,Dallas", ",Dallas,Houston"])
def test_lines_that_name_no_list(tmp_path: Path, line: str) -> None:
    file = tmp_path / "lists.csv"
    file.write_text(f"question,which,who\n{line}\n")
    with pytest.raises(ValueError, match=r"lists\.csv, line 2: expected `name,word,word,\.\.\.`, got "):
        word_lists(str(file), "demo")


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"word lists: .*lists\.csv cannot be read"):
        word_lists(str(tmp_path / "lists.csv"), "demo")


def test_lists_of_the_demo() -> None:
    assert "dallas" in word_lists(None, "demo")["Texas"]
    assert word_lists(None, "text.txt") == {}
    known = set(vocabulary())
    assert all(word in known for words in demo_lists().values() for word in words)
