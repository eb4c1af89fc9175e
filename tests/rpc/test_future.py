"""Futures by themselves."""

import asyncio
import gc
import threading
import warnings

import pytest

from distgrad.errors import DistgradError, RpcTimeoutError
from distgrad.rpc import Future, collect_all, wait_all


def test_future_completes_once():
    future = Future()
    future.set_result(3)
    assert future.done()
    assert future.wait() == future.result() == 3
    with pytest.raises(DistgradError, match="complete already"):
        future.set_result(4)
    with pytest.raises(DistgradError, match="complete already"):
        future.set_exception(ValueError())


def test_future_failure_is_raised_each_time():
    future = Future()
    error = ValueError("no")
    future.set_exception(error)
    for _ in range(2):
        with pytest.raises(ValueError, match="no"):
            future.wait()
    assert future.exception() is error


def test_future_wait_times_out_and_stays_usable():
    future = Future()
    with pytest.raises(RpcTimeoutError):
        future.wait(0.01)
    future.set_result(1)
    assert future.wait(0.01) == 1


def test_future_wakes_all_waiting_threads():
    future, seen = Future(), []
    threads = [threading.Thread(target=lambda: seen.append(future.wait(10))) for _ in range(4)]
    for thread in threads:
        thread.start()
    future.set_result("x")
    for thread in threads:
        thread.join(10)
    assert seen == ["x"] * 4


def test_future_then_chains_values_and_failures():
    future = Future()
    doubled = future.then(lambda f: f.wait() * 2)
    broken = future.then(lambda f: 1 / 0)
    future.set_result(21)
    assert doubled.wait(5) == 42
    with pytest.raises(ZeroDivisionError):
        broken.wait(5)


def test_future_callbacks_run_in_the_order_they_were_added():
    future, seen = Future(), []
    for i in range(3):
        future.add_done_callback(lambda _, i=i: seen.append(i))
    future.set_result(None)
    future.add_done_callback(lambda _: seen.append("late"))
    assert seen == [0, 1, 2, "late"]


def test_future_cancel_fails_it_unless_done():
    future = Future()
    assert future.cancel()
    assert not future.cancel()
    with pytest.raises(asyncio.CancelledError):
        future.wait()


def test_future_nobody_looked_at_warns():
    future = Future()
    future.set_exception(ValueError("unseen"))
    loop = [future]
    loop.append(loop)
    gc.disable()  # it must not come before its warning is waited for
    try:
        del future, loop
        with pytest.warns(RuntimeWarning, match="unseen"):
            gc.collect()
    finally:
        gc.enable()


def test_future_is_awaitable():
    async def main():
        future = Future()
        threading.Timer(0.01, future.set_result, (5,)).start()
        return await future

    assert asyncio.run(asyncio.wait_for(main(), 10)) == 5


def test_wait_all_and_collect_all_keep_order():
    futures = [Future() for _ in range(3)]
    gathered = collect_all(futures)
    for i in (2, 0, 1):
        assert not gathered.done()
        futures[i].set_result(i)
    assert wait_all(futures, 1) == [0, 1, 2]
    assert gathered.wait(1) == futures
    assert collect_all([]).wait(1) == []


@pytest.mark.parametrize("gather", [wait_all, collect_all])
@pytest.mark.parametrize(
    ("futures", "fact"),
    [
        ([1], r"futures\[0\] is int, not a Future"),
        ([Future(), None], r"futures\[1\] is NoneType, not a Future"),
        (Future(), "of type Future: expected a list of futures"),
        (7, "of type int: expected a list of futures"),
    ],
)
def test_gathering_what_is_no_future_is_refused_at_once(gather, futures, fact):
    with pytest.raises(TypeError, match=f"cannot {gather.__name__} futures.*{fact}"):
        gather(futures)


def test_collect_all_fails_as_soon_as_one_does():
    futures = [Future() for _ in range(3)]
    gathered = collect_all(futures)
    futures[2].set_exception(KeyError("early"))
    with pytest.raises(KeyError, match="early"):
        gathered.wait(0)
    futures[0].set_exception(ValueError("late"))
    futures[1].set_result(None)
    assert isinstance(gathered.exception(), KeyError)


def test_futures_that_were_waited_for_together_do_not_warn():
    def fail_two(wait):
        futures = [Future() for _ in range(3)]
        futures[0].set_result(1)
        futures[1].set_exception(KeyError("first"))
        futures[2].set_exception(KeyError("second"))
        with pytest.raises(KeyError, match="first"):
            wait(futures)

    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        fail_two(wait_all)
        fail_two(lambda futures: collect_all(futures).wait())
        gc.collect()
    assert [str(w.message) for w in seen] == []


def test_future_failure_looked_at_often_keeps_its_traceback_short():
    future = Future()
    future.set_exception(ValueError("again"))

    def depth():
        with pytest.raises(ValueError, match="again") as caught:
            future.wait()
        return len(caught.traceback)

    assert depth() == depth() == depth()


def test_future_is_cancelled_with_the_task_that_awaits_it():
    async def give_up_on(future):
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(future, 0.01)

    lost, kept = Future(), Future()
    asyncio.run(give_up_on(lost))
    with pytest.raises(asyncio.CancelledError):
        lost.wait(0)

    async def shielded():
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(
                asyncio.shield(waiting := asyncio.ensure_future(wait(kept))), 0.01
            )
        kept.set_result(3)
        return await waiting

    async def wait(future):
        return await future

    assert asyncio.run(shielded()) == 3


def test_future_is_awaited_on_several_loops_at_once():
    async def main(future):
        return await future

    future, values = Future(), []
    threads = [
        threading.Thread(target=lambda: values.append(asyncio.run(main(future)))) for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    future.set_result(7)
    for thread in threads:
        thread.join(10)
    assert values == [7, 7, 7]


@pytest.mark.parametrize("method", ["then", "add_done_callback"])
def test_future_callback_that_cannot_be_called_is_refused(method):
    with pytest.raises(TypeError, match="not callable"):
        getattr(Future(), method)(None)


@pytest.mark.parametrize(
    ("timeout", "error"), [(float("nan"), ValueError), ("3", TypeError), ([], TypeError)]
)
def test_future_timeout_that_is_no_time_is_refused(timeout, error):
    for wait in (Future().wait, Future().exception):
        with pytest.raises(error):
            wait(timeout)
