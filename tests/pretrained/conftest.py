"""A small model as a folder, with a tokenizer of its own, and a text."""

import json

import pytest

TEXT = "the sea was calm and the ship went on. the captain saw a whale, and the crew saw the captain. " * 60
TEXT += "<user>ahoy!\n<assistant>aye? "


@pytest.fixture(scope="session")
def library():
    transformers = pytest.importorskip("transformers")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


def write_tokenizer(folder, text=TEXT, size=120):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.train_from_iterator([text], trainers.BpeTrainer(vocab_size=size, show_progress=False))
    tokenizer.save(str(folder / "tokenizer.json"))


@pytest.fixture(scope="session")
def model(library, tmp_path_factory):
    """llama: 4 layers, heads that share keys, tied tables, bfloat16, in two files."""
    import torch

    folder = tmp_path_factory.mktemp("model") / "tiny-llama"
    torch.manual_seed(0)
    config = library.LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=128,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        initializer_range=0.1,
    )
    network = library.LlamaForCausalLM(config).to(torch.bfloat16)
    network.save_pretrained(folder, max_shard_size="50KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    write_tokenizer(folder)
    (folder / "README.md").write_text("A card.")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    return folder


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "sea.jsonl"
    path.write_text("".join(json.dumps({"text": TEXT[start:]}) + "\n" for start in range(3)))
    return path
