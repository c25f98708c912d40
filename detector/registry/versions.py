"""Versions of models in an MLflow registry: register, promote, roll back, pull, list."""

import contextlib
import json
import re
import shutil
import tempfile
import time
from datetime import datetime, timezone
from pathlib import Path

from detector.base.addresses import is_remote
from detector.base.console import need_features, say
from detector.base.errors import UsageError
from detector.base.files import atomic_write, read_bytes, sha256
from detector.model.file import load_model
from detector.model.signature import signature_path
from detector.registry.champion import (
    CHAMPION,
    champion_number,
    events,
    find,
    move,
    number_of,
    registered,
    standing,
    title,
    versions,
    who,
)
from detector.registry.store import (
    artifact_location,
    connect,
    exception,
    folder_of,
    one_line,
    registry_uri,
)

SEMANTIC = re.compile(r"v\d+\.\d+\.\d+(-[0-9A-Za-z.-]+)?")
COMMIT = re.compile("[0-9a-f]{40}")
DEV = "v0.0.0-dev"  # what train_model.py writes where no version is named


# ---- register ----


def read_report(path, model):
    """The report that train_model.py wrote with this model -> (its folder, metrics.json). Raises UsageError."""
    folder = Path(f"{Path(path).with_suffix('').as_posix()}_report")
    try:
        found = json.loads((folder / "metrics.json").read_text())
        of_report = [
            found["model_version"],
            found["code"],
            found["training_data"]["sha256"],
            found["threshold"],
        ]
    except (OSError, ValueError, LookupError, TypeError):
        raise UsageError(
            f"{folder}/metrics.json, the report of {path}, cannot be read: train the model again"
        ) from None
    if of_report != [
        model["versions"]["model"],
        model["versions"]["code"],
        model["training_data"]["sha256"],
        model["threshold"],
    ]:
        raise UsageError(
            f"{folder}/ is the report of another model than {path}: train the model again"
        )
    return folder, found


def check_origin(model, path, allow_dirty):
    """A version that can be told apart, of code that can be found again. Raises UsageError."""
    version, commit = model["versions"]["model"], model["versions"]["code"]
    if not SEMANTIC.fullmatch(version):
        raise UsageError(
            f"{path} is version '{version}': train it with --model_version v1.2.0 or the like"
        )
    if not allow_dirty and not COMMIT.fullmatch(commit):
        raise UsageError(
            f"{path} was trained by uncommitted code ({commit}): commit and train again, or"
            " register it with --allow_dirty"
        )


def flat(metrics):
    """The numbers of a report -> {'overall.auc': value, 'overall.auc.low': ..., 'overall.auc.high': ...}"""
    found = {}
    for part in ("overall", "known", "unseen", "degraded"):
        for name, metric in (metrics[part] or {}).items():
            if isinstance(metric, dict) and metric.get("value") is not None:
                low, high = metric.get("interval") or (metric["value"],) * 2
                found |= {
                    f"{part}.{name}": metric["value"],
                    f"{part}.{name}.low": low,
                    f"{part}.{name}.high": high,
                }
    return found


def twin(there, name, model):
    """The version of the same file, or None. Raises UsageError where another file has its version."""
    for other in there:
        if other.tags["sha256"] == model["sha256"]:
            return other
        if other.tags["version"] == model["versions"]["model"] != DEV:
            raise UsageError(
                f"'{name}' has a {other.tags['version']} of another file: train with "
                "another --model_version"
            )


def register(args):
    model = load_model(args.model)
    check_origin(model, args.model, args.allow_dirty)
    folder, found = read_report(args.model, model)
    client, commit = connect(create=True), model["versions"]["code"]
    if other := twin(registered(client, args.name), args.name, model):
        return print(f"{title(other)} is registered already")
    tags = {
        "version": model["versions"]["model"],
        "commit": commit,
        "sha256": model["sha256"],
        "training_data": model["training_data"]["sha256"],
        "encoder": model["encoder"]["identity"],
        "registered_by": who(),
    }
    if not COMMIT.fullmatch(commit):
        tags["dirty"] = f"allowed by {who()}"
    run = client.create_run(experiment(client, args.name), run_name=tags["version"], tags=tags)
    place, made = folder_of(run.info.artifact_uri, writing=True), None
    try:
        with one_line(OSError):
            log_run(client, run.info.run_id, place, args, model, folder, found)
        with contextlib.suppress(exception()):  # it is there already
            client.create_registered_model(args.name)
        made = client.create_model_version(args.name, f"{place}/model", run.info.run_id, tags=tags)
        before = [v for v in registered(client, args.name) if int(v.version) < int(made.version)]
        other = twin(
            before, args.name, model
        )  # registered at the same moment: the lower number stays
    except BaseException:
        undo(client, run, place, made)
        raise
    if other:
        undo(client, run, place, made)
    print(f"{title(other)} is registered already" if other else title(made))


def experiment(client, name):
    """Its number; made where it is missing, perhaps by another process at the same moment."""
    with contextlib.suppress(exception()):
        return client.create_experiment(name, artifact_location(name))
    return client.get_experiment_by_name(name).experiment_id


def log_run(client, identifier, place, args, model, folder, found):
    """Log parameters, metrics, report and the file itself; the files go to `place`."""
    from mlflow.entities import Metric, Param
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    rule, data = model["threshold_rule"]["words"], model["training_data"]
    parameters = {
        "classifier": model["classifier"],
        **model["hyperparameters"],
        "encoder": model["encoder"]["name"],
        "threshold": model["threshold"],
        "threshold_rule": rule,
        "split": found["split"],
        **{name: data[name] for name in ("real", "fake", "views")},
    }
    now = int(time.time() * 1000)
    client.log_batch(
        identifier,
        [Metric(name, value, now, 0) for name, value in flat(found).items()],
        [Param(name, str(value)) for name, value in parameters.items()],
    )
    files = get_artifact_repository(place)
    files.log_artifacts(str(folder), "report")
    with (
        tempfile.TemporaryDirectory() as copies
    ):  # whatever the file is called here, it is model.joblib there
        shutil.copy(args.model, Path(copies, "model.joblib"))
        if signature_path(args.model).is_file():
            shutil.copy(signature_path(args.model), signature_path(Path(copies, "model.joblib")))
        files.log_artifacts(copies, "model")
    client.set_terminated(identifier)


def undo(client, run, place, made):
    """Remove version, files and run of a `register` that failed. Failures here are not told."""
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    with contextlib.suppress(Exception):
        if is_remote(place):
            get_artifact_repository(place).delete_artifacts()
        else:
            shutil.rmtree(Path(place).parent)
    with contextlib.suppress(Exception):
        if made:
            client.delete_model_version(made.name, made.version)
    with contextlib.suppress(Exception):
        client.delete_run(run.info.run_id)


# ---- promote, roll back ----


def fetch(client, version, place):
    """A version's model file, checked against the hash that was registered -> its path, of a server's below `place`. Raises
    UsageError."""
    import mlflow

    folder = folder_of(version.source)
    if registry_uri().startswith("sqlite") and not is_remote(folder):
        if not Path(folder).is_dir():
            raise UsageError(
                f"the registry's file of {title(version)} is not in {folder}: put the "
                "folder mlruns back beside the registry's file"
            )
    else:
        folder = mlflow.artifacts.download_artifacts(artifact_uri=folder, dst_path=str(place))
    path = Path(folder, "model.joblib")
    if sha256(read_bytes(path)) != version.tags["sha256"]:
        raise UsageError(
            f"the registry's file of {title(version)} is not the one that was registered (SHA-256 "
            f"{version.tags['sha256']}): do not use it; register the original under another version"
        )
    load_model(path)
    return path


def worse(client, candidate, champion, golden, place):
    """Is the candidate worse on the golden images than the champion? What was found goes to stderr."""
    from detector.evaluation.assess import evaluate

    images = {"data_dir" if Path(golden).is_dir() else "features_file": golden}
    if "features_file" in images:
        need_features(golden)
    baseline, lost = None, []
    for version in filter(None, (champion, candidate)):
        folder = Path(place, number_of(version))
        folder.mkdir()
        say(f"evaluating {title(version)} on {golden}")
        text, lost, bad = evaluate(
            str(fetch(client, version, folder)),
            baseline=baseline,
            report_dir=str(folder / "report"),
            **images,
        )
        if bad:
            raise UsageError(
                f"--golden {golden}: holds images that cannot be read (see above); mend or remove"
                " them"
            )
        text = re.sub("report in .*\n?", "", text).rstrip()  # which goes with `place`
        say(text.replace(baseline, title(champion)) if baseline else text)
        baseline = str(folder / "report" / "metrics.json")
    if lost:
        say(f"worse than the baseline: {', '.join(lost)}")
    return bool(lost)


def promote(args):
    client = connect()
    versions(client, args.name)
    before = events(client, args.name)
    candidate, number = find(client, args.name, args.version), champion_number(client, args.name)
    if candidate.tags["version"] == DEV:
        raise UsageError(
            f"{title(candidate)} has no version of its own: train with --model_version v1.0.0 and"
            " register that"
        )
    if number_of(candidate) == number:
        raise UsageError(f"{title(candidate)} is the champion already")
    if args.force:
        move(client, candidate, "promote", before, forced=args.force)
        return print(f"{title(candidate)} is champion, forced by {who()}: {args.force}")
    champion = find(client, args.name, number) if number else None
    with tempfile.TemporaryDirectory() as place:
        if worse(client, candidate, champion, args.golden, place):
            say(
                f"{title(candidate)} is worse than the champion, {title(champion)}, which stays"
                " (--force WHY: all the same)"
            )
            return 1
    move(client, candidate, "promote", before, checked=args.golden)
    print(
        f"{title(candidate)} is champion"
        + (f", no worse than {title(champion)}" if champion else ", the first")
    )


def rollback(args):
    client = connect()
    versions(client, args.name)
    before = events(client, args.name)
    line = standing(before)
    if len(line) < 2:
        raise UsageError(
            f"'{args.name}' has had no champion before this one"
            if line
            else f"'{args.name}' has no champion yet"
        )
    version = find(client, args.name, line[-2])
    move(client, version, "rollback", before)
    print(f"{title(version)} is champion again")


# ---- pull, list ----


def pull(args):
    client = connect()
    version = find(client, args.name, args.ref)
    out = Path(args.out)
    with (
        tempfile.TemporaryDirectory() as place,
        contextlib.ExitStack() as written,
    ):  # in place once all of it is there
        path = fetch(client, version, place)
        for source, target in ((path, out), (signature_path(path), signature_path(out))):
            if source.is_file():
                written.enter_context(atomic_write(target)).write(source.read_bytes())
        signed = signature_path(path).is_file()
    if not signed:
        signature_path(out).unlink(missing_ok=True)  # of the file that was there
    print(f"{out}: {title(version)}")


def list_all(args):
    client = connect()
    names = (
        [args.name]
        if args.name
        else sorted(
            m.name
            for m in client.search_registered_models(max_results=1000)
            if registered(client, m.name)
        )
    )
    if not names:
        print("no models yet: registry.py register NAME model.joblib")
    for name in names:
        there, champion = versions(client, name), champion_number(client, name)
        print(
            f"{name}\n{'':2}{'version':14}{'number':>8} "
            f" {'commit':14}{'balanced accuracy':24}{'AUC':24}registered"
        )
        for v in there:
            metrics = client.get_run(v.run_id).data.metrics
            figures = "".join(
                f"{figure(metrics, f'overall.{metric}'):24}"
                for metric in ("balanced_accuracy", "auc")
            )
            day = datetime.fromtimestamp(v.creation_timestamp / 1000, timezone.utc).date()
            notes = ", ".join(
                [CHAMPION] * (number_of(v) == champion) + ["uncommitted code"] * ("dirty" in v.tags)
            )
            print(
                f"{'':2}{v.tags['version']:14}{v.version:>8} "
                f" {v.tags['commit'][:12]:14}{figures}{day}  {notes}".rstrip()
            )


def figure(metrics, name):
    return (
        f"{metrics[name]:.3f} [{metrics[f'{name}.low']:.3f}, {metrics[f'{name}.high']:.3f}]"
        if name in metrics
        else "-"
    )
