# What the .sbatch files share: start one task for each process with srun, and judge how the step ended.
#
# Sourced by them inside a job, with RAPTR_CONFIG set; arguments are passed on to pretrain.py. Users' variables are
# described in docs/slurm.md: RAPTR_CONFIG, RAPTR_ARGS, RAPTR_VENV, RAPTR_SETUP, RAPTR_HOME, RAPTR_SRUN_ARGS.
# Runs under bash 4.2 or newer and needs nothing but Slurm's commands: no ssh, no host file.

readonly DONE=0 USER_ERROR=2 CONTINUE_LATER=75 # raptr_ds/errors.py: Exit

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

# Where the ranks meet. The port differs between jobs that share a node, and between a job and its requeued self, whose
# old sockets may still linger; it stays below the ports that the kernel hands out by itself (32768 and more).
choose_rendezvous() {
    MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
    MASTER_PORT=$((15000 + (10#$SLURM_JOB_ID * 7 + ${SLURM_RESTART_COUNT:-0}) % 15000))
    [ -n "$MASTER_ADDR" ] || refuse "scontrol does not tell the first host of $SLURM_JOB_NODELIST."
    export MASTER_ADDR MASTER_PORT
    unset RANK WORLD_SIZE LOCAL_RANK # of the shell that submitted: each task reads its own from srun
}

set_defaults() {
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}
    export PYTHONUNBUFFERED=1
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

# Note a stop request, and pass it on if there is a step.
stop() {
    interrupted=1
    if [ -z "$stop_requested" ]; then
        stop_requested=1
        say "stop requested: asking the tasks to save and leave"
        [ -z "$srun_process" ] || ask_tasks_to_stop
    fi
}

# srun hands SIGUSR1 to every task; they finish their step, save and exit with 75. Asked again until srun is gone: an
# srun that has not started its tasks yet drops the signal, and to a task one more says nothing new.
ask_tasks_to_stop() {
    while kill -USR1 "$srun_process"; do
        sleep 5
    done 2>/dev/null &
    asking_process=$!
}

# Run the tasks; set step_code to srun's exit code, the largest of all tasks' codes.
run_step() {
    local options=(--nodes="$SLURM_JOB_NUM_NODES" --ntasks-per-node="$tasks_per_node" --mpi=none)
    # srun does not inherit this one from the job (Slurm 22.05 and newer).
    [ -z "${SLURM_CPUS_PER_TASK:-}" ] || options+=(--cpus-per-task="$SLURM_CPUS_PER_TASK")
    # --mpi=none: a PMI that a site loads by default would make the tasks look like mpirun's.
    # shellcheck disable=SC2086  # RAPTR_SRUN_ARGS and RAPTR_ARGS are lists of words
    srun "${options[@]}" ${RAPTR_SRUN_ARGS:-} \
        python raptr_ds/pretrain.py --deepspeed_config "$RAPTR_CONFIG" ${RAPTR_ARGS:-} "$@" &
    srun_process=$!
    if [ -n "$stop_requested" ]; then # between the check below and here
        ask_tasks_to_stop
    fi
    while :; do
        interrupted=
        wait "$srun_process"
        step_code=$?
        [ -n "$interrupted" ] || break # else `wait` returned for the signal, and srun goes on
    done
    srun_process=
    [ -z "$asking_process" ] || kill "$asking_process" 2>/dev/null
}

job_state() {
    scontrol show job "$SLURM_JOB_ID" | sed -n 's/^ *JobState=\([A-Z_]*\).*/\1/p'
}

# Put the job back into the queue, where it keeps its number; `load: auto` continues from the last checkpoint.
requeue() {
    local state
    state=$(job_state)
    # Tasks of a cancelled job are asked to stop too, and leave with 75. Slurm would requeue even that job.
    if [ "$state" != RUNNING ]; then
        say "$1, and the job is $state: not requeued. To continue, submit it again."
    else
        say "$1: back to the queue" # Slurm may end this script before the next command returns
        scontrol requeue "$SLURM_JOB_ID" || say "not requeued, see above. To continue, submit the job again."
    fi
    exit "$CONTINUE_LATER"
}

judge() {
    if [ "$step_code" -eq "$DONE" ]; then
        say "done"
        exit "$DONE"
    elif [ "$step_code" -eq "$CONTINUE_LATER" ]; then
        requeue "stopped with a checkpoint"
    elif [ -n "$stop_requested" ] && [ "$step_code" -gt 128 ]; then
        # The request met tasks that were still starting: if there is no new checkpoint, the last one stands.
        requeue "stopped by signal $((step_code - 128))"
    elif [ "$step_code" -eq "$USER_ERROR" ]; then
        say "the run file or its data is wrong, see the message above: not requeued"
    else
        say "a fault ended the step (exit code $step_code): not requeued"
    fi
    exit "$step_code"
}

stop_requested= interrupted= srun_process= asking_process=
trap stop USR1
activate_environment
choose_tasks
choose_rendezvous
set_defaults
# Relative paths in run files, in RAPTR_CONFIG and in RAPTR_ARGS count from the repository, as without Slurm.
cd "$RAPTR_HOME" || refuse "cannot enter $RAPTR_HOME"
[ -r "$RAPTR_CONFIG" ] || refuse "no run file RAPTR_CONFIG=$RAPTR_CONFIG (relative paths count from $RAPTR_HOME)."
say "start ${SLURM_RESTART_COUNT:-0}: $RAPTR_CONFIG on $SLURM_JOB_NODELIST," \
    "$((SLURM_JOB_NUM_NODES * tasks_per_node)) tasks, meeting at $MASTER_ADDR:$MASTER_PORT"
[ -z "$stop_requested" ] || requeue "stopped before it started"
run_step "$@"
judge
