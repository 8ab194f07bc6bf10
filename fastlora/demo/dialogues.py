"""Generated dialogues between two people and their summaries, for the summarisation task.

One person asks the other for something; the other agrees, moves it to another day, or refuses with a reason.
Greetings and small talk (about third persons, other days and other cities) stand around it and are no part of the
summary. No single line gives the summary away: it joins the request, the answer and the reason, in the third person.
"""

from random import Random

from fastlora.demo import wordings
from fastlora.demo.words import CITIES, DAYS, FRUITS, GOODS, PEOPLE, PRAISE, TIMES, TOOLS, VENUES

SAID = wordings.TABLES["dialogue"]
CHORES = tuple(f"{verb} the {thing}" for verb in ("carry", "repair", "paint", "clean", "sell") for thing in GOODS)
EVENTS = ("party", "picnic", "wedding", "dinner", "concert", "barbecue", "reunion")


def dialogue(rng: Random) -> tuple[str, dict[str, str]]:
    """One dialogue of 5 to 8 lines: its content, which is the summary, and the fields dialogue and summary."""
    facts = _facts(rng)
    request, outcome = rng.choice(SAID["requests"]), rng.choice(SAID["outcomes"])
    greeting, asked, answer = (
        rng.choice(SAID["greetings"]),
        rng.choice(request["lines"]),
        rng.choice(outcome["answers"]),
    )
    reply = [rng.choice(outcome["replies"])] if "replies" in outcome else []
    exchanges = [greeting, [asked, answer, *reply]]
    if rng.random() < 0.75:
        exchanges.insert(rng.choice((1, 2)), rng.choice(SAID["small_talk"]))
    exchanges.append(rng.choice(SAID["closings"]))
    lines: list[str] = []
    for exchange in exchanges:
        for turn, words in enumerate(exchange):
            line = words.format_map(facts)
            line = line[0].upper() + line[1:]
            if turn == 0 and lines and lines[-1].startswith(facts["asker"]):
                lines[-1] += f" {line}"  # the asker, who still has the floor, goes on
            else:
                lines.append(f"{facts['helper' if turn % 2 else 'asker']}: {line}")
    summary = outcome["summary"].format_map({**facts, "clause": request["clause"].format_map(facts)})
    return summary, {"dialogue": "\n".join(lines), "summary": summary}


def _facts(rng: Random) -> dict[str, str]:
    asker, helper, third = rng.sample(PEOPLE, 3)
    day, other, day2 = rng.sample(DAYS, 3)
    city, city2, away = rng.sample(CITIES, 3)
    facts = {"asker": asker, "helper": helper, "third": third, "day": day, "other": other, "day2": day2}
    facts |= {"city": city, "city2": city2, "away": away, "time": rng.choice(TIMES), "tool": rng.choice(TOOLS)}
    facts |= {"goods": rng.choice(GOODS), "venue": rng.choice(VENUES), "fruit": rng.choice(FRUITS)}
    facts |= {"event": rng.choice(EVENTS), "chore": rng.choice(CHORES), "praise": rng.choice(PRAISE)}
    said, told = rng.choice(SAID["reasons"])
    return facts | {"reason": said.format_map(facts), "reason_told": told.format_map(facts)}
