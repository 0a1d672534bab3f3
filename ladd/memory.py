"""Memory of a training step, found by running one on the meta device, from the bytes alive, with the Triton
kernels as they keep things or with the references. torch.compile is taken to keep no more than eager order.
"""
import weakref
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import sdpa_flop_count

import kernels
from kernels import Kernels, attention
from kernels.heads import GROUP_SIZE
from ladd import lora
from ladd.discriminator import Discriminator
from ladd.distill import (DistillConfig, Draws, Fake, Text, TextImage, Wrong, draw, fake_pass, grid_of,
                          heads_loss, student_loss)
from ladd.mmdit import MMDiT
from ladd.parallel import checkpointed

# assumed: CUDA's context, libraries' workspaces and NCCL's buffers; share of what comes and goes lost in gaps
CONTEXT, GAPS = 2 * 2 ** 30, 0.05
FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
# one product of q and k, one with v; twice that backward, whatever a kernel makes again
PRODUCTS = {FLASH: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
            torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward:
                lambda grad, q, k, v, *_, **__: 2 * sdpa_flop_count(q, k, v)}


class SavedBytes(torch.autograd.graph.saved_tensors_hooks):
    """Counts the bytes that autograd keeps for the backward pass, on any device, but not inside a checkpoint;
    parameters and shared storages count once or not at all."""

    def __init__(self, *models: nn.Module):
        self.bytes, self.kept = 0, []
        self.seen = {p.untyped_storage()._cdata for m in models for p in (*m.parameters(), *m.buffers())}

        def pack(t: Tensor) -> Tensor:
            key = t.untyped_storage()._cdata
            if key not in self.seen:
                self.seen.add(key)
                self.kept.append(t)                # keeps the storage alive, so that its key stays its own
                self.bytes += t.untyped_storage().nbytes()
            return t

        super().__init__(pack, lambda t: t)


class LiveBytes(TorchDispatchMode):
    """Bytes of the tensors made inside on the meta device, alive `now`. With them counts what the caller says
    is there beside: gradients, which it takes out as they are made, and gathered weights. `peak`: all three
    where their sum was the largest."""

    def __init__(self, *models: nn.Module):
        super().__init__()
        self.now = self.gradients = self.gathered = 0
        self.peak = (0, 0, 0)
        self.known = dict.fromkeys(t.untyped_storage()._cdata for m in models
                                   for t in (*m.parameters(), *m.buffers()))

    def note(self, passing: int = 0) -> None:
        self.peak = max(self.peak, (self.now + passing, self.gradients, self.gathered), key=sum)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, Tensor) and t.is_meta and (key := t.untyped_storage()._cdata) not in self.known:
                size = t.untyped_storage().nbytes()
                self.now += size
                self.known[key] = weakref.ref(t.untyped_storage(), lambda _, k=key, n=size: self.gone(k, n))
        inside = func is torch.ops.ladd.joint_attention_backward.default       # dq of all tokens, in fp32
        self.note(sum(4 * t.numel() // 3 for t in args[2:4] if t is not None) if inside else 0)
        return out

    def gone(self, key: int, size: int) -> None:
        del self.known[key]
        self.now -= size


class Flash(TorchFunctionMode):
    """torch's attention on the meta device as on others: there alone it would keep all scores."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return FLASH(*args)[0] if func is F.scaled_dot_product_attention else func(*args, **(kwargs or {}))


def references() -> Kernels:
    """The references for the meta device."""
    ops = kernels.load("torch")

    def joint_attention(*args, **kwargs):
        with Flash():                                              # here: a checkpoint calls this anew
            return ops.joint_attention(*args, **kwargs)
    return ops._replace(joint_attention=joint_attention)


def _like(shapes, needs) -> list[Tensor | None]:
    """Gradients of the inputs that need one."""
    return [torch.empty(s[0], dtype=s[1], device="meta") if n else None for s, n in zip(shapes, needs)]


class Modulation(torch.autograd.Function):
    """x + gate branch, where there is a gate, and `norms` modulations of it (vectors: shift and scale of
    each), made and kept as kernels/modulation.py does."""

    @staticmethod
    def forward(ctx, norms: int, x: Tensor, branch: Tensor | None, gate: Tensor | None, *vectors: Tensor):
        outs = [x.new_empty(x.shape) for _ in range((gate is not None) + norms)]
        stats = x.new_empty(*x.shape[:2], 2, dtype=torch.promote_types(x.dtype, torch.float32))
        ctx.save_for_backward(*[x if gate is None else outs[0], stats] * (norms > 0), *vectors[1::2],
                              branch if ctx.needs_input_grad[3] else None,
                              gate if ctx.needs_input_grad[2] else None)
        ctx.norms, ctx.shapes = norms, [(None, None) if t is None else (t.shape, t.dtype)
                                        for t in (x, branch, gate, *vectors)]
        return tuple(outs)

    @staticmethod
    def backward(ctx, *grads):
        first, *rest = _like(ctx.shapes, (ctx.norms and ctx.needs_input_grad[1], *ctx.needs_input_grad[2:]))
        return None, first if ctx.norms else grads[0], *rest


class Heads(torch.autograd.Function):
    """Logits [k, b, h, w] from k features and the arguments of kernels/heads.py: copies the features into
    one tensor and keeps it for the weights' gradient, keeps u and v, makes y twice, gives the features'
    gradients as one tensor."""

    @staticmethod
    def forward(ctx, k: int, grid: tuple[int, int], *inputs: Tensor):
        feats, weights = inputs[:k], inputs[k:]
        copied = feats[0].new_empty(k, *feats[0].shape)
        u, v, y = (feats[0].new_empty(k, *feats[0].shape[:2], weights[0].shape[2]) for _ in range(3))
        stats = [weights[0].new_empty(k, len(feats[0]), 2, u.shape[3] // GROUP_SIZE) for _ in range(2)]
        kept = [copied] if any(ctx.needs_input_grad[2 + k:]) else []
        ctx.save_for_backward(u, v, *stats, *kept, *(weights[i] for i in (0, 2, 3, 4, 6, 7, 8)))     # no bias
        ctx.shapes = [(t.shape, t.dtype) for t in inputs]
        return weights[0].new_empty(k, len(feats[0]), *grid)

    @staticmethod
    def backward(ctx, grad: Tensor):
        u, need = ctx.saved_tensors[0], ctx.needs_input_grad[2:]
        k = len(u)
        scratch = [torch.empty_like(u) for _ in range(2 + any(need[k:]))]             # dv, du; y for weights
        (shape, dtype), feats = ctx.shapes[0], [None] * k
        if any(need[:k]):
            feats = torch.empty(k, *shape, dtype=dtype, device="meta").unbind(0)
        return None, None, *feats, *_like(ctx.shapes[k:], need[k:])


def fused() -> Kernels:
    """The Triton kernels' stand-ins."""
    def joint_attention(qkv_txt, qkv_img, norm_txt=None, norm_img=None, eps=1e-6, need_txt=True):
        weights = *(norm_txt or (None, None)), *(norm_img or (None, None))
        frozen = [t if t is None else t.detach() for t in (qkv_txt, qkv_img, *weights)]
        ready = attention.prepare_op(*frozen, eps)
        out = attention.forward_op(qkv_txt, qkv_img, *ready, *weights, eps, need_txt)
        return (out[0] if need_txt and qkv_txt is not None else None), out[1]

    def heads(feats, p, cond, grid):
        readout = (p.w_out[:, None] + cond @ p.w_cond) * p.w_in.shape[2] ** -0.5
        return Heads.apply(len(feats), grid, *feats, *p[:8], readout, p.b_out)

    return Kernels(joint_attention, lambda x, *vectors: Modulation.apply(1, x, None, None, *vectors)[0],
                   lambda x, *vectors: Modulation.apply(2, x, None, None, *vectors),
                   partial(Modulation.apply, 1), lambda *args: Modulation.apply(0, *args)[0], heads)


def count(model: nn.Module, trained: bool = False) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad or not trained)


class Step(NamedTuple):
    """Networks on the meta device and the sizes of a micro-batch."""
    student: MMDiT
    teacher: MMDiT
    heads: Discriminator
    latent: tuple[int, int, int]     # (c, h, w)
    context: tuple[int, int]         # (l, dim)
    batch: int
    config: DistillConfig
    checkpoint: str = "none"
    shared: bool = False             # one process has one copy of what is frozen in student and teacher

    def made(self, ops: Kernels, masters: torch.dtype) -> "Step":
        """The same with networks made anew: of `ops`, the student's weights in `masters`; of one with a LoRA
        those stay as they are."""
        dtype = self.teacher.pos_embed.dtype
        with torch.device("meta"):
            student, teacher = (MMDiT(m.config, ops, dtype) for m in self[:2])
            heads = Discriminator(self.heads.config, ops)
        if found := lora.of_kind(self.student, lora.Lora):
            lora.apply(student.to(dtype), {name: lora.Factors(layer.lora_a, layer.lora_b, layer.alpha)
                                           for name, layer in found.items()})
        else:
            student.to(masters)
        teacher.to(dtype).requires_grad_(False)
        networks = *(checkpointed(m, self.checkpoint) for m in (student, teacher)), heads
        return Step(*networks, *self[3:])

    def inputs(self):
        x0 = torch.empty(self.batch, *self.latent, device="meta")
        text = Text(torch.empty(self.batch, *self.context, device="meta"),
                    torch.empty(self.batch, self.student.config.pooled_dim, device="meta"))
        if more := self.student.config.in_channels - self.latent[0]:
            text = TextImage(*text, torch.empty(self.batch, more, *self.latent[1:], device="meta"))
        m = round(self.config.misaligned * self.batch)
        wrong = Wrong(torch.arange(m, device="meta"), type(text)(*(t[:m] for t in text)), x0.new_ones(m), m)
        return x0, text, wrong if m else None, draw(x0, self.config.easy_steps, self.config, (0,))

    def fakes(self, x0: Tensor, text: Text, drawn: Draws, graph: bool) -> Fake:
        with torch.set_grad_enabled(graph):
            return fake_pass(self.student, self.teacher, self.heads, x0, text, drawn, self.config)

    def heads_backward(self, x0: Tensor, text: Text, wrong: Wrong | None, drawn: Draws, fake: Fake) -> None:
        heads_loss(self.teacher, self.heads, x0, text, wrong, fake.feats, drawn, self.config)[0].backward()

    def run(self, look: Callable[[str], None] = lambda name: None) -> None:
        """A step without optimizers, as it is trained. look(name) precedes the fakes, the heads' loss, the
        student's loss and its backward."""
        x0, text, wrong, drawn = self.inputs()
        look("fakes")
        fake = self.fakes(x0, text, drawn, True)
        look("heads")
        self.heads_backward(x0, text, wrong, drawn, fake)
        look("student")
        loss = student_loss(self.heads, text, fake, drawn, self.config, grid_of(self.teacher, x0))[0]
        look("backward")
        loss.backward(inputs=[p for p in self.student.parameters() if p.requires_grad])


def peak(step: Step, ops: Kernels, world: int = 1, shard: int = 1, teacher_shard: int = 1,
         accumulate: int = 1) -> tuple[int, tuple[int, int, int]]:
    """(kept, (activations, gradients, gathered)): bytes of one step with `ops` beside weights and the heads'
    gradients, kept before the student's backward; and, at the worst moment, alive, of them the student's
    gradients, and whole weights of what is shared.

    One process casts fp32 masters where it uses them; of several (`world`), each gathers them cast, block by
    block. `shard` of them share the gradients, `teacher_shard` the teacher."""
    made = step.made(ops, torch.float32 if world == 1 else step.teacher.pos_embed.dtype)
    live, kept, n = LiveBytes(*made[:3]), 0, count(made.student, True)
    block = max(count(module, True) for module in made.student.joint_blocks)
    size = step.teacher.pos_embed.element_size()

    def gathered(model: MMDiT) -> int:
        """What is no block, the block at work, the next one as it arrives."""
        blocks = [*map(count, model.joint_blocks)]
        return size * (count(model) - sum(blocks) + 2 * max(blocks))

    always = (teacher_shard > 1) * gathered(made.teacher)

    def take(p: nn.Parameter) -> None:
        live.gradients += (accumulate == 1) * 4 * p.numel() // shard
        p.grad = None
        live.note((world > 1) * (size + 4) * block)                # a block's, before they are reduced

    def look(name: str) -> None:
        nonlocal kept
        kept = live.now
        live.gathered = always + (world > 1 and name != "heads") * gathered(made.student)

    for p in (p for p in made.student.parameters() if p.requires_grad):
        p.register_post_accumulate_grad_hook(take)
    for p in made.heads.parameters():
        p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    live.gradients = (accumulate > 1) * 4 * n // shard     # of the micro-batches before
    with live:
        made.run(look)
    live.note((world > 1) * 8 * count(made.heads))     # the heads' gradients flat, and their mean
    return kept, live.peak


def memory_plan(step: Step, ops: Kernels, world: int = 1, shard: int = 1, teacher_shard: int = 1,
                accumulate: int = 1, device: str = "cuda") -> dict[str, int]:
    """Bytes on each of `world` processes by purpose at the worst moment of a training step of `accumulate`
    micro-batches. `shard` of them share the student's fp32 weights, gradients, Adam moments and average, and
    what it has frozen, `teacher_shard` the frozen teacher; 1: each has it whole."""
    student, teacher, heads = step[:3]
    _, (activations, gradients, gathered) = peak(step, ops, world, shard, teacher_shard, accumulate)
    frozen = sum(p.nbytes for p in student.parameters() if not p.requires_grad)
    own = (not step.shared if world == 1 else 2) if frozen else 2  # student and average, or one for both
    table = student.pos_embed.nbytes if frozen else 4 * student.pos_embed.numel()
    plan = {"student (fp32 weights, Adam, average)": 16 * count(student, True) // shard
            + own * (frozen // shard + table),                     # buffers are whole in every process
            "student (gradients)": gradients,
            "teacher (frozen)": sum(p.nbytes for p in teacher.parameters()) // teacher_shard
            + sum(t.nbytes for t in teacher.buffers()),
            "heads (weights, gradients, Adam)": 16 * count(heads),
            "activations and features": activations,
            "blocks gathered from the other processes": gathered}
    if device == "cuda":
        plan["CUDA, libraries 2 GiB, gaps 5 % (assumed)"] = CONTEXT + round(
            GAPS * (activations + gradients + gathered))
    return plan | {"sum": sum(plan.values())}


def placed(memory: float, world: int, replicas: int, plan: Callable[..., dict[str, int]],
           parallel: str = "auto", shard_teacher: str = "auto") -> tuple[int, int, dict[str, int]]:
    """(shard, teacher_shard, their plan) for `memory` bytes a GPU: all whole where that fits, else the
    student shared by world / replicas processes, else the teacher too, whether or not that fits; of these
    those that --parallel and --shard-teacher leave. plan(shard=, teacher_shard=) is a memory_plan."""
    n = world // replicas
    left = [(shard, teacher) for shard, teacher in dict.fromkeys([(1, 1), (n, 1), (n, n)])
            if parallel == "auto" or (shard == n if parallel == "fsdp" else shard == 1)
            if shard_teacher == "auto" or (teacher == n if shard_teacher == "on" else teacher == 1)]
    for shard, teacher in left:
        found = plan(shard=shard, teacher_shard=teacher)
        if found["sum"] <= memory:
            break
    return shard, teacher, found
