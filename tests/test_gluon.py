"""Attention's forward pass in Gluon, without a GPU: operator, choice, machine code.

Triton has no interpreter for Gluon. In the first tests attention's own forward pass, interpreted,
takes the place of the kernel: they show that everything around it is right. Values of the kernel
itself are tested on a GPU (test_gpu.py).
"""
import pytest
import torch
from test_attention import call, interpreted, make, with_gradients
from test_triton import seem

import kernels
from kernels import attention, attention_gluon, bench
from ladd.cli import InputError
from ladd.engine import parallel
from ladd.engine.networks import pick_kernels, uses_triton

triton = pytest.importorskip("triton")
OLD = triton.__version__.startswith("3.6.")
needs_gluon = pytest.mark.skipif(OLD, reason="Triton 3.7 or later")


# --- the operator ---

@pytest.fixture
def calls():
    """Compute the operator by attention.forward; return a list that gets an entry for each call."""
    made = []

    def forward(*args):
        made.append(args)
        return attention.forward(*args)

    with torch.library._scoped_library("ladd", "IMPL") as library:
        library.impl("joint_attention_forward_gluon", forward, "CPU")
        yield made


@interpreted
@pytest.mark.parametrize("l_txt, norms, need_txt", [(17, "both", True), (17, "none", False),
                                                    (None, "img", True)])
def test_outputs_and_gradients_pass_through_the_operator(calls, l_txt, norms, need_txt):
    leaves = make(2, l_txt, 33, norms=norms)
    found, expected = (with_gradients(home.joint_attention, leaves, need_txt=need_txt)
                       for home in (attention_gluon, attention))
    assert found.keys() == expected.keys() and len(calls) == 1
    assert all(torch.equal(found[k], expected[k]) for k in expected)
    with torch.no_grad():
        plain = call(attention_gluon.joint_attention, leaves, need_txt=need_txt)
    assert torch.equal(plain[-1], found["out -1"])
    assert [args[-1] for args in calls] == 2 * [need_txt]


@interpreted
def test_the_operator_is_compiled_whole(calls):
    torch._dynamo.reset()
    compiled = torch.compile(attention_gluon.joint_attention, fullgraph=True, backend="aot_eager")
    leaves = make(1, 17, 33)
    found, expected = (with_gradients(f, leaves)
                       for f in (compiled, attention_gluon.joint_attention))
    assert len(calls) == 2 and all(torch.equal(found[k], expected[k]) for k in expected)


@interpreted
def test_a_selective_checkpoint_keeps_what_the_operator_computed(calls):
    from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
    leaves = make(1, 17, 33)

    def block(*tensors):
        out = call(attention_gluon.joint_attention, dict(zip(leaves, tensors)))
        return sum(o.square().sum() for o in out)

    out = checkpoint(block, *leaves.values(), use_reentrant=False,
                     context_fn=lambda: create_selective_checkpoint_contexts(parallel.ATTENTION))
    torch.autograd.grad(out, list(leaves.values()))
    assert len(calls) == 1


# --- where it runs ---

def test_it_says_in_one_line_where_it_cannot_run(monkeypatch):
    qkv, cpu, cuda = torch.zeros(1, 4, 3, 1, 64, dtype=torch.bfloat16), "cpu", torch.device("cuda")
    with pytest.raises(RuntimeError, match="^attention: Triton's interpreter does not run Gluon$"):
        attention_gluon.joint_attention(None, qkv.float())
    monkeypatch.setattr(attention, "INTERPRET", False)
    monkeypatch.setattr(attention, "_capability", lambda device: 80)
    missing = attention_gluon.missing
    if not OLD:
        assert missing(torch.device(cpu)) == "Gluon's attention needs a GPU (got cpu)"
        assert missing(cuda) == "Gluon's attention needs compute capability 9.0 (got 8.0)"
        monkeypatch.setattr(attention, "_capability", lambda device: 90)
        assert missing(cuda) == ""
    monkeypatch.setattr(attention_gluon, "gluon", None)
    assert missing(cuda) == "Gluon's attention needs Triton 3.7 or later"


@needs_gluon
def test_heads_of_128_are_refused(monkeypatch):
    monkeypatch.setattr(attention_gluon, "missing", lambda device: "")
    with pytest.raises(ValueError, match="^attention: heads must have a width of 64 .*got 128"):
        attention_gluon.joint_attention(None, torch.zeros(1, 4, 3, 1, 128))


@pytest.fixture
def hopper(monkeypatch):
    """A machine that seems to have an H100, on which all kernels pass their self-check."""
    seem(monkeypatch, "H100", 9)
    monkeypatch.setattr(kernels, "failures", lambda device, gluon=False: {})
    monkeypatch.setattr(attention, "INTERPRET", False)
    monkeypatch.setattr(attention, "_capability", lambda device: 90)


@needs_gluon
def test_load_replaces_attention_alone(hopper, capsys):
    found = kernels.load("gluon")
    assert found == kernels.load("triton")._replace(joint_attention=attention_gluon.joint_attention)
    assert pick_kernels("gluon", "auto") == found and uses_triton(found)
    for name in ("auto", "triton"):                                 # only where it is asked for
        assert kernels.load(name).joint_attention is attention.joint_attention


@needs_gluon
def test_load_says_where_it_is_refused(hopper, monkeypatch):
    for options in (("cpu",), ("auto", "fp32")):
        with pytest.raises(InputError, match="must be auto or torch for .* .got gluon.$"):
            pick_kernels("gluon", *options)
    monkeypatch.setattr(attention, "_capability", lambda device: 100)
    with pytest.raises(InputError, match="^--kernels must be auto, triton or torch here .got "
                                         "'gluon', but Gluon's .* needs .* 9.0 .got 10.0..$"):
        pick_kernels("gluon", "auto")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(attention, "INTERPRET", True)                # which is enough for triton
    with pytest.raises(InputError, match="^--kernels must be auto or torch here .got 'gluon', but "
                                         "no CUDA device was found"):
        pick_kernels("gluon", "auto")


def test_the_self_check_compares_it_with_the_reference(monkeypatch):
    """In a sample with both softmaxes; there is one set of results with it and one without."""
    cpu = torch.device("cpu")
    kept = {"joint_attention": kernels.samples(cpu, torch.float32)["joint_attention"]}
    monkeypatch.setattr(kernels, "samples", lambda device, dtype: kept)
    monkeypatch.setattr(attention, "joint_attention", attention.reference_joint_attention)

    def wrong(*args, **options):
        return tuple(1.2 * x for x in attention.reference_joint_attention(*args, **options))

    monkeypatch.setattr(attention_gluon, "joint_attention", wrong)
    kernels.failures.cache_clear()
    assert kernels.failures(cpu) == {}
    found = kernels.failures(cpu, True)
    kernels.failures.cache_clear()
    assert list(found) == ["joint_attention"]
    assert found["joint_attention"].startswith("joint_attention fails its self-check (output 0 is ")


def test_a_kernel_that_fails_ends_the_run(hopper, monkeypatch):
    if OLD:
        pytest.skip("Triton 3.7 or later")
    wrong = {True: {"joint_attention": "joint_attention fails its self-check (it is wrong)"}}
    monkeypatch.setattr(kernels, "failures", lambda device, gluon: wrong.get(gluon, {}))
    with pytest.raises(InputError, match="^--kernels: joint_attention fails its self-check .it is"):
        pick_kernels("gluon", "auto")
    assert uses_triton(pick_kernels("triton", "auto"))


def test_it_is_a_contender_where_it_is_asked_for(capsys):
    cpu = torch.device("cpu")
    assert "gluon" not in bench.attention_contenders(cpu)
    found = bench.attention_contenders(cpu, gluon=True)
    assert found["gluon"] is attention_gluon.joint_attention
    with pytest.raises(SystemExit, match="2"):
        bench.main(["--smoke", "--gluon"])
    assert capsys.readouterr().err.startswith("bench: --gluon: ")


# --- compiled for a GPU that is not here ---

@pytest.mark.slow
@needs_gluon
def test_its_machine_code(machine_code):
    """Two consumers with two loops each; no spills, no product that is waited for at once."""
    rows = [row for row in machine_code[0] if row["kernel"] == "attention.forward_gluon"]
    assert [row["case"] for row in rows] == ["sd3-medium, Gluon", "sd3.5-medium, Gluon"]
    for row in rows:
        assert row["arch"] == 90 and row["spills"] == row["hazards"] == 0 and row["ctas"] == 1
        # of 2 consumers: 4 and 8 instructions a tile, in both softmaxes ...
        assert len(row["loops"]) == 4 and row["products"] == 2 * 2 * (4 + 12 + 8)
        for order in row["loops"]:
            # ... which are issued together; turn, s, the next tile, p v
            words = [word for word in order.split() if word != "BAR"]
            assert words[:3] == ["WAIT", "MMAx12", "WAIT"] and words[-1] == "WAITx2", order
            assert sum(word.startswith("EX2") for word in words) == len(words) - 4, order
        # 2 warpgroups: 128 x 128 x 64 twice, and 128 x 128 scores
        assert row["cycles_product"] == 2 * 2 * 128 * 128 * 64 // 4096
        assert row["cycles_mufu"] >= 128 * 128 / 16
        assert row["cycles_shared_bulk"] == 2 * 128 * 64 * 2 // 128           # by the producer
