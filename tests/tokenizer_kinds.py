"""Small tokenizers of every kind that models come with, made in the test: what they do at the borders of a text differs."""

import json
from typing import Any

import tiny
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<|user|>", "<|assistant|>"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
CORPUS = [
    *(f"The {animal} {act}. What does the {animal} do? It {act}." for animal in tiny.ANIMALS for act in tiny.ACTS),
    *(f"{a} + {b} = {a + b}, so {a}{b}! And playing, singing; sleeping: eating." for a in range(9) for b in range(9)),
    "Answer: yes. answer: no\nQ: 2+2=\nA: 4\n\nÜbung café naïve",
]


def byte_level(add_prefix_space: bool, template: str = "$A", **names: str | None) -> Any:
    """GPT-2's, Llama 3's, Qwen's and, with a space in front, RoBERTa's."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(CORPUS, trainer)
    return _finished(core, template, names)


def metaspace(prepend_scheme: str, model: str, template: str = "$A", byte_fallback: bool = True) -> Any:
    """SentencePiece's: Llama's (bpe), T5's (unigram), by tokenizers' own pre-tokenizer."""
    core = _sentence_piece(model, byte_fallback)
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend_scheme)  # split: no piece of two words
    _train(core, model, byte_fallback)
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend_scheme, split=model == "unigram")
    core.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Metaspace(prepend_scheme=prepend_scheme, split=model == "unigram")]
    )
    return _finished(core, template, {})


def legacy_metaspace(prepend: bool, template: str = "$A") -> Any:
    """Llama 2's first form, whose normalizer writes the space in front of every text; without it Gemma's."""
    core = _sentence_piece("bpe", True)
    steps = [normalizers.Prepend("▁")] if prepend else []
    core.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    core.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")  # for its training only
    _train(core, "bpe", True)
    core.pre_tokenizer = None
    strip = [decoders.Strip(" ", 1, 0)] if prepend else []
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    return _finished(core, template, {})


def word_piece() -> Any:
    """BERT's: lower case, no end token, and a separator behind every text."""
    core = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    core.normalizer = normalizers.BertNormalizer()
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.decoder = decoders.WordPiece(cleanup=False)
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    core.train_from_iterator(
        CORPUS, trainers.WordPieceTrainer(vocab_size=300, special_tokens=special, show_progress=False)
    )
    _frame(core, "[CLS] $A [SEP]")
    return PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]"
    )


def _sentence_piece(model: str, byte_fallback: bool) -> Tokenizer:
    if model == "bpe":
        return Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=byte_fallback))
    return Tokenizer(models.Unigram())


def _train(core: Tokenizer, model: str, byte_fallback: bool) -> None:
    special = SPECIAL + BYTES if byte_fallback else SPECIAL
    kind = trainers.BpeTrainer if model == "bpe" else trainers.UnigramTrainer
    options = {} if model == "bpe" else {"unk_token": "<unk>"}
    core.train_from_iterator(CORPUS, kind(vocab_size=460, special_tokens=special, show_progress=False, **options))
    if model == "unigram":
        vocabulary = [tuple(piece) for piece in json.loads(core.to_str())["model"]["vocab"]]
        core.model = models.Unigram(vocabulary, unk_id=SPECIAL.index("<unk>"), byte_fallback=byte_fallback)


def _frame(core: Tokenizer, template: str) -> None:
    words = [word for word in template.split() if word != "$A"]
    core.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[(word, core.token_to_id(word)) for word in words]
    )


def _finished(core: Tokenizer, template: str, names: dict[str, str | None]) -> Any:
    _frame(core, template)
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>", **names}
    state = json.loads(core.to_str())
    # The trainer took the bytes for special tokens, which they are not.
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] in SPECIAL]
    core = Tokenizer.from_str(json.dumps(state))
    return PreTrainedTokenizerFast(tokenizer_object=core, **{name: token for name, token in names.items() if token})
