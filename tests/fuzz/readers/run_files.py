"""The files that describe a run."""

import contextlib
import hashlib
import json
from dataclasses import asdict

import yaml
from fuzz.readers.reader import Reader
from support.mutations import json_text, mutated_bytes, mutated_value, yaml_text
from support.text_mutations import changed_definition

from edgeblocks.errors import EdgeblocksError

SOUND_RECORD = {"block": 0, "step": 1, "loss": 0.5, "examples_per_s": 9.5, "seconds": 1.5, "used_bytes": 10**8}


class RunReader(Reader):
    """One file of a run directory is mutated, and everything is asked that is told without the data."""

    files = ("manifest.json", "plan.json", "config.yaml", "metrics.jsonl", "summary.json")

    def __init__(self, folder):
        import edgeblocks.profiling.trace  # noqa: F401 - imported before memory is measured
        from edgeblocks.report.run_page import run_page  # noqa: F401 - the same
        from edgeblocks.runs.describe import describe

        self._describe = describe
        self.path = folder / "run"
        run = self.make(self.path)
        self.settings = {**run.directory.settings.run.model_dump(), **asdict(run.directory.settings.family)}
        self.plan = sound_plan()
        (self.path / "plan.json").write_text(json.dumps(self.plan))
        (self.path / "metrics.jsonl").write_text(
            "".join(json.dumps({**SOUND_RECORD, "block": n % 2, "step": n}) + "\n" for n in range(6))
        )
        levels = [{"sigma": 1.0, "block": block, "share": 0.5, "loss": 0.5, "top1": 0.5} for block in (0, 1)]
        losses = {"validation_loss": 0.5, "validation_loss_by_block": [0.5, None], "validation": {"levels": levels}}
        self.summary = {"peak_bytes": 10**8, "metrics": losses, "blocks": 2, "seconds": 1.5, "resumed_from": [1, 0]}
        self.summary |= {"time_split": {"compute": 1.0, "other": 0.5}, "disk_bytes_written": 10**6, "step_s": 0.1}
        (self.path / "summary.json").write_text(json.dumps(self.summary))
        self.manifest = json.loads((self.path / "manifest.json").read_text())
        self.sound = {name: (self.path / name).read_bytes() for name in self.files}

    @staticmethod
    def make(path):
        from support.random_run import make_run

        return make_run(path, layers=(2, 1), width=16, heads=2)

    def prepare(self, rng):
        for name, content in self.sound.items():
            (self.path / name).write_bytes(content)
        for name, content in self.mutated(rng).items():
            (self.path / name).write_bytes(content)

    def read(self):
        from edgeblocks.run import Run
        from edgeblocks.runs.history import trained_on, trained_s
        from edgeblocks.runs.opening import open_run

        run = open_run(self.path)
        assert run.partition.num_blocks == len(run.layers) == len(run.store().layouts)
        with contextlib.suppress(EdgeblocksError):  # the more is asked, the more may be refused
            assert run.trainable_plan.step_shapes
        json.dumps(self._describe(self.path))
        json.dumps(Run(run).summary)
        assert len(list(run.metrics())) <= 10**6
        trained_s(run), trained_on(run)
        with contextlib.suppress(EdgeblocksError):  # a report shows more of a summary and a plan than others read
            self._report()
        run.drop_metrics_after([1] * len(run.layers))

    def _report(self):
        """What a page tells in words; drawings take numbers that are checked already."""
        from edgeblocks.report import planning
        from edgeblocks.report.facts import read_facts
        from edgeblocks.report.headline import headline
        from edgeblocks.report.surroundings import environment_table

        facts = read_facts(self.path)
        headline(facts), planning.plan_table(facts), planning.breakdown_bars(facts), planning.time_bar(facts)
        planning.block_table(facts, wide=True), environment_table(facts)

    def mutated_json(self, rng, name, value):
        if rng.random() < 0.3:
            return mutated_bytes(rng, self.sound[name])
        return json_text(rng, mutated_value(rng, value)).encode()


def sound_plan():
    """plan.json as the planner writes it, for blocks of two and one layers."""
    ranges = [{"low": 0.3, "high": 80.0, "train_low": 0.2, "train_high": 80.0}] * 2
    breakdown = {"runtime": 10**8, "weights": 10**6, "gradients": 10**6, "optimizer": 10**5, "activations": 10**6}
    shapes = [{"micro_batch": size, "checkpointing": False, "step_bytes": size * 10**5} for size in (4, 2, 1)]
    return {
        "blocks": 2,
        "layers_per_block": [2, 1],
        "noise_ranges": ranges,
        "micro_batch": 4,
        "accumulation": 16,
        "checkpointing": False,
        "optimizer": "adamw8bit",
        "precision": "fp32",
        "master": "bf16",
        "tiers": {"ram": [0], "disk": [1]},
        "slots": 2,
        "shapes": shapes,
        "visit_steps": 100,
        "budget_bytes": 10**9,
        "parameters": 10**6,
        "predicted_peak_bytes": sum(breakdown.values()),
        "predicted_step_s": 0.01,
        "breakdown": breakdown,
        "machine": {"name": "cpu", "runtime_bytes": 10**8},
        "warnings": [],
        "candidates": [{"blocks": 2, "micro_batch": 4, "slots": 2, "fits": True}],
    }


class ManifestReader(RunReader):
    """manifest.json of a run."""

    def mutated(self, rng):
        content = self.mutated_json(rng, "manifest.json", self.manifest)
        if rng.random() < 0.02:
            manifest = json.loads(json.dumps(self.manifest))
            manifest["class_names"] = ["x"] * rng.choice((10**5, 4 * 10**5))
            manifest["data"]["num_classes"] = len(manifest["class_names"])
            content = json.dumps(manifest).encode()
        return {"manifest.json": content}


class PlanReader(RunReader):
    """plan.json."""

    def mutated(self, rng):
        return {"plan.json": self.mutated_json(rng, "plan.json", self.plan)}


class ConfigReader(RunReader):
    """config.yaml, and now and then depth with a plan that agrees."""

    def mutated(self, rng):
        if rng.random() < 0.002:
            depth = rng.choice((300, 4096, 4097))
            plan = {**self.plan, "blocks": 2, "layers_per_block": [depth - 1, 1]}
            settings = {**self.settings, "depth": depth, "width": rng.choice((16, 2**20))}
            return {"config.yaml": yaml.safe_dump(settings).encode(), "plan.json": json.dumps(plan).encode()}
        return {"config.yaml": yaml_text(rng, self.settings)}


class RecordsReader(RunReader):
    """metrics.jsonl and summary.json."""

    def mutated(self, rng):
        if rng.random() < 0.5:
            return {"summary.json": self.mutated_json(rng, "summary.json", self.summary)}
        lines = [self.sound["metrics.jsonl"]]
        for _ in range(rng.choice((1, 3, 10))):
            record = mutated_value(rng, SOUND_RECORD)
            lines.append(json_text(rng, record).replace("\n", " ").encode() + b"\n")
        content = b"".join(lines)
        return {"metrics.jsonl": content if rng.random() < 0.5 else mutated_bytes(rng, content)}


class TextRunReader(RunReader):
    """manifest.json and tokenizer.json of a run on text."""

    needs = "tokenizers"
    files = (*RunReader.files, "tokenizer.json")

    @staticmethod
    def make(path):
        from support.random_run import make_text_run

        text = path.parent / "text.txt"
        text.write_text("The white whale swims under a cold sea. " * 100)
        settings = {"data": str(text), "tokenizer": "bpe", "vocab": 300, "length": 8}
        return make_text_run(path, layers=(2, 1), width=16, heads=2, **settings)

    def mutated(self, rng):
        if rng.random() < 0.5:
            return {"manifest.json": self._signed(rng, mutated_value(rng, self.manifest))}
        definition = changed_definition(rng, json.loads(self.sound["tokenizer.json"]))
        manifest = json.loads(json.dumps(self.manifest))
        if rng.random() < 0.9:  # so that the tokenizer is looked at
            manifest["data"]["tokenizer_sha256"] = hashlib.sha256(definition).hexdigest()
        return {"tokenizer.json": definition, "manifest.json": self._signed(rng, manifest)}

    @staticmethod
    def _signed(rng, manifest):
        """Mostly without the checksum, which finds what no other check does."""
        if isinstance(manifest, dict) and rng.random() < 0.9:
            manifest = {key: value for key, value in manifest.items() if key != "sha256"}
        return json_text(rng, manifest).encode("utf-8", errors="surrogatepass")

    def read(self):
        from edgeblocks.data.gaps import with_gaps
        from edgeblocks.runs.opening import open_run

        super().read()
        run = open_run(self.path)
        assert run.tokenizer.vocabulary == run.data.vocabulary
        mask, length = run.data.vocabulary, run.data.length
        tokens, _ = with_gaps(None, run.tokenizer, length=length, mask=mask)
        with contextlib.suppress(EdgeblocksError):  # a tokenizer need not know all words
            tokens, _ = with_gaps("a _ sea", run.tokenizer, length=length, mask=mask)
        assert len(tokens) == length and tokens.max() == mask
        assert isinstance(run.tokenizer.decode(range(run.data.vocabulary)), str)
