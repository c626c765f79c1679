"""USE.md of an exported language model: how onnxruntime-genai writes with it. The tests run its program."""

from string import Template

_TEXT = Template("""\
# How to run this $model_type language model

The model writes text token by token. The directory is in the layout of onnxruntime-genai: `model.onnx` with a KV cache,
its weights ($weights), `genai_config.json`, which names inputs and outputs, and `tokenizer.json`.

In Python, in this directory, after `pip install onnxruntime-genai`:

```python
import onnxruntime_genai as og

model = og.Model(".")
tokenizer, params = og.Tokenizer(model), og.GeneratorParams(model)
params.set_search_options(max_length=$length, do_sample=False)
generator = og.Generator(model, params)
generator.append_tokens(tokenizer.encode("Once upon a time"))
while not generator.is_done():
    generator.generate_next_token()
print(tokenizer.decode(generator.get_sequence(0)))
```

With `do_sample=True` tokens are drawn. The library reports its use to its maker unless the environment has
`ORT_DISABLE_TELEMETRY=1`.

`edgeblocks run DIR --prompt "Once upon a time"` needs onnxruntime alone, and compares every file with `manifest.json`.
""")


def language_usage_text(*, model_type: str, weights: str, length: int) -> str:
    """What USE.md says.

    Args:
        length: tokens of the text that its program writes.
    """
    return _TEXT.substitute(model_type=model_type, weights=weights, length=length)
