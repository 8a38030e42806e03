"""Run the networks of this folder: `python run.py --help`. Needs onnxruntime, numpy and pillow, and nothing else.

`python run.py IMAGE... --max-macs 50%` classifies images by the most accurate network within a budget. In a program:

    from run import Network

    network = Network()
    chosen = network.pick(max_macs="50%")
    logits = network.run(network.preprocess("photo.jpg"), chosen["instance"])
"""

import argparse
import json
import os
import platform
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from PIL import Image

TABLE, LATENCY = "instances.json", "latency.json"
LATENCY_SCHEMA = "sdpctl.latency-table/1"
WARMUP, REPEATS = 3, 30
"""Number of calls that do not count in a measurement, and of calls that count."""

_BUDGET = re.compile(r"(\d+(?:\.\d*)?|\.\d+)\s*(%|[kMG]?)", re.ASCII)
_UNITS = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9}
# Pillow's transpositions by EXIF orientation, whose tag is 274.
_UPRIGHT = {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}


def cpu_name() -> str:
    """Return the name of this machine's processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith(("model name", "Model", "Hardware")))
    return next(filter(None, named), "") or platform.processor() or platform.machine()


def cores() -> int:
    """Return the number of processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def machine(library: str, threads: int, device: str = "", precision: str = "fp32") -> dict[str, Any]:
    """Return what a latency depends on, except for the network.

    Args:
        library: name and version of the library that runs the network.
        threads: number of its threads.
        device: name of the device; by default that of the processor.
        precision: precision of the computation.
    """
    return {
        "device": device or cpu_name(),
        "cores": cores(),
        "threads": threads,
        "library": library,
        "precision": precision,
    }


def machine_text(measured_on: Mapping[str, Any]) -> str:
    """Return a machine as words, such as `Cortex-A76 (4 cores, 4 threads, onnxruntime 1.22.0, fp32)`."""
    counts = ", ".join(
        f"{measured_on[key]} {key if measured_on[key] != 1 else key.rstrip('s')}" for key in ("cores", "threads")
    )
    return f"{measured_on['device']} ({counts}, {measured_on['library']}, {measured_on['precision']})"


def measured(calls: Mapping[str, Callable[[], object]], repeats: int = REPEATS, warmup: int = WARMUP) -> dict[str, list[float]]:
    """Measure some calls, which take turns, so that a machine that slows down slows down all of them.

    Args:
        calls: the calls by name.
        repeats: number of measurements of each call.
        warmup: number of calls before, which do not count.

    Returns:
        Milliseconds of each counted call by name.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(warmup + repeats):
        for name, call in calls.items():
            began = time.perf_counter()
            call()
            times[name].append(1000 * (time.perf_counter() - began))
    return {name: values[warmup:] for name, values in times.items()}


def latency_row(instance: str, batch: int, milliseconds: Sequence[float]) -> dict[str, Any]:
    """Return the row of a network in a table of latencies, given the milliseconds of each call with a batch of images."""
    median, p95 = (float(np.percentile(milliseconds, share)) for share in (50, 95))
    speed = 1000 * batch / median
    return {"instance": instance, "batch": batch, "median_ms": median, "p95_ms": p95, "images_per_second": speed}


def run_cascade(
    images_NCHW: Any, members: Sequence[Mapping[str, Any]], averaged: bool, classes: int, session_of: Callable[[str], Any]
) -> tuple[Any, Any]:
    """Run a cascade: an image whose highest probability is below a member's threshold goes on to the next member.

    Args:
        images_NCHW: images as the first graph takes them.
        members: file, inputs, outputs, threshold, temperature of each member.
        averaged: whether the probabilities of all members so far are averaged.
        classes: number of classes.
        session_of: returns the session of a file.

    Returns:
        The probabilities of each image's classes, (N, K), and the number of the member that answered it, (N,).
    """
    rows, known, total = np.arange(len(images_NCHW)), {"images": images_NCHW}, np.zeros((len(images_NCHW), classes))
    probabilities = np.zeros((len(rows), classes))
    left = np.zeros(len(rows), np.int64)
    for number, member in enumerate(members):
        if not len(rows):
            break
        session = session_of(member["file"])
        given = (known[name] for name in member["inputs"])
        outputs = session.run(None, {taken.name: value for taken, value in zip(session.get_inputs(), given, strict=True)})
        known.update(zip(member["outputs"], outputs, strict=True))
        logits = known.pop("logits").astype(np.float64) / member["temperature"]
        answer = np.exp(logits - logits.max(1, keepdims=True))
        answer /= answer.sum(1, keepdims=True)
        if averaged:
            total = total + answer
            answer = total / (number + 1)
        leaves = np.full(len(rows), True) if member["threshold"] is None else answer.max(1) >= member["threshold"]
        probabilities[rows[leaves]], left[rows[leaves]] = answer[leaves], number
        rows, total = rows[~leaves], total[~leaves]
        needed = {name for later in members[number + 1 :] for name in later["inputs"]}
        known = {name: value[~leaves] for name, value in known.items() if name in needed}
    return probabilities, left


class UserError(Exception):
    """Something that the user can mend; the message says how."""


class Network:
    """The networks of a folder: instances of the same weights, and cascades of them.

    Args:
        folder: the folder; by default that of this program.
        threads: number of threads of onnxruntime; by default one for each core that this process may use.
    """

    def __init__(self, folder: "Path | str | None" = None, threads: "int | None" = None) -> None:
        self.folder, self.threads = Path(folder or Path(__file__).resolve().parent), threads or cores()
        self.table: dict[str, Any] = json.loads((self.folder / TABLE).read_text(encoding="utf-8"))
        self.instances: list[dict[str, Any]] = self.table["instances"]
        self.cascades: list[dict[str, Any]] = self.table["cascades"]
        self._sessions: dict[str, Any] = {}

    @property
    def machine(self) -> dict[str, Any]:
        """What a latency depends on here."""
        import onnxruntime

        return machine(f"onnxruntime {onnxruntime.__version__}", self.threads)

    def session(self, file: str) -> Any:
        """Return the session of a graph; it is opened when it is first used."""
        if file not in self._sessions:
            os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
            import onnxruntime

            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = self.threads
            # Otherwise the threads of a graph wait in a loop after a call, and take the cores from the next graph.
            options.add_session_config_entry("session.force_spinning_stop", "1")
            path = str(self.folder / file)
            self._sessions[file] = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        return self._sessions[file]

    def named(self, instance: str) -> dict[str, Any]:
        """Return the row of an instance."""
        for row in self.instances:
            if row["instance"] == instance:
                return row
        names = ", ".join(row["instance"] for row in self.instances)
        raise UserError(f"there is no instance {instance}; there are {names}")

    def macs(self, budget: str) -> int:
        """Return the maximum number of MACs for `50%` (of `full`), `1.2G`, `350M` or a number."""
        match = _BUDGET.fullmatch(budget.strip())
        amount = (
            Fraction(match[1]) * (Fraction(self.table["full_macs"], 100) if match[2] == "%" else _UNITS[match[2]])
            if match
            else 0
        )
        if amount <= 0:
            raise UserError(f"{budget} is not a budget; write a share of full as 50%, or MACs as 1.2G, 350M or a number")
        return int(amount)

    def pick(self, max_macs: "str | None" = None, max_latency_ms: "float | None" = None) -> dict[str, Any]:
        """Return the row of the most accurate instance on held-out images within the budgets; of equals the cheapest."""
        within, limits = self.instances, []
        if max_macs is not None:
            limit = self.macs(max_macs)
            within = [row for row in within if row["macs"] <= limit]
            limits.append(f"{limit:,} MACs")
        if max_latency_ms is not None:
            times = self.latencies()
            within = [row for row in within if times[row["instance"]] <= max_latency_ms]
            limits.append(f"{max_latency_ms:g} ms")
        if not within:
            text = f"the cheapest, {self.instances[0]['instance']}, takes {self.instances[0]['macs']:,} MACs"
            if max_latency_ms is not None:
                quickest = min(times, key=lambda name: times[name])
                text += f", the quickest, {quickest}, {times[quickest]:.3g} ms"
            raise UserError(f"no instance is within {' and '.join(limits)}; {text}")
        if any(row["heldout_top1"] is None for row in within):
            raise UserError("there is no accuracy on held-out images to choose by; name an --instance")
        return max(within, key=lambda row: (row["heldout_top1"], -row["macs"]))

    def pick_cascade(self, max_macs: "str | None" = None) -> dict[str, Any]:
        """Return the most accurate cascade on held-out images whose mean MACs there are within the budget."""
        if not self.cascades:
            raise UserError("this folder has no cascade; leave --cascade out")
        limit = self.cascades[-1]["heldout_macs"] if max_macs is None else self.macs(max_macs)
        within = [row for row in self.cascades if row["heldout_macs"] <= limit]
        if not within:
            least = self.cascades[0]
            text = f"the cheapest, {least['cascade']}, takes {least['heldout_macs']:,} MACs on average"
            raise UserError(f"no cascade is within {limit:,} MACs on average; {text}")
        return max(within, key=lambda row: (row["heldout_top1"], -row["heldout_macs"]))

    def run(self, images_NCHW: Any, instance: str) -> Any:
        """Return logits, (N, K), of images as `preprocess` returns them."""
        return self.session(self.named(instance)["file"]).run(None, {"images": images_NCHW})[0]

    def run_cascade(self, images_NCHW: Any, cascade: Mapping[str, Any]) -> tuple[Any, Any]:
        """Return probabilities, (N, K), and the number of the member that answered each image, (N,)."""
        return run_cascade(images_NCHW, cascade["members"], cascade["averaged"], len(self.table["classes"]), self.session)

    def blank(self, batch: int) -> Any:
        """Return blank images as the graphs take them."""
        takes = self.table["input"]
        shape = (batch, len(takes["mean"]), takes["size"], takes["size"])
        return np.zeros(shape, np.uint8 if takes["raw"] else np.float32)

    def preprocess(self, path: "Path | str") -> Any:
        """Return the image of a file as the graphs take it, (1, C, H, W): upright, scaled, cropped and normalised."""
        from PIL import Image

        takes = self.table["input"]
        try:
            with Image.open(path) as opened:
                image = _upright(opened).convert("RGB" if len(takes["mean"]) == 3 else "L")
        except Exception as error:
            raise UserError(f"{path}: this image cannot be read ({' '.join(str(error).split())})") from error
        size, short = takes["size"], min(image.size)
        width, height = (takes["resize"] if side == short else int(takes["resize"] * side / short) for side in image.size)
        if (width, height) != image.size:
            image = image.resize((width, height), Image.Resampling[takes.get("interpolation", "bilinear").upper()])
        x, y = (round((side - size) / 2) for side in image.size)
        pixels = np.asarray(image.crop((x, y, x + size, y + size)))
        pixels_NCHW = np.ascontiguousarray(pixels.reshape(1, size, size, -1).transpose(0, 3, 1, 2))
        if takes["raw"]:
            return pixels_NCHW
        mean, std = (np.array(takes[key], np.float32).reshape(1, -1, 1, 1) for key in ("mean", "std"))
        return (pixels_NCHW / np.float32(255) - mean) / std

    def latencies(self) -> dict[str, float]:
        """Return the milliseconds per image of each instance from latency.json, which must have been measured here."""
        advice = "`python run.py --latency` measures on this device"
        try:
            document = json.loads((self.folder / LATENCY).read_text(encoding="utf-8"))
            there = document["machine"]
            batch = min(row["batch"] for row in document["rows"])
            times = {row["instance"]: float(row["median_ms"]) for row in document["rows"] if row["batch"] == batch}
            text = machine_text(there)
        except FileNotFoundError:
            raise UserError(f"the latency was not measured; {advice}") from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{LATENCY}: this table cannot be understood ({type(error).__name__}); {advice}") from error
        if there != self.machine:
            raise UserError(f"{LATENCY} was measured on {text}, and this is {machine_text(self.machine)}; {advice}")
        if missing := [row["instance"] for row in self.instances if row["instance"] not in times]:
            raise UserError(f"{LATENCY} has no row of {missing[0]}; {advice}")
        return times

    def measure(
        self, batches: Sequence[int] = (1,), repeats: int = REPEATS, names: "Sequence[str] | None" = None
    ) -> dict[str, Any]:
        """Measure the latency of instances on this device, and return the table for latency.json.

        Args:
            batches: numbers of images of a call.
            repeats: number of calls that count.
            names: the instances; all by default.
        """
        rows = []
        for batch in batches:
            images_NCHW = self.blank(batch)
            sessions = {
                name: self.session(self.named(name)["file"]) for name in names or [row["instance"] for row in self.instances]
            }
            calls = {name: lambda s=session: s.run(None, {"images": images_NCHW}) for name, session in sessions.items()}  # noqa: B023  called at once
            rows += [latency_row(name, batch, times) for name, times in measured(calls, repeats).items()]
        return {"schema": LATENCY_SCHEMA, "machine": self.machine, "rows": rows}


def _upright(image: "Image.Image") -> "Image.Image":
    """Return an image that is turned as its EXIF block says, with eight bits per channel."""
    from PIL import Image

    image.load()
    turn = _UPRIGHT.get(image.getexif().get(274, 1))
    if image.mode.startswith("I"):  # Pillow would clip the values
        values = np.asarray(image)
        if image.mode != "I" or image.format in ("PNG", "PPM") or values.max() > 255:
            values = values >> 8
        image = Image.fromarray(values.astype(np.uint8))
    elif image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image if turn is None else image.transpose(Image.Transpose(turn))


def shown(text: object) -> str:
    """Return text with its control characters escaped, so that a terminal does not obey them."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def _say(text: str) -> None:
    sys.stdout.write(f"{shown(text)}\n")


def _measure(network: Network) -> None:
    document = network.measure()
    _say(f"{machine_text(document['machine'])}, one image a call")
    for row in document["rows"]:
        macs = network.named(row["instance"])["macs"]
        _say(f"{row['instance']}: median {row['median_ms']:.3f} ms, p95 {row['p95_ms']:.3f} ms, {macs:,} MACs")
    staged = network.folder / f".{LATENCY}.{os.getpid()}"
    try:
        staged.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        staged.replace(network.folder / LATENCY)
    except OSError as error:
        raise UserError(f"{LATENCY} cannot be written ({error.strerror}); make this folder writable") from error


def _classify(network: Network, said: argparse.Namespace) -> None:
    classes, spent = network.table["classes"], 0
    if said.cascade:
        cascade = network.pick_cascade(said.max_macs)
        _say(f"cascade {cascade['cascade']}")
    else:
        chosen = network.named(said.instance) if said.instance else network.pick(said.max_macs, said.max_latency_ms)
        _say(f"instance {chosen['instance']}: {chosen['macs']:,} MACs, {chosen['relative']:.1%} of full")
    for path in said.images:
        image_NCHW = network.preprocess(path)
        if said.cascade:
            (answer,), (left,) = network.run_cascade(image_NCHW, cascade)
            spent += sum(member["macs"] for member in cascade["members"][: left + 1])
            by = f", by {cascade['members'][left]['instance']}"
        else:
            (logits,), by = network.run(image_NCHW, chosen["instance"]).astype(np.float64), ""
            answer = np.exp(logits - logits.max())
            answer /= answer.sum()
        top = ", ".join(f"{classes[k]} {answer[k]:.2%}" for k in np.argsort(-answer, kind="stable")[:5])
        _say(f"{path}: {top}{by}")
    if said.cascade:
        mean = spent / len(said.images)
        _say(f"{mean:,.0f} MACs an image on average, {mean / network.table['full_macs']:.1%} of full")


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="run.py", description="Classify images by a network within a budget.")
    parser.add_argument("images", metavar="IMAGE", nargs="*", help="image files")
    parser.add_argument("--max-macs", metavar="BUDGET", help="maximum cost of an image: 50%%, 1.2G, or a number of MACs")
    parser.add_argument("--max-latency-ms", metavar="MS", type=float, help="maximum milliseconds of an image; see --latency")
    parser.add_argument("--instance", help="the instance to run, whatever it costs")
    parser.add_argument("--cascade", action="store_true", help="run a cascade; --max-macs limits its mean cost")
    parser.add_argument("--latency", action="store_true", help=f"measure all instances on this device and write {LATENCY}")
    parser.add_argument("--threads", type=int, metavar="N", help="threads of onnxruntime; by default one for each core")
    said = parser.parse_args()
    budgets = [said.max_macs is not None, said.max_latency_ms is not None]
    if said.threads is not None and said.threads < 1:
        parser.error("--threads must be at least 1")
    if said.latency == bool(said.images):
        parser.error("give images, or --latency without images")
    if (said.instance is not None and (any(budgets) or said.cascade)) or (
        said.latency and (any(budgets) or said.instance or said.cascade)
    ):
        parser.error("--instance, --latency, and a choice within budgets exclude each other")
    if said.cascade and said.max_latency_ms is not None:
        parser.error("the latency of a cascade depends on the images; choose it by --max-macs")
    try:
        network = Network(threads=said.threads)
        _measure(network) if said.latency else _classify(network, said)
    except ImportError as error:
        sys.exit(f"run.py: {error}; pip install onnxruntime numpy pillow")
    except UserError as error:
        sys.exit(f"run.py: {shown(error)}")
    except Exception as error:  # noqa: BLE001  onnxruntime's exceptions have no common class
        sys.exit(f"run.py: {shown(' '.join(str(error).split()))}; check this folder with `sha256sum --check SHA256SUMS`")


if __name__ == "__main__":
    main()
