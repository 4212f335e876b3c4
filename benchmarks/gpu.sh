#!/usr/bin/env bash
# Benchmarks, a training run and the tests on one GPU, offline and without wandb, each in under ten
# minutes:
#
#   bash benchmarks/gpu.sh OUTDIR [benchmarks] [training] [tests]
#
# Without names all three run, in this order, together within LIMIT_S; on a slow host, give each a
# call of its own. OUTDIR receives log.txt (every table), benchmarks.tar.gz (every JSON), growth.png,
# training.tar.gz (metrics and predictions of a short bf16 Coconut run on ProsQA) and tests.txt. The
# exit status is 1 if a part failed; the log ends with the names of the failed parts.
#
# Environment variables and their defaults:
#   PYTHON=python3      needs torch with CUDA, transformers and the packages of requirements-dev.txt
#   WHEELS=             folder of wheels for packages that PYTHON lacks (such as pydantic,
#                       pydantic_core, annotated_types, typing_inspection, datasets, dill and
#                       multiprocess); installed into a temporary folder, not into PYTHON
#   COMMIT=             the commit, if the tree is a copy without .git
#   LIMIT_S=585         time limit of the whole script, in seconds
#   SLOWER=1            factor for the limits of the parts, which were chosen on an H100
#   DEVICE=cuda MODEL=gpt2 PRECISION=--bf16 RECORDS=4000 EPOCHS=4 REPEATS=5 WORKERS=8 TESTS=tests
#                       for a trial run: DEVICE=cpu MODEL=tiny PRECISION= RECORDS=40
set -uo pipefail

if [[ $# -lt 1 ]]; then
  echo "usage: bash benchmarks/gpu.sh OUTDIR [benchmarks] [training] [tests]" >&2
  exit 2
fi
mkdir -p "$1" || exit 2
OUT=$(cd "$1" && pwd)
shift
PARTS="${*:-benchmarks training tests}"
cd "$(dirname "$0")/.." || exit 2

PYTHON=${PYTHON:-python3} LIMIT_S=${LIMIT_S:-585} SLOWER=${SLOWER:-1} WHEELS=${WHEELS:-}
DEVICE=${DEVICE:-cuda} MODEL=${MODEL:-gpt2} PRECISION=${PRECISION---bf16}
RECORDS=${RECORDS:-4000} EPOCHS=${EPOCHS:-4} REPEATS=${REPEATS:-5}
WORKERS=${WORKERS:-8} TESTS=${TESTS:-tests}
export HF_HUB_OFFLINE=1 WANDB_MODE=disabled TOKENIZERS_PARALLELISM=true PYTHONUNBUFFERED=1
WORK=$(mktemp -d)
FAILED=()

bundle() { # packs what exists so far, even if a limit ends the script
  compgen -G "$WORK/json/*.json" > /dev/null && tar -C "$WORK" -czf "$OUT/benchmarks.tar.gz" json
  [[ -f $WORK/json/growth.png ]] && cp "$WORK/json/growth.png" "$OUT/"
  if [[ -d $WORK/exps/gpu ]]; then
    tar -C "$WORK/exps" --exclude='checkpoint_*' --exclude=resume --exclude=.lock \
      -czf "$OUT/training.tar.gz" gpu
  fi
  rm -rf "$WORK"
}
trap bundle EXIT
exec > >(tee "$OUT/log.txt") 2>&1

# part NAME SECONDS COMMAND...: run COMMAND for at most SECONDS x SLOWER, and never past LIMIT_S.
part() {
  local name=$1 limit=$((SLOWER * $2)) left=$((LIMIT_S - SECONDS)) began=$SECONDS status=0
  shift 2
  ((left < limit)) && limit=$left
  echo && echo "== $name (at most $limit s): $*"
  if ((limit < 1)); then
    status=skipped
  else
    timeout -k 5 "$limit" "$@" || status=$?
  fi
  echo "== $name: $((SECONDS - began)) s, status $status"
  [[ $status == 0 ]] || FAILED+=("$name")
}

bench() { # NAME SECONDS MODULE OPTIONS...: run benchmarks.MODULE; its JSON is NAME.json
  local name=$1 limit=$2 module=$3
  shift 3
  # shellcheck disable=SC2086
  part "$name" "$limit" "$PYTHON" -m "benchmarks.$module" --device "$DEVICE" --model "$MODEL" \
    $PRECISION --out "$WORK/json/$name.json" "$@"
}

benchmarks() {
  local large=(--records "$((RECORDS < 128 ? 8 : 128))" --question 362 --answer 12)
  bench train_step 80 train_step --repeats "$REPEATS"
  bench train_step_128 40 train_step --repeats "$REPEATS" "${large[@]}" --contenders prototype ours
  bench memory 90 memory --contenders ours
  bench generate 50 generate --repeats "$REPEATS"
  bench evaluation 30 evaluation --repeats "$REPEATS" --records "$((RECORDS < 128 ? 8 : 128))"
  bench breakdown 60 breakdown --repeats 1 "${large[@]}"
  bench epoch 60 epoch --repeats 1 --records "$((RECORDS < 128 ? 300 : RECORDS))"
  bench growth 90 growth --repeats 1
}

train() {
  "$PYTHON" preprocessing/prosqa.py --out "$WORK/data" --train "$RECORDS" --valid 64 --test 1 &&
    "$PYTHON" -m benchmarks.local_model --text "$WORK/data/prosqa_train.json" \
      --out "$WORK/model" --model "$MODEL" &&
    "$PYTHON" run.py args/prosqa_coconut.yaml name=gpu save_path="$WORK/exps" wandb=disabled \
      model_id="$WORK/model" from_scratch=true bf16="$([[ $PRECISION == --bf16 ]] && echo true || echo false)" \
      train_path="$WORK/data/prosqa_train.json" val_path="$WORK/data/prosqa_valid.json" \
      batch_size_training=128 effective_batch_size=None num_epochs="$EPOCHS" epochs_per_stage=1 \
      max_new_tokens=32 keep_checkpoints=1
}

test_suite() {
  OMP_NUM_THREADS=1 "$PYTHON" -m pytest -n "$WORKERS" -p no:cacheprovider "$TESTS" \
    2>&1 | tee "$OUT/tests.txt"
}

if [[ -n $WHEELS ]]; then
  part wheels 60 "$PYTHON" -m pip install --quiet --no-index --no-deps --target "$WORK/site" "$WHEELS"/*.whl
  export PYTHONPATH="$WORK/site${PYTHONPATH:+:$PYTHONPATH}"
fi
mkdir -p "$WORK/json"
# timeout cannot run shell functions, so they are exported and run by bash.
export -f train test_suite
export PYTHON WORK OUT MODEL PRECISION RECORDS EPOCHS WORKERS TESTS
for name in $PARTS; do
  case $name in
    benchmarks) benchmarks ;;
    training) part training 120 bash -o pipefail -c train ;;
    tests) part tests 600 bash -o pipefail -c test_suite ;;
    *)
      echo "unknown part: $name; choose from benchmarks, training and tests" >&2
      exit 2
      ;;
  esac
done
echo && echo "== $SECONDS s in total; failed: ${FAILED[*]:-none}"
[[ ${#FAILED[@]} == 0 ]]
