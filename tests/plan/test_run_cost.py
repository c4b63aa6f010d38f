"""A whole run, counted from its config, or from local data."""

from collections import Counter

import jax.numpy as jnp
import pytest

from jaxguard.config import load
from jaxguard.data.packing import Schedule, Shape
from jaxguard.data.prepare import prepare
from jaxguard.models.attention.kernels import Layout
from jaxguard.plan.run_cost import RunCost, run_cost, skipped_blocks


def test_a_whole_run_is_counted_from_its_config():
    cost = run_cost(load("gemma4b_5k"), 8, price=2.5)
    assert cost.steps == 781
    assert cost.describe(36.0, 8) == "781 steps, 7.81 h, 62.5 device-hours, $156.20"
    assert "data.subset" in run_cost(load("gemma4b_full"), 8).describe(1.0, 8)
    assert run_cost(load("gemma4b_full", ["train.max_steps=5"]), 8).steps == 5
    assert cost.programs.startswith("unknown")


def test_local_data_give_every_shape(tiny_files, tmp_path, tiny_checkpoint):
    config = load(str(tiny_files(tmp_path)))
    cost = run_cost(config, devices=2)
    assert cost.steps == 12
    schedule = Schedule(prepare(config, tiny_checkpoint).train, 8, 12, 512, 2, config.seed)
    assert cost.shapes == Counter(schedule.shape(step) for step in range(12))
    assert all(shape.rows % 2 == 0 for shape in cost.shapes)
    assert cost.programs.startswith(f"{len(cost.shapes)}: ")
    assert 0 < len(cost.layouts) <= 8
    assert 0 < skipped_blocks(cost.layouts, [None], 16, 16) < 1


def test_blocks_that_trees_and_windows_leave_out_are_counted():
    index = jnp.arange(64)[None]
    one = Layout(jnp.full_like(index, 63), index)
    two = Layout(jnp.where(index < 32, 31, 63), index % 32)
    # Of ten blocks of 16 queries and as many keys, one sequence needs all, two sequences three each.
    assert skipped_blocks([one], [None], 16, 16) == 0
    assert skipped_blocks([two], [None], 16, 16) == pytest.approx(0.4)
    assert skipped_blocks([one, two], [None], 16, 16) == pytest.approx(0.2)
    # A window of 16 reaches the block before a query's own.
    assert skipped_blocks([one], [None, 16], 16, 16) == pytest.approx(3 / 20)


def test_the_commonest_shapes_are_named():
    shapes = {Shape(8 * n, 2048, 64 * n): n for n in range(1, 7)}
    text = RunCost(21, None, shapes).programs
    assert text.startswith("6: 48 rows of 2,048 tokens, 384 targets (6 steps); 40 rows of 2,048 tokens, 320 targets")
    assert text.endswith("(3 steps); 2 more")
    assert RunCost(21, None, shapes).largest == Shape(48, 2048, 384)
    assert RunCost(21).largest is None
