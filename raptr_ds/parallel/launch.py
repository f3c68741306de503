"""How this process was started: its rank from deepspeed, torchrun, srun or mpirun. The one reader of os.environ."""

import contextlib
import os
import secrets
import socket
import stat
import subprocess
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass, replace
from pathlib import Path

from raptr_ds.errors import ConfigError

_DEFAULT_PORT = 29500
_ALLOCATOR_SETTINGS = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")

# What launchers, and `detect_launch`, set for a rank; libraries that find it wait for the other ranks.
_OF_A_RANK = (
    *("RANK", "LOCAL_RANK", "LOCAL_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE", "ROLE_", "CROSS_"),
    *("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_", "OMPI_", "PMI_", "PMIX_", "DS_ACCELERATOR"),
    *("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS"),
)


@dataclass(frozen=True)
class Launch:
    """Rank and rendezvous of one process of a run.

    restart_count: how often the run was started again without its user: by Slurm's requeueing, by torchrun, or by
    tools/supervise.py. begun_by: what the user started, the same after each of these restarts; empty where no variable
    names it. store_attempt: where the launcher itself serves the store at the address (torchrun), which attempt this
    is. slurm_job: the number of the job around the launcher, empty without one; slurm_restarts: how often it was
    requeued. signal_lead: seconds between the signal to stop and the time limit (RAPTR_SIGNAL_LEAD), None where nobody
    has set it.
    """

    rank: int
    local_rank: int
    world_size: int
    master_addr: str
    master_port: int
    launcher: str
    restart_count: int = 0
    store_attempt: int | None = None
    begun_by: str = ""
    slurm_job: str = ""
    slurm_restarts: int = 0
    signal_lead: float | None = None


def detect_launch() -> Launch:
    """Return this process's launch, from the variables that its launcher set; a lone process is a run of one.

    Raises: ConfigError if a launcher gave some but not all of what is needed, or the signal's lead is no number.
    """
    env = os.environ
    if "RANK" in env and "WORLD_SIZE" in env:  # deepspeed, torchrun, and anything that imitates them
        launcher = "torchrun" if "TORCHELASTIC_RUN_ID" in env else "deepspeed"
        rank, world, local = int(env["RANK"]), int(env["WORLD_SIZE"]), int(env.get("LOCAL_RANK", 0))
        port = int(env.get("MASTER_PORT") or _DEFAULT_PORT)
        found = Launch(rank, local, world, _address(), port, launcher, store_attempt=_store_attempt())
    elif "OMPI_COMM_WORLD_RANK" in env:
        found = _mpirun_launch()
    elif "SLURM_PROCID" in env and int(env.get("SLURM_NTASKS", 1)) > 1:
        found = _slurm_launch()  # before PMI_SIZE: srun sets that too where a site's default is PMI
    elif _count("PMI_SIZE") > 1:  # a lone task of such a site's srun, which has mpi4py or not, is a run of one
        found = _mpirun_launch()
    else:
        found = Launch(0, 0, 1, "127.0.0.1", free_port(), "none")
    found = replace(
        found,
        restart_count=sum(map(_count, ("SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT", "RAPTR_RESTART_COUNT"))),
        begun_by=env.get("SLURM_JOB_ID") or env.get("RAPTR_SUPERVISOR") or _torchrun_run(),
        slurm_job=env.get("SLURM_JOB_ID", ""),
        slurm_restarts=_count("SLURM_RESTART_COUNT"),
        signal_lead=_signal_lead(),
    )
    # DeepSpeed reads these itself (runtime/pipe/module.py wants LOCAL_RANK), whatever the launcher was.
    env.update(
        RANK=str(found.rank),
        WORLD_SIZE=str(found.world_size),
        LOCAL_RANK=str(found.local_rank),
        MASTER_ADDR=found.master_addr,
        MASTER_PORT=str(found.master_port),
    )
    return found


def is_first_rank_there(launch: Launch, seconds: float) -> bool:
    """Wait until somebody listens at the run's address, as rank 0 does once its run file is read; else False."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            socket.create_connection((launch.master_addr, launch.master_port), timeout=1).close()
        except OSError:
            time.sleep(0.2)
        else:
            return True
    return False


def use_gpu(index: int) -> None:
    """Let DeepSpeed use the GPU of this number among those that the process sees: it takes LOCAL_RANK for that."""
    os.environ["LOCAL_RANK"] = str(index)


def prepare_imports(has_gpu: bool) -> None:
    """Decide what DeepSpeed and megatron-core would find out and print on every rank when they are imported."""
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if has_gpu else "cpu")
    if has_gpu and not any(name in os.environ for name in _ALLOCATOR_SETTINGS):
        # Paths change in length, and blocks cut for one do not fit the next. torch reads this when it first allocates
        # on a GPU (c10/cuda/CUDAAllocatorConfig.h, instance), not when it is imported.
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
    if not has_gpu:
        # deepspeed 0.19.8, accelerator/cpu_accelerator.py, device_count: without it each of ZeRO 3's reductions starts
        # numactl to count NUMA nodes. Only quantized gradients, which are not supported here, use the number.
        os.environ.setdefault("LOCAL_SIZE", "1")
    _keep_compiled_code_private()
    # deepspeed 0.19.8, autotuning/autotuner.py: imports it if it is installed, a second and a thread at every start.
    sys.modules.setdefault("mlflow", None)  # type: ignore[arg-type]  # runtime/tracking.py takes it back
    warnings.filterwarnings("ignore", message="Transformer Engine and Apex are not installed", category=UserWarning)
    for name in ("all_gather_into_tensor", "reduce_scatter_tensor"):  # DeepSpeed 0.19.8 calls them by their old names
        warnings.filterwarnings("ignore", message=f".*{name}.* is deprecated", category=FutureWarning)


def _keep_compiled_code_private() -> None:
    """Give torch.compile a folder that no other user can have filled: it unpickles and runs what it finds there.

    torch's own default is a name in /tmp that anybody may take first (torch/_inductor/runtime/cache_dir_utils.py).
    """
    if "TORCHINDUCTOR_CACHE_DIR" in os.environ:
        return
    folder = Path(tempfile.gettempdir(), f"torchinductor_raptr_{os.getuid()}")
    try:
        with contextlib.suppress(FileExistsError):
            folder.mkdir(mode=0o700)
        found = folder.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & stat.S_IWOTH:
            folder = Path(tempfile.mkdtemp(prefix="torchinductor_"))
    except OSError:  # no room or no permission there: if the run compiles, torch says so
        return
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder)


def _torchrun_run() -> str:
    """Return torchrun's name of the run, or its agent where it has none; empty without torchrun."""
    name = os.environ.get("TORCHELASTIC_RUN_ID", "")
    return f"{socket.gethostname()}:{os.getppid()}" if name == "none" else name


def _count(variable: str) -> int:
    return int(os.environ.get(variable) or 0)


def _signal_lead() -> float | None:
    text = os.environ.get("RAPTR_SIGNAL_LEAD") or None
    if text is None or text.isdecimal():
        return None if text is None else float(text)
    raise ConfigError(
        f"RAPTR_SIGNAL_LEAD={text!r} must be a whole number: the seconds between the signal to stop and the time "
        "limit, as in sbatch's --signal=B:USR1@120. Unset it if nobody sends such a signal."
    )


def _store_attempt() -> int | None:
    """Return torchrun's attempt where its agent serves the store (torch/distributed/rendezvous.py); None elsewhere."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    return _count("TORCHELASTIC_RESTART_COUNT")


def environment_of_child(sees_gpus: bool = False) -> dict[str, str]:
    """Return the environment for a child process that is no rank of the run, and takes no GPU unless it sees them."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(_OF_A_RANK)}
    return kept if sees_gpus else {**kept, "CUDA_VISIBLE_DEVICES": ""}


def environment_of_run() -> dict[str, str]:
    """Return the environment for a run that this process starts: none of the tasks of the Slurm job that it is in."""
    return {name: value for name, value in os.environ.items() if name != "SLURM_PROCID"}


def has_own_malloc_settings() -> bool:
    """Return whether the user's environment has settings for glibc's memory."""
    names = ("GLIBC_TUNABLES", "MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_")
    return any(name in os.environ for name in names)


def _slurm_launch() -> Launch:
    env = os.environ
    if "SLURM_STEP_NODELIST" not in env:
        raise ConfigError(
            f"the Slurm job has {env['SLURM_NTASKS']} tasks, and this process is none of them: its batch script "
            "started it without srun (SLURM_STEP_NODELIST is not set), and nobody starts the others. Put srun, "
            "deepspeed or torchrun before the command, or ask for one task (--ntasks=1)."
        )
    address = env.get("MASTER_ADDR") or _first_slurm_host(env["SLURM_STEP_NODELIST"])
    # Below those that the kernel gives to outgoing connections (free_port), and another for each job.
    port = int(env.get("MASTER_PORT") or _DEFAULT_PORT - 1 - int(env.get("SLURM_JOB_ID", 0)) % 10_000)
    return Launch(
        rank=int(env["SLURM_PROCID"]),
        local_rank=int(env.get("SLURM_LOCALID", 0)),
        world_size=int(env["SLURM_NTASKS"]),
        master_addr=address,
        master_port=port,
        launcher="srun",
    )


def _first_slurm_host(nodelist: str) -> str:
    try:
        listed = subprocess.run(
            ["scontrol", "show", "hostnames", nodelist], capture_output=True, text=True, timeout=30, check=True
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise ConfigError(
            f"srun started this process but the first host of {nodelist!r} cannot be found ({error}). "
            "Set MASTER_ADDR (and MASTER_PORT) in the job script."
        ) from error
    return listed.stdout.split()[0]


def _mpirun_launch() -> Launch:
    try:
        from mpi4py import MPI
    except ImportError as error:
        raise ConfigError(
            f"mpirun started this process, but mpi4py cannot be loaded ({error}). Install mpi4py and an MPI library "
            "(Debian: openmpi-bin), or start with deepspeed, torchrun or srun."
        ) from error
    world = MPI.COMM_WORLD
    local = world.Split_type(MPI.COMM_TYPE_SHARED)
    address = os.environ.get("MASTER_ADDR") or (_own_address(local.size < world.size) if world.rank == 0 else None)
    port = os.environ.get("MASTER_PORT") or (free_port() if world.rank == 0 else None)
    address, port = world.bcast((address, port), root=0)
    found = Launch(world.rank, local.rank, world.size, str(address), int(str(port)), "mpirun")
    # The rest goes through torch.distributed. mpirun reports a failure for a process that ends without this.
    MPI.Finalize()
    return found


def _own_address(has_others: bool) -> str:
    """Return this machine's address. has_others: other machines must find it, so its name where it has a loop's."""
    name = socket.gethostname()
    address = socket.gethostbyname(name)
    return name if has_others and address.startswith("127.") else address  # as Debian's /etc/hosts has it


def _address() -> str:
    address = os.environ.get("MASTER_ADDR")
    if address is None and int(os.environ["WORLD_SIZE"]) > 1:
        raise ConfigError("RANK and WORLD_SIZE are set but MASTER_ADDR is not. Start with deepspeed, torchrun or srun.")
    return address or "127.0.0.1"


def free_port() -> int:
    """Return a TCP port that nobody listens on here.

    It is none of those that the kernel gives to outgoing connections, where there are others: one of these may have
    it before it is listened on.
    """
    draw, first_given = secrets.SystemRandom(), 0
    with contextlib.suppress(OSError):
        first_given = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text(encoding="ascii").split()[0])
    others = range(10_000, min(first_given, _DEFAULT_PORT))
    for port in draw.sample(others, min(64, len(others))):
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("", port))
            return port
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]
