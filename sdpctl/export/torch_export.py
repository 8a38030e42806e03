"""The format torch-export: one instance as a .pt2 file, which needs torch and nothing of this package."""

import io
import json
import warnings
from collections.abc import Callable, Mapping
from functools import partial

import torch

from sdpctl.export.catalog import CARD
from sdpctl.export.description import Description
from sdpctl.export.format import CHUNK, Format, Images, Logits, Source
from sdpctl.export.network import OneInstance, example, metadata, one_instance, trace
from sdpctl.export.outside import ANSWER, run_program

FILE = "model.pt2"

_ORIGINS = ("stack_trace", "nn_module_stack", "source_fn_stack", "torch_fn", "from_node")
"""Keys under which torch.export stores the source code of a node; they are removed, since they name local files."""

_PROGRAM = f"""{ANSWER}
import torch
run = torch.export.load("{FILE}").module()
images = torch.from_numpy(numpy.load("images.npy"))
with torch.inference_mode():
    logits = torch.cat([run(chunk) for chunk in images.split({CHUNK})])
if "sdpctl" in sys.modules:
    sys.exit("sdpctl was needed")
answer(logits)
"""

_LOADING = """\
```python
import torch

extra = {{"export.json": ""}}  # filled with the description
model = torch.export.load("FILE.pt2", extra_files=extra).module()
logits = model(images)  # {images}
```
"""


class TorchExportFormat(Format):
    """One instance as a .pt2 file."""

    def write(self, source: Source) -> dict[str, bytes]:
        """Return the .pt2 file and the card."""
        return {FILE: to_program(one_instance(source), source.description), CARD: source.card.encode()}

    def run(self, files: Mapping[str, bytes], images: Images) -> Logits:
        """Run the .pt2 file in a process that does not import this package."""
        return run_program(_PROGRAM, files, images)[None]

    def one_call(self, files: Mapping[str, bytes], image: Images) -> Callable[[], object]:
        """Load the .pt2 file, and return a call that runs one image."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The given buffer is not writable")  # torch 2.11 says this of its own buffer
            program = torch.export.load(io.BytesIO(files[FILE]))
        return partial(program.module(), torch.from_numpy(image))

    def loading(self, images: str) -> str:
        """Return how to load the .pt2 file with torch."""
        return _LOADING.format(images=images)


def to_program(network: OneInstance, description: Description) -> bytes:
    """Write a network as a .pt2 file, which `torch.export.load` reads; its member `export.json` holds the metadata."""
    program = trace(network, (example(description),))
    for node in program.graph.nodes:
        for key in _ORIGINS:
            node.meta.pop(key, None)
    content = io.BytesIO()  # torch writes the name of a file into the file
    torch.export.save(program, content, extra_files={"export.json": json.dumps(metadata(description), sort_keys=True)})
    return content.getvalue()
