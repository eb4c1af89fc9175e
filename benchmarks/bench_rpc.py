"""What a remote call costs: latency, calls in flight, bandwidth."""

from __future__ import annotations

from harness import Case, System, main

MB = 2**20
RIVALS = ("distgrad", "torch")
CASES = [
    Case("noop", "call of an empty function"),
    Case("echo_small", "echo of float32[1]"),
    Case("noop_1000_in_flight", "empty function, 1000 calls in flight", "calls/s", 1000),
    Case("echo_1000_in_flight", "echo of float32[1], 1000 calls in flight", "calls/s", 1000),
    Case("remote_to_here", "remote + to_here of float32[1]"),
    Case("echo_16mb", "echo of 16 MB, each way", "GB/s", 16 * MB),
    Case("echo_64mb", "echo of 64 MB, each way", "GB/s", 64 * MB),
    Case("echo_256mb", "echo of 256 MB, each way", "GB/s", 256 * MB, RIVALS),
    Case("noop_p99", "empty function, slowest of 100 calls", systems=RIVALS),
    Case(
        "noop_p99_beside_1gb",
        "empty function, slowest of 100 calls while another call moves 1 GB",
        systems=RIVALS,
    ),
    Case("echo_small_crowded", "echo of float32[1], two more processes busy"),
    Case(
        "echo_1000_in_flight_crowded",
        "echo of float32[1], 1000 calls in flight, two more processes busy",
        "calls/s",
        1000,
        RIVALS,
    ),
    Case("echo_16mb_crowded", "echo of 16 MB, two more processes busy", "GB/s", 16 * MB),
    Case("echo_64mb_crowded", "echo of 64 MB, two more processes busy", "GB/s", 64 * MB, RIVALS),
    Case("echo_256mb_crowded", "echo of 256 MB, two more busy", "GB/s", 256 * MB, RIVALS),
]
SYSTEMS = [
    System("distgrad", ["distgrad_peer.py", "unix"]),
    System("distgrad tcp", ["distgrad_peer.py", "tcp"]),
    System("torch rpc", ["torch_peer.py"], torch=True),
    System("mpi4py pickled", ["mpi_peer.py", "objects"], mpi=True),
    System("mpi4py buffers", ["mpi_peer.py", "buffers"], mpi=True),
    System("pyzmq + pickle", ["zmq_peer.py"]),
    System("multiprocessing", ["multiprocessing_peer.py"]),
    System("control: socket, 1 core", ["socket_peer.py", "together"], control=True),
    System("control: socket, 2 cores", ["socket_peer.py", "apart"], control=True),
]

if __name__ == "__main__":
    main("rpc", __doc__, CASES, SYSTEMS)
