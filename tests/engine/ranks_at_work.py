"""What the ranks of `test_distributed.py` do: each computes with the others, and rank 0 computes the same alone.

python ranks_at_work.py FILE
"""

import sys

import torch
import torch.nn.functional as F
from torch import nn

from sdpctl.cascade import Cascade
from sdpctl.data.loader import share_of
from sdpctl.engine.calibrate import calibrate
from sdpctl.engine.distributed import ALONE, the_ranks
from sdpctl.engine.evaluate import CascadeTally, ClassTally, evaluate, gather_logits
from sdpctl.engine.settings import DistillSettings, TrainSettings, WalkSettings
from sdpctl.engine.sync_bn import synchronised
from sdpctl.engine.teacher import Teacher
from sdpctl.engine.train import Trainer
from sdpctl.instance import FULL
from sdpctl.models import create_model
from sdpctl.sdpoint import draw_beside, draw_single, sdpoint_instances

TRAININGS = {
    "plain": {},
    "smooth": {"label_smoothing": 0.1},
    "mixup": {"mixup": 0.4, "label_smoothing": 0.1},
    "cutmix": {"cutmix": 1.0, "ema": 0.9},
    "weights": {"lr_body": 0.01},
    "distilled": {"distill": DistillSettings(temperature=2.0, weight=0.4), "label_smoothing": 0.1},
    "taught by a network": {"distill": DistillSettings(weight=1.0)},
}


def drawn(seed, count, images, classes=8):
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(images, 3, 16, 16, generator=generator), torch.randint(classes, (images,), generator=generator))
        for _ in range(count)
    ]


def network(dtype=torch.float32, classes=8):
    torch.manual_seed(2)
    model = create_model("resnet20", num_classes=classes).to(dtype)
    for bn in model.batch_norms.values():
        bn.running_mean.normal_(0, 0.1)
        bn.running_var.uniform_(0.5, 1.5)
    return model


def calibrated(ranks, count, settings):
    model = network().eval()
    batches = drawn(3, count, 6)[ranks.rank :: ranks.size]
    instances = sdpoint_instances(model, (0.5, 0.75))
    return calibrate(model, instances, batches, settings, ranks)


def statistics(ranks):
    cases = {
        "cumulative": (5, WalkSettings()),
        "fewer batches than ranks": (2, WalkSettings()),
        "ema": (5, WalkSettings(estimator="ema")),
        "ema, fewer batches than ranks": (2, WalkSettings(estimator="ema")),
        "kept": (4, WalkSettings(keep_full=True)),
    }
    found = {}
    for name, (count, settings) in cases.items():
        gathered = calibrated(ranks, count, settings)
        sides = {"mean": gathered.mean, "var": gathered.var}
        tensors = {f"{side}/{node}/{bn}": t for side, values in sides.items() for (node, bn), t in values.items()}
        found[name] = {"batches": gathered.batches, "images": gathered.images, "tensors": tensors}
    return found


def scores(ranks):
    model, found = network().eval(), {}
    instances = sdpoint_instances(model, (0.5, 0.75))
    kept = calibrated(ALONE, 2, WalkSettings())
    for images in (1, 2, 7, 20):
        ((x, labels),) = drawn(5, 1, images)
        x, labels, tally = x[ranks.rank :: ranks.size], labels[ranks.rank :: ranks.size], ClassTally(keeps=True)
        batches = [(x[i : i + 2], labels[i : i + 2]) for i in range(0, len(x), 2)]
        scored = evaluate(model, instances, batches, kept, tally=tally, ranks=ranks)
        rows = [(str(instance), score.images, score.top1, score.top5, score.loss) for instance, score in scored.items()]
        kept_of_all = [tensor.tolist() for tensor in tally.kept]
        found[images] = {"rows": rows, "images": tally.images, "by class": tally.top1(), "kept": kept_of_all}
    return found


def cascades(ranks):
    """Gather logits, and score cascades, of images that do not divide evenly; with one image, a rank has none."""
    model, found = network().eval(), {}
    chosen = [Cascade.parse(text) for text in ("stem@0.5:0.38/full", "mean/layer2.0@0.5~0.5:0.6/layer3.0@0.5:0.42/full")]
    instances = dict.fromkeys(member for cascade in chosen for member in cascade.members)
    kept = calibrated(ALONE, 2, WalkSettings())
    for images in (1, 2, 7, 20):
        ((x, labels),) = drawn(5, 1, images)
        x, labels, tally = x[ranks.rank :: ranks.size], labels[ranks.rank :: ranks.size], CascadeTally(chosen)
        batches = [(x[i : i + 2], labels[i : i + 2]) for i in range(0, len(x), 2)]
        logits_INK, labels_N = gather_logits(model, instances, batches, kept, ranks=ranks)
        evaluate(model, instances, batches, kept, ranks=ranks, cascades=tally)
        rows = [(score.images, score.top1, score.top5, score.loss, score.left) for score in tally.scores.values()]
        found[images] = {"logits": logits_INK, "labels": labels_N.tolist(), "rows": rows}
    return found


def trainings(ranks):
    found = {}
    for name, options in TRAININGS.items():
        model = network(torch.float64, classes=4)
        settings = TrainSettings(epochs=1, lr=0.05, sync_bn=True, **options)
        weights_K = torch.tensor([1.0, 2.0, 3.0, 0.5]) if name == "weights" else None
        pair = draw_beside((FULL,), model.points, (0.5,), seed=4, drawn=1)
        draw = pair if settings.distill else draw_single(model.points, (0.5,), seed=4)
        teacher = None
        if name == "taught by a network":
            given = [(x.double(), labels) for x, labels in drawn(9, 5, 8, classes=4)][ranks.rank :: ranks.size]
            teacher = Teacher(network(torch.float64, classes=4), given, ranks)
        trainer = Trainer(
            model, settings, draw, 3, seed=7, class_weights_K=weights_K, teacher=teacher, ranks=ranks, batch_size=8
        )
        part = share_of(8, ranks.rank, ranks.size)
        gradients = []
        for _ in trainer.steps((x.double()[part], labels[part]) for x, labels in drawn(6, 3, 8, classes=4)):
            gradients.append([parameter.grad.clone() for parameter in model.parameters()])
        state = {name: t.clone() for name, t in trainer.evaluated.state_dict().items()}
        found[name] = {"gradients": gradients, "state": state, "metrics": trainer.finish_epoch()}
    return found


def norms(ranks):
    """Normalise a map of parts of different sizes: output and gradients of this rank's part, and the running statistics."""
    found = {}
    for name, bn in {
        "usual": nn.BatchNorm2d(5),
        "a mean of all batches": nn.BatchNorm2d(5, momentum=None),
        "without weights": nn.BatchNorm2d(5, affine=False),
        "without running statistics": nn.BatchNorm2d(5, track_running_stats=False),
    }.items():
        bn = bn.double()
        generator = torch.Generator().manual_seed(8)
        part = share_of(7, ranks.rank, ranks.size)
        made = []
        for _ in range(2):
            x = (10 + torch.randn(7, 5, 3, 4, generator=generator, dtype=torch.float64))[part].requires_grad_()
            out = synchronised(ranks)(bn, x) if ranks.several else bn(x)
            slope = torch.randn(7, 5, 3, 4, generator=generator, dtype=torch.float64)[part]
            (out * slope).sum().backward()
            made += [out.detach(), x.grad]
        own = {key: parameter.grad for key, parameter in bn.named_parameters()}
        for gradient in own.values():
            ranks.add_up(gradient)
        found[name] = {"made": made, "gradients": own, "state": dict(bn.state_dict())}
    return found


def unsynchronised(ranks):
    """Take one step in which each rank normalises its part by itself; return the gradients."""
    model = network(torch.float64, classes=4)
    part = share_of(8, ranks.rank, ranks.size)
    trainer = Trainer(model, TrainSettings(epochs=1), lambda _: (FULL,), 1, ranks=ranks, batch_size=8)
    list(trainer.steps((x.double()[part], labels[part]) for x, labels in drawn(6, 1, 8, classes=4)))
    return [parameter.grad for parameter in model.parameters()]


def ghosts(ranks):
    """Return the same gradients of a plain loop: the parts of a batch pass the network one after another."""
    model = network(torch.float64, classes=4).train()
    ((x, labels),) = drawn(6, 1, 8, classes=4)
    for rank in range(ranks.size):
        part = share_of(8, rank, ranks.size)
        (F.cross_entropy(model(x.double()[part]).float(), labels[part], reduction="sum") / 8).backward()
    return [parameter.grad for parameter in model.parameters()]


if __name__ == "__main__":
    torch.set_num_threads(1)
    together = the_ranks()
    work = {"statistics": statistics, "scores": scores, "cascades": cascades, "trainings": trainings}
    done = {name: {"together": f(together)} for name, f in work.items()}
    done |= {"norms": {"together": norms(together)}, "unsynchronised": {"together": unsynchronised(together)}}
    if together.rank == 0:
        for name, f in (work | {"norms": norms}).items():
            done[name]["alone"] = f(ALONE)
        done["unsynchronised"]["alone"] = ghosts(together)
    torch.save(done, f"{sys.argv[1]}.{together.rank}")
    together.add_up(torch.zeros(1))  # rank 0 hosts the key-value store: nobody leaves before the others are done
