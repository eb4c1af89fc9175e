"""Gradients across workers: contexts, and backward passes through all of them.

>>> from distgrad import autograd as dist_autograd, rpc
>>> with dist_autograd.context() as context_id:                     # doctest: +SKIP
...     loss = rpc.rpc_sync("ps", forward, args=(x,)).sum()
...     dist_autograd.backward(context_id, [loss])
...     grads = dist_autograd.get_gradients(context_id)
"""

from distgrad.autograd.api import (
    backward,
    context,
    current_context,
    debug_info,
    get_gradients,
    install,
    is_valid_context,
    retrieve_context,
)
from distgrad.autograd.context import DistAutogradContext
from distgrad.autograd.functions import RecvRpcBackward, SendRpcBackward
from distgrad.errors import BackwardError, ContextError

__all__ = [
    "BackwardError",
    "ContextError",
    "DistAutogradContext",
    "RecvRpcBackward",
    "SendRpcBackward",
    "backward",
    "context",
    "current_context",
    "debug_info",
    "get_gradients",
    "install",
    "is_valid_context",
    "retrieve_context",
]
