"""The format onnx-cascade: a cascade as one ONNX graph for each member, with the policy and a program that runs them.

| file | content |
|---|---|
| policy.json | classes, input, and for each member its file, inputs, outputs, threshold, temperature and MACs |
| run.py | runs the cascade with onnxruntime and numpy, and nothing else |
| SHA256SUMS | the hash of each file, as `sha256sum --check` reads it |
| member0.onnx, ... | the graphs |
| card.md | the model card |

The first graph takes images. A later graph takes the state that an earlier graph hands out as an additional output, so that
what two members share is computed once.
"""

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from sdpctl.cascade import Cascade
from sdpctl.engine.cascade import Place, begins
from sdpctl.export.catalog import CARD
from sdpctl.export.format import CHUNK, SUMS, Format, Images, Logits, Source, sha256sums
from sdpctl.export.network import INPUT, OUTPUT, OneInstance, example, normalisation, trace
from sdpctl.export.onnx import program_to_onnx
from sdpctl.export.outside import ANSWER, run_program
from sdpctl.models.chain import batch_norm
from sdpctl.models.state import State, copied, tensors

POLICY, RUN, GRAPH = "policy.json", "run.py", "member{}.onnx"
SCHEMA = "sdpctl.onnx-cascade/1"

_RUN = '''\
"""Run this cascade: `classify` in a program, or `python run.py images.npy`. Needs onnxruntime and numpy, and nothing else.

Each image begins with the first member. If its highest probability is below the member's threshold, it goes on to the next
member, which continues what an earlier member computed.
"""

import json
import os
import sys
from pathlib import Path

import numpy as np

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
import onnxruntime

FOLDER = Path(__file__).resolve().parent
POLICY = json.loads((FOLDER / "policy.json").read_text(encoding="utf-8"))
MEMBERS = POLICY["members"]
SESSIONS = [onnxruntime.InferenceSession(FOLDER / m["file"], providers=["CPUExecutionProvider"]) for m in MEMBERS]


def classify(images_NCHW):
    """Return the probabilities of each image's classes, (N, K), and the number of the member that answered it, (N,)."""
    rows, known, total = np.arange(len(images_NCHW)), {"images": images_NCHW}, 0
    probabilities = np.zeros((len(rows), len(POLICY["classes"])))
    left = np.zeros(len(rows), np.int64)
    for number, (member, session) in enumerate(zip(MEMBERS, SESSIONS)):
        if not len(rows):
            break
        outputs = session.run(member["outputs"], {name: known[name] for name in member["inputs"]})
        known.update(zip(member["outputs"], outputs))
        logits = known.pop("logits").astype(np.float64) / member["temperature"]
        answer = np.exp(logits - logits.max(1, keepdims=True))
        answer /= answer.sum(1, keepdims=True)
        if POLICY["averaged"]:
            total = total + answer
            answer = total / (number + 1)
        leaves = np.full(len(rows), True) if member["threshold"] is None else answer.max(1) >= member["threshold"]
        probabilities[rows[leaves]], left[rows[leaves]] = answer[leaves], number
        rows, total = rows[~leaves], total[~leaves] if POLICY["averaged"] else 0
        needed = {name for later in MEMBERS[number + 1 :] for name in later["inputs"]}
        known = {name: value[~leaves] for name, value in known.items() if name in needed}
    return probabilities, left


if __name__ == "__main__":
    probabilities, left = classify(np.load(sys.argv[1]))
    for n, (answer, number) in enumerate(zip(probabilities, left)):
        likeliest, member = POLICY["classes"][answer.argmax()], MEMBERS[number]["instance"]
        print(f"{n}: {likeliest} ({answer.max():.2%}), by member {number}, {member}")
    macs = np.cumsum([member["macs"] for member in MEMBERS])[left]
    print(f"{macs.mean():,.0f} MACs an image on average, {macs.mean() / POLICY['full_macs']:.1%} of `full`")
'''

_PROGRAM = f"""{ANSWER}
import run
images = numpy.load("images.npy")
chunks = [images[start : start + {CHUNK}] for start in range(0, len(images), {CHUNK})]
probabilities = numpy.concatenate([run.classify(chunk)[0] for chunk in chunks])
if "sdpctl" in sys.modules:
    sys.exit("sdpctl was needed")
answer(torch.from_numpy(probabilities)[None])
"""

_LOADING = """\
```python
import run  # in this folder; needs onnxruntime and numpy, and nothing else

probabilities, left = run.classify(images)  # {images}
```

`left` says which member answered each image. `python run.py images.npy` does the same for the images of a file. `policy.json`
has the classes, and for each member its file, inputs, outputs, threshold, temperature and MACs.
`sha256sum --check SHA256SUMS` checks the files.
"""


class OnnxCascadeFormat(Format):
    """A cascade as a folder of ONNX graphs."""

    def write(self, source: Source) -> dict[str, bytes]:
        """Return the graphs, the policy, the program and the card."""
        (option,) = source.description.cascades
        graphs, members = _graphs(source, option.cascade)
        policy = {
            "schema": SCHEMA,
            "averaged": option.cascade.averaged,
            "members": [
                member | {"threshold": threshold, "temperature": temperature, "macs": macs}
                for member, threshold, temperature, macs in zip(
                    members,
                    (*option.cascade.thresholds, None),
                    option.cascade.temperatures,
                    option.member_macs,
                    strict=True,
                )
            ],
            "figures": option.document(),
        }
        described = source.description.document()
        policy |= {key: described[key] for key in ("name", "classes", "input", "full_macs", "checkpoint", "statistics")}
        text = json.dumps(policy, sort_keys=True, indent=1)
        files = {POLICY: f"{text}\n".encode(), RUN: _RUN.encode(), **graphs, CARD: source.card.encode()}
        return files | {SUMS: sha256sums(files)}

    def run(self, files: Mapping[str, bytes], images: Images) -> Logits:
        """Run the cascade by its own program in a separate process, which does not import this package.

        Returns:
            Probabilities, (1, N, K).
        """
        return run_program(_PROGRAM, files, images)

    def loading(self, images: str) -> str:
        """Return how to run the cascade by its own program."""
        return _LOADING.format(images=images)


class _Member(nn.Module):
    """One member: from images or from an earlier member's state to logits and the states that later members need.

    Args:
        one: the member as a network of its own.
        begin: number of the segment whose result, before any shrinking, the member takes; None if it takes images.
        spec: structure of what the member takes.
        kept: numbers of the segments whose results, before any shrinking, later members need.
    """

    def __init__(self, one: OneInstance, begin: int | None, spec: TreeSpec, kept: tuple[int, ...]) -> None:
        super().__init__()
        self.one, self.begin, self.spec, self.kept = one, begin, spec, kept

    def passed(self, state: State) -> tuple[Tensor, dict[int, State]]:
        """Return the logits, and the states that later members need, by segment."""
        kept: dict[int, State] = {}
        if self.begin is None:
            state = self.one.network.begun(self.one.normalised(state))
        for level, segment in enumerate(self.one.network.segments()):
            if self.begin is not None and level < self.begin:
                continue
            if level != self.begin:
                state = segment.body(state, batch_norm)
            if level in self.kept:
                kept[level] = copied(state)  # the shrink may modify it in place
            if segment.shrink is not None and segment.point is not None:
                state = segment.shrink(state, self.one.instance.ratio(segment.point))
        assert isinstance(state, Tensor)
        return state, kept

    def forward(self, taken: list[Tensor]) -> list[Tensor]:
        """Return the logits, and the tensors of the states that later members need."""
        logits_NK, kept = self.passed(tree_unflatten(taken, self.spec))
        return [logits_NK, *(tensor for level in self.kept for tensor in tensors(kept[level]))]


def _graphs(source: Source, cascade: Cascade) -> tuple[dict[str, bytes], list[dict[str, Any]]]:
    """Return the graph of each member by file name, and the entry of each member in the policy."""
    model, description = source.model, source.description
    places = [None, *begins(cascade, model)]
    # The states that are handed out, each of two images, with the names of their tensors, by member and segment.
    states: dict[Place | None, tuple[State, list[str]]] = {None: (example(description), [INPUT])}
    graphs, members = {}, []
    for number, (instance, begin) in enumerate(zip(cascade.members, places, strict=True)):
        kept = tuple(sorted({place.level for place in places if place is not None and place.member == number}))
        one = OneInstance(model, instance, source.statistics, normalisation(description))
        taken, inputs = states[begin]
        leaves, spec = tree_flatten(taken)
        member = _Member(one, None if begin is None else begin.level, spec, kept)
        outputs = [OUTPUT]
        with torch.no_grad():
            handed_out = member.passed(copied(taken))[1]
        for level, state in handed_out.items():
            point = model.segments()[level].point
            names = [f"state{number}.{point}.{leaf}" for leaf in range(len(tensors(state)))]
            states[Place(number, level)] = state, names
            outputs += names
        file = GRAPH.format(number)
        graphs[file] = program_to_onnx(trace(member.eval(), (leaves,)), inputs, outputs, {}, source.opset)
        members.append({"file": file, "instance": str(instance), "inputs": inputs, "outputs": outputs})
    return graphs, members
