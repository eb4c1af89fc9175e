"""One member of a world, with all that belongs to it."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Coroutine, Hashable
from typing import Any

from distgrad.config import config
from distgrad.message import Call, code_of
from distgrad.rpc._exchange import Handling, call_function, serve_call
from distgrad.rpc._future import RpcFuture
from distgrad.rpc.activity import Activity
from distgrad.rpc.agent import Agent
from distgrad.rpc.exposure import Exposure
from distgrad.rpc.future import Future, Running
from distgrad.rpc.hooks import Handler, PayloadHook
from distgrad.rpc.options import RpcBackendOptions, WorkerInfo
from distgrad.rpc.world import World
from distgrad.transport._poller import Poller

__all__ = ["Worker"]

_log = logging.getLogger("distgrad")


class Worker:
    """A worker: its connections, threads, exposed functions and tables.

    Made by `init_rpc`. One process may host many.

    Attributes
    ----------
    name, id
        Its own.
    infos
        All workers of the world, in the order of their ids.
    options
        As given to `init_rpc`.
    extensions
        Tables of the layers above, by name of the layer.
    on_lost
        Called with (worker id, reason) on a serving thread when a peer is lost.
    on_close
        Called once, when this worker has left: what it kept for others is let go.
    """

    def __init__(
        self,
        world: World,
        options: RpcBackendOptions,
        poller: Poller,
        exposure: Exposure | None = None,
    ) -> None:
        self.world = world
        self.name = world.own.name
        self.id = world.own.id
        self.infos = world.infos
        self.options = options
        self.extensions: dict[str, Any] = {}
        self.on_lost: list[Callable[[int, Exception], None]] = []
        self.on_close: list[Callable[[], None]] = []
        self.exposure = exposure or Exposure(self.name, options.expose)
        threads = options.num_worker_threads or max(config.max_serving_threads, 1)
        self.agent = Agent(self, poller, threads)
        self.agent.crew.base_activity = Activity(self)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._loop_lock = threading.Lock()
        self.register(Call, serve_call)

    @property
    def closed(self) -> bool:
        """Whether this worker was shut down."""
        return self.agent.closed

    @property
    def info(self) -> WorkerInfo:
        """Name and id of this worker."""
        return self.infos[self.id]

    # --- for the layers above ------------------------------------------------------------

    @property
    def payload_hook(self) -> PayloadHook | None:
        """Sees the tensors of messages; None where no layer above wants to."""
        return self.agent.hook

    @payload_hook.setter
    def payload_hook(self, hook: PayloadHook | None) -> None:
        self.agent.hook = hook

    def register(self, kind: type, handler: Handler, *, inline: bool = False) -> None:
        """Have messages of a kind handled.

        Parameters
        ----------
        kind
            Class of the message.
        handler
            Called with (worker, sender id, frame, fields). For a request it returns the
            answer, or a `Future` of it; what it raises is sent back.
        inline
            Run on the thread that polls: only for handlers that neither block, nor run
            user code, nor send messages that wait. Such a handler answers a request
            itself; it may return a task, which a serving thread runs next.
        """
        self.agent.handlers[code_of(kind)] = Handling(kind, handler, inline)

    def request(
        self, to: int, body: Any, *, timeout: float | None = None, chain: int = 0, what: str = ""
    ) -> RpcFuture:
        """Send a message object that is answered; see `Agent.request`."""
        seconds = self.options.rpc_timeout if timeout is None else timeout
        return self.agent.request(
            to,
            code_of(type(body)),
            tuple(body),
            timeout=seconds,
            chain=chain,
            what=what or type(body).__name__,
        )

    def post(self, to: int, body: Any, *, context_id: int = 0) -> None:
        """Send a one-way message object."""
        self.agent.tell(to, body, context_id)

    def submit(self, task: Callable[[], None], chain: Hashable = None) -> None:
        """Run a task on the thread that waits for ``chain``, or on a serving thread."""
        self.agent.submit(task, chain)

    def call_function(self, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Call an exposed function; see `distgrad.rpc._exchange.call_function`."""
        return call_function(self, function, args, kwargs)

    # --- the event loop -------------------------------------------------------------------

    def run_on_loop(self, coroutine: Coroutine[Any, Any, Any]) -> Future:
        """Run a coroutine on the event loop of this worker; return a `Future` of its result."""
        answer = Running(agent=self.agent)

        def finished(task: asyncio.Task[Any]) -> None:
            error = None if task.cancelled() else task.exception()
            if task.cancelled():
                answer.cancel()
            elif error is not None:
                answer.set_exception(error)
            else:
                answer.set_result(task.result())

        loop = self._event_loop()
        loop.call_soon_threadsafe(lambda: loop.create_task(coroutine).add_done_callback(finished))
        return answer

    def _event_loop(self) -> asyncio.AbstractEventLoop:
        with self._loop_lock:
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                threading.Thread(
                    target=_run_loop,
                    args=(self._loop,),
                    name=f"distgrad-{self.name}-loop",
                    daemon=True,
                ).start()
            return self._loop

    def close(self, reason: str) -> None:
        """Leave the world at once; pending calls fail. Idempotent."""
        self.agent.close(reason)
        while self.on_close:
            self.on_close.pop()()
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._loop.stop)

    def __repr__(self) -> str:
        return f"<Worker {self.name!r} (id {self.id}) of {len(self.infos)}>"


def _run_loop(loop: asyncio.AbstractEventLoop) -> None:
    stopped = False
    try:
        while not stopped:
            try:
                loop.run_forever()
                stopped = True
            except (KeyboardInterrupt, SystemExit):  # of one task; asyncio lets it end all others
                _log.info("a task on the event loop raised", exc_info=True)
    finally:
        loop.close()
