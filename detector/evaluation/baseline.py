"""Compare an evaluation with an earlier one of the same images: what got better or worse?"""

import json
from pathlib import Path

from detector.base.errors import UsageError
from detector.base.files import read_bytes
from detector.evaluation import metrics
from detector.evaluation.report import PARTS


def compare(now, before):
    """Two reports of the same images -> rows of the metrics that left their recorded interval.

    A row is (part, words, now, recorded interval, 'better' | 'worse'). Parts of other images are
    passed over: two models may know different sources. Raises UsageError where all parts are.
    """
    parts = [
        part
        for part in PARTS
        if now[part] and before[part] and now["data"][part] == before["data"].get(part)
    ]
    if not parts:
        raise UsageError(
            "--baseline is of other images; images that trained either model are left out:"
            " compare on a folder that trained neither"
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


def changes_table(rows, baseline):
    """Rows of `compare` as text."""
    if not rows:
        return f"every metric lies in the interval that {baseline} records"
    lines = [f"{'':10}{'metric':22}{'now':>7}  recorded interval"]
    for part, words, value, ends, verdict in rows:
        interval = f"{ends[0]:z.3f} .. {ends[1]:z.3f}"
        lines.append(f"{part:10}{words:22}{value:z7.3f}  {interval}  {verdict}")
    return "\n".join(lines)


def read_baseline(path, report_dir):
    """The parts of an earlier metrics.json that are compared. Raises UsageError."""
    if Path(path).resolve() == Path(report_dir, "metrics.json").resolve():
        raise UsageError(
            f"--baseline {path} would be overwritten by this report: copy it, or name another"
            " --report_dir"
        )
    try:
        report = json.loads(read_bytes(path))
        return {"data": dict(report["data"]), **{part: report[part] for part in PARTS}}
    except (ValueError, KeyError, TypeError):
        raise UsageError(
            f"--baseline {path} is not a metrics.json of evaluate.py: name one from its report"
            " folder"
        ) from None
