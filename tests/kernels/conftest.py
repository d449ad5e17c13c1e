"""Programs of a grid in another order: on a GPU there is none to rely on."""

import random

import pytest


@pytest.fixture
def shuffled(monkeypatch):
    """The interpreter runs the programs of every grid in an order drawn anew."""
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    builder, drawn = interpreter.interpreter_builder, random.Random(0)
    plain, order = builder.set_grid_idx, []

    def set_grid_idx(x, y, z):
        sizes = builder.grid_dim
        if x == y == z == 0:
            order[:] = range(sizes[0] * sizes[1] * sizes[2])
            drawn.shuffle(order)
        i = order[(x * sizes[1] + y) * sizes[2] + z]
        plain(i // (sizes[1] * sizes[2]), i // sizes[2] % sizes[1], i % sizes[2])

    monkeypatch.setattr(builder, "set_grid_idx", set_grid_idx)
    return order
