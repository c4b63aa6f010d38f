"""Check the messages of standard input, one a line, several at a time, and print the harmful ones.

python examples/moderate.py runs/book_club < messages.txt
python examples/moderate.py http://127.0.0.1:30000 my/policy.yaml < messages.txt
"""

import asyncio
import sys

import jaxguard


async def main(model: str, policy: str | None = None) -> None:
    with jaxguard.Guard.load(model, policy=policy) as guard:
        messages = [line.strip() for line in sys.stdin.buffer.read().decode().split("\n") if line.strip()]
        results = await asyncio.gather(*(guard.acheck(message) for message in messages))
    for message, result in zip(messages, results, strict=True):
        if not result.passes:
            print(result.probabilities, message)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
