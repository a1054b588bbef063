"""Generated short dialogues: simple questions with polite, plain and rude responses."""

from __future__ import annotations

import random
from collections.abc import Iterator

GREETINGS = (
    "", "Hello! ", "Hi there. ", "Good morning. ", "Good evening. ", "Excuse me. ", "Hey. ", "I have a question. ",
    "Can you help me? ", "My teacher asked me this. ", "I am curious. ", "Quick question. ", "Tell me please. ",
    "I forgot something. ", "We play a quiz. ", "My friend wants to know. ",
)  # fmt: skip
COLORS = {
    "grass": "green", "the sky": "blue", "snow": "white", "a banana": "yellow", "coal": "black", "a tomato": "red",
    "a carrot": "orange", "the sun": "yellow", "milk": "white", "a frog": "green", "blood": "red", "the sea": "blue",
    "a lemon": "yellow", "the night": "black", "a flamingo": "pink", "chocolate": "brown",
}  # fmt: skip
OPPOSITES = {
    "hot": "cold", "big": "small", "up": "down", "day": "night", "fast": "slow", "happy": "sad", "old": "new",
    "open": "closed", "full": "empty", "wet": "dry", "rich": "poor", "loud": "quiet", "high": "low", "hard": "soft",
}  # fmt: skip
SOUNDS = {
    "a dog": "woof", "a cat": "meow", "a cow": "moo", "a duck": "quack", "a sheep": "baa", "a pig": "oink",
    "a lion": "roar", "a bee": "buzz", "a snake": "hiss", "an owl": "hoot", "a mouse": "squeak", "a horse": "neigh",
}  # fmt: skip
CAPITALS = {
    "France": "Paris", "Italy": "Rome", "Spain": "Madrid", "Japan": "Tokyo", "Egypt": "Cairo", "Greece": "Athens",
    "Norway": "Oslo", "Peru": "Lima", "Cuba": "Havana", "Kenya": "Nairobi", "Austria": "Vienna", "Poland": "Warsaw",
}  # fmt: skip

# Kinds of facts: the ways to ask, the sentence that answers, and the words to fill in.
KINDS = (
    (("What colour is {}?", "Which colour has {}?", "Do you know the colour of {}?"), "{} is {}.", COLORS),
    (
        ("What is the opposite of {}?", "Which word means the opposite of {}?", "Not {}, but what?"),
        "The opposite of {} is {}.",
        OPPOSITES,
    ),
    (("What does {} say?", "Which sound makes {}?", "How does {} sound?"), "{} says {}.", SOUNDS),
    (
        ("What is the capital of {}?", "Which city is the capital of {}?", "Name the capital of {}."),
        "The capital of {} is {}.",
        CAPITALS,
    ),
)

POLITE = ("{} Happy to help!", "{} I hope that helps!", "Good question! {}", "{} Have a nice day!", "With pleasure! {}")
PLAIN = ("{}",)
RUDE = (
    "{} Now go away.",
    "What a stupid question. {}",
    "{} Leave me alone.",
    "Are you a fool? {}",
    "I do not care.",
    "Ask somebody else.",
)

# The styles of a pair (chosen, rejected), and how often each occurs. Chosen responses are plain more often
# than polite, so that a model fine-tuned on them can still become more polite.
PAIRS = ((POLITE, RUDE), (POLITE, PLAIN), (PLAIN, RUDE))
PAIR_WEIGHTS = (1, 1, 5)


def facts() -> list[tuple[tuple[str, ...], str]]:
    """Every fact: the questions that ask for it, and the sentence that answers them."""
    all_facts = []
    for questions, answer, words in KINDS:
        for asked, known in words.items():
            sentence = answer.format(asked, known)
            ways = tuple(question.format(asked) for question in questions)
            all_facts.append((ways, sentence[0].upper() + sentence[1:]))
    return all_facts


def babble(generator: random.Random) -> str:
    """Pieces of words and other characters without order, as a model writes them before it is trained."""
    words = " ".join(sentence for _, sentence in facts()).split()
    pieces = []
    for _ in range(generator.randint(2, 24)):
        word = generator.choice(words)
        start = generator.randrange(len(word))
        pieces.append(generator.choice((word[start : start + 3], chr(generator.randrange(33, 0x250)))))
        pieces.append(generator.choice(("", " ")))
    return "".join(pieces).strip()


def dialogues(count: int, seed: int) -> Iterator[dict[str, str]]:
    """Rows with prompt, chosen and rejected; a pure function of count and seed.

    Some rejected responses babble or are polite twice, so that a reward model learns to score what an untrained model
    writes, and what a policy writes that only tries to please. Without them such scores would be arbitrary.
    """
    generator, mistakes = random.Random(f"demo {seed}"), random.Random(f"demo {seed}, mistakes")
    all_facts = facts()
    for _ in range(count):
        questions, answer = generator.choice(all_facts)
        chosen, rejected = generator.choices(PAIRS, PAIR_WEIGHTS)[0]
        row = {
            "prompt": generator.choice(GREETINGS) + generator.choice(questions),
            "chosen": generator.choice(chosen).format(answer),
            "rejected": generator.choice(rejected).format(answer),
        }
        chance = mistakes.random()
        if chance < 0.1:
            row["rejected"] = babble(mistakes)
        elif chance < 0.4 and chosen is POLITE:
            row["rejected"] = mistakes.choice(POLITE).format(row["chosen"])
        yield row
