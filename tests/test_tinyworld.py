"""The small village: repeatable, disjoint where it promises to be, and written in correct English.

The grammar checks know nothing of the templates: they read the finished text with rules of their own.
"""

import hashlib
import os
import re
import subprocess
import sys
from collections import Counter
from itertools import pairwise, product

import pytest

from jaxchat.data import tinyworld
from jaxchat.data.tinyworld import documents, facts, problems, world
from jaxchat.data.tinyworld.chance import partition
from jaxchat.data.tinyworld.documents import belongs_to
from jaxchat.data.tinyworld.english import HE, SHE, number_word, with_article
from jaxchat.data.tinyworld.problems import KINDS, Step, spelling_words

# SHA-256 of the sample below. Any change of the world changes it: read some documents, then renew it with
#   python -m tests.test_tinyworld
GOLDEN = "1cf8c6ea8972e135fe3cbc1c22a294b4eea6bcfa94266417349774f1915313ff"

PEOPLE = tuple(world.PEOPLE)
COLOURS = {thing.colour for thing in world.THINGS.values()} | {food.colour for food in world.FOODS.values()}
NUMBER_WORDS = {number_word(number): number for number in range(201)}


def digest() -> str:
    """The hash of a sample of everything that later stages rely on."""
    texts = [*documents("train", 200), *documents("val", 20), *documents("train", 20, seed=1)]
    texts += [repr(problem) for split in ("train", "test") for problem in problems(split, 40)]
    texts += [repr(fact) for fact in facts()]
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()


@pytest.fixture(scope="module")
def train() -> list[str]:
    return list(documents("train", 4000))


@pytest.fixture(scope="module")
def val() -> list[str]:
    return list(documents("val", 150))


@pytest.fixture(scope="module")
def text(train: list[str], val: list[str]) -> list[str]:
    return train + val


def sentences(document: str) -> list[str]:
    """The document cut at line ends and after a full stop, question or exclamation mark with its quotation mark."""
    return [s for line in document.split("\n") for s in re.split(r'(?<=[.!?]) |(?<=[.]") ', line)]


def test_documents_are_the_same_in_another_process_with_another_hash_seed():
    environment = {**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, __file__]
    other = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.strip()
    assert digest() == other == GOLDEN


def test_a_longer_stream_begins_with_the_shorter_one():
    assert list(documents("train", 60))[:30] == list(documents("train", 30))
    assert list(problems("train", 60, seed=4))[:30] == list(problems("train", 30, seed=4))
    assert tinyworld.document("val", 7) == list(documents("val", 8))[7]


def test_seeds_give_different_documents():
    assert not set(documents("train", 100)) & set(documents("train", 100, seed=1))


def test_an_unknown_split_is_refused():
    with pytest.raises(ValueError, match="'test' is neither 'train' nor 'val'"):
        tinyworld.document("test", 0)
    with pytest.raises(ValueError, match="'test' is neither 'train' nor 'val'"):
        documents("test")


def test_val_and_train_share_no_document_whatever_the_seed(train, val):
    assert not set(train) & set(val)
    assert all(belongs_to(document) == "val" for document in [*val, *documents("val", 50, seed=9)])
    assert all(belongs_to(document) == "train" for document in [*train, *documents("train", 200, seed=9)])


def test_train_and_test_problems_share_no_number_fact_and_no_word():
    sides = {split: list(problems(split, 600)) for split in ("train", "test")}
    assert {problem.question for problem in sides["train"]}.isdisjoint(problem.question for problem in sides["test"])
    train_keys = {key for problem in sides["train"] for key in problem.keys}
    assert all(partition(*key) == "train" for key in train_keys)
    assert all(any(partition(*key) == "test" for key in problem.keys) for problem in sides["test"])
    # What a train problem shows can never be all that a test problem asks.
    assert all(not set(problem.keys) <= train_keys for problem in sides["test"])


def test_test_problems_are_many_and_different():
    questions = [problem.question for problem in problems("test", 640)]
    assert len(set(questions)) == 640
    kinds = Counter(problem.kind for problem in problems("test", 640))
    assert kinds == dict.fromkeys(KINDS, 160)


def test_too_many_problems_are_refused_with_both_numbers():
    with pytest.raises(ValueError, match=r"no more than \d+ different problems .* asked for 100000"):
        list(problems("test", 100_000, kinds=("spelling",)))


def equations(document: str) -> list[Step]:
    """Every `a + b = c` and `seven plus five is twelve` of the text, checked to be right."""
    found = []
    for left, operation, right, result in re.findall(r"(\d+) ([-+*/]) (\d+) = (\d+)", document):
        found.append((int(left), operation, int(right), int(result)))
    spoken = {"plus": "+", "minus": "-", "times": "*", "divided by": "/"}
    number = r"(one hundred|[a-z]+(?:-[a-z]+)?)"
    for left, operation, right, result in re.findall(
        rf"(?i){number} (plus|minus|times|divided by) {number} is {number}", document
    ):
        if "what" in (left.lower(), result.lower()):
            continue
        terms = [NUMBER_WORDS[term.lower()] for term in (left, right, result)]
        found.append((terms[0], spoken[operation], terms[1], terms[2]))
    exact = {"+": lambda a, b: a + b, "-": lambda a, b: a - b, "*": lambda a, b: a * b, "/": lambda a, b: a / b}
    for left, operation, right, result in found:
        assert exact[operation](left, right) == result, document
    return [Step(left, operation, right) for left, operation, right, _ in found]


def test_arithmetic_in_the_text_is_right_and_never_from_the_test_side(text):
    steps = [step for document in text for step in equations(document)]
    assert len(steps) > 2000
    assert {step.operation for step in steps} == set("+-*/")
    assert all(partition(*step.key) == "train" for step in steps)


def test_every_equals_sign_of_the_text_was_checked(text):
    for document in text:
        assert document.count("=") == len(re.findall(r"\d+ [-+*/] \d+ = \d+", document))


def test_test_problems_do_not_occur_in_the_text(text):
    everything = "\n".join(text)
    for problem in problems("test", 400):
        assert problem.question not in everything
        assert problem.statement not in everything


def test_spelling_in_the_text_is_right_and_never_from_the_test_side(text):
    spelled = re.findall(r"[Tt]he word (\w+) is spelled (\w(?:-\w)+)", "\n".join(text))
    assert len(spelled) > 400
    assert all("-".join(word) == letters for word, letters in spelled)
    shown = {"".join(letters.split("-")) for letters in re.findall(r"\b\w(?:-\w)+\b", "\n".join(text))}
    assert shown == {word for word, _ in spelled}
    assert all(partition("spelling", word) == "train" for word in shown)
    assert 0.1 < sum(partition("spelling", word) == "test" for word in spelling_words()) / len(spelling_words()) < 0.2


def test_worked_solutions_end_with_the_right_answer():
    for problem in problems("train", 800):
        assert problem.solution.endswith(f"{problem.answer}.")
        steps = equations(problem.solution)
        if problem.kind == "spelling":
            word = str(problem.keys[0][1])
            answers = {"-".join(word), str(len(word)), word[0], word[-1]}
            assert problem.answer in answers
            assert re.search(rf"\b{word}\b", problem.question)
            continue
        assert int(problem.answer) == steps[-1].result
        assert len(steps) == (2 if problem.kind == "steps" else 1)
        assert tuple(step.key for step in steps) == problem.keys[: len(steps)]
        asked = [int(number) for number in re.findall(r"\d+", problem.question)]
        known = [steps[0].left, steps[0].right] + [step.right for step in steps[1:]]
        if re.search(r"\d", problem.question):
            assert sorted(asked) == sorted(known), problem
        assert len(steps) == 1 or steps[1].left == steps[0].result
        if problem.kind in ("word", "steps"):
            assert re.findall(r"\d+", problem.statement)[-1] == problem.answer


def test_a_number_fact_and_its_mirror_lie_on_the_same_side():
    for left, right in product(range(1, 21), repeat=2):
        sums = {Step(left, "+", right).key, Step(right, "+", left).key, Step(left + right, "-", left).key}
        products = {Step(left, "*", right).key, Step(right, "*", left).key, Step(left * right, "/", left).key}
        assert len(sums) == len(products) == 1


def test_facts_of_the_test_side_are_told_but_never_asked(text):
    everything = "\n".join(text)
    held_out = [fact for fact in facts() if fact.split == "test"]
    assert 0.1 < len(held_out) / len(facts()) < 0.2
    assert not [question for fact in held_out for question in fact.questions if question in everything]
    told = sum(any(form.format(s=f.subject, o=f.subject, p="") in everything for form in f.forms) for f in held_out)
    assert told > 0.6 * len(held_out)
    asked = sum(any(question in everything for question in f.questions) for f in facts() if f.split == "train")
    assert asked > 0.9 * (len(facts()) - len(held_out))


def test_every_sentence_starts_with_a_capital_and_ends_with_punctuation(text):
    for document in text:
        assert document == document.strip() and "  " not in document
        for sentence in sentences(document):
            assert re.match(r'"?[A-Z0-9]', sentence), sentence
            assert re.search(r'[.!?]"?$', sentence), sentence
            assert not re.search(r"[,;] [A-Z]\w+\"|\.\.|\{|\}| [.,!?]", sentence), sentence
        for line in document.split("\n"):
            assert line.count('"') % 2 == 0


def test_words_inside_a_sentence_are_small_unless_they_are_names(text):
    names = {*PEOPLE, *world.ANIMALS, *(day.name for day in world.DAYS), "Pebble", "Bay", "I"}
    for document in text:
        for sentence in sentences(document):
            for before, word in re.findall(r"([\w,:;']) ([A-Z][a-z]*)\b", sentence):
                assert word in names, (before, word, sentence)


def test_a_and_an_agree_with_the_next_sound(text):
    sounded_as_consonant = ("useful", "uniform", "unicorn", "one")
    pairs = {pair for document in text for pair in re.findall(r"\b([Aa]n?) ([A-Za-z]+)", document)}
    assert len(pairs) > 60
    for article, word in pairs:
        vowel = (word[0].lower() in "aeiou" and word not in sounded_as_consonant) or word == "hour"
        assert (article.lower() == "an") == vowel, (article, word)
    assert [with_article(w) for w in ("hour", "useful tool", "umbrella", "one", "house")] == [
        *("an hour", "a useful tool", "an umbrella", "a one", "a house")
    ]


def test_counted_nouns_agree_with_their_number(text):
    nouns = {food.singular: food.plural for food in world.FOODS.values()}
    nouns |= {
        n: f"{n}s" for n in ("coin", "shell", "stamp", "button", "book", "pencil", "flower", "stone", "card", "bag")
    }
    nouns |= {n: f"{n}s" for n in ("feather", "marble", "letter", "candle", "year", "friend")} | {"box": "boxes"}
    singulars, plurals = set(nouns), set(nouns.values())
    seen = set()
    for document in text:
        for number, noun in re.findall(r"\b(\d+) ([a-z]+)\b", document):
            if noun in singulars or noun in plurals:
                assert (noun in singulars) == (number == "1"), document
                seen.add(noun)
    assert len(seen & singulars) > 10 and len(seen & plurals) > 20


def test_verbs_agree_with_their_subject(text):
    one = rf"(?:he|she|it|{'|'.join([*PEOPLE, *world.ANIMALS])})"
    wrong = (
        rf"(?i)(?<!and )(?<!, )\b{one} (?:are|were|have|do|live|like|enjoy|love|sleep|work|need)\b",
        r"(?i)\b(?:they|we|you) (?:is|was|has|does|likes|lives|needs|goes)\b",
        rf"\b[A-Z]\w+ and (?:{'|'.join(PEOPLE)}) (?:is|was|has|does|likes|enjoys)\b",
        r"(?i)\b(?:did|can|could|will|may|not) (?:he|she|it|they|\w+) (?:has|is|was|likes|lives|needs|went)\b",
        r"\bthere was (?:pancakes|\d\d|[2-9])\b|\bthere were (?:1|a|an)\b",
        r"\b([a-z]+) \1\b",
    )
    for document in text:
        for sentence in sentences(document):
            for rule in wrong if "?" not in sentence else wrong[1:3]:
                assert not re.search(rule, sentence), sentence
            if "?" in sentence and not re.search(r"\bdo \w+ and \w+ have\b", sentence):
                assert not re.search(rf"(?i)\bdo {one}\b|\bdoes they\b|\bis (?:they|we)\b", sentence), sentence


EVERYBODY: tuple[world.Person | world.Animal, ...] = (*world.PEOPLE.values(), *world.ANIMALS.values())
GENDERED = {
    HE: ({somebody.name for somebody in EVERYBODY if somebody.pronouns is HE}, "he|him|his|himself"),
    SHE: ({somebody.name for somebody in EVERYBODY if somebody.pronouns is SHE}, "she|her|herself"),
}


@pytest.mark.parametrize("gender", GENDERED, ids=["he", "she"])
def test_a_pronoun_follows_a_name_it_can_stand_for(text, gender):
    names, pronouns = GENDERED[gender]
    checked = 0
    for document in text:
        for line in document.split("\n"):
            seen = False
            for word in re.findall(r"[A-Za-z]+", line):
                seen = seen or word in names
                if re.fullmatch(pronouns, word.lower()):
                    assert seen, line
                    checked += 1
    assert checked > 500


@pytest.mark.parametrize("gender", GENDERED, ids=["he", "she"])
def test_a_pronoun_at_the_start_of_a_sentence_can_mean_only_one_name(train, gender):
    names, _ = GENDERED[gender]
    checked = 0
    for document in train:
        said = sentences(document)
        for before, sentence in pairwise(said):
            if re.match(rf"{gender.subject}\b", sentence, re.IGNORECASE):
                candidates = set(re.findall(r"[A-Z][a-z]+", before)) & names
                assert len(candidates) <= 1, (before, sentence)
                checked += 1
    assert checked > 100


def test_stories_never_contradict_the_tables(text):
    people = "|".join(PEOPLE)
    own_colour = {thing.noun: thing.colour for thing in world.THINGS.values()}
    homes = {person.home for person in world.PEOPLE.values()}
    seen: Counter[str] = Counter()
    for document in text:
        for colour, noun in re.findall(rf"\b({'|'.join(COLOURS)}) (\w+)", document):
            if noun in own_colour:
                seen["colour"] += 1
                assert own_colour[noun] == colour, document
        for owner, noun in re.findall(rf"\b({people})'s (?:\w+ )?(\w+)\b", document):
            if noun in own_colour:
                seen["owner"] += 1
                assert f"{owner}'s {noun}" in world.THINGS, document
        for noun, where in re.findall(
            r"\b(?:put|carried)? ?the (?:\w+ )?(\w+) (?:home and put it )?back (\w+ [\w ]+)[.,]", document
        ):
            if noun in own_colour:
                seen["kept"] += 1
                (kept,) = [thing.kept for thing in world.THINGS.values() if thing.noun == noun]
                assert where == kept, document
        for name, home in re.findall(rf"\b({people}),? (?:who )?live[sd] ([a-z ]+)", document):
            seen["home"] += 1
            assert world.PEOPLE[name].home in home and world.PEOPLE[name].home in homes, document
        for one, other in re.findall(rf"\b({people}), ({people})'s best friend", document):
            seen["friend"] += 1
            assert world.PEOPLE[other].friend == one, document
        for name, age in re.findall(rf"\b({people}) (?:is|was|, who was now) (\d+) years old", document):
            seen["age"] += 1
            assert world.PEOPLE[name].age == int(age), document
        for name, job in re.findall(rf"\b({people}) (?:is|works as|was) an? ([a-z]+(?: keeper)?)\b", document):
            seen["job"] += 1
            assert world.PEOPLE[name].job == job, document
        for name, job in re.findall(rf"\b({people}) the (\w+)", document):
            seen["job"] += 1
            assert world.PEOPLE[name].job.endswith(job) or job == "lighthouse", document
        for name, place in re.findall(
            rf"\b({people}),? (?:who )?work(?:ed|s) (?:in|at|on) the ((?:old |post )?\w+)", document
        ):
            seen["work"] += 1
            assert world.PLACES[place].worker == name, document
        for name, species in re.findall(rf"\b({'|'.join(world.ANIMALS)}) the (\w+)", document):
            seen["species"] += 1
            assert world.ANIMALS[name].species == species, document
    assert {key for key, count in seen.items() if count > 15} >= {
        *("colour", "owner", "kept", "home", "friend", "age", "job", "work", "species")
    }


def test_a_thing_is_where_the_story_last_took_it(text):
    stories = [document for document in text if re.search(r"Where was the \w+ now\?", document)]
    assert len(stories) > 10
    for story in stories:
        before, after = re.split(r"Where was the \w+ now\? ", story)
        goals = re.findall(r" to the (\w+)\b", before)
        assert re.match(rf"It was \w+ the {goals[-1]}\.", after), story
        assert f" home from the {goals[-1]} and" in after


def test_the_tables_agree_with_each_other():
    for person in world.PEOPLE.values():
        assert world.PEOPLE[person.friend].friend == person.name
        assert person.dish in world.DISHES
        if person.parent is not None:
            assert world.PEOPLE[person.parent].home == person.home
        else:
            assert any(place.worker == person.name for place in world.PLACES.values()) or person.is_child
    assert all(animal.owner in {*PEOPLE, None} for animal in world.ANIMALS.values())
    assert {thing.owner for thing in world.THINGS.values()} == set(PEOPLE)
    assert all(place.worker in PEOPLE for place in world.PLACES.values())
    nouns = [thing.noun for thing in world.THINGS.values()]
    assert len(nouns) == len(set(nouns))
    keys = [(fact.subject, fact.relation) for fact in facts()]
    assert len(keys) == len(set(keys))
    assert all(fact.value in fact.answer for fact in facts())


def test_the_text_has_the_promised_size_and_vocabulary(train):
    words = Counter(re.findall(r"[a-z]+", "\n".join(train).lower()))
    assert 700 < len(words) < 2000
    mean = sum(len(document.encode()) for document in train) / len(train)
    assert 250 < mean < 450
    assert 6e6 < mean * tinyworld.TRAIN_DOCUMENTS < 10e6
    assert 0.15e6 < mean * tinyworld.VAL_DOCUMENTS < 0.3e6
    assert len(set(train)) > 0.99 * len(train)
    assert all(ord(character) < 128 for document in train for character in document)


if __name__ == "__main__":
    print(digest())
