"""Lightning's Trainer on a PEFT model: `fastlora.accelerate` is one line where the module is made.

python examples/lightning_trainer.py                               the shipped base model, on a CPU in seconds
python examples/lightning_trainer.py HuggingFaceTB/SmolLM2-135M-Instruct --data train.jsonl --steps 200 --lr 2e-4
"""

import argparse
from functools import partial

import lightning
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import fastlora
from fastlora.data.examples import Example, read_examples
from fastlora.data.rows import collate, encode, pad_token_id
from fastlora.demo import BASE_MODEL
from fastlora.demo.tasks import generate


class Adapter(lightning.LightningModule):
    def __init__(self, name: str, lr: float) -> None:
        super().__init__()
        lora = LoraConfig(r=16, lora_alpha=32, lora_dropout=0.05, target_modules="all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(name), lora)
        self.model, self.lr, self.losses = fastlora.accelerate(model.train(), loss=True, fuse=True), lr, []

    def training_step(self, batch: dict[str, torch.Tensor], _: int) -> torch.Tensor:
        self.losses.append(loss := self.model(**batch).loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW((p for p in self.model.parameters() if p.requires_grad), lr=self.lr)


def main(arguments: list[str] | None = None) -> list[float]:
    """Train, save the adapter, print which implementation ran in each layer; returns each step's loss."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default=str(BASE_MODEL), help="a folder, or a hub id")
    parser.add_argument("--data", help="JSONL: prompt and completion, or messages; else generated dialogues")
    parser.add_argument("--output", default="lightning-output")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--lr", type=float, default=3e-3)
    options = parser.parse_args(arguments)

    drawn = [Example(one.prompt, one.completion) for one in generate("summarization", 64, seed=0)]
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    rows = encode(read_examples(options.data) if options.data else drawn, tokenizer, max_length=512).rows
    pad = pad_token_id(tokenizer)
    batches = torch.utils.data.DataLoader(rows, 4, shuffle=True, collate_fn=partial(collate, pad=pad))
    trainer = lightning.Trainer(max_steps=options.steps, logger=False, enable_checkpointing=False)
    trainer.fit(module := Adapter(options.model, options.lr), batches)
    module.model.save_pretrained(options.output)  # PEFT's own format
    print(fastlora.report(module.model))
    return [loss.item() for loss in module.losses]


if __name__ == "__main__":
    main()
