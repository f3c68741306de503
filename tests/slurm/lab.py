"""A real Slurm of several logical nodes on this machine, for one test module: starts in about a second, leaves nothing.

munged, slurmctld and one slurmd for each node run in private pid and mount namespaces under one `unshare`: when it is
killed, so is everything that any job ever started. Needs root, and a Slurm built for several slurmd (Debian's is).
"""

import ctypes
import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Collection, Mapping
from pathlib import Path
from types import TracebackType

from tests.processes import all_processes, variables_of, words_of

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scancel", "scontrol", "squeue", "sinfo", "unshare")
FINAL_STATES = frozenset({"COMPLETED", "FAILED", "TIMEOUT", "CANCELLED", "NODE_FAIL", "OUT_OF_MEMORY"})
# A requeued job waits until its old credential has expired, and a second more. Below 5 Slurm takes its default of 120.
CREDENTIAL_SECONDS = 5

_NAMESPACES = ("unshare", "--pid", "--fork", "--kill-child=KILL", "--mount-proc")
_PATH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])  # daemons lie where few shells look
_PR_SET_PDEATHSIG = 1
_FIRST_PORT, _LAST_PORT = 30100, 32700  # the jobs meet below 30000 (slurm/training_job.sh)

_SLURM_CONF = """\
ClusterName=raptr
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket,cred_expire={credential_seconds}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd-%n.log
PlugStackConfig=/dev/null
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_min_interval=0,sched_interval=1,bf_interval=1
ReturnToService=2
SlurmdTimeout=10
CommunicationParameters=NoCtldInAddrAny
KillWait=3
JobRequeue=1
FirstJobId={first_job}
NodeName=node[1-{nodes}] NodeHostname=localhost NodeAddr=127.0.0.[11-{last_address}] Port=[{first_port}-{last_port}] \
CPUs=8 RealMemory=4000 State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE DefaultTime=10 State=UP
"""

# The first process of the namespaces. It waits for standard input to be closed; its end is the end of all the others.
# A daemon's first argument after the folder is its log; hosts and nsswitch.conf make the nodes' names resolve.
_INIT = """\
folder=$1; nodes=$2;
mount --bind "$folder/hosts" /etc/hosts
mount --bind "$folder/nsswitch.conf" /etc/nsswitch.conf
munged -F --socket="$folder/munge.socket" --key-file="$folder/munge.key" --pid-file="$folder/munged.pid" \
    --seed-file="$folder/munge.seed" --log-file="$folder/log/munged.log" </dev/null >"$folder/log/munged.err" 2>&1 &
for _ in $(seq 200); do [ -S "$folder/munge.socket" ] && break; sleep 0.02; done
slurmctld -D -i </dev/null >"$folder/log/slurmctld.err" 2>&1 & daemons=$!
for node in $(seq "$nodes"); do
    unshare --uts bash -c 'hostname "$1"; exec slurmd -D -N "$1"' - "node$node" \
        </dev/null >"$folder/log/slurmd-node$node.err" 2>&1 &
    daemons="$daemons $!"
done
read -r _
kill -TERM $daemons
wait $daemons
"""


def why_unavailable() -> str | None:
    """Return why no cluster can run on this machine, or None if one can."""
    missing = [name for name in PROGRAMS if shutil.which(name, path=_PATH) is None]
    if missing:
        return f"no {', '.join(missing)} on this machine (tools/install_system_packages.sh installs them)"
    if os.geteuid() != 0:
        return "the test cluster needs root (private namespaces and munge)"
    tried = subprocess.run(
        [*_NAMESPACES, "--uts", "bash", "-c", "mount --bind /etc/hosts /etc/hosts && hostname probe"],
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )
    return None if tried.returncode == 0 else f"no private namespaces here: {tried.stderr.strip()}"


class SlurmLab:
    """A running cluster; a context manager. `folder` takes the jobs' output and goes with the cluster."""

    def __init__(self, nodes: int = 2) -> None:
        self.nodes = nodes
        self.folder = Path(tempfile.mkdtemp(prefix="raptr-slurm-"))
        self.env = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_"))}
        self.env["PATH"] = _PATH
        self.env["SLURM_CONF"] = str(self.folder / "slurm.conf")
        self._init: subprocess.Popen[bytes] | None = None
        self._started_again: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> "SlurmLab":
        """Start the daemons and wait until every node is idle. Raises: RuntimeError with the daemons' logs."""
        self._write_files()
        self._init = self._start(*_NAMESPACES, "bash", "init.sh", str(self.folder), str(self.nodes))
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline and self._init.poll() is None:
            if self._answers() and self.idle_nodes() == self.nodes:
                return self
            time.sleep(0.05)
        logs = "\n".join(f"== {log.name}\n{log.read_text()[-1500:]}" for log in sorted((self.folder / "log").iterdir()))
        self.__exit__(None, None, None)
        raise RuntimeError(f"the cluster did not come up\n{logs}")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the first process of the namespaces, and with it everything else; remove the folder."""
        if self._init is not None:
            assert self._init.stdin is not None
            self._init.stdin.close()
            try:
                self._init.wait(10)
            except subprocess.TimeoutExpired:
                self._init.kill()
                self._init.wait()
        shutil.rmtree(self.folder, ignore_errors=True)

    def command(self, *words: str, check: bool = True, env: Mapping[str, str] | None = None) -> str:
        """Run one of Slurm's commands and return what it printed. Raises: RuntimeError if it fails and check is set."""
        result = subprocess.run(
            words,
            env=self.env | dict(env or {}),
            cwd=self.folder,
            text=True,
            capture_output=True,
            timeout=30,
            check=False,
        )
        if check and result.returncode:
            raise RuntimeError(f"{' '.join(words)} -> {result.returncode}\n{result.stdout}{result.stderr}")
        return result.stdout.strip()

    def submit(self, *words: str, env: Mapping[str, str] | None = None) -> int:
        """Submit with sbatch, with `env` set besides; return the job's number. Its output goes to output(job)."""
        output = f"--output={self.folder}/%j.out"
        return int(self.command("sbatch", "--parsable", output, *words, env=env).split(";")[0])

    def output(self, job: int) -> str:
        """Return what the job has printed so far, in all its starts."""
        path = self.folder / f"{job}.out"
        return path.read_text(errors="replace") if path.exists() else ""

    def job(self, job: int) -> dict[str, str]:
        """Return what scontrol shows of the job: JobState, ExitCode, Restarts and so on."""
        return dict(re.findall(r"(\S+?)=(\S*)", self.command("scontrol", "show", "job", "-o", str(job))))

    def wait_for(self, job: int, *states: str, seconds: float = 50) -> dict[str, str]:
        """Wait until the job is in one of `states`, by default a final one. Raises: TimeoutError with its output."""
        wanted = frozenset(states) or FINAL_STATES
        deadline = time.monotonic() + seconds
        while (ended := self.job(job))["JobState"] not in wanted:
            if time.monotonic() > deadline:
                raise TimeoutError(f"job {job} is {ended['JobState']} ({ended.get('Reason')})\n{self.output(job)}")
            time.sleep(0.1)
        return ended

    def wait_for_output(self, job: int, text: str, seconds: float = 50, final: Collection[str] = FINAL_STATES) -> None:
        """Wait until the job has printed `text`. Raises: TimeoutError with its output, at once in a final state."""
        deadline = time.monotonic() + seconds
        while text not in self.output(job):
            if time.monotonic() > deadline or self.job(job)["JobState"] in final:
                raise TimeoutError(f"job {job} did not print {text!r}: {self.job(job)}\n{self.output(job)}")
            time.sleep(0.1)

    def wait_for_steps(self, job: int, count: int, seconds: float = 20) -> None:
        """Wait until so many steps of the job run, its batch script not among them. Raises: TimeoutError."""
        deadline = time.monotonic() + seconds
        while len(re.findall(rf"^{job}\.\d+", self.command("squeue", "-h", "-s", "-o", "%i"), re.MULTILINE)) < count:
            if time.monotonic() > deadline:
                raise TimeoutError(f"job {job} has not {count} steps\n{self.output(job)}")
            time.sleep(0.1)

    def kill_node(self, node: int) -> None:
        """Kill all that runs on a node, as a loss of power does; jobs go on on the others."""
        (daemon,) = self._daemons("slurmd", f"node{node}")
        here = Path(f"/proc/{daemon}/ns/uts").readlink()
        for process in all_processes():
            try:
                if Path(f"/proc/{process}/ns/uts").readlink() == here:
                    os.kill(process, signal.SIGKILL)
            except OSError:  # gone meanwhile
                continue

    def start_node(self, node: int) -> None:
        """Start a node that was killed."""
        script = 'hostname "$1"; exec slurmd -D -N "$1"'
        self._start_inside("unshare", "--uts", "bash", "-c", script, "-", f"node{node}")

    def kill_controller(self) -> None:
        """Kill the controller; jobs go on."""
        for daemon in self._daemons("slurmctld"):
            os.kill(daemon, signal.SIGKILL)

    def start_controller(self, seconds: float = 20) -> None:
        """Start a controller that was killed, from its saved state. Raises: TimeoutError if it does not answer."""
        self._start_inside("slurmctld", "-D")
        deadline = time.monotonic() + seconds
        while not self._answers():
            if time.monotonic() > deadline:
                raise TimeoutError("the controller does not come back")
            time.sleep(0.05)

    def _start_inside(self, *words: str) -> None:
        """Start a daemon in the cluster's namespaces, whose end is its end too."""
        assert self._init is not None
        (first,) = Path(f"/proc/{self._init.pid}/task/{self._init.pid}/children").read_text().split()
        self._started_again.append(self._start("nsenter", "--target", first, "--pid", "--mount", *words))

    def _start(self, *words: str) -> "subprocess.Popen[bytes]":
        return subprocess.Popen(
            words,
            cwd=self.folder,
            env=self.env,
            stdin=subprocess.PIPE,  # the cluster's first process ends when it is closed
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            preexec_fn=_die_with_parent,  # noqa: PLW1509  (one prctl; a killed pytest must leave nothing either)
        )

    def _daemons(self, program: str, argument: str = "") -> list[int]:
        """Return the cluster's processes of a program, with an argument."""
        mark, found = f"SLURM_CONF={self.env['SLURM_CONF']}", []
        for process in all_processes():
            words = words_of(process)
            if words and words[0].endswith(program) and argument in ("", *words[1:]) and mark in variables_of(process):
                found.append(process)
        return found

    def idle_nodes(self) -> int:
        """Return how many nodes are free."""
        return int(self.command("sinfo", "-h", "-t", "idle", "-o", "%D", check=False) or 0)

    def clear(self, seconds: float = 15) -> None:
        """Cancel all jobs and wait until every node is free again."""
        self.command("scancel", "--quiet", "--user=root", check=False)
        deadline = time.monotonic() + seconds
        while self.idle_nodes() < self.nodes:
            if time.monotonic() > deadline:
                raise TimeoutError(f"nodes do not come free:\n{self.command('squeue')}\n{self.command('sinfo')}")
            time.sleep(0.1)

    def _write_files(self) -> None:
        self.folder.chmod(0o755)  # munged refuses a socket below a closed folder
        for name in ("state", "log"):
            (self.folder / name).mkdir()
        self._port = _free_ports(self.nodes + 1)
        conf = _SLURM_CONF.format(
            folder=self.folder,
            nodes=self.nodes,
            controller_port=self._port,
            first_port=self._port + 1,
            last_port=self._port + self.nodes,
            last_address=10 + self.nodes,
            credential_seconds=CREDENTIAL_SECONDS,
            first_job=(self._port - _FIRST_PORT) * 10 + 1,  # jobs of two clusters must not meet at the same port
        )
        hosts = [f"127.0.0.1 localhost {socket.gethostname()}"]
        hosts += [f"127.0.0.{10 + node} node{node}" for node in range(1, self.nodes + 1)]
        (self.folder / "slurm.conf").write_text(conf)
        (self.folder / "init.sh").write_text(_INIT)
        (self.folder / "hosts").write_text("\n".join(hosts) + "\n")
        databases = ("passwd", "group", "shadow", "hosts")
        (self.folder / "nsswitch.conf").write_text("".join(f"{name}: files\n" for name in databases))
        key = self.folder / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(128))

    def _answers(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self._port)) == 0


def _free_ports(count: int) -> int:
    """Return the first of `count` free ports in a row; two clusters that start together look in different places."""
    places = range(_FIRST_PORT, _LAST_PORT, 16)
    for attempt in range(len(places)):
        first = places[(os.getpid() + attempt) % len(places)]
        try:
            for port in range(first, first + count):
                with socket.socket() as probe:
                    probe.bind(("0.0.0.0", port))
        except OSError:
            continue
        return first
    raise RuntimeError("no free ports for a cluster")


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
