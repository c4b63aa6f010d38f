"""The private parts of libraries that jaxguard.compat uses are still there, and still needed."""

import inspect

from jax._src.cudnn import fused_attention_stablehlo

from jaxguard.compat import cudnn_attention_on_any_gpu


def test_cudnn_check_is_replaced_and_put_back():
    check = fused_attention_stablehlo.check_compute_capability
    assert list(inspect.signature(check).parameters) == ["capability"]
    assert "check_compute_capability(" in inspect.getsource(fused_attention_stablehlo.check_is_flash_attention)
    with cudnn_attention_on_any_gpu():
        assert fused_attention_stablehlo.check_compute_capability("9.0") is True
    assert fused_attention_stablehlo.check_compute_capability is check
