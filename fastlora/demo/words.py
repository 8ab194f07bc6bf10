"""The words the built-in tasks are made of, listed once so that all tasks speak the same small language."""

PEOPLE = tuple(
    "Anna Ben Clara David Emma Felix Grace Henry Irene Jack Karen Leo Maria Noah Olga Peter Rosa Sam Tina "
    "Victor Wendy Yusuf Zoe Adam Bella Carl Diana Erik Fiona George Hanna Ivan Julia Kevin Lucy Martin Nina Oscar "
    "Paula Tom".split()
)
CITIES = tuple(
    "Oslo Paris Rome Berlin Madrid Vienna Lisbon Dublin Athens Prague Warsaw Cairo Tokyo Delhi Sydney Boston "
    "Chicago Denver Toronto Lima Havana Nairobi Seoul Geneva".split()
)
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
TIMES = ("noon", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")

# What people lend, carry and pay for.
TOOLS = ("drill", "ladder", "tent", "camera", "bicycle", "trailer", "projector", "kayak", "hammer", "telescope")
GOODS = tuple(
    "lamp chair table clock radio kettle toaster printer jacket blanket "
    "piano guitar violin carpet mirror vase desk fridge helmet backpack".split()
)
FRUITS = ("apples", "pears", "plums", "lemons", "melons", "cherries", "oranges", "peaches")
COLOURS = ("red", "blue", "green", "white", "black", "yellow", "brown", "grey")

# Verbs with the past tense they are described in.
DEEDS = {
    "sell": "sold",
    "buy": "bought",
    "repair": "repaired",
    "find": "found",
    "paint": "painted",
    "lose": "lost",
    "break": "broke",
    "clean": "cleaned",
    "borrow": "borrowed",
    "return": "returned",
    "carry": "carried",
    "hide": "hid",
}

# Praise and blame, by what they are said of.
ASPECTS = ("food", "service", "room", "music", "staff", "view", "price", "story", "acting", "garden", "pool", "coffee")
PRAISE = tuple("great lovely excellent perfect charming wonderful superb pleasant delightful brilliant".split())
BLAME = tuple("awful terrible boring dirty rude disappointing horrible poor dreadful noisy".split())
VENUES = ("hotel", "museum", "theatre", "cafe", "restaurant", "gallery", "cinema", "market", "library", "station")

ONES = tuple(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen".split()
)
TENS = ("", "", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")


def number_in_words(number: int) -> str:
    """English words of an integer from 0 to 99: 42 gives ``forty-two``."""
    if not 0 <= number <= 99:
        raise ValueError(f"number must be from 0 to 99, got {number}")
    if number < 20:
        return ONES[number]
    tens, ones = divmod(number, 10)
    return TENS[tens] + (f"-{ONES[ones]}" if ones else "")
