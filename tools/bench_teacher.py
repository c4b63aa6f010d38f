"""How fast the teacher's client is beside SGLang's own benchmark client: the same server, requests and concurrency, in turns.

    make distill-demo && python tools/bench_teacher.py

Requests are teacher prompts for the demo's examples. Answers have a fixed length, so that both clients cause the same work.
"""

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from jaxguard.config.data import SourceConfig, TeacherConfig
from jaxguard.data.format.dialogue import Dialogue
from jaxguard.data.policies import load_policy
from jaxguard.data.sources import load_examples
from jaxguard.distill.prompts import load_prompt, tasks_for
from jaxguard.distill.teacher import open_teacher
from jaxguard.utils.errors import JaxguardError
from jaxguard.utils.secrets import Masked
from sglang_server import PYTHON, Server, serve

NAME = "teacher"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=Path("runs/demo/base"), help="default: runs/demo/base")
    parser.add_argument("--data", type=Path, default=Path("runs/demo/data/train.jsonl"), help="examples to ask about")
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=32, help="of each answer")
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--turns", type=int, default=3, help="how often each client runs")
    options = parser.parse_args()
    try:
        bodies = requests(options.data, options.requests, options.tokens)
        with tempfile.TemporaryDirectory() as scratch:
            found = measure(options, bodies, Path(scratch))
    except JaxguardError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    show(found)
    return 0


def requests(data: Path, count: int, tokens: int) -> list[dict[str, Any]]:
    """Bodies of chat requests, without the model."""
    prompt, dialogue = load_prompt("trace"), Dialogue()
    tasks = tasks_for(load_examples(SourceConfig(kind="jsonl", path=str(data))), load_policy("demo"))
    chats = [prompt.messages(task, dialogue) for task in tasks]
    fixed = {"max_tokens": tokens, "ignore_eos": True, "temperature": 0.0}
    return [{"messages": chat, **fixed} for chat in islice(cycle(chats), count)]


def measure(options: argparse.Namespace, bodies: list[dict[str, Any]], scratch: Path) -> dict[str, list[float]]:
    """Completion tokens a second, of each turn of each client."""
    file = scratch / "requests.jsonl"
    file.write_text("".join(json.dumps(body) + "\n" for body in bodies), encoding="utf-8")
    found: dict[str, list[float]] = {"sglang.bench_serving": [], "jaxguard": []}
    with serve(options.checkpoint, NAME, scratch / "server.log") as server:
        ours(server, bodies[:4], options.concurrency)  # warms it up
        for turn in range(options.turns):
            clients = [
                ("sglang.bench_serving", lambda: theirs(server, file, options, scratch)),
                ("jaxguard", lambda: ours(server, bodies, options.concurrency)),
            ]
            for name, client in clients if turn % 2 == 0 else clients[::-1]:
                flush(server)
                found[name].append(client())
    return found


def flush(server: Server) -> None:
    """Empty the cache of prefixes."""
    with urllib.request.urlopen(f"{server.url.removesuffix('/v1')}/flush_cache", data=b"", timeout=30):  # noqa: S310 (ours)
        pass


def ours(server: Server, bodies: list[dict[str, Any]], concurrency: int) -> float:
    async def run() -> float:
        first = bodies[0]
        config = TeacherConfig(
            endpoints=(Masked(server.url),),
            model=NAME,
            concurrency=concurrency,
            temperature=first["temperature"],
            top_p=1.0,
            max_tokens=first["max_tokens"],
        )
        async with open_teacher(config) as teacher:
            started = time.monotonic()
            extra = {"ignore_eos": True}
            answers = await asyncio.gather(*(teacher.complete(body["messages"], extra=extra) for body in bodies))
            seconds = time.monotonic() - started
        return sum(reply.completion_tokens for replies in answers for reply in replies) / seconds

    return asyncio.run(run())


def theirs(server: Server, file: Path, options: argparse.Namespace, scratch: Path) -> float:
    output = scratch / "bench.jsonl"
    output.unlink(missing_ok=True)
    flags = {
        "--backend": "sglang-oai-chat",
        "--base-url": server.url.removesuffix("/v1"),
        "--dataset-name": "openai",
        "--dataset-path": str(file),
        "--num-prompts": str(options.requests),
        "--max-concurrency": str(options.concurrency),
        "--model": str(options.checkpoint),
        "--served-model-name": NAME,
        "--tokenizer": str(options.checkpoint),
        "--output-file": str(output),
        "--warmup-requests": "0",
    }
    words = [word for flag in flags.items() for word in flag]
    command = [str(PYTHON), "-m", "sglang.bench_serving", *words, "--disable-stream", "--disable-tqdm"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 (our own command)
    if done.returncode or not output.is_file():
        raise JaxguardError(f"sglang.bench_serving failed: {done.stderr.strip()[-500:]}")
    result = json.loads(output.read_text(encoding="utf-8").splitlines()[-1])
    if result["completed"] != options.requests:
        raise JaxguardError(f"sglang.bench_serving completed {result['completed']} of {options.requests} requests")
    return float(result["output_throughput"])


def show(found: dict[str, list[float]]) -> None:
    table = Table("client", title="Completion tokens a second", title_justify="left")
    for heading in ("median", "each turn"):
        table.add_column(heading, justify="right")
    for name, speeds in found.items():
        table.add_row(name, f"{statistics.median(speeds):.1f}", "  ".join(f"{speed:.1f}" for speed in speeds))
    theirs_median, ours_median = (statistics.median(speeds) for speeds in found.values())
    console = Console(highlight=False)
    console.print(table)
    console.print(f"jaxguard / sglang.bench_serving: {ours_median / theirs_median:.3f}")


if __name__ == "__main__":
    sys.exit(main())
