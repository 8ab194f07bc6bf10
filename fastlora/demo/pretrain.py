"""Train the demo's base model from scratch: ``python -m fastlora.demo.pretrain --output DIR``.

A small Llama with its own byte-level BPE tokenizer, trained on every built-in task but summarisation (whose text only
the tokenizer sees). This command made ``fastlora/assets/base``; training.json beside the weights says how.
"""

import copy
import json
import math
import platform
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Annotated, Any

import tokenizers
import torch
import transformers
import typer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fastlora.demo.tasks import BASE_TASKS, TASKS, answers, generate
from fastlora.evaluation import exact_match

VOCABULARY = 1536
BATCH = 32  # examples a step
CHUNK = 64  # steps whose examples are drawn together and sorted by length, so that little of a batch is padding
SHARES = {"arithmetic": 2, "ordering": 2, "reading": 3}  # of the examples, all other tasks' being 1: these take longer
PROMPT_WEIGHT = 0.1  # of a prompt token's loss, a completion token's being 1: it teaches the language, not the answers
PEAK_LR = 1.5e-3
WARMUP = 0.06
INIT_STD = 0.06  # about 1 / sqrt(hidden size)
EVALUATED = 100  # held-out examples a task

Batch = tuple[torch.Tensor, torch.Tensor]  # token ids and loss weights, each [B, T], padded on the right

# A user's turn is a prompt of the built-in tasks, the assistant's turn its completion.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}"
    "Answer:{% generation %}{{ ' ' + message['content'] + eos_token }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '\\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}Answer:{% endif %}"
)


def make_tokenizer(seed: int, examples_per_task: int = 2000) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on all tasks' text; single digits, <s> in front, </s> and <pad>."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    examples = (example for task in TASKS for example in generate(task, examples_per_task, seed))
    tokenizer.train_from_iterator((example.prompt + example.completion for example in examples), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        chat_template=CHAT_TEMPLATE,
        model_max_length=512,
    )


def make_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A Llama of 3.4 million parameters with random weights, from torch's generator.

    Its attention starts as a copier: with k_proj = q_proj a token attends to its likes, and with o_proj = v_proj
    transposed what it attends to is added as it is, hence made likely by the tied embeddings. From independent weights
    two runs had 1 % and 43 % of the descriptions right after 1,000 steps; this way two had 90 % and 94 % after 500.
    Close to the mimetic initialisation of Trockman and Kolter, 2023, arXiv 2305.09828. In the same spirit, a word that
    begins a line and the same word behind a space, which are two tokens, start with embeddings of cosine 0.9.
    """
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=640,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        initializer_range=INIT_STD,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.k_proj.weight.copy_(layer.self_attn.q_proj.weight)
            layer.self_attn.o_proj.weight.copy_(layer.self_attn.v_proj.weight.T)
        vocabulary, embeddings = tokenizer.get_vocab(), model.model.embed_tokens.weight  # [V, D]
        for word, spaced in ((word, vocabulary.get(f"Ġ{word}")) for word in vocabulary):
            if spaced is not None:
                token = vocabulary[word]
                embeddings[token] = 0.9 * embeddings[spaced] + (1 - 0.9**2) ** 0.5 * embeddings[token]
    model.set_attn_implementation("eager")  # rows this short are faster without a fused attention kernel
    return model


def batches(tokenizer: PreTrainedTokenizerFast, steps: int, seed: int) -> Iterator[Batch]:
    """``steps`` batches of BATCH examples, drawn from all tasks by their shares."""
    rng = Random(seed)
    shares = [task for task in BASE_TASKS for _ in range(SHARES.get(task, 1))]
    each = math.ceil(CHUNK * BATCH / len(shares))
    for start in range(0, steps, CHUNK):
        chunk_seed = 1_000_000 * (seed + 1) + start
        examples = [e for task in BASE_TASKS for e in generate(task, each * shares.count(task), chunk_seed)]
        prompts = tokenizer([example.prompt for example in examples])["input_ids"]
        completions = tokenizer([example.completion for example in examples], add_special_tokens=False)["input_ids"]
        rows = [
            (prompt + completion + [tokenizer.eos_token_id], len(prompt))
            for prompt, completion in zip(prompts, completions, strict=True)
        ]
        rng.shuffle(rows)
        by_length = sorted(rows[: CHUNK * BATCH], key=lambda row: len(row[0]))
        for index in rng.sample(range(CHUNK), CHUNK)[: steps - start]:
            ids, prompt_lengths = zip(*by_length[index * BATCH : (index + 1) * BATCH], strict=True)
            tokens = pad_sequence(
                [torch.tensor(row) for row in ids], batch_first=True, padding_value=tokenizer.pad_token_id
            )
            weights = (tokens != tokenizer.pad_token_id).float()
            for row, length in enumerate(prompt_lengths):
                weights[row, :length] = PROMPT_WEIGHT
            yield tokens, weights


def weighted_loss(model: LlamaForCausalLM, tokens: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of the next token, each weighted by what the token predicted weighs; a float32 scalar."""
    # Padding stands on the right and attention is causal: no mask is needed.
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(tokens, use_cache=False).logits[:, :-1]  # [B, T - 1, V]
    losses = cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
    weights = weights[:, 1:].flatten()
    return losses @ weights / weights.sum()


def pretrain(
    output: Annotated[Path, typer.Option(help="Folder to write the model to.")],
    steps: int = 6000,
    seed: int = 0,
    threads: int = 1,
    save_every: int = 500,
) -> dict[str, Any]:
    """Train the demo's base model from scratch.

    Saves tokenizer, model (bfloat16 safetensors) and training.json under ``output``; returns the latter. Every ``save_every`` steps the state so
    far is saved the same way, so that ``output`` holds a usable model early on.
    """
    output.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    tokenizer = make_tokenizer(seed)
    model = make_model(tokenizer)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_LR, betas=(0.9, 0.95), weight_decay=0.05, fused=True)
    warmup = max(1, int(WARMUP * steps))
    schedule = transformers.get_cosine_schedule_with_warmup(optimizer, warmup, steps)
    held_out = {task: generate(task, EVALUATED, seed=0, split="test") for task in BASE_TASKS}
    started, tokens_seen = time.perf_counter(), 0
    record: dict[str, Any] = {}
    for step, (tokens, weights) in enumerate(batches(tokenizer, steps, seed), start=1):
        loss = weighted_loss(model, tokens, weights)
        loss.backward()
        tokens_seen += tokens.numel()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 100 == 0:
            rate = tokens_seen / (time.perf_counter() - started)
            print(f"step {step}/{steps}  loss {loss.item():.4f}  {rate:.0f} tokens/s", flush=True)
        if step % save_every == 0 or step == steps:
            record = {
                "command": f"python -m fastlora.demo.pretrain --output DIR --steps {steps} --seed {seed}"
                f" --threads {threads}",
                "step": step,
                "steps": steps,
                "seed": seed,
                "threads": threads,
                "batch": BATCH,
                "tokens": tokens_seen,
                "seconds": round(time.perf_counter() - started),
                "loss": round(loss.item(), 4),
                "parameters": model.num_parameters(),
                "tasks": list(BASE_TASKS),
                "exact_match": {
                    task: exact_match(answers(model, tokenizer, examples), [one.completion for one in examples])
                    for task, examples in held_out.items()
                },
                "versions": {one.__name__: one.__version__ for one in (torch, transformers, tokenizers)}
                | {"python": platform.python_version(), "machine": platform.machine()},
            }
            copy.deepcopy(model).bfloat16().save_pretrained(output)
            tokenizer.save_pretrained(output)
            (output / "training.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
            print(json.dumps(record["exact_match"]), flush=True)
    return record


if __name__ == "__main__":
    typer.run(pretrain)
