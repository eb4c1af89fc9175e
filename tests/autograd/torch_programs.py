"""Run random programs on torch.distributed.autograd; started by `test_torch_oracle`.

Reads programs as JSON from the file named first, writes the gradients as JSON into the second.
"""

import json
import os
import sys

OPERATIONS = {
    "add": lambda xp, a, b: a + b,
    "multiply": lambda xp, a, b: a * b * 0.5,
    "tanh": lambda xp, a, b: xp.tanh(a) * b,
    "exp": lambda xp, a, b: xp.exp(-a * a) + b,
    "ratio": lambda xp, a, b: a / (b * b + 1.0),
    "sum": lambda xp, a, b: (a * b).sum() * a + b,
    "flip": lambda xp, a, b: a[[2, 0, 1]] * 0.7 + b,
}


def serve(operation, a, b):
    return OPERATIONS[operation](torch, a, b)


def relay(operation, a, b, via):
    return rpc.rpc_sync(f"worker{via}", serve, args=(operation, a, b)) + a


def gradients(program):
    leaves = [torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in program["leaves"]]
    values = list(leaves)
    with dist_autograd.context() as context_id:
        for operation, first, second, worker, via in program["steps"]:
            a, b = values[first], values[second]
            if via >= 0:
                y = rpc.rpc_sync(f"worker{worker}", relay, args=(operation, a, b, via))
            elif worker == 0:
                y = serve(operation, a, b)
            else:
                y = rpc.rpc_sync(f"worker{worker}", serve, args=(operation, a, b))
            values.append(y)
        # Everything is used: FAST mode waits for ever for what is not.
        weights = zip(values, program["weights"], strict=True)
        loss = sum((value * weight).sum() for value, weight in weights)
        dist_autograd.backward(context_id, [loss])
        found = dist_autograd.get_gradients(context_id)
        return [found[leaf].tolist() for leaf in leaves]


def work(rank, source, target, workers, port):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    rpc.init_rpc(f"worker{rank}", rank=rank, world_size=workers)
    if rank == 0:
        with open(source) as file:
            programs = json.load(file)
        answers = [gradients(program) for program in programs]
        with open(target, "w") as file:
            json.dump(answers, file)
    rpc.shutdown()


if __name__ == "__main__":
    import torch
    import torch.distributed.autograd as dist_autograd
    import torch.distributed.rpc as rpc

    work(int(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4]), int(sys.argv[5]))
