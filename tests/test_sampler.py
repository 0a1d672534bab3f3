"""Samplers: guidance by its formula, Euler against closed forms, re-noising, seeds, evaluations per
image."""
import pytest
import torch
from conftest import assert_close, rng, tiny, tiny_inputs
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ladd.core import flow, sampler
from ladd.core.mmdit import Text
from ladd.engine import graphs

SHAPE = (4, 6, 10)
SEEDS = [3, 14, 15]


def setting(b: int = 3) -> tuple[Tensor, Text, Text]:
    """(noise, text, null) in float64; the null text has no batch axis."""
    _, _, context, pooled = tiny_inputs(b)
    g = rng(2)
    null = Text(torch.randn(5, 24, generator=g).double(), torch.randn(20, generator=g).double())
    return sampler.image_noise(SEEDS[:b], SHAPE).double(), Text(context, pooled), null


class Counting:
    """A network that counts its evaluations per image of a batch of 3."""

    def __init__(self, model):
        self.model, self.rows = model, 0

    def __call__(self, x, *args):
        self.rows += x.shape[0] / 3
        return self.model(x, *args)


def test_image_noise_depends_on_its_seed_alone():
    noise = sampler.image_noise(SEEDS, SHAPE)
    assert noise.shape == (3, *SHAPE)
    assert noise.dtype == torch.float32 and noise.device.type == "cpu"
    for i, seed in enumerate(SEEDS):
        assert torch.equal(noise[i], sampler.image_noise([seed], SHAPE)[0])
        assert torch.equal(noise[i], torch.randn(SHAPE, generator=rng(seed)))
    many = sampler.image_noise(list(range(400)), (16, 2, 2)).flatten(1)
    assert len(many.unique(dim=0)) == 400 and abs(many.mean()) < 0.03 and abs(many.std() - 1) < 0.02


def test_guidance_1_is_the_plain_network_at_one_evaluation():
    model, (noise, text, null) = Counting(tiny()), setting()
    sigma = torch.full((3,), 0.7).double()
    v = sampler.guided(model, null, 1.0)(noise, sigma, text)
    assert model.rows == 1 and torch.equal(v, model.model(noise, sigma, *text))


@pytest.mark.parametrize("guidance", [0.0, 1.5, 4.0])
def test_guidance_formula_at_two_evaluations(guidance):
    model, (noise, text, null) = Counting(tiny()), setting()
    sigma = torch.tensor([0.9, 0.5, 0.1]).double()
    v = sampler.guided(model, null, guidance)(noise, sigma, text)
    assert model.rows == 2
    with_text = model.model(noise, sigma, *text)
    without = model.model(noise, sigma, null.context.expand(3, -1, -1), null.pooled.expand(3, -1))
    assert (with_text - without).abs().max() > 0.1
    assert_close("v", v, without + guidance * (with_text - without), 1e-10)


@pytest.mark.parametrize("guidance, image_guidance, evaluations", [
    (1.0, 1.0, 1), (2.5, 1.0, 2), (2.5, 1.6, 3), (1.0, 1.6, 3), (3.0, 0.0, 3)])
def test_guidance_by_text_and_image_is_the_formula_of_three_terms(guidance, image_guidance,
                                                                  evaluations):
    """v_none + g_image (v_null - v_none) + g (v_text - v_null): null keeps the image, none has
    neither. With g_image 1 none drops out, which is how inpainting is guided: never without its
    mask."""
    model, (noise, text, null) = Counting(tiny(in_channels=7)), setting()
    image = torch.randn(3, 3, *SHAPE[1:], generator=rng(5)).double()
    sigma, text = torch.tensor([0.9, 0.5, 0.1]).double(), text._replace(image=image)
    v = sampler.guided(model, null, guidance, image_guidance)(noise, sigma, text)
    assert model.rows == evaluations == sampler.evaluations(guidance, image_guidance)
    empty = null.context.expand(3, -1, -1), null.pooled.expand(3, -1)
    v_text, v_null, v_none = (model.model(noise, sigma, *read) for read in (
        text, (*empty, image), (*empty, torch.zeros_like(image))))
    assert min((v_text - v_null).abs().max(), (v_null - v_none).abs().max()) > 0.1
    expected = v_none + image_guidance * (v_null - v_none) + guidance * (v_text - v_null)
    assert_close("v", v, expected, 1e-10)
    levels = flow.euler_sigmas(2).double()
    model.rows = 0
    x = sampler.sample(model, noise, text, levels, "euler", SEEDS, null, guidance, image_guidance)
    plain = sampler.guided(model.model, null, guidance, image_guidance)
    assert model.rows == 2 * evaluations and torch.equal(x,
                                                         sampler.euler(plain, noise, text, levels))


@pytest.mark.parametrize("levels", [flow.euler_sigmas(1), flow.euler_sigmas(4, 3.0),
                                    torch.tensor([1, 0.6, 0.599, 0])])
def test_euler_is_exact_on_a_straight_field(levels):
    noise, text, _ = setting()
    x0 = torch.randn(noise.shape, generator=rng(4)).double()
    assert_close("x0", sampler.euler(lambda x, sigma, t: noise - x0, noise, text, levels.double()),
                 x0)


@pytest.mark.parametrize("run", [sampler.euler, lambda *a: sampler.renoise(*a, SEEDS)],
                         ids=["euler", "renoise"])
def test_levels_and_text_arrive_at_the_network(run):
    noise, text, _ = setting()
    levels, seen = flow.euler_sigmas(4, 3.0), []

    def v(x, sigma, t):
        assert t is text and sigma.shape == (3,) and (sigma == sigma[0]).all()
        seen.append(sigma[0].item())
        return x
    run(v, noise, text, levels)
    assert seen == levels[:-1].tolist()


class Copies(TorchDispatchMode):
    """Counts the copies from the host to another device."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **kwargs or {})
        if function is torch.ops.aten._to_copy.default:
            self.count += args[0].device.type == "cpu" != out.device.type
        return out


@pytest.mark.parametrize("steps", [1, 2, 4])
@pytest.mark.parametrize("name", ["euler", "renoise"])
def test_a_step_reads_nothing_from_the_device_and_copies_fresh_noise_at_most(name, steps):
    """On the meta device, where reading a value is an error; the levels are copied once."""
    noise, seen = torch.empty(3, *SHAPE, device="meta"), []

    def v(x, sigma, text):
        seen.append((sigma.device.type, tuple(sigma.shape)))
        return x
    levels, more = flow.euler_sigmas(steps, 3.0), () if name == "euler" else (SEEDS,)
    with Copies() as copies:
        out = getattr(sampler, name)(v, noise, None, levels, *more)
    assert out.is_meta and seen == steps * [("meta", (3,))]
    assert copies.count == 1 + (steps - 1) * (name == "renoise")


def test_euler_by_hand_on_a_curved_field():
    noise, text, _ = setting()
    x = noise
    for now, then in ((1.0, 0.75), (0.75, 0.5), (0.5, 0.0)):
        x = x - (now - then) * (x ** 2 + now)
    levels = torch.tensor([1, 0.75, 0.5, 0]).double()
    found = sampler.euler(lambda x, s, t: x ** 2 + s.view(-1, 1, 1, 1), noise, text, levels)
    assert_close("x", found, x)


def test_renoise_predicts_then_renoises():
    """Its inputs are (1 - s) x0_hat + s n, n standard normal, of the image's seed, new at each
    level."""
    text = setting()[1]
    shape, levels = (16, 24, 24), torch.tensor([1, 0.75, 0.5, 0]).double()
    noise = sampler.image_noise(SEEDS, shape).double()
    centre = torch.randn(3, *shape, generator=rng(6)).double()

    def run(rows: slice) -> tuple[Tensor, list[Tensor]]:
        inputs = []

        # such that x0_hat = centre + sigma
        def v(x, sigma, t):
            inputs.append(x)
            s = sigma.view(-1, 1, 1, 1)
            return (x - centre[rows] - s) / s
        return sampler.renoise(v, noise[rows], text, levels, SEEDS[rows]), inputs

    out, inputs = run(slice(None))
    # the last prediction, nothing added
    assert_close("x0", out, centre + 0.5)
    assert torch.equal(inputs[0], noise)
    steps = zip(inputs[1:], (1.0, 0.75), (0.75, 0.5))
    fresh = [(x - (1 - then) * (centre + now)) / then for x, now, then in steps]
    all_noise = torch.stack([n[i].flatten() for n in (noise, *fresh) for i in range(3)])
    assert all_noise.shape[0] == 9 and (torch.cov(all_noise) - torch.eye(9)).abs().max() < 0.06
    assert all_noise.mean(1).abs().max() < 0.05
    alone, inputs_alone = run(slice(1, 2))
    assert all(torch.equal(a[0], b[1]) for a, b in zip([alone, *inputs_alone], [out, *inputs]))


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("name", ["euler", "renoise"])
def test_sample_costs_one_evaluation_a_step_and_two_if_guided(name, guidance):
    model, (noise, text, null) = Counting(tiny()), setting()
    for steps in (1, 2, 4):
        model.rows, levels = 0, flow.euler_sigmas(steps).double()
        x = sampler.sample(model, noise, text, levels, name, SEEDS, null, guidance)
        assert model.rows == steps * (1 if guidance == 1 else 2)
        assert x.shape == noise.shape and not x.requires_grad
        v = sampler.guided(model.model, null, guidance)
        args = (v, noise, text, levels)
        assert torch.equal(x, sampler.euler(*args) if name == "euler"
                           else sampler.renoise(*args, SEEDS))


def test_one_step_of_either_sampler_is_the_prediction():
    model, (noise, text, _) = tiny(), setting()
    levels = flow.euler_sigmas(1).double()
    x = [sampler.sample(model, noise, text, levels, name, SEEDS) for name in ("euler", "renoise")]
    assert_close("euler", x[0], noise - model(noise, torch.ones(3).double(), *text))
    assert_close("renoise", x[1], x[0])


@pytest.mark.parametrize("name", ["euler", "renoise"])
def test_an_image_does_not_depend_on_its_batch(name):
    model, (noise, text, null) = tiny(), setting()
    levels = flow.euler_sigmas(3).double()
    together = sampler.sample(model, noise, text, levels, name, SEEDS, null, 2.0)
    for i in range(3):
        row = slice(i, i + 1)
        own = text.map(lambda t: t[row])
        alone = sampler.sample(model, noise[row], own, levels, name, SEEDS[row], null, 2.0)
        assert_close(f"image {i}", alone, together[row], 1e-11)


def test_guidance_without_the_null_text_is_refused():
    noise, text, _ = setting()
    with pytest.raises(ValueError, match=r"null must be the text of the empty prompt .*\(got None"):
        sampler.sample(tiny(), noise, text, flow.euler_sigmas(1), "euler", SEEDS, None, 2.0)
    with pytest.raises(ValueError, match=r"null must be the text of the empty prompt .*\(got None"):
        sampler.sample(tiny(), noise, text, flow.euler_sigmas(1), "euler", SEEDS, None, 1.0, 2.0)


def test_a_graph_is_recorded_once_per_shape_and_reads_the_inputs_of_each_call():
    """Replayed as a CUDA graph is: the recorded function on the tensors it was recorded with, one
    output."""
    recorded = []

    def capture(run):
        out = run()
        recorded.append(out.shape)
        return lambda: out.copy_(run())
    model = tiny(dtype=torch.float64)
    graphed = graphs.Graphed(model, capture)
    noise, text, null = setting()
    kept = [t.clone() for t in (noise, *text[:2])]
    for name in ("euler", "renoise"):
        for b in (3, 1):
            few, levels = text.map(lambda t: t[:b]), flow.euler_sigmas(3).double()
            args = noise[:b], few, levels, name, SEEDS[:b], null
            for guidance in (1.0, 2.0):
                ours, plain = (sampler.sample(m, *args, guidance) for m in (graphed, model))
                assert torch.equal(ours, plain)
    assert [s[0] for s in recorded] == [3, 6, 1, 2]
    assert all(torch.equal(a, b) for a, b in zip(kept, (noise, *text[:2])))
    first = graphed(noise, torch.ones(3).double(), *text)
    before = first.clone()
    graphed(2 * noise, torch.ones(3).double(), *text)
    # a result is the caller's own
    assert torch.equal(first, before)
