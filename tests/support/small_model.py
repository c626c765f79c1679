"""A small pretrained model as a folder, with a tokenizer and a chat template of its own, and a text."""

import json

import pytest

TEXT = "the sea was calm and the ship went on. the captain saw a whale, and the crew saw the captain. " * 60
TEXT += "<user>ahoy!\n<assistant>aye? "
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def said(role, content):
    return {"role": role, "content": content}


TALK = [said("user", "the sea?"), said("assistant", "calm.")]
TALK += [said("user", "a whale?"), said("assistant", "the captain saw.")]


def transformers():
    library = pytest.importorskip("transformers")
    library.logging.set_verbosity_error()
    library.logging.disable_progress_bar()
    return library


def write_tokenizer(folder):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.train_from_iterator([TEXT], trainers.BpeTrainer(vocab_size=120, show_progress=False))
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "!"}, "bos_token": None}))


def write_model(folder, hidden_size=32, *, tied=True, dtype="bfloat16"):
    """llama: 4 layers, heads that share keys, in several files."""
    import torch

    torch.manual_seed(0)
    library = transformers()
    config = library.LlamaConfig(
        hidden_size=hidden_size,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=128,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        initializer_range=0.1,
    )
    network = library.LlamaForCausalLM(config).to(getattr(torch, dtype))
    network.save_pretrained(folder, max_shard_size="50KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    write_tokenizer(folder)
    (folder / "README.md").write_text("A card.")


def write_conversations(path, count=20):
    path.write_text((json.dumps({"messages": TALK}) + "\n") * count)


def written_by_the_library(library, folder, prompt, count):
    """Greedy, by `generate` of the whole model in float32, without the token that ends a text."""
    import torch

    from edgeblocks.pretrained.model_folder import model_folder
    from edgeblocks.pretrained.writing import tokenizer_of

    network = library.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = tokenizer_of(model_folder(str(folder)))
    given = torch.from_numpy(tokenizer.encode(prompt))[None]
    unknown = list(range(tokenizer.vocabulary, network.config.vocab_size))
    how = {"max_new_tokens": count, "do_sample": False, "suppress_tokens": unknown}
    out = network.generate(given, attention_mask=torch.ones_like(given), **how)
    written = out[0, given.shape[1] :]
    return prompt + tokenizer.decode(written[written != network.generation_config.eos_token_id].numpy())
