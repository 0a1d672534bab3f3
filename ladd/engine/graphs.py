"""CUDA graphs of networks, for sampling small images and batches."""
from collections.abc import Callable

import torch
from torch import Tensor

from ladd.core.mmdit import MMDiT


def captured(run: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """Record `run` as a CUDA graph; return a function that replays it into the same output."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):      # compile and allocate first: neither is possible while recording
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()

    def replay() -> Tensor:
        graph.replay()
        return out
    return replay


class Graphed:
    """Run model(x, sigma, *text) without gradients, as one CUDA graph per shape.

    One launch replaces about twenty per block, which take a small network or image longer than the
    GPU's own work.
    """

    def __init__(self, model: MMDiT, capture: Callable = captured):
        self.model, self.capture, self.graphs = model, capture, {}

    @torch.no_grad()
    def __call__(self, *inputs: Tensor | None) -> Tensor:
        inputs = [t for t in inputs if t is not None]   # without an image the last one is None
        key = tuple((t.shape, t.dtype) for t in inputs)
        if key not in self.graphs:
            held = [t.clone() for t in inputs]      # the graph reads these addresses
            self.graphs[key] = held, self.capture(lambda: self.model(*held))
        held, replay = self.graphs[key]
        torch._foreach_copy_(held, inputs)
        return replay().clone()
