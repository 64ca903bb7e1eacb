#!/usr/bin/env bash
# From a fresh checkout to a small Mixtral that has learned from real text. See --help.
set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
CONFIG="$ROOT/research/mixtral_tiny/pretrain_mixtral-tiny.yaml"
PREDICT="$ROOT/research/mixtral_tiny/predict_mixtral-tiny.yaml"
TIMES_LOWER=20 # perplexity must fall at least so many times

usage() {
  cat <<'HELP'
usage: bash scripts/quickstart.sh [--text FILE] [--output DIR] [--steps N] [--fresh]

Makes .venv and installs the package, preprocesses English text with Mixtral's tokenizer, pretrains
a Mixtral of 39 million parameters on it for some minutes on the CPU, evaluates it on text that was
held back, and lets it go on with a sentence. Ends with status 1 unless the perplexity falls by far.

  --text FILE    UTF-8 text to learn from (default: the reference manual that Python carries)
  --output DIR   where everything goes (default: quickstart_output beside the project)
  --steps N      optimizer steps (default: 100)
  --fresh        start again; what an earlier run left is moved aside, not deleted

Run it again after an interruption and it goes on from the last checkpoint.
HELP
}

die() {
  echo "error: $*" >&2
  exit 2
}

TEXT="" OUT="$ROOT/quickstart_output" STEPS=100 FRESH=""
while [ $# -gt 0 ]; do
  case $1 in
    --text | --output | --steps)
      [ $# -ge 2 ] || die "$1 needs a value; see --help"
      case $1 in
        --text) TEXT=$2 ;;
        --output) OUT=$2 ;;
        --steps) STEPS=$2 ;;
      esac
      shift
      ;;
    --fresh) FRESH=yes ;;
    -h | --help) usage && exit ;;
    *) die "$1 is not an option; there are --text, --output, --steps, --fresh and --help" ;;
  esac
  shift
done
[[ $STEPS =~ ^[1-9][0-9]{1,5}$ && $STEPS -ge 20 ]] ||
  die "--steps $STEPS: give a whole number from 20 on"
if [ -n "$TEXT" ]; then
  [ -r "$TEXT" ] || die "--text $TEXT: no such file, or it cannot be read"
  TEXT=$(cd "$(dirname "$TEXT")" && pwd)/$(basename "$TEXT")
fi
OUT=${OUT%/}
[[ $OUT = /* ]] || OUT=$PWD/$OUT
SOURCE=${TEXT:-the reference manual of Python}

if [ -e "$OUT" ] && [ ! -f "$OUT/source.txt" ] && [ -n "$(ls -A "$OUT" 2>/dev/null)" ]; then
  die "$OUT holds something else than a quick start; choose another --output"
fi
if [ -n "$FRESH" ] && [ -e "$OUT" ]; then
  number=1
  while [ -e "$OUT.$number" ]; do number=$((number + 1)); done
  mv "$OUT" "$OUT.$number"
  echo "== what was in $OUT is now in $OUT.$number"
fi
if [ -f "$OUT/source.txt" ] && [ "$(cat "$OUT/source.txt")" != "$SOURCE" ]; then
  die "$OUT holds a run on $(cat "$OUT/source.txt"), not on $SOURCE;" \
    "add --fresh, or choose another --output"
fi
if [ -f "$OUT/summary-$STEPS.txt" ]; then
  echo "== already finished (--fresh starts again):"
  cat "$OUT/summary-$STEPS.txt"
  exit
fi
if [ -f "$OUT/steps.txt" ] && [ "$STEPS" -lt "$(cat "$OUT/steps.txt")" ]; then
  die "$OUT holds a run of $(cat "$OUT/steps.txt") steps; give --steps that many or more," \
    "add --fresh, or choose another --output"
fi

source "$ROOT/scripts/venv.sh"
prepare_venv example
mkdir -p "$OUT/data"
echo "$STEPS" >"$OUT/steps.txt"
echo "$SOURCE" >"$OUT/source.txt"
cd "$ROOT"

# Print a command as it can be typed, then run it.
run() {
  printf '\n$' >&2
  printf ' %q' "$@" >&2
  printf '\n' >&2
  "$@"
}

TRAIN="$OUT/data/train.mindrecord" HELD_BACK="$OUT/data/held_back.mindrecord"
CHECKPOINTS="$OUT/run/checkpoint"

preprocess() {
  run "$VENV_PYTHON" tools/dataset_preprocess/llama_preprocess.py --dataset_type wikipedia \
    --input_glob "${1%.mindrecord}.jsonl" --model_file "$tokenizer" --seq_length 256 \
    --output_file "$1" --overwrite
}

train() {
  run "$VENV_PYTHON" run_mindformer.py --config "$CONFIG" --output_dir "$OUT/run" \
    --train_data "$TRAIN" --eval_dataset_dir "$HELD_BACK" --do_eval True \
    --resume_training True --set "runner_config.max_steps=$STEPS" --set eval_step_interval=25 \
    --set eval_epoch_interval=-1 "$@"
}

# Perplexity on the held-back text of the newest checkpoint.
perplexity() {
  run "$VENV_PYTHON" run_mindformer.py --config "$CONFIG" --output_dir "$OUT/run" \
    --run_mode eval --load_checkpoint "$CHECKPOINTS" --eval_dataset_dir "$HELD_BACK" |
    sed -nE 's/.*perplexity ([^ ]+).*/\1/p'
}

tokenizer=$("$VENV_PYTHON" -c 'from mixtral_ms.data.tokenizer.example_tokenizer import \
  find_example_tokenizer; print(find_example_tokenizer())')
if [ ! -f "$OUT/data/done" ]; then
  echo "== text to records"
  text_flag=()
  [ -z "$TEXT" ] || text_flag=(--text "$TEXT")
  "$VENV_PYTHON" scripts/quickstart_text.py --output_dir "$OUT/data" \
    ${text_flag[@]+"${text_flag[@]}"}
  preprocess "$TRAIN"
  preprocess "$HELD_BACK"
  touch "$OUT/data/done"
fi

if [ ! -s "$OUT/perplexity_untrained.txt" ]; then
  echo "== perplexity before training (the first step's learning rate is 0: nothing is learned yet)"
  train --set runner_config.stop_at_step=1
  before=$(perplexity)
  echo "$before" >"$OUT/perplexity_untrained.txt"
fi
before=$(cat "$OUT/perplexity_untrained.txt")

echo "== training"
started=$SECONDS
train
minutes=$(((SECONDS - started) / 60)) seconds=$(((SECONDS - started) % 60))

echo "== perplexity after training"
after=$(perplexity)
if ! awk "BEGIN { exit !($after * $TIMES_LOWER < $before) }"; then
  echo "failed: the perplexity on held-back text went from $before to $after after $STEPS steps;" \
    "it should fall at least $TIMES_LOWER times" >&2
  exit 1
fi

generate() {
  run "$VENV_PYTHON" run_mindformer.py --config "$PREDICT" --load_checkpoint "$CHECKPOINTS" \
    --vocab_file "$tokenizer" --max_new_tokens 40 --predict_data "$1" \
    --do_sample True --top_k 40 --repetition_penalty 1.5 --presence_penalty 1
}

echo "== how it goes on with a sentence"
answer=$(generate "The import statement")
echo "$answer"

tee "$OUT/summary-$STEPS.txt.new" <<SUMMARY

Perplexity on text that was held back: $before untrained, $after after $STEPS steps
(training: $minutes min $seconds s).
  report       $OUT/run/report.html
  metrics      $OUT/run/metrics.jsonl
  checkpoints  $CHECKPOINTS
To let it go on with another sentence:
  $(printf '%q ' "$VENV_PYTHON" run_mindformer.py --config "$PREDICT" --load_checkpoint \
    "$CHECKPOINTS" --vocab_file "$tokenizer" --predict_data)"A class is"
To train on, to twice the steps, from the last checkpoint:
  bash scripts/quickstart.sh --output $(printf '%q' "$OUT") --steps $((2 * STEPS))$([ -z "$TEXT" ] || printf ' --text %q' "$TEXT")
SUMMARY
mv "$OUT/summary-$STEPS.txt.new" "$OUT/summary-$STEPS.txt"
