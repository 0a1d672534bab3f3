"""The discriminator: one convolutional head per tapped teacher block, conditioned on the noise
level and the pooled text.

The frozen teacher supplies the features; only the parameters of this file train. Letters: k head,
b batch, l tokens, d teacher width, c head width, e conditioning width. Source: Sauer et al. 2024
(LADD), Sec. 3.2; the head itself is in kernels/heads.py.
"""
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels import Kernels
from kernels.heads import GROUP_SIZE, HeadParams
from ladd.core.mmdit import SINUSOID_WIDTH, Linear, mlp, sinusoid


@dataclass(frozen=True)
class DiscriminatorConfig:
    """Sizes of the heads."""
    taps: tuple[int, ...]    # teacher blocks whose image tokens are read, ascending
    feat_dim: int            # d, the teacher's width
    pooled_dim: int          # of the pooled text embedding
    width: int = 64          # c, channels inside a head
    cond_dim: int = 64       # e

    def __post_init__(self):
        if self.width % GROUP_SIZE or not self.taps:
            raise ValueError(f"discriminator: width must be a multiple of {GROUP_SIZE} and taps at "
                             f"least one block (got width {self.width}, taps {self.taps})")


class Discriminator(nn.Module):
    """All heads, their parameters stacked, evaluated in one call; one logit per token and head.

    Features are standardised per channel with fixed statistics of real features (`calibrate`):
    block outputs differ by orders of magnitude between channels and depths, and a head that must
    first learn that scale is too weak at the start (our choice, measured).
    """

    def __init__(self, config: DiscriminatorConfig, kernels: Kernels):
        super().__init__()
        self.config, self.kernels = config, kernels
        k, d, c, e = len(config.taps), config.feat_dim, config.width, config.cond_dim
        self.level_embedder = mlp(SINUSOID_WIDTH, e, e)
        self.text_embedder = Linear(config.pooled_dim, e)
        shapes = HeadParams(w_in=(k, d, c), b_in=(k, c), gamma1=(k, c), beta1=(k, c),
                            w_conv=(k, 3, 3, c, c), b_conv=(k, c), gamma2=(k, c), beta2=(k, c),
                            w_cond=(k, e, c), w_out=(k, c), b_out=(k,))
        fan_in = {"w_in": d, "w_conv": 9 * c, "w_cond": e, "w_out": 1}
        for name, shape in shapes._asdict().items():
            init = torch.ones(shape) if name.startswith("gamma") else torch.zeros(shape)
            if name in fan_in:
                init = torch.randn(shape) * fan_in[name] ** -0.5
            setattr(self, name, nn.Parameter(init))
        self.register_buffer("feat_mean", torch.zeros(k, 1, d))
        self.register_buffer("feat_std", torch.ones(k, d, 1))

    @torch.no_grad()
    def calibrate(self, moments: Tensor) -> None:
        """Set the statistics of the standardisation from the channel_moments of real features."""
        mean, square = moments
        self.feat_mean.copy_(mean[:, None])
        self.feat_std.copy_((square - mean.square()).clamp_min(1e-8).sqrt()[..., None])

    def forward(self, feats: list[Tensor], sigma_d: Tensor, pooled: Tensor,
                grid: tuple[int, int]) -> Tensor:
        """Return logits [k, b, h, w] of `feats`, k tensors [b, h*w, d].

        sigma_d [b], pooled [b, pooled_dim], grid (h, w) in tokens.
        """
        dtype = self.w_in.dtype
        cond = F.silu(self.level_embedder(sinusoid(sigma_d).to(dtype))
                      + self.text_embedder(pooled.to(dtype)))
        p = HeadParams(*(getattr(self, name) for name in HeadParams._fields))
        # The standardisation (F - mean) / std is folded into the first product. W is rounded to the
        # dtype of that product first, so that the mean it removes is the one the product adds.
        w_in = (p.w_in / self.feat_std).to(feats[0].dtype).to(dtype)
        b_in = p.b_in - (self.feat_mean @ w_in).squeeze(1)
        return self.kernels.discriminator_heads(feats, p._replace(w_in=w_in, b_in=b_in), cond, grid)


@torch.no_grad()
def channel_moments(feats: list[Tensor]) -> Tensor:
    """Return mean and mean square of each channel of k tensors [b, l, d]: [2, k, d] in float64.

    The mean over batches of equal size is the moment of all of them.
    """
    moments = (torch.var_mean(f.float().flatten(0, 1), 0, correction=0) for f in feats)
    var, mean = (torch.stack(each).double() for each in zip(*moments))
    return torch.stack([mean, var + mean.square()])
