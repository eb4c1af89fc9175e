"""``distgrad run``: names, environment, output, failures, and nothing left behind."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from distgrad.launch.local import worker_environment, worker_names

RUN = [sys.executable, "-m", "distgrad", "run"]
WAIT_S = 30.0
Launch = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Launch]:
    """Start ``distgrad run <options> script <args>``, where the script is given as text."""
    started: list[subprocess.Popen[str]] = []

    def start(options: str, text: str, *args: str) -> subprocess.Popen[str]:
        script = tmp_path / "script.py"
        script.write_text("import os, signal, subprocess, sys\nrank = os.environ['RANK']\n" + text)
        process = subprocess.Popen(
            [*RUN, *options.split(), str(script), *args],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def finish(process: subprocess.Popen[str]) -> tuple[int, list[str], list[str]]:
    """Return the exit code and the lines of stdout, sorted, and of stderr."""
    out, err = process.communicate(timeout=WAIT_S)
    return process.returncode, sorted(out.splitlines()), err.splitlines()


def first_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout
    return process.stdout.readline().strip()


def has_ended(pid: int) -> bool:
    """Wait for a process that is not our child."""
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([handle], [], [], WAIT_S)[0])
    finally:
        os.close(handle)


@pytest.mark.parametrize(
    ("count", "roles", "names"),
    [
        (2, [], ["worker0", "worker1"]),
        (None, ["ps:2", "trainer:1"], ["ps0", "ps1", "trainer0"]),
        (None, ["master", "actor:2"], ["master", "actor0", "actor1"]),
    ],
)
def test_worker_names_follow_count_or_roles(
    count: int | None, roles: list[str], names: list[str]
) -> None:
    assert worker_names(count, roles) == names


@pytest.mark.parametrize("roles", [["ps:x"], ["ps:0"], [":2"], [""], ["a", "a"], ["a0", "a:1"]])
def test_worker_names_bad_roles_are_refused(roles: list[str]) -> None:
    with pytest.raises(ValueError, match=r"cannot (read role|name the workers)"):
        worker_names(None, roles)


def test_worker_environment_keeps_what_the_user_chose() -> None:
    environ = worker_environment({"OMP_NUM_THREADS": "3", "RANK": "9"}, 1, ["a", "b"], 1234)
    assert environ["OMP_NUM_THREADS"] == "3"
    assert environ["OPENBLAS_NUM_THREADS"] == "1"
    assert (environ["RANK"], environ["WORLD_SIZE"], environ["DISTGRAD_NAME"]) == ("1", "2", "b")


def test_worker_environment_single_worker_may_use_all_cores() -> None:
    assert "OMP_NUM_THREADS" not in worker_environment({}, 0, ["a"], 1234)


def test_run_two_workers_prefixes_each_line(launch: Launch) -> None:
    process = launch("-n 2", "print(sys.argv[1:])\nsys.stderr.write('no newline')", "--lr", "0.1")
    code, out, err = finish(process)
    assert code == 0
    assert out == ["[worker0] ['--lr', '0.1']", "[worker1] ['--lr', '0.1']"]
    assert sorted(err) == ["[worker0] no newline", "[worker1] no newline"]


def test_run_roles_name_the_workers(launch: Launch) -> None:
    code, out, _ = finish(launch("--role ps --role tr:2", "print(os.environ['DISTGRAD_NAME'])"))
    assert (code, out) == (0, ["[ps] ps", "[tr0] tr0", "[tr1] tr1"])


def test_run_world_shares_one_secret_and_worlds_do_not(launch: Launch) -> None:
    text = "print(os.environ['DISTGRAD_SECRET'])"
    worlds = [{line.split()[1] for line in finish(launch("-n 2", text))[1]} for _ in range(2)]
    assert [len(world) for world in worlds] == [1, 1]
    assert worlds[0] != worlds[1]


def test_run_reserved_port_can_be_served_by_rank_0(launch: Launch) -> None:
    text = (
        "import socket\naddress = os.environ['MASTER_ADDR'], int(os.environ['MASTER_PORT'])\n"
        "server = socket.create_server(address)\n"
        "socket.create_connection(address)\nprint('met')"
    )
    assert finish(launch("-n 1", text))[:2] == (0, ["[worker0] met"])


def test_run_long_output_arrives_whole(launch: Launch) -> None:
    code, out, _ = finish(launch("-n 2", "for _ in range(300): print('x' * 1000)"))
    assert code == 0
    assert len(out) == 600
    assert {len(line.split()[1]) for line in out} == {1000}


def test_run_failure_ends_the_others_and_is_shown_last(launch: Launch) -> None:
    text = "sys.exit('lost the data') if rank == '1' else signal.pause()"
    code, _, err = finish(launch("-n 3", text))
    assert code == 1
    assert err[-2:] == [
        "distgrad run: worker1 failed first: exit code 1",
        "    lost the data",
    ]


def test_run_failure_that_caused_an_earlier_end_is_shown(launch: Launch, tmp_path: Path) -> None:
    text = (
        "import atexit\nfifo = sys.argv[1]\n"
        "if rank == '0':\n"
        "    open(fifo).read()\n"
        "    sys.exit(3)\n"
        "def leave():\n"
        "    open(fifo, 'w').close()\n"  # worker0 ends now, this one much later
        "    signal.pause()\n"
        "atexit.register(leave)\n"
        "raise ValueError('the cause')"
    )
    os.mkfifo(tmp_path / "fifo")
    code, _, err = finish(launch("-n 2", text, str(tmp_path / "fifo")))
    assert code == 3
    assert "distgrad run: worker1 failed first: worker0 after it: exit code 3" in err
    assert err[-1] == "    ValueError: the cause"


@pytest.mark.parametrize(
    ("text", "code", "outcome"),
    [
        ("os._exit(7)", 7, "exit code 7"),
        ("os.kill(os.getpid(), signal.SIGKILL)", 137, "killed by SIGKILL"),
    ],
)
def test_run_exit_code_is_that_of_the_failure(
    launch: Launch, text: str, code: int, outcome: str
) -> None:
    result, _, err = finish(launch("-n 1", text))
    assert (result, err[-1]) == (code, f"distgrad run: worker0 failed first: {outcome}")


def test_run_worker_that_ignores_the_request_is_killed(launch: Launch, tmp_path: Path) -> None:
    text = (
        "if rank == '0':\n"
        "    signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "    open(sys.argv[1], 'w').close()\n"
        "    while True: signal.pause()\n"
        "open(sys.argv[1]).read()\n"  # until worker0 is deaf
        "sys.exit(3)"
    )
    os.mkfifo(tmp_path / "fifo")
    assert finish(launch("-n 2 --grace 0.2", text, str(tmp_path / "fifo")))[0] == 3


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_run_interrupt_ends_all_workers(launch: Launch, number: int, code: int) -> None:
    process = launch("-n 1", "print(os.getpid())\nsignal.pause()")
    pid = int(first_line(process).split()[1])
    process.send_signal(number)
    assert finish(process)[0] == code
    assert has_ended(pid)


def test_run_second_interrupt_does_not_wait_for_the_grace_time(launch: Launch) -> None:
    text = "signal.signal(signal.SIGINT, lambda *_: print('asked'))\nprint('up')\n"
    process = launch("-n 1 --grace 1000", text + "while True: signal.pause()")
    first_line(process)
    process.send_signal(signal.SIGINT)
    assert first_line(process) == "[worker0] asked"
    process.send_signal(signal.SIGINT)
    assert finish(process)[0] == 130


def test_run_killed_launcher_takes_its_workers_along(launch: Launch) -> None:
    process = launch("-n 1", "print(os.getpid())\nsignal.pause()")
    pid = int(first_line(process).split()[1])
    process.kill()
    assert has_ended(pid)


def test_run_killed_launcher_takes_what_its_workers_started_along(launch: Launch) -> None:
    text = "print(subprocess.Popen(['sleep', '1000']).pid)\nsignal.pause()"
    process = launch("-n 1", text)
    pid = int(first_line(process).split()[1])
    process.kill()
    assert has_ended(pid)


def test_run_what_a_worker_leaves_behind_is_killed(launch: Launch) -> None:
    text = "print(subprocess.Popen(['sleep', '1000']).pid)"
    code, out, _ = finish(launch("-n 1", text))
    assert code == 0
    assert has_ended(int(out[0].split()[1]))


def test_run_reader_that_goes_away_ends_the_world(launch: Launch) -> None:
    process = launch("-n 1", "print(os.getpid())\nwhile True: print('more')")
    pid = int(first_line(process).split()[1])
    assert process.stdout
    process.stdout.close()
    assert process.wait(WAIT_S) == 141
    assert has_ended(pid)


def test_run_module_runs_like_python_m() -> None:
    command = [*RUN, "-n", "1", "-m", "platform", "--terse"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=WAIT_S)
    assert done.returncode == 0
    assert done.stdout.startswith("[worker0] Linux")


def test_run_missing_script_is_an_error_of_the_command() -> None:
    command = [*RUN, "-n", "1", "absent.py"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=WAIT_S)
    assert done.returncode == 2
    assert done.stderr == "distgrad run: cannot run 'absent.py': there is no such file\n"
