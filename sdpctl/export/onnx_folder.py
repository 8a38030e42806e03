"""The format onnx-folder: one ONNX graph for each instance, the weights once, and a program that runs them anywhere.

| file | content |
|---|---|
| instances.json | classes, input, and the instances and cascades with their cost, accuracy and graphs |
| run.py | picks an instance or a cascade within a budget, and runs it with onnxruntime, numpy and pillow, and nothing else |
| weights.bin | the tensors of all graphs, each once |
| SHA256SUMS | the hash of each file, as `sha256sum --check` reads it |
| graph0.onnx, ... | the graphs: of the instances in the order of the table, then those that only cascades need |
| card.md | the model card |

Batch norms are not folded into convolutions, so that the graphs have equal convolution weights; onnxruntime folds them when it
opens a graph. `sdpctl latency` and `run.py --latency` add latency.json.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor
from torch.export import ExportedProgram

from sdpctl.export import run_folder
from sdpctl.export.catalog import CARD, FORMATS
from sdpctl.export.format import CHUNK, SUMS, Format, Images, Logits, Source, sha256sums
from sdpctl.export.members import Member, member_graphs
from sdpctl.export.network import INPUT, OUTPUT, OneInstance, example, normalisation, trace
from sdpctl.export.onnx import program_to_onnx
from sdpctl.export.outside import ANSWER, run_program
from sdpctl.export.run_folder import TABLE

RUN, WEIGHTS = "run.py", "weights.bin"
SCHEMA = "sdpctl.onnx-folder/1"

LEAST = 256
"""Size in bytes from which a tensor is stored in the file of weights, and not in each graph."""

ALIGNED = 64
"""Alignment of a tensor in the file of weights, in bytes."""

_PROGRAM = f"""{ANSWER}
sys.modules |= dict.fromkeys(("onnx", "sdpctl", "torch"))  # an import of these fails
import run
network = run.Network()
images = numpy.load("images.npy")
chunks = [images[start : start + {CHUNK}] for start in range(0, len(images), {CHUNK})]
answer(numpy.stack([numpy.concatenate([call(chunk) for chunk in chunks]) for call in CALLS]))
"""
_INSTANCES = "[lambda x, name=row['instance']: network.run(x, name) for row in network.instances]"
_CASCADES = "[lambda x, row=row: network.run_cascade(x, row)[0] for row in network.cascades]"

_LOADING = """\
```python
from run import Network  # in this folder; needs Python 3.10, onnxruntime, numpy and pillow

network = Network()
chosen = network.pick(max_macs="50%")
logits = network.run(network.preprocess("photo.jpg"), chosen["instance"])
```

`python run.py photo.jpg --max-macs 50%` does the same. `python run.py --latency` measures all instances on this device and
writes `latency.json`, by which `--max-latency-ms 5` then chooses. `--cascade` runs a cascade, if there is one. Each graph also
runs alone in onnxruntime, beside `weights.bin`: it takes `images`, {images}, and returns `logits`. `instances.json` is the
table. `sha256sum --check SHA256SUMS` checks the files.
"""


class OnnxFolderFormat(Format):
    """A folder of one ONNX graph for each instance, with the weights once."""

    def write(self, source: Source) -> dict[str, bytes]:
        """Return the graphs, their weights, the table, the program and the card."""
        model, description = source.model, source.description
        graphs = _Graphs(source.opset)
        instances = []
        for option in description.options:
            one = OneInstance(model, option.instance, source.statistics, normalisation(description))
            file = graphs.add(trace(one, (example(description),)), [INPUT], [OUTPUT])
            instances.append(option.document() | {"file": file})
        cascades = [
            option.document() | {"averaged": option.cascade.averaged, "members": member_graphs(source, option, graphs.member)}
            for option in description.cascades
        ]
        described = description.document()
        keys = ("name", "classes", "input", "full_macs", "checkpoint", "statistics", "test_images", "heldout_images")
        table = {"schema": SCHEMA, "instances": instances, "cascades": cascades} | {key: described[key] for key in keys}
        files = {
            TABLE: f"{json.dumps(table, sort_keys=True, indent=1)}\n".encode(),
            RUN: Path(run_folder.__file__).read_bytes(),
            WEIGHTS: bytes(graphs.weights),
            **graphs.files,
            CARD: source.card.encode(),
        }
        return files | {SUMS: sha256sums(files)}

    def run(self, files: Mapping[str, bytes], images: Images) -> Logits:
        """Run every instance by the folder's own program in a process that can import neither this package nor torch."""
        return run_program(_PROGRAM.replace("CALLS", _INSTANCES), files, images)

    def run_cascades(self, files: Mapping[str, bytes], images: Images) -> Logits:
        """Run every cascade by the folder's own program, in the same way."""
        return run_program(_PROGRAM.replace("CALLS", _CASCADES), files, images)

    def loading(self, images: str) -> str:
        """Return how to run the folder by its own program."""
        return _LOADING.format(images=images)


class _Graphs:
    """Graphs that share the file of their weights.

    Args:
        opset: version of the ONNX operators; None for the exporter's own.

    Attributes:
        files: content of each graph by file name.
        weights: content of the file of weights.
    """

    def __init__(self, opset: int | None) -> None:
        self.files: dict[str, bytes] = {}
        self.weights = bytearray()
        self._opset = opset
        self._places: dict[bytes, int] = {}
        self._members: dict[object, str] = {}

    def add(self, program: ExportedProgram, inputs: list[str], outputs: list[str]) -> str:
        """Write a graph, and return the name of its file."""
        import onnx

        model = onnx.load_from_string(program_to_onnx(program, inputs, outputs, {}, self._opset, folded=False))
        del model.graph.value_info[:]  # onnxruntime infers the shapes between the operators
        for tensor in model.graph.initializer:
            if len(tensor.raw_data) >= LEAST:
                onnx.external_data_helper.set_external_data(tensor, WEIGHTS, self._place(tensor.raw_data), len(tensor.raw_data))
                tensor.ClearField("raw_data")
        graphs = FORMATS.find("onnx-folder").graphs
        assert graphs is not None
        file = graphs.format(len(self.files))
        self.files[file] = model.SerializeToString(deterministic=True)
        return file

    def member(self, member: Member, leaves: list[Tensor], inputs: list[str], outputs: list[str]) -> str:
        """Write the graph of a cascade's member, or find it: cascades share a graph that begins and hands out the same."""
        same = (member.one.instance, member.begin, member.kept)
        if same not in self._members:
            # The names in the table differ from cascade to cascade, so the graph numbers its inputs and outputs.
            taken = [f"taken{n}" for n in range(len(inputs))] if member.begin is not None else inputs
            given = [OUTPUT, *(f"given{n}" for n in range(len(outputs) - 1))]
            self._members[same] = self.add(trace(member, (leaves,)), taken, given)
        return self._members[same]

    def _place(self, content: bytes) -> int:
        """Return where a tensor begins in the file of weights, and store it there unless an equal tensor is stored."""
        digest = hashlib.sha256(content).digest()
        if digest not in self._places:
            self.weights += bytes(-len(self.weights) % ALIGNED)
            self._places[digest] = len(self.weights)
            self.weights += content
        return self._places[digest]
