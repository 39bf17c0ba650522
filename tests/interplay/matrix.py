"""The interplay matrix: what each treatment of BatchNorm does beside what is in other people's programs.

`python -m tests.interplay.matrix` writes it to results/interplay.md; scripts/update_tables.py puts that into the page.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from tests.interplay import facts, loops, ranks, trainers
from tests.interplay.treatments import ROWS

Verdict = Literal["works", "note", "refused"]
TABLE = Path(__file__).parents[2] / "results" / "interplay.md"


@dataclass(frozen=True)
class Cell:
    """What comes of a treatment beside something else.

    Attributes:
        verdict: it works, works with a note, or is refused.
        text: the note; of a refusal, what to do instead.
        fact: the assertion behind the note.
        says: of a refusal, words of the message.
        keeps: whether the treatment's own promise holds; where it does not, `fact` says what is there instead.
    """

    verdict: Verdict = "works"
    text: str = ""
    fact: Callable[[Any], None] | None = None
    says: str = ""
    keeps: bool = True


@dataclass(frozen=True)
class Column:
    """Something that is in other people's programs.

    Attributes:
        key: short name.
        title: as the page has it.
        run: trains a treatment beside it; None where it takes two processes, see `ranks.COLUMNS`.
        cells: those that are not `otherwise`, by the keys of the rows.
        otherwise: all others.
        slow: whether its cells compile code.
    """

    key: str
    title: str
    run: Callable[..., Any] | None
    cells: dict[str, Cell] = field(default_factory=dict)
    otherwise: Cell = Cell()
    slow: bool = False

    def cell(self, row: str) -> Cell:
        return self.cells.get(row, self.otherwise)


def works(fact: Callable[[Any], None] | None = None) -> Cell:
    return Cell("works", fact=fact)


def note(text: str, fact: Callable[[Any], None] | None = None, keeps: bool = True) -> Cell:
    return Cell("note", text, fact, keeps=keeps)


def refused(says: str, instead: str) -> Cell:
    return Cell("refused", instead, says=says)


def each(cell: Cell, *rows: Iterable[str]) -> dict[str, Cell]:
    return dict.fromkeys([row for group in rows for row in group], cell)


TORCH = ("keep", "freeze_affine", "normalize_only", "monitor")  # BatchNorm of torch, all the time
TRACKING = ("ghost", "renorm", "stochastic", "eval_norm")
LIVE = (*TORCH, *TRACKING)
HELD = ("freeze_affine", "normalize_only")
LEARNED = ("shift", "original", "merged")
GROUP_NORM = ("group_norm", "group_norm_fit")
ROUNDED = ("none", "shift", "original", "noise", "step_limit", "train_only", "report")  # statistics that are no 0 and 1
NEEDS_WHOLE = ("schedule", "recalibration", "monitor", "step_limit")
CALLBACKS = ("schedule", "recalibration", "monitor", "step_limit", "train_only", "group_norm_fit", "report")

_OWN = "The average of the statistics is not the statistics of the averaged weights: measure them by `recalibrate`"
_BEHIND = f"{_OWN}, or by `BatchNormRecalibration` behind the averaging callback."
_LOAD_FIRST = "Load the weights first, and convert then."
_TOGETHER = "both say what is trained: take one of the two."
_REPLAY = "in a class of your own call `finetune_bn.callbacks.replay(checkpoint, self)` in `on_load_checkpoint`."
_BY_RANK = "Each process normalizes by its own images; statistics of process 0 are those that are saved."
_WHOLE = "it needs the whole network in each process: take DDP, or do it before sharding."

AVERAGES = [
    Column(
        "swa", "`StochasticWeightAveraging`", trainers.stochastic_averaging,
        each(note(
            "Lightning measures the statistics anew at the end, by averages over the batches of an epoch; add "
            "`BatchNormRecalibration` for those of all images.", facts.measured_anew), LIVE),
    ),
    Column(
        "ema", "`WeightAveraging`, `EMAWeightAveraging`", trainers.moving_average,
        each(note(_BEHIND, facts.not_of_these_weights), LIVE)
        | {
            "recalibration": note("It stands behind the averaging callback in the list; in front it is refused."),
            "schedule": note('With `Freeze("original")`, the default; other policies are refused.'),
        },
    ),
    Column(
        "ema_later", "`EMAWeightAveraging` before it begins", trainers.average_begins_later,
        otherwise=note(
            "Until then the network from before the training is validated and saved; that is warned of.",
            facts.said("has not begun to average")),
    ),
    Column(
        "ema_never", "`EMAWeightAveraging` that never begins", trainers.average_never_begins,
        otherwise=refused(
            "update_starting_at_step: got 1000; allowed: a step before the last of 2",
            "let it begin before the training ends. Lightning would put the untrained average in the network's place."),
    ),
    Column(
        "averaged_model", "`torch` `AveragedModel`", loops.averaged_model,
        each(note(f"{_OWN}.", facts.not_of_these_weights), LIVE)
        | each(note(
            "Take `get_ema_multi_avg_fn`: by `get_ema_avg_fn` constants are off by roundings.",
            facts.constants_are_rounded), ROUNDED)
        | {"schedule": note("The average stays live: convert its `module` as well.", facts.average_stays_live, False)},
    ),
    Column(
        "model_ema", "timm `ModelEmaV3`", loops.model_ema,
        each(note(f"{_OWN}.", facts.not_of_these_weights), LIVE)
        | {"schedule": note("The average stays live: convert its `module` as well.", facts.average_stays_live, False)},
    ),
    Column(
        "update_bn", "`torch` `update_bn`", loops.torch_update_bn,
        each(note("It sets the statistics to averages over batches; `recalibrate` takes all images as one batch.",
                  facts.statistics_overwritten), LIVE)
        | {"recalibration": note("Call `recalibrate` behind it: it overwrites what was measured.",
                                 facts.statistics_overwritten, False)},
        otherwise=works(facts.nothing_overwritten),
    ),
]  # fmt: skip
LIBRARIES = [
    Column(
        "backbone_finetuning", "`BackboneFinetuning`", trainers.backbone_finetuning,
        each(note("Statistics move from the first step on, while the backbone counts as frozen.",
                  facts.moved_from_the_first_step), LIVE, ("schedule", "recalibration"))
        | each(note("Its unfreezing sets gamma and beta free; they are held again, and that is warned of.",
                    facts.said("they are held again")), HELD)
        | {"train_only": refused("allowed: one of TrainOnly and BackboneFinetuning", _TOGETHER)},
    ),
    Column(
        "base_finetuning", "`BaseFinetuning`, `train_bn=False`", trainers.base_finetuning,
        each(note(
            "While frozen they normalize by the batch and do not track it; afterwards statistics move, and gamma and "
            "beta are in no optimizer.", facts.gamma_and_beta_are_in_no_optimizer), LIVE, ("schedule", "recalibration"))
        | each(note("Its unfreezing sets gamma and beta free; they are held again, and that is warned of.",
                    facts.said("they are held again")), HELD)
        | {"train_only": refused("allowed: one of TrainOnly and Staged", _TOGETHER)},
    ),
    Column(
        "fts", "finetuning-scheduler", trainers.finetuning_scheduler,
        each(note("Statistics move from the first step on, while the layers count as frozen.",
                  facts.moved_from_the_first_step), LIVE, ("schedule", "recalibration"))
        | each(note("A phase with gamma and beta sets them free; they are held again, and that is warned of.",
                    facts.said("they are held again")), HELD)
        | {"train_only": refused("allowed: one of TrainOnly and FinetuningScheduler", _TOGETHER)},
    ),
    Column(
        "peft", "PEFT, LoRA on convolutions", loops.lora,
        {
            "step_limit": note("Adapters are not bounded.", facts.base_stays, False),
            "train_only": note("Adapters are trained beside what it chose.", facts.base_stays, False),
        },
    ),
    Column("accelerate", "accelerate", loops.accelerated),
    Column("fabric", "Lightning Fabric", loops.fabric),
    Column("transformers", "ResNet of transformers", loops.transformers_backbone),
]  # fmt: skip
_TWICE = note(
    "torch counts each batch twice: while layers are live, statistics move as if there were two.", facts.counted_twice
)
RUNS = [
    Column(
        "accumulation", "gradient accumulation", trainers.accumulation,
        each(note("k batches of b are not one of k x b: each is normalized by itself.", facts.not_as_one_batch), LIVE)
        | each(works(facts.as_one_batch), ("none", *LEARNED)),
    ),
    *(
        Column(key, title, run, each(_TWICE, TORCH, ("schedule", "recalibration")), works(facts.as_without))
        for key, title, run in (
            ("checkpoint", "gradient checkpointing", loops.not_reentrant),
            ("reentrant", "the same, `use_reentrant=True`", loops.reentrant),
        )
    ),
    Column("fp16", "16-mixed", loops.half),
    Column("bf16", "bf16-mixed", trainers.bf16_mixed),
    Column("channels_last", "`channels_last`", loops.channels_last),
    *(
        Column(key, title, run, {"schedule": note("The network is compiled anew at the switch.")}, slow=slow)
        for key, title, run, slow in (
            ("compile", "`torch.compile`", loops.compile_default, True),
            ("fullgraph", "the same, `fullgraph=True`", loops.compile_fullgraph, True),
            ("reduce_overhead", '`mode="reduce-overhead"`', loops.compile_reduce, True),
        )
    ),
]  # fmt: skip
_RANK = note(_BY_RANK, facts.own_statistics)
_SAME = works(facts.alike)
PROCESSES = [
    Column(
        "sync_batchnorm", "`sync_batchnorm=True`", loops.synchronized,
        each(note("On GPUs alone; behind the fit the layers are of another class, `_BatchNormXd`.",
                  facts.class_is_lost), TORCH, ("recalibration",))
        | each(refused("Leave it off, or synchronize what is to be synchronized first",
                       "freeze these layers, or leave it off."), TRACKING)
        | {"schedule": note("On GPUs alone.")},
    ),
    Column(
        "ddp", "DDP in a Trainer", None,
        each(note(f"{_BY_RANK} Under 16 images a process that is warned of.",
                  facts.both(facts.alike, facts.first_said("images of their own process"))),
             ("keep", *HELD, *TRACKING))
        | {"monitor": note(_BY_RANK, facts.alike)},
        _SAME,
    ),
    Column("ddp_find_unused", "DDP, `find_unused_parameters`", None, each(_RANK, LIVE), _SAME),
    Column("ddp_static_graph", "DDP, `static_graph`", None, each(_RANK, LIVE), _SAME),
    Column(
        "ddp_two_forwards", "DDP, two forward passes before backward", None,
        each(note(f"{_BY_RANK} Some versions of torch raise (pytorch issue 22095).", facts.own_statistics), LIVE),
        _SAME,
    ),
    Column(
        "ddp_no_broadcast", "DDP, `broadcast_buffers=False`", None,
        each(note("The statistics of the processes drift apart.", facts.own_statistics), LIVE), _SAME,
    ),
    Column(
        "fsdp2", "FSDP2 (`fully_shard`)", None,
        each(note("The statistics of the processes drift apart.", facts.own_statistics), LIVE)
        | each(refused("model: got 'a model sharded by FSDP'", _WHOLE), NEEDS_WHOLE),
        _SAME,
    ),
    Column(
        "model_parallel", "`ModelParallelStrategy`, `sync_batchnorm=True`", None,
        each(note("Lightning ignores `sync_batchnorm` there; that is warned of.",
                  facts.both(facts.own_statistics, facts.first_said("sync_batchnorm=True does nothing under Model"))),
             LIVE)
        | each(refused("strategy: got 'ModelParallelStrategy'", _WHOLE), NEEDS_WHOLE, ("train_only", "group_norm_fit")),
        _SAME,
    ),
]  # fmt: skip
_NO_STATE = refused('Unexpected key(s) in state_dict: "backbone.1._extra_state"', _REPLAY)
_SEARCH = note("The search runs without callbacks, and leaves the network as it was.")
TRAINER = [
    Column(
        "meta", "`configure_model` on the meta device", loops.on_meta,
        each(refused("this layer was converted to GroupNorm. Load the weights before the conversion", "as it says."),
             GROUP_NORM)
        | {"normalize_only": note(f"Loading brings gamma and beta back. {_LOAD_FIRST}",
                                  facts.pretrained_affine_is_back, False)},
    ),
    Column("several_optimizers", "several optimizers", trainers.several_optimizers),
    Column("lr_find", "`lr_find`", trainers.lr_find, each(_SEARCH, CALLBACKS)),
    Column("batch_size_finder", "batch-size finder", trainers.batch_size_finder, each(_SEARCH, CALLBACKS)),
    Column(
        "without", "`Trainer.test` without the callback", trainers.without_the_callback,
        each(_NO_STATE, GROUP_NORM, ("eval_norm",)),
    ),
    Column(
        "load_from_checkpoint", "`load_from_checkpoint`", trainers.load_from_checkpoint,
        each(_NO_STATE, GROUP_NORM, ("eval_norm",)),
    ),
    Column(
        "overfit_batches", "`overfit_batches`", trainers.overfit_batches,
        {"recalibration": note("All training images are measured, not those few.", facts.not_the_overfitted_ones)},
    ),
    Column(
        "fast_dev_run", "`fast_dev_run`", trainers.fast_dev_run,
        {
            "schedule": note("Where it ends before the switch, that is warned of.", facts.live_where_too_short),
            "recalibration": note("64 images are measured at most."),
        },
    ),
]  # fmt: skip
SECTIONS: dict[str, list[Column]] = {
    "Averages of weights, and statistics": AVERAGES,
    "Other callbacks and libraries": LIBRARIES,
    "How the network is run": RUNS,
    "Several processes": PROCESSES,
    "Around a training": TRAINER,
}
COLUMNS: list[Column] = [column for columns in SECTIONS.values() for column in columns]


def render() -> str:
    """Return the matrix as tables, one a section; rows whose cells are the same share a line."""
    return "\n\n".join(f"## {title}\n\n{_section(columns)}" for title, columns in SECTIONS.items())


def _section(columns: list[Column]) -> str:
    numbers: dict[str, int] = {}
    lines: dict[tuple[str, ...], list[str]] = {}
    for row in ROWS:
        cells = []
        for column in columns:
            cell = column.cell(row.key)
            word = (
                cell.verdict if not cell.text else f"{cell.verdict} {numbers.setdefault(cell.text, len(numbers) + 1)}"
            )
            cells.append(word)
        lines.setdefault(tuple(cells), []).append(row.title)
    header = ["", *(column.title for column in columns)]
    table = [header, ["---"] * len(header), *([", ".join(titles), *cells] for cells, titles in lines.items())]
    notes = [f"{number}. {text}" for text, number in numbers.items()]
    return "\n".join([*(f"| {' | '.join(line)} |" for line in table), "", *notes])


if __name__ == "__main__":
    assert {column.key for column in PROCESSES if column.run is None} == set(ranks.COLUMNS)
    TABLE.write_text(render() + "\n", encoding="utf-8")
