"""Rank, world size and meeting point from the variables of each launcher."""

import pytest

from distgrad.rpc.environment import Environment, detect

TORCHRUN = {
    "RANK": "3",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "head",
    "MASTER_PORT": "29500",
    "TORCHELASTIC_RUN_ID": "none",
}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
    "PMIX_NAMESPACE": "prterun-host-123@1",
}
HYDRA = {"PMI_RANK": "0", "PMI_SIZE": "2", "MPI_LOCALRANKID": "0", "MPI_LOCALNRANKS": "2"}
SLURM = {
    "SLURM_PROCID": "5",
    "SLURM_NTASKS": "16",
    "SLURM_LOCALID": "1",
    "SLURM_JOB_ID": "4242",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NODELIST": "gpu[003-007,9],login1",
}


def test_detect_nothing_exported_says_nothing() -> None:
    assert detect({"PATH": "/bin"}) == Environment()


def test_detect_master_without_rank_is_kept_for_explicit_ranks() -> None:
    found = detect({"MASTER_ADDR": "head", "MASTER_PORT": "1234"})
    assert (found.rank, found.master_addr, found.master_port) == (None, "head", 1234)


def test_detect_own_launcher_reads_name_and_port() -> None:
    environ = {k: v for k, v in TORCHRUN.items() if k != "TORCHELASTIC_RUN_ID"}
    found = detect(environ | {"DISTGRAD_NAME": "ps0"})
    assert found == Environment("env", 3, 8, 1, 2, "head", 29500, "ps0")


@pytest.mark.parametrize(("theirs", "ours"), [(29500, 29501), (65535, 65534)])
def test_detect_torchrun_leaves_the_port_of_its_store_alone(theirs: int, ours: int) -> None:
    found = detect(TORCHRUN | {"MASTER_PORT": str(theirs)})
    assert (found.launcher, found.master_port) == ("torchrun", ours)


def test_detect_world_size_alone_leaves_rank_open() -> None:
    found = detect({"WORLD_SIZE": "2"})
    assert (found.rank, found.world_size) == (None, 2)


def test_detect_open_mpi_on_one_host_meets_on_loopback() -> None:
    found = detect(OPEN_MPI)
    assert (found.launcher, found.rank, found.world_size) == ("openmpi", 1, 4)
    assert found.single_host
    assert found.master_addr == "127.0.0.1"


def test_detect_open_mpi_on_several_hosts_invents_no_address() -> None:
    assert detect(OPEN_MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "2"}).master_addr is None


def test_detect_ranks_of_one_job_derive_one_port_and_jobs_differ() -> None:
    port = detect(OPEN_MPI).master_port
    assert port == detect(OPEN_MPI | {"OMPI_COMM_WORLD_RANK": "2"}).master_port
    assert port != detect(OPEN_MPI | {"PMIX_NAMESPACE": "prterun-host-124@1"}).master_port


def test_detect_mpich_reads_the_variables_of_hydra() -> None:
    found = detect(HYDRA)
    assert (found.launcher, found.rank, found.world_size, found.local_rank) == ("mpich", 0, 2, 0)


def test_detect_slurm_meets_on_the_first_node() -> None:
    found = detect(SLURM)
    assert (found.launcher, found.rank, found.world_size) == ("slurm", 5, 16)
    assert found.master_addr == "gpu003"
    assert 20000 <= (found.master_port or 0) < 30000


def test_detect_srun_with_pmi_is_slurm() -> None:
    assert detect(SLURM | {"PMI_RANK": "5", "PMI_SIZE": "16"}).launcher == "slurm"


@pytest.mark.parametrize("starter", [OPEN_MPI, HYDRA, TORCHRUN])
def test_detect_launcher_inside_a_slurm_step_beats_slurm(starter: dict[str, str]) -> None:
    assert detect(SLURM | starter) == detect(starter)


@pytest.mark.parametrize(
    "change", [{"SLURM_STEP_ID": ""}, {"SLURM_JOB_NAME": "bash"}, {"SLURM_PROCID": ""}]
)
def test_detect_slurm_shell_without_step_is_not_a_world(change: dict[str, str]) -> None:
    assert detect(SLURM | change) == Environment()


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node1", "node1"),
        ("a,b", "a"),
        ("n[1,3-5]", "n1"),
        ("n[08-11]-ib,m", "n08-ib"),
        ("", None),
    ],
)
def test_detect_slurm_node_list_first_host(nodes: str, first: str | None) -> None:
    assert detect(SLURM | {"SLURM_STEP_NODELIST": nodes}).master_addr == first


@pytest.mark.parametrize("environ", [TORCHRUN, OPEN_MPI, HYDRA, SLURM])
def test_detect_exported_master_address_wins(environ: dict[str, str]) -> None:
    assert detect(environ | {"MASTER_ADDR": "chosen"}).master_addr == "chosen"


def test_detect_rank_that_is_no_number_names_the_variable() -> None:
    with pytest.raises(ValueError, match="cannot read RANK='two': expected an integer"):
        detect({"RANK": "two"})
