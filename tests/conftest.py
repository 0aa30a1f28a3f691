"""What test files share: tiny models on shapes that tell bugs apart, a tokenizer, real data."""

import math
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from tiny_tokenizer import make_tokenizer_model

from minilora.chat import DIALECTS
from minilora.config import NANO, GemmaConfig
from minilora.model import Gemma
from minilora.tokenizer import Tokenizer

SHARED = Path(__file__).parents[2] / "shared"
LAW = settings(max_examples=100, deadline=None, derandomize=True, database=None)

# The query scalar is not the head dim, √D is exact in no dtype, the window is shorter than the
# sequences of the tests, N / K ≠ 1, N·H ≠ D, and seven layers of Gemma 3 reach a global one.
_TINY = {
    "gemma": dict(hidden_size=64, intermediate_size=128, num_hidden_layers=3,
                  num_attention_heads=4, num_key_value_heads=1),
    "gemma2": dict(hidden_size=72, intermediate_size=144, num_hidden_layers=4,
                   num_attention_heads=4, num_key_value_heads=2, query_pre_attn_scalar=18,
                   sliding_window=8),
    "gemma3_text": dict(hidden_size=72, intermediate_size=144, num_hidden_layers=7,
                        num_attention_heads=4, num_key_value_heads=2, query_pre_attn_scalar=18,
                        sliding_window=8, rope_scaling=dict(rope_type="linear", factor=8.0)),
}


def tiny_raw(model_type: str = "gemma2", **overrides) -> dict:
    """A config.json of a tiny Gemma, as a dict."""
    return {"model_type": model_type, "vocab_size": 512, "head_dim": 24,
            "max_position_embeddings": 512, "hidden_activation": "gelu_pytorch_tanh",
            **_TINY[model_type], **overrides}


def tiny_config(model_type: str = "gemma2", **overrides) -> GemmaConfig:
    return GemmaConfig.from_dict(tiny_raw(model_type, **overrides))


def tiny_model(model_type: str = "gemma2", seed: int = 0, dtype: torch.dtype = torch.float32,
               **overrides) -> Gemma:
    """A Gemma with weights wide enough that caps bite, and norms that are not at their start.

    The table is narrower: a tied table that dominates would predict each token's own id.
    """
    model = Gemma(tiny_config(model_type, **overrides))
    with torch.no_grad():
        for number, (name, parameter) in enumerate(model.named_parameters()):
            width = 0.17 if "norm" in name else 0.1 if "embed" in name else 0.35
            parameter.copy_(width * noise(parameter.shape, 1000 * seed + number))
    return model.to(dtype).requires_grad_(False)


def noise(shape: torch.Size, seed: int) -> torch.Tensor:
    """Numbers spread over (-1, 1) by a formula: the same with every version and machine."""
    at = torch.arange(math.prod(shape), dtype=torch.float64) + 7919.0 * seed
    return ((torch.sin(at * 12.9898) * 43758.5453) % 2.0 - 1.0).view(shape)


# A tool as OpenAI writes it.
TOOL = {"type": "function", "function": {
    "name": "get_weather", "description": "Weather", "parameters": {
        "type": "object", "properties": {"city": {"type": "string"}}}}}


def load_tokenizer(model: Path) -> Tokenizer:
    """The tokenizer of a tokenizer.model, with the tokens of the Hermes dialect."""
    tokenizer = Tokenizer.load(model.parent)
    tokenizer.add_tokens(DIALECTS["hermes"].tokens)
    return tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    return load_tokenizer(make_tokenizer_model(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture(scope="session")
def nano_dir() -> Path:
    """The checkpoint that ships with minilora."""
    return NANO


@pytest.fixture(scope="session")
def gemma2_tokenizer_model() -> Path:
    """The real Gemma 2 vocabulary, where it is at hand."""
    path = SHARED / "data" / "gemma2_tokenizer" / "tokenizer.model"
    if not path.exists():
        pytest.skip("the real Gemma 2 vocabulary is not at hand")
    return path
