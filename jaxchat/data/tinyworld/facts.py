"""Every fact of the world as data, with the ways to state it and to ask for it."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

from jaxchat.data.tinyworld import world
from jaxchat.data.tinyworld.chance import Split, partition
from jaxchat.data.tinyworld.english import HE, IT, Pronouns, capitalised, joined, number_word, with_article


@dataclass(frozen=True)
class Fact:
    """One cell of the tables: `value` is what a right answer must contain.

    In forms and questions `{s}` is the subject, `{o}` the same as an object and `{p}` its possessive; the value and
    everything else is already filled in.
    """

    subject: str
    relation: str
    value: str
    forms: tuple[str, ...]
    asks: tuple[str, ...]
    pronouns: Pronouns = IT

    @property
    def split(self) -> Split:
        """Facts of the test side are told in the pretraining text, but nobody asks for them there."""
        return partition("question", self.subject, self.relation)

    @property
    def answer(self) -> str:
        """The fact as one whole sentence that needs no context."""
        return self.state(0)

    @property
    def questions(self) -> tuple[str, ...]:
        return tuple(self._filled(ask, pronoun=False) for ask in self.asks)

    def state(self, form: int, *, pronoun: bool = False) -> str:
        """The fact in one of its phrasings, about `Mia` or about `she`."""
        return self._filled(self.forms[form % len(self.forms)], pronoun=pronoun)

    def _filled(self, template: str, *, pronoun: bool) -> str:
        if pronoun:
            named = {"s": self.pronouns.subject, "o": self.pronouns.object, "p": self.pronouns.possessive}
        else:
            named = {"s": self.subject, "o": self.subject, "p": f"{self.subject}'s"}
        return capitalised(template.format(**named))


# Relation, value, forms, questions.
Row = tuple[str, str, tuple[str, ...], tuple[str, ...]]


def parent_word(parent: world.Person) -> str:
    """`mother`, `father` or, past sixty, `grandfather` and `grandmother`."""
    word = "father" if parent.pronouns is HE else "mother"
    return f"grand{word}" if parent.age > 60 else word


def _of_people() -> Iterator[Fact]:
    for person in world.PEOPLE.values():
        table: list[Row] = [
            (
                "home",
                person.home,
                (f"{{s}} lives {person.home}.", f"{{p}} home is {person.home}.", f"{{s}} sleeps {person.home}."),
                ("Where does {s} live?", "Where is {p} home?"),
            ),
            (
                "age",
                str(person.age),
                (f"{{s}} is {person.age} years old.", f"{{s}} is {number_word(person.age)} years old."),
                ("How old is {s}?",),
            ),
            (
                "friend",
                person.friend,
                (f"{{p}} best friend is {person.friend}.", f"{{s}} and {person.friend} are best friends."),
                ("Who is {p} best friend?",),
            ),
            (
                "dish",
                person.dish,
                (
                    f"{{p}} favourite food is {person.dish}.",
                    f"{{s}} loves {person.dish}.",
                    f"{{s}} likes {person.dish} best of all.",
                ),
                ("What is {p} favourite food?", "What does {s} like to eat best?"),
            ),
            (
                "colour",
                person.colour,
                (f"{{p}} favourite colour is {person.colour}.", f"The colour {{s}} likes best is {person.colour}."),
                ("What is {p} favourite colour?", "Which colour does {s} like best?"),
            ),
            (
                "hobby",
                person.hobby,
                (f"{{s}} enjoys {person.hobby}.", f"In the evening {{s}} enjoys {person.hobby}."),
                ("What does {s} enjoy?", "What does {s} enjoy in the evening?"),
            ),
        ]
        if person.parent is None:
            job = with_article(person.job)
            table.append(("job", person.job, (f"{{s}} is {job}.", f"{{s}} works as {job}."), ("What is {p} job?",)))
        else:
            word = parent_word(world.PEOPLE[person.parent])
            forms = (f"{{p}} {word} is {person.parent}.", f"{person.parent} is {{p}} {word}.")
            table.append(("parent", person.parent, forms, (f"Who is {{p}} {word}?",)))
        for row in table:
            yield Fact(person.name, *row, person.pronouns)


def _of_animals() -> Iterator[Fact]:
    for animal in world.ANIMALS.values():
        kind = with_article(animal.species)
        table: list[Row] = [
            ("species", animal.species, (f"{{s}} is {kind}.",), ("What animal is {s}?", "What kind of animal is {s}?")),
            ("colour", animal.colour, (f"{{s}} is {animal.colour}.",), ("What colour is {s}?",)),
            (
                "sleeps",
                animal.home,
                (f"{{s}} sleeps {animal.home}.", f"At night {{s}} sleeps {animal.home}."),
                ("Where does {s} sleep?", "Where does {s} sleep at night?"),
            ),
            (
                "food",
                animal.food,
                (f"{{s}} likes to eat {animal.food}.", f"{{p}} favourite food is {animal.food}."),
                ("What does {s} like to eat?", "What is {p} favourite food?"),
            ),
            (
                "sound",
                animal.sound,
                (f"{{s}} {animal.sound} when visitors come.", f"When visitors come, {{s}} {animal.sound}."),
                ("What does {s} do when visitors come?",),
            ),
            (
                "trick",
                animal.trick,
                (f"{{s}} can {animal.trick}.", f"{{s}} has learned to {animal.trick}."),
                ("What trick can {s} do?", "What has {s} learned to do?"),
            ),
        ]
        if animal.owner is not None:
            forms = (f"{{s}} belongs to {animal.owner}.", f"{animal.owner} looks after {{o}}.")
            table.append(("owner", animal.owner, forms, ("Who looks after {o}?", f"Whose {animal.species} is {{s}}?")))
        for row in table:
            yield Fact(animal.name, *row, animal.pronouns)


def _of_places() -> Iterator[Fact]:
    for place in world.PLACES.values():
        subject = f"the {place.name}"
        near = f"near the {place.near}"
        yield Fact(subject, "near", near, (f"{{s}} is {near}.", f"You can find {{o}} {near}."), ("Where is {s}?",))
        forms = (f"{{s}} is full of {place.holds}.", f"You can find {place.holds} {place.at}.")
        yield Fact(subject, "holds", place.holds, forms, ("What is {s} full of?", f"What can you find {place.at}?"))
        forms = (f"{place.worker} works {place.at}.", f"The person who works {place.at} is {place.worker}.")
        yield Fact(subject, "worker", place.worker, forms, (f"Who works {place.at}?",))


def _of_things() -> Iterator[Fact]:
    for subject, thing in world.THINGS.items():
        owner = world.PEOPLE[thing.owner]
        own = owner.pronouns.possessive
        a_thing = with_article(thing.noun)
        forms = (f"{{s}} is {thing.colour}.", f"{owner.name} has {with_article(thing.name)}.")
        yield Fact(subject, "colour", thing.colour, forms, ("What colour is {s}?",))
        forms = (f"{{s}} is made of {thing.material}.", f"{owner.name} has {a_thing} made of {thing.material}.")
        yield Fact(subject, "material", thing.material, forms, ("What is {s} made of?",))
        forms = (f"{{s}} is kept {thing.kept}.", f"{owner.name} keeps {own} {thing.noun} {thing.kept}.")
        asks = ("Where is {s} kept?", f"Where does {owner.name} keep {own} {thing.noun}?")
        yield Fact(subject, "kept", thing.kept, forms, asks)
        forms = (f"{{s}} is for {thing.use}.", f"{owner.name} has {a_thing} for {thing.use}.")
        yield Fact(subject, "use", thing.use, forms, ("What is {s} for?",))


def _of_foods() -> Iterator[Fact]:
    for food in world.FOODS.values():
        one, many = with_article(food.singular), food.plural
        forms = (f"{one} is {food.colour}.", f"{many} are {food.colour}.")
        yield Fact(one, "colour", food.colour, forms, (f"What colour is {one}?", f"What colour are {many}?"))
        forms = (f"{one} tastes {food.taste}.", f"{many} taste {food.taste}.")
        yield Fact(one, "taste", food.taste, forms, (f"How does {one} taste?", f"How do {many} taste?"))
        coins = f"{food.price} {'coin' if food.price == 1 else 'coins'}"
        forms = (f"{one} costs {coins}.", f"At the market {one} costs {coins}.")
        yield Fact(one, "price", coins, forms, (f"How much does {one} cost?", f"What is the price of {one}?"))


def _of_dishes_and_days() -> Iterator[Fact]:
    for dish in world.DISHES.values():
        needs = joined(dish.ingredients)
        forms = (f"To make {dish.name}, you need {needs}.", f"You make {dish.name} from {needs}.")
        asks = (f"What do you need to make {dish.name}?", f"What do you make {dish.name} from?")
        yield Fact(dish.name, "ingredients", needs, forms, asks)
        pot = with_article(dish.pot)
        forms = (f"You make {dish.name} in {pot}.", f"To make {dish.name}, you need {pot}.")
        yield Fact(dish.name, "pot", dish.pot, forms, (f"What do you make {dish.name} in?",))
    for index, day in enumerate(world.DAYS):
        after = world.DAYS[(index + 1) % len(world.DAYS)].name
        forms = (f"On {day.name} {day.event}.", f"Every {day.name} {day.event}.")
        yield Fact(day.name, "event", day.event, forms, (f"What happens on {day.name}?",))
        forms = (f"The day after {day.name} is {after}.", f"{after} comes after {day.name}.")
        yield Fact(day.name, "next", after, forms, (f"Which day comes after {day.name}?",))


@cache
def facts() -> tuple[Fact, ...]:
    """All facts, in table order."""
    makers = (_of_people, _of_animals, _of_places, _of_things, _of_foods, _of_dishes_and_days)
    return tuple(fact for maker in makers for fact in maker())


@cache
def facts_by_subject() -> dict[str, tuple[Fact, ...]]:
    """The facts of each person, animal, place, thing, food, dish and day."""
    grouped: dict[str, list[Fact]] = {}
    for fact in facts():
        grouped.setdefault(fact.subject, []).append(fact)
    return {subject: tuple(group) for subject, group in grouped.items()}
