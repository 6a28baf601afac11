"""Two processes that train together, through gloo or NCCL, and do what tests send them."""

import importlib
import multiprocessing as mp
import os
import pickle
import traceback
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.utils._pytree import tree_map_only

START = 300  # seconds for the imports
WAIT = 90  # seconds; who takes longer hangs


def backends():
    """gloo on CPUs, and NCCL where each process gets a GPU of its own."""
    two = torch.cuda.device_count() >= 2 and dist.is_nccl_available()
    return ["gloo", *["nccl"] * two]


def here():
    """The device of this process: with NCCL its GPU, else the CPU."""
    nccl = dist.is_initialized() and dist.get_backend() == "nccl"
    return torch.device("cuda", dist.get_rank()) if nccl else torch.device("cpu")


class Pair:
    """Call it with a function and its arguments: both processes run it, results come as a list.

    Args:
        module: where the functions are, for the processes to import at their start.
    """

    def __init__(self, folder, backend, module):
        self.folder, self.backend, self.module = folder, backend, module
        self.starts, self.running = 0, []

    def __call__(self, func, *args, **kwargs):
        if not self.running:
            self._start()
        for _, pipe in self.running:
            pipe.send(pickle.dumps((func, args, kwargs)))
        results = []
        for rank, (_, pipe) in enumerate(self.running):
            if not pipe.poll(WAIT):
                self.stop()
                raise TimeoutError(f"process {rank} hangs")
            fine, result = pickle.loads(pipe.recv())
            if not fine:
                self.stop()
                raise AssertionError(f"process {rank}: {result}")
            results.append(result)
        return results

    def stop(self):
        for process, _ in self.running:
            process.kill()
            process.join()
        self.running = []

    def _start(self):
        context, self.starts = mp.get_context("spawn"), self.starts + 1
        for rank in range(2):
            ours, theirs = context.Pipe()
            where = f"file://{self.folder}/store{self.starts}"
            given = rank, where, self.backend, self.module, theirs
            process = context.Process(target=_serve, args=given, daemon=True)
            process.start()
            self.running.append((process, ours))
        if not all(pipe.poll(START) and pipe.recv() for _, pipe in self.running):
            self.stop()
            raise TimeoutError("the processes do not start")


def _serve(rank, where, backend, module, pipe):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    if backend == "nccl":
        torch.cuda.set_device(rank)
        torch.backends.cudnn.allow_tf32 = False
    else:
        os.environ["ACCELERATE_USE_CPU"] = "1"
    torch.set_num_threads(1)
    dist.init_process_group(
        backend, init_method=where, rank=rank, world_size=2, timeout=timedelta(seconds=START)
    )
    import fastai.distributed  # noqa: F401  (slow)

    importlib.import_module(module)
    pipe.send(True)
    while True:
        try:
            func, args, kwargs = pickle.loads(pipe.recv())
            found = func(*args, **kwargs)
            answer = True, tree_map_only(torch.Tensor, torch.Tensor.cpu, found)
        except EOFError:
            return
        except BaseException:
            answer = False, traceback.format_exc()
        pipe.send(pickle.dumps(answer))
