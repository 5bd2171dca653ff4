"""Variants of probes: every probe has some, they keep or change the answer as they say, and nothing else."""

import pytest

from replacement.demo.corpus import behaviours, state_of
from replacement.demo.corpus.agreement import NOUNS
from replacement.demo.corpus.variants import KINDS, variants

BY_NAME = {behaviour.name: behaviour for behaviour in behaviours()}
KNOWN = {probe.prompt: probe.answers for behaviour in BY_NAME.values() for probe in behaviour.probes}


def last(prompt: str) -> str:
    return prompt.rpartition(" ")[2]


@pytest.mark.parametrize("name", BY_NAME)
def test_every_probe_has_variants_of_its_own_template(name: str) -> None:
    for probe in BY_NAME[name].probes:
        made = variants(probe.prompt, 3)
        assert made
        assert set(made) <= set(KINDS)
        for prompts in made.values():
            assert 1 <= len(prompts) <= 3
            assert len(set(prompts)) == len(prompts)
            assert probe.prompt not in prompts
            assert all(variants(prompt, 1) for prompt in prompts), "variants are of a template, too"


def test_answers_are_kept_or_changed() -> None:
    cities = [probe.prompt.removesuffix(" is").removeprefix("the capital of the state containing ") for probe in
              BY_NAME["two-hop geography"].probes]  # fmt: skip
    for city in cities[:20]:
        made = variants(f"the capital of the state containing {city} is", 4)
        places = {
            kind: [p.removesuffix(" is").removeprefix("the capital of the state containing ") for p in prompts]
            for kind, prompts in made.items()
        }
        assert {state_of(place) for place in places["same answer"]} == {state_of(city)}
        assert state_of(city) not in {state_of(place) for place in places["other answer"]}
    number = {word: place for pair in NOUNS for place, word in enumerate(pair)}
    made = variants("the keys near the cabinet", 5)
    assert {number[prompt.split()[1]] for prompt in made["same answer"]} == {1}
    assert {number[prompt.split()[1]] for prompt in made["other answer"]} == {0}
    made = variants("the war lasted from 1732 to 17", 3)
    assert all("from 1732 to 17" in prompt for prompt in (*made["same answer"], *made["paraphrase"]))
    assert made["paraphrase"] == ("the war went on from 1732 to 17",)
    for prompt in made["other answer"]:
        assert last(prompt) == prompt.split()[4][:2] != "17", "a century stays one"
    assert set(variants("36 + 59 =", 2)) == {"other answer"}


def test_a_word_that_returns_is_exchanged_everywhere() -> None:
    made = variants("when Mary and John went to the store , John gave a book to", 6)
    for prompt in made["other answer"]:
        words = prompt.split()
        assert words[3] == words[9] != words[1]
        assert not {"Mary", "John"} & set(words)
        assert "store" in words
    for prompt in made["same answer"]:
        assert prompt.startswith("when Mary and John went to the ")
        assert "store" not in prompt
    for prompt in variants("Mary boat park Mary boat", 4)["other answer"]:
        words = prompt.split()
        assert words[:2] == words[3:]
        assert len(set(words)) == 3


def test_another_prompt_has_none_and_seeds_draw_others() -> None:
    assert variants("once upon a time", 3) == {}
    assert variants("the capital of the state containing Atlantis is", 3) == {}
    prompt = "36 + 59 ="
    assert variants(prompt, 3) == variants(prompt, 3)
    assert variants(prompt, 3) != variants(prompt, 3, seed=1)
