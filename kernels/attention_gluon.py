"""The forward pass of joint attention in Gluon, for sm_90: one warp copies, two warpgroups compute.

Formula, letters, pre-pass and backward pass are those of attention.py, which this file imports: it
is the one kernel file that does not stand alone. It is opt-in (--kernels gluon), because no GPU has
timed it. Triton has no interpreter for Gluon, so that no test on a CPU computes values with it; an
emulator of PTX did. Heads have a width of 64.

A program computes TILE queries of one head, and goes through all keys in tiles of TILE:

    producer, warp 8: copies q, then k and v of each tile by TMA into the next of STAGES slots
    consumers c = 0 and 1, warps 0 to 3 and 4 to 7, with M queries each; for each tile j:
        wait for the turn; issue s = q k_j^T and acc += p_(j-1) v_(j-1); give the turn to the other
        wait for s; p_j = exp2(s); wait for acc; free the slot of tile j - 1

The exponentials of a consumer run while its own p v is computed and while the other one has its
turn (ping-pong, Shah et al. 2024, FlashAttention-3). Only the turn makes the consumers wait for
each other. Every wait is for a phase of a barrier, which is complete with:

    arrived[c]    the bytes of the queries of consumer c
    full[slot]    the bytes of k and v of a tile
    free[slot]    one arrival from each consumer: its products have read the slot
    turn[c]       one arrival from the other consumer: its products are issued

The tiles of image's keys come first, the last of them ahead of all: it is masked before the loop.
The last tile of text's keys is the last of all, and the loop has a branch for its mask.
"""
import functools

import torch
from torch import Tensor

from kernels import attention

try:
    import triton
    import triton.experimental.gluon.language as gl
    from triton.experimental import gluon
    from triton.experimental.gluon.language.nvidia.hopper import (fence_async_shared, mbarrier, tma,
                                                                  warpgroup_mma, warpgroup_mma_wait)
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
    if triton.__version__.startswith("3.6."):
        raise ImportError("warp_specialize takes other arguments")
except ImportError:
    gluon = None

reference_joint_attention = attention.reference_joint_attention


# --- kernel; a pair (x[0], x[1]) is of text and image ---

if gluon is not None:
    DH = gl.constexpr(64)                     # head width
    M = gl.constexpr(64)                      # queries of a consumer
    TILE = gl.constexpr(attention.ROWS)       # 2 M, and what a block of maxima has: 128
    STAGES = gl.constexpr(4)   # more than 2: tile j + 1 is waited for while j - 1 is still in use
    # copies by TMA: Triton 3.7 has the second names, 3.9 the first ones, 3.8 both
    _load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
    _store = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global

    @gluon.jit
    def _produce(q, k, v, slots, barriers, b, head, n, row, tiles_img, tiles):
        """Copy the queries of both consumers, then keys and values of all tiles."""
        q_slots, k_slots, v_slots = slots
        arrived, full, free, _ = barriers
        for c in gl.static_range(2):
            mbarrier.expect(arrived.index(c), q.block_type.nbytes)
            _load(q, [b, row + c * M, head * DH], arrived.index(c), q_slots.index(c))
        for j in range(tiles):
            keys, values, tile = k[1], v[1], j - 1
            if j == 0:
                tile = tiles_img - 1
            if j >= tiles_img:
                keys, values, tile = k[0], v[0], j - tiles_img
            slot = j % STAGES
            mbarrier.wait(free.index(slot), (j // STAGES + 1) % 2)
            mbarrier.expect(full.index(slot), 2 * keys.block_type.nbytes)
            _load(keys, [b, tile * TILE, (n + head) * DH], full.index(slot), k_slots.index(slot))
            _load(values, [b, tile * TILE, (2 * n + head) * DH], full.index(slot),
                  v_slots.index(slot))

    @gluon.jit
    def _soften(s, top, total, ONLINE: gl.constexpr, SCALE: gl.constexpr):
        """Return p of the scores s, maximum and sum of each row so far, and the factor for what was
        summed before."""
        if ONLINE:
            new = gl.maximum(top, gl.max(s, 1) * SCALE)
            p, old = gl.exp2(s * SCALE - new[:, None]), gl.exp2(top - new)
            total *= old
        else:
            new, old, p = top, top, gl.exp2(s * SCALE)
        return p, new, total + gl.sum(p, 1), old

    @gluon.jit
    def _attend(c: gl.constexpr, slots, barriers, first, last, tiles, ONLINE: gl.constexpr,
                SCALE: gl.constexpr):
        """Return softmax(q k^T) v and log2 of the softmax's denominator. The first tile has `first`
        keys and the last one `last`."""
        q_slots, k_slots, v_slots = slots
        arrived, full, free, turn = barriers
        S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE, 16])
        ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DH, 16])
        P: gl.constexpr = gl.DotOperandLayout(0, ACC, 2)
        zero, acc = gl.zeros([M, TILE], gl.float32, S), gl.zeros([M, DH], gl.float32, ACC)
        total = gl.zeros([M], gl.float32, gl.SliceLayout(1, S))
        top = gl.full([M], -float("inf") if ONLINE else 0.0, gl.float32, gl.SliceLayout(1, S))
        i = gl.arange(0, TILE, gl.SliceLayout(0, S))

        mbarrier.wait(arrived.index(c), 0)
        mbarrier.wait(full.index(0), 0)
        q = q_slots.index(c).reshape([M, DH])
        k = k_slots.index(0).reshape([TILE, DH])
        s = warpgroup_mma(q, k.permute((1, 0)), zero, use_acc=False, is_async=True)
        s = warpgroup_mma_wait(0, [s])
        s = gl.where((i < first)[None, :], s, -float("inf"))
        p, top, total, old = _soften(s, top, total, ONLINE, SCALE)
        p = gl.convert_layout(p.to(q.dtype), P)
        mbarrier.wait(full.index(1), 0, pred=tiles > 1)
        for j in range(1, tiles):
            k = k_slots.index(j % STAGES).reshape([TILE, DH])
            v = v_slots.index((j - 1) % STAGES).reshape([TILE, DH])
            mbarrier.wait(turn.index(c), (j - 1) % 2)
            s = warpgroup_mma(q, k.permute((1, 0)), zero, use_acc=False, is_async=True)
            acc = warpgroup_mma(p, v, acc, is_async=True)
            mbarrier.arrive(turn.index(1 - c))
            s = warpgroup_mma_wait(1, [s])
            if j == tiles - 1:
                s = gl.where((i < last)[None, :], s, -float("inf"))
            p, top, total, old = _soften(s, top, total, ONLINE, SCALE)
            # This wait is a loop, beyond which ptxas moves no exponential. Without it most of them
            # followed the wait for acc, when no product of this consumer is being computed.
            mbarrier.wait(full.index((j + 1) % STAGES), (j + 1) // STAGES % 2, pred=j + 1 < tiles)
            acc = warpgroup_mma_wait(0, [acc])
            mbarrier.arrive(free.index((j - 1) % STAGES))
            if ONLINE:
                acc *= gl.convert_layout(old, gl.SliceLayout(1, ACC))[:, None]
            p = gl.convert_layout(p.to(q.dtype), P)
        v = v_slots.index((tiles - 1) % STAGES).reshape([TILE, DH])
        acc = warpgroup_mma_wait(0, [warpgroup_mma(p, v, acc, is_async=True)])
        acc *= (1 / gl.convert_layout(total, gl.SliceLayout(1, ACC)))[:, None]
        return acc, top + gl.log2(total)

    @gluon.jit
    def _consume(c: gl.constexpr, out, lse, norms, slots, barriers, b, head, tile, row, length,
                 first, last, tiles, LIMIT: gl.constexpr, SCALE: gl.constexpr):
        """Compute M rows of out [b, l, n, dh] and of lse."""
        # the bound of the scores chooses the softmax
        others = gl.arange(0, 32, gl.BlockedLayout([1], [32], [4], [0]))
        largest = gl.zeros([32], gl.float32, others.type.layout)
        for i in range(0, tiles, 32):
            more = gl.load(norms + tiles + i + others, i + others < tiles, 0)
            largest = gl.maximum(largest, more)
        if gl.load(norms + tile) * gl.max(largest, 0) < LIMIT:
            acc, logs = _attend(c, slots, barriers, first, last, tiles, False, SCALE)
        else:
            acc, logs = _attend(c, slots, barriers, first, last, tiles, True, SCALE)

        row += c * M                        # may be beyond the end: then nothing is stored
        slot = slots[0].index(c)            # of the queries, which have been read
        slot.reshape([M, DH]).store(acc.to(slot.dtype))
        fence_async_shared()                # TMA reads what these threads wrote
        _store(out, [b, row, head * DH], slot)
        rows = row + gl.arange(0, M, logs.type.layout)
        gl.store(lse + rows, logs, rows < length)
        tma.store_wait(0)

    @gluon.jit
    def _forward_gluon(q_txt, q_img, k_txt, k_img, v_txt, v_img, out_txt, out_img, lse, maxima,
                       l_txt, l_img, l_lse, LIMIT: gl.constexpr, SCALE: gl.constexpr):
        """Compute a tile of queries of either stream: rows of out [b, l, n, dh], lse [b, n, l]."""
        q, out, k = (q_txt, q_img), (out_txt, out_img), (k_txt, k_img)
        v = k if v_img is None else (v_txt, v_img)
        head, b, n = gl.program_id(1), gl.program_id(2), gl.num_programs(1)
        tiles_txt, tiles_img = gl.cdiv(l_txt, TILE), gl.cdiv(l_img, TILE)
        tiles = tiles_txt + tiles_img                   # also the number of blocks in maxima
        first, last = l_img - (tiles_img - 1) * TILE, l_txt - (tiles_txt - 1) * TILE

        # the queries: tiles of text, if they are wanted, then of image
        tile = gl.program_id(0) + tiles - gl.num_programs(0)
        at = b.to(gl.int64) * n + head
        norms = maxima + at * 2 * tiles
        queries, target, row, length = q[1], out[1], (tile - tiles_txt) * TILE, l_img
        lse += at * l_lse + l_lse - l_img
        if tile < tiles_txt:
            queries, target, row, length = q[0], out[0], tile * TILE, l_txt
            lse += l_img - l_lse

        TYPE: gl.constexpr = q_img.dtype
        BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
        slots = (gl.allocate_shared_memory(TYPE, [2, 1, M, DH], q_img.layout),
                 gl.allocate_shared_memory(TYPE, [STAGES, 1, TILE, DH], k_img.layout),
                 gl.allocate_shared_memory(TYPE, [STAGES, 1, TILE, DH], k_img.layout))
        barriers = (gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER),
                    gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER),
                    gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER),
                    gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER))
        arrived, full, free, turn = barriers
        for c in gl.static_range(2):
            mbarrier.init(arrived.index(c), count=1)
            mbarrier.init(turn.index(c), count=1)
        for i in gl.static_range(STAGES):
            mbarrier.init(full.index(i), count=1)
            mbarrier.init(free.index(i), count=2)
        fence_async_shared()                            # TMA completes the barriers
        mbarrier.arrive(turn.index(0))

        # The producer's warpgroup has the least number of registers, the consumers share the rest.
        gl.warp_specialize([
            (_consume, (0, target, lse, norms, slots, barriers, b, head, tile, row, length, first,
                        last, tiles, LIMIT, SCALE)),
            (_consume, (1, target, lse, norms, slots, barriers, b, head, tile, row, length, first,
                        last, tiles, LIMIT, SCALE)),
            (_produce, (queries, k, v, slots, barriers, b, head, n, row, tiles_img, tiles))],
            [4, 1], [240, 24])


# --- launcher ---

def missing(device: torch.device) -> str:
    """Return what the kernel lacks on this device, or nothing."""
    if attention.INTERPRET:
        return "Triton's interpreter does not run Gluon"
    if gluon is None:
        return "Gluon's attention needs Triton 3.7 or later"
    if device.type != "cuda" and attention.ARCH is None:
        return f"Gluon's attention needs a GPU (got {device})"
    if (arch := attention._arch(device)) != 90:
        return f"Gluon's attention needs compute capability 9.0 (got {arch / 10})"
    return ""


@functools.cache
def _layout(rows: int, dtype: torch.dtype):
    kind = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}[dtype]
    return gl.NVMMASharedLayout.get_default_for([1, rows, DH.value], kind)


def _with_layout(tile):
    """Return a descriptor of attention._tiles with its layout in shared memory; None for None."""
    return tile and TensorDescriptor(tile.base, tile.shape, tile.strides, tile.block_shape,
                                     _layout(tile.block_shape[1], tile.base.dtype))


def forward(qkv_txt: Tensor | None, qkv_img: Tensor, qk_txt: Tensor, qk_img: Tensor, maxima: Tensor,
            wq_txt: Tensor | None, wk_txt: Tensor | None, wq_img: Tensor | None,
            wk_img: Tensor | None, eps: float, need_txt: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return (out_txt, out_img, lse) as attention.forward does. Raises RuntimeError for another GPU
    or Triton, ValueError for heads of another width."""
    if why := missing(qkv_img.device):
        raise RuntimeError(f"attention: {why}")
    if qkv_img.shape[-1] != DH.value:
        raise ValueError(f"attention: heads must have a width of {DH.value} for Gluon's kernel "
                         f"(got {qkv_img.shape[-1]})")
    out_txt, out_img, lse = attention.forward_fake(qkv_txt, qkv_img, qk_txt, qk_img, maxima, wq_txt,
                                                   wk_txt, wq_img, wk_img, eps, need_txt)
    b, l_img, _, n, _ = qkv_img.shape
    l_txt = qkv_txt.shape[1] if attention._there(qkv_txt) else 0
    fold, qkv = qk_img.numel() > 0, (qkv_txt, qkv_img)
    q, k, v = attention._qkv_tiles((qk_txt, qk_img) if fold else qkv, qkv, M.value, TILE.value)
    out = attention._pair(attention._tiles, out_txt, out_img, M.value)
    tiles = [attention._cdiv(x.shape[1], TILE.value) for x in (out_txt, out_img)]
    _forward_gluon[(sum(tiles), n, b)](
        *map(_with_layout, (*q, *k, *v, *out)), lse, maxima, l_txt, l_img, lse.shape[2],
        LIMIT=attention._limit(qkv_img), SCALE=1.0 if fold else attention._score_scale(qkv_img),
        num_warps=4)
    return out_txt, out_img, lse


# --- registration and autograd ---

forward_op = attention._register("forward_gluon", forward, attention.forward_fake)
torch.library.register_autograd("ladd::joint_attention_forward_gluon", attention._gradients,
                                setup_context=attention._setup, lib=attention._LIBRARY)


def joint_attention(qkv_txt: Tensor | None, qkv_img: Tensor,
                    norm_txt: tuple[Tensor, Tensor] | None = None,
                    norm_img: tuple[Tensor, Tensor] | None = None, eps: float = 1e-6,
                    need_txt: bool = True) -> tuple[Tensor | None, Tensor]:
    """Compute attention.joint_attention, which says what it takes, with this forward pass."""
    attention._check(qkv_txt, qkv_img, norm_txt, norm_img)
    weights = *(norm_txt or (None, None)), *(norm_img or (None, None))
    frozen = [None if x is None else x.detach() for x in (qkv_txt, qkv_img, *weights)]
    out_txt, out_img, _ = forward_op(qkv_txt, qkv_img, *attention.prepare_op(*frozen, eps),
                                     *weights, eps, need_txt)
    return (out_txt if need_txt and qkv_txt is not None else None), out_img
