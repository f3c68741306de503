#!/usr/bin/env bash
# Everything worth knowing about this repository on one GPU, in order of worth, within KIT_SECONDS:
#
#   bash .gpu/on_device.sh [STEP ...]        all steps without arguments; tests/gpu/README.md lists them
#
# Results land in OUT: summary.txt, results.jsonl, profile_*.txt, bench_bert_base.md and logs.tgz, up to date after each step, so
# that a run that is cut off loses one step only. No step stops the next. The exit code is 1 if anything was bad.
#
# ul2_125m and bert_base_raptr, which run only if they are named, train the comparisons of experiments/gpu on KIT_TOKENS
# (.gpu/data/small: prepared tokens).
#
# Variables: OUT (.gpu/out), KIT_SECONDS (530), KIT_DEVICE (cuda; cpu for a dry run, tiny), KIT_DATA (.gpu/data/docs: prepared
# data), KIT_PATIENCE (1: what every limit is multiplied by), KIT_JOBS (8 training runs at a time), KIT_PYTHON (python3),
# KIT_SITE (a folder where carried wheels are installed; in a dry run they are not without it).
set -u

repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/../../.." && pwd)
cd "$repo" || exit 1
export KIT_DEVICE=${KIT_DEVICE:-cuda} KIT_PATIENCE=${KIT_PATIENCE:-1}
python=${KIT_PYTHON:-python3}
seconds=${KIT_SECONDS:-530}
carried=$repo/.gpu
out=${OUT:-$carried/out}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
logs=$work/logs
mkdir -p "$out" "$logs" "$work/tmp"
rm -rf "$out/ul2_125m" "$out/bert_base_raptr"
rm -f "$out"/profile_*.txt "$out/bench_bert_base.md" "$out/logs.tgz"
: >"$out/summary.txt"
: >"$out/results.jsonl"
export KIT_RESULTS=$out/results.jsonl
[ -n "${KIT_DATA:-}" ] || [ ! -d "$carried/data/docs" ] || export KIT_DATA=$carried/data/docs
tokens=${KIT_TOKENS:-$carried/data/small}
wanted=" $* "

export PYTHONUNBUFFERED=1 PYTHONFAULTHANDLER=1 PYTHONWARNINGS=ignore TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
export GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-lo} NCCL_SOCKET_IFNAME=${NCCL_SOCKET_IFNAME:-lo} NCCL_DEBUG=WARN # no network
export TORCHINDUCTOR_CACHE_DIR=$work/inductor TRITON_CACHE_DIR=$work/triton # what one step compiled serves the next
export TMPDIR=$work/tmp PYTEST_TIMEOUT=$((150 * KIT_PATIENCE))
# pytest without the repository's settings, some of which need plugins.
tests=("$python" -m pytest -q -c /dev/null --rootdir "$repo" -p no:cacheprovider -p no:warnings --durations=5)

note() { printf '%s\n' "$*" | tee -a "$out/summary.txt"; }

# save: bring $OUT up to date with the logs.
save() {
    [ ! -s "$work/dmon.log" ] || cp "$work/dmon.log" "$logs/"
    tar -C "$logs" -czf "$work/logs.tgz" . && mv "$work/logs.tgz" "$out/logs.tgz"
}

is_wanted() { [[ "$wanted" == *" $1 "* ]]; }

# step NAME LIMIT NEEDS COMMAND...: run it for at most LIMIT seconds, if it is wanted and at least NEEDS are left.
step() {
    local name=$1 limit=$(($2 * KIT_PATIENCE)) needs=$3
    shift 3
    is_wanted "$name" || [ "$wanted" = "  " ] || return 0
    local left=$((seconds - SECONDS)) begin=$SECONDS code pid ending=
    if [ "$left" -lt "$needs" ]; then
        note "== $name: skipped, $left s left and $needs needed"
        return 0
    fi
    [ "$limit" -le "$left" ] || limit=$left
    timeout --signal=TERM --kill-after=10 "$limit" "$@" >"$logs/$name.log" 2>&1 </dev/null &
    pid=$!
    wait "$pid"
    code=$?
    kill -KILL -- "-$pid" 2>/dev/null # timeout leads a process group: what its command left behind would slow the next step
    if [ "$code" = 124 ] || [ "$code" = 137 ]; then ending=', out of time'; fi
    note "== $name: exit code $code after $((SECONDS - begin)) s of $limit$ending"
    grep -aE '^(OK|BAD|INFO) ' "$logs/$name.log" | cut -c1-300 | tee -a "$out/summary.txt"
    if [ "$code" -ne 0 ] && ! grep -aq '^BAD ' "$logs/$name.log"; then # it failed without a finding
        note "BAD $name: exit code $code$ending; the end of its log:"
        grep -avE '^(OK|INFO) ' "$logs/$name.log" | tail -n 12 | cut -c1-300 | sed 's/^/    /' | tee -a "$out/summary.txt"
    fi
    save
}

# What is missing here, from the carried wheels.
if compgen -G "$carried/wheels/*.whl" >/dev/null && { [ "$KIT_DEVICE" = cuda ] || [ -n "${KIT_SITE:-}" ]; }; then
    site=${KIT_SITE:-$work/site}
    "$python" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target "$site" "$carried"/wheels/*.whl \
        >"$logs/install.log" 2>&1 || note "BAD installing the wheels: $(tail -n 3 "$logs/install.log" | tr '\n' ' ')"
    export PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH}
    timeout 60 "$python" -m compileall -q -j 0 "$site" raptr_ds tools tests/gpu >/dev/null 2>&1 # a hundred imports follow
fi
export PYTHONPATH=$repo${PYTHONPATH:+:$PYTHONPATH}
note "kit: ready after $SECONDS s; commit $(git log -1 --format=%h 2>/dev/null || echo unknown) on $KIT_DEVICE"

if [ "$KIT_DEVICE" = cuda ] && ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' >"$logs/torch.log" 2>&1; then
    note "BAD no GPU that torch sees: nothing was measured. $(tail -n 1 "$logs/torch.log")"
    save
    exit 1
fi

monitor=
if [ "$KIT_DEVICE" = cuda ] && command -v nvidia-smi >/dev/null; then
    nvidia-smi >"$logs/nvidia-smi.log" 2>&1
    nvidia-smi dmon -s pucm -d 2 >"$work/dmon.log" 2>&1 &
    monitor=$!
fi

# Every file of tests/gpu that has no step of its own.
others=()
for file in tests/gpu/test_*.py; do
    case $file in */test_environment.py | */test_training_runs.py | */test_memory_on_gpu.py) ;; *) others+=("$file") ;; esac
done
if [ "$KIT_DEVICE" = cuda ]; then
    compared=(--config deepspeed_configs/bert_base_raptr.json --random-tokens 30522 --repetitions 5 --set train_batch_size=64)
else
    compared=(--config deepspeed_configs/bert_quickstart.json --random-tokens 90 --repetitions 1 --set train_batch_size=4
        train_micro_batch_size_per_gpu=2 raptr_ds.model.num_layers=4 raptr_ds.model.hidden_size=32 raptr_ds.model.seq_length=16)
fi
# megatron-core draws its dropout from another generator: the others are compared without.
compared+=(raptr_ds.model.hidden_dropout=0.0 raptr_ds.model.attention_dropout=0.0)
report=$out/bench_bert_base.md

#    name        limit needs
step environment 60 10 "${tests[@]}" tests/gpu/test_environment.py
step ceilings    40 10 "$python" -m tests.gpu.kit.measure_ceilings
[ ${#others[@]} = 0 ] ||
    step others  110 20 "${tests[@]}" "${others[@]}"
step runs        175 40 "${tests[@]}" tests/gpu/test_training_runs.py -k "not fused_adam"
step ul2_1b      170 45 "$python" -m tests.gpu.kit.measure_training ul2_1b --profile "$out/profile_ul2_1b.txt"
step attention   60 20 "$python" -m tests.gpu.kit.measure_attention
step bert_base   120 40 "$python" -m tests.gpu.kit.measure_training bert_base --profile "$out/profile_bert_base.txt" --seconds 100
[ "$KIT_DEVICE" = cpu ] ||
    step memory  80 40 "${tests[@]}" tests/gpu/test_memory_on_gpu.py
step compare     100 45 "$python" tools/bench.py "${compared[@]}" --output "$report"
[ ! -s "$report" ] || grep -E '^(\||- )' "$report" | cut -c1-300 | tee -a "$out/summary.txt"
step blocks      60 30 "$python" -m tests.gpu.kit.measure_blocks
[ "$KIT_DEVICE" = cpu ] ||
    step fused_adam 100 60 "${tests[@]}" tests/gpu/test_training_runs.py -k fused_adam

# Only by name: each fills the time of a whole call.
for name in ul2_125m bert_base_raptr; do
    ! is_wanted "$name" ||
        step "$name" 520 60 "$python" -m tests.gpu.kit.run_comparison "experiments/gpu/$name.json" --data "$tokens" --output "$out/$name"
done

if [ -n "$monitor" ]; then kill "$monitor" 2>/dev/null; fi
num_bad=$(grep -c '^BAD ' "$out/summary.txt")
note "kit: $SECONDS s; $(grep -c '^OK ' "$out/summary.txt") good, $num_bad bad"
save
printf '\n---- bad\n'
grep '^BAD ' "$out/summary.txt" | head -n 30
printf '%s\n' "---- the rest is in summary.txt, results.jsonl, profile_*.txt and logs.tgz under $out"
[ "$num_bad" -eq 0 ]
