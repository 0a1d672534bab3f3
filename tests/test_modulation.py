"""The modulation kernels under Triton's interpreter against the float64 reference, and what they
compile to.

The interpreter runs 64 programs in about a second: shapes are small, lengths end inside, at and
after a tile.
"""
import itertools
import json
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from conftest import assert_close, compiler, rng
from torch import Tensor
from torch.utils.checkpoint import checkpoint

pytest.importorskip("triton")
from kernels import modulation  # noqa: E402

pytestmark = pytest.mark.skipif(not modulation.INTERPRET, reason="needs TRITON_INTERPRET=1")
# name: which of x, branch, gate, shift, scale, shift2, scale2 it takes
ARGUMENTS = {"modulate": (0, 3, 4), "modulate2": (0, 3, 4, 5, 6), "gate": (0, 1, 2),
             "gate_modulate": (0, 1, 2, 3, 4)}
NAMES = ("x", "branch", "gate", "shift", "scale", "shift2", "scale2")
every = pytest.mark.parametrize("name", ARGUMENTS)


def inputs(name: str, b: int, l: int, d: int, dtype=torch.float32, seed: int = 0) -> list[Tensor]:
    """Leaves of the function's arguments; x is far from zero, so that a lost mean shows."""
    g = rng(seed)
    draw = lambda *shape: torch.randn(shape, generator=g, dtype=torch.float64).to(dtype)
    x = [2 * draw(b, l, d) + 3, draw(b, l, d), *(draw(b, d) for _ in range(5))]
    return [x[i].requires_grad_() for i in ARGUMENTS[name]]


def flat(out) -> list[Tensor]:
    return list(out) if isinstance(out, tuple) else [out]


def run(function, args: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """(outputs, gradients of the args that need one) of function(*args); gradients of outputs are
    fixed."""
    out = flat(function(*args))
    dout = [torch.randn(o.shape, generator=rng(9 + i), dtype=torch.float64).to(o) for i, o
            in enumerate(out)]
    wanted = [a for a in args if a.requires_grad]
    return [o.detach() for o in out], list(torch.autograd.grad(out, wanted, dout)) if wanted else []


def against_reference(name: str, args: list[Tensor], tol: float | None = None) -> None:
    exact = [a.detach().double().requires_grad_() for a in args]
    out, grads = run(getattr(modulation, name), args)
    out64, grads64 = run(getattr(modulation, f"reference_{name}"), exact)
    labels = [f"{name}, output {i}" for i in range(len(out))] + [f"d{NAMES[i]}" for i
                                                                 in ARGUMENTS[name]]
    for label, a, e in zip(labels, out + grads, out64 + grads64, strict=True):
        assert_close(label, a, e.to(a.dtype), tol)


# --- values ---

@every
@pytest.mark.parametrize("l", [1, 15, 16, 63, 64, 65, 154, 333])
def test_lengths(name, l):
    against_reference(name, inputs(name, 1 + (l < 100), l, 64))


@every
@pytest.mark.parametrize("b, l, d", [(2, 5, 128), (1, 3, 192), (3, 2, 832), (1, 3, 1536), (2, 2,
                                                                                           2432)])
def test_widths(name, b, l, d):
    against_reference(name, inputs(name, b, l, d))


@pytest.mark.parametrize("name, kind", [("modulate2", "forward"), ("modulate2", "sums"),
                                        ("gate_modulate", "backward"), ("gate_modulate", "many"),
                                        ("gate", "sums")])
def test_the_rows_of_a_gpu(name, kind, monkeypatch):
    """The tile heights, blocks and tails with which the kernels are launched on a GPU."""
    sms, rows = modulation.TABLE[90]
    monkeypatch.setitem(modulation.TABLE, 0, (1, {k: rows[kind] for k in rows}))
    modulation._table.cache_clear()
    against_reference(name, inputs(name, 1, 5, 64 * 7))
    modulation._table.cache_clear()


@every
@pytest.mark.parametrize("eps", [1e-6, 0.3])
def test_float64_gradients_by_finite_differences(name, eps):
    args = inputs(name, 2, 3, 64, torch.float64)
    function = getattr(modulation, name)
    call = function if name == "gate" else lambda *a: function(*a, eps)
    against_reference(name, args)
    assert torch.autograd.gradcheck(call, args, fast_mode=True)
    if name != "gate":
        out, expected = flat(call(*args)), flat(getattr(modulation, f"reference_{name}")(*args,
                                                                                         eps))
        for i, (a, e) in enumerate(zip(out, expected)):
            assert_close(f"eps {eps}, output {i}", a, e)


@every
def test_half_precision_is_the_wide_result_rounded_once(name):
    for dtype in (torch.bfloat16, torch.float16):
        args = inputs(name, 2, 17, 64, dtype)
        out, grads = run(getattr(modulation, name), args)
        wide, _ = run(getattr(modulation, name), [a.detach().float() for a in args])
        for i, (a, e) in enumerate(zip(out, wide)):
            # a GPU rounds to nearest, the interpreter towards zero
            if dtype == torch.bfloat16:
                e = (e.view(torch.int32) & -2 ** 16).view(torch.float32)
            assert a.dtype == dtype and torch.equal(a, e.to(dtype)), f"output {i}"
        against_reference(name, args, 1e-2 if dtype == torch.bfloat16 else 2e-3)


def test_extreme_rows():
    x = torch.zeros(1, 3, 64)
    # constant; variance like eps; offset
    x[0, 1], x[0, 2] = 1e-3 * torch.randn(64), 1e4 + torch.randn(64)
    shift, scale = torch.randn(1, 64), torch.randn(1, 64)
    y, plain = modulation.modulate(x, shift, scale), modulation.reference_modulate(x, shift, scale)
    exact = modulation.reference_modulate(x.double(), shift.double(), scale.double())
    # the mean of fp32 numbers around 1e4 is wrong in any order of summation: twice the reference's
    # error
    assert ((y - exact).abs() <= 2 * (plain - exact).abs().amax(-1, True) + 1e-6).all()
    assert torch.equal(y[:, 0], shift)


# --- strides ---

@pytest.mark.parametrize("chunks", [6, 9])
def test_chunks_of_the_modulation_are_read_in_place(chunks, monkeypatch):
    b, l, d = 2, 5, 128
    monkeypatch.setattr(Tensor, "contiguous", lambda self: pytest.fail("a view was copied"))
    for name, which in ARGUMENTS.items():
        whole = torch.randn(b, chunks * d, generator=rng(1)).requires_grad_()
        views = whole.chunk(chunks, -1)[-5:]
        args = [a.detach().requires_grad_() if i < 2 else views[i - 2]
                for i, a in zip(which, inputs(name, b, l, d))]
        leaves = [a for a in args if a.is_leaf] + [whole]
        out = flat(getattr(modulation, name)(*args))
        dout = [torch.randn(o.shape, generator=rng(2)) for o in out]
        found = torch.autograd.grad(out, leaves, dout)
        whole64 = whole.detach().double().requires_grad_()
        views = whole64.chunk(chunks, -1)[-5:]
        args = [a.detach().double().requires_grad_() if i < 2 else views[i - 2] for i, a
                in zip(which, args)]
        expected = torch.autograd.grad(flat(getattr(modulation, f"reference_{name}")(*args)),
                                       [a for a in args if a.is_leaf] + [whole64],
                                       [g.double() for g in dout])
        for i, (a, e) in enumerate(zip(found, expected, strict=True)):
            assert_close(f"{name}, gradient {i}", a, e.float())


@every
def test_expanded_and_strided(name):
    """Modulation of batch stride 0; x and branch with other row and batch strides; gradients of
    stride 0."""
    args = [a.detach() for a in inputs(name, 3, 7, 128)]
    for i, a in enumerate(args):
        if a.ndim == 3:
            # tokens first, then batch, padded rows
            wide = torch.full((7, 3, 200), float("nan"))
            wide[..., 8:136] = a.transpose(0, 1)
            args[i] = wide.transpose(0, 1)[..., 8:136].requires_grad_()
        else:
            args[i] = a[:1].expand(3, -1).requires_grad_()
        assert not args[i].is_contiguous()
    against_reference(name, args)
    # copied once
    columns = [a.detach().mT.contiguous().mT if a.ndim == 3 else a.detach() for a in args]
    for a, e in zip(flat(getattr(modulation, name)(*columns)),
                    flat(getattr(modulation, name)(*args))):
        assert torch.equal(a, e)
    summed = lambda f, leaves: torch.autograd.grad(sum(o.sum() for o in flat(f(*leaves))), leaves)
    found = summed(getattr(modulation, name), [a.detach().requires_grad_() for a in args])
    exact = [a.detach().double().requires_grad_() for a in args]
    expected = summed(getattr(modulation, f"reference_{name}"), exact)
    for i, a, e in zip(ARGUMENTS[name], found, expected):
        # sum w and sum w n cancel against w: errors are of the size of w, here up to 4, not of dx
        assert (a - e).abs().max() < 2e-5 * max(4, e.abs().max()), NAMES[i]


def padded(t: Tensor, pad: int) -> Tensor:
    """The values of t in rows that are `pad` longer, between NaN; with three dimensions also tokens
    first."""
    wide = torch.full((*t.shape[:-1], t.shape[-1] + pad), float("nan"), dtype=t.dtype)
    wide = wide.transpose(0, 1).contiguous().transpose(0, 1) if t.ndim == 3 and pad % 16 else wide
    wide[..., :t.shape[-1]] = t
    return wide[..., :t.shape[-1]]


@every
def test_every_tensor_has_strides_of_its_own(name):
    plain = inputs(name, 3, 7, 64)
    args = [padded(a.detach(), 8 * i + 8).requires_grad_() for i, a in enumerate(plain)]
    out, expected = flat(getattr(modulation, name)(*args)), flat(getattr(modulation, name)(*plain))
    dout = [torch.randn(3, 7, 64, generator=rng(i)) for i in range(len(out))]
    found = torch.autograd.grad(out, args, [padded(g, 24 * i + 56) for i, g in enumerate(dout)])
    for a, e in zip([*out, *found], [*expected, *torch.autograd.grad(expected, plain, dout)],
                    strict=True):
        assert torch.equal(a, e)


@every
@pytest.mark.parametrize("b, l", [(2, 0), (0, 3)])
def test_empty(name, b, l):
    args = inputs(name, b, l, 64)
    out, grads = run(getattr(modulation, name), args)
    assert all(o.shape == (b, l, 64) for o in out)
    assert all(g.shape == a.shape and not g.any() for g, a in zip(grads, args, strict=True))


# --- only what is needed ---

def subsets(name: str):
    return itertools.product((False, True), repeat=len(ARGUMENTS[name]))


@every
def test_every_subset_of_gradients(name, monkeypatch):
    args = inputs(name, 2, 5, 64)
    _, full = run(getattr(modulation, name), args)
    outputs, op = [], torch.ops.ladd.modulation_backward
    recorded = lambda *a: outputs.append(op(*a)) or outputs[-1]
    monkeypatch.setattr(torch.ops.ladd, "modulation_backward", recorded)
    for needs in subsets(name):
        some = [a.detach().requires_grad_(n) for a, n in zip(args, needs)]
        outputs.clear()
        _, grads = run(getattr(modulation, name), some)
        assert len(grads) == sum(needs)
        for a, e in zip(grads, (g for g, n in zip(full, needs) if n), strict=True):
            assert torch.equal(a, e), needs
        need = dict(zip((NAMES[i] for i in ARGUMENTS[name]), needs))
        if not any(v for k, v in need.items() if name != "gate" or k != "x"):
            # gate: dx is dz, nothing to launch
            assert not outputs, needs
            continue
        (dx, dbranch, sums), = outputs
        assert dx.numel() == (2 * 5 * 64 if need["x"] and name != "gate" else 0), needs
        assert dbranch.numel() == (2 * 5 * 64 if need.get("branch") else 0), needs
        vectors = sum(v for k, v in need.items() if k not in ("x", "branch"))
        assert sums.shape == (2, vectors, 64), needs


def test_frozen_networks_save_no_branch():
    x, branch, *vectors = inputs("gate_modulate", 1, 4, 64)
    out = modulation.gate_modulate(x, branch, *(v.detach() for v in vectors))[1]
    saved = [t for t in out.grad_fn.saved_tensors if t is not None]
    # x', statistics, gate and scale
    assert sum(t.numel() for t in saved) == 4 * 64 + 2 * 4 + 2 * 64


@pytest.mark.parametrize("name, used", [("modulate2", 0), ("modulate2", 1), ("gate_modulate", 0),
                                        ("gate_modulate", 1)])
def test_one_of_two_outputs_used(name, used):
    args = inputs(name, 2, 5, 64)
    exact = [a.detach().double().requires_grad_() for a in args]
    dout = torch.randn(2, 5, 64, generator=rng(3))
    function, reference = getattr(modulation, name), getattr(modulation, f"reference_{name}")
    found = torch.autograd.grad(function(*args)[used], args, dout, allow_unused=True)
    expected = torch.autograd.grad(reference(*exact)[used], exact, dout.double(), allow_unused=True)
    for i, a, e in zip(ARGUMENTS[name], found, expected):
        assert (a is None) == (e is None), NAMES[i]
        if e is not None:
            assert_close(NAMES[i], a, e.float())


# --- memory ---

@every
def test_inputs_stay_and_outputs_are_written(name, monkeypatch):
    def poisoned(real):
        return lambda *a, **k: real(*a, **k).fill_(float("nan"))
    args = inputs(name, 2, 33, 192)
    before, expected = [a.detach().clone() for a in args], run(getattr(modulation, name), args)
    monkeypatch.setattr(Tensor, "new_empty", poisoned(Tensor.new_empty))
    for f in ("empty", "empty_like"):
        monkeypatch.setattr(torch, f, poisoned(getattr(torch, f)))
    found = run(getattr(modulation, name), args)
    for a, e in zip(found[0] + found[1], expected[0] + expected[1], strict=True):
        assert torch.equal(a, e)             # what is not written is NaN
    assert all(torch.equal(a, b) for a, b in zip(args, before))


@every
def test_nan_reaches_its_row_and_no_other_sample(name):
    args = inputs(name, 2, 5, 64)
    with torch.no_grad():
        args[0][1, 3, 7] = float("nan")
    out, grads = run(getattr(modulation, name), args)
    for o in [*out, *([grads[0]] if name != "gate" else [])]:
        bad = o.isnan().any(-1)
        assert bad[1, 3] and bad.sum() == 1
    for g, a in zip(grads[1:], args[1:]):
        assert not g[0].isnan().any()
    if name != "gate":
        assert grads[-1][1].isnan().any()            # dscale of the sample


# --- torch.library, torch.compile, checkpointing ---

@every
def test_opcheck(name):
    args = [None] * 7
    for i, a in zip(ARGUMENTS[name], inputs(name, 2, 3, 64)):
        args[i] = a
    torch.library.opcheck(torch.ops.ladd.modulation_forward, (*args, 1e-6))
    dz, dy, dy2, h = torch.randn(4, 2, 3, 64).unbind(0)
    norm = name != "gate"
    args = (None if norm and name != "gate_modulate" else dz, dy if norm else None, dy2
            if name == "modulate2" else None, h if norm else None, torch.rand(2, 3, 2) if norm
            else None, args[1], args[2], args[4], args[6], [a is not None for a in args])
    args = [a.detach() if isinstance(a, Tensor) else a for a in args]
    torch.library.opcheck(torch.ops.ladd.modulation_backward, tuple(args))


def block(x, branch, whole):
    """What a block does with its modulation between its products."""
    m = whole.chunk(6, -1)
    y, y2 = modulation.modulate2(x, m[0], m[1], m[3], m[4])
    x, z = modulation.gate_modulate(x, branch + y, m[2], m[3], m[4])
    return modulation.gate(x, z * y2, m[5]) + modulation.modulate(x, m[0], m[1])


def block_inputs(l: int) -> list[Tensor]:
    shapes = (2, l, 64), (2, l, 64), (2, 384)
    return [torch.randn(shape, generator=rng(i)).requires_grad_() for i, shape in enumerate(shapes)]


def test_compiled_as_one_graph():
    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    for l in (5, 33):
        expected, found = run(block, block_inputs(l)), run(compiled, block_inputs(l))
        for i, (a, e) in enumerate(zip(found[0] + found[1], expected[0] + expected[1],
                                       strict=True)):
            assert_close(f"output or gradient {i}", a, e, 1e-6)


def test_lengths_do_not_recompile():
    torch._dynamo.reset()
    graphs = []
    def backend(graph, example):
        graphs.append(graph)
        return graph.forward
    compiled = torch.compile(block, fullgraph=True, backend=backend, dynamic=True)
    for l in (5, 33, 64):
        compiled(*block_inputs(l))
    assert len(graphs) == 1


def test_length_is_no_part_of_a_kernels_key():
    for kernel in (modulation._forward, modulation._backward):
        text = Path(modulation.__file__).read_text()
        start = '@triton.jit(do_not_specialize=["L"])\n    def '
        assert text.count(start + kernel.fn.__name__) == 1


def test_activation_checkpointing():
    plain = run(block, block_inputs(9))
    again = run(lambda *a: checkpoint(block, *a, use_reentrant=False), block_inputs(9))
    for a, e in zip(again[0] + again[1], plain[0] + plain[1], strict=True):
        assert torch.equal(a, e)                     # and so is a second run: deterministic


# --- launch parameters ---

class Recorder(NamedTuple):
    """Stands for a kernel: keeps the grid, launches nothing."""
    grids: list

    def __getitem__(self, grid):
        self.grids.append(grid)
        return lambda *args, **options: None


@pytest.mark.parametrize("d", [64, 128, 192, 832, 1536, 2368, 2432])
def test_at_most_six_percent_of_the_lanes_idle(d):
    for arch, (_, rows) in modulation.TABLE.items():
        for kind, row in rows.items():
            width, tail = modulation.pieces(d, row.block)
            lanes = d // width * width + tail
            assert d <= lanes and (tail > 0) == (d % width > 0) and 1 - d / lanes <= 0.06, (arch,
                                                                                            kind)
            assert width & (width - 1) == 0 and tail & (tail - 1) == 0 and width <= row.block


def test_an_unknown_architecture_is_announced_once(monkeypatch, recwarn):
    modulation._table.cache_clear()
    monkeypatch.setattr(modulation, "ARCH", 75)
    args = [a.detach() for a in inputs("modulate", 1, 5, 64)]
    for _ in range(2):
        y = modulation.modulate(*args)
    assert_close("on the conservative row", y, modulation.reference_modulate(*args))
    assert [str(w.message).count("sm_75") for w in recwarn if "sm_" in str(w.message)] == [1]


@pytest.mark.parametrize("b, l, programs", [(1, 4096, 256), (2, 4096, 264), (8, 4096, 264), (2, 154,
                                                                                             20)])
def test_sums_fill_an_h100_once(b, l, programs, monkeypatch):
    """Two programs an SM while each keeps 16 tokens."""
    grids = []
    monkeypatch.setattr(modulation, "ARCH", 90)
    monkeypatch.setattr(modulation, "_wrap", lambda kernel: Recorder(grids))
    dy, scale, stats = torch.empty(1, 1, 64).expand(b, l, 64), torch.empty(b, 64), torch.empty(b, l,
                                                                                               2)
    needs = [True, False, False, True, True, False, False]
    modulation._run_backward(None, dy, None, dy, stats, None, None, scale, None, needs)
    assert [x * y for x, y in grids] == [programs]


def test_least_tokens_of_a_program_are_whole_tiles():
    for _, rows in modulation.TABLE.values():
        assert all(row.least % row.rows == 0 for kind, row in rows.items() if kind != "forward")


# --- errors ---

def test_errors(monkeypatch):
    x, branch, gate, shift, scale = (a.detach() for a in inputs("gate_modulate", 2, 3, 64))
    for bad in ((x[0], shift, scale), (x[..., :48], shift[:, :48], scale[:, :48]),
                (x, shift[:1], scale), (x, shift, scale.double()),
                (x.int(), shift.int(), scale.int()), (x, shift, x)):
        with pytest.raises(ValueError, match="modulate: .* must be .*got"):
            modulation.modulate(*bad[:2], bad[2] if bad[2].ndim == 2 else bad[2][:1])
    with pytest.raises(ValueError, match="gate: tensors must be .*2, 3, 64.*got .*2, 2, 64"):
        modulation.gate(x, branch[:, :2], gate)
    monkeypatch.setattr(modulation, "INTERPRET", False)
    with pytest.raises(RuntimeError, match="gate: .*CUDA.*TRITON_INTERPRET.*got cpu"):
        modulation.gate(x, branch, gate)
    monkeypatch.setattr(modulation, "triton", None)
    with pytest.raises(RuntimeError, match="modulate2: .*got cpu, without Triton"):
        modulation.modulate2(x, shift, scale, shift, scale)


# --- alone, and compiled for GPUs that are not here ---

@pytest.mark.slow
def test_the_file_alone_checks_itself(tmp_path):
    copy = tmp_path / "modulation.py"
    copy.write_text(Path(modulation.__file__).read_text())
    lines = compiler("-I", copy).splitlines()
    assert [line.split()[0] for line in lines[2:6]] == ["modulate", "modulate2", "gate",
                                                        "gate_modulate"]


TRACE = r"""
import torch, triton
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from triton.backends.compiler import GPUTarget
from kernels import modulation as m

class Device:
    def get_current_target(self): return GPUTarget("cuda", 90, 32)
    def get_current_device(self): return 0

def block(x, branch, whole):
    y, y2 = m.modulate2(x, *(c := whole.chunk(6, -1))[:4])
    x, z = m.gate_modulate(x, branch + y, *c[2:5])
    return m.gate(x, z * y2, c[5])

def compiler(graph, example):
    for node in graph.graph.nodes:
        if "triton" in str(node.target):
            print("writes", *node.kwargs["tensors_to_clone"])
    outputs = [o.meta["val"] for o in graph.graph.find_nodes(op="output")[0].args[0]]
    return make_boxed_func(lambda *args: [torch.zeros(o.shape, dtype=o.dtype) for o in outputs])

inputs = [torch.ones(s, requires_grad=True) for s in ((2, 5, 64), (2, 5, 64), (2, 384))]
try:
    block(*inputs)
except RuntimeError as e:
    print(e)
triton.runtime.driver.set_active(Device())
m.ARCH = 90
backend = aot_autograd(fw_compiler=compiler, bw_compiler=compiler)
torch.compile(block, fullgraph=True, backend=backend)(*inputs).sum().backward()
"""


@pytest.mark.slow
def test_torch_compile_sees_the_launches_and_what_they_write():
    """Without the interpreter: CPU tensors are refused; traced for a GPU that is not here, each
    launch is in the graph, and only outputs count as written (arguments that stand for absent ones
    do not)."""
    if torch.cuda.is_available():
        pytest.skip("a GPU is here")
    first, *lines = compiler("-c", TRACE).splitlines()
    assert "modulate2: tensors must be on CUDA" in first and "got cpu" in first
    assert lines == [f"writes {names}" for names in (
        "y_ptr y2_ptr stats_ptr", "z_ptr y_ptr stats_ptr", "z_ptr",
        "dbranch_ptr partial_ptr", "dx_ptr dbranch_ptr partial_ptr", "dx_ptr partial_ptr")]


OFFLINE = r"""
import json, re, subprocess, sys, tempfile
from pathlib import Path
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction
from kernels import modulation

class Device:
    def get_current_target(self): return GPUTarget("cuda", ARCH, 32)
    def get_current_device(self): return ARCH
    def get_current_stream(self, device=None): return 0

def tool(name, *args):
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([path, *args], capture_output=True, text=True, check=True).stdout

def getitem(self, grid):
    def launch(*args, **options):
        compiled = self.run(*args, grid=grid, warmup=True, **options)
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(compiled.asm["cubin"])
            file.flush()
            usage = tool("cuobjdump", "--dump-resource-usage", file.name)
            sass = tool("nvdisasm", "-c", file.name)
        width = lambda op: sorted({max(map(int, re.findall(r"\b(?:64|128|256)\b", m) or [32]))
                                   for m in re.findall(op + r"\.E\S*", sass)})
        rows.append(dict(kernel=f"{name}{self.fn.__name__}", arch=ARCH, width=d, frozen=frozen,
                         registers=int(re.search(r"REG:(\d+)", usage)[1]),
                         spills=int(re.search(r"STACK:(\d+)", usage)[1]),
                         loads=width("LDG"), stores=width("STG")))
    return launch

JITFunction.__getitem__ = getitem
rows, (ARCH, *widths) = [], map(int, sys.argv[1:])
triton.runtime.driver.set_active(Device())
modulation.ARCH = ARCH
bf16 = dict(dtype=torch.bfloat16)
for d in widths:
    for frozen in (False, True):
        x, branch = (torch.empty(2, 4096, d, **bf16, requires_grad=True) for _ in range(2))
        v = torch.empty(2, 9 * d, **bf16, requires_grad=not frozen).chunk(9, -1)
        for name, args in (("modulate", (x, *v[:2])), ("modulate2", (x, *v[:4])),
                           ("gate", (x, branch, v[0])), ("gate_modulate", (x, branch, *v[:3]))):
            out = getattr(modulation, name)(*args)
            out = out if isinstance(out, tuple) else (out,)
            torch.autograd.backward(out, [torch.empty_like(o) for o in out])
print(json.dumps(rows))
"""


@pytest.mark.slow
def test_accesses_are_wide_with_and_without_gradients_of_the_modulation():
    rows = json.loads(compiler("-c", OFFLINE, "90", "1536", "2432"))
    assert len(rows) == 2 * 2 * 4 * 2
    for row in rows:
        print(row)
        sums = {"gate_modulate_backward": 3, "modulate2_backward": 4}.get(row["kernel"], 0)
        # see the launch table
        many = not row["frozen"] and sums * row["width"] > modulation.MANY
        assert row["spills"] == 0 and row["registers"] <= 255, row
        assert max(row["loads"]) >= (64 if many else 128) and max(row["stores"]) >= 128, row


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90, 100])
def test_compiles_without_spills_and_with_wide_accesses(arch, machine_code):
    rows = [row for row in machine_code[0]
            if row["arch"] == arch and row["kernel"].startswith("modulation.")]
    assert len(rows) == 2 * 4 * 2
    for row in rows:
        assert row["spills"] == 0 and row["registers"] <= 255 and row["vector"], row
