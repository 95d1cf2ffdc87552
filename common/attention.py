"""Self-attention inside windows of cells, with a bias per pair of cells and a mask per window, in 2D and 3D."""

import itertools
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

CHUNK = 2**20  # scores computed at once on a CPU: 4 MB, which its caches hold
FORBIDDEN = -100.0  # added to the scores of cells that must not see each other


class Windows:
    """How maps of one size fall into windows, in place or shifted by half a window (Liu et al. 2021).

    size: (y, x) or (z, y, x) of the map; window: of a window. Along an axis that one window covers nothing is shifted;
    there the window shrinks to the map, or the map is padded with zeros to the window. hides_depth: no cell sees what was
    padded along z.
    """

    def __init__(
        self,
        size: tuple[int, ...],
        window: tuple[int, ...],
        shifted: bool,
        shrinks: bool,
        hides_depth: bool,
        device: torch.device,
    ) -> None:
        self.size = size
        self.edges = [min(w, n) if shrinks else w for w, n in zip(window, size, strict=True)]
        self.shifts = [w // 2 if shifted and n > w else 0 for w, n in zip(window, size, strict=True)]
        self.counts = [-(-n // edge) for n, edge in zip(size, self.edges, strict=True)]
        self.padding = [count * edge - n for count, edge, n in zip(self.counts, self.edges, size, strict=True)]
        with torch.device("cpu"):  # so that no number waits for a GPU
            masks, kinds = self._masks()
            if hides_depth and self.padding[0]:
                masks, kinds = self._with_hidden_depth(masks, kinds)
        self.masks, self.kinds = masks.to(device), kinds.to(device)

    def _masks(self) -> tuple[Tensor, Tensor]:
        """(M, n, n) and (windows,): pairs of cells that are in one window by the cyclic shift alone.

        Along a shifted axis only the last window holds such cells, so that few masks serve all windows.
        """
        regions = [  # of the cells of the last window along each axis
            torch.where(torch.arange(edge) < edge - shift, 0, 1) if shift else torch.zeros(edge, dtype=torch.long)
            for edge, shift in zip(self.edges, self.shifts, strict=True)
        ]
        masks = []
        for last in itertools.product((0, 1), repeat=len(regions)):
            label = _as_number([region * axis for region, axis in zip(regions, last, strict=True)])  # (n,)
            masks.append(torch.where(label[:, None] != label[None], FORBIDDEN, 0.0))
        kinds = _as_number([
            ((torch.arange(count) == count - 1) & (shift > 0)).long()
            for count, shift in zip(self.counts, self.shifts, strict=True)
        ])  # (windows,)  # fmt: skip
        return torch.stack(masks), torch.where(kinds == 0, -1, kinds)

    def _with_hidden_depth(self, masks: Tensor, kinds: Tensor) -> tuple[Tensor, Tensor]:
        """The same masks, with the cells that were padded along z forbidden to all."""
        padded = [count * edge for count, edge in zip(self.counts, self.edges, strict=True)]
        beyond = torch.arange(padded[0]) >= self.size[0]
        hidden = self._parted(beyond.view(1, -1, *[1] * len(padded)).expand(1, *padded, 1))[..., 0]  # (windows, n)
        patterns, number = torch.unique(torch.cat([kinds[:, None] + 1, hidden.long()], 1), dim=0, return_inverse=True)
        of_shift = torch.cat([torch.zeros_like(masks[:1]), masks])[patterns[:, 0]]  # (M, n, n)
        return of_shift.masked_fill(patterns[:, None, 1:] > 0, FORBIDDEN), number

    def split(self, x: Tensor) -> Tensor:
        """(B, n..., C) -> (B * windows, cells, C)."""
        if any(self.padding):
            x = nn.functional.pad(x, (0, 0, *(n for pad in reversed(self.padding) for n in (0, pad))))
        return self._parted(x)

    def _parted(self, x: Tensor) -> Tensor:
        """split of a map that is padded."""
        dims = len(self.size)
        if any(self.shifts):
            x = torch.roll(x, [-shift for shift in self.shifts], list(range(1, dims + 1)))
        pairs = [n for pair in zip(self.counts, self.edges, strict=True) for n in pair]
        order = (0, *range(1, 2 * dims, 2), *range(2, 2 * dims + 1, 2), 2 * dims + 1)
        cells = x.reshape(len(x), *pairs, x.shape[-1]).permute(order)
        return cells.reshape(-1, math.prod(self.edges), x.shape[-1])

    def join(self, windows: Tensor) -> Tensor:
        """The inverse of split."""
        dims = len(self.size)
        order = (0, *(axis for k in range(dims) for axis in (1 + k, 1 + dims + k)), 2 * dims + 1)
        cells = windows.view(-1, *self.counts, *self.edges, windows.shape[-1]).permute(order)
        padded = [count * edge for count, edge in zip(self.counts, self.edges, strict=True)]
        x = cells.reshape(-1, *padded, windows.shape[-1])
        if any(self.shifts):
            x = torch.roll(x, self.shifts, list(range(1, dims + 1)))
        return x[(slice(None), *(slice(n) for n in self.size))]


def _as_number(axes: list[Tensor]) -> Tensor:
    """The binary number of the 0s and 1s at every place of a grid, flat."""
    number = torch.zeros((), dtype=torch.long)
    for bits in axes:
        number = 2 * number[..., None] + bits
    return number.flatten()


def relative_positions(window: tuple[int, ...]) -> Tensor:
    """(n, n): the number of the offset between two cells of a full window, of (2 w - 1) per axis."""
    cells = torch.stack(torch.meshgrid(*(torch.arange(edge) for edge in window), indexing="ij")).flatten(1)
    number = torch.zeros(cells.shape[1], cells.shape[1], dtype=torch.long)
    for axis, edge in zip(cells, window, strict=True):
        number = number * (2 * edge - 1) + axis[:, None] - axis[None] + edge - 1
    return number


def window_attention(qkv: Tensor, bias: Tensor, masks: Tensor, kinds: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d) + bias + mask) v of every window and head -> (windows, n, heads * d).

    qkv: (windows, n, 3, heads, d); bias: (heads, n, n); masks: (M, n, n), added, without a gradient; kinds: (windows,)
    says which mask a window has, a negative number none. All of one floating type.
    """
    assert qkv.dtype == bias.dtype == masks.dtype, f"Expected one type, got {qkv.dtype}, {bias.dtype}, {masks.dtype}"
    if qkv.device.type == "cpu":
        with torch.autocast("cpu", enabled=False):  # the types of what is kept must be those of the gradients
            return _WindowAttention.apply(qkv, bias, masks, kinds)  # type: ignore[no-any-return, no-untyped-call]
    return fused_window_attention(qkv, bias, masks, kinds)


def fused_window_attention(qkv: Tensor, bias: Tensor, masks: Tensor, kinds: Tensor) -> Tensor:
    """window_attention by torch's own attention, which is fast on a GPU."""
    q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (windows, heads, n, d)
    none = torch.zeros_like(masks[:1])
    added = bias + torch.cat([none, masks])[kinds + 1][:, None]  # (windows, heads, n, n)
    heads = nn.functional.scaled_dot_product_attention(q, k, v, added)
    return heads.transpose(1, 2).flatten(2)


class _WindowAttention(torch.autograd.Function):
    """A few windows at a time, so that scores stay in the caches; of them the probabilities alone are kept for training.

    torch's fused attention has no gradient by the bias on a CPU, and falls back to slower steps over all windows. There is no
    second derivative.
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
        by_bias = torch.zeros_like(bias, dtype=torch.promote_types(bias.dtype, torch.float32))
        for chunk, p in zip(_chunks(windows, heads * n * n), kept, strict=True):
            q, k, v = qkv[chunk].permute(2, 0, 3, 1, 4)  # (w, heads, n, d)
            wanted = gradient[chunk].view(-1, n, heads, d).transpose(1, 2)
            by_v = p.transpose(2, 3) @ wanted
            by_score = torch.ops.aten._softmax_backward_data(wanted @ v.transpose(2, 3), p, -1, p.dtype)
            by_bias += by_score.sum(0, dtype=by_bias.dtype)
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
