"""Where this process stands in its world, read from what its launcher exported.

``init_rpc`` works unchanged under ``distgrad run``, torchrun, Open MPI's and MPICH's
mpirun and Slurm's srun. `detect` is a pure function of a mapping; the first launcher of
`LAUNCHERS` that recognises the mapping wins, and arguments of ``init_rpc`` beat them all.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

__all__ = ["Environment", "detect"]

#: Rendezvous port where the launcher names neither a port nor a job to derive one from.
DEFAULT_PORT = 29460


@dataclass(frozen=True, slots=True)
class Environment:
    """What a launcher says about this process; None where it says nothing.

    ``job`` is a text that all workers of the world share and other worlds do not; it is
    empty where the launcher has no such thing.
    """

    launcher: str = ""
    rank: int | None = None
    world_size: int | None = None
    local_rank: int | None = None
    local_world_size: int | None = None
    master_addr: str | None = None
    master_port: int | None = None
    name: str | None = None
    job: str = ""

    @property
    def single_host(self) -> bool:
        """Return whether the launcher says that the whole world runs on this host."""
        return self.world_size is not None and self.world_size == self.local_world_size


def detect(environ: Mapping[str, str]) -> Environment:
    """Read rank, world size and meeting point from the variables of a launcher.

    Parameters
    ----------
    environ
        Usually ``os.environ``. It is only read.

    Returns
    -------
    Environment
        All fields None when no launcher is recognised. ``MASTER_ADDR`` and
        ``MASTER_PORT`` are honoured under every launcher.

    Raises
    ------
    ValueError
        If a variable that must be an integer is not one; the message names it.
    """
    found = next((env for launcher in LAUNCHERS if (env := launcher(environ))), Environment())
    return replace(
        found,
        name=environ.get("DISTGRAD_NAME") or None,
        master_addr=environ.get("MASTER_ADDR") or found.master_addr or _own_host(found),
        master_port=found.master_port or _integer(environ, "MASTER_PORT") or _port(found),
    )


def _env(environ: Mapping[str, str]) -> Environment | None:
    """``RANK`` and ``WORLD_SIZE``: distgrad run, torchrun, and worlds started by hand."""
    if not environ.get("RANK") and not environ.get("WORLD_SIZE"):
        return None
    elastic = environ.get("TORCHELASTIC_RUN_ID")
    port = _integer(environ, "MASTER_PORT")
    if elastic is not None and port is not None:
        # torchrun's agent keeps a store of its own on MASTER_PORT.
        port += 1 if port < 65535 else -1
    return Environment(
        launcher="env" if elastic is None else "torchrun",
        rank=_integer(environ, "RANK"),
        world_size=_integer(environ, "WORLD_SIZE"),
        local_rank=_integer(environ, "LOCAL_RANK"),
        local_world_size=_integer(environ, "LOCAL_WORLD_SIZE"),
        master_port=port,
        job=elastic or "",
    )


def _open_mpi(environ: Mapping[str, str]) -> Environment | None:
    if not environ.get("OMPI_COMM_WORLD_RANK"):
        return None
    return Environment(
        launcher="openmpi",
        rank=_integer(environ, "OMPI_COMM_WORLD_RANK"),
        world_size=_integer(environ, "OMPI_COMM_WORLD_SIZE"),
        local_rank=_integer(environ, "OMPI_COMM_WORLD_LOCAL_RANK"),
        local_world_size=_integer(environ, "OMPI_COMM_WORLD_LOCAL_SIZE"),
        job=environ.get("PMIX_NAMESPACE") or environ.get("OMPI_MCA_ess_base_jobid", ""),
    )


def _hydra(environ: Mapping[str, str]) -> Environment | None:
    """MPICH and Intel MPI."""
    if not environ.get("PMI_RANK"):
        return None
    if environ.get("SLURM_STEP_ID") and not environ.get("MPI_LOCALRANKID"):
        return None  # srun speaks PMI as well, and says more in its own variables
    return Environment(
        launcher="mpich",
        rank=_integer(environ, "PMI_RANK"),
        world_size=_integer(environ, "PMI_SIZE"),
        local_rank=_integer(environ, "MPI_LOCALRANKID"),
        local_world_size=_integer(environ, "MPI_LOCALNRANKS"),
    )


def _slurm(environ: Mapping[str, str]) -> Environment | None:
    """``srun``. A batch script or an interactive shell is inside a job, but in no step."""
    interactive = environ.get("SLURM_JOB_NAME") in ("bash", "interactive")
    if interactive or not environ.get("SLURM_STEP_ID") or not environ.get("SLURM_PROCID"):
        return None
    nodes = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST", "")
    size = _integer(environ, "SLURM_STEP_NUM_TASKS")
    return Environment(
        launcher="slurm",
        rank=_integer(environ, "SLURM_PROCID"),
        world_size=_integer(environ, "SLURM_NTASKS") if size is None else size,
        local_rank=_integer(environ, "SLURM_LOCALID"),
        master_addr=_first_host(nodes),
        job=f"{environ.get('SLURM_JOB_ID', '')}.{environ['SLURM_STEP_ID']}",
    )


#: In the order in which they are asked: a launcher that starts another comes later.
LAUNCHERS: tuple[Callable[[Mapping[str, str]], Environment | None], ...] = (
    _env,
    _open_mpi,
    _hydra,
    _slurm,
)


def _integer(environ: Mapping[str, str], variable: str) -> int | None:
    text = environ.get(variable)
    if not text:
        return None
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"cannot read {variable}={text!r}: expected an integer") from None


def _own_host(found: Environment) -> str | None:
    return "127.0.0.1" if found.single_host else None


def _port(found: Environment) -> int | None:
    """Return a port that follows from the job, below the range the kernel hands out."""
    if found.launcher in ("", "env"):
        return None
    return 20000 + zlib.crc32(found.job.encode()) % 10000 if found.job else DEFAULT_PORT


def _first_host(nodes: str) -> str | None:
    """Return the first host of a Slurm list: ``gpu[003-007,9],login1`` gives ``gpu003``."""
    match = re.match(r"([^\[,]+)(?:\[([^\],-]+)[^\]]*\])?([^\[,]*)", nodes)
    if match is None:
        return None
    prefix, number, suffix = match.groups()
    return prefix + (number or "") + suffix
