"""The README.md of an exported model: how to load it, what it was trained on and how, what it has learnt.

Everything comes from files that a run leaves: metrics.jsonl of its peers, runs.jsonl of fine-tuning.
"""

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from src.metrics.svg_chart import Series, chart_file

NUM_CURVE_ROWS = 12
CURVE_FILE = "learning_curve.svg"
LARGEST_NUMBER = 1e6  # of epochs and losses
HELD_OUT_SCORES = {"loss": "loss of masked tokens, nats", "accuracy": "accuracy", "order_accuracy": "order accuracy"}
LEVELS = ("morphology", "syntax", "semantics")  # of minimal pairs
PAIRS_TASK = "RuBLiMP"  # in a ledger, the one task without fine-tuning
GROUP_SEPARATOR = "/"  # in names of scores of a part of the records: "mcc/logic/Negation"
LOADING = """```python
from transformers import AutoModelForMaskedLM, AutoTokenizer, pipeline

name = "{name}"
tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=True)
model = AutoModelForMaskedLM.from_pretrained(name, trust_remote_code=True)
print(pipeline("fill-mask", model=model, tokenizer=tokenizer)("Утром мы пошли в {mask}."))
```

The model's code lies beside its weights, hence `trust_remote_code`: read the `.py` files before you run them, and pin
`revision=` to the commit you have read. They import torch and transformers only. `AutoModel` and
`AutoModelForSequenceClassification` (with a new classifier) open it as well."""


def read_records(path) -> list[dict]:
    """The objects of a .jsonl file; a last line that a crash cut off is left out. ValueError for anything else."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file; pass the .jsonl file of a run")
    records = []
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            if number == len(lines):
                break
            raise ValueError(f"{path}:{number}: not a line of JSON; pass metrics.jsonl or runs.jsonl") from error
        if not isinstance(record, dict):
            raise ValueError(f"{path}:{number}: not a JSON object; pass metrics.jsonl or runs.jsonl")
        records.append(record)
    return records


def _number(record: Mapping, name: str) -> float | None:
    """A record's value if it is a number that a run can have; a stranger's file may hold anything."""
    value = record.get(name)
    return value if isinstance(value, (int, float)) and abs(value) <= LARGEST_NUMBER else None


def learning_curve(records: Sequence[Mapping]) -> list[tuple[int, float]]:
    """(epoch, masked-token loss): the whole swarm's where an auxiliary peer recorded it, else one trainer's."""
    for event in ("swarm_epoch", "epoch"):
        points = {
            int(_number(record, "epoch")): _number(record, "mlm_loss")
            for record in records
            if record.get("event") == event and None not in (_number(record, "epoch"), _number(record, "mlm_loss"))
        }
        if points:
            return sorted(points.items())
    return []


def held_out_curve(records: Sequence[Mapping]) -> list[Mapping]:
    """The auxiliary peer's scores on held-out text, by epoch."""
    scores = {}
    for record in records:
        if record.get("event") == "held_out" and (epoch := _number(record, "epoch")) is not None:
            scores[int(epoch)] = {name: _number(record, name) for name in HELD_OUT_SCORES} | {"epoch": int(epoch)}
    return [scores[epoch] for epoch in sorted(scores)]


def pairs_curve(records: Sequence[Mapping]) -> list[Mapping]:
    """The auxiliary peer's scores on minimal pairs, by epoch; those without an accuracy are left out."""
    scores = {}
    for record in records:
        values = {name: _number(record, name) for name in ("epoch", "accuracy", "low", "high", "num_pairs")}
        if record.get("event") == "minimal_pairs" and None not in values.values():
            scores[int(values["epoch"])] = values | {name: _number(record, name) for name in LEVELS}
    return [scores[epoch] for epoch in sorted(scores)]


def model_card(
    *, name: str, model, tokenizer, license_name: str | None, data: str | None, metrics: Sequence[Mapping],
    ledger: Sequence[Mapping], origin: str = "",
) -> str:  # fmt: skip
    """The whole README.md. `metrics` and `ledger` are records of those files, or empty; `origin` is a sentence."""
    metadata = ["language: ru", "library_name: transformers", "pipeline_tag: fill-mask"]
    metadata += [f"mask_token: {json.dumps(tokenizer.mask_token)}", "tags: [lean_albert, masked-lm]"]
    metadata += [f"license: {license_name}"] if license_name else []
    sections = [
        "---\n" + "\n".join(metadata) + "\n---",
        f"# {name.rpartition('/')[2]}",
        f"A masked language model for Russian, {type(model).__name__} with {_architecture(model)}.",
        *([origin] if origin else []),
        LOADING.format(name=name, mask=tokenizer.mask_token),
        *_training_sections(metrics, data),
        *_benchmark_section(ledger),
    ]
    return "\n\n".join(sections) + "\n"


def _architecture(model) -> str:
    config = model.config
    shared = int(config.share_large_matrices)
    sharing = f", whose large matrices come from {shared} shared set{'s' * (shared > 1)}" if shared else ""
    size = sum(parameter.numel() for parameter in model.parameters())
    return (
        f"{config.num_hidden_layers} layers{sharing}, hidden size {config.hidden_size}, {config.vocab_size} tokens, "
        f"{config.position_embedding_type} positions and {size:,} parameters"
    )


def _training_sections(metrics: Sequence[Mapping], data: str | None) -> list[str]:
    sections = []
    started = [record for record in metrics if record.get("event") == "start"]
    arguments = {
        str(name): value
        for record in started
        if isinstance(record.get("arguments"), dict)
        for name, value in record["arguments"].items()
        if value is not None
    }
    sources = arguments.pop("dataset_sources", None) or []
    sources = sources if isinstance(sources, list) else [sources]
    described = [data] if data else []
    described += [f"Sources: {', '.join(f'`{_short(source)}`' for source in sources)}."] if sources else []
    if described:
        sections.append("## Data\n\n" + "\n\n".join(described))
    if arguments:
        rows = [(f"`--{name}`", _text(value)) for name, value in sorted(arguments.items())]
        sections.append("## Arguments\n\n" + table(("flag", "value"), rows))
    curve, held_out = learning_curve(metrics), held_out_curve(metrics)
    if curve:
        picture = f"![Learning curve]({CURVE_FILE})"
        rows = [(str(epoch), f"{loss:.3f}") for epoch, loss in evenly_spaced(curve, NUM_CURVE_ROWS)]
        sections.append(f"## Learning curve\n\n{picture}\n\n" + table(("epoch", "masked-token loss, nats"), rows))
    if held_out:
        last = held_out[-1]
        rows = [(text, f"{last[key]:.3f}") for key, text in HELD_OUT_SCORES.items() if last[key] is not None]
        sections.append(f"## Held-out text\n\nAfter epoch {last['epoch']}:\n\n" + table(("score", "value"), rows))
    pairs = pairs_curve(metrics)
    if pairs:
        sections.append(_pairs_section(pairs[-1]))
    return sections


def _pairs_section(last: Mapping) -> str:
    rows = [("all", f"{last['accuracy']:.3f} ({last['low']:.3f} to {last['high']:.3f})")]
    rows += [(name, f"{last[name]:.3f}") for name in LEVELS if last[name] is not None]
    said = (
        f"After epoch {last['epoch']:.0f}, on {last['num_pairs']:.0f} pairs of RuBLiMP (arXiv 2406.19232): how often "
        "the grammatical sentence has the lower pseudo-perplexity, with its 95 % interval. Chance is 0.5."
    )
    return f"## Minimal pairs\n\n{said}\n\n" + table(("level", "accuracy"), rows)


def _benchmark_section(ledger: Sequence[Mapping]) -> list[str]:
    """The dev scores of the newest settings of each task, over their seeds."""
    newest = {row["task"]: row["key"] for row in ledger}
    rows = []
    for task, key in newest.items():
        seeds = {row["seed"]: row["dev"] for row in ledger if (row["task"], row["key"]) == (task, key)}
        metrics = [metric for metric in next(iter(seeds.values())) if GROUP_SEPARATOR not in metric]
        scores = [f"{name} {_mean([dev[name] for dev in seeds.values() if name in dev])}" for name in metrics]
        rows.append((task, ", ".join(scores), str(len(seeds))))
    if not rows:
        return []
    note = "Scores on the dev set after fine-tuning, of the best epoch of each seed; mean ± deviation over seeds."
    if PAIRS_TASK in newest:
        note += f" {PAIRS_TASK}: shares of minimal pairs, without fine-tuning."
    return [f"## Benchmarks\n\n{note}\n\n" + table(("task", "dev scores", "seeds"), rows)]


def rows_of_model(ledger: Sequence[Mapping], path: Path, model: str | None) -> list[Mapping]:
    """The ledger's rows of `model` (its name or source), else those that were fine-tuned from `path`.

    Raises ValueError, naming the models there are, if there is none: the scores of another model would be a lie.
    """
    for row in ledger:
        texts = [row.get(name) for name in ("task", "model", "source", "key")]
        scores = row.get("dev").values() if isinstance(row.get("dev"), dict) else [None]
        if not all(isinstance(text, str) for text in texts) or not isinstance(row.get("seed"), int):
            raise ValueError(
                "--ledger: not a ledger of fine-tuning runs (runs.jsonl): a line lacks task, model or seed"
            )
        if not all(isinstance(score, (int, float)) and abs(score) <= LARGEST_NUMBER for score in scores):
            raise ValueError("--ledger: not a ledger of fine-tuning runs (runs.jsonl): a line lacks dev scores")
    if model is not None:
        rows = [row for row in ledger if model in (row["model"], row["source"])]
    else:
        rows = [row for row in ledger if Path(row["source"]).expanduser().resolve() == path.resolve()]
    if not rows:
        known = ", ".join(sorted({row["model"] for row in ledger})) or "none"
        raise ValueError(
            f"--ledger: no run of {model or path} in it; name one of its models ({known}) with --ledger-model"
        )
    return rows


def evenly_spaced(points: Sequence, number: int) -> list:
    """At most so many of the points, evenly spaced, the first and the last among them."""
    if len(points) <= number:
        return list(points)
    return [points[round(index * (len(points) - 1) / (number - 1))] for index in range(number)]


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def draw_curve(curve: Sequence[tuple[int, float]], held_out: Sequence[Mapping]) -> str:
    """An SVG picture of the masked-token loss by epoch, with the held-out loss where there is one."""
    series = [Series("training", curve)]
    points = [(record["epoch"], record["loss"]) for record in held_out if record.get("loss") is not None]
    if points:
        series.append(Series("held-out text", points, dots=True))
    return chart_file("masked-token loss, nats", series, x_label="epoch (global step)")


def _mean(values: Sequence[float]) -> str:
    deviation = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{deviation}"


def _short(source: str) -> str:
    """The last two parts of a path or of a data set's name: where files lay on some machine is nobody's business."""
    return "/".join(str(source).split("/")[-2:])


def _text(value) -> str:
    values = value if isinstance(value, list) else [value]
    text = " ".join(_short(each) if isinstance(each, str) else str(each) for each in values)
    return " ".join(text.split())  # a line break would end the table
