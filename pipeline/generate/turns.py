"""Who may use an actor's engine: many units beside each other, or one alone."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class Turns:
    """Whose turn it is at an engine: many units' at once, or that of one that must be alone.

    A unit that asks to be alone waits for those inside, and keeps newcomers out meanwhile.
    """

    def __init__(self) -> None:
        self._inside = 0
        self._alone = asyncio.Lock()
        self._change = asyncio.Condition()

    @asynccontextmanager
    async def shared(self) -> AsyncIterator[None]:
        """Beside others."""
        async with self._alone, self._change:
            self._inside += 1
        try:
            yield
        finally:
            async with self._change:
                self._inside -= 1
                self._change.notify_all()

    @asynccontextmanager
    async def alone(self) -> AsyncIterator[None]:
        """With nobody else inside."""
        async with self._alone:
            async with self._change:
                await self._change.wait_for(lambda: not self._inside)
            yield
