"""Small programs in XLA's own words, whose counts are worked out by hand."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxguard.plan.hlo import CompiledProgram, describe
from jaxguard.utils.errors import JaxguardError

LOOP = Path(__file__).with_name("loop.hlo").read_text()
MESH = {"data": 1, "fsdp": 8, "tensor": 1}


def test_a_loops_body_counts_as_often_as_it_runs_and_a_branch_by_its_share():
    product, local, full = 2 * 16 * 8 * 32, 2 * 4 * 4 * 8, 2 * 8 * 8 * 4
    assert CompiledProgram(LOOP, [5 / 6, 1 / 6]).matmul_flops() == pytest.approx(6 * product + 5 * local + 1 * full)


def test_a_loop_without_a_trip_count_runs_until_its_counter_reaches_its_limit():
    """A TPU's program."""
    text = LOOP.replace(', backend_config={"known_trip_count":{"n":"6"}}', "")
    counter = (
        "  %limit = s32[]{:T(128)} constant(6)\n  %count = s32[] get-tuple-element(%state.1), index=0\n"
        "  ROOT %go = pred[] compare(%count, %limit), direction=LT\n"
    )
    stated = text.replace("  ROOT %go = pred[] constant(true)\n", counter)
    assert CompiledProgram(stated).matmul_flops() == CompiledProgram(LOOP).matmul_flops()
    twice = "  %two = s32[] constant(2)\n  %more = s32[] add(%branch, %two)\n  ROOT %next ="
    unrolled = stated.replace("  ROOT %next =", twice).replace("tuple(%branch,", "tuple(%more,").replace("(6)", "(12)")
    assert CompiledProgram(unrolled).matmul_flops() == CompiledProgram(LOOP).matmul_flops()
    with pytest.raises(JaxguardError, match=r"loop loop"):
        CompiledProgram(text)


def test_a_loop_whose_limit_is_data_counts_once():
    """Attention in blocks, on a CPU."""
    text = LOOP.replace(', backend_config={"known_trip_count":{"n":"6"}}', "")
    limits = (
        "  %count = s32[] get-tuple-element(%state.1), index=0\n  %limit = s32[] get-tuple-element(%state.1), index=1\n"
        "  ROOT %go = pred[] compare(%count, %limit), direction=LT\n"
    )
    counted = CompiledProgram(text.replace("  ROOT %go = pred[] constant(true)\n", limits)).matmul_flops()
    assert 6 * counted == CompiledProgram(LOOP).matmul_flops()


def test_a_gather_is_counted_where_it_starts_and_sends_all_but_its_own_part():
    (gather,) = CompiledProgram(LOOP).collectives(MESH, linked=8)
    assert (gather.kind, gather.axes, gather.group, gather.near, gather.count) == ("all-gather", "fsdp", 8, 8, 6)
    assert gather.size == 32 * 8 * 2
    assert gather.sent == 6 * 32 * 8 * 2 * 7 / 8
    assert gather.source == "forward: convert_element_type"


def test_a_gather_is_hidden_if_products_run_before_its_end():
    (gather,) = CompiledProgram(LOOP).collectives(MESH, linked=8)
    assert (gather.count, gather.hidden) == (6, 0), "the product comes after its end"
    end = "  %gathered = bf16[32,8]{1,0} all-gather-done(%gather)\n"
    product = "  %earlier = f32[16,16]{1,0} dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={1}\n"
    (gather,) = CompiledProgram(LOOP.replace(end, product + end)).collectives(MESH, linked=8)
    assert (gather.count, gather.hidden) == (6, 6)
    (gather,) = CompiledProgram(LOOP.replace(end, end + product)).collectives(MESH, linked=8)
    assert gather.hidden == 0


def test_a_collective_that_runs_beside_several_fusions_is_one():
    again = "  %again = bf16[32,8]{1,0} all-gather(%w), channel_id=1, replica_groups=[1,8]<=[8], dimensions={0}\n"
    (gather,) = CompiledProgram(LOOP.replace("  %product =", f"{again}  %product =")).collectives(MESH, linked=8)
    assert gather.count == 6


def test_devices_of_several_hosts_are_fewer_near_ones():
    (gather,) = CompiledProgram(LOOP).collectives(MESH, linked=4)
    assert (gather.group, gather.near) == (8, 4)


def test_a_reduction_that_a_tpu_fuses_with_a_slice_sends_half_of_one_that_is_not():
    fused = """\
%all-reduce-scatter (input: bf16[32,8]) -> bf16[4,8] {
  %input = bf16[32,8]{1,0} parameter(0)
  %sum = bf16[32,8]{1,0} all-reduce(%input), channel_id=2, replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%add
  %zero = s32[] constant(0)
  ROOT %own = bf16[4,8]{1,0} dynamic-slice(%sum, %zero, %zero), dynamic_slice_sizes={4,8}
}

%body ("""
    call = "  %scattered = bf16[4,8]{1,0} fusion(%gathered), kind=kCustom, calls=%all-reduce-scatter\n  %product ="
    text = LOOP.replace("%body (", fused, 1).replace("  %product =", call)
    scatter = next(c for c in CompiledProgram(text).collectives(MESH, linked=8) if c.kind != "all-gather")
    assert (scatter.kind, scatter.axes, scatter.count) == ("reduce-scatter", "fsdp", 6)
    assert scatter.sent == 6 * 32 * 8 * 2 * 7 / 8
    alone = text.replace("%all-reduce-scatter", "%fused_sum")
    reduce = next(c for c in CompiledProgram(alone).collectives(MESH, linked=8) if c.kind != "all-gather")
    assert (reduce.kind, reduce.sent) == ("all-reduce", 2 * scatter.sent)


@pytest.mark.parametrize(
    ("kind", "transfer", "whole", "sent"),
    [("all-reduce", "ALL_REDUCE", 1, 2 * 3 / 4), ("all-gather", "ALL_GATHER", 4, 3)],
)
def test_slices_exchange_what_their_devices_send_to_their_hosts(kind, transfer, whole, sent):
    """A TPU's program; every device sends its part of the array to its own host, and hosts do the rest."""
    send = (
        "  %send = (bf16[32,8]{1,0}, u32[], token[]) send(%gathered, %token), channel_id=9, is_host_transfer=true, "
        f'frontend_attributes={{_xla_megascale_transfer_type="{transfer}"}}\n'
        "  %done = token[] send-done(%send), channel_id=9, is_host_transfer=true\n"
    )
    collectives = CompiledProgram(LOOP.replace("  %product =", f"{send}  %product =")).collectives(
        {**MESH, "data": 4}, linked=8
    )
    (between,) = [c for c in collectives if c.source == "between slices"]
    assert (between.kind, between.axes, between.group, between.near, between.count) == (kind, "data", 4, 1, 6)
    assert between.size == whole * 32 * 8 * 2
    assert between.sent == pytest.approx(6 * sent * 32 * 8 * 2)


@pytest.mark.parametrize(
    ("groups", "axes"),
    [
        ("[2,4]<=[8]", "tensor"),
        ("[4,2]<=[2,4]T(1,0)", "data"),
        ("{{0,1,2,3},{4,5,6,7}}", "tensor"),
        ("[1,8]<=[8]", "data+tensor"),
        ("mesh['axis_0'=4,'axis_1'=2], device_ids=([2,4]T(1,0)) {'axis_1'}", "data"),
        ("mesh['axis_0'=4,'axis_1'=2], device_ids=([2,4]T(1,0)) {'axis_0'}", "tensor"),
        ("{{0,5},{1,4},{2,7},{3,6}}", "data+tensor"),
    ],
)
def test_groups_are_named_by_their_axis(groups, axes):
    text = LOOP.replace("mesh['axis_0'=8,'axis_1'=1] {'axis_0'}", groups)
    (gather,) = CompiledProgram(text).collectives({"data": 2, "fsdp": 1, "tensor": 4}, linked=8)
    assert gather.axes == axes


def test_a_batched_product_of_a_tpu_is_a_convolution_most_of_whose_positions_are_holes():
    text = """\
ENTRY %main (a: bf16[8,16,32], b: bf16[8,32,64]) -> bf16[8,16,64] {
  %a = bf16[8,16,32]{2,1,0} parameter(0)
  %b = bf16[8,32,64]{2,1,0} parameter(1)
  ROOT %c = bf16[8,16,64]{2,1,0} convolution(%a, %b), window={size=8 stride=7 pad=0_0 lhs_dilate=8}, dim_labels=0bf_0io->0bf
}
"""
    assert CompiledProgram(text).matmul_flops() == 2 * 8 * 16 * 32 * 64


def test_a_scan_on_this_machine_is_counted_as_its_equation_says():
    """The CPU's program: products in a loop, a slice of stacked weights in each turn."""

    def run(x, weights):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0]

    x, weights = jnp.ones((16, 32)), jnp.ones((5, 32, 32))
    program = CompiledProgram(jax.jit(run).lower(x, weights).compile().as_text())
    assert program.matmul_flops() == 5 * 2 * 16 * 32 * 32
    assert program.collectives(MESH, 8) == []
    once = weights.nbytes + 5 * x.nbytes
    assert once <= program.traffic() <= 6 * once, "slices are read, not all weights in every turn"


def test_a_kernel_within_a_kernel_that_slices_reads_the_slice():
    """A TPU's program nests fusions."""
    text = """\
%inner (n: s32[], stack: bf16[34,8,16]) -> bf16[1,8,16] {
  %stack = bf16[34,8,16]{2,1,0} parameter(1)
  %n = s32[] parameter(0)
  ROOT %layer = bf16[1,8,16]{2,1,0} dynamic-slice(%stack, %n, %n, %n), dynamic_slice_sizes={1,8,16}
}

%outer (stacked: bf16[34,8,16], i: s32[]) -> bf16[1,8,16] {
  %stacked = bf16[34,8,16]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  %slice = bf16[1,8,16]{2,1,0} fusion(%i, %stacked), kind=kLoop, calls=%inner
  ROOT %twice = bf16[1,8,16]{2,1,0} add(%slice, %slice)
}

ENTRY %main (a: bf16[34,8,16], b: s32[]) -> bf16[1,8,16] {
  %a = bf16[34,8,16]{2,1,0} parameter(0)
  %b = s32[] parameter(1)
  ROOT %c = bf16[1,8,16]{2,1,0} fusion(%a, %b), kind=kLoop, calls=%outer
}
"""
    layer = 8 * 16 * 2
    assert layer * 2 <= CompiledProgram(text).traffic() <= layer * 2 + 12


def test_the_largest_arrays_are_named():
    largest = CompiledProgram(LOOP).largest(1)[0]
    assert largest.result == "bf16[32,8]"
    assert np.prod(largest.arrays[0][1]) * 2 == largest.bytes


@pytest.mark.parametrize(
    ("op_name", "source"),
    [
        ("jit(step)/jvp(while)/body/attention/dot_general", "forward attention: dot_general"),
        ("jit(step)/jvp(embed)/gather", "forward embed: gather"),
        ("jit(step)/transpose(jvp(while))/body/checkpoint/rematted_computation/mlp/tanh", "recomputed mlp: tanh"),
        ("jit(step)/transpose(jvp(loss))/head/dot_general", "backward head: dot_general"),
        ("jit(step)/transpose(jvp())/while/body/dot_general", "backward: dot_general"),
        ("jit(step)/optimizer/mul", "optimizer: mul"),
        ("jit(step)/convert_element_type", "step: convert_element_type"),
    ],
)
def test_an_operation_is_named_by_its_pass_and_scope(op_name, source):
    assert describe(op_name) == source
