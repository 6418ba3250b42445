from __future__ import annotations

import asyncio

from pipeline.generate.turns import Turns


def test_alone_is_alone_and_keeps_newcomers_out() -> None:
    async def play() -> list[str]:
        turns, log = Turns(), list[str]()

        async def worker(name: str, *, alone: bool) -> None:
            async with turns.alone() if alone else turns.shared():
                log.append(f"{name} in")
                await asyncio.sleep(0.01)
                log.append(f"{name} out")

        plan = [("a", False), ("b", False), ("Q", True), ("c", False), ("d", False)]
        await asyncio.gather(*(worker(name, alone=alone) for name, alone in plan))
        return log

    log = asyncio.run(play())
    assert log[:2] == ["a in", "b in"]
    at = log.index("Q in")
    assert set(log[2:at]) == {"a out", "b out"}
    assert log[at + 1] == "Q out"
    assert log[at + 2 : at + 4] == ["c in", "d in"]
