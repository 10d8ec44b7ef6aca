"""Silence counts only while a process could have heard something."""

import asyncio
import time

import pytest

from torch_ps.ps.failover.wait_alive import wait_alive


def test_sign_that_came_while_the_process_stood_still_is_heard() -> None:
    async def run() -> str:
        loop, sign = asyncio.get_running_loop(), asyncio.Event()
        loop.call_soon(time.sleep, 0.5)  # as SIGSTOP does it
        loop.call_later(0.4, sign.set)

        async def wait() -> str:
            await sign.wait()
            return "here"

        return await wait_alive(wait(), 0.2)

    assert asyncio.run(run()) == "here"


def test_silence_ends_the_wait_and_what_was_waited_for() -> None:
    async def run() -> bool:
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        with pytest.raises(TimeoutError):
            await wait_alive(future, 0.05)
        return future.cancelled()

    assert asyncio.run(run())


def test_error_in_place_of_a_sign_is_raised() -> None:
    async def fail() -> None:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        asyncio.run(wait_alive(fail(), 1.0))
