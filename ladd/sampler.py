"""Samplers: Euler with guidance for the teacher, few steps for the student. Pure functions over given noise.

`sigmas` are the final levels, descending, ending in 0.
Source: Esser et al. 2024; Sauer et al. 2024, Sec. 4 (student).
"""
from collections.abc import Callable

import torch
from torch import Tensor

from ladd import flow
from ladd.distill import Text, TextImage
from ladd.mmdit import MMDiT


def image_noise(seeds: list[int], shape: tuple[int, ...]) -> Tensor:
    """Noise [len(seeds), *shape]: image i from its own generator, on the CPU in fp32,
    whatever the device or batch."""
    return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(s)) for s in seeds])


def captured(run: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """`run` recorded as a CUDA graph; what is returned launches it and gives the same tensor each time."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):                       # compiles and allocates, which a recording cannot
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
    """model(x, sigma, *text) without gradients as one CUDA graph a shape: one launch instead of
    some twenty a block, which a small network or picture waits for longer than for the GPU."""

    def __init__(self, model: MMDiT, capture: Callable = captured):
        self.model, self.capture, self.graphs = model, capture, {}

    @torch.no_grad()
    def __call__(self, *inputs: Tensor) -> Tensor:
        key = tuple((t.shape, t.dtype) for t in inputs)
        if key not in self.graphs:
            held = [t.clone() for t in inputs]                    # the addresses that the graph reads
            self.graphs[key] = held, self.capture(lambda: self.model(*held))
        held, replay = self.graphs[key]
        torch._foreach_copy_(held, list(inputs))
        return replay().clone()


def evaluations(guidance: float, image_guidance: float = 1.0) -> int:
    """Of the network, a step."""
    return 3 if image_guidance != 1 else 2 if guidance != 1 else 1


def guided(model: MMDiT, null: Text, guidance: float,
           image_guidance: float = 1.0) -> Callable[[Tensor, Tensor, Text | TextImage], Tensor]:
    """v(x, sigma, text) with classifier-free guidance v_null + guidance (v_text - v_null);
    1 is none and costs one evaluation.

    With an image beside x, which v_null keeps and v_none lacks too:
    v_none + image_guidance (v_null - v_none) + guidance (v_text - v_null), three evaluations where
    image_guidance is not 1 (Brooks et al. 2023, InstructPix2Pix, Eq. 3).
    null: the embedded empty prompt, [l, context_dim] and [pooled_dim].
    """
    n = evaluations(guidance, image_guidance)

    def v(x: Tensor, sigma: Tensor, text: Text | TextImage) -> Tensor:
        if n == 1:
            return model(x, sigma, *text)
        empty = type(text)(*(e.to(t).expand(len(x), *e.shape) for t, e in zip(text, null)), *text[2:])
        passes = [text, empty]
        if n == 3:
            passes.append(empty._replace(image=torch.zeros_like(text.image)))
        vs = model(x.repeat(n, 1, 1, 1), sigma.repeat(n), *map(torch.cat, zip(*passes))).chunk(n)
        out = torch.lerp(vs[1], vs[0], guidance)
        return out if n == 2 else out + (image_guidance - 1) * (vs[1] - vs[2])
    return v


def levels_on_device(sigmas: Tensor, noise: Tensor) -> Tensor:
    """Return sigmas [steps + 1, b] where `noise` [b, ...] is: copied once, since each copy from
    pageable memory waits for the GPU. What the host itself computes with stays on the host."""
    return sigmas.to(noise.device)[:, None].repeat(1, len(noise))


@torch.no_grad()
def euler(v: Callable, noise: Tensor, text: Text, sigmas: Tensor) -> Tensor:
    """x0 from noise by x += (sigma' - sigma) v over consecutive levels;
    `evaluations` of the network a level."""
    x = noise
    for now, then, sigma in zip(sigmas[:-1], sigmas[1:], levels_on_device(sigmas, noise)):
        x = x + (then - now) * v(x, sigma, text)
    return x


@torch.no_grad()
def renoise(v: Callable, noise: Tensor, text: Text, sigmas: Tensor, seeds: list[int]) -> Tensor:
    """x0 from noise by predicting x0_hat and noising it anew to the next level,
    which is what LADD shows the student in training."""
    x, levels = noise, levels_on_device(sigmas, noise)
    for i, then in enumerate(sigmas[1:]):
        x0_hat = flow.to_x0(x, v(x, levels[i], text), levels[i])
        fresh = noise
        if then > 0:
            fresh = image_noise([s + (i + 1) * 1_000_003 for s in seeds], tuple(noise.shape[1:]))
            fresh = (fresh.pin_memory() if x.is_cuda else fresh).to(x, non_blocking=True)
        x = flow.noised(x0_hat, fresh, levels[i + 1])
    return x


def sample(model: MMDiT, noise: Tensor, text: Text, sigmas: Tensor, sampler: str, seeds: list[int],
           null: Text | None = None, guidance: float = 1.0, image_guidance: float = 1.0) -> Tensor:
    """Latents [b, c, h, w] from noise by the sampler named "euler" or "renoise"."""
    if sampler not in ("euler", "renoise"):
        raise ValueError(f"sample: found sampler {sampler!r}, accepted are euler and renoise")
    if evaluations(guidance, image_guidance) > 1 and null is None:
        raise ValueError("sample: guidance other than 1 needs the null text")
    v = guided(model, null, guidance, image_guidance)
    return euler(v, noise, text, sigmas) if sampler == "euler" else renoise(v, noise, text, sigmas, seeds)
