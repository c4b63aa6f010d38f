"""Rewrites the tables of docs/serving.md from public facts and the teachers of launch/sglang: `python tools/serving_memory.py`."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from generated import rewrite

ROOT = Path(__file__).resolve().parent.parent
DOCUMENT = ROOT / "docs" / "serving.md"
TEACHERS = ROOT / "launch" / "sglang" / "teachers"

GIB = 1024**3
BF16, INT8 = 2.0, 1.0
FP8 = 1 + 4 / 128**2
"""With a float32 scale for each 128×128 block."""
MXFP4 = (4 + 8 / 32) / 8
"""With an 8-bit scale for each 32 values."""
CONTEXT = GIB
"""The CUDA context and NCCL, before SGLang looks at what is free: a round guess."""
TOKENS = 4096
"""Tokens of the sequences that are counted, prompt and answer together."""

GPUS = {"A100-80GB": 81_920, "H100-80GB": 81_559, "H200-141GB": 143_771}
"""MiB of one, as nvidia-smi reports them."""


@dataclass(frozen=True)
class Part:
    """Some of a model's parameters.

    Attributes:
        count: how many.
        width: bytes of one.
        cut: over how many GPUs it is cut: all of a copy, those that share their attention, or none.
    """

    count: int
    width: float
    cut: Literal["tensor", "attention", "none"] = "tensor"


@dataclass(frozen=True)
class Model:
    """What serving it takes.

    Attributes:
        source: where the facts are from.
        parts: all weights.
        extra: what SGLang makes of the weights and keeps beside them.
        cache: bytes of one token's cache, all layers.
        formula: how they come about.
        heads: over how many GPUs that cache can be cut.
    """

    source: str
    parts: tuple[Part, ...]
    cache: int
    formula: str
    heads: int
    extra: tuple[Part, ...] = ()

    @property
    def parameters(self) -> int:
        return sum(part.count for part in self.parts)

    @property
    def size(self) -> float:
        return sum(part.count * part.width for part in self.parts)


def deepseek_r1(width: float) -> Model:
    """R1 with its matrices in `width` bytes; embeddings, head and routers are BF16.

    The layer for multi-token prediction (14B more in the checkpoint) is not loaded.
    """
    layers, D, heads, query, latent, rope, vocabulary = 61, 7168, 128, 1536, 512, 64, 129_280
    down = D * (query + latent + rope)  # whole on every GPU
    up = query * heads * (128 + rope) + heads * 128 * D
    absorbed = latent * heads * (128 + 128)
    dense, experts = 3 * 3 * D * 18_432, 58 * (256 + 1) * 3 * D * 2048
    return Model(
        source="config.json of deepseek-ai/DeepSeek-R1, arXiv 2412.19437",
        parts=(
            Part(layers * down, width, "none"),
            Part(layers * (up + absorbed), width, "attention"),
            Part(dense + experts, width),
            Part(58 * 256 * D, BF16, "none"),
            Part(2 * vocabulary * D, BF16),
        ),
        extra=(Part(layers * absorbed, BF16, "attention"),),
        cache=layers * (latent + rope) * 2,
        formula="61 layers × (512 latent + 64 rotary) × 2 bytes",
        heads=1,
    )


def qwen3_32b() -> Model:
    layers, D, heads, cached, head, vocabulary = 64, 5120, 64, 8, 128, 151_936
    attention = 2 * D * heads * head + 2 * D * cached * head
    return Model(
        source="config.json of Qwen/Qwen3-32B",
        parts=(Part(layers * (attention + 3 * D * 25_600) + 2 * vocabulary * D, BF16),),
        cache=2 * layers * cached * head * 2,
        formula="2 × 64 layers × 8 heads × 128 × 2 bytes",
        heads=cached,
    )


def gpt_oss_120b() -> Model:
    """Half its layers see 128 tokens only; counted are all as if they saw everything, so that a little more fits."""
    layers, D, heads, cached, head, experts, vocabulary = 36, 2880, 64, 8, 64, 128, 201_088
    attention = 2 * D * heads * head + 2 * D * cached * head
    return Model(
        source="config.json and model card of openai/gpt-oss-120b",
        parts=(
            Part(layers * experts * 3 * D * D, MXFP4),
            Part(layers * (attention + experts * 3 * D) + 2 * vocabulary * D, BF16),
            Part(layers * experts * D, BF16, "none"),
        ),
        cache=2 * layers * cached * head * 2,
        formula="2 × 36 layers × 8 heads × 64 × 2 bytes",
        heads=cached,
    )


MODELS = {
    "DeepSeek-R1, FP8": deepseek_r1(FP8),
    "DeepSeek-R1, BF16": deepseek_r1(BF16),
    "DeepSeek-R1, INT8": deepseek_r1(INT8),
    "Qwen3-32B, BF16": qwen3_32b(),
    "gpt-oss-120b, MXFP4": gpt_oss_120b(),
}

SHIPPED = {
    "deepseek-r1-h200": ("DeepSeek-R1, FP8", "H200-141GB"),
    "deepseek-r1-h100": ("DeepSeek-R1, FP8", "H100-80GB"),
    "deepseek-r1-a100": ("DeepSeek-R1, BF16", "A100-80GB"),
    "deepseek-r1-int8-a100": ("DeepSeek-R1, INT8", "A100-80GB"),
    "qwen3-32b": ("Qwen3-32B, BF16", "A100-80GB"),
    "gpt-oss-120b": ("gpt-oss-120b, MXFP4", "H100-80GB"),
}
"""Which weights a teacher file serves, and on what."""

OTHERS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("deepseek-r1-h200", "", {"attn-dp-size": 8, "mem-fraction-static": 0.75}),
    ("deepseek-r1-h100", "", {"attn-dp-size": 2, "mem-fraction-static": 0.73}),
    ("deepseek-r1-h100", "", {"nnodes": 1, "tp-size": 8}),
    ("deepseek-r1-a100", "", {"nnodes": 2, "tp-size": 16}),
    ("qwen3-32b", "", {"tp-size": 1, "dp-size": 8}),
    ("qwen3-32b", "", {"tp-size": 8, "dp-size": 1}),
    ("gpt-oss-120b", "", {"tp-size": 1, "dp-size": 8}),
    ("gpt-oss-120b", "A100-80GB", {}),
    ("gpt-oss-120b", "", {"tp-size": 8, "dp-size": 1}),
)
"""What else one may think of: a teacher, other GPUs, other arguments."""


@dataclass(frozen=True)
class Memory:
    """One GPU's memory, in bytes, and what a replica holds."""

    total: int
    outside: float
    weights: float
    cache: float
    tokens: int

    @property
    def sequences(self) -> int:
        return self.tokens // TOKENS


def memory(model: Model, gpu: str, teacher: dict[str, Any]) -> Memory:
    """SGLang fills `mem-fraction-static` of what it finds free with the weights and then with cache."""
    tensor, copies, groups = teacher["tp-size"], teacher.get("dp-size", 1), teacher.get("attn-dp-size", 1)
    cuts = {"tensor": tensor, "attention": tensor // groups, "none": 1}
    total = GPUS[gpu] * 1024**2
    static = (total - CONTEXT) * teacher["mem-fraction-static"]
    weights = sum(part.count * part.width / cuts[part.cut] for part in model.parts + model.extra)
    cache = static - weights
    token = model.cache / min(model.heads, tensor // groups)
    return Memory(total, total - static, weights, cache, max(0, int(cache / token)) * copies * groups)


def read(name: str) -> dict[str, Any]:
    return yaml.safe_load((TEACHERS / f"{name}.yaml").read_text(encoding="utf-8"))


def main() -> None:
    rewrite(DOCUMENT, tables())


def tables() -> str:
    return "\n".join(
        f"### {title}\n\n" + "\n".join(rows) + "\n"
        for title, rows in (
            ("The models", list(models())),
            ("The teachers of launch/sglang", list(teachers())),
            ("What else fits, and what does not", list(others())),
        )
    )


def models() -> Iterator[str]:
    yield "| weights | parameters | GB | GiB | cache of a token | bytes | facts from |"
    yield "|---|---|---|---|---|---|---|"
    for name, model in MODELS.items():
        yield (
            f"| {name} | {model.parameters / 1e9:.1f}B | {model.size / 1e9:.0f} | {model.size / GIB:.1f} "
            f"| {model.formula} | {model.cache:,} | {model.source} |"
        )


HEADER = (
    "| GPUs of a replica | GiB a GPU | weights | cache | outside | tokens in cache | sequences of 4k |",
    "|---|---|---|---|---|---|---|",
)


def teachers() -> Iterator[str]:
    yield f"| teacher {HEADER[0]}"
    yield f"|---{HEADER[1]}"
    for name, (weights, gpu) in SHIPPED.items():
        yield row(f"`{name}`", weights, gpu, read(name))


def others() -> Iterator[str]:
    yield f"| teacher, changed {HEADER[0]}"
    yield f"|---{HEADER[1]}"
    for name, other_gpu, changes in OTHERS:
        weights, gpu = SHIPPED[name]
        changed = ", ".join([*filter(None, [other_gpu]), *(f"{key} {value}" for key, value in changes.items())])
        yield row(f"`{name}`, {changed}", weights, other_gpu or gpu, read(name) | changes)


def row(title: str, weights: str, gpu: str, teacher: dict[str, Any]) -> str:
    found = memory(MODELS[weights], gpu, teacher)
    gpus = f"{teacher['tp-size'] * teacher.get('dp-size', 1)}×{gpu}"
    start = f"| {title} | {gpus} | {found.total / GIB:.1f} | {found.weights / GIB:.1f} "
    if found.cache <= 0:
        return f"{start}| does not fit | {found.outside / GIB:.1f} | 0 | 0 |"
    return f"{start}| {found.cache / GIB:.1f} | {found.outside / GIB:.1f} | {found.tokens:,} | {found.sequences:,} |"


if __name__ == "__main__":
    main()
