"""A function that only launches kernels, captured as one CUDA graph and replayed."""

import gc
from collections.abc import Callable
from functools import cache

import torch

WARM_UP_CALLS = 3  # in which libraries choose algorithms and the optimiser makes its state


@cache
def side_stream() -> torch.cuda.Stream:
    """The one stream that warms up and captures: cuBLAS keeps a workspace for every stream that it has seen."""
    return torch.cuda.Stream()


class CudaGraph:
    """Calls a function that only launches kernels; after some calls it is captured, and from then on replayed."""

    def __init__(self, launch: Callable[[], None]) -> None:
        self.launch = launch
        self.calls = 0
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self) -> None:
        self.calls += 1
        if self.calls <= WARM_UP_CALLS:
            side_stream().wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side_stream()):
                self.launch()
            torch.cuda.current_stream().wait_stream(side_stream())
            return
        if self.graph is None:
            gc.collect()  # a graph that is destroyed during a capture would break it
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, stream=side_stream()):
                self.launch()
        self.graph.replay()
