"""Launch detection: what each launcher sets decides the rank, and a half-set launch is refused."""

import os
import secrets
import socket
import stat
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from raptr_ds.errors import ConfigError
from raptr_ds.parallel.launch import Launch, detect_launch, environment_of_run, free_port, prepare_imports

_READ_OR_SET = (
    *("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID"),
    *("OMPI_COMM_WORLD_RANK", "PMI_SIZE", "PMI_RANK", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS", "SLURM_JOB_ID"),
    *("TORCHELASTIC_USE_AGENT_STORE", "TORCHELASTIC_RESTART_COUNT", "DS_ACCELERATOR", "LOCAL_SIZE"),
    *("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF"),
    *(
        "SLURM_STEP_NODELIST",
        "SLURM_JOB_NODELIST",
        "SLURM_RESTART_COUNT",
        "RAPTR_SIGNAL_LEAD",
        "RAPTR_SUPERVISOR",
        "RAPTR_RESTART_COUNT",
        "TORCHINDUCTOR_CACHE_DIR",
    ),
)


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget what started pytest; monkeypatch puts back what detect_launch itself sets, too."""
    for name in _READ_OR_SET:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


def launch(monkeypatch: pytest.MonkeyPatch, **environment: str) -> Launch:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    return detect_launch()


def test_a_lone_process_is_a_run_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    found = launch(monkeypatch)
    assert (found.rank, found.local_rank, found.world_size, found.launcher) == (0, 0, 1, "none")
    assert found.master_addr == "127.0.0.1"
    assert found.master_port > 0


def test_deepspeed(monkeypatch: pytest.MonkeyPatch) -> None:
    found = launch(monkeypatch, RANK="5", LOCAL_RANK="1", WORLD_SIZE="8", MASTER_ADDR="node1", MASTER_PORT="29501")
    assert found == Launch(5, 1, 8, "node1", 29501, "deepspeed")


def test_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    found = launch(
        monkeypatch, RANK="0", LOCAL_RANK="0", WORLD_SIZE="2", MASTER_ADDR="h", MASTER_PORT="1", TORCHELASTIC_RUN_ID="x"
    )
    assert (found.launcher, found.begun_by) == ("torchrun", "x")
    # torchrun's own name for runs without one: its agent is the parent of every try.
    assert launch(monkeypatch, TORCHELASTIC_RUN_ID="none").begun_by == f"{socket.gethostname()}:{os.getppid()}"
    assert launch(monkeypatch, RAPTR_SUPERVISOR="host:7").begun_by == "host:7"
    assert launch(monkeypatch, SLURM_JOB_ID="5").begun_by == "5"


def test_ranks_without_an_address_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="MASTER_ADDR"):
        launch(monkeypatch, RANK="0", WORLD_SIZE="2")
    assert launch(monkeypatch, RANK="0", WORLD_SIZE="1").master_addr == "127.0.0.1"


def test_srun(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    scontrol = tmp_path / "scontrol"
    scontrol.write_text('#!/bin/sh\n[ "$3" = "node[7-8]" ] && printf "node7\\nnode8\\n"\n')
    scontrol.chmod(scontrol.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    slurm = {"SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_NTASKS": "4", "SLURM_STEP_NODELIST": "node[7-8]"}
    found = launch(monkeypatch, **slurm, SLURM_JOB_ID="20123", SLURM_RESTART_COUNT="2")
    assert (found.rank, found.local_rank, found.world_size, found.launcher) == (3, 1, 4, "srun")
    assert (found.master_addr, found.restart_count, found.slurm_restarts, found.begun_by) == ("node7", 2, 2, "20123")
    assert found.master_port == 29500 - 1 - 123  # another for each job, the same for all its tasks


@pytest.mark.parametrize(("job", "port"), [("20000", 29499), ("29999", 19500)])
def test_srun_meets_below_the_ports_of_outgoing_connections(
    job: str, port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    slurm = {"SLURM_PROCID": "0", "SLURM_NTASKS": "2", "MASTER_ADDR": "node1", "SLURM_STEP_NODELIST": "node[1-2]"}
    assert launch(monkeypatch, **slurm, SLURM_JOB_ID=job).master_port == port < 32768


def test_srun_with_an_address_asks_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    slurm = {"SLURM_PROCID": "0", "SLURM_NTASKS": "2", "MASTER_ADDR": "node1", "MASTER_PORT": "4000"}
    assert launch(monkeypatch, **slurm, SLURM_STEP_NODELIST="node[1-2]") == Launch(0, 0, 2, "node1", 4000, "srun")


def test_srun_without_scontrol_says_what_to_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match="Set MASTER_ADDR"):
        launch(monkeypatch, SLURM_PROCID="0", SLURM_NTASKS="2", SLURM_STEP_NODELIST="node1")


def test_a_batch_script_that_forgets_srun_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """It counts as task 0, and the others would never come (tests/slurm/test_pretrain.py has the real one)."""
    slurm = {"SLURM_PROCID": "0", "SLURM_NTASKS": "2", "SLURM_JOB_NODELIST": "node[1-2]", "MASTER_ADDR": "node1"}
    with pytest.raises(ConfigError, match=r"the Slurm job has 2 tasks, and this process is none of them.*Put srun"):
        launch(monkeypatch, **slurm)
    monkeypatch.setenv("SLURM_PROCID", "0")
    assert "SLURM_PROCID" not in environment_of_run()
    assert environment_of_run()["SLURM_NTASKS"] == "2"


@pytest.mark.parametrize(
    ("address", "local_size", "wanted"),
    [("127.0.1.1", 4, "127.0.1.1"), ("127.0.1.1", 2, "node7"), ("10.0.0.7", 2, "10.0.0.7")],
)
def test_mpirun_on_several_machines_meets_at_no_loopback(
    monkeypatch: pytest.MonkeyPatch, address: str, local_size: int, wanted: str
) -> None:
    world = SimpleNamespace(rank=0, size=4, bcast=lambda value, root: value)
    world.Split_type = lambda kind: SimpleNamespace(rank=0, size=local_size)
    mpi = SimpleNamespace(COMM_WORLD=world, COMM_TYPE_SHARED=1, Finalize=lambda: None)
    monkeypatch.setitem(sys.modules, "mpi4py", SimpleNamespace(MPI=mpi))
    monkeypatch.setattr(socket, "gethostname", lambda: "node7")
    monkeypatch.setattr(socket, "gethostbyname", lambda name: address)
    assert launch(monkeypatch, OMPI_COMM_WORLD_RANK="0").master_addr == wanted


@pytest.mark.parametrize("by_pmi", [{}, {"PMI_SIZE": "1", "PMI_RANK": "0"}], ids=["plain", "pmi"])
def test_a_single_task_in_an_allocation_is_a_run_of_one(
    monkeypatch: pytest.MonkeyPatch, by_pmi: dict[str, str]
) -> None:
    """by_pmi: what srun sets besides where that is a site's default."""
    assert launch(monkeypatch, SLURM_PROCID="0", SLURM_NTASKS="1", **by_pmi).launcher == "none"


def test_ranks_of_deepspeed_win_inside_an_allocation(monkeypatch: pytest.MonkeyPatch) -> None:
    slurm = {"SLURM_PROCID": "0", "SLURM_NTASKS": "2"}
    found = launch(monkeypatch, **slurm, RANK="1", WORLD_SIZE="2", MASTER_ADDR="node1")
    assert (found.launcher, found.rank) == ("deepspeed", 1)


def test_deepspeed_finds_the_variables_that_it_reads_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    slurm = {"SLURM_PROCID": "1", "SLURM_LOCALID": "0", "SLURM_NTASKS": "2", "SLURM_STEP_NODELIST": "n"}
    launch(monkeypatch, **slurm, MASTER_ADDR="n", MASTER_PORT="5")
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    assert [os.environ[name] for name in names] == ["1", "0", "2", "n", "5"]


def test_torchruns_agent_keeps_the_store(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "h", "MASTER_PORT": "1"}
    agent = {"TORCHELASTIC_RUN_ID": "x", "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "3"}
    assert launch(monkeypatch, **ranks, **agent).store_attempt == 3
    assert launch(monkeypatch, TORCHELASTIC_USE_AGENT_STORE="False").store_attempt is None


def test_memory_of_a_gpu_is_kept_in_segments_that_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    prepare_imports(has_gpu=False)
    assert "PYTORCH_ALLOC_CONF" not in os.environ
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:512")
    prepare_imports(has_gpu=True)
    assert "PYTORCH_ALLOC_CONF" not in os.environ, "the user's own settings go first"
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF")
    prepare_imports(has_gpu=True)
    assert os.environ["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"


def test_deepspeed_does_not_count_numa_nodes_unless_its_launcher_counts_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    prepare_imports(has_gpu=True)
    assert "LOCAL_SIZE" not in os.environ
    prepare_imports(has_gpu=False)
    assert os.environ["LOCAL_SIZE"] == "1"
    monkeypatch.setenv("LOCAL_SIZE", "4")
    prepare_imports(has_gpu=False)
    assert os.environ["LOCAL_SIZE"] == "4"


def test_the_signals_lead_reaches_the_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    assert launch(monkeypatch).signal_lead is None
    assert launch(monkeypatch, RAPTR_SIGNAL_LEAD="").signal_lead is None
    assert launch(monkeypatch, RAPTR_SIGNAL_LEAD="600").signal_lead == 600
    for text in ("soon", "-1", "1.5", "nan", "B:USR1@120"):
        with pytest.raises(ConfigError, match="RAPTR_SIGNAL_LEAD"):
            launch(monkeypatch, RAPTR_SIGNAL_LEAD=text)


def test_compiled_code_lies_where_no_other_user_writes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    usual = tmp_path / f"torchinductor_raptr_{os.getuid()}"

    def chosen() -> Path:
        monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
        prepare_imports(has_gpu=False)
        return Path(os.environ["TORCHINDUCTOR_CACHE_DIR"])

    assert (chosen(), chosen()) == (usual, usual)
    assert stat.S_IMODE(usual.stat().st_mode) == 0o700
    usual.chmod(0o777)
    other = chosen()
    assert (other != usual, stat.S_IMODE(other.stat().st_mode)) == (True, 0o700)
    usual.rmdir()
    usual.symlink_to(other)  # whose folder it leads to may change
    assert chosen() not in (usual, other)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "mine")
    prepare_imports(has_gpu=False)
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "mine"


def test_a_free_port_is_not_one_that_the_kernel_gives_to_connections():
    first_given = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    assert first_given > 10_000
    assert all(10_000 <= free_port() < first_given for _ in range(50))


def test_a_port_that_is_taken_is_passed_over(monkeypatch):
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        ports = [taken.getsockname()[1], free_port()]
        monkeypatch.setattr(secrets.SystemRandom, "sample", lambda self, population, k: ports)
        assert free_port() == ports[1]
        ports.pop()
        assert free_port() not in ports
