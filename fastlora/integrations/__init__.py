"""fastlora inside trainers that build the model themselves: a callback of transformers' Trainer, which TRL's and LLaMA-Factory's are, too.

    from fastlora.integrations import AccelerateCallback
    run_exp(arguments, callbacks=[AccelerateCallback()])        # LLaMA-Factory
    Trainer(..., callbacks=[AccelerateCallback(loss=True)])     # or `fastlora.accelerate(model, loss=True)` before it

axolotl's plugin is fastlora/integrations/axolotl.py.
"""

from typing import Any

from transformers import TrainerCallback

from fastlora.peft import accelerate


class AccelerateCallback(TrainerCallback):
    """Calls `fastlora.accelerate(model, **options)` as training begins, when the trainer has made the model.

    Args:
        options: `accelerate`'s.

    Raises:
        As `accelerate`, when training begins.
    """

    def __init__(self, **options: Any) -> None:
        self.options = options

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        accelerate(model, **self.options)
