from collections.abc import Iterator

import pytest

from tests.sae_runtime.training.distributed.worker_processes import WorkerProcesses


@pytest.fixture(scope="session")
def workers() -> Iterator[WorkerProcesses]:
    """Four processes; a test uses as many of them as it asks for."""
    processes = WorkerProcesses(4)
    yield processes
    processes.close()
