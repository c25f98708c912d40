"""Metrics and labels in a PromQL expression, to compare rules and panels with /metrics."""

import re

GROUPING = re.compile(r"\b(?:by|without|on|ignoring|group_left|group_right)\s*\(([^)]*)\)")
SELECTOR = re.compile(r"\b([a-zA-Z_:][\w:]*+)(?!\s*\()(?:\{([^}]*)\})?")
MATCHER = re.compile(r'(\w+)\s*(=~|!~|!=|=)\s*"([^"]*)"')
WORDS = {"and", "or", "unless", "bool", "offset", "Inf", "NaN"}


def selectors(expression):
    """-> [(metric, [(label, operator, value), ...])] of each selector in the expression."""
    text = GROUPING.sub(" ", re.sub(r"\[[^\]]*\]|\boffset\s+\w+", " ", expression))
    kept = []

    def keep(match):  # strings outside braces, as in label_replace, name no metric
        kept.append(match[0])
        return f"{{{len(kept) - 1}}}"

    text = re.sub(r'"[^"]*"', " ", re.sub(r"\{[^}]*\}", keep, text))
    return [
        (name, MATCHER.findall(kept[int(number)]) if number else [])
        for name, number in SELECTOR.findall(text)
        if name not in WORDS
    ]


def groupings(expression):
    """Labels in by (...), on (...) and the like."""
    return set(re.findall(r"\w+", " ".join(GROUPING.findall(expression))))


def resolve(expression):
    """Replace placeholders of Grafana and prometheus-adapter -> PromQL that promtool can check."""
    values = {
        "$__rate_interval": "5m",
        "$namespace": "detector",
        "<<.GroupBy>>": "namespace, pod",
        "<<.LabelMatchers>>": 'namespace="detector",pod="a"',
    }
    for name, value in values.items():
        expression = expression.replace(name, value)
    return expression
