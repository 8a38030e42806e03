"""The format onnx-cascade: a cascade as one ONNX graph for each member, with the policy and a program that runs them.

| file | content |
|---|---|
| policy.json | classes, input, and for each member its file, inputs, outputs, threshold, temperature and MACs |
| run.py | runs the cascade with onnxruntime and numpy, and nothing else |
| SHA256SUMS | the hash of each file, as `sha256sum --check` reads it |
| member0.onnx, ... | the graphs |
| card.md | the model card |
"""

import inspect
import json
from collections.abc import Mapping

from torch import Tensor

from sdpctl.export.catalog import CARD
from sdpctl.export.format import CHUNK, SUMS, Format, Images, Logits, Source, sha256sums
from sdpctl.export.members import Member, member_graphs
from sdpctl.export.network import trace
from sdpctl.export.onnx import program_to_onnx
from sdpctl.export.outside import ANSWER, run_program
from sdpctl.export.run_folder import run_cascade

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
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
import onnxruntime

FOLDER = Path(__file__).resolve().parent
POLICY = json.loads((FOLDER / "policy.json").read_text(encoding="utf-8"))
MEMBERS = POLICY["members"]
OPTIONS = onnxruntime.SessionOptions()
# Otherwise the threads of a member wait in a loop after a call, and take the cores from the next member.
OPTIONS.add_session_config_entry("session.force_spinning_stop", "1")
CPU = ["CPUExecutionProvider"]
SESSIONS = {m["file"]: onnxruntime.InferenceSession(FOLDER / m["file"], OPTIONS, providers=CPU) for m in MEMBERS}


{run_cascade}


def classify(images_NCHW):
    """Return the probabilities of each image's classes, (N, K), and the number of the member that answered it, (N,)."""
    return run_cascade(images_NCHW, MEMBERS, POLICY["averaged"], len(POLICY["classes"]), SESSIONS.__getitem__)


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
answer(probabilities[None])
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
        graphs: dict[str, bytes] = {}

        def write(member: Member, leaves: list[Tensor], inputs: list[str], outputs: list[str]) -> str:
            file = GRAPH.format(len(graphs))
            graphs[file] = program_to_onnx(trace(member, (leaves,)), inputs, outputs, {}, source.opset)
            return file

        policy = {
            "schema": SCHEMA,
            "averaged": option.cascade.averaged,
            "members": member_graphs(source, option, write),
            "figures": option.document(),
        }
        described = source.description.document()
        policy |= {key: described[key] for key in ("name", "classes", "input", "full_macs", "checkpoint", "statistics")}
        text = json.dumps(policy, sort_keys=True, indent=1)
        files = {
            POLICY: f"{text}\n".encode(),
            RUN: _RUN.replace("{run_cascade}\n", inspect.getsource(run_cascade)).encode(),
            **graphs,
            CARD: source.card.encode(),
        }
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
