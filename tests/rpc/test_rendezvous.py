"""Meeting: places, stores, names, secrets."""

import os
import socket
import subprocess
import sys
import threading
import time

import pytest

from distgrad import rpc
from distgrad.config import config
from distgrad.errors import AuthenticationError, RpcTimeoutError, WorkerLostError
from distgrad.rpc.options import RpcBackendOptions
from distgrad.rpc.rendezvous import find_place, meet
from distgrad.rpc.store import FileStore, MemoryStore
from distgrad.testing import World


def test_find_place_reads_the_environment():
    environ = {"RANK": "1", "WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29999"}
    place = find_place("env://", -1, None, environ)
    assert (place.rank, place.world_size, place.target) == (1, 3, ("127.0.0.1", 29999))


def test_find_place_arguments_beat_the_environment():
    environ = {"RANK": "1", "WORLD_SIZE": "3", "MASTER_ADDR": "h", "MASTER_PORT": "1"}
    place = find_place("tcp://127.0.0.1:5?world_size=4", 2, None, environ)
    assert (place.rank, place.world_size, place.target) == (2, 4, ("127.0.0.1", 5))


@pytest.mark.parametrize(
    ("method", "rank", "size", "environ", "text"),
    [
        ("env://", 0, 2, {}, "MASTER_ADDR"),
        ("env://", -1, None, {"MASTER_ADDR": "h", "MASTER_PORT": "1"}, "WORLD_SIZE"),
        ("tcp://h:1", -1, 2, {}, "rank"),
        ("tcp://h:1", 2, 2, {}, "rank 2"),
        ("tcp://h", 0, 2, {}, "expected env://"),
        ("ftp://h:1", 0, 2, {}, "expected env://"),
    ],
)
def test_find_place_what_is_missing_is_named(method, rank, size, environ, text):
    with pytest.raises(ValueError, match=text):
        find_place(method, rank, size, environ)


@pytest.mark.parametrize("kind", ["memory", "file"])
def test_store_gathers_what_others_publish(kind, tmp_path):
    store = MemoryStore() if kind == "memory" else FileStore(tmp_path / "s")
    until = time.monotonic() + 10
    thread = threading.Thread(target=lambda: store.set("w/1", [1, "b"]))
    store.set("w/0", [0, "a"])
    store.set("other", 1)
    thread.start()
    assert store.gather("w/", 2, until) == {"w/0": [0, "a"], "w/1": [1, "b"]}
    thread.join()
    with pytest.raises(ValueError, match="w/0"):
        store.set("w/0", [2])
    with pytest.raises(RpcTimeoutError, match="2 of 3"):
        store.gather("w/", 3, time.monotonic() + 0.05)


@pytest.mark.parametrize("kind", ["memory", "file"])
def test_store_failure_ends_all_who_wait_but_nobody_who_has_enough(kind, tmp_path):
    store = MemoryStore() if kind == "memory" else FileStore(tmp_path / "s")
    until = time.monotonic() + 10
    store.set("w/0", 0)
    thread = threading.Thread(target=store.fail, args=("the second one ended",))
    thread.start()
    with pytest.raises(WorkerLostError, match="the second one ended"):
        store.gather("w/", 2, until)
    thread.join()
    store.fail("another reason")
    assert store.gather("w/", 1, until) == {"w/0": 0}


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def join_all(size, options_of, names=None):
    """Start workers on threads of this process; return workers and failures by rank."""
    workers, failures = {}, {}

    def body(rank):
        try:
            name = names[rank] if names else f"w{rank}"
            workers[rank] = rpc.init_rpc(name, None, rank, size, options_of(rank))
        except Exception as error:
            failures[rank] = error

    threads = [threading.Thread(target=body, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return workers, failures


def close_all(workers):
    from distgrad.rpc.lifecycle import leave

    for worker in workers.values():
        leave(worker, graceful=False)


@pytest.mark.parametrize("secret", [None, "a secret"])
def test_init_rpc_over_tcp_address(secret, monkeypatch):
    port = free_port()
    workers, failures = join_all(
        3, lambda _: RpcBackendOptions(init_method=f"tcp://127.0.0.1:{port}", secret=secret)
    )
    try:
        assert not failures
        assert [info.name for info in workers[0].infos] == ["w0", "w1", "w2"]
    finally:
        close_all(workers)


def test_init_rpc_wrong_secret_is_refused(monkeypatch):
    monkeypatch.setattr("distgrad.config.config.rendezvous_timeout", 1.0)
    port = free_port()
    workers, failures = join_all(
        2,
        lambda rank: RpcBackendOptions(init_method=f"tcp://127.0.0.1:{port}", secret=f"s{rank}"),
    )
    close_all(workers)
    assert isinstance(failures[1], AuthenticationError)
    assert isinstance(failures[0], RpcTimeoutError)


def test_init_rpc_equal_names_are_refused():
    store = MemoryStore()
    workers, failures = join_all(
        2, lambda _: RpcBackendOptions(init_method=store), names=["same", "same"]
    )
    close_all(workers)
    assert all("all named 'same'" in str(error) for error in failures.values())
    assert len(failures) == 2


@pytest.mark.parametrize("method", ["memory", "file", "tcp"])
def test_init_rpc_that_fails_on_one_worker_fails_on_all_at_once(method, tmp_path):
    meeting = {
        "memory": MemoryStore(),
        "file": f"file://{tmp_path}/store",
        "tcp": f"tcp://127.0.0.1:{free_port()}",
    }[method]

    def options_of(rank):
        return RpcBackendOptions(init_method=meeting, secret="s")

    workers, failures = join_all(2, options_of, names=["first", "not a name"])
    close_all(workers)
    assert isinstance(failures[1], ValueError)
    assert isinstance(failures[0], WorkerLostError)
    assert "worker 'not a name' could not join: ValueError" in str(failures[0])


def test_init_rpc_worker_that_breaks_off_fails_the_others_at_once():
    port = free_port()
    secret = "a secret"

    def break_off():
        place = find_place(f"tcp://127.0.0.1:{port}", 1, 2, {})
        meet(place, RpcBackendOptions(secret=secret)).close()

    thread = threading.Thread(target=break_off)
    thread.start()
    with pytest.raises(WorkerLostError, match="ended before all had come"):
        rpc.init_rpc(
            "a", None, 0, 2, RpcBackendOptions(init_method=f"tcp://127.0.0.1:{port}", secret=secret)
        )
    thread.join()


def test_init_rpc_missing_worker_times_out_with_a_count(monkeypatch):
    monkeypatch.setattr("distgrad.config.config.rendezvous_timeout", 0.2)
    with pytest.raises(RpcTimeoutError, match="1 of 2"):
        rpc.init_rpc("a", None, 0, 2, RpcBackendOptions(init_method=MemoryStore()))


def test_init_rpc_other_host_without_secret_is_refused(monkeypatch):
    monkeypatch.delenv("DISTGRAD_SECRET", raising=False)
    with pytest.raises(AuthenticationError, match="no secret"):
        rpc.init_rpc("a", None, 0, 2, RpcBackendOptions(init_method="tcp://192.0.2.1:5000"))


def test_secret_file_readable_by_others_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "secret"
    path.write_text("s3cret\n")
    path.chmod(0o644)
    monkeypatch.delenv("DISTGRAD_SECRET", raising=False)
    monkeypatch.setenv("DISTGRAD_SECRET_FILE", str(path))
    with pytest.raises(AuthenticationError, match="chmod 600"):
        RpcBackendOptions().find_secret()
    path.chmod(0o600)
    assert RpcBackendOptions().find_secret() == b"s3cret"


@pytest.mark.parametrize("name", ["", "a b", "x" * 128, "ü"])
def test_init_rpc_bad_name_is_refused(name):
    from distgrad.rpc.options import check_name

    with pytest.raises(ValueError, match="cannot name a worker"):
        check_name(name)


def stay(rank):
    return os.getpid()


def test_no_worker_in_this_process_says_what_to_do():
    with pytest.raises(RuntimeError, match="init_rpc"):
        rpc.get_worker_info()


def test_forked_child_has_no_worker():
    with World(1) as world:
        world.run(lambda rank: None)
        read, write = os.pipe()
        pid = os.fork()
        if pid == 0:
            from distgrad.rpc.activity import worker_or_none

            os.write(write, b"none" if worker_or_none() is None else b"some")
            os._exit(0)
        os.waitpid(pid, 0)
        assert os.read(read, 4) == b"none"
        os.close(read)
        os.close(write)


ROOM = """
import resource
from distgrad.rpc.lifecycle import _make_room
limit = lambda: resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (300, 1000))
for size in (2, 100, 100_000):
    _make_room(size)
    print(*limit())
"""


def test_init_rpc_raises_the_soft_limit_of_descriptors_for_a_large_world():
    done = subprocess.run(
        [sys.executable, "-c", ROOM], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.split() == ["300", "1000", "756", "1000", "1000", "1000"]


@pytest.mark.parametrize(
    ("option", "error"),
    [
        ({"secret": 5}, TypeError),
        ({"rpc_timeout": float("nan")}, ValueError),
        ({"rpc_timeout": "5"}, TypeError),
        ({"heartbeat_interval": None}, TypeError),
        ({"num_worker_threads": 0}, ValueError),
        ({"num_worker_threads": 1.5}, TypeError),
        ({"num_worker_threads": True}, TypeError),
        ({"host": 5}, TypeError),
        ({"expose": [print]}, TypeError),
    ],
)
def test_options_that_make_no_sense_are_named(option, error):
    with pytest.raises(error, match=f"cannot use {next(iter(option))}="):
        RpcBackendOptions(**option)


@pytest.mark.parametrize("value", [float("nan"), -1.0])
def test_settings_that_would_end_no_wait_are_refused(value):
    with pytest.raises(ValueError, match="cannot set rendezvous_timeout"):
        config.rendezvous_timeout = value


@pytest.mark.parametrize(
    "method",
    ["tcp://h:99999", "tcp://h:x", "tcp://h:1?rank=x", "tcp://h:1?world_size=x", "file://a/b"],
)
def test_find_place_address_that_makes_no_sense_is_named(method):
    with pytest.raises(ValueError, match="cannot meet at '"):
        find_place(method, -1, None, {})


@pytest.mark.parametrize("given", [("0", 2), (0, "2"), (0.0, 2)])
def test_find_place_numbers_of_another_type_are_named(given):
    with pytest.raises(TypeError, match="expected an integer"):
        find_place("file:///somewhere", *given, {})


def test_find_place_port_out_of_range_is_named():
    with pytest.raises(ValueError, match="port 99999"):
        find_place("env://", 0, 2, {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "99999"})
