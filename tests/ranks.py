"""Several gloo processes on this machine: one spawn runs a whole module's cases."""

import tempfile
import traceback
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def on_ranks(worker, world, *args):
    """worker(rank, *args) in `world` processes of one gloo group. The first rank's failure is
    raised here; those of the others are mostly that they lost it."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            mp.spawn(_start, (worker, world, folder, args), nprocs=world)
        except mp.ProcessRaisedException as error:
            failures = sorted(Path(folder).glob("failure*"), key=lambda p: p.stat().st_mtime_ns)
            first = failures[0].read_text() if failures else str(error)
            raise AssertionError(first) from None


def _start(rank, worker, world, folder, args):
    import tests.conftest  # noqa: F401  (Triton must find its interpreter switched on)

    torch.set_num_threads(1)
    torch.manual_seed(0)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", store, rank=rank, world_size=world)
    try:
        worker(rank, *args)
    except Exception:
        Path(folder, f"failure{rank}").write_text(f"rank {rank}\n{traceback.format_exc()}")
        raise
    dist.destroy_process_group()
