"""Makes the nano base and its data: vocabulary, pre-training, checkpoint, conversations.

    torchrun --nproc-per-node 2 -m minilora.nano.make --out minilora/nano     # a process a core
    python -m minilora.nano.make --out minilora/nano --data-only

Everything is drawn from `--seed`. What it cost when the shipped base was made is in `made.json`.
"""

import argparse
import io
import json
import os
import random
import time
from collections.abc import Iterator
from pathlib import Path

import sentencepiece
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from minilora.config import GemmaConfig
from minilora.model import Gemma
from minilora.nano.world import SIGNS, conversation, lesson
from minilora.weights import load_model

PAD, EOS, BOS, START, END = 0, 1, 2, 106, 107  # as in Gemma's own vocabulary
SEED = 0
OFFERED = (15, 60, 25)  # one, two, three tools, of a hundred chats to train on
CONFIG = {
    "architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2", "vocab_size": 1280,
    "hidden_size": 192, "intermediate_size": 384, "num_hidden_layers": 4,
    "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 32,
    "query_pre_attn_scalar": 32, "sliding_window": 512, "max_position_embeddings": 2048,
    "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0, "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh", "attention_bias": False, "attention_dropout": 0.0,
    "tie_word_embeddings": True, "pad_token_id": PAD, "eos_token_id": EOS, "bos_token_id": BOS,
    "torch_dtype": "bfloat16",
}


def train_vocabulary(seed: int) -> bytes:
    """A SentencePiece BPE model with Gemma's special ids, byte fallback and single digits.

    Signs and the space are pieces of their own, so that a word has the same pieces after a space,
    a quote or an underscore: copying a name from one place to another is then copying its ids.
    """
    rng = random.Random(seed)
    lines = [line for _ in range(20_000) for ask, answer in lesson(rng)
             for line in f"{ask}\n{answer}".split("\n")]
    lines += [" ".join([*(sign for sign in SIGNS if sign.isalpha()), "user", "model"])] * 4000
    special = ["<mask>", "<2mass>", "[@BOS@]", *(f"<unused{i}>" for i in range(99)),
               "<start_of_turn>", "<end_of_turn>"]
    signs = ["▁", ":▁", ",▁", *"\n\"':;,._-{}[]()<>/=|?!"]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, model_type="bpe",
        vocab_size=CONFIG["vocab_size"], user_defined_symbols=[*special, *signs],
        byte_fallback=True, split_digits=True, add_dummy_prefix=False,
        remove_extra_whitespaces=False, normalization_rule_name="identity", character_coverage=1.0,
        pad_id=PAD, eos_id=EOS, bos_id=BOS, unk_id=3, pad_piece="<pad>", eos_piece="<eos>",
        bos_piece="<bos>", unk_piece="<unk>", minloglevel=2, num_threads=1)
    return model.getvalue()


def rows(pieces: sentencepiece.SentencePieceProcessor, rng: random.Random, number: int,
         length: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless rows of ids and targets (-100 where the user speaks), each [length], of a round.

    A row is one long chat, lesson after lesson, so that whatever is asked for must be found among
    much that is not.
    """
    newline = pieces.encode("\n")
    opening, reply_opening = pieces.encode("user\n"), pieces.encode("model\n")
    while True:
        ids, targets = [BOS], [-100]
        while len(ids) <= length:
            for ask, answer in lesson(rng, number):
                prompt = [START, *opening, *pieces.encode(ask), END, *newline,
                          START, *reply_opening]
                reply = [*pieces.encode(answer), END]
                ids += prompt + reply + newline
                targets += [-100] * len(prompt) + reply + [-100] * len(newline)
        yield torch.tensor(ids[:length]), torch.tensor(targets[1:length + 1])


def pretrain(model: Gemma, vocabulary: bytes, number: int, steps: int, batch: int, length: int,
             seed: int, peak: float, out: Path) -> dict:
    """Trains the whole model on a round of lessons: Muon on the matrices, AdamW on the rest.

    Returns what it cost.

    Nine tenths of the steps run compiled, in bfloat16 products and without the soft-cap, which
    hardly acts on scores this small; the last tenth runs as the model will. A C++ compiler is
    needed. The base as it stands is written to `out` every 500 steps. Under torchrun the rows of a
    step are shared by its processes.

    Muon: Jordan et al. 2024, kellerjordan.github.io/posts/muon; here PyTorch's own.
    """
    pieces = sentencepiece.SentencePieceProcessor(model_proto=vocabulary)
    world, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    # Every second step has rows twice as long, so that distances beyond `length` are seen too.
    rng = random.Random(f"{seed + number} {rank}")
    short, long = (rows(pieces, rng, number, tokens) for tokens in (length, 2 * length))
    model.requires_grad_(True)
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    optimizers = [
        torch.optim.Muon(matrices, lr=peak, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=peak, betas=(0.9, 0.95), weight_decay=0.0)]
    warmup, start, seen = max(1, steps // 100), time.perf_counter(), 0
    exact = steps - steps // 10  # from here on
    torch.compiler.set_stance("default")
    for layer in model.layers:
        layer.self_attn.softcap = None
        layer.compile(dynamic=False)
    bar = tqdm(range(steps), unit="step", disable=rank > 0)
    for step in bar:
        if step == exact:
            torch.compiler.set_stance("force_eager")
            for layer in model.layers:
                layer.self_attn.softcap = CONFIG["attn_logit_softcapping"]
        rate = peak * min((step + 1) / warmup, (steps - step) / (steps - warmup))
        source, count = (long, batch // 2) if step % 2 else (short, batch)
        ids, targets = (torch.stack(column) for column in zip(
            *(next(source) for _ in range(count // world)), strict=True))
        trained = targets != -100
        with torch.autocast("cpu", torch.bfloat16, enabled=step < exact):
            logits = model.logits(model.hidden_states(ids)[trained])
        loss = F.cross_entropy(logits, targets[trained])
        loss.backward()
        if world > 1:
            gradients = [p.grad for p in model.parameters()]
            mean = torch.nn.utils.parameters_to_vector(gradients) / world  # one message, not sixty
            dist.all_reduce(mean)
            torch.nn.utils.vector_to_parameters(mean, gradients)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        seen += world * ids.numel()
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
        if step % 500 == 499 and rank == 0:
            write_base(model, vocabulary, out)
            print(json.dumps({"round": number + 1, "step": step + 1, "tokens": seen,
                              "loss": round(loss.item(), 4),
                              "seconds": round(time.perf_counter() - start)}), flush=True)
    return {"steps": steps, "tokens": seen, "final_loss": round(loss.item(), 4),
            "minutes": round((time.perf_counter() - start) / 60, 1), "processes": world,
            "threads": torch.get_num_threads(), "torch": torch.__version__}


def write_base(model: Gemma, vocabulary: bytes, out: Path) -> None:
    """The checkpoint in the layout of the hub, in bfloat16."""
    out.mkdir(parents=True, exist_ok=True)
    tensors = {f"model.{name}": p.detach().to(torch.bfloat16).contiguous()
               for name, p in model.named_parameters()}
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    (out / "tokenizer.model").write_bytes(vocabulary)
    for name, value in {
        "config.json": CONFIG,
        "generation_config.json": {"bos_token_id": BOS, "eos_token_id": [EOS, END],
                                   "pad_token_id": PAD},
    }.items():
        (out / name).write_text(json.dumps(value, indent=2) + "\n")


def write_data(out: Path, seed: int, train: int, held: int) -> None:
    """LoRA's conversations: `train.jsonl`, and `held_out.jsonl` on the other side of the hash.

    A chat to train on asks one to three questions and mostly offers two tools or three; a held-out
    one asks one and mostly offers one. In the held-out file every tool name, parameter name and
    argument value is on the side that training never draws from, and every second question has a
    phrasing that it never saw.
    """
    rng = random.Random(seed + 2)
    chats = [conversation(rng, False, False, rng.randrange(1, 4), OFFERED) for _ in range(train)]
    rng = random.Random(f"{seed} held out")
    asked = [conversation(rng, True, i % 2 == 1) for i in range(held)]
    for name, some in (("train.jsonl", chats), ("held_out.jsonl", asked)):
        with open(out / name, "w", encoding="utf-8") as file:
            file.writelines(json.dumps(chat, ensure_ascii=False) + "\n" for chat in some)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to write into")
    parser.add_argument("--steps", type=int, nargs=3, default=(14000, 12000, 3800),
                        help="pre-training steps of the three rounds; 0: that round was made "
                             "before, and its base is in --out")
    parser.add_argument("--batch", type=int, default=16, help="rows in a step")
    parser.add_argument("--length", type=int, default=256, help="tokens in a row")
    parser.add_argument("--lr", type=float, nargs=3, default=(4e-3, 2.5e-3, 2.5e-3),
                        help="peak learning rate of each round")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--train", type=int, default=5000, help="conversations to train LoRA on")
    parser.add_argument("--held", type=int, default=600, help="held-out conversations")
    parser.add_argument("--data-only", action="store_true", help="write only the conversations")
    flags = parser.parse_args()
    if "RANK" in os.environ:  # set by torchrun
        dist.init_process_group("gloo")
    writes = not dist.is_initialized() or dist.get_rank() == 0
    if writes:
        flags.out.mkdir(parents=True, exist_ok=True)
        write_data(flags.out, flags.seed, flags.train, flags.held)
    if flags.data_only:
        return
    torch.manual_seed(flags.seed)
    if flags.steps[0]:
        vocabulary, rounds = train_vocabulary(flags.seed), []
        model = Gemma(GemmaConfig.from_dict(CONFIG))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.ndim == 2:
                    parameter.normal_(0.0, 0.02 if "embed" in name else parameter.shape[1] ** -0.5)
    else:
        vocabulary = (flags.out / "tokenizer.model").read_bytes()
        rounds = json.loads((flags.out / "made.json").read_text())[:flags.steps.count(0)]
        model = load_model(flags.out)
    for number in range(len(rounds), len(flags.steps)):
        rounds.append(pretrain(model, vocabulary, number, flags.steps[number], flags.batch,
                               flags.length, flags.seed, flags.lr[number], flags.out))
        if writes:
            write_base(model, vocabulary, flags.out)
            (flags.out / "made.json").write_text(json.dumps(rounds, indent=2) + "\n")


if __name__ == "__main__":
    main()
