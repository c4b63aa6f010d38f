"""A checkpoint that says one text, whatever it is asked: a teacher that a real server loads, and whose answers are known.

Its weights are written by hand. Embeddings are one-hot, the only layer adds nothing, and the head's row of a token looks at the
token that it follows: each token of the vocabulary decides the next one.
"""

import itertools
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer

REASONING = (
    "<think>\n",
    "The user",
    " asks",
    " about",
    " bread",
    ", which",
    " no rule",
    " forbids",
    ".\n",
    "</think>\n\n",
)
QUESTION = "Prompt harm:"
RIGHT, WRONG = " unharmful", " harmful"
END = "<|eot_id|>"
CERTAIN = 1.0


def write_parrot(
    folder: Path, tokenizer: Path, write_config: Callable[..., Path], right: float, temperature: float
) -> Path:
    """A checkpoint that thinks, and then says RIGHT with a probability of `right` at that temperature, else WRONG."""
    shutil.copytree(tokenizer, folder)
    words = Tokenizer.from_file(str(folder / "tokenizer.json"))
    words.add_tokens([AddedToken(t, normalized=False) for t in (*REASONING, QUESTION, RIGHT, WRONG)])
    words.save(str(folder / "tokenizer.json"))
    first = words.encode("<|end_header_id|>\n\n").ids[-1]
    chain = [first, *(words.token_to_id(t) for t in (*REASONING, QUESTION))]
    last, said, missed, end = (words.token_to_id(t) for t in (QUESTION, RIGHT, WRONG, END))
    width = 64 * math.ceil(words.get_vocab_size() / 64)
    follows = np.zeros((words.get_vocab_size(), width), np.float32)
    for now, after in [*itertools.pairwise(chain), (said, end), (missed, end)]:
        follows[after, now] = CERTAIN
    # The norm before the head turns a one-hot vector into sqrt(width) of it.
    log_odds = temperature * math.log(right / (1 - right)) / math.sqrt(width)
    follows[[said, missed], last] = CERTAIN, CERTAIN - log_odds
    heads = width // 64
    write_config(
        folder,
        llama3_rope=False,
        vocab_size=words.get_vocab_size(),
        hidden_size=width,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=64,
    )
    layer = "model.layers.0."
    zeros = {
        **{f"{layer}self_attn.{name}_proj.weight": (width, width) for name in "qkvo"},
        **{f"{layer}mlp.{name}_proj.weight": (64, width) for name in ("gate", "up")},
        f"{layer}mlp.down_proj.weight": (width, 64),
    }
    ones = ("model.norm.weight", f"{layer}input_layernorm.weight", f"{layer}post_attention_layernorm.weight")
    weights = {
        "model.embed_tokens.weight": np.eye(words.get_vocab_size(), width, dtype=np.float32),
        "lm_head.weight": follows,
        **{name: np.zeros(shape, np.float32) for name, shape in zeros.items()},
        **{name: np.ones(width, np.float32) for name in ones},
    }
    save_file(weights, str(folder / "model.safetensors"), metadata={"format": "pt"})
    return folder
