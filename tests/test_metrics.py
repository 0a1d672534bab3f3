"""Metrics against closed forms, hand-counted cases and images that are spoilt on purpose."""
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_close, rng

from ladd.cli import InputError
from ladd.core.losses import LaddConfig
from ladd.data.shards import Latents
from ladd.report import evaluate, metrics
from ladd.toy.scenes import ATTRIBUTES, Scenes, decode, encode, render, sample_scenes

FEATURES = {"random": metrics.features_random, "hand": metrics.features_hand}
LEAST = {"circles only": dict(random=1.2, hand=3.5), "64 images": dict(random=4.3, hand=3.9),
         "red turned blue": dict(random=2., hand=4.1), "blur": dict(random=15, hand=6),
         "mean of two": dict(random=12, hand=12)}                     # in units of the floor


def exactly(n: int, mean: torch.Tensor, cov: torch.Tensor, seed: int) -> torch.Tensor:
    """n samples whose own mean and covariance are the given ones."""
    x = torch.randn(n, len(mean), generator=rng(seed), dtype=torch.float64)
    x = x - x.mean(0)
    white = torch.linalg.solve_triangular(torch.linalg.cholesky(x.T @ x / (n - 1)), x.T,
                                          upper=False).T
    return white @ torch.linalg.cholesky(cov).T + mean


# --- Frechet distance ---


def test_frechet_of_independent_gaussians_is_the_sum_over_axes():
    mean_a, mean_b = torch.tensor([0., 1, -2]).double(), torch.tensor([3., 1, 0]).double()
    std_a, std_b = torch.tensor([1., 2, .5]).double(), torch.tensor([1., .5, 2]).double()
    a = exactly(50, mean_a, (std_a ** 2).diag(), 1)
    b = exactly(80, mean_b, (std_b ** 2).diag(), 2)
    assert metrics.frechet(a, b) == pytest.approx(9 + 0 + 4 + 0 + 1.5 ** 2 + 1.5 ** 2, rel=1e-9)


def test_frechet_of_covariances_that_do_not_commute():
    """tr (C_a C_b)^1/2 from the eigenvalues of the unsymmetric product, another route to the same
    number."""
    root_a, root_b = torch.randn(2, 6, 6, generator=rng(3), dtype=torch.float64)
    cov_a, cov_b = root_a @ root_a.T + .1 * torch.eye(6), root_b @ root_b.T + .1 * torch.eye(6)
    mean = torch.arange(6).double()
    cross = torch.linalg.eigvals(cov_a @ cov_b).real.sqrt().sum()
    expected = mean.square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross
    a, b = exactly(90, mean, cov_a, 4), exactly(70, torch.zeros(6).double(), cov_b, 5)
    assert metrics.frechet(a, b) == pytest.approx(expected.item(), rel=1e-8)
    assert metrics.frechet(b, a) == pytest.approx(expected.item(), rel=1e-8)


def test_frechet_is_zero_on_itself_and_blind_to_rotation_and_order():
    a, b = torch.randn(64, 5, generator=rng(1)), 2 * torch.randn(64, 5, generator=rng(2)) + 1
    # a feature that never varies
    a[:, 4] = 0
    turn = torch.linalg.qr(torch.randn(5, 5, generator=rng(3), dtype=torch.float64))[0]
    assert abs(metrics.frechet(a, a[torch.randperm(64, generator=rng(4))])) < 1e-6
    turned = metrics.frechet(a.double() @ turn + 7, b.double() @ turn + 7)
    assert turned == pytest.approx(metrics.frechet(a, b), rel=1e-6)


# --- density and coverage ---


def test_density_and_coverage_counted_by_hand():
    # radii of k = 1: 1, 1, 2, 4; of k = 2: 3, 2, 3, 6
    real = torch.tensor([[0.], [1], [3], [7]])
    fake = torch.tensor([[.5], [.6], [20]])            # two near 0 and 1, one in no ball
    assert metrics.density_coverage(real, fake, k=1) == pytest.approx((4 / 3, 2 / 4))
    assert metrics.density_coverage(real, fake, k=2) == pytest.approx((6 / 6, 3 / 4))


def test_coverage_sees_a_lost_mode_and_density_does_not():
    real = torch.randn(1200, 8, generator=rng(1)) + 30 * (torch.arange(1200) % 2)[:, None]
    fake = torch.randn(1200, 8, generator=rng(2)) + 30 * (torch.arange(1200) % 2)[:, None]
    assert metrics.density_coverage(real, fake) == pytest.approx((1, .97), abs=.04)
    density, coverage = metrics.density_coverage(real, fake[::2].repeat(2, 1))
    assert density == pytest.approx(1, abs=.06) and coverage == pytest.approx(.48, abs=.03)


def test_density_and_coverage_do_not_depend_on_the_chunks():
    """600 reals take two chunks; the same numbers from the whole table of distances."""
    real, fake = torch.randn(600, 3, generator=rng(1)), 1.5 * torch.randn(50, 3, generator=rng(2))
    inside = torch.cdist(real, fake) <= torch.cdist(real, real).sort(1).values[:, 5:6]
    expected = (inside.sum().item() / 250, inside.any(1).sum().item() / 600)
    assert metrics.density_coverage(real, fake) == pytest.approx(expected)


# --- feature spaces ---


def pattern(h: int, w: int, n: int = 3) -> torch.Tensor:
    """Images without a random number: products of waves, clamped."""
    y, x, i = torch.arange(h)[:, None] / h, torch.arange(w) / w, torch.arange(1, n + 1)[:, None,
                                                                                        None]
    waves = [torch.sin(7 * i * x + y), torch.cos(5 * y * i + 3 * x), torch.sin(9 * x * y * i)]
    return (1.3 * torch.stack(waves, 1)).clamp(-1, 1)


@pytest.mark.parametrize("space, size, total, head", [
    ("random", 95, 1634.908, [2.506849, 2.758529, 4.690539]),
    ("hand", 78, 524.3404, [.000165, .258269, 1.316633]),
])
def test_features_are_the_same_everywhere(space, size, total, head):
    """Stored values: a distance of today compares with one of last year, on any machine."""
    feats = FEATURES[space](pattern(48, 80))
    assert feats.shape == (3, size)
    assert feats.double().abs().sum().item() == pytest.approx(total, rel=1e-3)
    assert feats[0, :3].tolist() == pytest.approx(head, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("space", FEATURES)
@pytest.mark.parametrize("hw", [(16, 16), (16, 64), (80, 48), (256, 256), (240, 112)])
def test_features_of_an_image_do_not_depend_on_the_batch(space, hw):
    images = pattern(*hw, n=66 if hw == (16, 16) else 2)
    feats = FEATURES[space](images)
    assert feats.isfinite().all() and feats.shape[0] == len(images)
    assert_close(space, feats[-1:], FEATURES[space](images[-1:]), 1e-4)
    assert (feats[0] - feats[1]).abs().max() > .1


def test_features_are_taken_in_parts_and_refuse_nan():
    images = [pattern(16, 16, n=66), pattern(16, 32)]
    for feats, space in zip(evaluate.features(images), FEATURES.values()):
        assert_close("parts", feats, torch.cat([space(x) for x in images]), 1e-4)
    with pytest.raises(FloatingPointError, match="768 of 768 values are NaN or inf"):
        evaluate.features([torch.full((1, 3, 16, 16), math.nan)])


def test_colours_are_shares_of_pixels():
    image = torch.tensor([1., -1, -1]).view(1, 3, 1, 1).repeat(1, 1, 16, 16)
    # halfway from (0, 0, 0) to (1, 0, 0)
    image[:, :, :, 8:] = torch.tensor([.5, 0, 0]).view(3, 1, 1)
    shares = metrics._colours(image).view(3, 3, 3)
    expected = torch.zeros(3, 3, 3)
    expected[2, 0, 0], expected[1, 1, 1], expected[2, 1, 1] = .5, .25, .25
    assert_close("shares", shares, expected)


def test_orientations_tell_edges_apart():
    """Gradient along x: cos(2 j a) = 1; along y: alternating; diagonal: sine. A reversed edge is
    the same."""
    step = (torch.arange(32) > 15).float()
    along_x = step.expand(1, 3, 32, 32)
    diagonal = ((torch.arange(32)[:, None] + torch.arange(32)) > 31).float().expand(1, 3, 32, 32)
    size, *waves = metrics._orientations(along_x)[0].tolist()
    assert size == pytest.approx(2 / 30) and waves == pytest.approx([size, 0] * 4)
    assert metrics._orientations(1 - along_x)[0, 1:].tolist() == pytest.approx(waves)
    turned = metrics._orientations(along_x.mT)[0, 1:].tolist()
    assert turned == pytest.approx([-size, 0, size, 0, -size, 0, size, 0], abs=1e-6)
    size, *waves = metrics._orientations(diagonal)[0].tolist()
    assert waves == pytest.approx([0, size, -size, 0, 0, -size, size, 0], abs=1e-6)


def test_bands_hold_the_energy_of_their_frequencies():
    basis, bands = metrics._bands()
    assert_close("orthonormal", basis.flatten(1) @ basis.flatten(1).T, torch.eye(64), 1e-5)
    assert_close("averages", bands.sum(0), torch.ones(5))
    assert not bands[0].any()                                         # DC is in no band
    # u = 0, v = 3
    wave = torch.cos(math.pi / 8 * 3 * (torch.arange(16) % 8 + .5)).expand(1, 3, 16, 16)
    rms = metrics.features_hand(wave)[0, 36:51].view(3, 5)
    assert (rms[:, 1] > 1).all() and rms[:, [0, 2, 3, 4]].abs().max() < 1e-4


def toy(n: int, seed: int) -> tuple[Scenes, torch.Tensor]:
    scenes = sample_scenes(n, (64, 64), 1, rng(seed))
    return scenes, seen(scenes)


def seen(scenes: Scenes) -> torch.Tensor:
    return decode(encode(render(scenes, (64, 64))))


@pytest.fixture(scope="module")
def spoilt() -> dict[str, torch.Tensor]:
    """Sets of 768 images: of the toy dataset, and what a bad generator makes of it."""
    n = 768
    scenes, images = toy(n, 2)
    circles, blue = scenes.attributes.clone(), scenes.attributes.clone()
    circles[:, 2] = 0
    blue[:, 1] = torch.where(blue[:, 1] == 0, 2, blue[:, 1])
    return {"reference": toy(n, 1)[1], "floor": images, "real": toy(n, 4)[1],
            "circles only": seen(scenes._replace(attributes=circles)),
            "64 images": images[:64].repeat(n // 64, 1, 1, 1),
            "red turned blue": seen(scenes._replace(attributes=blue)),
            "blur": F.interpolate(F.avg_pool2d(images, 4), scale_factor=4, mode="bilinear"),
            "mean of two": (images + images.roll(1, 0)) / 2}


@pytest.mark.parametrize("space", FEATURES)
def test_both_spaces_see_what_is_spoilt(space, spoilt):
    """Thresholds: about four fifths of the least over five draws of the sets."""
    feats = {name: FEATURES[space](images) for name, images in spoilt.items()}
    floor = metrics.frechet(feats["reference"], feats["floor"])
    ratio = {name: metrics.frechet(feats["reference"], x) / floor for name, x in feats.items()}
    assert ratio["real"] < 1.3                                       # another sample is no alarm
    for name, least in LEAST.items():
        assert ratio[name] > least[space], (name, ratio)


# --- prompts ---


def test_prompt_accuracy_counted_by_hand():
    codes = torch.tensor([[0, 1, 2, -1, -1], [-1, 3, -1, -1, 0], [1, -1, 2, -1, -1],
                          [-1, 0, -1, -1, -1]])
    graded = torch.tensor([[0, 1, 2, 3, 0], [1, 3, 0, 0, 1], [-1] * 5, [1, 0, 2, 2, 2]])
    # no row states position
    assert metrics.prompt_accuracy(graded, codes) == pytest.approx({"all": 2 / 4, "size": 1 / 2,
                                                                    "colour": 1, "shape": 1 / 2,
                                                                    "background": 0})


def test_prompt_accuracy_names_the_attributes_of_two_objects():
    codes = torch.zeros(2, 8, dtype=torch.int64)
    assert metrics.prompt_accuracy(codes, codes) == {"all": 1.0} | dict.fromkeys(ATTRIBUTES[2], 1.0)


def test_entropy_of_open_attributes():
    n = 4000
    real = torch.stack([torch.arange(n) % 2, torch.arange(n) % 4], 1)
    codes = torch.full((n, 2), -1)
    # stated there: must not count
    codes[: n // 2, 1] = real[: n // 2, 1]
    assert metrics.attribute_entropy(real, codes, real) == pytest.approx(1)
    collapsed = real.clone()
    collapsed[n // 2:, 1] = 3
    assert metrics.attribute_entropy(collapsed, codes, real) == pytest.approx(1 / 2)
    # two of four values left: ln 2 / ln 4
    collapsed[n // 2:, 1] = real[n // 2:, 1] % 2
    assert metrics.attribute_entropy(collapsed, codes, real) == pytest.approx((1 + 1 / 2) / 2)
    # unreadable: counts nowhere
    unreadable = torch.where(torch.arange(n)[:, None] % 8 < 4, real, -1)
    assert metrics.attribute_entropy(unreadable, codes, real) == pytest.approx(1)
    assert metrics.attribute_entropy(torch.full_like(real, -1), codes, real) == 0
    with pytest.raises(InputError, match=r"an attribute open that varies \(got 4000 captions"):
        metrics.attribute_entropy(real, real, real)


# --- the discriminator ---


def test_margins_and_accuracy_by_hand():
    real, fake = torch.tensor([[2., .5], [-.1, 1]]), torch.tensor([[-2., -.5, .1, -1, -1.5]])
    stats = {"logits_real": real, "logits_fake": fake, "logits_mismatched": None}
    assert evaluate.batch_metrics(stats) == pytest.approx({
        "margin_real": 2 / 4, "margin_fake": 2 / 5, "accuracy_real": 3 / 4, "accuracy_fake": 4 / 5,
        "gap": .85 + .98})


def test_auc_counts_ties_half():
    assert metrics.auc(torch.tensor([1., 2, 2]), torch.tensor([0., 2])) == pytest.approx(4 / 6)
    same = torch.randn(40, generator=rng(1))
    assert metrics.auc(same, same) == pytest.approx(.5, abs=1e-12)
    assert metrics.auc(same + 9, same) == 1 and metrics.auc(same - 9, same) == 0


def test_auc_equals_all_pairs():
    pos, neg = (torch.randint(0, 9, (3, n), generator=rng(n)).float() for n in (7, 11))
    pairs = pos.flatten()[:, None] - neg.flatten()
    expected = ((pairs > 0).double() + (pairs == 0).double() / 2).mean().item()
    assert metrics.auc(pos, neg) == pytest.approx(expected)


class Student(torch.nn.Module):
    """A student that generates x0_hat = -10 from anything."""

    def forward(self, x, sigma, context, pooled, image=None):
        return (x + 10) / sigma.view(-1, 1, 1, 1)


class Teacher(torch.nn.Module):
    """A teacher whose features are its input, a token per pixel."""
    config = SimpleNamespace(patch=1)

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def forward(self, x, sigma, context, pooled, image=None, taps=(), stop_at_last_tap=False):
        return x, [x.flatten(2).mT for _ in taps]


class Heads(torch.nn.Module):
    """Heads whose logit is 1 for real, -1 for fake, plus 100 for a sample of training."""
    config = SimpleNamespace(taps=(0, 1))

    def forward(self, feats, sigma, pooled, grid):
        logits = [f.mean((1, 2)).sign() + 100 * pooled[:, 0] for f in feats]
        return torch.stack(logits)[..., None, None].expand(-1, -1, *grid)


def test_discriminator_metrics_compare_held_out_real_and_held_out_fake():
    """x0 is 10. The pooled text tells samples of training (1) from held-out ones (0), and one half
    of these from the other where the halves are to differ."""
    n, hw = 160, (2, 2)
    config = LaddConfig(levels=(1.0, 0.5), probs=(0.5, 0.5), easy_steps=0, shift=1.0, d_mean=-2.0,
                           mismatched=0.0, r1_weight=0.0, distill_weight=0.0)
    pooled = torch.ones(n, 3)
    held = n // 16
    pooled[-held:] = 0

    def measured() -> dict[str, float]:
        numbers = torch.arange(n)
        latents = Latents([str(i) for i in range(n)], torch.zeros(n, 1, 3), pooled,
                          numbers[:, None], (torch.zeros(1, 3), torch.zeros(3)),
                          {hw: (torch.full((n, 16, *hw), 10.0), numbers)}, {}, {})
        assert latents.holdout == held
        return evaluate.discriminator_metrics(Student(), Teacher(), Heads(), latents, config, 4)

    out = measured()
    assert (out["auc_n"], out["auc"], out["auc_memory"], out["auc_null"]) == (held, 1, 1, 0.5)
    assert (out["gap_0"], out["gap_1"]) == (2, 2)
    assert {value for name, value in out.items() if name.startswith("hinge_")} == {0}
    pooled[-held::2] = -1                       # below the others of the held-out ones
    assert measured()["auc_null"] == 0
