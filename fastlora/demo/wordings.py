"""How each of the demo's tasks is asked, in five wordings or six."""

from fastlora.data.templates import Template, TemplateSet


def _same_completion(completion: str, *prompts: str) -> tuple[Template, ...]:
    return tuple(Template(prompt, completion) for prompt in prompts)


SUMMARIZATION = TemplateSet(
    _same_completion(
        "{summary}",
        "Summarize the following conversation.\n\n{dialogue}\n\nSummary:",
        "{dialogue}\n\nWhat was the conversation about? Summary:",
        "Read the dialogue and say briefly what was agreed.\n\n{dialogue}\n\nSummary:",
        "Dialogue:\n{dialogue}\n\nWrite a short summary.\nSummary:",
        "Here is a chat between two people.\n\n{dialogue}\n\nIn short:",
        "{dialogue}\n\nSum up the chat above.\nSummary:",
    )
)

SENTIMENT = TemplateSet(
    _same_completion(
        "{label}",
        "Review: {text}\nIs this review positive, negative or neutral?\nAnswer:",
        "{text}\n\nWhat is the sentiment of this text?\n{options}\nAnswer:",
        "What does the writer feel?\n{options}\nText: {text}\nAnswer:",
        "Choose the sentiment of the text.\n\n{text}\n\n{options}\nSentiment:",
        "Text: {text}\nSentiment:",
        'How would you rate "{text}"?\n{options}\nAnswer:',
    ),
    options=("positive", "negative", "neutral"),
)

EXTRACTION = TemplateSet(
    (
        Template(
            "{text}\n\nList the person, the thing, the place and the day.\nAnswer:", "{person}, {thing}, {place}, {day}"
        ),
        Template(
            "Find the person, the place and the day.\nText: {text}\nAnswer:",
            "person: {person}; place: {place}; day: {day}",
        ),
        Template("Text: {text}\nWhich city is named in the text?\nAnswer:", "{place}"),
        Template("{text}\n\nWho is the text about?\nAnswer:", "{person}"),
        Template("What thing is named in this text?\n{text}\nAnswer:", "the {thing}"),
        Template("Extract the day and the city.\n\n{text}\n\nEntities:", "{day}, {place}"),
    )
)

ARITHMETIC = TemplateSet(
    _same_completion(
        "{result}",
        "What is {expression}?\nAnswer:",
        "Work out {expression}.\nAnswer:",
        "{story} {question}\nAnswer:",
        "Solve the problem.\n\n{story}\n{question}\nAnswer:",
        "{expression} =",
        "Question: {question} {story}\nAnswer:",
    )
)

TRANSLATION = TemplateSet(
    (
        Template("Write the record as JSON.\n\n{pairs}\n\nJSON:", "{json}"),
        Template("{json}\n\nWrite this JSON as a record line.\nRecord:", "{pairs}"),
        Template("Record: {pairs}\nTurn it into a CSV row.\nCSV:", "{csv}"),
        Template("Columns: name,item,colour,count\nRow: {csv}\nWrite the row as JSON.\nJSON:", "{json}"),
        Template("Columns: name,item,colour,count\nRow: {csv}\nWrite the row as a record line.\nRecord:", "{pairs}"),
        Template("From JSON to CSV: {json}\nCSV:", "{csv}"),
    )
)

ORDERING = TemplateSet(
    (
        Template("Sort from the smallest to the largest: {numbers}\nAnswer:", "{ascending}"),
        Template("Sort from the largest to the smallest: {numbers}\nAnswer:", "{descending}"),
        Template("Numbers: {numbers}\nWhich is the largest?\nAnswer:", "{largest}"),
        Template("{numbers}\n\nWhich of these numbers is the smallest?\nAnswer:", "{smallest}"),
        Template("{numbers}\n\nPut these numbers in order, smallest first.\nOrdered:", "{ascending}"),
        Template("Count down: {numbers}\nOrdered:", "{descending}"),
    )
)

READING = TemplateSet(
    _same_completion(
        "{answer}",
        "{story}\n\nQuestion: {question}\nAnswer:",
        "Read the story and answer the question.\n\n{story}\n\n{question}\nAnswer:",
        "Answer the question from the story.\nQuestion: {question}\nStory: {story}\nAnswer:",
        "Story: {story}\n{question}\nAnswer:",
        "{question}\n\n{story}\n\nAnswer:",
    )
)

DESCRIPTION = TemplateSet(
    (
        Template(
            "{facts}\n\nWrite one sentence with these facts.\nSentence:",
            "{person} {past} the {thing} in {place} on {day}.",
        ),
        Template("Facts: {facts}\nSentence:", "{person} {past} the {thing} in {place} on {day}."),
        Template("Begin with the day.\n{facts}\nSentence:", "On {day}, {person} {past} the {thing} in {place}."),
        Template("Leave out the city.\n{facts}\nSentence:", "{person} {past} the {thing} on {day}."),
        Template("Say who did what.\n{facts}\nSentence:", "{person} {past} the {thing}."),
    )
)
