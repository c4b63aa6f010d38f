"""`make bench-evaluation`: compare verdict probabilities and generated answers of both backends with transformers.

All get the same token ids, including those of the 17-category policy. For `verdicts` each example has the two tokens of its
verdict. `answers` are generated greedily, 32 at a time, and most take all tokens they may; `lines` end with their first line,
so that their lengths differ. `samples` are eight answers of each prompt, as reinforcement learning asks for; they differ
between contenders. All compute in float32, as our guards do on a CPU. With --dtype bfloat16 our JAX backend rounds what it
multiplies, as `jaxguard reinforce` samples, and the others compute in bfloat16; then answers differ. Every measurement is its
own process; reading the checkpoint and starting the server are not counted. Compiling is, but for answers, which are generated
twice where something compiles: the table has the second time, and the first in a column of its own. But for SGLang, which keeps
prompts, the first tokens alone are timed, too: they take the time of the prompts, and the tokens after them the rest, which
gives the speed of decoding. The bound is the time of the products that cannot be avoided, those of what is not cached of each
prompt and of each new token with the weights, at the rate of a large product, measured right after.
"""

import argparse
import asyncio
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NotRequired, TypedDict

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table
from scipy.special import expit

from demo import fetch_weights
from jaxguard.config import Config
from jaxguard.config.evaluate import EvaluateConfig
from jaxguard.data.encoding import Encoder
from jaxguard.data.examples import Example
from jaxguard.data.format.dialogue import Mode
from jaxguard.guards.backends.jax import WARM_TOKENS, JaxBackend
from jaxguard.guards.backends.jax_model import Model, PrefixCache, place_model
from jaxguard.guards.backends.sglang import open_sglang
from jaxguard.guards.formats.native import NativeFormat
from jaxguard.guards.protocol import Backend, Request
from jaxguard.models.compute import choose_compute
from jaxguard.models.hf_io.checkpoints import read_weights
from jaxguard.models.sharding import make_mesh, weight_shardings
from jaxguard.models.spec import read_spec
from jaxguard.models.weights import LAYER
from jaxguard.utils.errors import JaxguardError
from sglang_server import serve
from workloads import Job, ours, read_examples

ROOT = Path(__file__).resolve().parent.parent.parent
FOLDER = Path("build/bench/evaluation")
MODEL = Path("build/bench/base")
TOLERANCE = 1e-4
EXAMPLES = {"verdicts": 1000, "answers": 64, "lines": 128, "samples": 8}
NEW_TOKENS = {"verdicts": 0, "answers": 64, "lines": 256, "samples": 64}
GENERATIONS = {"verdicts": 1, "answers": 1, "lines": 1, "samples": 8}
SIZE = 2048
"""Of the square matrices whose product says how fast this machine multiplies."""

CONTENDERS = {
    "jaxguard": [sys.executable, __file__, "--backend", "jax", "--job"],
    "jaxguard, SGLang": [sys.executable, __file__, "--backend", "sglang", "--job"],
    "transformers": [str(ROOT / ".venv-bench-trl/bin/python"), str(ROOT / "tools/bench/peers/with_transformers.py")],
}


class Result(TypedDict):
    """The output of a contender.

    seconds: for all examples.
    first: the same with compiling, where `seconds` is without.
    prompts: for the first new token of each, where it is known.
    bound: the least seconds that the products with the weights take, where it is known.
    odds: of each, the log-probability of the first token minus the second's, for verdicts.
    answers: the new tokens of each, where there are any.
    """

    seconds: float
    first: NotRequired[float]
    prompts: NotRequired[float]
    bound: NotRequired[float]
    odds: list[float]
    answers: list[list[int]]


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", choices=list(EXAMPLES), action="append", help="default: all")
    parser.add_argument("--only", choices=list(CONTENDERS), action="append", help="default: all")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--examples", type=int, help=f"default: {EXAMPLES}")
    parser.add_argument("--data", type=Path, help="labelled JSON lines; default: the demo's, from PyPI")
    parser.add_argument("--backend", choices=["jax", "sglang"], help="do a job here and print JSON")
    parser.add_argument("--job", type=Path, help="the job's file")
    chosen = parser.parse_args(arguments)
    if chosen.backend:
        print(json.dumps(asyncio.run(_do(json.loads(chosen.job.read_text(encoding="utf-8")), chosen.backend))))
        return 0
    try:
        fetch_weights(MODEL)
        for workload in chosen.workload or EXAMPLES:
            examples = read_examples(chosen.data, chosen.examples or EXAMPLES[workload])
            results = measure(write(workload, examples, chosen.dtype), chosen.only or list(CONTENDERS), chosen.rounds)
            Console().print(table(workload, results))
    except JaxguardError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def settings(dtype: str = "float32") -> Config:
    """The training benchmark's model and policy."""
    job = Job("direct", str(MODEL), "unused", "unused", "shared", str(FOLDER))
    return ours(job, f"model.compute_dtype={dtype}", "model.query_chunk=256")


def sampling(generations: int) -> EvaluateConfig:
    """How to answer a prompt: once and greedily, or several times, sampled from all tokens."""
    return EvaluateConfig(ask="benchmark", generations=generations, temperature=float(generations > 1), top_p=1)


def write(workload: str, examples: Sequence[Example], dtype: str = "float32") -> Path:
    """Write a job: checkpoint, prompts, ids that end an answer, and the numbers of answers and tokens or the verdict tokens."""
    form = NativeFormat(Encoder.load(MODEL, settings(dtype).data), sampling(GENERATIONS[workload]))
    answers = NEW_TOKENS[workload] > 0
    mode = Mode.REASONING if answers else Mode.DIRECT
    requests = [Request(e, ("prompt_harm" if e.prompt_label else "response_harm",), mode) for e in examples]
    tokenizer = form.encoder.tokenizer
    ends = [i for i in range(len(tokenizer)) if workload == "lines" and "\n" in tokenizer.decode([i])]
    job: dict[str, Any] = {
        "model": str(MODEL),
        "dtype": dtype,
        "new_tokens": NEW_TOKENS[workload],
        "generations": GENERATIONS[workload],
        "stop_ids": [*form.stop_ids, *ends],
    }
    job["shared"] = [form.prompt(request).shared for request in requests]
    if answers:
        job |= {"prompts": [form.prompt(request).ids for request in requests], "pairs": []}
    else:
        points = [form.decision_points(request, "")[-1] for request in requests]
        job |= {
            "prompts": [point.prefix for point in points],
            "pairs": [[point.positive_id, point.negative_id] for point in points],
        }
    FOLDER.mkdir(parents=True, exist_ok=True)
    path = FOLDER / f"{workload}.json"
    path.write_text(json.dumps(job), encoding="utf-8")
    return path


def measure(job: Path, contenders: Sequence[str], rounds: int) -> dict[str, list[Result]]:
    """Run the rounds of all contenders, one after the other."""
    results: dict[str, list[Result]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name in contenders:
            command = [*CONTENDERS[name], str(job)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)  # noqa: S603 (our own)
            results[name].append(json.loads(done.stdout.splitlines()[-1]))
    return results


async def _do(job: dict[str, Any], backend: str) -> Result:
    how = sampling(job["generations"])
    if backend == "jax":
        local = load(Path(job["model"]), settings(job["dtype"]), how)
        result = await _answer(job, local)
        if job["new_tokens"]:
            before = local.prefix_cache.computed
            again = await _answer(job, local)
            least = bound(local.prefix_cache.model, local.prefix_cache.computed - before, again)
            prompts = await _answer({**job, "new_tokens": 1}, local)
            result = {**again, "first": result["seconds"], "prompts": prompts["seconds"], "bound": least}
        return result
    with serve(Path(job["model"]), "guard", FOLDER / "sglang.log", arguments=[f"--dtype={job['dtype']}"]) as server:
        async with open_sglang(server.url, "guard", how) as connected:
            return await _answer(job, connected)


def load(folder: Path, config: Config, evaluate: EvaluateConfig) -> JaxBackend:
    """A guard that rounds what it multiplies if the config says so, which those of jaxguard.load_guard do not."""
    spec, mesh = read_spec(folder), make_mesh(config.mesh)
    compute = choose_compute(config.model, spec, mesh, config.data.max_seq_len)
    weights = read_weights(folder, spec, weight_shardings(spec, mesh), compute.dtype)
    return JaxBackend(PrefixCache(place_model(spec, weights, compute, mesh)), evaluate, WARM_TOKENS)


async def _answer(job: dict[str, Any], backend: Backend) -> Result:
    started = time.perf_counter()
    await backend.declare([prompt[:shared] for prompt, shared in zip(job["prompts"], job["shared"], strict=True)])
    if job["new_tokens"]:
        sampled = await backend.sample(job["prompts"], job["generations"], job["new_tokens"], tuple(job["stop_ids"]))
        odds, answers = [], [list(completion.tokens) for completions in sampled for completion in completions]
    else:
        odds, answers = await backend.log_odds(job["prompts"], job["pairs"]), []
    return {"seconds": time.perf_counter() - started, "odds": odds, "answers": answers}


def bound(model: Model, prompt_tokens: int, result: Result) -> float:
    """The least seconds for the products of a result with the weights: no padding, no attention, no logits but of new tokens."""
    layers = sum(weight.size for path, weight in model.weights.items() if path.startswith(LAYER))
    new_tokens = sum(len(answer) + 1 for answer in result["answers"])
    terms = (prompt_tokens + new_tokens) * layers + new_tokens * model.weights["embed"].size
    square = jnp.ones((SIZE, SIZE), model.compute.operand_dtype)
    multiply = jax.jit(partial(jnp.matmul, preferred_element_type=jnp.float32))
    multiply(square, square).block_until_ready()
    seconds = []
    for _ in range(10):
        started = time.perf_counter()
        multiply(square, square).block_until_ready()
        seconds.append(time.perf_counter() - started)
    return terms * median(seconds) / SIZE**3


def table(workload: str, results: dict[str, list[Result]]) -> Table:
    """A row for each contender: medians over rounds, and the difference from the first."""
    first, *_ = results
    count = max(len(results[first][0]["odds"]), len(results[first][0]["answers"]))
    result = Table("contender", title=f"{count} {workload}", title_justify="left")
    same = (
        ("same answers", "tokens/s", "decoded/s", "of the bound", "first, s")
        if NEW_TOKENS[workload]
        else ("probabilities differ by", "log-odds by")
    )
    for heading in ("examples/s", f"{first} / this", *same):
        result.add_column(heading, justify="right")
    for name, runs in results.items():
        ratios = sorted(b["seconds"] / a["seconds"] for a, b in zip(results[first], runs, strict=True))
        seconds = median(run["seconds"] for run in runs)
        result.add_row(
            name,
            f"{count / seconds:.2f}",
            f"{median(ratios):.2f} [{ratios[0]:.2f}, {ratios[-1]:.2f}]",
            *(_answers if NEW_TOKENS[workload] else _odds)(results[first][0], runs[0]),
        )
    return result


def _odds(ours: Result, theirs: Result) -> tuple[str, ...]:
    a, b = np.array(ours["odds"]), np.array(theirs["odds"])
    furthest = np.abs(expit(a) - expit(b)).max()
    return f"{furthest:.1e}" + ("" if furthest <= TOLERANCE else " (differs)"), f"{np.abs(a - b).max():.1e}"


def _answers(ours: Result, theirs: Result) -> tuple[str, ...]:
    same = sum(a == b for a, b in zip(ours["answers"], theirs["answers"], strict=True))
    tokens = sum(map(len, theirs["answers"]))
    decoded = (tokens - len(theirs["answers"])) / (theirs["seconds"] - theirs.get("prompts", 0))
    share = f"{theirs['bound'] / theirs['seconds']:.0%}" if "bound" in theirs else ""
    return (
        f"{same} of {len(ours['answers'])}",
        f"{tokens / theirs['seconds']:.1f}",
        f"{decoded:.1f}" if "prompts" in theirs else "",
        share,
        f"{theirs['first']:.1f}" if "first" in theirs else "",
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
