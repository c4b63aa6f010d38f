"""The private parts of libraries that jaxguard.compat uses are still there, and still needed."""

import inspect

import jax
import jax.numpy as jnp
import pytest
from jax._src.cudnn import fused_attention_stablehlo
from jax.experimental.pallas.ops.tpu import splash_attention

from jaxguard.compat import cudnn_attention_on_any_gpu, mark_mask_as_dynamic


def run_splash(prepare):
    """Trace splash attention with a mask that is an argument of the traced function."""

    def attend(q_NTH, mask_NTT):
        kernel = splash_attention.make_splash_mha(mask_NTT, head_shards=1, q_seq_shards=1, interpret=True)
        prepare(kernel)
        return kernel(q_NTH, q_NTH, q_NTH)

    q_NTH, mask_NTT = (jax.ShapeDtypeStruct((2, 128, 128), dtype) for dtype in (jnp.float32, jnp.bool_))
    return jax.eval_shape(attend, q_NTH, mask_NTT)


def test_splash_needs_the_flag_under_a_trace():
    """When the first part fails, JAX no longer needs it: delete mark_mask_as_dynamic. It came with 0.10.2."""
    if jax.__version_info__ >= (0, 10, 2):
        with pytest.raises(jax.errors.TracerBoolConversionError):
            run_splash(lambda kernel: None)
    assert run_splash(mark_mask_as_dynamic).shape == (2, 128, 128)


def test_cudnn_check_is_replaced_and_put_back():
    check = fused_attention_stablehlo.check_compute_capability
    assert list(inspect.signature(check).parameters) == ["capability"]
    assert "check_compute_capability(" in inspect.getsource(fused_attention_stablehlo.check_is_flash_attention)
    with cudnn_attention_on_any_gpu():
        assert fused_attention_stablehlo.check_compute_capability("9.0") is True
    assert fused_attention_stablehlo.check_compute_capability is check
