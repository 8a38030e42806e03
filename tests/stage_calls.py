"""Stages as functions: each runs a plan of one stage, as its command does."""

from typing import NamedTuple

from sdpctl.plan import Plan
from sdpctl.stages.calibrate import Calibrate
from sdpctl.stages.evaluate import Evaluate
from sdpctl.stages.export import Export
from sdpctl.stages.import_weights import ImportWeights, read_weights
from sdpctl.stages.layers import read_document
from sdpctl.stages.network import named
from sdpctl.stages.profile import Profile
from sdpctl.stages.run import stages_of
from sdpctl.stages.search import Search
from sdpctl.stages.train import Train


class Imported(NamedTuple):
    artifact: object
    score: object = None
    warning: str | None = None


def instances_of(network, texts):
    return named(texts, network.recipe.model.points) if texts else None


def train(recipe, context, *, resume=False, force=False):
    return Plan(context, force=force).run(Train(recipe, resume=resume and not force))


def run(recipe, context, *, force=False):
    plan = Plan(context, force=force)
    stages = stages_of(recipe, context, resume=False if force else None)
    done = {name: plan.run(stage) for name, stage in stages.items()}
    return {name: artifact for name, artifact in done.items() if artifact is not None}


def planned(recipe, context):
    """Return the plan of a run, as lines."""
    plan = Plan(context)
    for stage in stages_of(recipe, context).values():
        plan.run(stage)
    return plan.steps


def calibrate(network, context, instances=None, *, force=False):
    return Plan(context, force=force).run(Calibrate(network, instances_of(network, instances)))


def evaluate(network, context, instances=None, split="test", *, force=False):
    return Plan(context, force=force).run(Evaluate(network, instances_of(network, instances), split))


def profile(recipe, context, instances, name):
    return Plan(context).run(Profile(recipe, name, instances))


def search(network, context, *, force=False):
    return Plan(context, force=force).run(Search(network, anew=force))


def export(network, context, *, search=None, cascade=None, max_latency_ms=None, force=False, calibrates=True):
    stage = Export(network, search=search, cascade=cascade, max_latency_ms=max_latency_ms, calibrates=calibrates)
    return Plan(context, force=force).run(stage)


def import_weights(file, context, **options):
    stage = ImportWeights(read_weights(file, context, **options))
    artifact = Plan(context).run(stage)
    if artifact is None:
        return None
    score = stage.score(context)
    return Imported(artifact) if score is None else Imported(artifact, score.full, score.warning)


def document(artifact, context):
    return read_document(context.store, artifact)
