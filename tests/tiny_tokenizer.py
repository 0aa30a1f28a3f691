"""A tiny Gemma-like SentencePiece vocabulary, trained in a blink, for tests that need a tokenizer.

The ids of the specials are those of Gemma 1 and 2: <pad> 0, <eos> 1, <bos> 2, <unk> 3, <mask> 4,
<2mass> 5, [@BOS@] 6, <unused0> to <unused98> 7 to 105, <start_of_turn> 106, <end_of_turn> 107.
Then, as in the real vocabulary, runs of newlines and of spaces and one html tag as user-defined
pieces, 256 byte pieces, and the merges of a small synthetic text.
"""

from __future__ import annotations

import functools
import io
import json
import random
from pathlib import Path

import sentencepiece

VOCABULARY = 512
SPECIALS = ["<mask>", "<2mass>", "[@BOS@]", *(f"<unused{n}>" for n in range(99))]
TURNS = ["<start_of_turn>", "<end_of_turn>"]
PLAIN = ["\n", "\n\n", "\n\n\n", "▁▁", "▁▁▁", "▁▁▁▁", "<b>"]  # user-defined, yet plain text


def _sentences(seed: int = 0) -> list[str]:
    """Chat-like lines, calls as JSON and lines that hold every printable ASCII character."""
    rng = random.Random(seed)
    words = ["what", "is", "the", "weather", "in", "Paris", "London", "set", "timer", "find"]
    words += ["book", "price", "of", "a", "user", "model", "tool_call"]
    names = ["get_weather", "set_timer", "find_book", "get_price"]
    lines = []
    for _ in range(400):
        text = " ".join(rng.choices(words, k=8))
        call = {"name": rng.choice(names), "arguments": {rng.choice(words): rng.randint(0, 999)}}
        lines += [text + rng.choice("?.!,"), json.dumps(call), f"{rng.choice(words)}: {text}"]
    lines += ["".join(rng.sample([chr(c) for c in range(33, 127)], 94)) for _ in range(40)]
    return lines


@functools.cache
def _model(overrides: str) -> bytes:
    model = io.BytesIO()
    settings = {
        "model_writer": model,
        "model_type": "bpe",
        "vocab_size": VOCABULARY,
        "user_defined_symbols": [*SPECIALS, *TURNS, *PLAIN],
        "pad_id": 0,
        "eos_id": 1,
        "bos_id": 2,
        "unk_id": 3,
        "pad_piece": "<pad>",
        "eos_piece": "<eos>",
        "bos_piece": "<bos>",
        "unk_piece": "<unk>",
        "byte_fallback": True,
        "split_digits": True,
        "allow_whitespace_only_pieces": True,
        "normalization_rule_name": "identity",
        "add_dummy_prefix": False,
        "remove_extra_whitespaces": False,
        "num_threads": 1,
        "minloglevel": 2,
    }
    settings |= json.loads(overrides)
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(_sentences()), **settings)
    return model.getvalue()


def make_tokenizer_model(folder: str | Path, **overrides) -> Path:
    """Write `folder`/tokenizer.model (the folder is made where it is missing) and return its path.

    `overrides` are settings of SentencePiece's trainer. The same ones give the same bytes at every
    call; the training runs once a process for each.
    """
    path = Path(folder) / "tokenizer.model"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(_model(json.dumps(overrides)))
    return path
