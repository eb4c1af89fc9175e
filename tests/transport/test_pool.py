"""Warm receive buffers: aligned, lent once, bounded."""

import gc
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distgrad.config import config
from distgrad.transport._pool import Slab, SlabPool, shared_pool


def array(slab: Any) -> np.ndarray:
    return np.frombuffer(slab, np.uint8)


@given(st.integers(0, 200_000))
def test_slab_has_the_size_asked_for_and_is_aligned(nbytes: int) -> None:
    slab = SlabPool().take(nbytes)
    assert len(slab) == nbytes
    if nbytes:
        assert array(slab).ctypes.data % 64 == 0
        assert array(slab).flags.writeable


def test_slab_freed_is_lent_again() -> None:
    pool = SlabPool()
    address = array(pool.take(100_000)).ctypes.data
    assert array(pool.take(70_000)).ctypes.data == address


def test_slab_in_use_is_not_lent_again() -> None:
    pool = SlabPool()
    first = array(pool.take(5000))
    first[:] = 1
    second = array(pool.take(5000))
    second[:] = 2
    assert first.min() == first.max() == 1


def test_slab_lives_as_long_as_a_view_of_it() -> None:
    pool = SlabPool()
    part = array(pool.take(5000))[10:20]
    assert pool.lent_bytes == 8192
    assert pool.idle_bytes == 0
    del part
    assert pool.lent_bytes == 0
    assert pool.idle_bytes == 8192


def test_idle_bytes_stay_below_the_configured_cap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "pool_bytes", 100_000)
    pool = SlabPool()
    slabs = [pool.take(16_384) for _ in range(20)]
    del slabs
    assert 65_536 <= pool.idle_bytes <= 100_000


def test_sizes_out_of_use_are_dropped_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "pool_bytes", 100_000)
    pool = SlabPool()
    pool.take(65_536)
    slabs = [pool.take(16_384) for _ in range(6)]
    addresses = {array(slab).ctypes.data for slab in slabs}
    del slabs
    assert pool.idle_bytes == 6 * 16_384
    assert {array(slab).ctypes.data for slab in [pool.take(16_384) for _ in range(6)]} == addresses


@pytest.mark.parametrize("nbytes", [-1, 2**62])
def test_take_of_an_impossible_size_raises(nbytes: int) -> None:
    with pytest.raises(ValueError, match="out of range"):
        SlabPool().take(nbytes)


def test_take_beyond_memory_raises_and_changes_nothing() -> None:
    pool = SlabPool()
    with pytest.raises(MemoryError):
        pool.take(2**47)
    assert pool.lent_bytes == 0


def test_slab_outlives_its_pool() -> None:
    view = array(SlabPool().take(5000))
    gc.collect()
    view[:] = 3
    assert view.sum() == 15_000


def test_slab_cannot_be_made_by_hand() -> None:
    with pytest.raises(TypeError, match="take it from a SlabPool"):
        Slab()


def test_shared_pool_is_one_for_the_process() -> None:
    assert shared_pool() is shared_pool()
