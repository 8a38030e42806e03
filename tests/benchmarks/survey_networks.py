"""Survey networks of torchvision and timm: which can be traced, and whether their numbers are the library's.

Each network is traced. Then, with random weights in float64 on small images: `full` is compared with the library's own module
in evaluation and in training, and five instances in one tree are compared with each instance alone, run by hooks on the
library's module: logits, statistics, MACs.

PYTHONPATH=tests python tests/benchmarks/survey_networks.py RESULTS [--names FILE] [--every N] [--largest M] [--table]

RESULTS is a file of JSON lines: networks that it has are skipped, so a survey continues where it was stopped. `--every 10`
takes every tenth network of timm's own list; `--largest 120` only traces networks of more parameters, in millions.
"""

import argparse
import json
import sys
import time
import traceback
import warnings
from pathlib import Path

import timm
import torch
from library_networks import compare_full, compare_instances, costs, draw_instances, pair
from torch import nn

from sdpctl.errors import ModelError, UsageError
from sdpctl.instance import FULL
from sdpctl.models import create_model
from sdpctl.models.meta import OnMeta
from sdpctl.models.registry import architecture
from sdpctl.models.traced import _empty, points

SIZES = (64, 96, 128, 160, 192)
"""Heights and widths of images to try, in pixels, before that which a network is meant for."""

ERRORS = ("evaluation", "training", "gradients", "statistics", "instances", "instance statistics", "MACs", "params")

BOUND = 1e-10


def nothing(arch):
    """Return what is known about a network that was not built."""
    return {"arch": arch, "norms": 0, "convolutions": 0, "params": 0, "points": [], "refused": None, "seconds": 0.0}


def traced(arch):
    """Trace a network, and return what was found."""
    began = time.perf_counter()
    try:
        network = _empty(architecture(arch))
    except Exception as error:  # noqa: BLE001  a fault: every network can be built
        return nothing(arch) | {"failed": " ".join(f"cannot be built: {type(error).__name__}: {error}".split())[:300]}
    kinds = [type(module) for module in network.modules()]
    found = {
        "arch": arch,
        "norms": sum(issubclass(kind, nn.BatchNorm2d) for kind in kinds),
        "convolutions": sum(issubclass(kind, nn.Conv2d) for kind in kinds),
        "linear": sum(issubclass(kind, nn.Linear) for kind in kinds),
        "params": sum(p.numel() for p in network.parameters()),
        "points": [],
        "refused": None,
    }
    try:
        found["points"] = list(points(architecture(arch)))
        found["classes"] = [type(network.get_submodule(name)).__name__ for name in found["points"]]
    except ModelError as error:
        found["refused"] = str(error).removeprefix(f"{arch}: ")
    return found | {"seconds": round(time.perf_counter() - began, 2)}


def fits(arch, size, instances):
    """Return whether a network can run all instances on images of a size."""
    if architecture(arch).refused_size(size) is not None:
        return False
    with OnMeta():
        network = create_model(arch).to("meta").eval()
    try:
        _empty(architecture(arch)).train()(torch.empty(2, 3, size, size, device="meta"))  # with auxiliary classifiers
        for instance in instances:
            network(torch.empty(2, 3, size, size, device="meta"), instance)
    except RuntimeError:
        return False
    return True


def compared(arch):
    """Compare a network with the library's own module.

    Few pixels make the gradients of batch norms ill-conditioned, so a network that is too far from the library's on small
    images is compared on larger ones.
    """
    instances = draw_instances(architecture(arch).points(), arch)
    size = next((size for size in SIZES if fits(arch, size, instances)), architecture(arch).image_size())
    for factor in (1, 2):
        ours, theirs, x_NCHW = pair(arch, factor * size if fits(arch, factor * size, ()) else size, 4 * factor)
        found = {"size": x_NCHW.shape[2], **compare_full(ours, theirs, x_NCHW)}
        used = sum(p.numel() for p in theirs.parameters() if p.grad is not None)  # not those of auxiliary classifiers
        found |= compare_instances(ours, theirs, x_NCHW, instances)
        cost = costs(ours, [FULL], x_NCHW.shape[1:])[FULL]
        found["params"] = abs(cost.params / used - 1)
        if all(found[name] <= BOUND for name in ERRORS):
            break
    return found


def survey(arch, largest):
    """Return everything about a network."""
    try:
        found = traced(arch)
    except UsageError as error:
        return nothing(arch) | {"refused": str(error)}
    if found["points"] and found["params"] <= largest * 1e6:
        began = time.perf_counter()
        try:
            found["apart"] = compared(arch)
        except Exception as error:  # noqa: BLE001  whatever a network raises is its result
            found["failed"] = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            traceback.print_exc()
        found["compared"] = round(time.perf_counter() - began, 1)
    return found


def complete(found, largest):
    """Return whether a result answers all that is asked."""
    return found is not None and (
        bool(found["refused"]) or not found["points"] or found["params"] > largest * 1e6 or "compared" in found
    )


def wrong(found):
    """Return what is wrong with a network's numbers."""
    if "failed" in found:
        return [found["failed"]]
    return [f"{name} {found['apart'][name]:.1e}" for name in ERRORS if "apart" in found and not found["apart"][name] <= BOUND]


def line(found):
    """Return the row of a table."""
    names = found["points"]
    shown = " ".join([*names[:3], "..", names[-1]] if len(names) > 4 else names)
    far = f"{max(found['apart'][name] for name in ERRORS[:6]):.0e}" if "apart" in found else ""
    cells = [found["arch"], len(names) or "-", found["norms"], found["refused"] or shown, f"{found['seconds']:.1f}", far]
    return f"| {' | '.join(map(str, [*cells, '; '.join(wrong(found))]))} |"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("--names", type=Path)
    parser.add_argument("--every", type=int)
    parser.add_argument("--largest", type=float, default=120.0)
    parser.add_argument("--table", action="store_true", help="print the table of the results alone")
    parser.add_argument("archs", nargs="*")
    options = parser.parse_args()
    names = options.names.read_text().split() if options.names else []
    names += [f"timm/{name}" for name in timm.list_models()[:: options.every]] if options.every else []
    names += options.archs
    known = {}
    if options.results.exists():
        known = {entry["arch"]: entry for entry in map(json.loads, options.results.read_text().splitlines())}
    warnings.simplefilter("ignore")
    torch.set_default_dtype(torch.float64)
    for arch in [] if options.table else names:
        if not complete(known.get(arch), options.largest):
            known[arch] = survey(arch, options.largest)
            with options.results.open("a") as file:
                file.write(json.dumps(known[arch]) + "\n")
            print(line(known[arch]), flush=True)
    print("\n| network | points | norms | first three and last point, or why it is refused | s | apart | wrong |")
    print("|---|---|---|---|---|---|---|")
    chosen = [known[arch] for arch in names or known if arch in known]
    for found in chosen:
        print(line(found))
    works = [found for found in chosen if found["points"] and not wrong(found)]
    five = sum(len(found["points"]) >= 5 for found in works)
    maps = [found for found in chosen if found["points"] or found["convolutions"] >= 6]
    print(f"\n{len(chosen)} networks: {len(works)} work, {five} of them with five points or more")
    print(f"{len(maps)} networks of maps (they have points, or six convolutions), {len(works) / len(maps):.0%} of which work")
    sys.exit(any(map(wrong, chosen)))


if __name__ == "__main__":
    main()
