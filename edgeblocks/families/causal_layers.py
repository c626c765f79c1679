"""Layers for text that is written token by token: causal attention, with a KV cache.

In training a layer sees a whole window at once (`forward`). In generation it sees the next tokens only, and the KV
cache of the earlier ones, its `past` (`cached`): the same numbers up to rounding.

There are two kinds of attention. `CausalAttention` has one stream of tokens. `TwoStreamAttention` has two that share
all weights, one above the other in the batch: the clean tokens, and the noised codes that are to be denoised. To score
a known text, `read` runs two streams as well: each position's token known, as later positions see it, and masked, as
the position that is to predict it.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from edgeblocks.families.layers import AdaLnZeroLayer, Condition, Hidden, PreNormLayer, RotaryAttention, modulated_norm

Past = tuple[Float[Tensor, "sequences heads past head_width"], Float[Tensor, "sequences heads past head_width"]]
"""The KV cache: keys, already rotated by their positions, and values; of two streams those of the clean one."""
Present = tuple[Float[Tensor, "sequences heads tokens head_width"], Float[Tensor, "sequences heads tokens head_width"]]
"""Keys and values of the current tokens, which a caller appends to the KV cache."""


def visible(
    queries: Float[Tensor, "sequences heads tokens head_width"],
    keys: Float[Tensor, "sequences heads keys head_width"],
    sliding_window: int = 0,
) -> Bool[Tensor, "tokens keys"]:
    """Which keys, those of the past and then of the tokens themselves, each token sees: none that come later.

    Args:
        sliding_window: the token itself and the last ones before it, so many in all; 0 for all of them.

    >>> visible(torch.zeros(1, 1, 2, 4), torch.zeros(1, 1, 3, 4)).int().tolist()
    [[1, 1, 0], [1, 1, 1]]
    >>> visible(torch.zeros(1, 1, 2, 4), torch.zeros(1, 1, 3, 4), 2).int().tolist()
    [[1, 1, 0], [0, 1, 1]]
    """
    num_tokens, num_keys = queries.shape[2], keys.shape[2]
    # The tokens are the last ones of the keys.
    tokens = (torch.arange(num_tokens, device=queries.device) + (num_keys - num_tokens)).unsqueeze(1)
    positions = torch.arange(num_keys, device=queries.device)
    seen = positions <= tokens
    return seen & (positions > tokens - sliding_window) if sliding_window else seen


class CausalAttention(RotaryAttention):
    """Self-attention in which a token sees itself and those before it, all or the last ones.

    Source of the sliding window: Beltagy et al. 2020, arXiv 2004.05150 (Longformer), section 3.1. What a layer does not
    see has come to it through those below: n layers with a window of w see n (w - 1) + 1 tokens.
    """

    def __init__(self, *, width: int, heads: int, sliding_window: int = 0) -> None:
        super().__init__(width=width, heads=heads)
        self.sliding_window = sliding_window

    def forward(self, x: Hidden) -> Hidden:
        return self.attend(x, None)[0]

    def attend(self, x: Hidden, past: Past | None) -> tuple[Hidden, Present]:
        """The output, and the tokens' keys and values; the tokens follow those of the KV cache `past`."""
        queries, keys, values = self.projected(x, self._positions(x, past))
        # Keys were rotated by their own positions when they were made, so those of the KV cache stay as they are.
        seen_keys, seen_values = _with_past(keys, values, past)
        attended = self._causal(queries, seen_keys, seen_values, past)
        return self.merged(attended), (keys, values)

    def read(self, x: Float[Tensor, "both tokens width"]) -> Float[Tensor, "both tokens width"]:
        """The output where a known text is scored.

        The first half of the batch holds each position with its token known: causal attention, as later positions see
        it. The second half holds each position with its token unknown: it attends to the known positions before it, and
        to itself.
        """
        queries, keys, values = (halves(part) for part in self.projected(x, self._positions(x, None)))
        # Not the diagonal: that is the token to be predicted.
        before = visible(queries[1], keys[0], self.sliding_window).tril(-1)
        unknown = _with_itself(queries[1], keys, values, before)
        return self.merged(torch.cat([self._causal(queries[0], keys[0], values[0], None), unknown]))

    def _causal(self, queries: Tensor, keys: Tensor, values: Tensor, past: Past | None) -> Tensor:
        """Attention of the last tokens to all that they see."""
        if past is None and not self.sliding_window:
            # is_causal instead of a mask: torch then skips the masked half.
            return F.scaled_dot_product_attention(queries, keys, values, is_causal=True)
        mask = _added(visible(queries, keys, self.sliding_window), queries)
        return F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask)

    def _positions(self, x: Tensor, past: Past | None) -> Float[Tensor, "2 tokens half"]:
        """The rows of the table of positions. A look-up where there is a past, whose length an exported graph does not
        know beforehand."""
        if past is None:
            return self.rotary[:, : x.shape[1]]
        # Keys are [B, heads, T, d]: their length is the position at which these tokens begin.
        return self.rotary[:, past[0].shape[2] + torch.arange(x.shape[1], device=x.device)]


class TwoStreamAttention(CausalAttention):
    """Attention of clean tokens and of noised codes; position i of x is both, in the two halves of its batch.

    A clean token sees itself and those before it. A noised code sees the same clean tokens, and itself, but no other
    code: those before it are known clean, and those after it are to be unknown. Present and past are the clean tokens'.
    """

    noised_only = False
    """Whether the output is that of the noised codes alone."""

    def attend(
        self, x: Float[Tensor, "both tokens width"], past: Past | None
    ) -> tuple[Float[Tensor, "answered tokens width"], Present]:
        """The output, and the clean tokens' keys and values; the tokens follow those of the KV cache `past`."""
        queries, keys, values = (halves(part) for part in self.projected(x, self._positions(x, past)))
        seen_keys, seen_values = _with_past(keys[0], values[0], past)
        # The diagonal, too: the clean stream is shifted by one, so its position i holds the token before the one that
        # is to be predicted.
        seen = visible(queries[1], seen_keys, self.sliding_window)
        noised = _with_itself(queries[1], (seen_keys, keys[1]), (seen_values, values[1]), seen)
        if self.noised_only:
            return self.merged(noised), (keys[0], values[0])
        clean = self._causal(queries[0], seen_keys, seen_values, past)
        return self.merged(torch.cat([clean, noised])), (keys[0], values[0])


class CausalLayer(AdaLnZeroLayer):
    """An AdaLN layer whose attention is causal."""

    attention: CausalAttention

    def __init__(self, *, width: int, heads: int, sliding_window: int = 0) -> None:
        super().__init__(width=width, heads=heads)
        self.attention = CausalAttention(width=width, heads=heads, sliding_window=sliding_window)

    def forward(self, x: Hidden, condition: Condition) -> Float[Tensor, "answered tokens width"]:
        return self.cached(x, condition, None)[0]

    def cached(
        self, x: Hidden, condition: Condition, past: Past | None
    ) -> tuple[Float[Tensor, "answered tokens width"], Present]:
        """The output for tokens that follow those of the past, and their keys and values."""
        shift_a, scale_a, *others = self.modulation(condition).chunk(6, dim=-1)
        attended, present = self.attention.attend(modulated_norm(x, shift_a, scale_a), past)
        return self._added(x, attended, *others), present

    def read(
        self, x: Float[Tensor, "both tokens width"], condition: Float[Tensor, "both width"]
    ) -> Float[Tensor, "both tokens width"]:
        """The output where a text is read; see `CausalAttention.read`."""
        shift_a, scale_a, *others = self.modulation(condition).chunk(6, dim=-1)
        return self._added(x, self.attention.read(modulated_norm(x, shift_a, scale_a)), *others)

    def _added(
        self, x: Tensor, attended: Tensor, gate_a: Tensor, shift_m: Tensor, scale_m: Tensor, gate_m: Tensor
    ) -> Tensor:
        """x with what attention adds, and with what the MLP adds to that."""
        x = torch.addcmul(x, gate_a.unsqueeze(1), attended)
        return torch.addcmul(x, gate_m.unsqueeze(1), self.mlp(modulated_norm(x, shift_m, scale_m)))


class PlainCausalLayer(PreNormLayer):
    """A layer of an ordinary language model: its attention is causal."""

    attention: CausalAttention

    def __init__(self, *, width: int, heads: int, sliding_window: int = 0) -> None:
        attention = CausalAttention(width=width, heads=heads, sliding_window=sliding_window)
        super().__init__(width=width, attention=attention)

    def cached(self, x: Hidden, condition: Tensor, past: Past | None) -> tuple[Hidden, Present]:
        """The output for tokens that follow those of the past, and their keys and values."""
        attended, present = self.attention.attend(self.attention_norm(x), past)
        x = x + attended
        # The same sums as `PreNormLayer.forward`, which has no keys and values to give back.
        return x + self.mlp(self.mlp_norm(x)), present


class TwoStreamLayer(CausalLayer):
    """The same for clean tokens and noised codes, in the two halves of the batch.

    The last layer returns the noised codes alone: of the clean tokens only its keys and values are used. That saves
    three quarters of its work for them.
    """

    attention: TwoStreamAttention

    def __init__(self, *, width: int, heads: int, sliding_window: int = 0, last: bool) -> None:
        super().__init__(width=width, heads=heads)
        self.attention = TwoStreamAttention(width=width, heads=heads, sliding_window=sliding_window)
        self.attention.noised_only = last

    def _added(self, x: Tensor, attended: Tensor, *modulation: Tensor) -> Tensor:
        # Attention has returned the second half alone, so the residual and the gates are cut to it as well.
        if self.attention.noised_only:
            return super()._added(halves(x)[1], attended, *(halves(part)[1] for part in modulation))
        return super()._added(x, attended, *modulation)


def halves(x: Float[Tensor, "both ..."]) -> tuple[Float[Tensor, "one ..."], Float[Tensor, "one ..."]]:
    """The two streams. Unlike `Tensor.chunk` it leaves a batch of any size open while a graph is exported."""
    first, second = x.reshape(2, -1, *x.shape[1:]).unbind(0)  # [2 B, ...] -> [B, ...] twice
    return first, second


def _with_past(keys: Tensor, values: Tensor, past: Past | None) -> tuple[Tensor, Tensor]:
    if past is None:
        return keys, values
    past_keys, past_values = (kept.to(keys.dtype) for kept in past)
    return torch.cat([past_keys, keys], dim=2), torch.cat([past_values, values], dim=2)


def _with_itself(
    queries: Tensor, keys: tuple[Tensor, Tensor], values: tuple[Tensor, Tensor], seen: Bool[Tensor, "tokens keys"]
) -> Tensor:
    """Attention of each token to those of the other stream that it sees, and to itself; keys and values: of both."""
    # Beside a causal call for the other stream this is [n, 2n], where one call for both would be [2n, 2n], three
    # quarters of it masked. Forward and backward on one thread, with 8 heads of width 64: 302 against 431 ms for 8
    # windows of 256 tokens, 528 against 780 for one of 1024; and the mask, of which each layer keeps one, is half as
    # large.
    itself = torch.eye(queries.shape[2], dtype=torch.bool, device=queries.device)
    mask = _added(torch.cat([seen, itself], dim=1), queries)
    return F.scaled_dot_product_attention(queries, torch.cat(keys, dim=2), torch.cat(values, dim=2), attn_mask=mask)


def _added(allowed: Bool[Tensor, "tokens keys"], like: Tensor) -> Float[Tensor, "tokens keys"]:
    """A mask as it is added to scores."""
    # Attention would make this of a boolean mask itself, in memory that the trace of costs does not see.
    return torch.zeros_like(allowed, dtype=like.dtype).masked_fill_(~allowed, float("-inf"))
