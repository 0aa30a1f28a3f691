"""The same numbers as transformers: live where it is installed, stored ones always.

    pytest tests/test_parity.py tests/test_checkpoint.py --table        prints the README's table
"""

import json
import logging
import math

import pytest
import torch
from conftest import Measurements, difference, tiny_config, tiny_model, tiny_raw
from make_references import (
    COLUMNS,
    FAMILIES,
    RATE,
    ROUNDED,
    SHAPES,
    STEPS,
    VARIANTS,
    Outputs,
    adapted_model,
    peft_names,
    peft_training,
    reference_ids,
    reference_positions,
    shape_model,
    stored,
    training_batches,
    transformers_model,
    transformers_outputs,
)
from safetensors import safe_open

from minilora.config import TrainConfig
from minilora.data import Batch, Example, collate
from minilora.lora import merge
from minilora.loss import token_loss
from minilora.trainer import make_optimizer, train_step
from minilora.weights import load_model

BAR = 1e-4  # of the largest logit, in float32
NAMES = {"gemma": "Gemma 1", "gemma2": "Gemma 2", "gemma3_text": "Gemma 3"}


@pytest.fixture(params=["live", "stored"])
def live(request) -> bool:
    """Whether transformers is run here and now; else its side is what it once gave, stored."""
    if request.param == "live":
        pytest.importorskip("transformers")
    return request.param == "live"


# --- forward --------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", SHAPES)
@torch.no_grad()
def test_logits(name, live, measure):
    ours = shape_model(name)(reference_ids(), reference_positions(name))
    assert ours.dtype == torch.float32
    if live:
        theirs = transformers_outputs(name).logits
    else:
        ours, theirs = ours[..., COLUMNS], stored("logits")[name]
    where = "the last of 8,192 and 131,072 positions" if SHAPES[name].start else (
        NAMES[SHAPES[name].family])
    measure(f"logits, float32, {where}", "transformers", difference(ours, theirs), BAR)


# A setting that is not as it should be, by the shape in which it must show.
BUGS = [
    ("gemma", dict(query_pre_attn_scalar=32)),
    ("gemma", dict(rope_theta=2e4)),
    ("gemma many heads", dict(rms_norm_eps=1e-6)),
    ("gemma2", dict(query_pre_attn_scalar=24)),
    ("gemma2", dict(sliding_window=7)),
    ("gemma2", dict(sliding_window=9)),
    ("gemma2", dict(attn_logit_softcapping=None)),
    ("gemma2", dict(final_logit_softcapping=None)),
    ("gemma2", dict(layer_types=["full_attention", "sliding_attention"] * 2)),
    ("gemma2 tight caps", dict(attn_logit_softcapping=2.1)),
    ("gemma2 tight caps", dict(final_logit_softcapping=3.1)),
    ("gemma3", dict(query_pre_attn_scalar=24)),
    ("gemma3", dict(sliding_window=7)),
    ("gemma3", dict(sliding_window=9)),
    ("gemma3", dict(rope_scaling=None)),
    ("gemma3", dict(rope_scaling=dict(rope_type="linear", factor=7.0))),
    ("gemma3", dict(rope_theta=1e4)),
    ("gemma3", dict(rope_local_base_freq=1e6)),
    ("gemma3", dict(sliding_window_pattern=7)),
    ("gemma3 flat keys", dict(rope_local_base_freq=1e4)),
    ("gemma3 nested keys", dict(rope_parameters=None)),
]


@pytest.mark.parametrize("name, bug", BUGS)
@torch.no_grad()
def test_the_shapes_tell_bugs_apart(name, bug):
    """Parity means little where a wrong setting would pass: each is ten bars away at least."""
    family, overrides, _ = SHAPES[name]
    wrong = tiny_model(family, **{**overrides, **bug})(reference_ids())[..., COLUMNS]
    assert difference(wrong, stored("logits")[name]) > 10 * BAR


@pytest.mark.parametrize("name", ROUNDED)
@torch.no_grad()
def test_bfloat16(name, live, measure):
    """Roundings differ, so what is compared is how far each side's logits are from float32.

    Not so before the first matrix product: √D is rounded, a norm is not before its end.
    """
    if live:
        theirs = transformers_outputs(name, torch.bfloat16)
    else:
        theirs = Outputs(*(stored("bfloat16")[f"{name}.{what}"] for what in Outputs._fields))
    ids, positions = reference_ids(), reference_positions(name)
    model = shape_model(name, torch.bfloat16)
    embedded = model.embed_tokens.encode(ids)
    normed = model.layers[0].input_layernorm(embedded)
    ours = Outputs(model(ids, positions), embedded, normed)
    exact = shape_model(name)(ids, positions)
    if not live:
        exact, ours = exact[..., COLUMNS], Outputs(*(part[..., COLUMNS] for part in ours))

    differ = [(getattr(ours, what) != getattr(theirs, what)).float().mean()
              for what in ("embedded", "normed")]
    measure("embeddings × √D and their norm, bfloat16: share of numbers that differ",
            "transformers", max(differ), 0.01)
    error, their_error = ((side.logits.float() - exact).square().mean().sqrt()
                          for side in (ours, theirs))
    measure("RMS error of bfloat16 logits, where transformers' own is 1", "transformers",
            error / their_error, 1.25)


# --- batches --------------------------------------------------------------------------------------

# Which row of the reference ids, and how many of its tokens: a sequence.
SEQUENCES = [(0, 24), (1, 13), (0, 5), (1, 19)]


def padded_right(examples: list[Example]) -> Batch:
    return collate([[example] for example in examples], 24, pad_id=7)


def padded_left(examples: list[Example]) -> Batch:
    batch = padded_right(examples)
    padding = (batch.documents == 0).sum(-1).tolist()
    return Batch(**{name: torch.stack([row.roll(n) for row, n in zip(tensor, padding, strict=True)])
                    for name, tensor in vars(batch).items()})


def packed(examples: list[Example]) -> Batch:
    """Rows of 40: the second with the first, the fourth with the third, and padding."""
    return collate([[examples[1], examples[0]], [examples[3], examples[2]]], 40, pad_id=7)


@pytest.mark.parametrize("source", ["minilora", "transformers", "stored"])
@pytest.mark.parametrize("layout", [padded_left, padded_right, packed])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_batches_agree_with_single_sequences(family, layout, source, measure):
    """Each sequence of a batch as the other side has it when it is run alone."""
    name = next(name for name, shape in SHAPES.items() if shape.family == family)
    model, columns = shape_model(name), slice(None)
    ids = [reference_ids()[row, :size] for row, size in SEQUENCES]
    if source == "minilora":
        alone = [model(x[None])[0] for x in ids]
    elif source == "transformers":
        pytest.importorskip("transformers")
        theirs = transformers_model(model, family)
        alone = [theirs(x[None]).logits[0] for x in ids]
    else:  # the start of a sequence has the same logits without what comes after
        columns = COLUMNS
        alone = [stored("logits")[name][row, :size] for row, size in SEQUENCES]

    batch = layout([Example(x, torch.zeros_like(x), x, "") for x in ids])
    out = model(batch.input_ids, batch.positions, batch.documents)[..., columns]
    rows = [out[row, batch.documents[row] == number] for row in range(len(out))
            for number in range(1, int(batch.documents[row].max()) + 1)]
    order = [1, 0, 3, 2] if layout is packed else range(4)
    for got, which in zip(rows, order, strict=True):
        measure("logits, float32, padded and packed batches, each sequence alone there",
                source.replace("stored", "transformers"), difference(got, alone[which]), BAR)


# --- files ----------------------------------------------------------------------------------------

FLAT = {  # as files on the hub say it
    "gemma": dict(rope_theta=3e4, hidden_act="gelu", hidden_activation=None),
    "gemma2": dict(rope_theta=3e4),
    "gemma3_text": dict(rope_theta=3e5, rope_local_base_freq=2e4, sliding_window_pattern=3,
                        rope_scaling=dict(rope_type="linear", factor=8.0)),
}
BOTH = {  # as transformers 4.5x said it: the layers listed, the rotation in flat keys
    "gemma": FLAT["gemma"],
    "gemma2": dict(rope_theta=3e4, layer_types=["sliding_attention", "full_attention"] * 2),
    "gemma3_text": dict(rope_theta=3e5, rope_local_base_freq=2e4, _sliding_window_pattern=3,
                        rope_scaling=dict(rope_type="linear", factor=8.0),
                        layer_types=SHAPES["gemma3 nested keys"].overrides["layer_types"]),
}


@pytest.mark.parametrize("spelling", [None, FLAT, BOTH], ids=["transformers 5", "flat", "both"])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_config_spellings(family, spelling, tmp_path, measure):
    """One folder, its config.json in one spelling or another, read by both sides."""
    transformers = pytest.importorskip("transformers")
    model = tiny_model(family, **FLAT[family])
    transformers_model(model, family, **FLAT[family]).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    if spelling:
        path.write_text(json.dumps(tiny_raw(family, **spelling[family])))
    else:
        assert "rope_theta" not in json.loads(path.read_text())  # it is in rope_parameters
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, attn_implementation="eager", dtype=torch.float32)
    ours = load_model(tmp_path, torch.float32)
    assert ours.config == model.config == tiny_config(family, **FLAT[family])
    measure("logits, float32, one folder in each spelling of config.json", "transformers",
            difference(ours(reference_ids()), theirs(reference_ids()).logits), BAR)


@pytest.mark.parametrize("original, spelling", [
    (True, FLAT),   # the first files on the hub
    (True, None),   # as transformers 5 writes them
    (False, None),  # as it writes them with save_original_format=False
])
@torch.no_grad()
def test_image_text_gemma3(original, spelling, tmp_path, measure, caplog):
    """Saved whole by transformers, vision tower and all; the text part read, the rest named."""
    transformers = pytest.importorskip("transformers")
    model = tiny_model("gemma3_text", **FLAT["gemma3_text"])
    vision = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
                  image_size=8, patch_size=4)
    text = transformers_model(model, "gemma3_text", **FLAT["gemma3_text"])
    theirs = transformers.Gemma3ForConditionalGeneration(transformers.Gemma3Config(
        text_config=text.config, vision_config=vision, mm_tokens_per_image=4)).eval()
    theirs.set_attn_implementation("eager")
    theirs.model.language_model.load_state_dict(text.model.state_dict())
    theirs.save_pretrained(tmp_path, save_original_format=original)
    path = tmp_path / "config.json"
    raw = json.loads(path.read_text())
    if spelling:
        raw["text_config"] = tiny_raw("gemma3_text", **spelling["gemma3_text"])
        path.write_text(json.dumps(raw))

    with caplog.at_level(logging.WARNING):
        ours = load_model(tmp_path, torch.float32)
    assert ours.config == model.config
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        keys = list(file.keys())
    prefix = "language_model.model." if original else "model.language_model."
    extra = sorted(key for key in keys if not key.startswith(prefix))
    assert len(extra) + len(model.state_dict()) == len(keys)
    [line] = caplog.messages
    assert f"left out {len(extra)} tensors of the vision part, {extra[0]}" in line
    measure("logits, float32, text part of an image-text Gemma 3", "transformers",
            difference(ours(reference_ids()), theirs(reference_ids()).logits), BAR)


# --- training against peft ------------------------------------------------------------------------

def our_training(name: str) -> tuple[list[float], dict[str, torch.Tensor]]:
    """The 50 steps of `peft_training`, made by what train.py runs."""
    model = adapted_model(name)
    optimizer = make_optimizer(model, TrainConfig(lr_ratio=VARIANTS[name].lr_ratio))
    (ids, labels), *_ = made = training_batches()
    total, count = token_loss(model, model.hidden_states(ids), labels)
    (total / count).backward()
    gradients = {key: p.grad.clone() for key, p in peft_names(model).items()}
    optimizer.zero_grad()
    losses = []
    for ids, labels in made:
        positions = torch.arange(ids.shape[1]).expand(ids.shape)
        batch = Batch(ids, labels, positions, torch.ones_like(ids), torch.zeros_like(ids))
        losses.append(train_step(model, optimizer, [batch], lr=RATE, clip=1.0).loss)
    assert losses[-1] < 0.9 * losses[4]  # the same batch: it did learn
    return losses, gradients


@pytest.mark.parametrize("name", VARIANTS)
def test_training_agrees_with_peft(name, live, measure):
    """Same base, start and batches: every gradient, and the losses of 50 AdamW steps."""
    losses, gradients = our_training(name)
    if live:
        pytest.importorskip("peft")
        expected, theirs = peft_training(name)
    else:
        tensors = stored("training")
        expected = tensors[f"{name}.losses"].tolist()
        theirs = {key: tensors[f"{name}.{key}"] for key in gradients}
        gradients = {key: grad.flatten()[::16] for key, grad in gradients.items()}
    assert gradients.keys() <= theirs.keys()
    for key, grad in gradients.items():
        other = theirs[key]
        if name == "PiSSA":  # singular vectors have no sign: another machine may turn some round
            grad, other = grad.abs(), other.abs()
        measure(f"gradient of each tensor, {name}: its difference in norm", "peft",
                (grad - other).norm() / other.norm(), 1e-4)
    assert len(losses) == len(expected) == STEPS
    measure(f"loss of each of {STEPS} AdamW steps, {name}", "peft",
            max(abs(ours - other) for ours, other in zip(losses, expected, strict=True)), 1e-3)


# --- merging --------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", VARIANTS)
@torch.no_grad()
def test_merged_equals_unmerged(name, measure):
    model = adapted_model(name)
    before = model(reference_ids())
    assert difference(before, tiny_model("gemma2", seed=4)(reference_ids())) > 1e-3 or (
        name == "PiSSA")  # which stands at its start
    merge(model)
    measure("logits, float32, merged", "minilora, unmerged",
            difference(model(reference_ids()), before), 1e-5)


# --- the table ------------------------------------------------------------------------------------

def test_what_is_measured_is_held_to_its_bar_and_the_worst_is_shown():
    measure = Measurements()
    for what, value in (("b", 0.5), ("a", 1e-6), ("a", torch.tensor(2.26e-6)), ("a", 1e-7)):
        measure(what, "x", value, 1)
    for value in (1.5, math.nan, 0.1):
        with pytest.raises(AssertionError, match="c, against y: .* more than 0.001"):
            measure("c", "y", value, 1e-3)
    measure("c", "y", 0, 0)
    assert measure.table().splitlines()[2:] == [
        "| b | x | 0.5 | 1 |", "| a | x | 2.3e-06 | 1 |", "| c | y | nan | 0.001 |",
        "| c | y | 0 | 0 |"]
