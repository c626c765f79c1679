"""What `looped` replaces: a recurrent-depth network trained the classical way, by back-propagation through iterations.

    python tests/bench/looped_classical.py --steps 2000 --width 128

The same prelude, core and coda as `looped`, without noise: the core improves a state that starts at random, reading the
prelude's output in every iteration. Each training step draws a number of iterations (one and a Poisson-lognormal number
with a mean of --iterations), runs them, and goes back through the last --truncation of them; the loss is the
cross-entropy of the next character at the end. Prints bits per character of the hold-out part after K = 1, 2, 4, 8, 16
and 32 iterations. --depth is at least 4.

Source: Geiping et al. 2025, arXiv 2502.05171 (Huginn), sections 3.1 and 3.3.
"""

import argparse
import math
import time

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from edgeblocks.causal_layers import CausalLayer
from edgeblocks.data.cache import cache_folder
from edgeblocks.data.text import TextSet, open_text
from edgeblocks.generators import generator_at
from edgeblocks.layers import Linear, TokenEmbedding, init_linear_, init_zero_, rotary_table
from edgeblocks.update import BETA1, BETA2, EPS, learning_rate_at

SPREAD = 0.5
"""Standard deviation of the logarithm of the mean number of iterations."""


class Recurrent(nn.Module):
    """Prelude, core and coda of `looped`'s layers, whose condition is zero: biases alone modulate them."""

    def __init__(self, *, width: int, heads: int, depth: int, vocabulary: int, length: int) -> None:
        super().__init__()
        self.width, self.ends = width, depth // 4
        self.embedding = TokenEmbedding(vocabulary + 1, width)
        self.adapter = Linear(2 * width, width)
        self.layers = nn.ModuleList(CausalLayer(width=width, heads=heads) for _ in range(depth))
        self.readout = Linear(width, vocabulary)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                init_linear_(module, generator_at(0, "init"))
        nn.init.normal_(self.embedding.weight, std=0.02, generator=generator_at(0, "embedding"))
        for layer in self.layers:
            init_zero_(layer.modulation)
            layer.modulation.bias.data.view(6, width)[[2, 5]] = 1.0  # open gates: layers as in a plain transformer
            layer.attention.set_rotary_(rotary_table(length, width // heads))
        init_zero_(self.readout)

    def forward(
        self, tokens: Int[Tensor, "batch length"], iterations: int, truncation: int, generator: torch.Generator
    ) -> Float[Tensor, "batch length vocabulary"]:
        before = F.pad(tokens[:, :-1], (1, 0), value=self.embedding.num_embeddings - 1)
        read = self.through(slice(0, self.ends), self.embedding(before))
        state = torch.randn(read.shape, generator=generator) * self.width**-0.5
        for iteration in range(iterations):
            state = state.detach() if iteration <= iterations - truncation else state
            state = self.through(slice(self.ends, -self.ends), self.adapter(torch.cat([state, read], -1)))
            state = F.rms_norm(state, state.shape[-1:])
        return self.readout(F.rms_norm(self.through(slice(-self.ends, None), state), state.shape[-1:]))

    def through(self, part: slice, x: Tensor) -> Tensor:
        steady = torch.zeros(len(x), self.width)
        for layer in self.layers[part]:
            x = layer(x, steady)
        return x


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("width", 128), ("heads", 4), ("depth", 8), ("length", 128), ("batch", 32), ("steps", 1500)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--iterations", type=int, default=8)
    parser.add_argument("--truncation", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sequences", type=int, default=64)
    wanted = parser.parse_args()
    data = open_text(
        "moby-dick",
        tokenizer="chars",
        vocabulary=4096,
        length=wanted.length,
        hold_out=0.1,
        cache_dir=cache_folder(),
        progress=lambda *_: None,
        room_bytes=None,
    )
    shape = {name: getattr(wanted, name) for name in ("width", "heads", "depth", "length")}
    network = Recurrent(vocabulary=data.vocabulary, **shape)
    optimizer = torch.optim.AdamW(network.parameters(), betas=(BETA1, BETA2), eps=EPS, weight_decay=0.01)
    order, started = data.order(batch=wanted.batch, seed=wanted.seed, block=0), time.perf_counter()
    for step in range(wanted.steps):
        generator = generator_at(wanted.seed, "train", step)
        log_rate = math.log(wanted.iterations) - SPREAD**2 / 2 + SPREAD * torch.randn((), generator=generator)
        iterations = 1 + int(torch.poisson(log_rate.exp(), generator=generator))
        tokens = torch.from_numpy(data.gather(order.indices(step))[0])
        logits = network(tokens, iterations, wanted.truncation, generator)
        loss = F.cross_entropy(logits.flatten(0, 1), tokens.flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(step, steps=wanted.steps, warmup=50, peak=wanted.learning_rate)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 100 == 99:
            print(f"step {step + 1}: {loss.item() / math.log(2):.3f} bits, {time.perf_counter() - started:.0f} s")
    for iterations in (1, 2, 4, 8, 16, 32):
        bits = bits_per_character(network, data, wanted.sequences, iterations)
        print(f"K={iterations:2d}: {bits:.3f} bits per character")


@torch.no_grad()
def bits_per_character(network: Recurrent, data: TextSet, sequences: int, iterations: int) -> float:
    """Of windows of the hold-out part, after a number of iterations."""
    tokens = torch.from_numpy(data.gather(data.evaluation_indices(sequences))[0])
    logits = network(tokens, iterations, 0, generator_at(0, "eval"))
    return F.cross_entropy(logits.flatten(0, 1), tokens.flatten()).item() / math.log(2) / data.characters_per_token


if __name__ == "__main__":
    main()
