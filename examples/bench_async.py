"""A measurement that does not block an event loop."""

import asyncio

from attention import abench
from attention.core.events import Progress


def shown(event: object) -> None:
    if isinstance(event, Progress):
        print(f"{event.done:.0%} {event.now}")


async def main() -> None:
    print(await abench({"seq": 128}, ["baseline", "poc"], seconds=0.5, on_event=shown))


if __name__ == "__main__":
    asyncio.run(main())
