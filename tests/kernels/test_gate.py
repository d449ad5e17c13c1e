"""The compile gate's count of what a step multiplies."""

from riskpo_kernels.kernels.compile_check import multiply_adds

STEP = "/*0e30*/  HGMMA.64x256x16.F32.BF16 R24, gdesc[UR16], R24, gsb0 ;\n"


def test_double_work_is_seen():
    """A tile of 128 x 256 x 64 by two groups of 4 warps: four instructions of each, not eight."""
    tile = 128 * 256 * 64
    assert multiply_adds(4 * STEP) * 2 == tile
    assert multiply_adds(8 * STEP) * 2 == 2 * tile
    assert multiply_adds("/*0e30*/ WARPGROUP.ARRIVE ;\n") == 0
