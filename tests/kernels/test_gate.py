"""The compile gate: what it counts, what it calls a fault; it compiles what is launched."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from riskpo_kernels.kernels import compile_check as gate
from riskpo_kernels.kernels.machine_code import Count, instructions, multiply_adds
from tests.conftest import has_triton

ROOT = Path(__file__).resolve().parents[2]
STEP = "/*0e30*/  HGMMA.64x256x16.F32.BF16 R24, gdesc[UR16], R24, gsb0 ;\n"
TILE = {"BM": 128, "BN": 256, "BK": 64, "inner": None}
GOOD = gate.Compiled("forward-hopper-dot-tma bf16", 90, 255, 0, 197_152, 4, 8, 11.4, "")
# four tiles' worth of a loop: a step, a jump over the end of a tile, in it one over the targets
SASS = """
.text.statistics_kernel:
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_3:
        /*0010*/                   HGMMA.64x256x16.F32.BF16 R24, gdesc[UR16], R24, gsb0 ;
        /*0020*/              @P0  BRA `(.L_x_1) ;
        /*0030*/                   MUFU.EX2 R8, R9 ;
        /*0040*/             @!P1  BRA `(.L_x_2) ;
        /*0050*/                   FSEL R4, R5, RZ, P2 ;
.L_x_2:
        /*0060*/                   FADD R7, R8, R7 ;
        /*0070*/                   STG.E desc[UR4][R2.64], R7 ;
.L_x_1:
        /*0080*/              @P3  BRA `(.L_x_3) ;
        /*0090*/                   EXIT ;
        /*00a0*/                   NOP ;
"""


def test_instructions_by_hand():
    """10 in all, 8 in the loop, 5 after a tile's last step, 4 of them unless a target is there."""
    assert instructions(SASS) == Count(whole=10, loop=8, tail=5, usual=4)
    assert gate.per_logit("forward-x-dot bf16", SASS, {"BM": 1, "BN": 64}, 1) == 4 / 2
    assert gate.per_logit("rows bf16", SASS, {"BV": 64}, 1) == 8 / 2
    assert gate.per_logit("finish NB=8", SASS, {}, 4) == 0.0


def test_a_right_kernel_passes():
    assert gate.fault_of(GOOD, TILE, 128 * 256 * 64) == ""


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"spill_bytes": 8}, "register spills"),
        ({"shared_bytes": 232_449}, "shared memory"),
        ({"matrix": 0}, "no HGMMA"),
        ({"bulk_copies": 0}, "no UTMALDG"),
        ({"per_logit": 20.1}, "20.1 instructions per logit, of 20"),
        ({"name": "rows bf16", "per_logit": 26.1}, "26.1 instructions per logit, of 26"),
        ({"arch": "gfx942", "matrix": 0, "shared_bytes": 0}, "no v_mfma"),
        ({"arch": 86, "shared_bytes": 101_377}, "shared memory"),
    ],
    ids=str,
)
def test_every_planted_fault_is_seen(changes, said):
    assert said in gate.fault_of(GOOD._replace(**changes), TILE, 128 * 256 * 64)


def test_double_work_is_seen():
    """A tile of 128 x 256 x 64 by two groups of 4 warps: four instructions of each, not eight."""
    tile = 128 * 256 * 64
    assert multiply_adds(4 * STEP) * 2 == tile
    assert "multiply-adds" in gate.fault_of(GOOD, TILE, multiply_adds(8 * STEP) * 2)
    assert multiply_adds("/*0e30*/ WARPGROUP.ARRIVE ;\n") == 0


def test_the_usual_gate_compiles_every_kernel_for_every_architecture():
    """One whole, the others in one configuration of each kernel; AMD's among them."""
    said = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert re.search(r"GATE=.--arch 90", said)
    quick = re.search(r"--quick --arch (.+)", said)[1].split()
    assert {"80", "86", "89", "100", "120", "gfx942", "gfx950"} <= set(quick)
    every = {gate.kind_of(c.name) for m in gate.MODULES for c in gate.configurations(m)}
    for arch in map(gate.arch_of, quick):
        jobs = gate.first_of_each(gate.jobs_for([arch], ""))
        kinds = {gate.kind_of(gate.configurations(m)[i].name) for m, i, _ in jobs}
        assert {k.split("-")[0] for k in kinds} == {k.split("-")[0] for k in every}, arch
    from riskpo_kernels.kernels.head_tile import FORWARDS

    for kind in ("forward", "dense"):
        assert {k.split("-")[1] for k in every if k.startswith(kind)} == FORWARDS.keys()


LAUNCHES = """
import torch, triton
if {hip}:
    torch.version.hip = "7.0"
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from riskpo_kernels.kernels.compile_check import aligned

class Driver:  # enough of a driver for the JIT to form its keys
    def get_current_device(self): return 0
    def get_current_stream(self, device): return 0
    def get_current_target(self): return GPUTarget({target})

driver.set_active(Driver())
launched = {{}}
def compiled(*, fn, compile, **rest):
    got = {{i for (i,), told in compile["configs"][0].items() if ["tt.divisibility", 16] in told}}
    ways = [aligned(fn.jit_function, compile["signature"], ragged) for ragged in (False, True)]
    name = fn.name.rpartition(".")[2]
    launched.setdefault(name, []).append(
        ({hip} or got in ways, any("tensordesc" in x for x in compile["signature"].values()))
    )
    return True  # says: somebody else has it, do not compile
knobs.runtime.jit_cache_hook = compiled

from dataclasses import replace
from riskpo_kernels.lm_head import backward
from riskpo_kernels.core.low_rank import LowRank
from riskpo_kernels.core.softmax import ActiveBlocks
from riskpo_kernels.lm_head.ways import find_ways
from riskpo_kernels.core.matmul import Head, Options
from riskpo_kernels.lm_head.triton_forward import triton_forward
from riskpo_kernels.lm_head import sparse_triton, support_triton
from riskpo_kernels.kernels.softmax_rows import gradient, row_statistics
from riskpo_kernels.core.matmul import Products
from riskpo_kernels.core.gradient import RowGradient
from riskpo_kernels.core.softmax import LogitMap, RawTile
from riskpo_kernels.kernels import divergence_tiles

Products.into = lambda self, out, a, b: out.zero_()  # a key needs no numbers
Products.add = lambda self, out, a, b, apart=False: None
sparse_triton.FEWEST_TILES, sparse_triton.EVEN = 2, 10**9  # heavy blocks are divided
for vocab in (1000, 1024):
    n, h, w, b = 333, torch.randn(333, 64).half(), torch.randn(vocab, 64).half(), torch.randn(vocab)
    head = Head(h, w, b, None, torch.randint(vocab, (n,)), LogitMap(1.0, None, torch.ones(n)))
    c = torch.ones(n)
    for deterministic in (False, True):
        o = Options(1.0, None, 1.0, True, "triton", 0.7, 1e-4, deterministic, False)
        triton_forward(h, w, b, head.target, head.map, None, None, o)
        active = ActiveBlocks.new(vocab, n, h.device)
        active.bits.fill_(255)
        active.dense[: n // 2] = True  # rows of both ways
        ways = find_ways(c != 0, active, vocab, 300)
        for needs in ((True, True, True), (False, False, True)):
            up = RowGradient(c, c, c, c, c)
            backward.backward_rows(head, up, active, ways, needs, o)
        low = LowRank(torch.randn(len(h), 9), torch.randn(vocab, 9), h.dtype)
        triton_forward(h, w, b, head.target, head.map, None, None, o, low)
        adapted, wide = replace(head, low_rank=low), dict(wide_dh=True, wide_dw=True)
        backward.backward_rows(adapted, up, active, ways, (True, True, True), o, **wide)
    raw = torch.randn(n, vocab).half()
    row_statistics(raw, head.target, head.map, [torch.empty(n)] * 5)
    gradient(raw, head.target, None, up, head.map, raw)
    tensors = (h, w, b, head.target, None, torch.randint(vocab, (n, 5)), None)
    x = support_triton.forward(tensors, head.map, -100, None, True)[-1]
    support_triton.backward([True] * 3, tensors, head.map, -100, None, x, up)
    p, numbers = RawTile(torch.randn(n, vocab), b, head.map), torch.randn(6, n)
    for side in (p, p._replace(bias=None, map=LogitMap(1.0, 5.0, 1.0))):
        divergence_tiles.statistics("jsd", side, side, torch.empty(4, 9, n), 1)
        divergence_tiles.mixture(0.5, side, side, numbers, torch.empty(4, 9, n), 1)
        sums = torch.empty(21, vocab) if side.bias is not None else None
        divergence_tiles.gradient("jsd", 0.5, side, side, numbers, p.raw.half(), sums)
print(launched)
"""


@pytest.mark.skipif(not has_triton(), reason="needs triton")
@pytest.mark.parametrize("target", ['"cuda", 90, 32', '"hip", "gfx942", 64'])
def test_what_is_compiled_is_what_is_launched(target):
    """The JIT's own words on divisible sizes, with D = 1 among them (dbias alone), are the gate's.
    On an AMD GPU no option is passed that its compiler does not know, and no tensor map is made."""
    hip = "hip" in target
    script = LAUNCHES.format(hip=hip, target=target)
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = eval(done.stdout.strip().splitlines()[-1])
    names = {"_rows_kernel", "_gradient_kernel", "statistics_kernel", "finish_kernel"}
    names |= {f"divergence_{x}_kernel" for x in ("statistics", "mixture", "gradient")}
    names |= {"dz_kernel", "dh_kernel", "gather_kernel", "dw_kernel", "fold_kernel", "dense_kernel"}
    names |= {"pair_logits_kernel", "pair_rows_kernel", "pair_dz_kernel", "segment_kernel"}
    assert found.keys() == names
    for name, launches in found.items():
        assert all(same for same, _ in launches), name
    for name in ("statistics_kernel", "dense_kernel"):
        assert {maps for _, maps in found[name]} == {not hip}
