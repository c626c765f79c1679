"""Runs of ar and looped: written with, evaluated, exported and run; what was kept changes no token."""

import json
import math
import subprocess
import sys

import numpy as np
import pytest
import torch

import edgeblocks
from edgeblocks.cli.console import evaluation_report
from edgeblocks.diffusion.autoregression import CachedPredict, Window, read_levels
from edgeblocks.diffusion.token_choice import softmax
from edgeblocks.errors import ConfigError
from edgeblocks.export.open_export import open_chain
from edgeblocks.inference import likelihood
from edgeblocks.inference.block_runner import BlockRunner
from edgeblocks.inference.ema_loader import EmaLoader
from edgeblocks.inference.sampling import token_chain_of
from edgeblocks.profiling.looks import grid_sample_bytes
from edgeblocks.seeds import seed_at
from edgeblocks.tasks import GRID_TOKENS, TASKS

WORDS = ["the", "white", "whale", "swims", "under", "a", "cold", "sea", "and", "sings", "to", "no", "ship"]
LENGTH = 16
KINDS = {"ar": {"depth": 3, "blocks": 3}, "looped": {"depth": 4, "blocks": 1}}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "sea.txt"
    path.write_text(" ".join(np.random.default_rng(0).choice(WORDS, 4000)))
    return str(path)


@pytest.fixture(scope="module", params=KINDS)
def run(request, text, tmp_path_factory):
    """A run of each family, trained just long enough that its answers depend on what is before."""
    return edgeblocks.train(
        out=tmp_path_factory.mktemp(request.param) / "run",
        family=request.param,
        data=text,
        width=32,
        heads=2,
        length=LENGTH,
        batch=8,
        micro_batch=4,
        steps=40,
        sample_grids=1,
        hold_out=0.02,
        learning_rate=1e-2,
        mem_budget="4GB",
        **KINDS[request.param],
    )


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("export") / "onnx"
    return folder, run.export(folder)


def runner_of(run, *, micro_batch=4, residents=1):
    directory = run.directory
    source = EmaLoader(directory.store(), slots=residents)
    return BlockRunner(
        directory.family(),
        directory.layers,
        directory.partition,
        source,
        micro_batch=micro_batch,
        residents=residents,
    )


def test_what_a_text_keeps_while_training_is_foreseen(run):
    """The planner's figure is the chain's."""
    chain = token_chain_of(run.directory, TASKS["continuation"].steps, length=min(LENGTH, GRID_TOKENS))
    assert grid_sample_bytes(run.directory.family()) == chain.sample_bytes


def written_again_and_again(run, prompt, *, index, seed, steps):
    """Tokens of one sample; at each level of each token the whole text so far goes through the network."""
    chain, runner = token_chain_of(run.directory, steps), runner_of(run, residents=len(run.directory.layers))
    stream = np.random.default_rng(seed_at(seed, "continue", index))
    noise = stream.standard_normal((LENGTH, chain.codes.shape[1]), dtype=np.float32)
    uniform, tokens = stream.random(LENGTH), list(prompt)
    while len(tokens) < LENGTH:
        z, shares = noise[len(tokens)] * np.float32(chain.levels[0]), []
        for sigma, below in zip(chain.levels, [*chain.levels[1:], 0.0], strict=True):
            before = chain.codes[np.array(tokens, dtype=np.int64)] + np.float32(sigma) * noise[: len(tokens)]
            network = runner.network(run.directory.partition.block_of(sigma))
            with torch.no_grad():
                logits, _ = network(
                    torch.from_numpy(np.concatenate([before, z[None]])[None].astype(np.float32)),
                    torch.tensor([sigma]),
                    torch.tensor([[len(chain.codes), *tokens]]),
                )
            shares.append(softmax(logits[0, -1].numpy()))
            z = z + (below - sigma) * (z - shares[-1] @ chain.codes) / sigma
        mean = np.mean([shares[step] for step in read_levels(chain.levels)], axis=0)
        tokens.append(int((np.cumsum(mean) <= uniform[len(tokens)] * mean.sum()).sum()))
    return tokens


@pytest.mark.parametrize("prompt", ["", "the w"])
def test_kept_keys_and_values_change_no_token(run, prompt):
    """Keystone: the texts are those of a network that is given the whole text for every token."""
    found = run.sample_text(n=3, prompt=prompt, seed=7, steps=4)
    tokenizer = run.directory.tokenizer
    for index, made in enumerate(found):
        tokens = written_again_and_again(run, tokenizer.encode(prompt), index=index, seed=7, steps=4)
        assert tokenizer.decode(np.array(tokens)) == made
        assert made.startswith(prompt) and len(made) == LENGTH


def test_texts_do_not_depend_on_what_is_resident_or_written_together(run):
    """One text at a time with one block in memory, and all with all blocks; and loads are counted."""
    blocks = len(run.directory.layers)
    whole = runner_of(run, micro_batch=5, residents=blocks)
    expected = run.sample_text(n=5, seed=3, runner=whole)
    assert whole.loads == list(range(blocks))
    single = runner_of(run, micro_batch=2, residents=1)
    assert run.sample_text(n=5, seed=3, runner=single) == expected
    assert set(single.loads) == set(range(blocks)) and len(single.loads) >= (1 if blocks == 1 else blocks * LENGTH)


def test_an_export_writes_what_torch_writes(run, exported):
    """Token for token, with and without a prompt; the blocks agree within their limit, and each is loaded once."""
    folder, manifest = exported
    assert manifest["task"] == "continuation" and manifest["verified"]["real_inputs"]
    assert manifest["verified"]["block_max_abs_error"] < 1e-4
    assert manifest["verified"]["output_equal_share"] == 1.0
    chain = open_chain(folder)
    assert chain.write(3, seed=5) == run.sample_text(n=3, seed=5)
    assert chain.loads == list(range(len(run.directory.layers)))
    asked = {"prompt": "a cold", "temperature": 0.7, "top_p": 0.8, "steps": 5, "seed": 2}
    assert chain.write(2, micro_batch=1, **asked) == run.sample_text(n=2, **asked)


def test_a_text_is_as_long_as_was_asked_for(run, exported):
    """Its prompt counted, from one token to as many as there were in training; and the export writes the same."""
    chain = open_chain(exported[0])
    for asked in ({"length": 1}, {"length": 9}, {"length": 8, "prompt": "a cold"}):
        made = run.sample_text(n=2, seed=4, **asked)
        assert [len(text) for text in made] == [asked["length"]] * 2
        assert all(text.startswith(asked.get("prompt", "")) for text in made)
        assert chain.write(2, seed=4, **asked) == made
    assert run.sample_text(n=2, seed=4, length=LENGTH) == run.sample_text(n=2, seed=4)


def test_the_command_writes_without_torch(run, exported):
    """`edgeblocks run DIR --prompt` says what `sample` says, and no torch is imported."""
    program = (
        "import sys; from edgeblocks.cli.main import app\n"
        "try: app(sys.argv[1:])\n"
        "except SystemExit as end: assert not end.code\n"
        "assert 'torch' not in sys.modules"
    )
    arguments = ["run", str(exported[0]), "--prompt", "no sh", "--n", "2", "--top-p", "0.9", "--json"]
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == run.sample_text(n=2, prompt="no sh", top_p=0.9)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"fill": "the ____ sea"}, r"--fill belongs to networks that fill gaps, .* give it with --prompt 'the'"),
        ({"prompt": "a" * LENGTH}, r"--prompt has 16 tokens .* give at most 15"),
        ({"top_p": 1.5, "n": 0}, r"--n 0.*\n*.*--top-p 1.5"),
        ({"steps": 0}, "--steps 0"),
        ({"length": 0}, r"--length 0: .* texts of 16 tokens; 1 to 16 are possible$"),
        ({"length": 17, "n": 0}, r"--n 0.*\n*.*--length 17: .*; 1 to 16 are possible, and .* --set length=17"),
        ({"length": 6, "prompt": "a cold"}, r"--prompt has 6 tokens, .* --length 6 .* --length 7 to 16"),
    ],
)
def test_what_cannot_be_written_is_refused(run, exported, asked, message):
    """By the run and by its export, with the flag and what to use."""
    with pytest.raises(ConfigError, match=message):
        run.sample_text(**asked)
    with pytest.raises(ConfigError, match=message):
        open_chain(exported[0]).write(**{"n": 1, **asked})


def test_texts_are_written_during_training(run):
    """Four texts at the mark."""
    (path,) = (run.path / "samples").iterdir()
    assert path.name == "step_0000040.txt" and path.read_text().count("----") == 3


def test_the_bound_is_that_of_the_texts_own_probabilities(run):
    """Oracle: -log of the probability that writing gives each token of a text, read off while it is written again."""
    runner = runner_of(run, micro_batch=3, residents=len(run.directory.layers))
    chain = token_chain_of(run.directory, 4)
    tokens = np.random.default_rng(0).integers(0, 27, (3, LENGTH))
    found = likelihood.log_shares(runner, chain, tokens, seed=1)
    again = _read_as_written(runner, chain, tokens, _bound_noise(chain, seed=1, count=3))
    np.testing.assert_allclose(found, again, atol=2e-4)
    alone = likelihood.log_shares(runner_of(run, micro_batch=1), chain, tokens, seed=1)
    np.testing.assert_allclose(found, alone, atol=2e-4)


def _read_as_written(runner, chain, tokens, noise):
    """Position by position, with the keys and values of the known tokens before."""
    found = np.empty((len(chain.levels), *tokens.shape))
    network, window = CachedPredict(runner.continued, chain), Window(chain, noise)
    for position in range(chain.length):

        def predict(step, *given, position=position):
            logits = network(step, *given)
            found[step, :, position] = np.log(softmax(logits)[np.arange(len(tokens)), tokens[:, position]])
            return logits

        window.probabilities_at(predict, position)
        window.tokens[:, position] = tokens[:, position]
    return found


def _bound_noise(chain, *, seed, count):
    streams = [np.random.default_rng(seed_at(seed, "bound", 0, index)) for index in range(count)]
    shape = (chain.length, chain.codes.shape[1])
    return np.stack([stream.standard_normal(shape, dtype=np.float32) for stream in streams])


def test_evaluation_tells_the_bound_and_how_varied_texts_are(run):
    """More noises give no looser bound but for chance, the top level has its own line, and the report shows all."""
    result = run.evaluate(samples=10)  # with fewer no error is told
    one, eight = result["bounds"]
    assert (one["noises"], eight["noises"]) == (1, 8)
    assert eight["bits_per_token"] == pytest.approx(eight["nats_per_token"] / math.log(2))
    assert eight["bits_per_token"] <= one["bits_per_token"] + one["bits_per_token_error"]
    assert result["text"]["bits_per_character"] == eight["bits_per_character"] and result["text"]["sequences"] == 10
    assert result["cross_entropy_at_top"] == result["validation"]["levels"][0]["loss"]
    assert result["validation"]["levels"][0]["sigma"] == 10.0
    looped = run.directory.family().name == "looped"
    assert ([row["steps"] for row in result["curve"]] == [1, 2, 4, 8, 16, 32]) if looped else "curve" not in result
    assert set(result["variety"]) == {"samples", "held_out"} and result["variety"]["held_out"]["words"] > 20
    report = evaluation_report(result)
    for words in ("with 8 noises a token", "highest noise level", "distinct words", "hold-out:"):
        assert words in report
    assert ("over 32 levels" in report) == looped


def test_a_run_that_fills_gaps_refuses_a_prompt(text, tmp_path):
    """With the prompt as gaps to copy."""
    settings = {"family": "mdlm", "width": 32, "depth": 3, "heads": 2, "length": 16, "batch": 8, "micro_batch": 4}
    run = edgeblocks.train(out=tmp_path / "run", data=text, steps=1, mem_budget="4GB", sample_grids=0, **settings)
    with pytest.raises(ConfigError, match=r"--prompt belongs to networks .* --fill 'call me ____'"):
        run.sample_text(prompt="call me")
    with pytest.raises(ConfigError, match=r"--top-p belongs to .* use --temperature"):
        run.sample_text(top_p=0.5)
