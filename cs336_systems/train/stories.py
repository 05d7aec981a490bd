"""Short stories made from a seed: endless text with a plot, a small vocabulary and no licence."""

from __future__ import annotations

import random
from collections.abc import Iterator

# Name, subject, object, possessive: a story keeps its pronouns.
_HEROES = tuple(
    (name, *pronouns)
    for names, pronouns in (
        ("Ada Bea Cleo Dina Elsa Fay Greta Hana Iris June Kira Lena", ("she", "her", "her")),
        ("Abe Ben Cole Dan Eli Finn Gus Hugo Ivan Jack Karl Leo", ("he", "him", "his")),
    )
    for name in names.split()
)
_ANIMALS = [
    "fox",
    "owl",
    "hen",
    "frog",
    "goat",
    "duck",
    "mole",
    "crow",
    "pony",
    "snail",
    "badger",
    "kitten",
    "beetle",
    "otter",
]
_TRAITS = [
    "curious",
    "gentle",
    "clumsy",
    "brave",
    "sleepy",
    "patient",
    "noisy",
    "shy",
    "cheerful",
    "stubborn",
    "clever",
]
_COLOURS = [
    "red",
    "blue",
    "green",
    "yellow",
    "silver",
    "purple",
    "orange",
    "white",
    "brown",
    "golden",
]
_THINGS = [
    "kite",
    "drum",
    "lantern",
    "scarf",
    "boat",
    "bell",
    "button",
    "basket",
    "whistle",
    "blanket",
    "wagon",
    "key",
]
_PLACES = [
    "on the hill",
    "by the river",
    "under the old bridge",
    "behind the mill",
    "in the orchard",
    "at the market",
    "near the lighthouse",
    "at the edge of the forest",
    "in the empty barn",
    "beside the pond",
]
_TIMES = [
    "One windy morning",
    "After the rain",
    "Late in the summer",
    "Just before supper",
    "On a cold Sunday",
    "When the first snow fell",
    "One quiet afternoon",
    "At the end of the week",
]
_OPENINGS = (
    "{time}, a {trait} child named {name} went for a walk {place}.",
    "There was once a {trait} child named {name}, who lived {place}.",
    "{time}, {name} sat {place} with nothing to do.",
    "{name} was a {trait} child, and everybody {place} knew {obj} well.",
)
_WISHES = (
    "{Subj} carried a {colour} {thing} that {poss} grandmother had made.",
    "More than anything, {subj} wanted a {colour} {thing} of {poss} own.",
    "In {poss} hands was a {colour} {thing}, and {subj} would not let go of it.",
)
_TROUBLES = (
    "But the wind took the {thing} and dropped it {place2}.",
    "Then the {thing} broke, and {name} began to cry.",
    "All at once the {thing} was gone, and {subj} looked for it {place2}.",
    "But somebody had hidden the {thing} {place2}.",
    "While {subj} slept, the {thing} rolled away and came to rest {place2}.",
)
_MEETINGS = (
    "A {trait2} {animal} came along and asked, “Why are you sad?”",
    "“May I help you?” said a {trait2} {animal}.",
    "Nobody was there but a {trait2} {animal}, who looked at {obj} and waited.",
)
_ANSWERS = (
    "“My {thing} is lost,” said {name}, “and I need it before dark.”",
    "{name} told the {animal} about the {thing}, and the {animal} listened to every word.",
    "“I only want my {colour} {thing},” {subj} whispered.",
)
_EFFORTS = (
    "Together they looked {place2} until {num} stars were out.",
    "They tried {num} times, and each time they laughed a little more.",
    "The {animal} counted to {num}, took a deep breath and ran {place2}.",
    "First they made a plan, then they walked {num} steps and stopped to think.",
)
_ENDINGS = (
    "There was the {thing}, as {colour} as ever, and {name} hugged the {animal}.",
    "At last they found the {thing}. “Thank you,” said {name}, and {subj} meant it.",
    "They never found the {thing}, but {name} had a new friend, and that was better.",
    "The {thing} was mended by supper, and the {animal} stayed for soup.",
)
_MORALS = (
    "From then on, {name} shared {poss} {thing} with everyone.",
    "That night {subj} dreamed of the {animal} and smiled.",
    "And whenever the {animal} needed help, {name} was there.",
    "“Next time,” said the {animal}, “call me first.”",
)
_NUMBERS = [
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "twelve",
    "twenty",
]


def stories(seed: int) -> Iterator[str]:
    """Yield stories without end, the same ones for the same seed."""
    rng = random.Random(seed)
    while True:
        yield _story(rng)


def _story(rng: random.Random) -> str:
    name, subj, obj, poss = rng.choice(_HEROES)
    place, place2 = rng.sample(_PLACES, 2)
    trait, trait2 = rng.sample(_TRAITS, 2)
    words = {
        "name": name,
        "subj": subj,
        "Subj": subj.capitalize(),
        "obj": obj,
        "poss": poss,
        "place": place,
        "place2": place2,
        "trait": trait,
        "trait2": trait2,
        "time": rng.choice(_TIMES),
        "colour": rng.choice(_COLOURS),
        "thing": rng.choice(_THINGS),
        "animal": rng.choice(_ANIMALS),
        "num": rng.choice(_NUMBERS),
    }
    beginning = (rng.choice(_OPENINGS), rng.choice(_WISHES), rng.choice(_TROUBLES))
    middle = (rng.choice(_MEETINGS), rng.choice(_ANSWERS))
    efforts = rng.sample(_EFFORTS, rng.randint(1, 3))
    end = (rng.choice(_ENDINGS), rng.choice(_MORALS))
    paragraphs = (" ".join(beginning), " ".join((*middle, *efforts)), " ".join(end))
    return "\n".join(paragraphs).format_map(words)
