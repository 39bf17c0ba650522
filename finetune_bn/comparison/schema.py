"""The JSON Schema of what `Comparison.to_json` writes."""

from __future__ import annotations

from typing import Any

from finetune_bn.comparison.result import FORM


def _record(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}


def _list(items: Any) -> dict[str, Any]:
    return {"type": "array", "items": items}


def _or_null(kind: str) -> dict[str, Any]:
    return {"type": [kind, "null"]}


_TEXT, _NUMBER, _WHOLE = {"type": "string"}, {"type": "number"}, {"type": "integer"}
_POINTS = _list({"type": "array", "items": _or_null("number"), "minItems": 2, "maxItems": 2})

SCHEMA: dict[str, Any] = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "title": "A comparison of treatments of BatchNorm",
    **_record(
        form={"const": FORM},
        model=_TEXT,
        metric=_TEXT,
        arms={"type": "object", "additionalProperties": _TEXT},
        seeds=_list(_WHOLE),
        lengths=_list(_WHOLE),
        images=_record(train=_WHOLE, val=_WHOLE),
        best=_or_null("string"),
        table=_list(
            _record(
                arm=_TEXT,
                what=_TEXT,
                lr=_or_null("number"),
                score=_or_null("number"),
                sd=_or_null("number"),
                steps=_WHOLE,
                seeds=_WHOLE,
                seconds=_NUMBER,
                dropped_at=_or_null("integer"),
                failed=_or_null("string"),
            )
        ),
        runs=_list(
            _record(
                arm=_TEXT,
                lr=_NUMBER,
                seed=_WHOLE,
                steps=_WHOLE,
                curve=_POINTS,
                losses=_POINTS,
                score=_or_null("number"),
                seconds=_NUMBER,
                dropped_at=_or_null("integer"),
                failed=_or_null("string"),
            )
        ),
        notes=_list(_TEXT),
        seconds=_NUMBER,
    ),
}
