"""axolotl's plugin: one line of its YAML, after which its LoRA layers run fastlora's operators.

plugins:
  - fastlora.integrations.axolotl.FastloraPlugin
"""

from typing import Any

from axolotl.integrations.base import BasePlugin

from fastlora.peft import accelerate


class FastloraPlugin(BasePlugin):
    """Accelerates the model once axolotl has loaded it and put its adapter on."""

    def post_model_load(self, cfg: Any, model: Any) -> None:
        accelerate(model)
