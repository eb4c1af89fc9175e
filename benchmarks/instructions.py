"""Count the instructions of the hot paths with callgrind.

    python benchmarks/instructions.py            print them, and compare with the committed ones
    python benchmarks/instructions.py --write    commit to today's

Time is noisy on a shared machine; a count repeats within two percent anywhere, so that
a regression shows. Every case runs in a process of its own under valgrind, a fixed number of
times; what a run without it costs is subtracted. Counts are kept by version of Python.
"""

from __future__ import annotations

import argparse
import contextvars
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

FIGURES = Path(__file__).resolve().parent / "results" / "instructions.json"
WARM_UP = 20
#: Idle threads of a BLAS spin, and count for as long as the process happens to take.
SAME_EVERYWHERE = {
    "PYTHONHASHSEED": "0",
    "PYTHONMALLOC": "pymalloc",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
}
TOLERANCE = 0.05
ARGUMENTS = ("mod.f", (1, 2.5, "hello", [1, 2, 3], {"a": 1, "b": None}), {"k": True})

Call = Callable[[], Any]


def encode_arguments() -> Call:
    """Encode the arguments of a call."""
    from distgrad._codec import encode

    return lambda: encode(1, ARGUMENTS).parts()


def decode_arguments() -> Call:
    """Decode the arguments of a call."""
    from distgrad._codec import decode, encode, parse

    sent = b"".join(encode(1, ARGUMENTS).parts())
    return lambda: decode(parse(sent))


def encode_gradients() -> Call:
    """Encode four small gradients."""
    import numpy as np

    from distgrad._codec import encode

    gradients = [np.ones(8, np.float32) for _ in range(4)]
    return lambda: encode(1, gradients).parts()


def record_operation() -> Call:
    """Record a multiplication of two small tensors."""
    import distgrad as dg

    x = dg.ones(4, requires_grad=True)
    y = dg.ones(4, requires_grad=True)
    return lambda: x * y


def backward_chain() -> Call:
    """Record a chain of 20 multiplications and differentiate it."""
    import distgrad as dg

    x = dg.ones(4, requires_grad=True)

    def call() -> None:
        y = x
        for _ in range(20):
            y = y * 1.01
        y.sum().backward()
        x.grad = None

    return call


class LooseEnd:
    """A connection that takes everything and brings nothing."""

    closed = False
    peer = 1

    def send(self, message: object) -> bool:
        return True


def echo(value: object) -> object:
    return value


def worker_without_threads() -> Any:
    """Return the worker 0 of two, connected to nobody, and make it the current one."""
    from distgrad.rpc.activity import Activity, activity
    from distgrad.rpc.options import RpcBackendOptions
    from distgrad.rpc.worker import Worker
    from distgrad.rpc.world import Member, World
    from distgrad.transport._poller import Poller

    members = [Member(f"worker{i}", i, 1, "", "", ()) for i in range(2)]
    worker = Worker(World(members, 0, None), RpcBackendOptions(), Poller())
    worker.agent.crew.watched = True  # so that no thread comes to do it
    worker.agent.links.routes[1] = LooseEnd()
    activity.set(Activity(worker))
    return worker


def make_call() -> Call:
    """Make a call, and take its answer in; without a transport."""
    import numpy as np

    from distgrad import rpc
    from distgrad._codec import encode, parse
    from distgrad.message import Reply, code_of

    agent = worker_without_threads().agent
    context = contextvars.copy_context()
    value, end, kind = np.ones(1, np.float32), agent.links.routes[1], code_of(Reply)

    def call() -> None:
        future: Any = context.run(rpc.rpc_async, 1, echo, (value,))
        answer = parse(encode(kind, (value,), request_id=future.request_id))
        agent.on_events([(end, answer)])
        future.wait()

    return call


def serve_call() -> Call:
    """Take a call in, run an empty function, and answer; without a transport."""
    import numpy as np

    from distgrad import rpc
    from distgrad._codec import encode, parse
    from distgrad.message import Call as CallMessage
    from distgrad.message import code_of

    rpc.expose(echo)
    agent = worker_without_threads().agent
    body = (f"{__name__}:echo", (np.ones(1, np.float32),), None)
    frame = parse(encode(code_of(CallMessage), body, request_id=5, chain=5, deadline_us=1 << 30))

    def call() -> None:
        agent.on_events([(agent.links.routes[1], frame)])
        contextvars.Context().run(agent.crew.backlog.popleft())

    return call


def two_workers() -> Any:
    """Return two workers of this process, the first the current one, both run by this thread.

    They are connected as any workers of one process. While the first one waits, its ticks
    do what the threads of the second one would.
    """
    from distgrad.config import config
    from distgrad.rpc import extensions
    from distgrad.rpc.activity import Activity, activity
    from distgrad.rpc.options import RpcBackendOptions
    from distgrad.rpc.worker import Worker
    from distgrad.rpc.world import Member, World
    from distgrad.transport._poller import Poller
    from distgrad.transport.registry import transport_for

    workers: list[Any] = []

    def listen(i: int, poller: Any) -> Any:
        return transport_for("inproc").listen(
            poller,
            lambda uid: workers[i].world.handshake(connecting=False, peer_uid=uid),
            lambda connection, identity: workers[i].agent.links.accept(connection, identity),
            secure=False,
        )

    config.spin_us = 0.0  # who spins counts the time, not the work
    pollers = [Poller(), Poller()]
    listeners = [listen(i, poller) for i, poller in enumerate(pollers)]
    members = [Member(f"worker{i}", i, 1, "", "", (listeners[i].address,)) for i in range(2)]
    for i, poller in enumerate(pollers):
        worker = Worker(World(members, i, None), RpcBackendOptions(), poller)
        extensions.install(worker)
        worker.agent.links.listeners = listeners
        worker.agent.crew.watched = True  # so that no thread comes to do it
        workers.append(worker)
    workers[0].agent.ticks.append(lambda now: serve(workers[1]))
    workers[0].agent.tick_by(0.0)
    activity.set(Activity(workers[0]))
    return workers


def serve(worker: Any) -> float:
    """Do all that a worker has to do now; as a tick, ask to be called again at once."""
    if events := worker.agent.crew.poller.poll(0.0, True):
        worker.agent.on_events(events)
    while worker.agent.crew.backlog:
        contextvars.Context().run(worker.agent.crew.backlog.popleft())
    return 0.0


def call_and_answer() -> Call:
    """Call an empty function on another worker; both ends."""
    import numpy as np

    from distgrad import rpc

    rpc.expose(echo)
    two_workers()
    context, value = contextvars.copy_context(), np.ones(1, np.float32)
    return lambda: context.run(rpc.rpc_sync, 1, echo, (value,))


def backward_over_hops(hops: int) -> Call:
    """Return a pass over the graph of calls in a row; each of them is two hops."""
    import distgrad as dg
    from distgrad import autograd, rpc

    rpc.expose(echo)
    two_workers()
    autograd_context = autograd.context()
    autograd_context.__enter__()
    value = dg.ones(1, requires_grad=True)
    for _ in range(hops // 2):
        value = rpc.rpc_sync(1, echo, (value,))
    context = contextvars.copy_context()
    return lambda: context.run(autograd.backward, autograd_context, [value], retain_graph=True)


def backward_2_hops() -> Call:
    """Run a backward pass to another worker and back; both ends."""
    return backward_over_hops(2)


def backward_42_hops() -> Call:
    """The same to and fro 21 times."""
    return backward_over_hops(42)


#: How often each is repeated: two processes differ by some 10^5 instructions for other reasons.
CASES = {
    encode_arguments: 20000,
    decode_arguments: 20000,
    encode_gradients: 20000,
    record_operation: 20000,
    backward_chain: 1000,
    make_call: 10000,
    serve_call: 10000,
    call_and_answer: 2000,
    backward_2_hops: 500,
    backward_42_hops: 30,
}
NAMES = {prepare.__name__: prepare for prepare in CASES}
TITLES = {name: prepare.__doc__ for name, prepare in NAMES.items()} | {
    "hop": "One hop of a backward pass: the difference of the two, by 40"
}


def run_here(measured: str) -> None:
    """Prepare and warm up every case, then repeat the measured one."""
    calls = {name: prepare() for name, prepare in NAMES.items()}
    for call in calls.values():
        for _ in range(WARM_UP):
            call()
    if measured in NAMES:
        for _ in range(CASES[NAMES[measured]]):
            calls[measured]()


def count(measured: str) -> int:
    """Return the instructions of a process that runs a case, or none, under callgrind."""
    command = ["valgrind", "--tool=callgrind", "--callgrind-out-file=/dev/null"]
    done = subprocess.run(
        [*command, sys.executable, __file__, "--here", measured],
        env=os.environ | SAME_EVERYWHERE,
        capture_output=True,
        text=True,
        check=True,
    )
    found = re.search(r"Collected : (\d+)", done.stderr)
    if found is None:
        raise SystemExit(f"cannot read what callgrind says:\n{done.stderr[-2000:]}")
    return int(found[1])


def count_all(known: dict[str, int]) -> dict[str, int]:
    """Return the instructions of one call of every case, and those of a further hop.

    Prints each when it is counted, beside the known one: together they take minutes.
    """
    base = count("nothing")
    counts: dict[str, int] = {}

    def note(name: str, instructions: int) -> None:
        counts[name] = instructions
        change = f"{instructions / known[name] - 1:+8.1%}" if name in known else ""
        print(f"{TITLES[name]:<64}{instructions:>10,}{change}", flush=True)

    for prepare, times in CASES.items():
        note(prepare.__name__, round((count(prepare.__name__) - base) / times))
    note("hop", round((counts["backward_42_hops"] - counts["backward_2_hops"]) / 40))
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="keep these counts as the known ones")
    parser.add_argument("--here", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.here:
        run_here(options.here)
        return
    figures = json.loads(FIGURES.read_text()) if FIGURES.exists() else {}
    version = ".".join(platform.python_version_tuple()[:2])
    known = figures.get(version, {})
    counted = count_all(known)
    if options.write:
        figures[version] = counted
        FIGURES.write_text(json.dumps(figures, indent=1) + "\n")
    elif any(counted[name] > known[name] * (1 + TOLERANCE) for name in known):
        raise SystemExit(f"more than {TOLERANCE:.0%} above the committed counts")


if __name__ == "__main__":
    main()
