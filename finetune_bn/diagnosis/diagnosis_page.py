"""The page of a diagnosis, made from its plain data: findings first, then layers, batches, learning rates, memory."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from finetune_bn.diagnosis.page import (
    html_code,
    html_findings,
    html_list,
    html_page,
    html_table,
    html_text,
    html_verdict,
)
from finetune_bn.diagnosis.page_plots import Bars, html_layers
from finetune_bn.diagnosis.rule import TITLES

Data = Mapping[str, Any]
Sections = list[tuple[str, str]]

_KINDS = {"ok": "good", "note": "note", "warning": "bad", "problem": "bad"}
_WORDS = {
    "ok": "Nothing stands in the way",
    "note": "Something to know",
    "warning": "A warning",
    "problem": "A problem",
}


def diagnosis_page(diagnosis: Data, advice: Data | None = None, more: Sequence[tuple[str, str]] = ()) -> str:
    """Return the whole page.

    Args:
        diagnosis: what `Diagnosis.to_dict` returned.
        advice: what `Advice.to_dict` returned; its answer is then the verdict.
        more: sections behind the advice, as those of a comparison.
    """
    of = f"{diagnosis['images']:,} images" + (f" of {diagnosis['classes']:,} classes" if diagnosis["classes"] else "")
    about = [of, f"batches of {diagnosis['batches']['batch_size']}"]
    about += [f"policy: {diagnosis['policy']}"] if diagnosis["policy"] else []
    about += [f"{diagnosis['seconds']:.1f} s"]
    top = advice_sections(advice) if advice else [("", _verdict(diagnosis["findings"]))]
    sections = [*top, *more, *diagnosis_sections(diagnosis)]
    return html_page(f"Diagnosis of {diagnosis['family']}", sections, " · ".join(about))


def advice_sections(advice: Data) -> Sections:
    """Return what is advised, why, how sure that is, and the overlay.

    Args:
        advice: what `Advice.to_dict` returned.
    """
    reasons = [f"{reason['sentence']} [{reason['source']}]" for reason in advice["reasons"]]
    second = f"Second choice: {TITLES[advice['second']['arm']]}. {advice['second']['what_would_change']}"
    overlay = (
        html_code(advice["overlay"]) + "<p>Write this to a file, and pass it as one more <code>--config</code>.</p>"
    )
    return [
        ("", html_verdict(advice["title"][:1].upper() + advice["title"][1:], advice["sure"])),
        ("Why", html_list(reasons) + html_text(second)),
        ("Do it", overlay if advice["overlay"] else ""),
    ]


def diagnosis_sections(diagnosis: Data) -> Sections:
    """Return headings and contents: findings, layers, batches, learning rates, memory, what was left out.

    Args:
        diagnosis: what `Diagnosis.to_dict` returned.
    """
    findings = [
        (_KINDS[f["level"]], f["level"], f["name"], f"{f['sentence']} {f['remedy']}".strip())
        for f in diagnosis["findings"]
    ]
    return [
        ("Findings", html_findings(findings)),
        ("Layers", _layers(diagnosis["layers"])),
        ("Batches", _facts(_batches(diagnosis["batches"]))),
        ("Learning rates", _facts(_curvature(diagnosis["curvature"] or {}))),
        ("Memory and launches of a policy", _memory(diagnosis["memory"])),
        ("Left out", html_list(diagnosis["left_out"])),
    ]


def _verdict(findings: Sequence[Data]) -> str:
    levels = [finding["level"] for finding in findings]
    worst = max(levels, key=list(_KINDS).index, default="ok")
    first = next((f["sentence"] for f in findings if f["level"] == worst), "nothing was looked at")
    number = levels.count(worst)
    word = f"{number} {worst}s" if number > 1 and worst != "ok" else _WORDS[worst]
    all_well = f"{number} thing{' was' if number == 1 else 's were'} looked at."
    return html_verdict(word, first if worst != "ok" else all_well, _KINDS[worst])


def _layers(layers: Sequence[Data]) -> str:
    names = [" = ".join(name or "(root)" for name in layer["names"]) for layer in layers]

    def values(key: str) -> list[float | None]:
        return [layer[key] for layer in layers]

    panels = [
        Bars("Mean of the data off the stored mean (stored sd)", values("shift_mean")),
        Bars("Logarithm of the variance over the stored one", values("log_var_ratio"), digits="+.3f"),
        Bars("How many independent images a batch is worth", values("n_eff")),
        Bars("Values of a channel that are normalized together", values("values_per_channel"), log=True, digits=",.0f"),
        Bars("Leakage from the other images of a batch", values("leakage")),
        Bars("Where the running variance settles, relative", values("running_var_bias"), percent=True, digits="+.2%"),
    ]
    header = ["layer", "#", "type", "C", "shift (sd)", "log var", "DEFF", "n_eff", "var bias", "leakage", "values"]
    rows = [
        [
            name,
            i + 1,
            layer["kind"],
            layer["channels"],
            _text(layer["shift_mean"], ".3f"),
            _text(layer["log_var_ratio"], "+.3f"),
            _text(layer["deff"], ".2f"),
            _text(layer["n_eff"], ".1f"),
            _text(layer["running_var_bias"], "+.1%"),
            _text(layer["leakage"], ".3f"),
            _text(layer["values_per_channel"], ","),
        ]
        for i, (name, layer) in enumerate(zip(names, layers, strict=True))
    ]
    return html_layers(names, panels, header, rows, texts=(0, 2))


def _batches(batches: Data) -> list[tuple[str, str]]:
    iid = {True: "they look like independent draws", False: "they are no independent draws", None: ""}
    return [
        ("images a batch and device", _text(batches["batch_size"], ",")),
        ("devices", _text(batches["devices"])),
        ("batches whose gradients make a step", _text(batches["accumulate"])),
        ("batches looked at", _text(batches["batches"])),
        ("labels seen", _text(batches["labels"], ",")),
        ("images of a label in a batch", _text(batches["images_per_label"], ".1f")),
        ("independent?", iid[batches["iid"]]),
        ("p of the channel means, were they dealt at random", _text(batches["p_value"], ".2g")),
        ("p of the labels, were they dealt at random", _text(batches["label_p_value"], ".2g")),
        ("design effect, median of layers", _text(batches["deff"], ".2f")),
        ("independent images that a batch is worth", _text(batches["n_eff"], ".1f")),
        ("outputs in training mode off those in eval mode", _text(batches["train_eval_gap"], ".3f")),
        ("outputs moved by the other images of a batch", _text(batches["leakage"], ".3f")),
        ("layers with one value a channel, or none", ", ".join(n or "(root)" for n in batches["single_value_layers"])),
    ]


def _curvature(curvature: Data) -> list[tuple[str, str]]:
    if not curvature:
        return []
    return [
        ("optimizer", curvature["optimizer"]),
        ("learning rate asked about", _text(curvature["lr"], ".3g")),
        ("top eigenvalue of the Hessian, layers live", _text(curvature["live"], ".4g")),
        ("top eigenvalue of the Hessian, layers frozen", _text(curvature["frozen"], ".4g")),
        ("steps diverge from, layers live", _text(curvature["lr_bound_live"], ".3g")),
        ("steps diverge from, layers frozen", _text(curvature["lr_bound_frozen"], ".3g")),
        ("proposed for frozen layers", _text(curvature["proposed"], ".3g")),
        ("images of the batch whose loss it is", _text(curvature["images"], ",")),
    ]


def _memory(memory: Sequence[Data]) -> str:
    if not memory:
        return ""
    sizes = sorted({gib for row in memory for gib, _ in row["largest_batch"] or ()})
    launched = any(row["launches"] is not None for row in memory)
    header = ["policy", "MiB an image", *(["launches a step"] if launched else [])]
    rows = []
    for row in memory:
        fits = dict(row["largest_batch"] or ())
        cells = [row["policy"], f"{row['bytes_per_image'] / 2**20:,.2f}"]
        cells += [_text(row["launches"], ",")] if launched else []
        rows.append([*cells, *(_text(fits.get(gib), ",") for gib in sizes)])
    bars = {1: _shares([row["bytes_per_image"] for row in memory])}
    if launched:
        bars[2] = _shares([row["launches"] for row in memory])
    return html_table([*header, *(f"largest batch in {gib:g} GiB" for gib in sizes)], rows, bars=bars)


def _shares(values: Sequence[float | None]) -> list[float | None]:
    most = max((value for value in values if value), default=None)
    return [None if value is None or not most else value / most for value in values]


def _facts(facts: Sequence[tuple[str, str]]) -> str:
    """Return a table of two columns, without what is not known."""
    return html_table(["what", "found"], [pair for pair in facts if pair[1]], texts=(0, 1), sortable=False)


def _text(value: float | None, form: str = "") -> str:
    if value is None:
        return ""
    return format(value, form) if math.isfinite(value) else "not finite"
