"""Writes tests/references/logits.safetensors: what transformers makes of the tiny models.

    python tests/make_references.py

Needed only when the tiny models change. `test_parity.py` holds minilora to these numbers where
transformers is not installed.
"""

from pathlib import Path

import torch
from conftest import tiny_model, tiny_raw
from safetensors.torch import save_file

REFERENCES = Path(__file__).parent / "references" / "logits.safetensors"
FAMILIES = ("gemma", "gemma2", "gemma3_text")
COLUMNS = slice(None, None, 8)  # every eighth logit is enough to tell


def reference_ids() -> torch.Tensor:
    """Two rows of 24 tokens: three windows long."""
    return (torch.arange(48).view(2, 24) * 37 + 11) % 512


def transformers_model(model, model_type: str, **overrides):
    """The transformers model with the weights of ours, eager attention, in the same dtype."""
    from transformers import AutoConfig, AutoModelForCausalLM

    raw = tiny_raw(model_type, **overrides)
    raw.pop("model_type")
    config = AutoConfig.for_model(model_type, **raw, tie_word_embeddings=True)
    theirs = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    missing, extra = theirs.load_state_dict(
        {f"model.{name}": tensor for name, tensor in model.state_dict().items()}, strict=False)
    assert missing in ([], ["lm_head.weight"]) and not extra
    theirs.tie_weights()
    return theirs.to(model.embed_tokens.weight.dtype)


@torch.no_grad()
def main() -> None:
    logits = {}
    for family in FAMILIES:
        theirs = transformers_model(tiny_model(family), family)
        logits[family] = theirs(reference_ids()).logits[..., COLUMNS].contiguous()
    REFERENCES.parent.mkdir(exist_ok=True)
    save_file(logits, REFERENCES)


if __name__ == "__main__":
    main()
