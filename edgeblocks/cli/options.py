"""Options that several verbs have, with their help."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from edgeblocks.tasks import TASKS

STEPS = {task: usual.steps for task, usual in TASKS.items()}
"""Of a chain, by what it makes."""
MemBudget = Annotated[
    str | None,
    typer.Option(
        help="Largest resident memory of the process, such as 700MB, 6GB or 50% (the default); with --target cuda, of "
        "the GPU's memory (90% is the default)."
    ),
]
Frozen = Annotated[
    str,
    typer.Option(
        help="As what blocks wait in memory: none as they are, int8 in a quarter of it, rounded by 0.6 %, nf4 in a "
        "seventh, rounded by 9 %, so that more of them stay there. Their files are made beside the run's when they are "
        "first used."
    ),
]
RunBudget = Annotated[
    str | None,
    typer.Option(
        "--mem-budget",
        help="Largest resident memory of the process, such as 700MB, 6GB or 50% (the default). Without a bound by the "
        "system (Linux has one) it is only compared with what the manifest needs. Blocks of ar and looped that "
        "it does not hold together are read one at a time, for every token.",
    ),
]
Threads = Annotated[
    int | None,
    typer.Option(help="Threads that work on one operator in onnxruntime.", show_default="onnxruntime's, one a core"),
]
Provider = Annotated[
    str,
    typer.Option(
        help="What the graphs run on: one of onnxruntime's execution providers by its short name, such as cpu, cuda or "
        "coreml (a word that is none lists those that are there). Not yet run on a GPU."
    ),
]
WritingBudget = Annotated[
    str | None,
    typer.Option(
        "--mem-budget", help="Refuse it where it takes more memory than this, such as 2GB.", show_default="no bound"
    ),
]
PlanTarget = Annotated[
    str | None,
    typer.Option(
        help="Kind of machine: auto, cpu or cuda; or the profile of one that is not here, such as laptop-8gb or "
        "rtx3060-12gb (any other word lists them)."
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on standard output, nothing else.")]
Overwrite = Annotated[
    bool, typer.Option("--force", "--overwrite", help="Replace what is there already; --overwrite says the same.")
]
RunArgument = Annotated[Path, typer.Argument(help="A run directory.", show_default=False)]
Number = Annotated[int | None, typer.Option("--n", help="How many images or texts.", show_default="64 images, 4 texts")]
SampleSteps = Annotated[
    int | None,
    typer.Option(
        "--steps",
        help="Noise levels of the chain; at least one a block.",
        show_default=f"{STEPS['images']}; mdlm {STEPS['text']}; ar and looped {STEPS['continuation']}",
    ),
]
SampleSeed = Annotated[int, typer.Option("--seed", help="Decides the noise; sample, eval and run agree on it.")]
SETTINGS: dict[str, Any] = {
    "family": Annotated[
        str | None,
        typer.Argument(
            help="Kind of model: dit (makes images), vit (classifies them), mdlm (fills gaps in text), ar or looped "
            "(write on).",
            show_default="the preset's, else dit",
        ),
    ],
    "preset": Annotated[
        str | None,
        typer.Option(
            help="A named size: dit-tiny, -s, -b, -l, -xl, vit-tiny, -s, -b, mdlm-tiny, -s, -b, ar-tiny, -s, -b, "
            "looped-tiny, -s."
        ),
    ],
    "data": Annotated[
        str | None,
        typer.Option(
            help="Images: digits (built in), a folder, or an .npz file. Text: moby-dick (built in), a file or folder "
            "of text, or of records with a text each (.jsonl, .json, .csv, .tsv, .parquet)."
        ),
    ],
    "vae": Annotated[
        str | None,
        typer.Option(
            help="Of images: folder of an autoencoder of diffusers (config.json, diffusion_pytorch_model.safetensors); "
            "a dit is then trained on its latents.",
        ),
    ],
    "text_key": Annotated[
        str | None,
        typer.Option(help="Of records of text: the key or column that holds it.", show_default="text"),
    ],
    "tokenizer": Annotated[
        str | None,
        typer.Option(help="Of text: chars (a-z and space), bytes, bpe, or a tokenizer.json.", show_default="chars"),
    ],
    "vocab": Annotated[
        int | None,
        typer.Option(help="With --tokenizer bpe: tokens that are learned from the text.", show_default="4096"),
    ],
    "mem_budget": MemBudget,
    "ram_budget": Annotated[
        str | None,
        typer.Option(
            help="With --target cuda: largest resident memory of the process in the host's RAM, such as 8GB or 50% "
            "(the default)."
        ),
    ],
    "steps": Annotated[
        int | None,
        typer.Option(
            help="Optimizer steps of each block; with --method exact or greedy, of the whole network.",
            show_default="the preset's",
        ),
    ],
    "batch": Annotated[
        int | None, typer.Option("--batch", help="Images or sequences a step.", show_default="the preset's")
    ],
    "blocks": Annotated[
        str | None,
        typer.Option(help="Number of blocks, or of stages with --method exact; auto lets the budget decide."),
    ],
    "method": Annotated[
        str | None,
        typer.Option(
            help="diffusion trains each block alone, as a denoiser of its own noise levels; exact trains the network "
            "end to end with true gradients, one stage of layers in memory at a time (--set clip_by=network then clips "
            "by the whole gradient's norm instead of each stage's); greedy trains as many layers as fit, from the "
            "bottom up, over frozen ones (--set window=N fixes how many).",
            show_default="diffusion",
        ),
    ],
    "precision": Annotated[
        str | None,
        typer.Option(
            help="Numbers in which the network computes: fp32, bf16 or fp16 (half of the memory for activations, and "
            "less time where there are instructions for it), or auto: on a processor bf16 where a measurement says "
            "that it pays, on a GPU bf16, or fp16 before compute capability 8.",
            show_default="fp32; auto with --tune lora or blocks",
        ),
    ],
    "init": Annotated[
        str | None,
        typer.Option(
            help="A .safetensors file that the weights begin with instead of random ones: of `edgeblocks weights`, or "
            "of plain PyTorch. --set init_fresh=readout keeps the random ones for parts of the network."
        ),
    ],
    "train_blocks": Annotated[
        str | None,
        typer.Option(
            help="With --method exact: train these stages, such as 2,3 (the first one is 0), and freeze the rest.",
            show_default="all",
        ),
    ],
    "partition": Annotated[
        str | None, typer.Option(help="Noise ranges: equal-probability or uniform (in log sigma, or in time).")
    ],
    "target": Annotated[str | None, typer.Option(help="Kind of machine: cpu, cuda, or auto, which is cpu for now.")],
    "work_dir": Annotated[
        str | None, typer.Option(help="Folder on a fast disk for the blocks while they are trained.")
    ],
    "max_disk_writes": Annotated[
        str | None, typer.Option(help="Save and end before the run has written more than this to disk, such as 200GB.")
    ],
    "config": Annotated[Path | None, typer.Option("--config", help="YAML file of settings; flags go over it.")],
    "set_values": Annotated[
        list[str] | None, typer.Option("--set", help="Any setting as key=value, for example --set patch=1. Repeatable.")
    ],
    "seed": Annotated[int | None, typer.Option(help="Decides all randomness.")],
}
"""Flags of plan, train and compare that make up the run's settings, in the order of their help."""
TUNING_SETTINGS: dict[str, Any] = {
    "data": Annotated[
        str | None,
        typer.Option(
            help="Conversations (.jsonl, .parquet, or a folder with train and valid or test): messages, or prompt and "
            "completion. Or a file or folder of text, or of records with a text each. For an image classifier: digits, "
            "a folder with one sub-folder of images per class, or an .npz with labels.",
            show_default="moby-dick or digits",
        ),
    ],
    **{name: SETTINGS[name] for name in ("text_key", "mem_budget", "ram_budget")},
    "tune": Annotated[
        str | None,
        typer.Option(
            help="full: all layers are trained; lora: small products beside their matrices, over layers in 8 bits; "
            "blocks: those of --train-blocks, between layers in 8 bits.",
            show_default="full",
        ),
    ],
    "train_embeddings": Annotated[
        bool | None,
        typer.Option(
            "--train-embeddings",
            help="With --tune full: train the table of tokens, the head and the last norm as well.",
            show_default="they stay as they are",
        ),
    ],
    "lora_rank": Annotated[
        int | None, typer.Option(help="With --tune lora: rank of what is added to a matrix.", show_default="16")
    ],
    "lora_alpha": Annotated[
        float | None, typer.Option(help="With --tune lora: it is multiplied with alpha / rank.", show_default="32")
    ],
    "lora_targets": Annotated[
        str | None,
        typer.Option(help="With --tune lora: all-linear, or endings of matrices' names, such as q_proj,v_proj."),
    ],
    "quantize": Annotated[
        str | None,
        typer.Option(
            help="With --tune lora or blocks: as what frozen layers are read: int8, nf4, or none as they are.",
            show_default="int8",
        ),
    ],
    "train_blocks": Annotated[
        str | None,
        typer.Option(
            help="Train these blocks, such as 28,29 (the first one is 0), and freeze the rest. With --tune blocks a "
            "block is a layer, or one of --blocks equal parts; with full it is a stage.",
            show_default="all",
        ),
    ],
    "blocks": Annotated[
        str | None,
        typer.Option(
            help="Parts that the model is cut into: stages, or with --tune blocks what --train-blocks counts.",
            show_default="the budget decides; each layer",
        ),
    ],
    "steps": Annotated[int | None, typer.Option(help="Optimizer steps.", show_default="200")],
    "batch": Annotated[
        int | None, typer.Option("--batch", help="Windows of text, or images, a step.", show_default="4; 16 images")
    ],
    "length": Annotated[int | None, typer.Option(help="Tokens of a window.", show_default="512")],
    "packing": Annotated[
        bool | None,
        typer.Option(
            "--packing",
            help="Of conversations: short ones share a window, and do not see each other.",
            show_default="one a window",
        ),
    ],
    **{
        name: SETTINGS[name]
        for name in (
            "precision",
            "target",
            "work_dir",
            "max_disk_writes",
            "config",
            "set_values",
            "seed",
        )
    },
}
"""Flags of finetune that make up the run's settings."""
IMAGE_OPTIONS: dict[str, Any] = {
    "solver": Annotated[
        str | None, typer.Option(help="heun (two evaluations a level) or euler (one).", show_default="heun")
    ],
    "guidance": Annotated[
        float | None,
        typer.Option(help="Classifier-free guidance; 1 is off, which runs the network once.", show_default="1"),
    ],
    "label": Annotated[str | None, typer.Option("--class", help="A class by name or number; all in turn by default.")],
}
"""Options of a network that makes images."""
TEXT_OPTIONS: dict[str, Any] = {
    "temperature": Annotated[
        float | None,
        typer.Option(
            help="Of text: 1 draws as trained, 0 takes the likeliest token (the noise still differs from text to "
            "text).",
            show_default="1",
        ),
    ],
    "fill": Annotated[
        str | None,
        typer.Option(help="For mdlm: a text with gaps to fill in, each missing token written _ or [MASK]."),
    ],
    "prompt": Annotated[str | None, typer.Option(help="For ar and looped: how each text begins.")],
    "top_p": Annotated[
        float | None,
        typer.Option(
            help="For ar and looped: draw from the smallest set of the likeliest tokens that has this probability.",
            show_default="1",
        ),
    ],
    "length": Annotated[
        int | None,
        typer.Option(
            help="Tokens of each text, a prompt's counted: at most as many as the network was trained on. ar and "
            "looped stop there; mdlm writes a whole text and gives its beginning.",
            show_default="as trained",
        ),
    ],
}
"""Options of a network that writes text."""


def as_flags(names: Iterable[str]) -> str:
    """Names of options as they are typed."""
    return ", ".join(f"--{name.replace('_', '-')}" for name in sorted(names))


def given_settings(flags: Mapping[str, Any]) -> tuple[dict[str, Any], Path | None]:
    """The settings that the user typed, flags over `--set`, and the settings file.

    Args:
        flags: options of `SETTINGS`, None where nothing was typed.
    """
    from edgeblocks.settings.reading import parse_assignments

    typed = {name: value for name, value in flags.items() if value is not None}
    set_values, config = typed.pop("set_values", []), typed.pop("config", None)
    if str(typed.get("blocks", "")).isdigit():
        typed["blocks"] = int(typed["blocks"])
    return {**parse_assignments(set_values), **typed}, config
