"""Instruction templates: how one task is asked in several ways, as FLAN does. `wordings.toml` has them.

A template is a pair of format strings. The same content (its fields) can be rendered by any template of its task, so
that a model learns the task and not one wording of it. A completion always begins with one space: byte-level BPE
writes a word in a running text as " word", and a completion must use the same token as the prompt it copies from.
"""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from random import Random

TABLES = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))
"""The templates by task, and what is said in the dialogues."""


@dataclass(frozen=True)
class Template:
    """One wording: format strings whose names are the fields of the task's content."""

    prompt: str
    completion: str

    def render(self, fields: Mapping[str, str]) -> tuple[str, str]:
        """The prompt and the completion for these fields; KeyError names a field that is missing."""
        return self.prompt.format_map(fields), " " + self.completion.format_map(fields)


@dataclass(frozen=True)
class TemplateSet:
    """All wordings of one task. With ``options``, a template may use {options}: the answers allowed, shuffled."""

    templates: tuple[Template, ...]
    options: tuple[str, ...] = ()

    def draw(self, fields: Mapping[str, str], rng: Random) -> tuple[str, str]:
        """Render ``fields`` with one template, both it and the order of the options drawn from ``rng``."""
        template = rng.choice(self.templates)
        if not self.options:
            return template.render(fields)
        shuffled = rng.sample(self.options, len(self.options))
        return template.render({**fields, "options": "OPTIONS:\n" + "\n".join(f"- {option}" for option in shuffled)})


def of_task(task: str) -> TemplateSet:
    return TemplateSet(
        tuple(Template(*pair) for pair in TABLES[task]["templates"]), tuple(TABLES[task].get("options", ()))
    )
