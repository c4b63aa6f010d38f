"""The memory of the teachers: arithmetic that the documentation shows."""

import pytest

import serving_memory
from generated import written
from serving_memory import GIB, MODELS, SHIPPED, TEACHERS, memory, read


def test_the_documented_tables_are_those_of_the_tool():
    assert written(serving_memory.DOCUMENT) == serving_memory.tables(), "run python tools/serving_memory.py"


@pytest.mark.parametrize(
    ("name", "billions", "tolerance"),
    [("DeepSeek-R1, FP8", 671.0, 0.1), ("Qwen3-32B, BF16", 32.8, 0.05), ("gpt-oss-120b, MXFP4", 116.83, 0.01)],
)
def test_shapes_give_the_published_parameter_counts(name, billions, tolerance):
    """arXiv 2412.19437, the model card of Qwen3-32B, and table 1 of gpt-oss's, which also says 60.8 GiB."""
    assert MODELS[name].parameters / 1e9 == pytest.approx(billions, abs=tolerance)
    assert MODELS["gpt-oss-120b, MXFP4"].size / GIB == pytest.approx(60.8, abs=0.05)


def test_every_teacher_file_is_in_the_tables():
    assert set(SHIPPED) == {path.stem for path in TEACHERS.glob("*.yaml")}


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_teacher_fits_and_leaves_what_sglang_would(name):
    """SGLang 0.5.23's own reserve on cards of 60 GB and more, arg_groups/memory_hook.py, without small change."""
    model, gpu = SHIPPED[name]
    teacher = read(name)
    estimate = memory(MODELS[model], gpu, teacher)
    graphs = 2 * (512 if teacher["tp-size"] >= 4 else 256) + (1536 if model.startswith("DeepSeek") else 0)
    assert estimate.outside / 1024**2 >= 512 + 8192 * 1.5 + teacher["tp-size"] / 8 * 1024 + graphs
    assert estimate.outside + estimate.weights + estimate.cache == pytest.approx(estimate.total)
    assert estimate.sequences > 64


def test_what_a_gpu_holds_whole_is_not_cut():
    r1, qwen = MODELS["DeepSeek-R1, BF16"], MODELS["Qwen3-32B, BF16"]
    wide, wider = ({"tp-size": tensor, "mem-fraction-static": 0.9} for tensor in (32, 64))
    assert memory(r1, "A100-80GB", wider).weights > memory(r1, "A100-80GB", wide).weights / 2
    assert memory(qwen, "A100-80GB", {"tp-size": 4, "mem-fraction-static": 0.9}).weights == qwen.size / 4


def test_a_latent_is_kept_by_every_gpu_and_heads_are_not():
    teacher = {"tp-size": 4, "mem-fraction-static": 0.9}
    for name, cut in (("DeepSeek-R1, FP8", 1), ("Qwen3-32B, BF16", 4)):
        estimate = memory(MODELS[name], "H200-141GB", teacher | {"tp-size": 4 if cut == 4 else 8})
        assert estimate.tokens == int(estimate.cache / (MODELS[name].cache / cut))


def test_copies_and_attention_groups_multiply_the_tokens():
    qwen, r1 = MODELS["Qwen3-32B, BF16"], MODELS["DeepSeek-R1, FP8"]
    two = {"tp-size": 2, "mem-fraction-static": 0.8}
    assert memory(qwen, "A100-80GB", two | {"dp-size": 4}).tokens == 4 * memory(qwen, "A100-80GB", two).tokens
    plain, grouped = ({"tp-size": 8, "mem-fraction-static": 0.85, "attn-dp-size": groups} for groups in (1, 8))
    one, eight = memory(r1, "H200-141GB", plain), memory(r1, "H200-141GB", grouped)
    assert eight.weights > one.weights + 9 * GIB
    assert eight.tokens > 5 * one.tokens


def test_what_does_not_fit_holds_no_token():
    estimate = memory(MODELS["DeepSeek-R1, FP8"], "H100-80GB", {"tp-size": 8, "mem-fraction-static": 0.9})
    assert estimate.cache < 0
    assert (estimate.tokens, estimate.sequences) == (0, 0)
    assert "does not fit" in serving_memory.tables()
