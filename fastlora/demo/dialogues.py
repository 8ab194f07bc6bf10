"""Generated dialogues between two people and their summaries, for the summarisation task.

One person asks the other for something; the other agrees, moves it to another day, or refuses with a reason.
Greetings and small talk (about third persons, other days and other cities) stand around it and are no part of the
summary. No single line gives the summary away: it joins the request, the answer and the reason, in the third person.
"""

from dataclasses import dataclass
from random import Random

from fastlora.demo.words import CITIES, DAYS, FRUITS, GOODS, PEOPLE, PRAISE, TIMES, TOOLS, VENUES


@dataclass(frozen=True)
class Request:
    """What may be asked for: its wordings in the dialogue and its clause in the summary."""

    lines: tuple[str, ...]
    clause: str


REQUESTS = (
    Request(
        (
            "Could you lend me your {tool} on {day}?",
            "I need a {tool} on {day}. May I borrow yours?",
            "Is your {tool} free on {day}? I would like to borrow it.",
        ),
        "borrow the {tool} of {helper}",
    ),
    Request(
        (
            "Shall we meet at the {venue} on {day} at {time}?",
            "Let us meet on {day}. How about the {venue} at {time}?",
            "Are you free on {day} at {time}? We could meet at the {venue}.",
        ),
        "meet {helper} at the {venue} at {time}",
    ),
    Request(
        (
            "Can you help me to {chore} on {day}?",
            "I have to {chore} on {day}. Will you help me?",
            "I cannot {chore} alone. Could you come on {day}?",
        ),
        "{chore} with {helper}",
    ),
    Request(
        (
            "Could you bring the {fruit} to the {event} on {day}?",
            "The {event} is on {day}. Will you bring the {fruit}?",
            "We still need {fruit} for the {event} on {day}. Could you bring some?",
        ),
        "have {helper} bring {fruit} to the {event}",
    ),
    Request(
        (
            "Would you drive me to {city} on {day}?",
            "I have to be in {city} on {day}. Could you drive me?",
            "My train to {city} on {day} was cancelled. Can you take me in your car?",
        ),
        "be driven to {city} by {helper}",
    ),
    Request(
        (
            "Would you like to come to the {event} on {day}?",
            "We are having a {event} on {day}. Will you come?",
            "I am planning a {event} for {day}. Can I count on you?",
        ),
        "invite {helper} to a {event}",
    ),
)

CHORES = tuple(f"{verb} the {thing}" for verb in ("carry", "repair", "paint", "clean", "sell") for thing in GOODS)
EVENTS = ("party", "picnic", "wedding", "dinner", "concert", "barbecue", "reunion")

# What the helper says, and the same in the third person.
REASONS = (
    ("I have to work", "has to work"),
    ("I am visiting my sister", "is visiting a sister"),
    ("I have an exam", "has an exam"),
    ("I am at the dentist", "is at the dentist"),
    ("I have a football match", "has a football match"),
    ("I am flying to {away}", "is flying to {away}"),
    ("I promised to help {third}", "promised to help {third}"),
    ("I must look after the children", "must look after the children"),
)

GREETINGS = (
    ("Hi {helper}, how are you?", "Fine, thanks. And you?"),
    ("Hello {helper}!", "Hello {asker}, nice to hear from you."),
    ("Good morning, {helper}.", "Good morning! What can I do for you?"),
    ("Hey {helper}, do you have a minute?", "Of course, {asker}."),
)
SMALL_TALK = (
    ("How was your trip to {city2}?", "It was {praise}, thank you."),
    ("Did {third} sell the {goods}?", "Yes, on {day2}."),
    ("The weather is {praise} today.", "Yes, I was in the garden all morning."),
    ("Have you seen {third} lately?", "We had coffee on {day2}. {third} is moving to {city2}."),
    ("I saw a {praise} film on {day2}.", "I would rather read a book."),
    ("Is the {goods} still broken?", "No, {third} repaired it on {day2}."),
)

AGREEMENTS = ("Yes, that is fine with me.", "Sure, no problem.", "Of course, gladly.", "Yes, I can do that.")
MOVES = (
    "{reason} on {day}. Is {other} possible?",
    "Not on {day}, {reason}. What about {other}?",
    "I am sorry, {reason} that day. But {other} would suit me.",
)
MOVES_ACCEPTED = ("{other} is fine too.", "Good, then {other}.", "That works for me as well.")
REFUSALS = (
    "I am sorry, {reason} on {day}.",
    "I am afraid I cannot, {reason}.",
    "No, sorry. {reason} that day.",
)
REFUSALS_TAKEN = ("What a pity.", "I see. Another time, then.", "All right, I will ask {third}.")
CLOSINGS = (("Thank you!", "You are welcome."), ("See you soon.", "Bye, {asker}."), ("Thanks, bye!", "Bye!"))


def dialogue(rng: Random) -> tuple[str, dict[str, str]]:
    """One dialogue of 5 to 8 lines: its content, which is the summary, and the fields dialogue and summary."""
    facts = _facts(rng)
    request = rng.choice(REQUESTS)
    outcome = rng.choice(("agree", "move", "refuse"))
    exchanges = [rng.choice(GREETINGS), (rng.choice(request.lines), *_answer(outcome, rng))]
    if rng.random() < 0.75:
        exchanges.insert(rng.choice((1, 2)), rng.choice(SMALL_TALK))
    exchanges.append(rng.choice(CLOSINGS))
    lines: list[str] = []
    for exchange in exchanges:
        for turn, words in enumerate(exchange):
            line = _sentence_case(words.format_map(facts))
            if turn == 0 and lines and lines[-1].startswith(facts["asker"]):
                lines[-1] += f" {line}"  # the asker, who still has the floor, goes on
            else:
                lines.append(f"{facts['helper' if turn % 2 else 'asker']}: {line}")
    summary = _summary(request, outcome).format_map({**facts, "clause": request.clause.format_map(facts)})
    return summary, {"dialogue": "\n".join(lines), "summary": summary}


def _facts(rng: Random) -> dict[str, str]:
    asker, helper, third = rng.sample(PEOPLE, 3)
    day, other, day2 = rng.sample(DAYS, 3)
    city, city2, away = rng.sample(CITIES, 3)
    facts = {"asker": asker, "helper": helper, "third": third, "day": day, "other": other, "day2": day2}
    facts |= {"city": city, "city2": city2, "away": away, "time": rng.choice(TIMES), "tool": rng.choice(TOOLS)}
    facts |= {"goods": rng.choice(GOODS), "venue": rng.choice(VENUES), "fruit": rng.choice(FRUITS)}
    facts |= {"event": rng.choice(EVENTS), "chore": rng.choice(CHORES), "praise": rng.choice(PRAISE)}
    said, told = rng.choice(REASONS)
    return facts | {"reason": said.format_map(facts), "reason_told": told.format_map(facts)}


def _answer(outcome: str, rng: Random) -> tuple[str, ...]:
    """The helper's answer and, unless it is a plain yes, what the asker makes of it."""
    if outcome == "agree":
        return (rng.choice(AGREEMENTS),)
    if outcome == "move":
        return (rng.choice(MOVES), rng.choice(MOVES_ACCEPTED))
    return (rng.choice(REFUSALS), rng.choice(REFUSALS_TAKEN))


def _summary(request: Request, outcome: str) -> str:
    if outcome == "agree":
        return "{asker} wants to {clause} on {day}. {helper} agrees."
    if outcome == "move":
        return "{asker} wants to {clause}. {helper} {reason_told} on {day}, so they choose {other}."
    return "{asker} wants to {clause} on {day}, but {helper} {reason_told}."


def _sentence_case(line: str) -> str:
    return line[0].upper() + line[1:]
