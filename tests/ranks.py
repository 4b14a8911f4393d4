"""Run a function in two real processes, connected as those of a stage."""

import multiprocessing
import os
import socket
from collections.abc import Callable

from pipeline.compute import distributed
from pipeline.compute.distributed import ProcessGroup


def results_of_two(run: Callable[[ProcessGroup], object]) -> list[object]:
    """What `run` returns in each of two forked processes, or the message of its error; None if it
    ends its process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    pipes = [context.Pipe(duplex=False) for _ in range(2)]

    def rank(number: int) -> None:
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
        os.environ |= {"RANK": str(number), "LOCAL_RANK": str(number)}
        try:
            with distributed.process_group() as group:
                result = run(group)
        except Exception as error:  # the test compares its message
            result = f"{type(error).__name__}: {error}"
        pipes[number][1].send(result)

    processes = [context.Process(target=rank, args=(number,)) for number in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(30)
    return [pipe.recv() if pipe.poll() else None for pipe, _ in pipes]
