"""Sentences whose names and pronouns agree: a Telling remembers whom it mentioned last."""

import random
from typing import Protocol

from jaxchat.data.tinyworld.chance import between, pick, sample
from jaxchat.data.tinyworld.english import Pronouns, capitalised


class Named(Protocol):
    """Anybody a story can talk about."""

    @property
    def name(self) -> str: ...

    @property
    def pronouns(self) -> Pronouns: ...


class Referent:
    """Somebody inside templates: `{a}` writes the name; `{a.they}`, `{a.them}`, `{a.their}` a pronoun if it is clear.

    A pronoun is clear when in this template and the one before it they, and nobody else of that pronoun, were
    mentioned; otherwise the name is written.
    """

    def __init__(self, telling: "Telling", somebody: Named):
        self._telling = telling
        self.name = somebody.name
        self.pronouns = somebody.pronouns

    def __format__(self, spec: str) -> str:
        self._telling.mention(self)
        return self.name

    @property
    def they(self) -> str:
        return self.pronouns.subject if self._telling.mention(self) else self.name

    @property
    def them(self) -> str:
        return self.pronouns.object if self._telling.mention(self) else self.name

    @property
    def their(self) -> str:
        return self.pronouns.possessive if self._telling.mention(self) else f"{self.name}'s"

    @property
    def self(self) -> str:
        self._telling.mention(self)
        return self.pronouns.reflexive


class Telling:
    """A text in the making: `know` the cast and props, then `say` templates about them."""

    def __init__(self, rng: random.Random):
        self.rng = rng
        self._sentences: list[str] = []
        self._known: dict[str, object] = {}
        self._mentioned: dict[Pronouns, set[str]] = {}
        self._mentioned_before: dict[Pronouns, set[str]] = {}

    def cast(self, **people: Named) -> None:
        """Makes people and animals known to the templates."""
        self._known.update({key: Referent(self, somebody) for key, somebody in people.items()})

    def know(self, **values: object) -> None:
        """Makes words known to the templates."""
        self._known.update(values)

    def name(self, key: str) -> str:
        """The name behind a template's key; counts as a mention."""
        return f"{self._known[key]}"

    def mention(self, referent: Referent) -> bool:
        """Records a mention; True where a pronoun would have been clear."""
        here = self._mentioned.setdefault(referent.pronouns, set())
        clear = here | self._mentioned_before.get(referent.pronouns, set()) == {referent.name}
        here.add(referent.name)
        return clear

    def say(self, *templates: str) -> None:
        """Adds one of the templates, filled in; a template is one sentence or a few."""
        self._mentioned_before, self._mentioned = self._mentioned, {}
        self._sentences.append(capitalised(pick(self.rng, templates).format_map(self._known)))

    def maybe(self, *templates: str) -> None:
        """Adds one of the templates every other time."""
        if self.rng.random() < 0.5:
            self.say(*templates)

    def chance(self, probability: float) -> bool:
        return self.rng.random() < probability

    def pick(self, options):
        return pick(self.rng, options)

    def sample(self, options, count: int):
        return sample(self.rng, options, count)

    def between(self, low: int, high: int) -> int:
        return between(self.rng, low, high)

    def text(self) -> str:
        return " ".join(self._sentences)
