"""The parts of the loop: rates, groups, accumulation by token count, order of batches, new rows."""

import argparse
import dataclasses
import json
import math
import platform
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import make_example, tiny_model
from tiny_tokenizer import make_tokenizer_model

from minilora.chat import Conversation, Message
from minilora.config import LoraConfig, TrainConfig, UserError, from_flags, read_settings
from minilora.data import IGNORED, Example, batches
from minilora.dialects import DIALECTS
from minilora.lora import adapted, attach, trainable
from minilora.tokenizer import Tokenizer
from minilora.trainer import (
    add_dialect,
    find_fault,
    held_out_loss,
    learning_rate,
    make_optimizer,
    not_finite,
    plan_steps,
    prepare,
    stream_batches,
    train_step,
)


def some_examples(count: int, seed: int = 0) -> list[Example]:
    """Conversations of 6 to 20 random tokens of which the latter part is trained."""
    generator = torch.Generator().manual_seed(seed)
    examples = []
    for number in range(count):
        size = int(torch.randint(6, 21, (), generator=generator))
        ids = torch.randint(3, 500, (size,), generator=generator)
        labels = ids.clone()
        labels[:int(torch.randint(2, size - 1, (), generator=generator))] = IGNORED
        examples.append(Example(ids, torch.zeros(size, dtype=torch.uint8), labels, f"row {number}"))
    return examples


def model_with_lora(seed: int = 0, **settings):
    model = tiny_model("gemma2", seed=seed)
    attach(model, LoraConfig(rank=2, alpha=4.0, **settings))
    model.embed_tokens.add_rows([512], torch.zeros(1, 72))
    return model


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_schedules(schedule):
    config = TrainConfig(schedule=schedule, lr=2.0, warmup=0.1)
    rates = [learning_rate(step, 50, config) for step in range(50)]
    assert rates[:5] == pytest.approx([0.4, 0.8, 1.2, 1.6, 2.0])
    assert max(rates) == pytest.approx(2.0) and min(rates) > 0
    falling = [a > b for a, b in zip(rates[5:], rates[6:], strict=False)]
    assert all(falling) if schedule != "constant" else not any(falling)
    if schedule == "linear":  # straight: 45 equal parts of the way to 0
        assert rates[5:] == pytest.approx([2.0 * (45 - i) / 45 for i in range(45)])
    if schedule == "cosine":
        assert rates[5 + 15] == pytest.approx(1.5)  # cos 60° is a half


def test_warmup_of_nothing_and_of_one_step():
    assert learning_rate(0, 10, TrainConfig(warmup=0.0, lr=1.0)) == 1.0
    assert learning_rate(0, 1, TrainConfig(warmup=0.03, lr=1.0)) == 1.0


def test_rows_and_magnitudes_are_not_decayed():
    model = model_with_lora(dora=True)
    groups = make_optimizer(model, TrainConfig(weight_decay=0.1)).param_groups
    decayed = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
    for name, parameter in trainable(model).items():
        assert (id(parameter) in decayed) == name.endswith(("lora_A", "lora_B"))
    assert sum(len(group["params"]) for group in groups) == len(trainable(model))


@pytest.mark.parametrize("ratio", [1.0, 16.0])
def test_b_learns_faster_by_the_ratio(ratio):
    """AdamW's first step is the rate in size, whatever the gradient (LoRA+)."""
    model = model_with_lora(dora=True)
    before = {name: p.detach().clone() for name, p in trainable(model).items()}
    optimizer = make_optimizer(model, TrainConfig(lr_ratio=ratio))
    step = list(batches(some_examples(4), 4, 32))
    train_step(model, optimizer, step, lr=1e-3, clip=0.0)
    for name, parameter in trainable(model).items():
        moved = (parameter - before[name]).abs().max().item()
        if name.endswith("lora_B"):
            assert moved == pytest.approx(1e-3 * ratio, rel=0.02), name
        else:
            assert moved <= 1.001e-3, name


@pytest.mark.parametrize("pack", [True, False])
def test_one_times_eight_is_eight_times_one(pack):
    """The same step whether eight rows come in one batch, in two or in eight, packed or padded."""
    examples = some_examples(8)
    results = []
    for size in (8, 4, 1):
        model = model_with_lora()
        with torch.no_grad():
            for layer in adapted(model).values():
                layer.lora_B.fill_(0.02)
        optimizer = make_optimizer(model, TrainConfig())
        step = list(batches(examples, size, 32 if pack else 20, seed=1, pack=pack))
        done = train_step(model, optimizer, step, lr=1e-2, clip=1.0)
        results.append((done, {name: p.detach().clone() for name, p in trainable(model).items()}))
    for done, parameters in results[1:]:
        assert (done.tokens, done.trained) == (results[0][0].tokens, results[0][0].trained)
        assert done.loss == pytest.approx(results[0][0].loss, rel=1e-5)
        assert done.grad_norm == pytest.approx(results[0][0].grad_norm, rel=1e-4)
        for name, parameter in parameters.items():
            torch.testing.assert_close(parameter, results[0][1][name], rtol=0, atol=2e-4)


def test_packed_equals_unpacked_in_loss_and_gradient():
    examples = some_examples(6, seed=3)
    norms = []
    for pack in (True, False):
        model = model_with_lora()
        step = list(batches(examples, 2, 48, seed=1, pack=pack))
        done = train_step(model, make_optimizer(model, TrainConfig()), step, lr=0.0, clip=0.0)
        norms.append((done.loss, done.grad_norm, done.trained))
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)


def test_clipping_bounds_the_step_and_reports_the_norm_before():
    model = model_with_lora()
    seen = []
    optimizer = make_optimizer(model, TrainConfig())
    optimizer.step = lambda: seen.append(math.sqrt(sum(
        float(p.grad.square().sum()) for p in trainable(model).values() if p.grad is not None)))
    step = list(batches(some_examples(4), 4, 32))
    norm = train_step(model, optimizer, step, 1e-3, clip=0.0).grad_norm
    assert train_step(model, optimizer, step, 1e-3, clip=norm / 3).grad_norm == pytest.approx(norm)
    assert seen == pytest.approx([norm, norm / 3], rel=1e-4)


# --- numbers that are not finite ------------------------------------------------------------------

POISON = 500  # no other example has this id


def poisoned(count: int, where: tuple[int, ...], **settings) -> tuple:
    """A model that cannot bear one id, and examples of which some have it.

    The number is the largest that there is: times √D it is infinite where the id is read, while the
    soft-cap bears it where the id is one of the logits.
    """
    model = model_with_lora(**settings)
    model.embed_tokens.weight[POISON, 0] = torch.finfo(torch.float32).max
    examples = some_examples(count)
    for number in where:
        examples[number].ids[1] = POISON
    return model, examples


def all_of(model, optimizer) -> list[torch.Tensor]:
    """Every number of the model, AdamW's moments and counts of steps, the rates, random state."""
    moments = [each for state in optimizer.state.values() for each in state.values()]
    rates = torch.tensor([group["lr"] for group in optimizer.param_groups])
    return [each.detach().clone() for each in
            (*model.parameters(), *model.buffers(), *moments, rates, torch.get_rng_state())]


def same(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> bool:
    """By bit patterns: a NaN equals itself."""
    return all(torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))
               for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("what", ["loss", "one gradient"])
@pytest.mark.parametrize("seen", [0, 2])
def test_a_step_that_is_not_finite_changes_no_bit(what, seen):
    """Neither where AdamW has moments nor where it has none yet; and the next step is as if the
    bad one had not been.
    """
    model, examples = poisoned(6, (0,) if what == "loss" else (), dora=True)
    optimizer = make_optimizer(model, TrainConfig())
    good = list(batches(examples[1:], 5, 32))
    for _ in range(seen):
        assert train_step(model, optimizer, good, 1e-2, 1.0).applied
    before = all_of(model, optimizer)
    weight = model.layers[0].mlp.up_proj.lora_B
    hook = weight.register_hook(lambda grad: grad * (math.inf if what != "loss" else 1))
    done = train_step(model, optimizer, list(batches(examples, 1, 32)), 1e-2, 1.0)
    hook.remove()
    assert not done.applied and math.isfinite(done.loss) == (what == "one gradient")
    assert not math.isfinite(done.grad_norm) and done.trained > 0
    assert same(all_of(model, optimizer), before)
    assert all(parameter.grad is None for parameter in model.parameters())

    other, _ = poisoned(0, (), dora=True)
    their_optimizer = make_optimizer(other, TrainConfig())
    for _ in range(seen):
        train_step(other, their_optimizer, good, 1e-2, 1.0)
    ours, theirs = (train_step(*each, good, 1e-2, 1.0)
                    for each in ((model, optimizer), (other, their_optimizer)))
    assert ours == theirs and same(all_of(model, optimizer), all_of(other, their_optimizer))


@pytest.mark.parametrize("recompute", ["none", "all"])
@pytest.mark.parametrize("pack", [True, False])
def test_the_conversations_to_blame_are_found(pack, recompute):
    """Whichever step they are in, a bad one in the midst of good ones; nothing is changed."""
    where = (2, 5, 11)
    model, examples = poisoned(12, where, dropout=0.3)
    model.recompute = recompute
    model.train()
    config = TrainConfig(batch=2, accumulate=2, length=48, pack=pack, seed=3)
    optimizer = make_optimizer(model, config)
    stream = stream_batches(examples, config)
    found = []
    for step in range(5):  # more than one epoch
        parts = [next(stream) for _ in range(2)]
        done = train_step(model, optimizer, parts, 1e-3, 1.0)
        wrong = [n for n, part in enumerate(parts, 1) if (part.input_ids == POISON).any()]
        assert done.applied == (not wrong)
        if wrong:
            before = all_of(model, optimizer)
            fault = find_fault(model, examples, config, step)
            assert same(all_of(model, optimizer), before) and model.training
            assert all(parameter.grad is None for parameter in model.parameters())
            assert fault.batches == wrong
            assert len(fault.rows) == sum(int(part.documents.amax(1).sum())
                                          for n, part in enumerate(parts, 1) if n in wrong)
            assert set(fault.alone) == set(fault.rows) & {f"row {n}" for n in where}
            assert str(fault) == (f"batch {', '.join(map(str, wrong))}: {', '.join(fault.alone)}")
            found += fault.alone
    assert {*found} == {f"row {n}" for n in where} and len(found) > 3


def test_where_no_conversation_is_to_blame_all_of_the_step_are_named():
    model, examples = poisoned(12, ())
    config = TrainConfig(batch=3, accumulate=4, pack=False)
    fault = find_fault(model, examples, config, 0)
    assert (fault.batches, fault.alone) == ([1, 2, 3, 4], [])
    assert sorted(fault.rows) == sorted(example.source for example in examples)
    assert str(fault).startswith("batch 1, 2, 3, 4: one or more of row ")
    assert str(fault).endswith(" and 4 more")


def test_a_gradient_alone_can_be_to_blame_and_a_conversation_in_parts_is_named_once():
    model, examples = poisoned(3, (1,))
    twice = [examples[0], examples[1], dataclasses.replace(examples[1], part=1)]
    config = TrainConfig(length=32)
    assert not_finite(model, twice, config) == ["row 1"]
    model.layers[0].mlp.up_proj.lora_B.register_hook(lambda grad: grad * math.nan)
    assert not_finite(model, twice, config) == ["row 0", "row 1"]
    with torch.no_grad():  # then it is the loss that counts
        assert not_finite(model, twice, config) == ["row 1"]


def test_loss_falls_and_the_base_stays():
    model = model_with_lora()
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    optimizer = make_optimizer(model, TrainConfig())
    step = list(batches(some_examples(4), 4, 40))
    losses = [train_step(model, optimizer, step, 1e-2, 1.0).loss for _ in range(15)]
    assert losses[-1] < 0.7 * losses[0]
    assert held_out_loss(model, step) < losses[-1]
    assert all(torch.equal(model.get_parameter(name), p) for name, p in frozen.items())


def test_held_out_loss_is_the_mean_over_tokens_and_leaves_the_mode():
    model = model_with_lora()
    examples = some_examples(5)
    model.train()
    whole = held_out_loss(model, batches(examples, 5, 40))
    assert model.training
    parts = [held_out_loss(model, [batch]) for batch in batches(examples, 1, 21, pack=False)]
    weights = [int((batch.labels != IGNORED).sum())
               for batch in batches(examples, 1, 21, pack=False)]
    mean = sum(p * w for p, w in zip(parts, weights, strict=True)) / sum(weights)
    assert whole == pytest.approx(mean, rel=1e-5)
    assert math.isnan(held_out_loss(model, []))


@pytest.mark.parametrize("pack", [True, False])
def test_the_stream_resumes_anywhere(pack):
    """Skipping n batches gives what comes after n batches, across epochs, each in another order."""
    examples = some_examples(9)
    config = TrainConfig(batch=2, length=32, pack=pack, seed=4)
    stream = stream_batches(examples, config)
    straight = [next(stream).input_ids for _ in range(14)]
    for skip in (0, 1, 5, 12):
        resumed = stream_batches(examples, config, skip)
        for ids in straight[skip:]:
            assert torch.equal(next(resumed).input_ids, ids)
    each = len(batches(examples, 2, 32, 4, 0, pack))
    first = [row.tolist() for ids in straight[:each] for row in ids]
    second = [row.tolist() for ids in straight[each:2 * each] for row in ids]
    assert first != second


def test_batches_of_one_shape_are_the_same_batches():
    """For compiled layers the last batch of an epoch gets rows of padding, which change nothing."""
    examples = some_examples(9)
    config = TrainConfig(batch=4, length=32, seed=4)
    plain, full = stream_batches(examples, config), stream_batches(examples, config, fill=True)
    sizes, results = [], []
    for _ in range(len(batches(examples, 4, 32, 4, 0))):
        pair = next(plain), next(full)
        sizes.append(len(pair[0].input_ids))
        assert pair[1].input_ids.shape == (4, 32)
        for name, tensor in vars(pair[0]).items():
            assert torch.equal(getattr(pair[1], name)[:sizes[-1]], tensor), name
        results = []
        for batch in pair:
            model = model_with_lora()
            results.append(train_step(model, make_optimizer(model, config), [batch], 1e-3, 1.0))
        assert dataclasses.astuple(results[0]) == pytest.approx(dataclasses.astuple(results[1]))
    assert min(sizes) < 4


@pytest.mark.parametrize("device, compilers, wanted, compiled", [
    ("cpu", True, "auto", False), ("cpu", True, "on", True), ("cpu", False, "on", None),
    ("cuda", True, "auto", True), ("cuda", False, "auto", False), ("cuda", True, "off", False),
    ("cuda", False, "on", None)])
def test_layers_are_compiled_where_it_pays_and_works(device, compilers, wanted, compiled,
                                                     monkeypatch):
    monkeypatch.setattr("minilora.trainer.compiles", lambda device: compilers)
    weight = SimpleNamespace(device=torch.device(device))
    model = SimpleNamespace(embed_tokens=SimpleNamespace(weight=weight))
    config = TrainConfig(compile=wanted, recompute="cheap")
    if compiled is None:
        with pytest.raises(UserError, match="leave --compile out"):
            prepare(model, config)
    else:
        prepare(model, config)
        assert (model.compiled, model.recompute) == (compiled, "cheap")


@pytest.mark.parametrize("written, means", [(True, "all"), (False, "none"), ("cheap", "cheap")])
def test_a_run_from_before_recompute_had_steps_goes_on(tmp_path, written, means):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"recompute": written}))
    settings = read_settings(path, TrainConfig)
    assert from_flags(TrainConfig, argparse.Namespace(), settings).recompute == means
    path.write_text(json.dumps({"recompute": "some"}))
    with pytest.raises(UserError, match="recompute is 'some'; expected none or cheap or all or"):
        read_settings(path, TrainConfig)


def test_steps_of_a_run():
    examples = some_examples(10)
    each = len(batches(examples, 2, 32, 0, 0, True))
    plan = TrainConfig(batch=2, length=32, accumulate=2)
    assert plan_steps(examples, plan) == math.ceil(each / 2)
    assert plan_steps(examples, dataclasses.replace(plan, epochs=2.5)) == math.ceil(2.5 * each / 2)
    assert plan_steps(examples, dataclasses.replace(plan, steps=7)) == 7


@pytest.mark.parametrize("mode", ["append", "reserved"])
@pytest.mark.parametrize("dialect", list(DIALECTS))
def test_new_tokens_get_ids_and_rows_in_one_step(tmp_path, mode, dialect):
    model = tiny_model("gemma2", vocab_size=520)  # a table longer than the vocabulary, as Gemma 3's
    tokenizer = Tokenizer.load(make_tokenizer_model(tmp_path).parent)
    described = DIALECTS[dialect].tokens
    ids = add_dialect(model, tokenizer, dialect, mode)
    assert ids == [tokenizer.token_id(token) for token in described]
    assert ids == list(range(520, 520 + len(ids))) if mode == "append" else max(ids) < 106
    table = model.embed_tokens
    assert table.row_ids.tolist() == ids
    for row, text in zip(table.rows, described.values(), strict=True):
        torch.testing.assert_close(row, table.weight[tokenizer.encode(text)].mean(0))
    conversation = Conversation((Message("user", "hi"), Message("assistant", "hello")))
    example = make_example(conversation, tokenizer, dialect, 64)
    assert int(example.ids.max()) < table.num_embeddings
    assert add_dialect(model, tokenizer, dialect, mode) == []  # what is known keeps its row


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be told to")
def test_freed_memory_is_kept_for_the_next_step():
    """In a process of its own: what it does cannot be undone."""
    script = ("import resource, torch; from minilora.trainer import keep_memory; keep_memory()\n"
              "def faults(size):\n"
              "    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
              "    torch.ones(size)\n"
              "    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before\n"
              "print(faults(2**26), faults(2**25))")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True,
                          check=True)
    first, second = map(int, done.stdout.split())
    assert second * 10 < first
