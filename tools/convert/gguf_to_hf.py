"""Convert a GGUF file of llama architecture to a Hugging Face folder, without torch.

GGUF keeps the weights (quantised or not), the shape, the tokenizer and the chat template in one file. Weights are
dequantised exactly; queries and keys get Hugging Face's row order back.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import einops
import ml_dtypes
import numpy as np
import yaml
from safetensors.numpy import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors

from jaxguard.models.spec import Spec, read_spec
from jaxguard.models.weights import Weight, table
from jaxguard.utils.errors import JaxguardError
from jaxguard.utils.files import whole_folder
from jaxguard.utils.versions import install

try:
    import gguf
except ModuleNotFoundError:
    raise SystemExit(f"error: gguf is not installed: {install('gguf')}") from None

DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}

# What llama.cpp's converter did to the rows of q_proj and k_proj for its interleaved rope, undone:
# its rows alternate between the two halves of a head, Hugging Face's hold one half after the other.
UNPERMUTE = "(heads half pair) d -> (heads pair half) d"

# Text is cut by these before byte-level BPE, by the file's tokenizer.ggml.pre.
_LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def gguf_to_hf(source: Path, output: Path, dtype: str = "float32", base_model: str | None = None) -> Path:
    """Write the model of a GGUF file as a Hugging Face folder.

    Args:
        source: a GGUF file of llama architecture with a byte-level BPE tokenizer.
        output: folder to create.
        dtype: "float32" holds dequantised values exactly; "bfloat16" rounds them.
        base_model: the repository on the hub that the file was made from, for the model card.

    Returns:
        The output folder.

    Raises:
        JaxguardError: not a GGUF file, another architecture, quantisation or tokenizer, a missing or misshapen tensor,
            an output folder that is not empty, or a full disk.
    """
    if dtype not in DTYPES:
        raise JaxguardError(f"dtype {dtype!r}: choose one of {', '.join(DTYPES)}")
    reader = _open(source)
    fields = _Fields(source, reader)
    tensors = {t.name: t for t in reader.tensors}
    values = sum(int(tensor.n_elements) for tensor in reader.tensors)
    with whole_folder(output, values * DTYPES[dtype].itemsize) as folder:
        _write_json(folder / "config.json", _config(fields, dtype, tied="output.weight" not in tensors))
        _write_json(folder / "generation_config.json", _generation_config(fields))
        spec = read_spec(folder)
        _tokenizer(fields).save(str(folder / "tokenizer.json"))
        _write_json(folder / "tokenizer_config.json", _tokenizer_config(fields))
        card = {"license": fields.get("general.license", "other"), **({"base_model": base_model} if base_model else {})}
        (folder / "README.md").write_text(
            f"---\n{yaml.safe_dump(card)}---\nConverted from {source.name}.\n", encoding="utf-8"
        )
        _write_weights(folder / "model.safetensors", source, spec, tensors, DTYPES[dtype])
    return output


def _open(source: Path) -> gguf.GGUFReader:
    if not source.is_file():
        raise JaxguardError(f"{source} does not exist")
    try:
        return gguf.GGUFReader(source)
    except (ValueError, KeyError, IndexError, OverflowError) as error:
        raise JaxguardError(f"{source} is truncated or not a GGUF file: {error}") from None


class _Fields:
    """The file's metadata, with errors that name the field."""

    def __init__(self, source: Path, reader: gguf.GGUFReader):
        self.source, self.reader = source, reader
        architecture = self["general.architecture"]
        if architecture != "llama":
            raise JaxguardError(f"{source}: architecture {architecture!r} is not supported; supported: 'llama'")

    def get(self, key: str, default: Any = None) -> Any:
        field = self.reader.fields.get(key)
        return default if field is None else field.contents()

    def __getitem__(self, key: str) -> Any:
        if key not in self.reader.fields:
            raise JaxguardError(f"{self.source} lacks the metadata field {key!r}")
        return self.get(key)


def _config(fields: _Fields, dtype: str, tied: bool) -> dict[str, Any]:
    """config.json in the spelling that transformers 4 and 5 both read."""
    scaling = fields.get("llama.rope.scaling.type", "none")
    if scaling != "none" or any(t.name == "rope_freqs.weight" for t in fields.reader.tensors):
        raise JaxguardError(
            f"{fields.source} scales its rope, which GGUF keeps only as a table: use the Hugging Face checkpoint"
        )
    width, heads = int(fields["llama.embedding_length"]), int(fields["llama.attention.head_count"])
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "mlp_bias": False,
        "hidden_act": "silu",
        "hidden_size": width,
        "intermediate_size": int(fields["llama.feed_forward_length"]),
        "num_hidden_layers": int(fields["llama.block_count"]),
        "num_attention_heads": heads,
        "num_key_value_heads": int(fields.get("llama.attention.head_count_kv", heads)),
        "head_dim": int(fields.get("llama.attention.key_length", width // heads)),
        "max_position_embeddings": int(fields["llama.context_length"]),
        # GGUF keeps the shortest decimal's float32; seven digits bring 1e-05 back.
        "rms_norm_eps": float(f"{fields['llama.attention.layer_norm_rms_epsilon']:.7g}"),
        "rope_theta": float(fields.get("llama.rope.freq_base", 10000.0)),
        "rope_scaling": None,
        "tie_word_embeddings": tied,
        "vocab_size": len(fields["tokenizer.ggml.tokens"]),
        "torch_dtype": dtype,
        **_special_ids(fields),
    }


def _special_ids(fields: _Fields) -> dict[str, int]:
    names = {"bos": "bos", "eos": "eos", "pad": "padding"}
    ids = {f"{ours}_token_id": fields.get(f"tokenizer.ggml.{theirs}_token_id") for ours, theirs in names.items()}
    return {name: int(value) for name, value in ids.items() if value is not None}


def _generation_config(fields: _Fields) -> dict[str, Any]:
    return {"_from_model_config": True, **_special_ids(fields)}


def _tokenizer(fields: _Fields) -> Tokenizer:
    """Byte-level BPE from the file's tokens and merges."""
    kind, pre = fields["tokenizer.ggml.model"], fields.get("tokenizer.ggml.pre", "default")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words = {
        "smollm": [pre_tokenizers.Digits(individual_digits=True), byte_level],
        "llama-bpe": [
            pre_tokenizers.Split(Regex(_LLAMA3_WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ],
    }
    if kind != "gpt2" or pre not in words:
        raise JaxguardError(
            f"{fields.source}: tokenizer {kind!r} with pre-tokenizer {pre!r} is not supported; "
            f"supported: 'gpt2' with {' or '.join(map(repr, words))}"
        )
    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ", 1)) for merge in fields["tokenizer.ggml.merges"]]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=pre == "llama-bpe"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(words[pre])
    tokenizer.decoder = decoders.ByteLevel()
    marked = list(zip(tokens, types, strict=True))
    control, user = gguf.TokenType.CONTROL, gguf.TokenType.USER_DEFINED
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t, k in marked if k == control])
    tokenizer.add_tokens([AddedToken(t, normalized=False) for t, k in marked if k == user])
    if fields.get("tokenizer.ggml.add_bos_token", pre == "llama-bpe"):
        bos = fields["tokenizer.ggml.bos_token_id"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[tokens[bos], "$A"], pair=[tokens[bos], "$A", "$B"], special_tokens=[(tokens[bos], int(bos))]
        )
    return tokenizer


def _tokenizer_config(fields: _Fields) -> dict[str, Any]:
    tokens = fields["tokenizer.ggml.tokens"]
    ids = _special_ids(fields)
    unknown = fields.get("tokenizer.ggml.unknown_token_id")
    named = {**ids, **({} if unknown is None else {"unk_token_id": int(unknown)})}
    template = fields.get("tokenizer.chat_template")
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": int(fields["llama.context_length"]),
        **{name.removesuffix("_id"): tokens[i] for name, i in named.items()},
        **({} if template is None else {"chat_template": template}),
    }


def _write_weights(path: Path, source: Path, spec: Spec, tensors: dict[str, Any], dtype: np.dtype) -> None:
    """Every tensor of the table, dequantised."""
    theirs = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, spec.num_layers)
    rows: dict[str, Weight] = {}
    for weight in table(spec):
        prefix = "" if weight.path == "lm_head" else "model."
        for i in range(spec.num_layers if weight.stacked else 1):
            rows[prefix + weight.hf.format(i=i)] = weight
    names = {name: f"{theirs.get_name(name.removesuffix('.weight'))}.weight" for name in rows}
    unknown = set(tensors) - set(names.values())
    if unknown:
        raise JaxguardError(f"{source} holds a tensor that this architecture does not have: {min(unknown)!r}")
    for name, weight in rows.items():
        if names[name] not in tensors:
            raise JaxguardError(f"{source} lacks the tensor {names[name]!r}")
        found, wanted = tuple(int(n) for n in reversed(tensors[names[name]].shape)), weight.hf_shape(spec)
        if found != wanted:
            raise JaxguardError(f"{source}: tensor {names[name]!r} has shape {found}, expected {wanted}")

    def value(name: str) -> np.ndarray:
        array = _dequantised(source, tensors[names[name]])
        heads = {"layers.q_proj": spec.num_heads, "layers.k_proj": spec.num_kv_heads}.get(rows[name].path)
        array = array if heads is None else einops.rearrange(array, UNPERMUTE, heads=heads, pair=2)
        return np.ascontiguousarray(array, dtype)

    save_file({name: value(name) for name in rows}, path, {"format": "pt"})


def _dequantised(source: Path, tensor: Any) -> np.ndarray:
    try:
        return gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False)
    except NotImplementedError:
        kind = tensor.tensor_type.name
        raise JaxguardError(f"{source}: tensor {tensor.name!r} is quantised as {kind}, which cannot be read") from None


def _write_json(path: Path, tree: dict[str, Any]) -> None:
    path.write_text(json.dumps(tree, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--source", type=Path, required=True, help="the GGUF file")
    parser.add_argument("--output", type=Path, required=True, help="folder to create")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="float32 is exact")
    parser.add_argument(
        "--base-model", metavar="OWNER/NAME", help="the repository it was made from, for the model card"
    )
    args = parser.parse_args()
    try:
        gguf_to_hf(args.source, args.output, args.dtype, args.base_model)
    except JaxguardError as error:
        parser.exit(2, f"error: {error}\n")
    print(f"wrote {args.output}")


if __name__ == "__main__":
    main()
