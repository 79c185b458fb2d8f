"""Small models of the kinds that the paper draws, for tests, measurements and the gallery."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from broadsheet.nn.seeding import seeded


class DigitMlp(nn.Module):
    """Flatten, two linear layers, softmax: the digits."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.out = nn.Linear(64, 32), nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.relu(self.hidden(x.flatten(1)))).softmax(-1)


class ScaledAttention(nn.Module):
    """Scaled dot-product attention of given queries, keys and values."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1) @ v


class MultiHeadAttention(nn.Module):
    """Self-attention with several heads, written as most people write it."""

    def __init__(self, width: int = 16, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.o = (nn.Linear(width, width, bias=False) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        b, n, m = x.shape
        q, k, v = (f(x).view(b, n, self.heads, m // self.heads).transpose(1, 2) for f in (self.q, self.k, self.v))
        return self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, m))


class EncoderLayer(nn.Module):
    """A pre-norm transformer layer."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.ln1, self.ln2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = MultiHeadAttention(width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.ln1(x))
        return x + self.down(F.gelu(self.up(self.ln2(x))))


class Convolutions(nn.Module):
    """Strided, dilated and transposed convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.strided = nn.Conv2d(3, 6, 3, stride=2, padding=1)
        self.dilated = nn.Conv2d(6, 8, 3, padding=2, dilation=2)
        self.back = nn.ConvTranspose2d(8, 3, 2, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.back(torch.relu(self.dilated(torch.relu(self.strided(x)))))


class IdentityBlock(nn.Module):
    """An identity residual block: norm and activation before every convolution."""

    def __init__(self, channels: int = 6) -> None:
        super().__init__()
        self.bn1, self.bn2 = nn.BatchNorm2d(channels), nn.BatchNorm2d(channels)
        self.conv1, self.conv2 = (nn.Conv2d(channels, channels, 3, padding=1, bias=False) for _ in range(2))
        for norm in (self.bn1, self.bn2):
            assert norm.running_mean is not None
            assert norm.running_var is not None
            nn.init.uniform_(norm.running_mean, -1, 1)
            nn.init.uniform_(norm.running_var, 0.5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(torch.relu(self.bn2(self.conv1(torch.relu(self.bn1(x))))))


class SmallUnet(nn.Module):
    """Two levels down, two up, skips concatenated."""

    def __init__(self) -> None:
        super().__init__()
        self.in1, self.in2, self.low = (
            nn.Conv2d(2, 4, 3, padding=1),
            nn.Conv2d(4, 8, 3, padding=1),
            nn.Conv2d(8, 8, 3, padding=1),
        )
        self.up2, self.out2 = nn.ConvTranspose2d(8, 8, 2, 2), nn.Conv2d(16, 4, 3, padding=1)
        self.up1, self.out1 = nn.ConvTranspose2d(4, 4, 2, 2), nn.Conv2d(8, 2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        a = torch.relu(self.in1(x))
        b = torch.relu(self.in2(F.max_pool2d(a, 2)))
        c = torch.relu(self.low(F.max_pool2d(b, 2)))
        b = torch.relu(self.out2(torch.cat([self.up2(c), b], 1)))
        return self.out1(torch.cat([self.up1(b), a], 1))


class VisualAttention(nn.Module):
    """Every place of a picture attends to every other."""

    def __init__(self, channels: int = 6, width: int = 4) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Conv2d(channels, width, 1, bias=False) for _ in range(3))
        self.o = nn.Conv2d(width, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        b, _, h, w = x.shape
        q, k, v = (f(x).flatten(2) for f in (self.q, self.k, self.v))
        scores = torch.einsum("bky,bkx->byx", q, k) / q.shape[1] ** 0.5
        return x + self.o(torch.einsum("byx,bkx->bky", scores.softmax(-1), v).view(b, -1, h, w))


class VisionTransformer(nn.Module):
    """Patches, a class token, positions, one transformer layer, a head."""

    def __init__(self, width: int = 16, patch: int = 4, side: int = 8, classes: int = 10) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, width, patch, stride=patch)
        self.token = nn.Parameter(torch.randn(1, 1, width))
        self.place = nn.Parameter(torch.randn(1, 1 + (side // patch) ** 2, width))
        self.layer, self.norm, self.head = EncoderLayer(width), nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.place
        return self.head(self.norm(self.layer(x))[:, 0])


class CausalLogits(nn.Module):
    """A causal language model from token ids to logits, without a cache."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        return self.model(ids, use_cache=False).logits


def zoo(seed: int = 0, language_model: bool = True, dtype: torch.dtype = torch.float32) -> dict:
    """Name -> (model, inputs), random with a seed; the last is a GPT-2 of two layers where transformers is there."""
    with seeded(seed):
        made: dict[str, tuple[nn.Module, tuple[Tensor, ...]]] = {
            "digit-mlp": (DigitMlp(), (torch.randn(3, 8, 8),)),
            "scaled-attention": (ScaledAttention(), (torch.randn(5, 4), torch.randn(6, 4), torch.randn(6, 4))),
            "multi-head-attention": (MultiHeadAttention(), (torch.randn(2, 5, 16),)),
            "encoder-layer": (EncoderLayer(), (torch.randn(2, 5, 16),)),
            "convolutions": (Convolutions(), (torch.randn(2, 3, 10, 12),)),
            "identity-resnet": (IdentityBlock(), (torch.randn(2, 6, 5, 7),)),
            "unet": (SmallUnet(), (torch.randn(2, 2, 8, 12),)),
            "visual-attention": (VisualAttention(), (torch.randn(2, 6, 3, 5),)),
        }
        if language_model:
            try:
                from transformers import GPT2Config, GPT2LMHeadModel
            except ImportError:
                pass
            else:
                config = GPT2Config(
                    vocab_size=40, n_embd=24, n_layer=2, n_head=3, n_positions=16, bos_token_id=0, eos_token_id=0
                )
                made["gpt2"] = (CausalLogits(GPT2LMHeadModel(config)), (torch.randint(40, (2, 7)),))
    return {
        name: (model.eval().to(dtype), tuple(x.to(dtype) if x.is_floating_point() else x for x in inputs))
        for name, (model, inputs) in made.items()
    }
