"""Instruction templates: how one task is asked in several ways, as FLAN does.

A template is a pair of format strings. The same content (its fields) can be rendered by any template of its task, so
that a model learns the task and not one wording of it. A completion always begins with one space: byte-level BPE
writes a word in a running text as " word", and a completion must use the same token as the prompt it copies from.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from random import Random


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
