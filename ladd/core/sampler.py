"""Samplers: Euler with guidance for the teacher, few steps for the student, as pure functions of
given noise; and the recipe that says how a checkpoint is sampled.

`sigmas` are the final noise levels, after the shift, descending to 0.
Source: Esser et al. 2024; Sauer et al. 2024, Sec. 4 (student).
"""
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ladd.cli import InputError, describe, must, parse_size, parse_value
from ladd.core import flow
from ladd.core.mmdit import MMDiT, Text, cat

SAMPLERS = ("euler", "renoise")
TASKS = ("text", "edit", "inpaint")
UNGUIDED = 1.0, 1.0      # guidance by the text, by the image


# --- recipes ---

@dataclass(frozen=True)
class Recipe:
    """How a student and its teacher are sampled, and for which task.

    The header of a checkpoint holds these values as strings, config.json holds them as JSON.
    """
    task: str                      # one of TASKS
    sizes: tuple[str, ...]         # HxW in pixels; the first is the default
    levels: tuple[float, ...]      # the student's noise levels, unshifted, largest first
    shift: float                   # resolution shift of the levels of student and teacher
    sampler: str                   # the student's, one of SAMPLERS; the teacher's is euler
    sample_steps: int              # the teacher's
    guidance: float                # the teacher's, by the text
    image_guidance: float          # the teacher's, by the source image
    objects: int                   # toy dataset: objects in a scene
    text_dim: int                  # toy dataset: width of a text token
    t5_tokens: int = 256           # SD3: T5 tokens per prompt; older checkpoints do not say it

    def metadata(self, role: str, real: bool) -> dict[str, str]:
        """Return the header of a checkpoint of this role, student or teacher."""
        header = {"role": role, "domain": "sd3" if real else "toy"}
        for name, value in asdict(self).items():
            header[name] = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
        return header

    def sigmas(self, steps: int) -> Tensor:
        """Return the student's final levels [steps + 1] for `steps` steps, the last one 0.

        For fewer steps they are evenly taken from its levels: every second one for half of the
        steps, the first for one step (Sauer et al. 2024, Sec. 4).
        """
        counts = step_counts(self.levels)
        must(steps in counts, f"--steps must be one of {counts[::-1]}, which the student was "
             f"trained for (got {steps}); --sigmas takes other levels")
        levels = self.levels[::len(self.levels) // steps]
        return flow.shift(torch.tensor((*levels, 0.0)), self.shift)

    def teacher_sigmas(self, steps: int) -> Tensor:
        """Return the teacher's final levels [steps + 1], evenly spaced before the shift."""
        return flow.euler_sigmas(steps, self.shift)


def read_recipe(stored: Any, where: Path) -> Recipe:
    """Return the recipe in `stored`, the header of a checkpoint or the content of config.json.

    Raise InputError where train.py cannot have written it.
    """
    kinds = Recipe.__annotations__
    stored = {"t5_tokens": Recipe.t5_tokens, **stored} if isinstance(stored, dict) else {}
    missing = [name for name in kinds if name not in stored]
    must(not missing, f"{where}: no {', '.join(missing)}; it must be written by train.py")
    values = {}
    for name, kind in kinds.items():
        text = stored[name]
        if isinstance(text, list):
            text = ",".join(map(str, text))
        try:
            values[name] = parse_value(str(text), kind)
        except ValueError:
            raise InputError(f"{where}: {name} must be {describe(kind)} (got {text!r})") from None
    r = Recipe(**values)
    falling = all(a > b for a, b in zip(r.levels, r.levels[1:]))
    accepted = {
        "task": (r.task in TASKS, f"one of {', '.join(TASKS)}"),
        "sizes": (bool(r.sizes), "at least one size"),
        "levels": (r.levels[:1] == (1.0,) and falling and r.levels[-1] > 0,
                   "numbers that fall from 1 and stay above 0"),
        "shift": (1 <= r.shift < math.inf, "a finite number, at least 1"),
        "sampler": (r.sampler in SAMPLERS, f"one of {', '.join(SAMPLERS)}"),
        "sample_steps": (1 <= r.sample_steps <= 1000, "1 to 1000"),
        "guidance": (0 <= r.guidance < math.inf, "a finite number, at least 0"),
        "image_guidance": (0 <= r.image_guidance < math.inf, "a finite number, at least 0"),
        "objects": (r.objects in (1, 2), "1 or 2"),
        "text_dim": (r.text_dim >= 1, "at least 1"),
        "t5_tokens": (1 <= r.t5_tokens <= 512, "1 to 512")}
    for name, (ok, what) in accepted.items():
        must(ok, f"{where}: {name} must be {what} (got {values[name]!r})")
    for size in r.sizes:
        try:
            parse_size(size, "sizes")
        except InputError as error:
            raise InputError(f"{where}: {error}") from None
    return r


def step_counts(levels: tuple[float, ...]) -> list[int]:
    """Return the step counts that a student of these levels can take: [4, 2, 1] for four levels."""
    return [n for n in range(len(levels), 0, -1) if len(levels) % n == 0]


# --- samplers ---

def image_noise(seeds: list[int], shape: tuple[int, ...]) -> Tensor:
    """Return noise [len(seeds), *shape] in fp32 on the CPU, each image from a generator of its own.

    An image thus has the same noise on every device and in every batch.
    """
    return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed))
                        for seed in seeds])


def evaluations(guidance: float, image_guidance: float = 1.0) -> int:
    """Return the network evaluations per sampling step."""
    if image_guidance != 1:
        return 3
    return 2 if guidance != 1 else 1


def guided(model: MMDiT, null: Text, guidance: float,
           image_guidance: float = 1.0) -> Callable[[Tensor, Tensor, Text], Tensor]:
    """Return a function v(x, sigma, text) with classifier-free guidance; 1 means none.

        v = v_null + guidance (v_text - v_null)
        v = v_none + image_guidance (v_null - v_none) + guidance (v_text - v_null)

    `null` is the embedded empty prompt, [l, context_dim] and [pooled_dim]. v_null has the empty
    prompt and keeps the image conditioning, v_none has neither. The second form applies where
    image_guidance is not 1 (Brooks et al. 2023, InstructPix2Pix, Eq. 3). The passes of a step run
    as one batch.
    """
    n = evaluations(guidance, image_guidance)

    def v(x: Tensor, sigma: Tensor, text: Text) -> Tensor:
        if n == 1:
            return model(x, sigma, *text)
        context, pooled = (e.to(t).expand(len(x), *e.shape) for t, e in zip(text, null[:2]))
        passes = [text, Text(context, pooled, text.image)]
        if n == 3:
            passes.append(Text(context, pooled, torch.zeros_like(text.image)))
        vs = model(x.repeat(n, 1, 1, 1), sigma.repeat(n), *cat(passes)).chunk(n)
        # the formulas above, rearranged
        out = torch.lerp(vs[1], vs[0], guidance)
        return out if n == 2 else out + (image_guidance - 1) * (vs[1] - vs[2])
    return v


def sigmas_on_device(sigmas: Tensor, noise: Tensor) -> Tensor:
    """Return sigmas [steps + 1, b] on the device of `noise` [b, ...].

    They are copied once, since each copy from pageable memory waits for the GPU. Arithmetic of the
    host uses the sigmas on the host.
    """
    return sigmas.to(noise.device)[:, None].repeat(1, len(noise))


@torch.no_grad()
def euler(v: Callable, noise: Tensor, text: Text, sigmas: Tensor) -> Tensor:
    """Return x0 from noise: x += (sigma' - sigma) v over consecutive levels."""
    x = noise
    for now, then, sigma in zip(sigmas[:-1], sigmas[1:], sigmas_on_device(sigmas, noise)):
        x = x + (then - now) * v(x, sigma, text)
    return x


@torch.no_grad()
def renoise(v: Callable, noise: Tensor, text: Text, sigmas: Tensor, seeds: list[int]) -> Tensor:
    """Return x0 from noise: predict x0_hat, renoise it to the next level with fresh noise, repeat.

    The inputs of the network are then noised like those that LADD trains the student on.
    """
    x, levels = noise, sigmas_on_device(sigmas, noise)
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
    """Return latents [b, c, h, w] sampled from `noise` by the sampler named in SAMPLERS."""
    if sampler not in SAMPLERS:
        raise ValueError(f"sampler must be one of {', '.join(SAMPLERS)} (got {sampler!r})")
    if null is None and evaluations(guidance, image_guidance) > 1:
        raise ValueError("null must be the text of the empty prompt with guidance other than 1 "
                         f"(got None with guidance {guidance}, image guidance {image_guidance})")
    v = guided(model, null, guidance, image_guidance)
    if sampler == "euler":
        return euler(v, noise, text, sigmas)
    return renoise(v, noise, text, sigmas, seeds)
