"""Plan the memory of one process in a step: weights exactly, activations by formula to about 10 %.

s: bytes of a value in the compute dtype; r: of one that a norm, an attention or a gate keeps."""
from torch import nn

from ladd.core.discriminator import Discriminator
from ladd.core.mmdit import MMDiT, Stream


def count(model: nn.Module, trained: bool = False) -> int:
    """Return the number of parameters, or of those that train."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad or not trained)


def stream_bytes(stream: Stream, s: int, recompute: str, fused: bool) -> int:
    """Return the bytes per token and channel of a stream that a block keeps for backward."""
    r, queries, attentions = s if fused else 4, stream.chunks > 2, 1 + (stream.chunks == 9)
    if recompute != "none":
        return s + (recompute == "selective") * queries * r * attentions
    skipped = (".1", ".proj") if fused else (".1",)     # one row; what the kernel keeps as output
    inputs = sum(layer.in_features for name, layer in stream.named_modules()
                 if isinstance(layer, nn.Linear) and count(layer, True)
                 and not name.endswith(skipped)) // stream.attn.qkv.in_features
    gates, qk_norm = count(stream.adaLN_modulation, True) > 0, hasattr(stream.attn, "ln_q")
    # inputs of layers that train, of norms and of GELU (4 wide), the branches that gates scale
    kept = s * inputs + r * (1 + queries) + 4 * s * queries + r * gates * queries * (attentions + 1)
    if fused:       # q, k, v and output; q and k after their norms
        return kept + attentions * s * (3 + queries + 2 * qk_norm)
    norms = 4 * gates * (attentions + queries) + attentions * qk_norm * (20 if gates else 12)
    return kept + norms + attentions * 8 * (1 + queries)


def memory_plan(student: MMDiT, teacher: MMDiT, heads: Discriminator, pairs: int, more: int,
                text: int, image: int, recompute: str, fused: bool, world: int = 1, shard: int = 1,
                teacher_shard: int = 1, accumulate: int = 1, repeats: int = 1,
                shared: bool = False, device: str = "cuda") -> dict[str, int]:
    """Return bytes by purpose in one of `world` processes, for `accumulate` micro-batches of
    `pairs` with `more` mismatched and R1 samples. repeats: the heads' steps on each batch; fused:
    Triton kernels; shard, teacher_shard: processes per copy of a network; shared: a LoRA student
    uses the teacher's frozen weights."""
    def graphs(model: MMDiT, recompute: str, depth: int | None = None) -> list[int]:
        return [pairs * d * (text * stream_bytes(block.context_block, s, recompute, fused)
                             + image * stream_bytes(block.x_block, s, recompute, fused))
                for block in model.joint_blocks[:depth]]

    def gathered(model: MMDiT) -> int:      # two blocks, and what is in none
        sizes = [count(block) for block in model.joint_blocks]
        return s * (count(model) - sum(sizes) + 2 * max(sizes))

    (k, d, c), plain, read = heads.w_in.shape, recompute == "none", pairs + more
    s = teacher.pos_embed.element_size()
    r, last = s if fused else 4, heads.config.taps[-1] + 1   # the teacher stops after its last tap
    n, block = count(student, True), max(count(b, True) for b in student.joint_blocks)
    graph_s, graph_t = sum(graphs(student, recompute)), sum(graphs(teacher, recompute, last))
    block_s, block_t = max(graphs(student, "none")), max(graphs(teacher, "none", last))
    kept = graph_s + graph_t + pairs * image * d * s * (3 + k * (s < r and plain))
    # bytes per channel of a head that trains, or does not; what the references keep depends on
    # their convolution, which on a GPU is a product of 9 copies
    head, frozen_head = (5 * s / 2, 2 * s) if fused else (48, 38) if device == "cpu" else (80, 24)
    loss_d = d * (s * read + r * (read + pairs)) + c * (read + pairs) * head
    # features of a micro-batch that wait for the heads' further steps
    waiting = (repeats > 1) * image * k * d * s * (read + pairs)
    loss_g = pairs * (d * (r + s * (s < r)) + c * frozen_head)
    real = read * d * s * (image * (14 + k) + 5 * text)     # the teacher's pass without a graph
    inside = 7 * s * d * pairs * (image + text)             # gradients in a block
    grads, before = 4 * n // shard, 4 * n // shard * (accumulate > 1)
    own, others = (world > 1) * gathered(student), (teacher_shard > 1) * gathered(teacher)
    end = max(block_s + inside - 4 * block // shard, 0)     # a block's gradients replace its graph
    training, earlier = round(image * k * loss_d) + 8 * count(heads), (accumulate - 1) * waiting
    later = earlier + (repeats > 1) * image * k * d * s * read      # the fakes' count elsewhere
    # discriminator loss, student's backward, its end, the heads' further steps
    activations, gradients, blocks = max([
        (earlier + kept + max(training, real), before, others),
        (later + kept + image * k * loss_g + inside + (not plain) * block_t, before, own + others),
        (later + end + (world > 1) * (s + 4) * block, grads, own + others),
        ((repeats > 1) * (earlier + training + image * k * d * s * pairs), grads, 0)], key=sum)
    frozen = s * (count(student) - n) // shard
    table = student.pos_embed.numel() * (s if frozen else 4)
    copies = 1 - shared if frozen and world == 1 else 2     # in addition to the teacher's
    # fp32 weights in the compute dtype: copies, or what graphs keep of a LoRA
    halves = (s < 4 and world == 1) * s * (block if frozen and not plain else n)
    plan = {"student (weights, moment, EMA)": 12 * n // shard + halves + copies * (frozen + table),
            "student (gradients)": gradients,
            "teacher (frozen)": s * count(teacher) // teacher_shard + teacher.pos_embed.nbytes,
            "heads (weights, gradients, moment)": 12 * count(heads),
            "activations and features": activations,
            "blocks gathered from the other processes": blocks}
    if device == "cuda":
        gaps = round(0.05 * (activations + gradients + blocks))
        plan["CUDA, libraries 2 GiB, gaps 5 % (assumed)"] = 2 * 2 ** 30 + gaps
    return plan | {"sum": sum(plan.values())}
