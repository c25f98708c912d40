"""Versions of models in an MLflow registry: register, promote, roll back, pull, list."""

import contextlib
import json
import re
import shutil
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

from detector.base.addresses import is_remote
from detector.base.console import say
from detector.base.errors import DetectorError, UsageError
from detector.base.files import atomic_write, read_bytes, sha256
from detector.evaluation import golden
from detector.model.file import golden_floor, load_model, report_folder
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
    folder_of,
    mlflow_error,
    one_line,
    registry_uri,
)

SEMANTIC = re.compile(r"v\d+\.\d+\.\d+(-[0-9A-Za-z.-]+)?")
COMMIT = re.compile("[0-9a-f]{40}")
DEV = "v0.0.0-dev"  # the version of train_model.py without --model_version
UNKNOWN = "unknown"  # the test set of reports that do not name it
ROW = "  {:14}{:>8}  {:14}{:24}{:24}{:26}{}"  # of the list
HEADING = ROW.format(
    "version", "number", "commit", "balanced accuracy", "AUC", "test set", "registered"
)


# ---- register ----


def read_report(path, model):
    """The report that train_model.py wrote with this model -> (its folder, metrics.json).

    Raises UsageError.
    """
    folder = Path(report_folder(path))
    try:
        report = json.loads((folder / "metrics.json").read_text())
        of_report = (
            report["model_version"],
            report["code"],
            report["training_data"]["sha256"],
            report["threshold"],
        )
    except (OSError, ValueError, LookupError, TypeError):
        raise UsageError(
            f"{folder}/metrics.json, the report of {path}, cannot be read: train the model again"
        ) from None
    of_model = (
        model["versions"]["model"],
        model["versions"]["code"],
        model["training_data"]["sha256"],
        model["threshold"],
    )
    if of_report != of_model:
        raise UsageError(
            f"{folder}/ is the report of another model than {path}: train the model again"
        )
    return folder, report


def check_origin(model, path, allow_dirty):
    """Raises UsageError unless the model names its version, and a commit that holds its code."""
    version, commit = model["versions"]["model"], model["versions"]["code"]
    if not SEMANTIC.fullmatch(version):
        raise UsageError(
            f"{path} is version '{version}': train it with --model_version v1.2.0 or the like"
        )
    if not allow_dirty and not COMMIT.fullmatch(commit):
        raise UsageError(
            f"{path} was trained by uncommitted code ({commit}): commit and train again, "
            "or register it with --allow_dirty"
        )


def flat(metrics):
    """The numbers of a report -> {'overall.auc': ..., 'overall.auc.low': ..., '...high': ...}"""
    numbers = {}
    for part in ("overall", "known", "unseen", "degraded"):
        for name, metric in (metrics[part] or {}).items():
            if isinstance(metric, dict) and metric.get("value") is not None:
                key, value = f"{part}.{name}", metric["value"]
                low, high = metric.get("interval") or (value, value)
                numbers |= {key: value, f"{key}.low": low, f"{key}.high": high}
    return numbers


def twin(versions, name, model):
    """The version of the same file, or None.

    Raises UsageError where another file has the model's version.
    """
    for other in versions:
        if other.tags["sha256"] == model["sha256"]:
            return other
        if other.tags["version"] == model["versions"]["model"] != DEV:
            raise UsageError(
                f"'{name}' has a {other.tags['version']} of another file: "
                "train with another --model_version"
            )


def register(args):
    model = load_model(args.model)
    check_origin(model, args.model, args.allow_dirty)
    report = read_report(args.model, model)
    client = connect(create=True)
    version, other = None, twin(registered(client, args.name), args.name, model)
    if not other:
        version, other = add_version(client, args, model, report)
    print(f"{title(other)} is registered already" if other else title(version))


def tags_of(model):
    tags = {
        "version": model["versions"]["model"],
        "commit": model["versions"]["code"],
        "sha256": model["sha256"],
        "training_data": model["training_data"]["sha256"],
        "encoder": model["encoder"]["identity"],
        "registered_by": who(),
    }
    if not COMMIT.fullmatch(tags["commit"]):
        tags["dirty"] = f"allowed by {who()}"
    return tags


def add_version(client, args, model, report):
    """-> (the new version, None), or (None, the same file's version of another process).

    Of two processes at the same moment, the version with the lower number stays.
    """
    tags = tags_of(model)
    run = client.create_run(experiment(client, args.name), run_name=tags["version"], tags=tags)
    place = folder_of(run.info.artifact_uri, writing=True)
    version, kept = None, False
    try:
        with one_line(OSError):
            log_run(client, run.info.run_id, place, args.model, model, report)
        with contextlib.suppress(mlflow_error()):  # the name has versions already
            client.create_registered_model(args.name)
        version = client.create_model_version(
            args.name, f"{place}/model", run.info.run_id, tags=tags
        )
        own = registered(client, args.name)
        other = twin([v for v in own if int(v.version) < int(version.version)], args.name, model)
        kept = not other
    finally:
        if not kept:
            undo(client, run, place, version)
    return (version, None) if kept else (None, other)


def experiment(client, name):
    """ID of the experiment of that name. Another process may create it at the same moment."""
    try:
        return client.create_experiment(name, artifact_location(name))
    except mlflow_error():
        if not (other := client.get_experiment_by_name(name)):
            raise
        return other.experiment_id


def log_run(client, run_id, place, path, model, report):
    """Log parameters and metrics; copy the report and the model file to `place`."""
    from mlflow.entities import Metric, Param
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    folder, metrics = report
    now, parameters = int(time.time() * 1000), parameters_of(model, metrics)
    client.log_batch(
        run_id,
        [Metric(name, value, now, 0) for name, value in flat(metrics).items()],
        [Param(name, str(value)) for name, value in parameters.items()],
    )
    files = get_artifact_repository(place)
    files.log_artifacts(str(folder), "report")
    with tempfile.TemporaryDirectory() as copies:
        copy = Path(copies, "model.joblib")  # the registry's name for every model file
        shutil.copy(path, copy)
        if sha256(read_bytes(copy)) != model["sha256"]:
            raise UsageError(f"{path} was replaced meanwhile: register it again")
        if signature_path(path).is_file():
            shutil.copy(signature_path(path), signature_path(copy))
        files.log_artifacts(copies, "model")
    client.set_terminated(run_id)


def parameters_of(model, metrics):
    data, test_images = model["training_data"], metrics.get("test_images", UNKNOWN)[:8]
    return {
        "classifier": model["classifier"],
        **model["hyperparameters"],
        "encoder": model["encoder"]["name"],
        "threshold": model["threshold"],
        "threshold_rule": model["threshold_rule"]["words"],
        "split": metrics["split"],
        "test_set": f"{test_images} ({metrics['overall']['n']} images)",
        **{name: data[name] for name in ("real", "fake", "views")},
    }


def undo(client, run, place, version):
    """Remove files, version and run of a `register` that failed, as far as they can be removed."""
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    with contextlib.suppress(Exception):
        if is_remote(place):
            get_artifact_repository(place).delete_artifacts()
        else:
            shutil.rmtree(Path(place).parent)
    with contextlib.suppress(Exception):
        if version:
            client.delete_model_version(version.name, version.version)
    with contextlib.suppress(Exception):
        client.delete_run(run.info.run_id)


# ---- promote, roll back ----


def fetch(client, version, place):
    """-> (path of a version's model file, its bytes, checked against the registered hash).

    A server's file is downloaded below `place`. Raises UsageError.
    """
    path = Path(local_folder(version, place), "model.joblib")
    data = read_bytes(path)
    if sha256(data) != version.tags["sha256"]:
        raise UsageError(
            f"the registry's file of {title(version)} is not the one that was registered (SHA-256 "
            f"{version.tags['sha256']}): do not use it; register the original under another version"
        )
    load_model(path)
    return path, data


def local_folder(version, place):
    import mlflow

    folder = folder_of(version.source)
    if not registry_uri().startswith("sqlite") or is_remote(folder):
        return mlflow.artifacts.download_artifacts(artifact_uri=folder, dst_path=str(place))
    if not Path(folder).is_dir():
        raise UsageError(
            f"the registry's file of {title(version)} is not in {folder}: "
            "put the folder mlruns back beside the registry's file"
        )
    return folder


def judged_on(client, versions, images, place):
    """Versions -> [Judged] on the golden images; the files go below `place`. Raises UsageError."""
    from detector.evaluation.comparison import judge_images

    given = {"data_dir": images}
    if not Path(images).is_dir():
        given = {"features_files": [images] * len(versions)}
        if len({version.tags.get("encoder") for version in versions}) > 1:
            raise UsageError(
                f"--golden {images}: the versions have two encoders, and a features file fits"
                " one: name the folder of the images"
            )
    names = {str(fetch(client, v, Path(place, number_of(v)))[0]): title(v) for v in versions}
    try:
        judged, unreadable = judge_images(list(names), **given)
    except DetectorError as error:  # its file goes with `place`
        text = str(error)
        for path, name in names.items():
            text = text.replace(path, name)
        raise type(error)(text) from None
    if unreadable:
        raise UsageError(
            f"--golden {images}: holds images that cannot be read (see above); mend or remove them"
        )
    golden.refuse_both_labels(judged[0].columns, f"--golden {images}")
    return judged


def fails_golden(judged, versions):
    """Would golden.py fail with the last version on the same images, and not with the champion?

    stderr gets golden.py's table, and its line on the version.
    """
    names = [version.tags["version"] for version in versions]
    tallies = dict(zip(names, map(golden.tally_of, judged), strict=True))
    floors = {name: golden_floor(one.model) for name, one in zip(names, judged, strict=True)}
    for line in golden.table(tallies, floors).splitlines():
        say(line)
    *before, line = (golden.below(n, golden.accuracies(tallies[n])[2], floors[n]) for n in names)
    if line:
        say(line + ("; so is the champion, on the same images" if any(before) else ""))
    return bool(line) and not any(before)


def candidate_of(client, args, champion):
    """The version to promote. Raises UsageError for a version of no name and for the champion."""
    candidate = find(client, args.name, args.version)
    if candidate.tags["version"] == DEV:
        raise UsageError(
            f"{title(candidate)} has no version of its own: "
            "train with --model_version v1.0.0 and register that"
        )
    if number_of(candidate) == champion:
        raise UsageError(f"{title(candidate)} is the champion already")
    return candidate


def promote(args):
    from detector.evaluation import paired
    from detector.evaluation.comparison import pair

    client = connect()
    before, number = events(client, args.name), champion_number(client, args.name)
    candidate = candidate_of(client, args, number)
    if args.force:
        move(client, candidate, "promote", before, forced=args.force)
        return print(f"{title(candidate)} is champion, forced by {who()}: {args.force}")
    present = [find(client, args.name, number), candidate] if number else [candidate]
    with tempfile.TemporaryDirectory() as place:
        judged = judged_on(client, present, args.golden, place)
    images = pair([judged[0], judged[-1]])
    decided = paired.judge(images.labels, images.right, images.groups, args.margin)
    refused, compared = fails_golden(judged, present), "the first"
    if number:
        say(paired.sentence(decided, f"the champion, {title(present[0])}", title(candidate)))
        refused |= decided["verdict"] in ("worse", "unclear")
        compared = f"{paired.VERDICTS.get(decided['verdict'])} {title(present[0])}"
    if refused:
        say(f"{title(candidate)} is not promoted (--force WHY promotes it all the same)")
        return 1
    move(client, candidate, "promote", before, checked=args.golden)
    print(f"{title(candidate)} is champion, {compared}")


def rollback(args):
    client = connect()
    before = events(client, args.name)
    line = standing(before)
    if not line:
        raise UsageError(f"'{args.name}' has no champion yet")
    if len(line) < 2:
        raise UsageError(f"'{args.name}' has had no champion before this one")
    version = find(client, args.name, line[-2])
    move(client, version, "rollback", before)
    print(f"{title(version)} is champion again")


# ---- pull, list ----


def pull(args):
    client = connect()
    version, out = find(client, args.name, args.ref), Path(args.out)
    with tempfile.TemporaryDirectory() as place:
        path, data = fetch(client, version, place)
        signed = signature_path(path).is_file()
        with contextlib.ExitStack() as outputs:  # both files take their names at the end
            outputs.enter_context(atomic_write(out)).write(data)
            if signed:
                signature = outputs.enter_context(atomic_write(signature_path(out)))
                signature.write(signature_path(path).read_bytes())
    if not signed:
        signature_path(out).unlink(missing_ok=True)  # of the model that was there before
    print(f"{out}: {title(version)}")


def list_all(args):
    client = connect()
    names = [args.name] if args.name else names_of_models(client)
    if not names:
        print("no models yet: registry.py register NAME model.joblib")
    for name in names:
        own, champion = versions(client, name), champion_number(client, name)
        reference = next((v for v in own if number_of(v) == champion), own[-1])
        print(name, HEADING, sep="\n")
        for version in own:
            print(row(client, version, champion, reference))


def names_of_models(client):
    """Names with versions that `register` made."""
    models = client.search_registered_models(max_results=1000)
    return sorted(model.name for model in models if registered(client, model.name))


def row(client, version, champion, reference):
    """A version's line of the list.

    `reference`: the champion or, without one, the newest version. Figures on another test set are
    marked. A test set is a hash of its images and their number, as in '3f9a0c1d (120 images)'.
    """
    tags, (run, other) = version.tags, (client.get_run(v.run_id).data for v in (version, reference))
    figures = [figure(run.metrics, f"overall.{name}") for name in ("balanced_accuracy", "auc")]
    day = datetime.fromtimestamp(version.creation_timestamp / 1000, UTC).date()
    images, known = (one.params.get("test_set", UNKNOWN) for one in (run, other))
    alike = images == known and not images.startswith(UNKNOWN)
    marks = {
        CHAMPION: number_of(version) == champion,
        f"not comparable with {reference.tags['version']}": not alike and version is not reference,
        "uncommitted code": "dirty" in tags,
    }
    notes = ", ".join(mark for mark, is_true in marks.items() if is_true)
    cells = tags["version"], version.version, tags["commit"][:12], *figures, images, str(day)
    return f"{ROW.format(*cells)}  {notes}".rstrip()


def figure(metrics, name):
    if name not in metrics:
        return "-"
    low, high = metrics[f"{name}.low"], metrics[f"{name}.high"]
    return f"{metrics[name]:z.3f} [{low:z.3f}, {high:z.3f}]"
