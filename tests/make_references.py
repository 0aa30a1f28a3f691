"""Writes tests/references/: what other implementations make of the tiny models.

    python tests/make_references.py             every group
    python tests/make_references.py logits      only these
    python tests/make_references.py dialects    the texts of test_chat.py; asks for mistral-common

`test_parity.py` holds minilora to these numbers where transformers is not installed. Needed only
when the tiny models change. A group is a function that returns tensors by name, and becomes the
file of its name; a new one is written and added to GROUPS. The folder is kept small: of wide
tensors some columns are enough to tell.
"""

import copy
import functools
import json
import os
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import torch
from conftest import REAL, tiny_model, tiny_raw
from safetensors.torch import load_file, save_file
from torch import Tensor

from minilora.config import LINEARS, LoraConfig
from minilora.data import IGNORED
from minilora.lora import adapted, attach, trainable
from minilora.model import Gemma

FOLDER = Path(__file__).parent / "references"
FAMILIES = ("gemma", "gemma2", "gemma3_text")
COLUMNS = slice(None, None, 16)


class Shape(NamedTuple):
    """A tiny model, and where in its context the reference ids begin."""
    family: str
    overrides: dict = {}
    start: int = 0


# What each generation can get wrong: caps and scalars, one kv head and several, √D that bfloat16
# rounds (D = 72 and 80), N·H ≠ D, an ε that shows, the rotation of Gemma 3 in both spellings with
# no number where the defaults have it, and the rotation at the end of a published context.
SHAPES = {
    "gemma": Shape("gemma"),
    "gemma many heads": Shape("gemma", dict(num_key_value_heads=4, hidden_size=80,
                                            rms_norm_eps=1e-3, rope_theta=3e4)),
    "gemma2": Shape("gemma2"),
    "gemma2 one kv head": Shape("gemma2", dict(num_key_value_heads=1, hidden_size=80,
                                               query_pre_attn_scalar=30, rms_norm_eps=1e-3)),
    "gemma2 no caps": Shape("gemma2", dict(attn_logit_softcapping=None,
                                           final_logit_softcapping=None)),
    "gemma2 tight caps": Shape("gemma2", dict(attn_logit_softcapping=2.0,
                                              final_logit_softcapping=3.0)),
    "gemma3": Shape("gemma3_text"),
    "gemma3 one kv head": Shape("gemma3_text", dict(num_key_value_heads=1, num_attention_heads=3,
                                                    rms_norm_eps=1e-3)),
    "gemma3 flat keys": Shape("gemma3_text", dict(
        rope_theta=3e5, rope_local_base_freq=2e4, sliding_window_pattern=3,
        rope_scaling=dict(rope_type="linear", factor=4.0))),
    "gemma3 nested keys": Shape("gemma3_text", dict(
        layer_types=["sliding_attention", "sliding_attention", "full_attention"] * 2
        + ["sliding_attention"], rope_scaling=None, rope_parameters=dict(
            full_attention=dict(rope_type="linear", factor=4.0, rope_theta=3e5),
            sliding_attention=dict(rope_type="default", rope_theta=2e4)))),
    "gemma far": Shape("gemma", dict(hidden_size=80), start=8192 - 24),
    "gemma2 far": Shape("gemma2", start=8192 - 24),
    "gemma3 far": Shape("gemma3_text", start=131072 - 24),
}
# Those that are also compared in bfloat16: √D is not exact, and no angle would be.
ROUNDED = ("gemma far", "gemma2 far", "gemma3 far")


def reference_ids() -> Tensor:
    """Two rows of 24 tokens: three windows long."""
    return (torch.arange(48).view(2, 24) * 37 + 11) % 512


def reference_positions(name: str) -> Tensor:
    """The positions of these tokens in a shape of SHAPES, [2, 24]."""
    return (SHAPES[name].start + torch.arange(24)).expand(2, -1)


def shape_model(name: str, dtype: torch.dtype = torch.float32) -> Gemma:
    """Our model of a shape of SHAPES."""
    return tiny_model(SHAPES[name].family, dtype=dtype, **SHAPES[name].overrides)


def transformers_model(model, model_type: str, **overrides):
    """The transformers model with the weights of ours, eager attention, in the same dtype."""
    from transformers import AutoConfig, AutoModelForCausalLM

    raw = copy.deepcopy(tiny_raw(model_type, **overrides))  # it writes into what it is given
    raw.pop("model_type")
    config = AutoConfig.for_model(model_type, **raw, tie_word_embeddings=True)
    theirs = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    missing, extra = theirs.load_state_dict(
        {f"model.{name}": tensor for name, tensor in model.state_dict().items()}, strict=False)
    assert missing in ([], ["lm_head.weight"]) and not extra
    theirs.tie_weights()
    return theirs.to(model.embed_tokens.weight.dtype)


class Outputs(NamedTuple):
    """What a model makes of the reference ids."""
    logits: Tensor    # [2, 24, V]
    embedded: Tensor  # [2, 24, D], times √D
    normed: Tensor    # [2, 24, D], that after the first norm


@torch.no_grad()
def transformers_outputs(name: str, dtype: torch.dtype = torch.float32) -> Outputs:
    """What transformers makes of them in a shape of SHAPES."""
    theirs = transformers_model(shape_model(name, dtype), SHAPES[name].family,
                                **SHAPES[name].overrides)
    out = theirs(reference_ids(), position_ids=reference_positions(name),
                 output_hidden_states=True)
    embedded = out.hidden_states[0]
    return Outputs(out.logits, embedded, theirs.model.layers[0].input_layernorm(embedded))


# --- training -------------------------------------------------------------------------------------

class Variant(NamedTuple):
    """A way to train, in our words and in peft's."""
    ours: dict = {}
    theirs: dict = {}
    lr_ratio: float = 1.0


VARIANTS = {
    "LoRA": Variant(),
    "rsLoRA": Variant(dict(rslora=True), dict(use_rslora=True)),
    "DoRA": Variant(dict(dora=True), dict(use_dora=True)),
    "PiSSA": Variant(dict(init="pissa"), dict(init_lora_weights="pissa")),
    "LoRA+": Variant(lr_ratio=4.0),
    "rank and alpha by pattern": Variant(
        dict(rank_pattern=("layers.1.mlp.*=2", "q_proj=6"), alpha_pattern=("o_proj=3",)),
        dict(rank_pattern={r"layers\.1\.mlp\..*": 2, "q_proj": 6}, alpha_pattern={"o_proj": 3})),
}
STEPS, RATE = 50, 2e-3


def adapted_model(name: str) -> Gemma:
    """Our tiny Gemma 2 with the adapters of a variant, as if some steps had been made.

    B and DoRA's magnitudes are moved off their start: where B is zero A has no gradient. PiSSA's
    stay, because both sides have to draw the same start from W.
    """
    model = tiny_model("gemma2", seed=4)
    attach(model, LoraConfig(rank=4, alpha=6.0, **VARIANTS[name].ours))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for layer in adapted(model).values():
            if layer.lora_start_A is None:
                layer.lora_B.normal_(0.0, 0.05, generator=generator)
            if layer.lora_magnitude is not None:
                layer.lora_magnitude *= 1 + 0.1 * torch.rand(len(layer.weight), generator=generator)
    return model


def peft_names(model: Gemma) -> dict[str, torch.nn.Parameter]:
    """Our trained tensors by the names that peft has for them in a model of its own."""
    parts = {"lora_A": "lora_A.default.weight", "lora_B": "lora_B.default.weight",
             "lora_magnitude": "lora_magnitude_vector.default.weight"}
    return {f"base_model.model.model.{module}.{parts[key]}": parameter
            for name, parameter in trainable(model).items()
            for module, _, key in [name.rpartition(".")]}


def training_batches() -> list[tuple[Tensor, Tensor]]:
    """Ids and labels [2, 24] of 50 steps, five batches again and again; a third is trained."""
    ids = torch.randint(3, 512, (5, 2, 24), generator=torch.Generator().manual_seed(2))
    labels = ids.clone()
    labels[:, :, :14] = IGNORED
    labels[:, 1, 20:] = IGNORED
    return [(ids[step % 5], labels[step % 5]) for step in range(STEPS)]


def peft_training(name: str) -> tuple[list[float], dict[str, Tensor]]:
    """50 steps of peft: the loss of each, and the first one's gradients by peft's names."""
    import peft
    from peft.optimizers import create_loraplus_optimizer

    model, variant = adapted_model(name), VARIANTS[name]
    theirs = peft.get_peft_model(
        transformers_model(tiny_model("gemma2", seed=4), "gemma2"),
        peft.LoraConfig(r=4, lora_alpha=6.0, target_modules=list(LINEARS), task_type="CAUSAL_LM",
                        **variant.theirs))
    trained = {key: p for key, p in theirs.named_parameters() if p.requires_grad}
    start = peft_names(model)
    assert trained.keys() == start.keys()
    if name != "PiSSA":
        with torch.no_grad():
            for key, parameter in trained.items():
                parameter.copy_(start[key])
    optimizer = create_loraplus_optimizer(theirs, torch.optim.AdamW, lr=RATE,
                                          loraplus_lr_ratio=variant.lr_ratio)
    losses, gradients = [], {}
    for ids, labels in training_batches():
        loss = theirs(input_ids=ids, labels=labels).loss
        loss.backward()
        gradients = gradients or {key: p.grad.clone() for key, p in trained.items()}
        torch.nn.utils.clip_grad_norm_(trained.values(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, gradients


# --- groups ---------------------------------------------------------------------------------------

def logits() -> dict[str, Tensor]:
    """Some columns of the float32 logits of every shape, [2, 24, V / 16]."""
    return {name: transformers_outputs(name).logits[..., COLUMNS] for name in SHAPES}


def bfloat16() -> dict[str, Tensor]:
    """The same of all outputs, in bfloat16: `SHAPE.logits` and so on."""
    return {f"{name}.{what}": tensor[..., COLUMNS] for name in ROUNDED
            for what, tensor in transformers_outputs(name, torch.bfloat16)._asdict().items()}


def training() -> dict[str, Tensor]:
    """Of every variant peft's 50 losses, and every 16th number of its first gradients."""
    tensors = {}
    for name in VARIANTS:
        losses, gradients = peft_training(name)
        tensors[f"{name}.losses"] = torch.tensor(losses)
        tensors |= {f"{name}.{key}": grad.flatten()[::16] for key, grad in gradients.items()}
    return tensors


# Adapters as peft writes them: what LoraConfig is told.
PEFT_ADAPTERS = {
    "rows": dict(target_modules=["q_proj"], trainable_token_indices=[30, 9]),
    "rsLoRA": dict(target_modules=["v_proj", "down_proj"], use_rslora=True,
                   layers_to_transform=[1, 3]),
    "DoRA, patterns": dict(target_modules=["o_proj", "up_proj"], use_dora=True,
                           rank_pattern={"o_proj": 2}, alpha_pattern={r"layers\.2\..*": 7}),
}


def interop() -> dict[str, Tensor]:
    """Files of peft's adapters on the tiny Gemma 2, byte for byte, and some columns of its logits.

    Keys: `case/adapter_config.json`, `case/adapter_model.safetensors` (uint8) and `case/logits`.
    """
    import peft

    tensors = {}
    for case, settings in PEFT_ADAPTERS.items():
        theirs = peft.get_peft_model(
            transformers_model(tiny_model("gemma2"), "gemma2"),
            peft.LoraConfig(task_type="CAUSAL_LM", r=3, lora_alpha=5, **settings)).eval()
        torch.manual_seed(2)
        with torch.no_grad():
            for name, parameter in theirs.named_parameters():
                if any(key in name for key in ("lora_B", "tokens_delta", "magnitude")):
                    parameter += 0.2 * torch.randn(parameter.shape)
            tensors[f"{case}/logits"] = theirs(reference_ids()).logits[..., COLUMNS]
        with tempfile.TemporaryDirectory() as folder:
            theirs.save_pretrained(folder, save_embedding_layers=False)
            for file in ("adapter_config.json", "adapter_model.safetensors"):
                content = bytearray((Path(folder) / file).read_bytes())
                tensors[f"{case}/{file}"] = torch.frombuffer(content, dtype=torch.uint8)
    return tensors


def mistral_blocks() -> list[str]:
    """The blocks of tools, calls and results of mistral-common's v3 tokenizer, in its order."""
    from mistral_common.protocol.instruct.request import ChatCompletionRequest
    from mistral_common.tokens.tokenizers.base import SpecialTokenPolicy
    from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
    from test_chat import MISTRAL_BLOCKS, REFERENCE, openai

    tokenizer = MistralTokenizer.v3()
    request = ChatCompletionRequest(messages=openai(REFERENCE, as_text=True)[:-1],
                                    tools=list(REFERENCE.tools))
    tokens = tokenizer.encode_chat_completion(request).tokens
    text = tokenizer.decode(tokens, special_token_policy=SpecialTokenPolicy.KEEP)
    return MISTRAL_BLOCKS.findall(text.replace("▁", " "))  # pieces write spaces as ▁


def dialects(folder: Path) -> None:
    """What others make of the conversation in test_chat.py: dialects.json.

    The template of google/functiongemma-270m-it is read from functiongemma/chat_template.jinja in
    the folder that MINILORA_REAL_INPUT names.
    """
    from test_chat import REFERENCE, openai
    from transformers.utils.chat_template_utils import render_jinja_template

    template = Path(os.environ[REAL]) / "functiongemma" / "chat_template.jinja"
    texts, _ = render_jinja_template([openai(REFERENCE)], tools=list(REFERENCE.tools),
                                     chat_template=template.read_text(), bos_token="<bos>")
    both = {"mistral": mistral_blocks(), "functiongemma": texts[0]}
    (folder / "dialects.json").write_text(json.dumps(both, ensure_ascii=False, indent=1) + "\n")


GROUPS = {group.__name__: group for group in (logits, bfloat16, training, interop)}


@functools.cache
def stored(group: str) -> dict[str, Tensor]:
    """The tensors of a group as they were written."""
    return load_file(FOLDER / f"{group}.safetensors")


def main(names: list[str]) -> None:
    FOLDER.mkdir(exist_ok=True)
    if names == ["dialects"]:
        return dialects(FOLDER)
    made_with = {package: version(package) for package in ("torch", "transformers", "peft")}
    for name in names or GROUPS:
        tensors = {key: tensor.contiguous() for key, tensor in GROUPS[name]().items()}
        save_file(tensors, FOLDER / f"{name}.safetensors", made_with)


if __name__ == "__main__":
    main(sys.argv[1:])
