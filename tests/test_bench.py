"""What `python -m minilora bench` prints, and what tests/bench/compare.py refuses and shows.

Nothing here looks at how long something took.
"""

import copy
import importlib
import json
import os
import shutil
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from bench import breakdown, compare, make, stream, without
from conftest import LAW, tiny_model
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent

from minilora import bench, linear, lora, loss, model, trainer
from minilora.__main__ import main as minilora
from minilora.config import UserError


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A folder with model/, lora, plain and packed: what compare.py would make."""
    folder = tmp_path_factory.mktemp("bench")
    model = ["--model", str(folder / "model")]
    make.main(["checkpoint", str(folder / "model"), "--shape", "tiny", "--device", "cpu"])
    make.main(["lora", str(folder / "lora"), *model, "--rank", "4"])
    size = [*model, "--length", "48", "--steps", "4"]
    make.main(["batches", str(folder / "plain"), *size])
    make.main(["batches", str(folder / "packed"), *size, "--packed"])
    return folder


@pytest.fixture
def run(capsys):
    """Runs a command and returns what its one line of JSON says."""
    def call(main, *words: object) -> dict:
        capsys.readouterr()
        main([str(word) for word in words])
        line, = capsys.readouterr().out.splitlines()
        return json.loads(line)
    return call


def ours(run, what: str, model: Path, *words: object) -> dict:
    return run(minilora, "bench", what, model, "--device", "cpu", *words)


def theirs(run, *words: object) -> dict:
    pytest.importorskip("peft")
    pytest.importorskip("transformers")
    from bench import peer

    return run(peer.main, *words, "--device", "cpu")


# --- the figures ----------------------------------------------------------------------------------

MACHINE = {"stack", "dtype", "device", "peak_host_gb", "peak_device_gb"}
TRAINING = MACHINE | {"attn", "compile", "checkpointing", "step_seconds", "tokens_per_second",
                      "trained_per_second", "losses", "grad_norms"}
DECODING = MACHINE | {"static", "prefill_seconds", "decode_tokens_per_second", "ids"}


@pytest.mark.parametrize("batches", ["plain", "packed"])
def test_training_is_what_transformers_and_peft_compute(made, run, batches):
    # At this rate weight decay, or a rate of its own for B, would show.
    inputs = [made / "model", made / batches, "--rank", 4, "--seed-lora", made / "lora",
              "--lr", 1e-2]
    one = ours(run, "train", *inputs)
    assert one.keys() >= TRAINING and one["base_unchanged"] and one["adapters_changed"]
    assert len(one["losses"]) == len(one["grad_norms"]) == 4
    other = theirs(run, "train", *inputs)
    assert other.keys() >= TRAINING
    assert one["losses"] == pytest.approx(other["losses"], abs=1e-4)
    assert one["grad_norms"] == pytest.approx(other["grad_norms"], rel=1e-4)


def test_generation_is_what_transformers_computes(made, run):
    size = ["--batch", 2, "--prompt", 12, "--new", 9]
    one = ours(run, "generate", made / "model", *size)
    assert one.keys() >= DECODING | {"share_of_bound", "matrix_bytes_per_second"}
    rows = [one["ids"], *one["other_ids"]]
    assert [len(row) for row in rows] == [9, 9] and rows[0] != rows[1]
    assert len(set(rows[0])) > 2  # or the ids would show nothing
    other = theirs(run, "generate", made / "model", *size)
    assert other.keys() >= DECODING
    assert rows == [other["ids"], *other["other_ids"]]


def test_decoding_does_not_end_at_a_stop_id(made, run, monkeypatch):
    monkeypatch.setattr(bench, "generate", lambda model, prompts, config, stop_ids: [
        [1] * config.max_new if not stop_ids else [] for _ in prompts])
    assert ours(run, "generate", made / "model", "--new", 5)["ids"] == [1] * 5


def test_loading(made, run):
    one = ours(run, "load", made / "model", "--rounds", 2)
    size = sum(path.stat().st_size for path in (made / "model").glob("*.safetensors"))
    assert one.keys() >= MACHINE | {"ratio", "host_before_gb", "host_over_weights"}
    assert len(one["load_seconds"]) == len(one["read_seconds"]) == 2
    assert one["file_bytes"] == size and size - 10_000 < one["weight_bytes"] < size


def test_merging(made, run, tmp_path):
    one = ours(run, "merge", made / "model", "--rounds", 2, "--scratch", tmp_path)
    assert one.keys() >= MACHINE | {"ratio", "merge_seconds"}
    assert len(one["export_seconds"]) == len(one["copy_seconds"]) == 2
    assert one["copy_bytes"] == pytest.approx(one["export_bytes"], rel=0.01)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def taken(monkeypatch):
    """How many of what without.py changes are changed by now; all is put back in the end."""
    there = {place: getattr(*place) for place in (
        (linear, "_onednn"), (linear, "_one_row"), (model, "attend"), (loss, "COLUMNS"),
        (trainer, "token_loss"), (trainer, "keep_memory"), (lora, "_adapted"),
        (model.RMSNorm, "forward"), (model.Gemma, "logits"))}
    for place, value in there.items():
        monkeypatch.setattr(*place, value)
    return lambda: sum(getattr(*place) is not value for place, value in there.items())


@pytest.mark.parametrize("name", without.TAKE_OUT)
def test_without_a_technique_the_same_is_computed(made, run, taken, name):
    if name in ("one-row", "raw-logits", "sdpa"):
        line, key = ["generate", made / "model", "--new", 6], "ids"
    else:
        line, key = ["train", made / "model", made / "packed", "--seed-lora", made / "lora",
                     "--rank", 4], "losses"
    line += ["--device", "cpu"]
    whole = run(minilora, "bench", *line)
    less = run(without.main, name, *line)
    assert less[key] == pytest.approx(whole[key], abs=1e-4)
    assert taken() == 1


def test_no_such_technique(made):
    with pytest.raises(UserError, match="no technique is called speed; there are onednn, "):
        without.main(["speed", "train"])


# --- batches --------------------------------------------------------------------------------------

def test_positions_count_in_each_document(made):
    tensors = load_file(made / "packed")
    assert tensors["positions"].amax(-1).max() < 47  # several documents in every row
    alone = {name: tensors[name] for name in ("input_ids", "labels", "documents")}
    save_file(alone, made / "without")
    for one, other in zip(bench.read_batches(made / "packed"),
                          bench.read_batches(made / "without"), strict=True):
        assert torch.equal(one.positions, other.positions)


def test_columns_of_padding_are_cut_off(made):
    """Steps of different widths lie in one file; a step ends where its longest row does."""
    tensors = load_file(made / "packed")
    for row, width in ((0, 30), (1, 40)):
        tensors["documents"][2, row, width:] = 0
        tensors["labels"][2, row, width:] = -100
    save_file(tensors, made / "ragged")
    assert [batch.labels.shape[1] for batch in bench.read_batches(made / "ragged")] == [
        48, 48, 40, 48]


def doctored(change) -> dict:
    ids = torch.arange(24).view(2, 2, 6)
    tensors = {"input_ids": ids, "labels": ids.clone(), "documents": torch.ones_like(ids)}
    change(tensors)
    return tensors


@pytest.mark.parametrize("change, words", [
    (lambda t: t.pop("labels"), "lacks labels; it holds"),
    (lambda t: t.update(mask=t["labels"].clone()), "unexpected mask"),
    (lambda t: t.update(labels=t["labels"].int()), r"labels is int32 \[2, 2, 6\]; expected int64"),
    (lambda t: t.update(labels=t["labels"][:1].clone()), r"labels is int64 \[1, 2, 6\]"),
    (lambda t: t.update(input_ids=t["input_ids"] - 1), "ids below 0"),
    (lambda t: t.update(labels=t["labels"].roll(-1, -1)), "labels are not shifted"),
    (lambda t: t["documents"][0, 0, 3:].zero_(), "on padding"),
    (lambda t: t["labels"][1].fill_(-100), "step 2 has no trained token"),
])
def test_batches_that_cannot_be_used(change, words, tmp_path):
    save_file(doctored(change), tmp_path / "b")
    with pytest.raises(UserError, match=words):
        bench.read_batches(tmp_path / "b")


def test_batches_that_are_no_file(tmp_path):
    (tmp_path / "text").write_text("input_ids")
    for name in ("text", "nothing", "."):
        with pytest.raises(UserError, match="not a whole safetensors file"):
            bench.read_batches(tmp_path / name)


@pytest.mark.parametrize("line, words", [
    ("generate MODEL --new 1", "--new is 1; expected at least 2"),
    ("generate MODEL --batch 0", "--batch is 0"),
    ("generate MODEL --prompt 131072", "131072 tokens of the model's context"),
    ("load MODEL --rounds 0", "--rounds is 0"),
    ("train MODEL HERE/plain --seed-lora HERE/lora", "lora_A.weight has shape .*--rank"),
    ("train nano HERE/plain", r"input_ids holds 40\d\d; nano has"),
])
def test_mistakes_are_one_line(line, words, made):
    line = line.replace("MODEL", str(made / "model")).replace("HERE", str(made))
    with pytest.raises(UserError, match=words):
        minilora(["bench", *line.split(), "--device", "cpu"])


# --- what must not move, and what must ------------------------------------------------------------

@LAW
@given(st.integers(0, 3), st.integers(0, 63), st.integers(1, 2**16 - 1))
def test_any_change_of_the_bytes_shows(which, at, flip):
    tensors = [noisy.to(dtype) for noisy in torch.randn(2, 64, generator=torch.manual_seed(0))
               for dtype in (torch.float32, torch.bfloat16)]
    before = bench.byte_sum(tensors)
    words = tensors[which].view(torch.int16)
    words[at] ^= flip - 2**15
    assert (bench.byte_sum(tensors) == before) == (flip == 2**15)


def test_bytes_that_changed_places_show(monkeypatch):
    tensor = torch.arange(2**19, dtype=torch.float32)  # several pieces
    same, halves = tensor.clone(), tensor.view(2, -1).flip(0).contiguous()
    assert bench.byte_sum([tensor]) == bench.byte_sum([same]) != bench.byte_sum([halves])


@pytest.mark.parametrize("fault", ["base moves", "adapters stay"])
def test_a_run_says_what_moved(fault, made, run, monkeypatch):
    step = bench.train_step

    def faulty(model, optimizer, batches, lr, clip):
        if fault == "base moves":
            with torch.no_grad():
                model.layers[1].mlp.up_proj.weight[3, 5] += 1e-3
        return step(model, optimizer, batches, 0.0 if fault == "adapters stay" else lr, clip)

    monkeypatch.setattr(bench, "train_step", faulty)
    one = ours(run, "train", made / "model", made / "plain")
    assert one["base_unchanged"] == (fault != "base moves")
    assert one["adapters_changed"] == (fault != "adapters stay")


def test_no_gradient_is_refused(made, run, monkeypatch):
    monkeypatch.setattr(bench, "train_step", lambda *_, **__: bench_step(norm=0.0))
    with pytest.raises(UserError, match="gradient norm is 0 at step 1"):
        ours(run, "train", made / "model", made / "plain")


def bench_step(norm: float):
    from minilora.trainer import Step
    return Step(1.0, norm, 10, 5)


def test_the_bandwidth_is_of_the_whole_matrix(monkeypatch):
    """A clock that adds a second at each look: bytes a second are those of what was multiplied."""
    ticks = iter(range(10**6))
    monkeypatch.setattr(bench, "now", lambda device: next(ticks))
    weight = tiny_model().embed_tokens.weight
    assert bench.matrix_bandwidth(weight, 1) == weight.nbytes
    assert bench.matrix_bandwidth(weight, 7) == 7 * weight.nbytes


@pytest.mark.parametrize("shapes, flops", [
    ([(4, 5), (5, 6)], 2 * 4 * 5 * 6),
    ([(2, 3, 5), (6, 5)], 2 * 6 * 5 * 6),          # a linear of two rows of three
    ([(2, 3, 5), (2, 5, 7)], 2 * 2 * 3 * 5 * 7),   # two products at once
    ([(4, 5), (5,)], 2 * 4 * 5),
])
def test_flops_of_a_product(shapes, flops):
    assert breakdown.product_flops(shapes) == flops


@pytest.mark.parametrize("name, shapes", [
    ("aten::mm", [(4, 5), (5, 6)]),
    ("aten::mm", [(4, 5), (5, 6), (4, 6)]),  # what it fills, as compiled layers have it
    ("aten::addmm", [(6,), (4, 5), (5, 6)]),
    ("aten::addmm", [(4, 6), (4, 5), (5, 6), (4, 6)]),
    ("mkldnn::_linear_pointwise", [(4, 5), (5, 6)]),
    ("mkldnn::_linear_pointwise", [(4, 5), (4, 6), (5, 6)]),  # with what is added
])
def test_factors_of_a_product(name, shapes):
    assert breakdown.factors(name, shapes) == [(4, 5), (5, 6)]


def a_kernel(name: str, micros: float, annotation: bool = False) -> FunctionEvent:
    """An event of a GPU."""
    return FunctionEvent(0, name, 0, 0, micros, device_type=DeviceType.CUDA, use_device="cuda",
                         is_user_annotation=annotation)


def an_operation(name: str, shapes: list, kernels: list[FunctionEvent]) -> FunctionEvent:
    """An event of the CPU, 7 microseconds long, that starts kernels."""
    event = FunctionEvent(0, name, 0, 0, 7, use_device="cuda", input_shapes=shapes)
    for kernel in kernels:
        event.append_kernel(kernel.name, 0, kernel.time_range.elapsed_us())
    return event


def test_a_kernel_is_counted_once():
    """Whether an operation knows it or not; the time of annotations is not work."""
    gemm, other, split, adam, flex, replayed, copied = kernels = [
        a_kernel("sm90_xmma_gemm_bf16", 100), a_kernel("nvjet_hsh_128x256", 50),
        a_kernel("cublasLt::splitKreduce_kernel", 10),
        a_kernel("multi_tensor_apply_kernel<FusedAdamMathFunctor>", 3),
        a_kernel("triton_tem_fused_flex_attention_3", 40),
        a_kernel("nvjet_hsh_64x8", 20), a_kernel("Memcpy HtoD", 1)]
    capped = a_kernel("triton_per_fused_logsumexp", 5)
    events = [
        *kernels, capped,
        a_kernel("Optimizer.step#AdamW.step", 1000, annotation=True),
        an_operation("Optimizer.step#AdamW.step", [], []),
        an_operation("aten::linear", [[64, 8], [4096, 8]], []),
        an_operation("aten::mm", [[64, 8], [8, 4096]], [gemm]),
        an_operation("aten::mm", [[64, 8], [8, 16], [64, 16]], [other, split]),
        an_operation("aten::_fused_adamw_", [], [adam]),
        an_operation("triton_tem_fused_flex_attention_3", [[2, 4, 64, 16]], [flex]),
        an_operation("triton_per_fused_logsumexp", [[64, 4096], []], [capped]),
        an_operation("cudaGraphLaunch", [], [])]
    taken, products = breakdown.account(events, 4096, on_gpu=True)
    assert {kind: time for kind, time in taken.items() if time} == {
        "logits and loss": 105, "products": 80, "attention": 40, "optimizer": 3, "element-wise": 1}
    assert products == {"64×8 · 8×4096": [2 * 64 * 8 * 4096, 100],
                        "64×8 · 8×16": [2 * 64 * 8 * 16, 60]}


def test_on_a_cpu_operations_take_the_time():
    events = [an_operation("aten::mm", [[64, 8], [8, 16]], []), an_operation("aten::mul", [], [])]
    taken, products = breakdown.account(events, 4096, on_gpu=False)
    assert taken == {"products": 7, "element-wise": 7}
    assert products == {"64×8 · 8×16": [2 * 64 * 8 * 16, 7]}


@pytest.mark.parametrize("name, kind", [
    ("void fmha_cutlassF_bf16_aligned_64x64_rf_sm80", "attention"),
    ("void cutlass::Kernel2<cutlass_80_wmma_tensorop_bf16>", "products"),
    ("void at::native::multi_tensor_apply_kernel<LpNormFunctor>", "optimizer"),
    ("triton_red_fused_mean_mul_pow_rsqrt_2", "element-wise")])
def test_kinds_of_kernels(name, kind):
    assert breakdown.kind_of(name, [], 4096) == kind


@pytest.mark.parametrize("what", ["train", "generate"])
def test_where_the_time_goes(what, made, run):
    inputs = [made / "packed"] if what == "train" else []
    found = run(breakdown.main, what, made / "model", *inputs, "--device", "cpu")
    assert found.keys() >= {"device", "step_seconds", "peak_flops", "peak_device_gb"}
    assert {"products", "logits and loss", "element-wise", "gaps"} <= found["shares"].keys()
    assert ("optimizer" in found["shares"]) == (what == "train")
    assert found["products"] and all(
        part.keys() == {"share", "of_peak"} for part in found["products"].values())


def test_a_step_of_decoding_comes_after_the_recording(made, run, monkeypatch):
    """What is measured begins after `FIRST` steps, and when it is watched nothing is recorded."""
    module, recorded, drawn = importlib.import_module("minilora.generate"), [], []

    def see(ready, *_):
        for watched in (False, True):
            rest = ready(watched)
            drawn.append((len(recorded), len(rest())))
        return {"step_seconds": 32.0}

    monkeypatch.setattr(module, "records", lambda device: True)
    monkeypatch.setattr(module, "compiles", lambda device: False)
    monkeypatch.setattr(breakdown, "record", lambda step, cache: recorded.append(1) or step)
    monkeypatch.setattr(breakdown, "measure", see)
    found = run(breakdown.main, "generate", made / "model", "--device", "cpu")
    assert drawn == [(1, 32), (1, 32)] and found["step_seconds"] == 1


# --- comparing ------------------------------------------------------------------------------------

OURS, PEER, OTHER = "minilora", "transformers + peft, eager", "transformers + peft, sdpa"
STEP = {"losses": [12.0, 11.0], "grad_norms": [3.0, 2.0], "base_unchanged": True,
        "adapters_changed": True}


def training_runs(**change) -> dict[str, list[dict]]:
    return {OURS: [STEP, {**STEP, **change}], PEER: [STEP, STEP]}


@pytest.mark.parametrize("change, words", [
    (dict(losses=[12.0, 11.002]), "loss 11.002 at step 2, the peer's 11"),
    (dict(losses=[float("nan"), 11.0]), "not all finite"),
    (dict(losses=[12.0]), "1 steps, not 2"),
    (dict(grad_norms=[3.0, 2.01]), "gradient norm 2.01 at step 2"),
    (dict(grad_norms=[3.0, 0.0]), "not all positive"),
    (dict(base_unchanged=False), "base's bytes changed"),
    (dict(adapters_changed=False), "adapters did not change"),
])
def test_training_that_disagrees_is_refused(change, words):
    assert compare.check_training(training_runs(), "float32") == {}
    with pytest.raises(compare.Refused, match=words):
        compare.check_training(training_runs(**change), "float32")


def test_bfloat16_has_room_for_its_roundings_and_no_more():
    near = dict(losses=[12.03, 10.97], grad_norms=[3.05, 1.97])
    assert compare.check_training(training_runs(**near), "bfloat16") == {}
    with pytest.raises(compare.Refused, match="loss"):
        compare.check_training(training_runs(**near), "float32")
    with pytest.raises(compare.Refused, match="loss"):
        compare.check_training(training_runs(losses=[12.0, 11.2]), "bfloat16")


def test_a_peer_that_disagrees_with_the_first_is_left_out():
    runs = training_runs() | {OTHER: [{**STEP, "losses": [12.0, 9.0]}]}
    assert "loss 9" in compare.check_training(runs, "float32")[OTHER]
    assert list(runs) == [OURS, PEER]


@pytest.mark.parametrize("dtype, ids, words", [
    ("float32", [[5, 6, 7], [8, 9, 9]], "row 2 has another id than the peer from token 3 on"),
    ("float32", [[5, 6, 7]], "1 rows"),
    ("bfloat16", [[5, 6], [8, 9]], "2 rows of 2 ids"),
    ("bfloat16", [[5, 6, 7], [8, 9, 9]], None),
])
def test_ids_that_disagree_are_refused(dtype, ids, words):
    runs = {OURS: [{"ids": ids[0], "other_ids": ids[1:]}],
            PEER: [{"ids": [5, 6, 7], "other_ids": [[8, 9, 10]]}]}
    if words is None:
        assert compare.check_ids(runs, dtype) == {}
        return
    with pytest.raises(compare.Refused, match=words):
        compare.check_ids(runs, dtype)


def test_sides_run_in_turn_and_one_that_cannot_is_left_out(monkeypatch):
    order = []

    def fake(title, command, flags):
        order.append(command[0])
        if command[0] == "c":
            raise compare.Refused(f"{title}: out of memory")
        return {"n": len(order)}

    monkeypatch.setattr(compare, "run", fake)
    settings = Namespace(rounds=3, most=1e9)
    runs, left_out = compare.in_turn(settings, {OURS: ["a"], PEER: ["b"], OTHER: ["c"]})
    assert order == [*"abc", *"ba", *"ab"]
    assert left_out == {OTHER: "out of memory"} and len(runs[PEER]) == 3
    with pytest.raises(compare.Refused, match="no side of minilora is left"):
        compare.in_turn(settings, {OURS: ["c"], PEER: ["b"]})
    clock = iter(range(100))
    monkeypatch.setattr(compare.time, "monotonic", lambda: next(clock))
    runs, left_out = compare.in_turn(Namespace(rounds=3, most=1), {OURS: ["a"], PEER: ["b"]})
    assert len(runs[OURS]) == 1 and left_out == {PEER: "no time was left"}


def test_a_comparison_from_end_to_end(made, monkeypatch, capsys, tmp_path, taken):
    """The command as it is, its processes run in this one; a doctored side leaves no file."""
    pytest.importorskip("peft")
    from bench import peer

    mains = {"make.py": make.main, "peer.py": peer.main, "without.py": without.main,
             "stream.py": stream.main}
    lie, commands = {}, []

    def here(title: str, command: list, flags: Namespace) -> str:
        commands.append(list(map(str, command)))
        capsys.readouterr()
        script = Path(str(command[1])).name
        words = list(map(str, command[2:])) if script in mains else list(map(str, command[3:]))
        mains.get(script, minilora)(words)
        out = capsys.readouterr().out
        assert script == "make.py" or json.loads(out)["device"] == "cpu"
        return json.dumps(json.loads(out) | lie) if script == "-m" else out

    monkeypatch.setenv("MINILORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(compare, "finished", here)
    line = ["train", "--shape", "tiny", "--device", "cpu", "--length", "32", "--steps", "3",
            "--rounds", "2", "--out", str(tmp_path / "results"), "--work", str(tmp_path / "work")]
    lie["losses"] = [1.0, 1.0, 1.0]
    with pytest.raises(SystemExit, match="refused: minilora: loss 1 at step 1"):
        compare.main(line)
    assert not (tmp_path / "results").exists()
    lie.clear()
    compare.main(line)
    shown = capsys.readouterr().out
    [file] = (tmp_path / "results").iterdir()
    found = json.loads(file.read_text())
    assert len(found["sides"][OURS]["tokens_per_second"]) == 2
    assert found["versions"].keys() >= {"torch", "transformers", "peft"} and found["cores"] >= 1
    compare.main(["table", "--out", str(tmp_path / "results")])
    assert capsys.readouterr().out == shown
    assert "| 2 × 32 tokens, 25% trained, tiny, float32 | " in shown
    # All that `cpu` does, on the tiny shape.
    small = [(job, settings | {"steps": 3}) for job, settings in compare.CPU
             if "shape" not in settings]
    monkeypatch.setattr(compare, "CPU", small)
    line = [word for word in line[1:] if word not in ("--device", "cpu")]  # all that it means
    commands.clear()
    compare.main(["cpu", *line, "--rounds", "1", "--batch", "1", "--prompt", "8", "--new", "4",
                  "--lengths", "16", "32", "--tokens", "32", "--conversations", "10", "40",
                  "--count", "12"])
    shown, done = capsys.readouterr().out, list(map(json.loads, map(Path.read_text, sorted(
        (tmp_path / "results").iterdir()))))
    assert {found["job"] for found in done} == {job for job, _ in small}
    assert not any(found["left_out"] for found in done)
    assert all(words[words.index("--device") + 1] == "cpu" for words in commands
               if "make.py" not in words[1]) and any("peer.py" in words[1] for words in commands)
    assert shown.count("| 1 × 32 tokens, 25% trained, tiny, float32 | ") == 1 + len(
        compare.TECHNIQUES)
    assert "| 12 conversations of train.jsonl, tiny, float32, packed | " in shown


@pytest.mark.skipif(shutil.which("timeout") is None, reason="gpu.sh is for Linux")
def test_the_script_for_gpus(tmp_path):
    """One part of it, rehearsed on the tiny shape; a part that there is not stops no other."""
    pytest.importorskip("peft")
    script = subprocess.run(
        ["bash", str(compare.HERE / "gpu.sh"), "fly", "load"], capture_output=True, text=True,
        env=os.environ | {"SHAPE": "tiny", "ROUNDS": "1", "PYTHON": sys.executable,
                          "OUT": str(tmp_path / "results"), "WORK": str(tmp_path / "work")})
    assert "fly: failed (2)" in script.stdout and "load: done" in script.stdout
    found, = compare.read_results(tmp_path / "results")
    assert found["job"] == "load" and not found["left_out"] and len(found["sides"]) == 2
    assert compare.table([found]) == (tmp_path / "results" / "gpu.md").read_text().strip()


# --- the table ------------------------------------------------------------------------------------

def stored(job: str, **sides: dict) -> dict:
    return {"job": job, "shape": "gemma2-2b", "dtype": "bfloat16", "device": "GPU", "cores": 16,
            "versions": {"torch": "2.11.0"}, "left_out": {"transformers + peft, flex": "no memory"},
            "settings": dict(batch=8, length=2048, share=0.2, packed=True),
            "sides": {{"ours": OURS, "eager": PEER, "sdpa": OTHER}[name]: side
                      for name, side in sides.items()}}


def test_table():
    train = stored("train", ours={"tokens_per_second": [400, 300, 420], "peak_host_gb": [9, 9, 9],
                                  "peak_device_gb": [3.0, 3.1, 3.0]},
                   eager={"tokens_per_second": [100, 100, 100], "peak_host_gb": [9, 9, 9],
                          "peak_device_gb": [6.2, 6.2, 6.2]},
                   sdpa={"tokens_per_second": [90, 120, 90], "peak_host_gb": [9, 9, 9],
                         "peak_device_gb": [9, 9, 9]})
    load = stored("load", ours={"load_seconds": [2.0], "read_seconds": [1.8], "ratio": [1.1],
                                "host_over_weights": [1.02], "peak_host_gb": [5.0]},
                  eager={"load_seconds": [5.0], "peak_host_gb": [10.0]})
    lines = compare.table([load, train, stored("load", ours=load["sides"][OURS])]).splitlines()
    assert lines[0] == "On GPU, 16 cores, torch 2.11.0:"
    # The best peer is that of the better median, the ratio that of each round.
    assert ("| 8 × 2048 tokens, 20% trained, packed, gemma2-2b, bfloat16 | 400 tokens/s | "
            "100 (eager) | 4 (3–4.2) | 3.1 GB, 0.5 of 6.2 |  |") in lines
    assert ("| load, gemma2-2b, bfloat16 | 2 s | 5 (eager) | 2.5 (2.5–2.5) | 5 GB, 0.5 of 10 | "
            "1.1 × reading the files, host peak 1.02 × the weights |") in lines
    assert any("| 2 s |  |  | 5 GB |" in line for line in lines)  # no peer
    assert sum("left out: no memory" in line for line in lines) == 3


def test_other_lengths_stand_beside_the_first():
    found = stored("scaling", ours={"step_seconds": [2.0], "peak_host_gb": [5.0]})
    longer = {"step_seconds": [2.5], "peak_host_gb": [6.0]}
    found["sides"] = {"minilora, 2 × 256 tokens": found["sides"][OURS],
                      "minilora, 1 × 512 tokens": longer}
    lines = compare.table([found]).splitlines()
    assert ("| a step, 20% trained, gemma2-2b, bfloat16, 1 × 512 tokens | 2.5 s a step | "
            "2 (minilora, 2 × 256 tokens) | 0.8 (0.8–0.8) | 6 GB, 1.2 of 5 |  |") in lines


def test_techniques_stand_beside_a_run_without():
    found = stored("techniques", ours={"tokens_per_second": [300.0], "peak_host_gb": [5.0]})
    found["sides"]["minilora, without columns"] = {"tokens_per_second": [200.0],
                                                   "peak_host_gb": [10.0]}
    assert ("| 8 × 2048 tokens, 20% trained, gemma2-2b, bfloat16 | 300 tokens/s | 200 (without "
            "columns) | 1.5 (1.5–1.5) | 5 GB, 0.5 of 10 |  |") in compare.table([found])


def test_machines_have_tables_of_their_own():
    one = stored("load", ours={"load_seconds": [2.0], "peak_host_gb": [5.0]})
    other = copy.deepcopy(one) | {"device": "another"}
    assert compare.table([one, other, one]).count("On ") == 2


def test_the_readme_s_table_is_that_of_the_results():
    results = compare.read_results(compare.HERE / "results")
    assert compare.table(results) in (compare.ROOT / "README.md").read_text()


def test_long_runs_are_watched(tmp_path):
    """As short ones, in processes of their own: they put themselves between the parts of train.py
    and infer.py."""
    def run(*words: str) -> str:
        return subprocess.run([sys.executable, *words], cwd=tmp_path, check=True, text=True,
                              capture_output=True).stdout

    run(str(compare.ROOT / "train.py"), *("--data nano/held_out.jsonl --length 800 --batch 1 "
                                          "--steps 1 --eval-calls 0 --out run").split())
    for part, *flags in (("train", "--steps", "20"), ("chat", "--turns", "6", "--adapter", "run")):
        facts, verdict = run(str(compare.HERE / "soak.py"), part, *flags).splitlines()[-2:]
        facts = json.loads(facts)
        assert facts["count"] == int(flags[1]) and "flat" in verdict.lower()
        assert all(facts[place]["MB"] > 100 for place in ("start", "middle", "end"))
