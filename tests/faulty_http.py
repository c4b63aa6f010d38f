"""What servers that misbehave as they are told have in common: requests in and answers out over plain HTTP."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

Answer = Callable[[str, dict[str, str], Any, asyncio.StreamWriter], Awaitable[bool]]
"""Of a request's path, headers and JSON; False cuts the connection."""


@asynccontextmanager
async def listen(answer: Answer) -> AsyncIterator[str]:
    """A server on a free port of this machine; its address."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while line := await reader.readline():
                headers = {}
                while header := (await reader.readline()).decode().strip():
                    name, _, value = header.partition(":")
                    headers[name.lower()] = value.strip()
                raw = await reader.readexactly(int(headers.get("content-length", 0)))
                if not await answer(line.split()[1].decode(), headers, json.loads(raw or "null"), writer):
                    return
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()


def http(status: int, body: Any, kind: str = "application/json", retry_after: str = "0") -> bytes:
    """An answer: bytes as they are, all else as JSON."""
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    head = f"HTTP/1.1 {status} X\r\ncontent-type: {kind}\r\ncontent-length: {len(raw)}\r\nretry-after: {retry_after}"
    return f"{head}\r\n\r\n".encode() + raw
