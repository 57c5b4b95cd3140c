"""Stories about people, their things and their animals."""

from jaxchat.data.tinyworld import world
from jaxchat.data.tinyworld.english import joined, with_article
from jaxchat.data.tinyworld.problems import train_steps
from jaxchat.data.tinyworld.telling import Telling
from jaxchat.data.tinyworld.world import ANIMALS, DISHES, FOODS, OPEN_AIR, PEOPLE, PLACES, THINGS, Person, Thing

ALL_PEOPLE = tuple(PEOPLE.values())
ALL_THINGS = tuple(THINGS.values())
HARD = ("wood", "brass", "tin", "iron", "steel", "glass", "china", "straw")
CHILDREN = tuple(person for person in ALL_PEOPLE if person.is_child)
TAME = tuple(animal for animal in ANIMALS.values() if animal.owner is not None)


def know_thing(t: Telling, thing: Thing) -> None:
    """Tells the templates about the thing: `{thing}` is the red kite, `{noun}` the kite."""
    t.know(thing=thing.name, noun=thing.noun, colour=thing.colour, kept=thing.kept, use=thing.use)
    t.know(material=thing.material, a_noun=with_article(thing.noun))
    t.know(day=t.pick(world.DAYS).name, daytime=t.pick(("morning", "afternoon", "evening")))


def other_than(t: Telling, *people: Person) -> Person:
    """Somebody else."""
    return t.pick([person for person in ALL_PEOPLE if person not in people])


def closing(t: Telling) -> None:
    """A last sentence that fits every story with a happy end."""
    t.maybe(
        "It had been a good day.",
        "Everybody in Pebble Bay slept well that night.",
        "That was the best part of the day.",
        "{a} told the story again at supper.",
    )


def lost_and_found(t: Telling) -> None:
    thing = t.pick(ALL_THINGS)
    owner, friend = PEOPLE[thing.owner], PEOPLE[PEOPLE[thing.owner].friend]
    first, second = t.sample([place for place in PLACES.values() if place.worker not in (owner.name, friend.name)], 2)
    t.cast(a=owner, b=friend, c=PEOPLE[second.worker])
    know_thing(t, thing)
    t.know(
        first_at=first.at, first_sight=first.sight, second=second.name, second_at=second.at, second_sight=second.sight
    )
    t.know(found=t.pick(OPEN_AIR))
    t.say(
        "One {daytime} {a} could not find {a.their} {thing}.",
        "On {day} {a} lost {a.their} {thing}.",
        '"Where is my {noun}?" asked {a} one {daytime}. {a.their} {thing} was gone.',
    )
    t.say(
        "It was not {kept}, where {a.they} always kept it.",
        "{a.they} looked {kept}, but it was not there.",
        "It should have been {kept}, but that place was empty.",
    )
    t.say(
        "{b}, {a.their} best friend, came to help.",
        '"Do not worry," said {b}. "We will find it together."',
        "{a.they} ran to {b} and asked for help.",
    )
    t.say(
        "First they looked {first_at}, but they saw only {first_sight}.",
        "They began {first_at}. They saw {first_sight}, but no {noun}.",
    )
    t.say(
        "Then they went to the {second}. They saw {second_sight}, but no {noun}.",
        "Next they asked {c}, who worked {second_at}. {c.they} had not seen the {noun}.",
    )
    t.maybe(
        "{a.they} was almost crying.",
        "{a.they} sat down and thought hard.",
        '"Think," said {b}. "Where were you yesterday?"',
    )
    t.say("At last {b} saw something {colour} {found}.", "Then, {found}, {a} saw something {colour}.")
    t.say("It was the {noun}!", "There lay the {noun}, safe and sound.")
    t.say("{a.they} was so happy that {a.they} hugged {b}.", '"Thank you," said {a}. "You are a good friend."')
    t.say("{a.they} carried the {noun} home and put it back {kept}.", "Now the {thing} is back {kept}.")
    closing(t)


def carried_about(t: Telling) -> None:
    thing = t.pick(ALL_THINGS)
    owner = PEOPLE[thing.owner]
    friend = PEOPLE[owner.friend]
    t.cast(a=owner, b=friend, c=other_than(t, owner, friend))
    know_thing(t, thing)
    stops = t.sample(OPEN_AIR, t.between(2, 3))
    t.say("In the morning the {thing} was {kept}.", "On {day} morning {a} looked {kept} and took the {thing}.")
    for index, stop in enumerate(stops):
        t.know(at=stop, goal=stop.partition(" ")[2])
        if index == 0:
            t.say("{a.they} took it to {goal}.", "{a} carried the {noun} to {goal}.")
            t.say("There {a.they} met {b}, and they talked for a while.", "{b} was already {at} and wanted to see it.")
        elif index == 1:
            t.say("{b} took the {noun} and went to {goal} with it.", "Then {b} carried it to {goal}.")
            t.say("It was windy {at}, so {b.they} put the {noun} on the ground.", "The {thing} lay {at} for an hour.")
        else:
            t.say("Later {c} found it there and brought it to {goal}.", "{c} picked it up and ran to {goal} with it.")
    t.say("Where was the {noun} now? It was {at}.", '"Where is my {noun}?" asked {a}. "It is {at}," said {c}.')
    t.say("In the evening {a} carried the {noun} home from {goal} and put it back {kept}.")


def lending(t: Telling) -> None:
    thing = t.pick(ALL_THINGS)
    owner = PEOPLE[thing.owner]
    t.cast(a=owner, b=other_than(t, owner))
    know_thing(t, thing)
    t.say(
        "{b} needed {a_noun} for {use}, but {b.they} did not have one.",
        "One {daytime} {b} came to see {a}.",
        "On {day} {b} knocked on the door of {a}.",
    )
    t.say(
        '"May I borrow your {noun}?" asked {b}.',
        '"Your {noun} is just right for {use}," said {b}. "May I borrow it?"',
    )
    t.say(
        "{a.they} went and took the {thing} from its place. It was {kept}.",
        '"Of course," said {a}. "It is {kept}."',
        '"Yes, but please be careful," said {a}. "It is made of {material}."',
    )
    t.say("{b.they} used the {noun} all day and took good care of it.", "{b.they} was very careful with the {thing}.")
    t.maybe("{b.they} even cleaned it with a soft cloth.", "Many people asked {b} about the {noun}.")
    t.know(gift=t.pick(tuple(FOODS.values())).plural)
    t.say(
        "In the evening {b} brought the {noun} back, with a bag of {gift} to say thank you.",
        "The next morning {b} brought it back and gave {a} some {gift}.",
    )
    t.say("{a.they} put the {noun} back {kept}.", "Soon the {thing} was {kept} again.")
    t.say("Good friends share what they have.", "{a} and {b} ate the {gift} together.")


def repair(t: Telling) -> None:
    thing = t.pick([thing for thing in ALL_THINGS if thing.owner != "Felix" and thing.material in HARD])
    owner = PEOPLE[thing.owner]
    t.cast(a=owner, b=PEOPLE["Felix"])
    know_thing(t, thing)
    t.say("One {daytime} {a} saw that {a.their} {thing} was broken.", "On {day} {a} dropped {a.their} {thing}.")
    t.say("There was a big crack in it.", "A piece of it came off.")
    t.say(
        "{a.they} needed it for {use}, so this was bad news.",
        '"What shall I do?" said {a}. "I need it for {use}."',
    )
    t.say("{a.they} took the {noun} to the workshop, where {b} the carpenter was working.")
    t.say(
        "There were curls of wood on the floor and the air smelled of glue.",
        "{b.they} looked at the {noun} for a while.",
    )
    t.say('"I can mend that," said {b}.', '"Sit down and wait," said {b}. "This will not take long."')
    t.say(
        "{b.they} took {b.their} black hammer out of the toolbox and went to work.",
        "{b.they} worked with small nails and a lot of patience.",
    )
    t.say("After an hour the {thing} was as good as new.", "Soon the {noun} was whole again.")
    t.say("{a.they} paid with a warm loaf of bread.", '"How can I thank you?" asked {a}. {b.they} only laughed.')
    t.say("At home {a} put the {noun} back {kept}.", "That night the {thing} was {kept} again.")


def sharing(t: Telling) -> None:
    food = t.pick(tuple(FOODS.values()))
    step = t.pick(train_steps("/", (4, 24), (2, 4)))
    host, *guests = t.sample(ALL_PEOPLE, step.right)
    t.cast(a=host, b=guests[0])
    t.know(
        total=step.left, share=step.result, one=food.singular, many=food.plural, taste=food.taste, equation=step.digits
    )
    t.know(place=t.pick(OPEN_AIR), company=joined([guest.name for guest in guests]), heads=step.right)
    t.know(portion=f"{step.result} {food.singular if step.result == 1 else food.plural}")
    t.say(
        "{a} had a basket with {total} {many} in it.",
        "One afternoon {a} picked {total} {many}.",
        "{a} sat {place} with {total} {many}.",
    )
    if len(guests) == 1:
        t.say("{b.they} came by and was hungry.", "Then {b} came along the road.")
    else:
        t.say("{company} came by and were hungry.", "Then {company} came along the road.")
    t.say('"Those look good," said {b}.', '"May I have one?" asked {b}.')
    t.say('"Let us share," said {a}.', "{a.they} did not want to eat alone.")
    t.say(
        "{a.they} counted the {many}: {equation}.",
        "There were {heads} of them, and {equation}.",
    )
    t.say("So each of them got {portion}.", "Everybody got {portion}.")
    t.say("The {many} tasted {taste}.", "They ate {place} and talked about the sea.")
    t.say("Nothing was left, and nobody was hungry.", "Food tastes better when you share it.")


def birthday(t: Telling) -> None:
    person = t.pick(ALL_PEOPLE)
    friend = PEOPLE[person.friend]
    t.cast(a=person, b=friend)
    t.know(age=person.age, colour=person.colour, dish=person.dish, home=person.home, hobby=person.hobby)
    t.know(
        gift=t.pick(
            ("a painted box", "a pair of gloves", "a coat", "a bowl", "a chair", "a pair of socks", "a cushion")
        )
    )
    t.say("Today {a} was {age} years old.", "It was the birthday of {a}, who was now {age} years old.")
    t.say(
        "In the morning the sun shone {home}.", "{a.they} woke up early and listened.", "There was singing at the door."
    )
    t.say(
        "{b.they} came first, because {b} was {a.their} best friend.",
        "{b}, {a.their} best friend, knocked at the door.",
    )
    t.say(
        "{b.they} had brought {gift}, all in {colour}.",
        '"This is for you," said {b}. It was {gift}, and it was all {colour}.',
    )
    t.say("{colour} was {a.their} favourite colour.", '"{colour} is the colour I like best!" said {a}.')
    t.say("At noon they had {dish}, which {a} liked best of all.", "Then they ate {dish}, {a.their} favourite food.")
    t.maybe("{a.they} blew out {age} candles.", "Everybody wanted some more, but soon the plates were empty.")
    t.say("In the evening there was time for {hobby}.", "After supper they danced until the moon came up.")
    closing(t)


def runaway(t: Telling) -> None:
    animal = t.pick(TAME)
    owner = PEOPLE[str(animal.owner)]
    place = t.pick(tuple(place for place in PLACES.values() if place.worker != owner.name))
    t.cast(a=animal, b=owner, c=PEOPLE[place.worker])
    t.know(species=animal.species, home=animal.home, food=animal.food, at=place.at, sight=place.sight, place=place.name)
    t.know(a_species=with_article(f"{animal.colour} {animal.species}"))
    t.know(search=t.pick([where for where in OPEN_AIR if where != animal.home]))
    t.say("{a} the {species} was not {home}.", "One morning {b} looked {home}, but {a} the {species} was gone.")
    t.say("{b.they} called and called.", '"Where are you, {a}?" called {b}.', "{b.they} was afraid and put on a coat.")
    t.say(
        "{b.they} looked {search}, but nobody was there.", "{b.they} looked {search} and found only some small tracks."
    )
    t.maybe("The wind was cold and the day was short.", "A gull cried, and far away a bell rang.")
    t.say(
        "Then {c} came running from the {place}.",
        "Then {b} met {c}, who worked {at}.",
    )
    t.say('"There is {a_species} {at}!" said {c}.')
    t.say("They went there quietly. They saw {sight}, and in the middle sat {a}.")
    t.say("{b.they} held out some {food}.", "{b.they} had brought {food}, because {a} liked that best.")
    t.say("{a.they} came at once and ate it all.", "{a.they} came closer, step by step, and began to eat.")
    t.say("{b.they} took {a} home, and soon {a} was asleep {home}.", "That night {a} slept {home}, as always.")


def trick(t: Telling) -> None:
    animal = t.pick(TAME)
    owner = PEOPLE[str(animal.owner)]
    t.cast(a=animal, b=owner, c=other_than(t, owner))
    t.know(species=with_article(animal.species), food=animal.food, trick=animal.trick, place=t.pick(OPEN_AIR))
    t.say("{b} had {species} called {a}.", "{a} was {species}, and {b} looked after {a.them}.")
    t.say("{a.they} could {trick}, but nobody had ever seen it.", "All summer {b} taught {a} to {trick}.")
    t.say('"Animals cannot learn that," said {c}.', '"I do not believe it," said {c}.')
    t.say("So one afternoon they all met {place}.", "So {b} asked everybody to come and see.")
    t.say("First {a} only looked at the people.", "First {a} sat down and yawned.", "First nothing happened.")
    t.say("Then {b} showed {a} some {food}.", "Then {b} said a quiet word.")
    t.say("And {a} did it! {a.they} really could {trick}.", "Slowly {a} stood up, and everybody saw that it was true.")
    t.say("{c.they} clapped and laughed.", '"Now I believe it," said {c}.', "{c.they} could hardly speak.")
    t.say("{a.they} got {food}, and {b} was very proud.")


def quarrel(t: Telling) -> None:
    child = t.pick(CHILDREN)
    friend = PEOPLE[child.friend]
    thing = t.pick([thing for thing in ALL_THINGS if thing.owner == child.name])
    t.cast(a=child, b=friend, c=PEOPLE["Ida"])
    know_thing(t, thing)
    t.know(hobby=friend.hobby, place=t.pick(OPEN_AIR))
    t.say("{a} and {b} were best friends, but on {day} they had a quarrel.", "One {daytime} {a} and {b} met {place}.")
    t.say("Both of them wanted to use the {thing}.", "{a.they} had brought {a.their} {thing}, and {b} wanted it too.")
    t.say('"It is mine!" shouted {a}.', '"You had it all day," said {b}.')
    t.say("{b.they} pulled at one side and {a} pulled at the other.", "They did not speak to each other for an hour.")
    t.say("Then {c} came by. {c.they} was their teacher, and she sat down between them.")
    t.say('"{a_noun} is for {use}, not for fighting," said {c}.')
    t.say(
        "So they made a plan. First {a} used the {noun}, and then {b} had a turn.",
        '"You are right," said {b}. "I am sorry."',
    )
    t.say("In the end they both laughed about it.", "After that they were friends again.")
    t.say("In the evening the {thing} was back {kept}.", "{a.they} put the {noun} back {kept}.")


def sick_day(t: Telling) -> None:
    person = t.pick([person for person in ALL_PEOPLE if person.name not in ("Vera", "Max", "Omar")])
    friend = PEOPLE[person.friend]
    dish = t.pick([dish for dish in DISHES.values() if dish.pot == "pot"])
    t.cast(a=person, b=friend, c=PEOPLE["Vera"])
    t.know(home=person.home, dish=dish.name, hobby=person.hobby)
    t.say("{a} did not get up that morning.", "{a} woke up with a hot head and a red nose.", "{a} had a bad cold.")
    t.say("{c} the doctor came with her black bag.", "Somebody called {c}, the doctor.")
    t.say('"Open your mouth," said {c}. "Now say ah."', "{c.they} listened to the heart and looked at the tongue.")
    t.say('"Stay in bed for two days," said {c}.', '"You need sleep and something warm," said {c}.')
    t.say("At noon {b}, {a.their} best friend, came with a pot of {dish}.", "Then {b} brought some hot {dish}.")
    t.say("{a.they} ate a little and slept a lot.", "{a.they} slept until the evening.")
    t.maybe("Outside the wind sang in the trees.", "The house was warm and quiet.")
    t.say("After two days {a} felt well again and went back to {hobby}.", "Soon {a} was well and could laugh again.")


PLOTS = (
    lost_and_found,
    lost_and_found,
    carried_about,
    lending,
    repair,
    sharing,
    birthday,
    runaway,
    trick,
    quarrel,
    sick_day,
)
