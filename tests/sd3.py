"""A tiny random SD3 pipeline in the published folder layout, built offline by the libraries.

Every weight is random, norms too, so that a swap of two tensors changes the result. The tests that
use it need transformers and diffusers (pytest.importorskip).
"""
from pathlib import Path

import torch
from torch import nn

WORDS = ("a red green blue yellow circle square cross on black gray white small large left of "
         "right").split()
JOINT, POOLED = 96, 80                                     # widths of context and pooled
VARIANTS = {"plain": {}, "qk_norm": dict(qk_norm="rms_norm"),
            "dual": dict(qk_norm="rms_norm", dual_attention_layers=(0, 1))}


def make_folder(path: str | Path, variant: str = "plain", seed: int = 0) -> Path:
    """Write what StableDiffusion3Pipeline.from_pretrained(path) loads, its transformer of
    `variant`."""
    from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
    path = Path(path)
    torch.manual_seed(seed)
    clip_l, clip_g, t5 = (draw(model, seed + i) for i, model in enumerate(text_encoders()))
    pipe = StableDiffusion3Pipeline(
        transformer=draw(transformer(variant), seed + 3), vae=draw(vae(), seed + 4),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), text_encoder=clip_l,
        text_encoder_2=clip_g, text_encoder_3=t5, tokenizer=clip_tokenizer("<|endoftext|>"),
        tokenizer_2=clip_tokenizer("!"), tokenizer_3=t5_tokenizer())
    pipe.save_pretrained(path)
    return path


def draw(model: nn.Module, seed: int) -> nn.Module:
    """Add noise to every floating-point parameter and buffer."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for t in [*model.parameters(), *model.buffers()]:
            if t.is_floating_point():
                t.add_((0.3 if t.ndim < 2 else 0.05) * torch.randn(t.shape, generator=g))
    return model.eval()


def transformer(variant: str = "plain"):
    from diffusers import SD3Transformer2DModel
    return SD3Transformer2DModel(
        sample_size=16, patch_size=2, in_channels=16, out_channels=16, num_layers=3,
        attention_head_dim=64, num_attention_heads=2, joint_attention_dim=JOINT,
        caption_projection_dim=128, pooled_projection_dim=POOLED, pos_embed_max_size=12,
        **VARIANTS[variant])


def vae():
    from diffusers import AutoencoderKL
    return AutoencoderKL(
        block_out_channels=(8, 8, 16, 16), norm_num_groups=4, layers_per_block=1,
        latent_channels=16, down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4, sample_size=64,
        scaling_factor=1.5305, shift_factor=0.0609, use_quant_conv=False, use_post_quant_conv=False)


def text_encoders() -> tuple:
    """Return (CLIP-L, CLIP-G, T5), whose widths and activations differ as in the published ones."""
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel
    clip = lambda d, act: CLIPTextModelWithProjection(CLIPTextConfig(
        vocab_size=len(clip_vocabulary()), hidden_size=d, projection_dim=d, intermediate_size=2 * d,
        num_hidden_layers=3, num_attention_heads=4, max_position_embeddings=77, hidden_act=act,
        bos_token_id=clip_vocabulary()["<|startoftext|>"],
        eos_token_id=clip_vocabulary()["<|endoftext|>"]))
    t5 = T5EncoderModel(T5Config(vocab_size=len(t5_pieces()), d_model=JOINT, d_kv=16, d_ff=128,
                                 num_layers=2, num_heads=4, feed_forward_proj="gated-gelu"))
    return clip(32, "quick_gelu"), clip(48, "gelu"), t5


# --- tokenizers ---

def clip_vocabulary() -> dict[str, int]:
    """Return letters, letters that end a word, merges, and the two special tokens, in CLIP's
    order."""
    letters = [chr(i) for i in range(33, 127)]
    pieces = letters + [letter + "</w>" for letter in letters] + [a + b for a, b in clip_merges()]
    return {piece: i for i, piece in enumerate([*pieces, "<|startoftext|>", "<|endoftext|>"])}


def clip_merges() -> list[tuple[str, str]]:
    """Return merges that join the letters of each of WORDS from the left."""
    merges = {}
    for word in WORDS:
        pieces = [*word[:-1], word[-1] + "</w>"]
        for i in range(1, len(pieces)):
            merges["".join(pieces[:i]), pieces[i]] = None
    return list(merges)


def clip_tokenizer(pad: str):
    """Return the tokenizer of CLIP; CLIP-L pads with the end token and CLIP-G with "!" (id 0)."""
    from transformers import CLIPTokenizer
    return CLIPTokenizer(vocab=clip_vocabulary(), merges=clip_merges(), model_max_length=77,
                         pad_token=pad)


def t5_pieces() -> list[tuple[str, float]]:
    pieces = [*("▁" + word for word in WORDS), "▁", *(chr(i) for i in range(33, 127))]
    return [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((piece, -float(i + 1) / 9)
                                                           for i, piece in enumerate(pieces))]


def t5_tokenizer():
    from transformers import T5TokenizerFast
    return T5TokenizerFast(vocab=t5_pieces(), extra_ids=0, model_max_length=512)
