"""Processes connected by Gloo that run the same function: a small stand-in for a cluster."""

from __future__ import annotations

import multiprocessing
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

TIMEOUT_S = 60


class WorkerProcesses:
    """Up to `most` processes that stay between calls: importing torch takes longer than most tests."""

    def __init__(self, most: int) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch", "sae_runtime.training.distributed.sharded_topk_trainer"])
        self._folder = tempfile.TemporaryDirectory()
        self._calls = 0
        self._workers = []
        for _ in range(most):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs,), daemon=True)
            process.start()
            theirs.close()
            self._workers.append((process, ours))

    def run(self, function: Callable[..., Any], world: int, *arguments: Any) -> list[Any]:
        """What `function(*arguments)` returns on each of `world` workers of one process group.

        `function` is an importable module's. Raises AssertionError with the worker's traceback if one fails.
        """
        self._calls += 1
        store = str(Path(self._folder.name) / str(self._calls))
        chosen = self._workers[:world]
        for rank, (_, pipe) in enumerate(chosen):
            pipe.send((function, arguments, rank, world, store))
        replies = []
        for rank, (_, pipe) in enumerate(chosen):
            assert pipe.poll(2 * TIMEOUT_S), f"worker {rank} does not answer"
            replies.append(pipe.recv())
        failed = [reply for kind, reply in replies if kind == "failed"]
        assert not failed, "\n".join(failed)
        return [reply for _, reply in replies]

    def close(self) -> None:
        for process, pipe in self._workers:
            pipe.close()
            process.join(10)
            if process.is_alive():
                process.kill()
                process.join()
        self._folder.cleanup()


def _serve(pipe: Connection) -> None:
    torch.set_num_threads(1)
    while True:
        try:
            function, arguments, rank, world, store = pipe.recv()
        except EOFError:
            return
        try:
            dist.init_process_group(
                "gloo",
                store=dist.FileStore(store, world),
                rank=rank,
                world_size=world,
                timeout=timedelta(seconds=TIMEOUT_S),
            )
            reply = ("done", function(*arguments))
            dist.barrier()  # nobody leaves while others still connect
        except BaseException:
            reply = ("failed", f"worker {rank} of {world}:\n{traceback.format_exc()}")
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
        pipe.send(reply)
