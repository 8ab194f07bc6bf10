"""The main families' chat templates, in small: with and without marks at what the assistant says."""

# Start, what stands before a turn's words, the words, what stands behind, generation prompt.
TEMPLATES = {
    "ChatML": ("", "{{ '<|user|>' + m.role + '\n' }}", "{{ m.content }}", "{{ '</s>\n' }}", "<|user|>assistant\n"),
    "Llama 2": (
        "",
        "{% if m.role == 'user' %}{{ bos_token + '[INST] ' }}{% else %}{{ ' ' }}{% endif %}",
        "{{ m.content + ' ' }}",
        "{% if m.role == 'user' %}{{ '[/INST]' }}{% else %}{{ eos_token }}{% endif %}",
        "",
    ),
    "Llama 3": (
        "{{ bos_token }}",
        "{{ '<|user|>' + m.role + '<|assistant|>\n\n' }}",
        "{{ m.content | trim }}",
        "{{ '</s>' }}",
        "<|user|>assistant<|assistant|>\n\n",
    ),
    "Gemma": (
        "{{ bos_token }}",
        "{{ '<|user|>' + m.role + '\n' }}",
        "{{ m.content | trim }}",
        "{{ '<|assistant|>\n' }}",  # ends a turn, and is not the end token
        "<|user|>assistant\n",
    ),
}


def chat_template(name: str, opening: str = "", closing: str = "") -> str:
    """The family's template, with something before and behind the assistant's words."""
    start, before, said, behind, prompt = TEMPLATES[name]
    if opening:
        said = f"{{% if m.role == 'assistant' %}}{opening}{said}{closing}{{% else %}}{said}{{% endif %}}"
    prompt = f"{{% if add_generation_prompt %}}{{{{ {prompt!r} }}}}{{% endif %}}"
    return f"{start}{{% for m in messages %}}{before}{said}{behind}{{% endfor %}}{prompt}"
