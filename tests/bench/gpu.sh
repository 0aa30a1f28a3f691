#!/usr/bin/env bash
# The whole bench of an accelerator in one go, with nothing but this repository and PyTorch,
# transformers and peft:
#
#     OUT=results bash tests/bench/gpu.sh            every part
#     bash tests/bench/gpu.sh train decode           only these
#     SHAPE=tiny bash tests/bench/gpu.sh             a rehearsal, on a CPU too
#
# Each part has a time limit of its own (no side begins after half of it, or takes more than a
# third), and what is done is kept whatever happens to the rest: all results in $OUT/$NAME.json, the
# table in $OUT/$NAME.md, what went by in $OUT/$NAME.log. DATA and TOKENIZER name conversations and
# the folder of a tokenizer.model for the part "real" (default: nano's). MOST is the limit of a part
# in seconds (of "train" and "wide" twice that), WORK a folder to keep checkpoints and batches in.
#
# The part "tests" is what the suite runs on a GPU alone; "suite" is all the rest, which is for a
# CPU. Both run several processes at once, as most of their time is a compiler's or Python's. The
# part "query" asks whether one query of a Gemma without soft-caps is for SDPA or for plain products.
set -uo pipefail
cd "$(dirname "$0")/../.."
OUT=$(mkdir -p "${OUT:-tests/bench/results}" && cd "${OUT:-tests/bench/results}" && pwd)
SHAPE=${SHAPE:-gemma2-2b} LARGE=${LARGE:-gemma2-9b} NAME=${NAME:-gpu} ROUNDS=${ROUNDS:-2}
WORK=${WORK:-$(mktemp -d)} PYTHON=${PYTHON:-python3} MOST=${MOST:-280}
DTYPE=bfloat16 T=2048 LONG="16384 32768 65536 131072" NEW=256 PREFILL=2048 COUNT=250 WIDE=64 ROWS=8
UNCAPPED=gemma3-270m SUITE="tests/test_*.py" AT_ONCE=${AT_ONCE:-$(($(nproc) * 3 / 4 + 1))}
if [ "$SHAPE" = tiny ]; then
  LARGE=tiny T=64 LONG="128 256" NEW=8 PREFILL=16 COUNT=20 WIDE=4 ROWS=1
  UNCAPPED=tiny SUITE="tests/test_layering.py tests/test_packing.py"
fi
PARTS=${*:-train wide all real large decode batch prefill load merge steps long profile query tests
  suite}
mkdir -p "$WORK/parts"

bench() {  # job, then flags
  timeout "$most" "$PYTHON" tests/bench/compare.py "$@" --dtype $DTYPE --work "$WORK" \
    --out "$WORK/parts" --limit $((most / 3)) --most $((most / 2)) >/dev/null
}

tested() {  # so many lines of stdin to a process of pytest, so many of these at once
  OMP_NUM_THREADS=1 TORCHINDUCTOR_COMPILE_THREADS=4 timeout -s INT -k 20 "$most" \
    xargs -r -d '\n' -n "$1" -P "$2" "$PYTHON" -m pytest -v --maxfail=3 --durations=3
}

train() { bench train --shape "$SHAPE" --length $T --packed --share 0.2 --rounds "$ROUNDS" "$@"; }

part() {
  case $1 in
    # What a peer can do at all is seen with few rows: its logits of all tokens take the memory.
    train) train --batch 2 --steps 6 --rounds 1 --ours plain \
             --peer eager --peer eager+compile --peer eager+checkpointing \
             --peer flex_attention --peer flex_attention+compile \
             --peer flex_attention+checkpointing --peer flex_attention+compile+checkpointing ;;
    wide) train --batch 8 --ours plain --ours compile=off \
             --ours recompute=cheap --ours recompute=all --ours recompute=offload \
             --peer flex_attention+checkpointing --peer eager+checkpointing ;;
    all) bench train --shape "$SHAPE" --length $T --packed --share 1 --batch 8 --peer none \
             --rounds "$ROUNDS" ;;
    real) bench packing --shape "$SHAPE" --count $COUNT --batch $ROWS --rounds 1 \
             --ours plain --ours compile=off --peer eager+checkpointing \
             ${DATA:+--data "$DATA"} ${TOKENIZER:+--tokenizer "$TOKENIZER"} ;;
    large) bench train --shape "$LARGE" --length $T --packed --share 0.2 --batch 4 --steps 5 \
             --rounds 1 --peer none --ours recompute=all --ours recompute=offload ;;
    long) bench scaling --shape "$SHAPE" --lengths $LONG --tokens 1 --steps 3 \
             --rounds 1 --ours recompute=all --ours recompute=offload --share 0.2 ;;
    decode) bench generate --shape "$SHAPE" --batch 1 --new $NEW --rounds "$ROUNDS" \
             --peer eager --peer eager+static ;;
    batch) bench generate --shape "$SHAPE" --batch $WIDE --new $NEW --rounds 1 \
             --peer eager --peer eager+static ;;
    query) bench decoding --shape "$UNCAPPED" --batch 8 --prompt $((PREFILL / 2 - 1)) --new $NEW \
             --rounds 1 --without sdpa ;;
    prefill) bench generate --shape "$SHAPE" --batch 1 --prompt $PREFILL --new 8 --rounds 1 ;;
    load | merge) bench "$1" --shape "$SHAPE" --rounds 1 ;;
    steps) train --batch 4 --steps 200 --rounds 1 --peer none ;;
    profile) bench profile --shape "$SHAPE" --batch 8 --length $T --share 0.2 --rounds 1 ;;
    tests) "$PYTHON" -m pytest --collect-only -k on_a_gpu tests/test_gpu.py tests/test_generate.py \
             tests/test_attention.py | grep :: | tested 6 $(((AT_ONCE + 1) / 2)) ;;
    suite) printf '%s\n' $SUITE | CUDA_VISIBLE_DEVICES="" tested 1 "$AT_ONCE" ;;
    *) echo "no part is called $1" >&2; return 2 ;;
  esac
}

: >"$OUT/$NAME.log"
for name in $PARTS; do
  began=$SECONDS
  case $name in train | wide) most=$((2 * MOST)) ;; *) most=$MOST ;; esac
  part "$name" >>"$OUT/$NAME.log" 2>&1
  status=$?
  case $status in
    0) how=done ;; 124 | 137) how="cut off after $most s" ;; *) how="failed ($status)" ;;
  esac
  echo "$name: $how, $((SECONDS - began)) s" | tee -a "$OUT/$NAME.log"
  [ $status = 0 ] || { grep -a '^FAILED' "$OUT/$NAME.log"; tail -n 3 "$OUT/$NAME.log"; } |
    cut -c 1-300
  "$PYTHON" tests/bench/compare.py table --out "$WORK/parts" --bundle "$OUT/$NAME.json" \
    >"$OUT/$NAME.md" 2>>"$OUT/$NAME.log"
done
cat "$OUT/$NAME.md"
