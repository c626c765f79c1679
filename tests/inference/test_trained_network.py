"""`run.network()`: the trained torch module of every family and method."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support.random_run import make_run, make_text_run

from edgeblocks.diffusion.noise import sampler_levels
from edgeblocks.errors import ConfigError
from edgeblocks.families.base import TextInfo
from edgeblocks.inference.sampling import always, classify_images
from edgeblocks.inference.staged_weights import loaded_ema

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = {"width": 16, "heads": 2}


def made(out, family, method):
    layers = (4,) if (family, method) == ("looped", "exact") else (2, 2)
    if family in ("dit", "vit"):
        return make_run(out, layers=layers, family=family, method=method, **SMALL)
    own = {"iterations": 2, "truncation": 2} if family == "looped" else {}
    text = {"data": "moby-dick", "length": 16}
    return make_text_run(out, layers=layers, family=family, method=method, **text, **own, **SMALL)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """By family and method; made when they are asked for."""
    found = {}

    def of(family, method):
        if (family, method) not in found:
            found[family, method] = made(tmp_path_factory.mktemp("run") / "run", family, method)
        return found[family, method]

    return of


@pytest.mark.parametrize("method", ["diffusion", "exact"])
@pytest.mark.parametrize("family", ["dit", "vit", "mdlm", "ar", "looped"])
def test_it_is_what_the_weights_file_holds_and_computes_what_the_chain_does(runs, tmp_path, family, method):
    """Parameters have the names and bits of `edgeblocks weights`; each noise level gives what its block gives."""
    run = runs(family, method)
    for last in (False, True):
        run.save_weights(tmp_path / "w.safetensors", last=last)
        held, given = run.network(last=last).state_dict(), load_file(tmp_path / "w.safetensors")
        assert held.keys() == given.keys() and all(torch.equal(held[name], given[name]) for name in given)
        (tmp_path / "w.safetensors").unlink()
    directory, network = run.directory, run.network()
    kind, rows = directory.family(), 3
    generator = torch.Generator().manual_seed(0)
    batch = kind.at_level(*examples(directory.data), level_of(kind, directory), generator)
    z, condition = kind.inputs(batch)
    others = () if condition is None else (condition,)
    levels = sampler_levels(directory.partition, num_steps=rows) if family != "mdlm" else (1.0, 0.6, 0.2)
    runner = files_runner(run)
    with torch.no_grad():
        alone = []
        for row, level in enumerate(levels):
            block = runner.network(directory.partition.block_of(level))
            own = [part[row : row + 1] for part in (z, torch.tensor(levels, dtype=torch.float32), *others)]
            alone.append(first(block(*own)))
            assert torch.equal(first(network(*own)), alone[-1]), (family, method, level)
        together = first(network(z, torch.tensor(levels, dtype=torch.float32), *others))
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-5)


def files_runner(run):
    """The chain's own runner, which reads the blocks' files."""
    return run.runner(loaded_ema(run.directory, slots=2), micro_batch=4)


def first(found):
    return found if isinstance(found, torch.Tensor) else found[0]


def examples(data):
    """Three of them, and their classes."""
    rng = np.random.default_rng(0)
    if isinstance(data, TextInfo):
        return rng.integers(0, data.vocabulary, (3, data.length)), None
    return rng.integers(0, 256, (3, data.height, data.width, data.channels)).astype(np.uint8), np.array([0, 1, 2])


def level_of(kind, directory):
    return kind.evaluation_levels(directory.partition)[-1]


def test_a_classifier_of_its_own_is_called_with_images_alone(runs):
    """Its probabilities are those of `classify`, and `class_names` names them."""
    run = runs("vit", "exact")
    pixels, _ = examples(run.directory.data)
    with torch.no_grad():
        found = run.network().logits(run.images(pixels)).softmax(-1).numpy()
    wanted = classify_images(run.directory, always(files_runner(run)), pixels, steps=1, noises=1, seed=0)
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-7)
    assert run.class_names == tuple("0123456789") and run.tokenizer is None
    with pytest.raises(ConfigError, match=r"images are uint8 \(4, 4, 1\); the run takes uint8 \(8, 8, 1\)"):
        run.images(np.zeros((1, 4, 4, 1), np.uint8))


def test_a_sample_made_with_it_is_the_runs_own(runs):
    """The blocks as one network, in the place of the runner that reads them from their files."""
    run = runs("dit", "diffusion")

    class Whole:
        network, together = run.network(), None

        @torch.no_grad()
        def denoise(self, z, sigma, condition):
            return self.network(z, torch.full((len(z),), sigma), condition)

    np.testing.assert_array_equal(
        run.sample(n=2, steps=4, runner=Whole()), run.sample(n=2, steps=4, runner=files_runner(run))
    )


def test_text_is_encoded_and_decoded_beside_it(runs):
    """A language model's likeliest next token, as a text; a run on text takes no images."""
    run = runs("ar", "exact")
    tokens = torch.from_numpy(run.tokenizer.encode("call me"))[None]
    family = run.directory.family()
    z = torch.zeros(1, tokens.shape[1], family.code_width)
    with torch.no_grad():
        logits, _ = run.network()(z, torch.ones(1), tokens)
    assert len(run.tokenizer.decode(logits[0, -1:].argmax(-1))) == 1 and run.class_names == ()
    with pytest.raises(ConfigError, match=r"reads text"):
        run.images(np.zeros((1, 4, 4, 1), np.uint8))


def test_it_is_trained_on_in_torch(runs):
    """Parameters take gradients, and are copies: the run stays as it is."""
    network = runs("vit", "diffusion").network()
    assert all(parameter.requires_grad for parameter in network.parameters()) and not network.training
    with torch.no_grad():
        next(network.parameters()).zero_()
    assert next(runs("vit", "diffusion").network().parameters()).abs().sum() > 0
