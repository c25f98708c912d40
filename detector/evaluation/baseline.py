"""An evaluation against an earlier one of the same images: what got better or worse?"""

import json
from pathlib import Path

from detector.base.errors import UsageError
from detector.base.files import read_bytes
from detector.evaluation import metrics


def compare(now, before):
    """Two reports of the same images -> rows (part, words, now, recorded interval, 'better' | 'worse') that left their interval.

    Parts that hold other images (a model may know other sources) are passed over. Raises UsageError where all do.
    """
    parts = [
        part
        for part in ("overall", "known", "unseen", "degraded")
        if now[part] and before[part] and now["data"][part] == before["data"].get(part)
    ]
    if not parts:
        raise UsageError(
            "--baseline is of other images; images that trained one of the two models count for"
            " neither: compare on a folder that trained none"
        )
    try:
        return [
            (part, *row[1:])
            for part in parts
            for row in metrics.left_interval(now[part], before[part])
        ]
    except (TypeError, AttributeError, LookupError):
        raise UsageError(
            "--baseline is damaged: its metrics are not what evaluate.py writes"
        ) from None


def changes_table(rows):
    lines = [f"{'':10}{'metric':22}{'now':>7}  recorded interval"]
    return "\n".join(
        [
            *lines,
            *(
                f"{part:10}{words:22}{value:z7.3f}  {ends[0]:z.3f} .. {ends[1]:z.3f}  {verdict}"
                for part, words, value, ends, verdict in rows
            ),
        ]
    )


def read_baseline(path, report_dir):
    """The parts of an earlier metrics.json that are compared. Raises UsageError."""
    if Path(path).resolve() == Path(report_dir, "metrics.json").resolve():
        raise UsageError(
            f"--baseline {path} would be overwritten by this report: copy it, or name another"
            " --report_dir"
        )
    try:
        found = json.loads(read_bytes(path))
        return {
            "data": dict(found["data"]),
            **{name: found[name] for name in ("overall", "known", "unseen", "degraded")},
        }
    except (ValueError, KeyError, TypeError):
        raise UsageError(
            f"--baseline {path} is not a metrics.json of evaluate.py: name one from its report"
            " folder"
        ) from None
