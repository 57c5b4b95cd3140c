"""The village of Pebble Bay as tables: who lives where, what a thing is for, where it is kept, what it costs.

Everything the documents say comes from here, so a fact has one place to be right. `at` phrases carry their own
preposition (`in the mill`, `on the beach`), colours are adjectives, uses are gerunds (`flying on windy days`).
"""

from dataclasses import dataclass

from jaxchat.data.tinyworld.english import HE, IT, SHE, Pronouns


@dataclass(frozen=True)
class Person:
    name: str
    pronouns: Pronouns
    age: int
    job: str
    home: str
    friend: str
    dish: str
    colour: str
    hobby: str
    parent: str | None = None

    @property
    def is_child(self) -> bool:
        return self.parent is not None


@dataclass(frozen=True)
class Animal:
    name: str
    pronouns: Pronouns
    species: str
    colour: str
    owner: str | None
    home: str
    food: str
    sound: str
    trick: str


@dataclass(frozen=True)
class Place:
    name: str
    preposition: str
    near: str
    holds: str
    sight: str
    worker: str

    @property
    def at(self) -> str:
        return f"{self.preposition} the {self.name}"


@dataclass(frozen=True)
class Thing:
    noun: str
    owner: str
    colour: str
    material: str
    kept: str
    use: str
    pronouns: Pronouns = IT

    @property
    def name(self) -> str:
        return f"{self.colour} {self.noun}"


@dataclass(frozen=True)
class Food:
    singular: str
    plural: str
    colour: str
    taste: str
    price: int


@dataclass(frozen=True)
class Dish:
    name: str
    ingredients: tuple[str, ...]
    pot: str
    step: str
    smell: str


@dataclass(frozen=True)
class Day:
    name: str
    event: str


PEOPLE = {
    person.name: person
    for person in (
        Person("Mia", SHE, 8, "pupil", "in the mill", "Tom", "pancakes", "red", "flying kites", "Hugo"),
        Person("Tom", HE, 9, "pupil", "on the farm", "Mia", "apple pie", "blue", "playing the drum", "Clara"),
        Person("Anna", SHE, 7, "pupil", "in the lighthouse", "Ben", "fish stew", "yellow", "counting ships", "Otto"),
        Person("Ben", HE, 8, "pupil", "above the bakery", "Anna", "plum cake", "brown", "climbing trees", "Rosa"),
        Person("Lily", SHE, 10, "pupil", "in the green house", "Omar", "tomato salad", "green", "reading", "Felix"),
        Person("Omar", HE, 10, "pupil", "in the white house", "Lily", "lemon cake", "silver", "watching stars", "Vera"),
        Person("Nora", SHE, 6, "pupil", "in the stone cottage", "Sam", "cherry jam", "pink", "dancing", "Emma"),
        Person("Sam", HE, 7, "pupil", "on the houseboat", "Nora", "bean soup", "orange", "playing ball", "Leo"),
        Person("Rosa", SHE, 36, "baker", "above the bakery", "Hugo", "onion tart", "white", "singing"),
        Person("Hugo", HE, 41, "miller", "in the mill", "Rosa", "plum cake", "grey", "playing chess"),
        Person("Clara", SHE, 38, "farmer", "on the farm", "Emma", "pumpkin soup", "brown", "riding"),
        Person("Otto", HE, 63, "lighthouse keeper", "in the lighthouse", "Leo", "fish stew", "golden", "carving wood"),
        Person("Ida", SHE, 29, "teacher", "in the tall house", "Greta", "lemon cake", "purple", "painting"),
        Person("Felix", HE, 44, "carpenter", "in the green house", "Paul", "bean soup", "black", "swimming"),
        Person("Vera", SHE, 40, "doctor", "in the white house", "Max", "tomato salad", "black", "baking"),
        Person("Leo", HE, 35, "fisher", "on the houseboat", "Otto", "onion tart", "green", "telling jokes"),
        Person("Greta", SHE, 52, "librarian", "above the library", "Ida", "apple pie", "yellow", "knitting"),
        Person("Paul", HE, 31, "postman", "in the brick house", "Felix", "pancakes", "blue", "running"),
        Person("Emma", SHE, 33, "gardener", "in the stone cottage", "Clara", "mushroom omelette", "red", "dancing"),
        Person("Max", HE, 27, "painter", "in the old tower", "Vera", "pumpkin soup", "orange", "playing the flute"),
    )
}

ANIMALS = {
    animal.name: animal
    for animal in (
        Animal("Biscuit", HE, "dog", "brown", "Tom", "in the barn", "bones", "barks", "fetch a stick"),
        Animal("Shadow", SHE, "cat", "black", "Anna", "on the lighthouse stairs", "fish", "purrs", "open doors"),
        Animal("Clover", SHE, "cow", "white", "Clara", "in the field", "grass", "moos", "find the best flowers"),
        Animal("Dot", SHE, "hen", "red", "Clara", "in the hen house", "corn", "clucks", "count to three"),
        Animal("Puddle", HE, "duck", "yellow", "Nora", "by the pond", "bread", "quacks", "swim backwards"),
        Animal("Nutmeg", SHE, "rabbit", "grey", "Lily", "under the stairs", "carrots", "squeaks", "jump over a chair"),
        Animal("Storm", HE, "horse", "black", "Hugo", "in the stable", "oats", "neighs", "pull a heavy cart"),
        Animal("Pearl", SHE, "goat", "white", "Emma", "behind the cottage", "roses", "bleats", "climb a ladder"),
        Animal("Olive", SHE, "owl", "brown", "Greta", "in the library roof", "mice", "hoots", "turn pages"),
        Animal("Captain", HE, "parrot", "green", "Leo", "on the mast", "nuts", "squawks", "say good morning"),
        Animal("Button", HE, "mouse", "grey", "Ida", "in the school desk", "cheese", "squeaks", "hide in a teacup"),
        Animal("Rusty", HE, "fox", "orange", None, "in the forest", "berries", "yelps", "walk without a sound"),
    )
}

PLACES = {
    place.name: place
    for place in (
        Place("bakery", "in", "market", "warm bread", "flour on every shelf", "Rosa"),
        Place("mill", "in", "river", "sacks of flour", "the big wheel turning slowly", "Hugo"),
        Place("farm", "on", "orchard", "hay and tractors", "hens running everywhere", "Clara"),
        Place("lighthouse", "in", "beach", "a great lamp", "a hundred narrow stairs", "Otto"),
        Place("school", "in", "library", "desks and maps", "a map of the sea", "Ida"),
        Place("workshop", "in", "station", "wood and tools", "curls of wood on the floor", "Felix"),
        Place("hospital", "in", "bridge", "clean beds", "a row of clean beds", "Vera"),
        Place("harbour", "in", "lighthouse", "boats and nets", "gulls sitting on the boats", "Leo"),
        Place("library", "in", "school", "hundreds of books", "tall shelves full of books", "Greta"),
        Place("post office", "in", "station", "letters and parcels", "a heap of brown parcels", "Paul"),
        Place("garden", "in", "hospital", "roses and beans", "bees among the roses", "Emma"),
        Place("old tower", "in", "hill", "bright pictures", "pots of bright paint", "Max"),
        Place("market", "at", "bakery", "fruit and vegetables", "baskets of ripe fruit", "Clara"),
        Place("orchard", "in", "farm", "apple trees", "apples in the long grass", "Emma"),
    )
}

OPEN_AIR = (
    "by the pond",
    "on the bridge",
    "in the forest",
    "on the beach",
    "on the hill",
    "by the river",
    "at the station",
)

THINGS = {
    f"{thing.owner}'s {thing.noun}": thing
    for thing in (
        Thing("kite", "Mia", "red", "paper", "in the attic", "flying on windy days"),
        Thing("scarf", "Mia", "blue", "wool", "on a hook by the door", "keeping warm"),
        Thing("drum", "Tom", "blue", "wood", "behind the door", "making loud music"),
        Thing("whistle", "Tom", "silver", "tin", "in a small box", "calling the dog"),
        Thing("lantern", "Anna", "yellow", "brass", "on the window sill", "lighting the way at night"),
        Thing("shell", "Anna", "pink", "stone", "under the pillow", "hearing the sea"),
        Thing("basket", "Ben", "brown", "straw", "beside the oven", "carrying bread"),
        Thing("boat", "Ben", "white", "paper", "in the bath", "sailing on the pond"),
        Thing("book", "Lily", "green", "paper", "on the top shelf", "reading stories"),
        Thing("pen", "Lily", "black", "wood", "in a drawer", "writing letters"),
        Thing("telescope", "Omar", "silver", "brass", "near the window", "looking at the stars"),
        Thing("map", "Omar", "yellow", "paper", "under the bed", "finding the way"),
        Thing("doll", "Nora", "pink", "cloth", "on the pillow", "playing house"),
        Thing("ribbon", "Nora", "purple", "silk", "in a small box", "tying hair"),
        Thing("ball", "Sam", "orange", "rubber", "under the bench", "playing games"),
        Thing("net", "Sam", "green", "string", "in the bath", "catching crabs"),
        Thing("apron", "Rosa", "white", "cotton", "on a hook by the door", "keeping clothes clean"),
        Thing("cart", "Hugo", "grey", "wood", "in the yard", "carrying flour"),
        Thing("bucket", "Clara", "silver", "tin", "next to the well", "carrying milk"),
        Thing("bell", "Otto", "golden", "brass", "at the top of the stairs", "calling the ships"),
        Thing("key", "Otto", "black", "iron", "on a nail", "opening the lighthouse"),
        Thing("umbrella", "Ida", "purple", "silk", "in the hall", "staying dry in the rain"),
        Thing("cup", "Ida", "white", "china", "on the desk", "drinking tea"),
        Thing("hammer", "Felix", "black", "iron", "in the toolbox", "hitting nails"),
        Thing("ladder", "Felix", "brown", "wood", "against the wall", "reaching the roof"),
        Thing("bag", "Vera", "black", "leather", "on the chair", "carrying medicine"),
        Thing("rope", "Leo", "orange", "string", "on the deck", "tying up the boat"),
        Thing("lamp", "Greta", "yellow", "glass", "on the desk", "reading in the dark"),
        Thing("blanket", "Greta", "red", "wool", "on the chair", "sleeping in winter"),
        Thing("bicycle", "Paul", "blue", "steel", "against the wall", "riding to every house"),
        Thing("spade", "Emma", "brown", "iron", "in the shed", "digging holes"),
        Thing("hat", "Emma", "yellow", "straw", "on a nail", "keeping the sun away"),
        Thing("brush", "Max", "orange", "wood", "in a jar", "painting pictures"),
        Thing("flute", "Max", "silver", "wood", "in a drawer", "playing soft music"),
    )
}

FOODS = {
    food.singular: food
    for food in (
        Food("apple", "apples", "red", "sweet", 1),
        Food("pear", "pears", "green", "sweet", 2),
        Food("plum", "plums", "purple", "sweet", 1),
        Food("cherry", "cherries", "red", "sweet", 1),
        Food("lemon", "lemons", "yellow", "sour", 2),
        Food("carrot", "carrots", "orange", "sweet", 1),
        Food("potato", "potatoes", "brown", "plain", 1),
        Food("tomato", "tomatoes", "red", "fresh", 2),
        Food("onion", "onions", "white", "sharp", 1),
        Food("bean", "beans", "green", "fresh", 1),
        Food("pumpkin", "pumpkins", "orange", "mild", 5),
        Food("mushroom", "mushrooms", "white", "mild", 2),
        Food("strawberry", "strawberries", "red", "sweet", 2),
        Food("nut", "nuts", "brown", "plain", 1),
        Food("egg", "eggs", "white", "mild", 2),
        Food("bun", "buns", "golden", "sweet", 3),
        Food("loaf", "loaves", "brown", "plain", 4),
        Food("radish", "radishes", "pink", "sharp", 1),
    )
}

DISHES = {
    dish.name: dish
    for dish in (
        Dish("pancakes", ("eggs", "milk", "flour"), "pan", "turned them over in the air", "sweet"),
        Dish("apple pie", ("apples", "flour", "butter"), "oven", "closed the lid of dough", "sweet"),
        Dish("fish stew", ("fish", "tomatoes", "potatoes"), "pot", "stirred it slowly", "salty"),
        Dish("plum cake", ("plums", "flour", "sugar"), "oven", "waited by the oven door", "sweet"),
        Dish("tomato salad", ("tomatoes", "onions", "oil"), "bowl", "added a little salt", "fresh"),
        Dish("lemon cake", ("lemons", "eggs", "sugar"), "oven", "waited by the oven door", "fresh"),
        Dish("cherry jam", ("cherries", "lemons", "sugar"), "pot", "filled the glasses", "sweet"),
        Dish("bean soup", ("beans", "carrots", "onions"), "pot", "stirred it slowly", "wonderful"),
        Dish("onion tart", ("onions", "eggs", "butter"), "oven", "waited by the oven door", "salty"),
        Dish("pumpkin soup", ("pumpkin", "cream", "salt"), "pot", "stirred it slowly", "wonderful"),
        Dish("mushroom omelette", ("mushrooms", "eggs", "butter"), "pan", "folded it in half", "wonderful"),
    )
}

DAYS = (
    Day("Monday", "Hugo brings flour to the bakery"),
    Day("Tuesday", "Max plays the flute in the square"),
    Day("Wednesday", "the big ship comes into the harbour"),
    Day("Thursday", "the children clean the beach"),
    Day("Friday", "Greta reads stories in the library"),
    Day("Saturday", "everybody goes to the market"),
    Day("Sunday", "the village eats together on the hill"),
)

# Worth spelling beside the nouns and colours of the tables.
MORE_WORDS = """
boat ship wind rain snow sun moon star cloud river bridge stone tree leaf flower bee bird wing nest egg milk salt sugar
butter cheese honey table chair door window roof wall floor stair garden road wheel horse sheep field corn letter stamp
paper ink paint song story word number coin pocket button shoe coat glove sock bed dream night morning winter spring
summer autumn fire smoke candle clock mirror bottle spoon fork knife plate bowl pot oven island wave sand fish crab gull
sail anchor harbour market school friend mother father sister brother baby hand foot nose mouth heart smile laugh jump
run swim climb sleep wake read write count sing dance bake cook dig plant grow build mend carry push pull find lose give
take buy sell help wait open close warm cold wet dry big small old new soft hard loud quiet kind brave happy bread soup
cake pie jam stew salad tea glass water grass hay wool silk straw wood iron gold ring nail board tool box bag cup pan
lid hook shelf desk lesson map trip walk ride train wagon street corner square tower church village city country king
queen story poem game trick joke secret present party guest neighbour baker miller farmer doctor teacher painter fisher
arm leg eye ear hair finger toe knee tooth head back hat shirt boot belt storm fog ice sky hill lake pond sea
beach forest path gate fence barn stable kitchen attic cellar hall bath pillow yellow pink silver golden fast slow early
late near far left right high low long short round flat clean empty full heavy light dark bright sweet sour fresh ripe
"""
