# What the .sbatch files share: start one task for each process with srun; tools/supervise.py judges how they end.
#
# Sourced by them inside a job, with RAPTR_CONFIG set; arguments are passed on to pretrain.py. Users' variables are
# described in docs/slurm.md: RAPTR_CONFIG, RAPTR_ARGS, RAPTR_VENV, RAPTR_SETUP, RAPTR_HOME, RAPTR_SRUN_ARGS,
# RAPTR_SIGNAL_LEAD, RAPTR_MAX_RETRIES, RAPTR_RETRY_DELAY. The batch files of tools/submit.py also set RAPTR_CODE, the
# copy of the repository that is run, and step_options and task_words, arrays of words for a container.
# Runs under bash 4.2 or newer and needs nothing but Slurm's commands: no ssh, no host file.

readonly USER_ERROR=2 # raptr_ds/errors.py: Exit

say() {
    echo "training_job: $(date '+%F %T') job ${SLURM_JOB_ID}: $*" >&2
}

refuse() {
    say "$*"
    exit "$USER_ERROR"
}

# Make python the one that the user means. Modules and virtual environments read unset variables: no `set -u` here.
activate_environment() {
    if [ -n "${RAPTR_SETUP:-}" ]; then
        [ -r "$RAPTR_SETUP" ] || refuse "RAPTR_SETUP=$RAPTR_SETUP cannot be read. It names a shell file to source first."
        source "$RAPTR_SETUP" || refuse "RAPTR_SETUP=$RAPTR_SETUP failed with $?."
    fi
    local venv=${RAPTR_VENV:-}
    [ -n "$venv" ] || [ ! -r "$RAPTR_HOME/.venv/bin/activate" ] || venv=$RAPTR_HOME/.venv
    if [ -n "$venv" ]; then
        [ -r "$venv/bin/activate" ] || refuse "RAPTR_VENV=$venv is no virtual environment: it has no bin/activate."
        source "$venv/bin/activate"
    fi
    command -v python >/dev/null || refuse "no python. Set RAPTR_VENV to a virtual environment on a shared file system."
}

# One task for each process: --ntasks-per-node of the job, one if it did not say.
choose_tasks() {
    tasks_per_node=${SLURM_NTASKS_PER_NODE:-1}
    local gpus=${SLURM_GPUS_ON_NODE:-$tasks_per_node}
    if [ "$tasks_per_node" -ne "$gpus" ]; then
        refuse "$gpus GPUs but $tasks_per_node tasks on each node. One process drives one GPU:" \
            "give --ntasks-per-node=$gpus, or --gpus-per-node=$tasks_per_node."
    fi
}

set_defaults() {
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}
    export PYTHONUNBUFFERED=1
    # $0 is Slurm's copy of the batch file, which has the lead unless it was given on the command line; the last counts.
    local lead='s/^#SBATCH .*--signal[= ][^@ ]*@\([0-9]\{1,\}\).*/\1/p'
    export RAPTR_SIGNAL_LEAD=${RAPTR_SIGNAL_LEAD:-$(sed -n "$lead" "$0" 2>/dev/null | tail -n 1)}
    # When one task is gone the others wait for it in a collective: end them after this many seconds. Not at once
    # (--kill-on-bad-exit): all tasks leave with 75 after a signal, not in the same instant, and the last ones would be
    # killed by the first one's 75, which turns the step's code, the largest of all tasks', into 143.
    export SLURM_WAIT=${SLURM_WAIT:-60}
    export SLURM_KILL_BAD_EXIT=${SLURM_KILL_BAD_EXIT:-0}
    # GPU clusters: uncomment what yours needs.
    # export NCCL_DEBUG=WARN                            # INFO prints which network NCCL uses
    # export NCCL_SOCKET_IFNAME=ib0                     # network interface to meet on (GLOO_SOCKET_IFNAME for CPU)
    # export NCCL_IB_HCA=mlx5                           # InfiniBand adapters to use
    # export TORCH_NCCL_ASYNC_ERROR_HANDLING=1          # a lost rank is an error, not a hang
    # export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True
}

# Note a stop request, and pass it on. Repeated: Python needs a moment before it listens. It hears one request once.
stop() {
    asked=$1
    [ -n "$supervisor" ] || return
    { sleep 0.2 && while kill -s "$1" "$supervisor"; do sleep 5; done; } 2>/dev/null &
}

# Run the tasks and whatever follows from the way they end; set code to the job's exit code.
run_supervised() {
    local options=(--nodes="$SLURM_JOB_NUM_NODES" --ntasks-per-node="$tasks_per_node" --mpi=none)
    # srun does not inherit this one from the job (Slurm 22.05 and newer).
    [ -z "${SLURM_CPUS_PER_TASK:-}" ] || options+=(--cpus-per-task="$SLURM_CPUS_PER_TASK")
    # --mpi=none: a PMI that a site loads by default would make the tasks look like mpirun's.
    local more_options more_arguments # lists of words; `read` leaves a * or [1,2] in them as it is
    IFS=$' \t\n' read -r -d '' -a more_options <<<"${RAPTR_SRUN_ARGS:-}"
    IFS=$' \t\n' read -r -d '' -a more_arguments <<<"${RAPTR_ARGS:-}"
    local sources=${RAPTR_CODE:+$RAPTR_CODE/}
    unset RANK WORLD_SIZE LOCAL_RANK # of the shell that submitted: each task reads its own from srun
    (
        trap '' USR1 TERM # until Python listens
        exec python "${sources}tools/supervise.py" --slurm ${asked:+--stopped} -- \
            srun "${options[@]}" "${step_options[@]}" "${more_options[@]}" \
            "${task_words[@]}" python "${sources}raptr_ds/pretrain.py" --deepspeed_config "$RAPTR_CONFIG" "${more_arguments[@]}" "$@"
    ) &
    supervisor=$!
    [ -z "$asked" ] || stop "$asked" # meanwhile
    while :; do
        asked=
        wait "$supervisor"
        code=$?
        [ -n "$asked" ] || break # else `wait` returned for the signal, and the supervisor goes on
    done
}

asked= supervisor=
trap 'stop USR1' USR1
trap 'stop TERM' TERM # from Slurm at the time limit and on scancel: there is a checkpoint to wait for
activate_environment
choose_tasks
set_defaults
# Relative paths in run files, in RAPTR_CONFIG and in RAPTR_ARGS count from the repository, as without Slurm.
cd "$RAPTR_HOME" || refuse "cannot enter $RAPTR_HOME"
[ -r "$RAPTR_CONFIG" ] || refuse "no run file RAPTR_CONFIG=$RAPTR_CONFIG (relative paths count from $RAPTR_HOME)."
say "$RAPTR_CONFIG on $SLURM_JOB_NODELIST, $((SLURM_JOB_NUM_NODES * tasks_per_node)) tasks"
run_supervised "$@"
exit "$code"
