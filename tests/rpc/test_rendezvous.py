"""Meeting: places, stores, names, secrets."""

import os
import re
import socket
import subprocess
import sys
import threading
import time

import pytest

from distgrad import rpc
from distgrad.config import config
from distgrad.errors import (
    AuthenticationError,
    RpcTimeoutError,
    TransportError,
    WorkerLostError,
)
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
    thread = threading.Thread(target=lambda: store.claim("w/1", [1, "b"]))
    store.claim("w/0", [0, "a"])
    store.claim("other", 1)
    thread.start()
    assert store.gather("w/", 2, until) == {"w/0": [0, "a"], "w/1": [1, "b"]}
    thread.join()
    assert store.claim("w/0", [2]) == [0, "a"]
    with pytest.raises(RpcTimeoutError, match="2 of 3"):
        store.gather("w/", 3, time.monotonic() + 0.05)


@pytest.mark.parametrize("kind", ["memory", "file"])
def test_store_failure_ends_all_who_wait_but_nobody_who_has_enough(kind, tmp_path):
    store = MemoryStore() if kind == "memory" else FileStore(tmp_path / "s")
    until = time.monotonic() + 10
    store.claim("w/0", 0)
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


def join_all(size, options_of, names=None, ranks=None, sizes=None):
    """Start workers on threads of this process; return workers and failures by number."""
    workers, failures = {}, {}

    def body(i):
        name, rank = names[i] if names else f"w{i}", ranks[i] if ranks else i
        try:
            workers[i] = rpc.init_rpc(name, None, rank, sizes[i] if sizes else size, options_of(i))
        except Exception as error:
            failures[i] = error

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


@pytest.fixture(params=["memory", "file", "tcp"])
def meeting(request, tmp_path):
    """Where a world meets; whoever waits for it to the end fails the test."""
    return {
        "memory": MemoryStore(),
        "file": f"file://{tmp_path}/store",
        "tcp": f"tcp://127.0.0.1:{free_port()}",
    }[request.param]


@pytest.mark.parametrize(
    ("misfits", "fact"),
    [
        ({"names": ["same", "other", "same"]}, r"\(rank [02]\): rank [02] has that name"),
        ({"ranks": [0, 1, 1]}, r"w[12]' \(rank 1\): worker 'w[12]' has that rank"),
        ({"sizes": [3, 3, 4]}, r"it has world_size=[34], worker 'w\d' \(rank \d\) [34]"),
        ({"sizes": [4, 3, 3]}, r"it has world_size=[34], worker 'w\d' \(rank \d\) [34]"),
    ],
    ids=["name", "rank", "size", "first size"],
)
def test_init_rpc_workers_that_do_not_fit_together_fail_all_at_once(meeting, misfits, fact):
    workers, failures = join_all(
        3, lambda _: RpcBackendOptions(init_method=meeting, secret="s"), **misfits
    )
    close_all(workers)
    assert workers == {}
    assert any(re.search(fact, str(error)) for error in failures.values())
    assert all(isinstance(error, FAILURES) for error in failures.values()), failures


FAILURES = (ValueError, WorkerLostError, TransportError)  # but not RpcTimeoutError


def test_init_rpc_file_of_another_world_is_refused_and_named(tmp_path):
    options = RpcBackendOptions(init_method=f"file://{tmp_path}/store")
    close_all({0: rpc.init_rpc("a", None, 0, 1, options)})
    with pytest.raises(ValueError, match=r"'a' has that rank.*store is of another world"):
        rpc.init_rpc("a", None, 0, 1, options)


def test_init_rpc_that_fails_on_one_worker_fails_on_all_at_once(meeting):
    def options_of(rank):
        return RpcBackendOptions(init_method=meeting, secret="s")

    workers, failures = join_all(2, options_of, names=["first", "not a name"])
    close_all(workers)
    assert isinstance(failures[1], ValueError)
    assert isinstance(failures[0], WorkerLostError)
    assert "worker 'not a name' could not join: ValueError" in str(failures[0])


@pytest.mark.parametrize(
    ("pattern", "fact"),
    [
        ("no_such_module:f", "No module named 'no_such_module'"),
        ("math:no_such_function", "math has no 'no_such_function'"),
        ("math:pi", "pi is neither function nor class"),
        ("math", "expected 'module:name'"),
    ],
)
def test_init_rpc_pattern_that_exposes_nothing_fails_on_all_at_once(meeting, pattern, fact):
    def options_of(rank):
        patterns = (p for p in ("math:sqrt", pattern)[: rank + 1])
        return RpcBackendOptions(init_method=meeting, secret="s", expose=patterns)

    workers, failures = join_all(2, options_of)
    close_all(workers)
    assert f"cannot expose {pattern!r}: {fact}" in str(failures[1])
    assert isinstance(failures[0], WorkerLostError)
    assert fact in str(failures[0])


def test_init_rpc_backend_that_does_not_exist_fails_on_all_at_once(meeting):
    def body(rank, failures):
        options = RpcBackendOptions(init_method=meeting, secret="s")
        try:
            rpc.init_rpc(f"w{rank}", "pigeon" if rank else None, rank, 2, options)
        except Exception as error:
            failures[rank] = error

    failures = {}
    other = threading.Thread(target=body, args=(1, failures))
    other.start()
    body(0, failures)
    other.join()
    assert all("pigeon" in str(error) for error in failures.values())
    assert len(failures) == 2


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
        ({"expose": 5}, TypeError),
        ({"expose": None}, TypeError),
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
