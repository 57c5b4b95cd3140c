"""Stories about the days of the village: weather, market, kitchen, school, work and play."""

from jaxchat.data.tinyworld.english import joined
from jaxchat.data.tinyworld.plots_things import ALL_PEOPLE, CHILDREN, closing, other_than
from jaxchat.data.tinyworld.problems import partition, spelled, spelling_words, train_steps
from jaxchat.data.tinyworld.telling import Telling
from jaxchat.data.tinyworld.world import ANIMALS, DAYS, DISHES, FOODS, OPEN_AIR, PEOPLE, PLACES

GARDEN = ("carrot", "potato", "tomato", "onion", "bean", "pumpkin", "strawberry", "radish")
# Opening, what it does to the village, what people say, how it ends.
WEATHER = (
    (
        "Rain fell on the roofs of Pebble Bay",
        "The road was full of puddles, and the flowers drank",
        "I do not mind the rain",
        "Then the clouds opened, and there was a rainbow over the sea",
    ),
    (
        "A strong wind blew from the sea",
        "Hats flew over the wall, and the trees bent down",
        "Hold on to your hat",
        "In the evening the wind lay down, and the sea was flat like a mirror",
    ),
    (
        "In the night it had snowed",
        "The whole village was white and very quiet",
        "Let us build a snowman",
        "When the sun went down, the snow was blue and the windows were yellow",
    ),
    (
        "Thick fog lay over the harbour",
        "Nobody could see the lighthouse, and the ships rang their bells",
        "I cannot even see my own feet",
        "At noon the sun came through, and the ships were all there",
    ),
    (
        "It was the hottest day of the summer",
        "The dogs slept in the shade, and the road was dusty",
        "Let us put our feet in the water",
        "At night everybody sat outside and counted the stars",
    ),
    (
        "A storm was coming, and the sky was dark",
        "The waves were high, and the boats pulled at their ropes",
        "Come in and close the windows",
        "In the morning the sky was blue again, and the beach was full of shells",
    ),
)


def weather(t: Telling) -> None:
    opening, effect, remark, ending = t.pick(WEATHER)
    person = t.pick(ALL_PEOPLE)
    place = t.pick(tuple(PLACES.values()))
    t.cast(a=person, b=PEOPLE[person.friend])
    t.know(opening=opening, effect=effect, remark=remark, ending=ending, at=place.at, place=place.name)
    t.know(home=person.home, sight=place.sight, hobby=person.hobby, dish=PEOPLE[person.friend].dish)
    t.say("{opening}.")
    t.say("{effect}.")
    t.say("{a.they} stood at the window and looked out.", "{a}, who lived {home}, opened the door.")
    t.say("{a.they} wanted to go to the {place}, where {b} was waiting.", "{a.they} had to meet {b} {at}.")
    t.say('"{remark}," said {a}.')
    t.maybe("On the way {a.they} saw a small bird under a leaf.", "On the way {a} sang a song.")
    t.say("{b} was sitting {at} and waved.", "When {a} came, {b} was already there.")
    t.say("They sat together and ate {dish}.", "They talked about {hobby} and forgot the time.")
    t.say("{ending}.")


def market(t: Telling) -> None:
    buyer = t.pick([person for person in ALL_PEOPLE if person.name != "Clara"])
    dish = DISHES[buyer.dish]
    food = t.pick(tuple(FOODS.values()))
    step = t.pick(train_steps("*", (2, 9), (food.price, food.price))) if food.price > 1 else None
    number = step.left if step is not None else t.between(2, 9)
    t.cast(a=buyer, b=PEOPLE["Clara"])
    t.know(many=food.plural, taste=food.taste, number=number, total=number * food.price, colour=food.colour)
    t.know(price="1 coin" if food.price == 1 else f"{food.price} coins", one=food.singular, dish=dish.name)
    t.know(equation=step.digits if step is not None else "", home=buyer.home)
    t.say("It was Saturday, and everybody went to the market.", "On Saturday {a} took a basket and went to the market.")
    t.say("There were baskets of ripe fruit, and people were talking and laughing.", "The market was full of colours.")
    t.say(
        '"Good morning, {b}," said {a}. "How much are the {many}?"',
        "{a.they} stopped and looked at the {colour} {many}.",
    )
    t.say(
        '"One {one} costs {price}," said {b}.',
        '"They are fresh today," said {b}. "Each one costs {price}."',
    )
    t.say('"Then I will take {number} {many}," said {a}.', '"Please give me {number} of them," said {a}.')
    if step is not None:
        t.say("{b.they} counted: {equation}.", "That made {total} coins, because {equation}.")
    t.say("{a.they} paid {total} coins.", "{a.they} put {total} coins into the hand of {b}.")
    t.maybe("{b.they} put a flower on top for nothing.", "The bag was heavy, but {a} was strong.")
    t.say("Then {a} carried the {many} home.", "At home {a} washed the {many} and put them in a bowl.")
    t.say("They tasted {taste}.", "In the evening {a.they} made {dish}, as always on Saturday.")


def cooking(t: Telling) -> None:
    dish = t.pick(tuple(DISHES.values()))
    lovers = [person for person in ALL_PEOPLE if person.dish == dish.name]
    eater = t.pick(lovers)
    cook = other_than(t, eater)
    t.cast(a=cook, b=eater)
    t.know(dish=dish.name, needs=joined(dish.ingredients), first=dish.ingredients[0], rest=joined(dish.ingredients[1:]))
    t.know(pot=dish.pot, step=dish.step, smell=dish.smell, home=eater.home)
    t.say(
        "{a} wanted to make {dish} for {b}.",
        "It was cold outside, but the kitchen was warm. {a} wanted to make {dish}.",
        "{b} was coming to supper.",
    )
    t.say('"What do I need?" said {a}. "I need {needs}."', "On the kitchen table lay {needs}.")
    t.say("First {a} took the {first}, and then {a.they} added {rest}.", "{a.they} began with the {first}.")
    t.say("The {pot} was clean and ready.", "{a.they} sang a song and forgot the time.")
    t.say("Then {a.they} {step}.", "After a while {a} {step}.")
    t.say("It smelled {smell}.", "Soon the whole house smelled {smell}.")
    t.say(
        "{b.they} came in and smiled.",
        "{b.they} ran all the way, because {b.they} loved {dish}.",
        "Then {b} knocked at the door.",
    )
    t.say('"This is my favourite food!" said {b}.', '"How did you know?" asked {b}. "I love {dish}."')
    t.say("They ate until nothing was left.", "{b.they} ate two plates, and {a} was very happy.")
    closing(t)


def school(t: Telling) -> None:
    first, second = t.sample(CHILDREN, 2)
    t.cast(a=PEOPLE["Ida"], b=first, c=second, m=ANIMALS["Button"])
    t.know(day=t.pick(DAYS[:5]).name, hobby=second.hobby)
    t.say("On {day} the children sat in the school.", "{a} the teacher rang the bell, and the lesson began.")
    t.say("{m} the mouse was asleep in the desk.", "On the wall there was a map of the sea.", "It was quiet.")
    if t.chance(0.5):
        word = t.pick([word for word in spelling_words() if partition("spelling", word) == "train"])
        t.know(word=word, spelled=spelled(word), last=word[-1], letters=len(word))
        t.say('"Who can spell the word {word}?" asked {a}.')
        t.say("{b.they} thought for a while.", "{c.they} looked at the ceiling.", "{b.they} stood up.")
        t.say('"The word {word} is spelled {spelled}," said {b}.')
        t.say('"Good," said {a}. "How many letters is that?"')
        t.say('"It has {letters} letters," said {c}. "The last one is {last}."')
    else:
        step = t.pick(train_steps("+", (1, 12), (1, 12)))
        t.know(left=step.left, right=step.right, total=step.result, equation=step.digits)
        t.say(
            '"What is {left} + {right}?" asked {a}.', '"Here is a hard one," said {a}. "What is {left} plus {right}?"'
        )
        t.say("{b.they} counted on {b.their} fingers.", "{c.they} drew small circles on the paper.")
        t.say('"It is {total}," said {b}.', '"I know it," said {b}. "It is {total}."')
        t.say('"Right," said {a}, and {a.they} wrote {equation} on the board.')
        t.maybe('"And {right} + {left} is {total} as well," said {c}.')
    t.say("Then the bell rang, and everybody ran outside.", "After the lesson {b} and {c} ran down to the beach.")
    t.maybe("{c.they} went home, because there was still time for {hobby}.")


def garden(t: Telling) -> None:
    food = t.pick([food for food in FOODS.values() if food.singular in GARDEN])
    step = t.pick(train_steps("+", (2, 12), (2, 12)))
    t.cast(a=PEOPLE["Emma"], b=other_than(t, PEOPLE["Emma"]), p=ANIMALS["Pearl"])
    t.know(
        many=food.plural, left=step.left, right=step.right, total=step.result, equation=step.digits, taste=food.taste
    )
    t.know(colour=food.colour)
    t.say("In spring {a} and {b} were busy in the garden.", "{a} the gardener asked {b} for help.")
    t.say("{a.they} dug the holes with {a.their} brown spade.", "The ground was still cold, but the sun was warm.")
    t.say("They planted {many} in two long rows.", "They put small seeds into the ground.")
    t.say("Every evening {b} brought water.", "All through the summer there was sun and a little rain.")
    t.maybe("{p} the goat looked over the wall, but {p.they} only wanted roses.", "Bees hummed over the leaves.")
    t.say("At last the {many} were ripe and {colour}.", "One morning the first {many} were {colour} and ready.")
    t.say("{a.they} picked {left}, and {b} picked {right}.")
    t.say("Together they had {total} {many}, because {equation}.", "They counted them: {equation}.")
    t.say("The {many} tasted {taste}.", '"I have never had such good {many}," said {b}.')
    closing(t)


def letter(t: Telling) -> None:
    sender, receiver = t.sample([person for person in ALL_PEOPLE if person.name != "Paul"], 2)
    place = t.pick(OPEN_AIR)
    t.cast(a=sender, b=receiver, p=PEOPLE["Paul"])
    t.know(
        home=receiver.home,
        start=sender.home,
        place=place,
        dish=sender.dish,
        hobby=receiver.hobby,
        day=t.pick(DAYS).name,
    )
    t.say("{a} wrote a letter to {b}.", "{a} sat down {start} and wrote to {b}.")
    t.say('"Dear {b}," it said, "will you come on {day}? We will have {dish}."', '"Please come on {day}," it said.')
    t.say("{p} the postman put the letter into a bag and rode away on {p.their} blue bicycle.")
    t.say("The road was long and full of stones.", "{place} {p.they} stopped and ate an apple.", "It began to rain.")
    t.maybe("A dog ran beside {p.them} for a while.", "The wind wanted to take the letter, but {p} held it tight.")
    t.say(
        "At last {p.they} came to the place where {b} lived. {b.they} lived {home}.",
        "{b.they} lived {home}, and there {p} knocked.",
    )
    t.say('"A letter for you!" said {p}.', '"I think it is good news," said {p}.')
    t.say("{b.they} read it twice and smiled.", "{b.they} laughed and gave {p} a glass of water.")
    t.say("On {day} {b} went to see {a}, and they talked all evening.", "And on {day} they ate {dish} together.")


def hide_and_seek(t: Telling) -> None:
    first, second, third = t.sample(CHILDREN, 3)
    here = t.pick(OPEN_AIR)
    t.cast(a=first, b=second, c=third)
    t.know(
        here=here, tree=t.pick(("behind a tree", "under a boat", "behind the wall", "in a big basket", "under a bench"))
    )
    t.know(roof=t.pick(("on a roof", "behind some barrels", "in the tall grass", "under a blanket", "inside a box")))
    t.say("{a}, {b} and {c} met {here} to play hide and seek.", "On Sunday {a}, {b} and {c} played hide and seek.")
    t.say("{a.they} closed {a.their} eyes and counted: one, two, three, four, five.", "{a.they} had to count to ten.")
    t.say("{b.they} hid {tree}.")
    t.say("{c.they} hid {roof}.")
    t.say('"I am coming!" called {a}.', "Then {a} opened {a.their} eyes and looked around.")
    t.say("{a.they} went left and right and saw nobody.", "It was so quiet that {a} could hear the sea.")
    t.say("Then something moved {tree}. It was {b}!", "{b.they} had to laugh, and so {a} found {b.them} {tree}.")
    t.say("{c.they} was harder to find.", "But where was {c}?")
    t.say("At last {a} looked {roof}, and there was {c}.", "{c.they} was still {roof} when the bell rang for supper.")
    t.say('"You win," said {a} to {c}.', "Then it was {b.their} turn to count.")


def fishing(t: Telling) -> None:
    caught = t.pick(train_steps("+", (2, 9), (2, 9)))
    eaten = t.pick(train_steps("-", (caught.result, caught.result), (1, min(4, caught.result - 2))) or (None,))
    t.cast(p=ANIMALS["Captain"], s=ANIMALS["Shadow"])
    t.cast(a=PEOPLE["Leo"], b=PEOPLE[t.pick(("Sam", "Anna", "Otto", "Nora", "Mia", "Emma"))])
    t.know(left=caught.left, right=caught.right, total=caught.result, equation=caught.digits)
    t.say("Before the sun was up, {a} and {b} went out in the boat.", "{a} the fisher took {b} out to sea.")
    t.say("The water was flat, and the village looked very small.", "{p} the parrot sat on the mast and slept.")
    t.say("{a.they} caught {left} fish, and {b} caught {right}.")
    t.say("That made {total} fish in all, because {equation}.", '"{equation}," said {a}. "That is a good morning."')
    if eaten is not None:
        t.know(eaten=eaten.right, rest=eaten.result, second=eaten.digits)
        t.say("The gulls stole {eaten} of them.", "They put {eaten} of them back, because they were too small.")
        t.say("So there were {rest} fish left: {second}.")
    t.say("At noon they came back into the harbour.", "Then the lighthouse bell called them home.")
    t.say("They tied up the boat with the orange rope.", "{s} the cat was already waiting for them.")
    t.say("That evening there was fish stew for everybody.", "{b.they} was tired and happy and smelled of the sea.")


def one_day(t: Telling) -> None:
    person = t.pick([person for person in ALL_PEOPLE if not person.is_child])
    place = t.pick([place for place in PLACES.values() if place.worker == person.name])
    t.cast(a=person, b=PEOPLE[person.friend])
    t.know(home=person.home, job=person.job, at=place.at, sight=place.sight, dish=person.dish, hobby=person.hobby)
    t.know(holds=place.holds, place=place.name, weather=t.pick(("sunny", "rainy", "windy", "cold", "warm", "foggy")))
    t.say("{a} the {job} got up early.", "{a}, who lived {home}, was awake before the birds.")
    t.say("It was a {weather} morning.", "Outside it was still dark.")
    t.say("After breakfast the work began {at}.", "{a.they} ate an apple and began to work {at}.")
    t.say("There {a.they} saw {sight}.", "The {place} was full of {holds}.")
    t.say("{a.they} worked hard until noon.", "Many people came, and {a} helped them all.")
    t.say("For lunch {a.they} had {dish}, {a.their} favourite food.", "At noon {a} ate {dish} with {b}.")
    t.say(
        "In the afternoon {b} came by and told a funny story.", "Later {a} and {b}, the best of friends, had some tea."
    )
    t.say("In the evening {a} enjoyed {hobby}.", "When the work was done, there was time for {hobby}.")
    t.say("Then {a.they} went to bed {home}.", "At night the light went out {home}.")


def village_event(t: Telling) -> None:
    day = t.pick(DAYS)
    person = t.pick(ALL_PEOPLE)
    t.cast(a=person, b=PEOPLE[person.friend])
    t.know(day=day.name, event=day.event, home=person.home)
    t.cast(f=t.pick(tuple(ANIMALS.values())))
    t.say("Every {day} {event}.", "It was {day}. On {day} {event}.")
    t.say("{a.they} liked {day} more than any other day.", "{a.they} had waited for it all week.")
    t.say(
        "{a.they} washed {a.their} face and put on a clean shirt.", "{a.they} left the house early and locked the door."
    )
    t.say("Outside {a} met {b}, and they went together.", "{b}, {a.their} best friend, was already there.")
    t.say("The whole village was there, and even {f} had come.", "There were so many people that {a} had to stand.")
    t.say("{a.they} laughed until {a.their} eyes were wet.", "{b.they} told {a} a secret.", "Somebody began to sing.")
    t.say("When it was over, nobody wanted to go home.", "It was late when {a} came home and went to sleep {home}.")
    t.maybe("Only six more days, and it would be {day} again.")


def fox(t: Telling) -> None:
    person = t.pick(ALL_PEOPLE)
    t.cast(a=person, f=ANIMALS["Rusty"])
    t.know(home=person.home, thing=t.pick(("a glove", "a shoe", "a bun", "a sock", "a letter", "an egg")))
    t.say("{a} was walking in the forest.", "One evening {a} went into the forest to look for mushrooms.")
    t.say("The trees were tall, and it was very quiet.", "Leaves fell, and the light was golden.")
    t.say("Suddenly there was something orange between the trees.", "Somebody was watching from behind a stone.")
    t.say("It was {f} the fox, who could walk without a sound.")
    t.say("{f} had {thing} in his mouth.", "{f} sat down and looked at {a}.")
    t.say('"Good evening, {f}," said {a}.', "{a.they} did not move and did not speak.")
    t.say(
        "{a.they} put some berries on a stone and stepped back.",
        "{a.they} had a few berries left and put them on the ground.",
    )
    t.say("{f} ate them one by one, because berries were his favourite food.")
    t.say("Then he was gone, as if he had never been there.", "Then the fox went home, and so did {a}.")
    t.say("That night {a} lay {home} and thought of the forest.", "Nobody believed it, but {a} knew that it was true.")


PLOTS = (
    *(weather, market, market, cooking, cooking, school, school, garden),
    *(letter, hide_and_seek, fishing, one_day, village_event, fox),
)
