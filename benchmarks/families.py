"""The goals of what is trained beside LoRA on a plain base: soft prompts, prefixes that rows share, DoRA, quantised bases, a mixture's experts.

On a CPU, against PEFT in the same run, in float32 and bfloat16. The goals stand with what measures them:

prompt tuning, 100 rows          1.8 times PEFT's step's speed, and 1.25 of the time of our LoRA r 16
prefix tuning, P-tuning          1.5 times
a template of 200 tokens         2.5 times, in 0.5 of the memory
a new token behind a prompt      1.1 of the bare model's behind a cache as long
settings that are right          all of them
DoRA over LoRA                   1.15
NF4, int8                        2 times the speed of PEFT and bitsandbytes, in no more memory
a mixture's experts              2 times, in 0.5 of what the adapters take
"""

from .dora import dora_lines
from .experts import expert_lines
from .prompts import prompt_lines
from .quantised import quantised_lines
from .session import Line


def family_lines() -> dict[str, Line]:
    """All of them, by their titles."""
    return prompt_lines() | dora_lines() | quantised_lines() | expert_lines()
