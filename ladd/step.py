"""Networks, optimizers and one LADD step as it is run, in micro-batches and processes.

The algebra is ladd/distill.py's; what lies sharded over processes, ladd/parallel.py's.
"""
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

import kernels
from kernels import Kernels
from ladd import checkpoint, feed, flow, lora, parallel, shapes, state, tasks
from ladd.config import Config, InputError
from ladd.data import Latents
from ladd.discriminator import Discriminator, DiscriminatorConfig, channel_moments
from ladd.distill import (DistillConfig, Text, fake_pass, grid_of, heads_loss, student_loss,
                          taps_of)
from ladd.feed import Part, moved
from ladd.fp8 import in_fp8
from ladd.lcm import lcm_loss
from ladd.memory import Step, fused, memory_plan, placed, references
from ladd.mmdit import MMDiT, MMDiTConfig, shrunk
from ladd.parallel import Norms
from ladd.run import compute_dtype, frozen, pick_kernels


# --- networks ---

class Layout(NamedTuple):
    """Where the networks of this process lie."""
    device: torch.device
    mesh: DeviceMesh | None = None       # of what trains; None for one process
    shard_teacher: bool = False          # else each process has the frozen teacher whole


def ops_of(config: Config) -> Kernels:
    return pick_kernels(config.kernels, config.device, config.precision)


def teacher_config(config: Config) -> MMDiTConfig:
    patches = max(max(hw) for hw in config.hw) // 16                          # codec 8, patch 2
    return MMDiTConfig(config.depth, config.width, config.text_dim, config.pooled_dim or config.text_dim,
                       16 + config.beside, qk_norm=config.qk_norm,
                       dual_blocks=tuple(range(config.dual_blocks)), pos_grid=config.pos_grid or patches,
                       predicts=config.predicts)


def distill_config(config: Config) -> DistillConfig:
    if config.objective == "lcm":
        n = config.lcm_steps
        levels = tuple((n - i) / n for i in range(n))
        return DistillConfig(levels, (1 / n,) * n, 0, config.shift, 0.0, 1.0, 0.0, 0.0, 0.0)
    return DistillConfig(config.levels, config.probs, config.easy_steps, config.shift,
                         config.d_mean, config.d_std, config.misaligned, config.r1_weight,
                         config.distill_weight)


def compiled(model: MMDiT, config: Config, device: torch.device) -> MMDiT:
    """Each block compiled by itself, in place: one small graph serves all blocks of a kind.

    Of JointBlock.forward there are graphs for each kind of block (plain, dual, last) and each use (training,
    with a gradient passing through, without one) of one size, and for any size once a second one came by.
    That is more than the eight that torch allows before it gives up.
    """
    if config.compile == "on" or config.compile == "auto" and device.type == "cuda":
        torch._dynamo.config.recompile_limit = 64
        for block in model.joint_blocks:
            block.compile(fullgraph=True)
    return model


def inference(model: MMDiT, config: Config, device: torch.device) -> MMDiT:
    """A whole frozen copy in the compute dtype."""
    return compiled(frozen(model, compute_dtype(config.precision, device), device), config, device)


def network(sizes: MMDiTConfig, tensors: Mapping[str, Tensor], config: Config, layout: Layout,
            dtype: torch.dtype, trains: bool, sharded: bool = True, rank: int = 0, also: str = "") -> MMDiT:
    """An MMDiT with the weights `tensors` in `dtype`, computing in the compute dtype; sharded over the mesh.

    With a LoRA's `rank` the weights are frozen in the compute dtype, and what trains are its matrices and the
    module `also`. Built without memory, then filled tensor by tensor, each process with its own rows: neither
    a mapped file nor the network is ever whole in one place. Blocks recompute what --checkpoint drops.
    """
    compute, mesh = compute_dtype(config.precision, layout.device), layout.mesh if sharded else None
    with torch.device("meta"):
        model = MMDiT(sizes, ops_of(config), compute).to(compute if rank else dtype).requires_grad_(trains)
    if rank:
        tensors = {**tensors, **adapt(config, model, rank, also)}
        if not trains:
            model.requires_grad_(False)
    compiled(parallel.checkpointed(model, config.checkpoint), config, layout.device)
    if not rank or mesh:
        return parallel.load(parallel.shard(model, mesh), tensors, layout.device)
    # what is frozen stays where it is: one copy serves student, average and teacher
    model.load_state_dict({name: tensors[name].to(layout.device, t.dtype, copy=t.requires_grad)
                           for name, t in model.state_dict(keep_vars=True).items()}, assign=True)
    return model


def adapt(config: Config, model: MMDiT, rank: int, also: str = "") -> dict[str, Tensor]:
    """Gives `model`, on meta, a LoRA, which and the module `also`, in fp32, alone train; its first matrices,
    the same in every process."""
    targets = [name for word in config.lora_targets for name in lora.TARGETS.get(word, (word,))]
    new = lora.add(model, rank, config.lora_alpha or rank, targets, flow.generator(config.seed, 8))
    if also:
        model.get_submodule(also).float().requires_grad_()
    return new


def check_lora(config: Config, sizes: MMDiTConfig) -> None:
    """Raises InputError where the teacher or its student cannot have the LoRA that the flags ask for."""
    if not (config.lora or config.teacher_lora):
        return
    with torch.device("meta"):
        teacher = MMDiT(sizes, kernels.load("torch"))
        student = MMDiT(shrunk(teacher, config.student_depth or sizes.depth)[0], teacher.kernels)
    for rank, model in ((config.teacher_lora, teacher), (config.lora, student)):
        if rank:
            adapt(config, model, rank)


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """What trains, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def kept(model: MMDiT, learner: MMDiT) -> dict[str, Tensor]:
    """What a state holds of a network, by name: all, or with a LoRA what trains in `learner`, itself or whose
    average it is; the rest is a file's."""
    tensors = model.state_dict()
    return {name: tensors[name] for name in trained(learner)} if lora.parameters(model) else tensors


def summed(model: MMDiT, start: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of a network as it is sampled: of one with a LoRA the sum with the weights `start` that
    it was made from, in fp32, which are whole. All processes call it, process 0 has the values."""
    new = lora.parameters(model)
    if not new:
        return iter(model.state_dict().items())
    also = parallel.full({name: p for name, p in trained(model).items() if name not in new})
    return lora.merged({**start, **{name: p for name, p in also if p is not None}}, lora.factors(model))


def refresh(viewer: MMDiT, model: MMDiT, start: Mapping[str, Tensor]) -> None:
    """Gives `viewer` the weights of `model` as it is sampled."""
    targets = viewer.state_dict()
    for name, tensor in summed(model, start):
        targets[name].copy_(tensor)


def save_network(model: MMDiT, start: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str],
                 base: str) -> None:
    """Writes a network as it is sampled; beside one with a LoRA that too, as ..._lora.safetensors with the
    names that ComfyUI reads and `base`, the words for what it is of. All processes call it."""
    if not lora.parameters(model):
        return checkpoint.save_mmdit(model, path, metadata)
    with torch.device("meta"):
        whole = MMDiT(model.config, model.kernels)
    tensors = summed(model, start)
    if parallel.ranks()[0] == 0:
        whole.load_state_dict(dict(tensors), assign=True)
    checkpoint.save_mmdit(whole, path, metadata)
    lora.save(path.with_name(f"{path.stem}_lora.safetensors"), model, "comfyui", {**metadata, "base": base})


def on_meta(config: Config, sizes: MMDiTConfig, device: torch.device) -> tuple[MMDiT, MMDiT, Discriminator]:
    """(teacher in the compute dtype, student in fp32, heads) without memory, on the references, whose
    products torch's FLOP counter sees: what ladd/cost.py counts."""
    ops, dtype = kernels.load("torch"), compute_dtype(config.precision, device)
    with torch.device("meta"):
        teacher = MMDiT(sizes, ops, dtype).to(dtype).requires_grad_(False)
        student = MMDiT(shrunk(teacher, config.student_depth or sizes.depth)[0], ops, dtype)
        if config.lora:
            adapt(config, student.to(dtype), config.lora)
        return teacher, student, make_heads(config, sizes, ops)


def tokens_of(config: Config) -> int:
    """Text tokens of a prompt."""
    if config.real:
        return 77 + config.t5_tokens
    return tasks.MOST_WORDS[config.objects] if config.task == "edit" else shapes.max_words(config.objects)


def make_heads(config: Config, teacher: MMDiTConfig, ops: Kernels) -> Discriminator:
    sizes = DiscriminatorConfig(config.taps, teacher.width, teacher.pooled_dim, config.head_width)
    return Discriminator(sizes, ops)


class Players(NamedTuple):
    """Who takes part in a step."""
    student: MMDiT
    ema: MMDiT
    teacher: MMDiT
    heads: Discriminator
    opt_g: torch.optim.Optimizer
    opt_d: torch.optim.Optimizer

    def tensors(self, saved: state.State | None = None) -> dict[str, Tensor]:
        """All that a run resumes from, by name: what trains and its average, heads, optimizers, which with
        `saved` get the moments it has. What is frozen is the teacher's."""
        networks = {"student": kept(self.student, self.student), "ema": kept(self.ema, self.student),
                    "heads": self.heads.state_dict()}
        out = {f"{name}.{k}": v for name, tensors in networks.items() for k, v in tensors.items()}
        return (out | moments(self.opt_g, self.student, "opt_g.", saved)
                | moments(self.opt_d, self.heads, "opt_d.", saved))


def moments(optimizer: torch.optim.Optimizer, network: nn.Module, prefix: str,
            saved: state.State | None) -> dict[str, Tensor]:
    named = trained(network)
    return (state.optimizer_tensors(optimizer, named, prefix) if saved is None
            else state.optimizer_targets(optimizer, named, prefix, saved))


def make_players(config: Config, base: MMDiT, layout: Layout) -> Players:
    """Student and average in fp32 from the teacher `base`, the frozen teacher, new heads, two AdamWs; with
    --lora student and average are a LoRA each, beside the teacher's own weights where those lie whole."""
    device = layout.device
    if config.teacher_fp8 and layout.shard_teacher:
        raise InputError("--teacher-fp8: found a teacher that is sharded, one whole on each process accepted "
                         "(--shard-teacher off)")
    teacher = network(base.config, base.state_dict(), config, layout, compute_dtype(config.precision, device),
                      False, layout.shard_teacher)
    source = teacher if config.lora and not layout.mesh else base
    start = shrunk(source, config.student_depth or base.config.depth)
    student, ema = (network(*start, config, layout, torch.float32, trains, rank=config.lora)
                    for trains in (True, False))
    if config.teacher_fp8:
        in_fp8(teacher)
    heads = make_heads(config, base.config, ops_of(config)).to(device)
    parallel.broadcast(heads)
    opt_g, opt_d = (torch.optim.AdamW(trained(net).values(), lr, betas=(config.beta1, config.beta2),
                                      weight_decay=0.0, fused=True)
                    for net, lr in ((student, config.lr), (heads, config.heads_lr)))
    return Players(student, ema, teacher, heads, opt_g, opt_d)


def calibrate(config: Config, dc: DistillConfig, teacher: MMDiT, heads: Discriminator,
              latents: Latents) -> None:
    """Sets the heads' standardisation from one batch of renoised reals, which processes and micro-batches
    share as in a step."""
    rank, world = parallel.ranks()
    parts = feed.parts(latents, 0, dc.easy_steps, (config.seed, 3), config.seed, config.batch,
                       config.micro(world), dc, rank, world)

    def of(part: Part) -> Tensor:
        x0, text, _, drawn = moved(part, heads.feat_mean.device)
        with torch.no_grad():
            xt = flow.noised(x0, drawn.eps_r, drawn.sigma_r)
            return channel_moments(taps_of(teacher, heads, xt, drawn.sigma_r, text))

    heads.calibrate(parallel.averaged(sum(map(of, parts)) / len(parts)))


# --- where they lie ---

def lay_out(config: Config, sizes: MMDiTConfig, device: torch.device) -> Layout:
    """Where the networks of this process lie: as the flags say, else by the memory plan; rank 0 says how."""
    rank, world = parallel.ranks()
    if world == 1:
        return Layout(device)
    cuda = device.type == "cuda"
    limit = torch.cuda.get_device_properties(device).total_memory if cuda else math.inf
    shard, teacher_shard, plan = placed(limit, world, config.replicas, memory_plan_of(config, sizes, device),
                                        config.parallel, config.shard_teacher)
    if rank == 0:
        lies = lambda n: f"sharded over {n}" if n > 1 else "whole on each"
        print(f"{world} processes: student {lies(shard)}, teacher {lies(teacher_shard)}; plan "
              f"{plan['sum'] / 2 ** 30:.1f} GiB each")
    return Layout(device, parallel.mesh(device, world // shard), teacher_shard > 1)


def memory_plan_of(config: Config, sizes: MMDiTConfig,
                   device: torch.device) -> Callable[..., dict[str, int]]:
    """memory_plan of this run's step; shard and teacher_shard are left to say."""
    (h, w), world, cuda = config.hw[0], parallel.ranks()[1], device.type == "cuda"
    teacher, student, heads = on_meta(config, sizes, device)
    step = Step(student, teacher, heads, (16, h // 8, w // 8), (tokens_of(config), sizes.context_dim),
                config.micro(world), distill_config(config), config.checkpoint,
                not config.teacher_fp8)
    return partial(memory_plan, step, fused() if cuda and config.kernels != "torch" else references(), world,
                   accumulate=config.batch // world // step.batch, device=device.type)


def plan_in_words(config: Config, sizes: MMDiTConfig, layout: Layout) -> str:
    """The memory plan of this layout: each purpose and its GiB."""
    shard = layout.mesh["shard"].size() if layout.mesh else 1
    plan = memory_plan_of(config, sizes, layout.device)(
        shard=shard, teacher_shard=shard if layout.shard_teacher else 1)
    return ", ".join(f"{name} {size / 2 ** 30:.1f}" for name, size in plan.items())


# --- the step ---

def learning_rate(config: Config, step: int, steps_taken: int) -> float:
    """Factor of a learning rate: linear warm-up over the steps that this network has taken, constant,
    linear to 0 over the last `decay` of the student's steps. `step` is the student's count, negative while
    the heads train alone."""
    left = (config.steps - max(step, 0)) / max(1, config.decay * config.steps)
    return min(1, (steps_taken + 1) / max(1, config.warmup), left)


def step_keys(start: int, total: int, turns: int) -> Iterator[tuple[int, int]]:
    """(iteration, heads' step) of every batch from iteration `start` on, `turns` of them in each."""
    return ((it, j) for it in range(start, total) for j in range(turns))


def step_parts(config: Config, dc: DistillConfig, latents: Latents, it: int, j: int) -> list[Part]:
    """This process's micro-batches for the j-th heads' step of iteration `it`; each has its own batch."""
    rank, world = parallel.ranks()
    return feed.parts(latents, 0 if config.overfit_one_batch else it * config.heads_steps + j,
                      max(it - config.heads_first, 0), (config.seed, 2, it, j), config.seed, config.batch,
                      config.micro(world), dc, rank, world)


def joined(stats: Sequence[dict[str, Tensor | None]]) -> dict[str, Tensor | None]:
    """Stats of a batch from those of its micro-batches: logits [k, b, h, w] side by side, losses averaged."""
    return {name: None if first is None else torch.cat([s[name] for s in stats], 1) if first.ndim
            else torch.stack([s[name] for s in stats]).mean() for name, first in stats[0].items()}


def no_lap(name: str) -> None:
    """Do nothing: nobody measures the time of each stage."""


def ladd_step(config: Config, dc: DistillConfig, p: Players, parts: list[Part],
              update_student: bool, lap: Callable[[str], None] = no_lap
              ) -> tuple[dict[str, Tensor | None], dict[str, Norms]]:
    """Run one LADD step on the micro-batches `parts`; return (stats, gradient norms by network).

    One student forward and one teacher forward of the fake serve both losses of a micro-batch. Both
    are computed with the heads as they are before their optimizer's step: no graph outlives its
    micro-batch, and none is computed again. Without `update_student` only the heads train.
    stats: `loss_d`, and what `heads_loss` and `student_loss` return.
    """
    def backward(part: Part, last: bool) -> dict[str, Tensor | None]:
        x0, text, wrong, draws = part

        # 1. generate: student, renoising, frozen teacher; the student's gradient flows through it
        with torch.set_grad_enabled(update_student):
            fake = fake_pass(p.student, p.teacher, p.heads, x0, text, draws, dc)
        lap("generate")

        # 2. discriminator loss: gradients of the heads alone, the fake features are detached
        loss_d, stats = heads_loss(p.teacher, p.heads, x0, text, wrong, fake.feats, draws, dc)
        (loss_d / len(parts)).backward()
        stats = {"loss_d": loss_d.detach()} | stats
        lap("discriminator loss")

        # 3. student loss: gradients of the student alone, the heads' parameters are detached
        if update_student:
            loss_g, stats_g = student_loss(p.heads, text, fake, draws, dc, grid_of(p.teacher, x0))
            parallel.accumulate(p.student, last)
            (loss_g / len(parts)).backward()
            stats |= stats_g
            lap("student loss")
        return stats

    # one call for each micro-batch: its features and graphs are freed before the next one starts
    stats = joined([backward(part, part is parts[-1]) for part in parts])

    # 4. optimizers, then the EMA
    parallel.average_gradients(p.heads)
    norms = {"heads": parallel.clip(p.heads, config.clip)}
    p.opt_d.step()
    p.opt_d.zero_grad()
    lap("heads' optimizer")
    if update_student:
        norms["student"] = student_update(config, p)
        lap("student's optimizer, EMA")
    return stats, norms


def lcm_step(config: Config, p: Players, parts: list[Part], null: Text):
    """Run one consistency step on the micro-batches; return (stats, gradient norms by network)."""
    levels = flow.euler_levels(config.lcm_steps, config.shift).to(parts[0].x0.device)

    def backward(part: Part) -> dict[str, Tensor]:
        loss, stats = lcm_loss(p.student, p.ema, p.teacher, part.x0, part.text, null, part.draws.eps_s,
                               part.draws.sigma_s, levels, config.guidance, config.image_guidance)
        parallel.accumulate(p.student, part is parts[-1])
        (loss / len(parts)).backward()
        return stats

    stats = joined([backward(part) for part in parts])
    return stats, {"student": student_update(config, p)}


@torch.no_grad()                        # or the EMA would keep each step's graph
def student_update(config: Config, p: Players) -> Norms:
    """Clip the student's gradients, step its optimizer, update the EMA; return the norms before."""
    norms = parallel.clip(p.student, config.clip)
    p.opt_g.step()
    p.opt_g.zero_grad()                 # to None: no gradients in memory during the next forward
    moved = [pair for pair in zip(p.ema.parameters(), p.student.parameters()) if pair[1].requires_grad]
    torch._foreach_lerp_(*map(list, zip(*moved)), 1 - config.ema)
    return norms
