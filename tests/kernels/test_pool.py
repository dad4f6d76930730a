"""Threads: right with any number of them, from several callers, and asleep when there is nothing to do."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from tests.kernels.weights import Packed, address, product
from tests.kernels.weights_table import random_blocks

import cake_kernels as kernels


@pytest.fixture(scope="module")
def packed() -> Packed:
    return Packed("Q4_0", random_blocks("Q4_0", 320, 256, np.random.default_rng(0)), 256)


def test_an_idle_pool_does_not_spin(packed: Packed) -> None:
    x, y = np.ones((1, 256), np.float32), np.empty((1, 320), np.float32)
    with kernels.Pool(4) as pool:
        pool.matmul(packed.matrix, None, address(x), address(y), 1)
        time.sleep(0.05)
        before = time.process_time()
        time.sleep(0.3)
        assert time.process_time() - before < 0.1  # three spinning threads would use up to 0.9 s


@pytest.mark.parametrize("threads", [2, 3, 8])
def test_more_threads_than_processors_wait_for_one_another(packed: Packed, threads: int) -> None:
    x = np.random.default_rng(1).standard_normal((3, 256), dtype=np.float32)
    expected, y = product(packed, x), np.empty((3, 320), np.float32)
    with kernels.Pool(threads) as pool:
        for _ in range(200):
            y.fill(np.nan)
            pool.matmul(packed.matrix, None, address(x), address(y), 3)
            assert np.array_equal(y, expected)


def test_pools_of_several_callers_do_not_meet(packed: Packed) -> None:
    def work(seed: int) -> bool:
        x = np.random.default_rng(seed).standard_normal((2, 256), dtype=np.float32)
        return np.array_equal(product(packed, x, threads=2), product(packed, x))

    with ThreadPoolExecutor(4) as callers:
        assert all(callers.map(work, range(40)))


def test_a_pool_closes_twice() -> None:
    pool = kernels.Pool(2)
    pool.close()
    pool.close()
