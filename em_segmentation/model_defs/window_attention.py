"""Self-attention inside windows of cells, with a bias per pair of cells and a mask per window, in little memory."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

CHUNK = 2**20  # scores computed at once on a CPU: 4 MB, which its caches hold


def window_attention(qkv: Tensor, bias: Tensor, masks: Tensor, kinds: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d) + bias + mask) v of every window and head -> (windows, n, heads * d).

    qkv: (windows, n, 3, heads, d); bias: (heads, n, n); masks: (M, n, n), added; kinds: (windows,) says which mask a
    window has, a negative number none.
    """
    if qkv.device.type == "cpu":
        return _WindowAttention.apply(qkv, bias, masks, kinds)  # type: ignore[no-any-return, no-untyped-call]
    q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (windows, heads, n, d)
    none = torch.zeros_like(masks[:1])
    added = bias + torch.cat([none, masks])[kinds + 1][:, None]  # (windows, heads, n, n)
    heads = nn.functional.scaled_dot_product_attention(q, k, v, added.to(q.dtype))
    return heads.transpose(1, 2).flatten(2)


class _WindowAttention(torch.autograd.Function):
    """A few windows at a time, so that scores stay in the caches; of them the probabilities alone are kept for training.

    torch's fused attention has no gradient by the bias on a CPU, and falls back to slower steps over all windows.
    """

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, bias: Tensor, masks: Tensor, kinds: Tensor) -> Tensor:
        windows, n, _, heads, d = qkv.shape
        out, kept = qkv.new_empty(windows, n, heads, d), []
        for chunk in _chunks(windows, heads * n * n):
            q, k, v = qkv[chunk].permute(2, 0, 3, 1, 4)
            p = _probabilities(q, k, bias, masks, kinds[chunk])  # (w, heads, n, n)
            out[chunk] = (p @ v).transpose(1, 2)
            if any(ctx.needs_input_grad):
                kept.append(p)
        ctx.save_for_backward(qkv, bias, *kept)
        return out.flatten(2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None]:
        qkv, bias, *kept = ctx.saved_tensors
        windows, n, _, heads, d = qkv.shape
        by_qkv = torch.empty_like(qkv)
        by_bias = torch.zeros_like(bias, dtype=torch.float32)
        for chunk, p in zip(_chunks(windows, heads * n * n), kept, strict=True):
            q, k, v = qkv[chunk].permute(2, 0, 3, 1, 4)  # (w, heads, n, d)
            wanted = gradient[chunk].view(-1, n, heads, d).transpose(1, 2)
            by_v = p.transpose(2, 3) @ wanted
            by_score = torch.ops.aten._softmax_backward_data(wanted @ v.transpose(2, 3), p, -1, p.dtype)
            by_bias += by_score.sum(0, dtype=torch.float32)
            by_q, by_k = (by_score @ k).mul_(d**-0.5), (by_score.transpose(2, 3) @ q).mul_(d**-0.5)
            by_qkv[chunk] = torch.stack((by_q, by_k, by_v)).permute(1, 3, 0, 2, 4)
        return by_qkv, by_bias.to(bias.dtype), None, None


def _chunks(windows: int, scores_of_one: int) -> Iterator[slice]:
    step = max(1, CHUNK // scores_of_one)
    for begin in range(0, windows, step):
        yield slice(begin, begin + step)


def _probabilities(q: Tensor, k: Tensor, bias: Tensor, masks: Tensor, kinds: Tensor) -> Tensor:
    """(w, heads, n, d) twice -> (w, heads, n, n)."""
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(2, 3)
    scores += bias
    masked = (kinds >= 0).nonzero()[:, 0].tolist()
    for window in masked:
        scores[window] += masks[kinds[window]]
    return torch.softmax(scores, -1)
