"""One definition, called in both ways: many calls at once on an event loop, with a limit on how many."""

import asyncio
import os
import sys

from diptych import llm

MODEL = sys.argv[1] if len(sys.argv) > 1 else os.environ.get("DIPTYCH_MODEL", "pool/smollm2-135m-instruct")
SCRIPT = ["one"] * 8 + ["two", "three"]


@llm.call(MODEL, max_tokens=12, limiter=llm.Limiter(at_once=4))
async def word(number: int) -> str:
    await asyncio.sleep(0)  # whatever the prompt has to wait for
    return f"Write the number {number} as a word."


@llm.call(MODEL, max_tokens=12)
def plain(number: int) -> str:
    return f"Write the number {number} as a word."


async def all_of_them() -> None:
    replies = await asyncio.gather(*(word(number) for number in range(8)))
    print([reply.text.strip() for reply in replies])

    print((await plain.aio(8)).text)  # a function without async has the verb, too
    async with word.stream(9) as stream:
        async for piece in stream.text():
            print(piece, end="")
    print()


def main() -> None:
    asyncio.run(all_of_them())


if __name__ == "__main__":
    main()
