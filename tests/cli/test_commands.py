"""The commands, and the options of each: a new one is written down here, and one that goes missing is noticed."""

import inspect

import pytest
import typer.main
from command import called

from sdpctl.cli import app
from sdpctl.cli.command import SHARED, Session, command

READS = ["--store", "--json", "--quiet -q"]
COMPUTES = ["--set", *READS, "--verbose -v"]
WRITES = ["--set", "--force", "--dry-run", *READS, "--verbose -v"]
INSTANCES = ["--instances", "--from-search", "--batches"]
PROFILE = ["--image-size", "--num-classes", "--stem", "--ratios", "--instances", "--per-segment"]
SEARCH = ["--max-macs", "--strategy", "--compare", "--seeds", "--evaluations", "--ratios", "--points"]
SEARCH += ["--budgets", "--agent", "--cascade", "--storage"]
BUDGET = ["--instance", "--max-macs", "--max-latency-ms"]
EXPORT = ["--from-search", "--instances", "--raw-input", "--output -o", "--no-calibrate"]
COMMANDS = {
    "init": ["folder", "--output -o", "--force", "--dry-run", "--json", "--quiet -q"],
    "run": ["recipe", "--sort", "--csv", *WRITES],
    "train": ["recipe", "--resume", *WRITES],
    "calibrate-bn": ["ref", *INSTANCES, *WRITES],
    "eval-instances": ["ref", *INSTANCES, "--split", "--by-class", "--sort", "--csv", *WRITES],
    "eval": ["ref", *INSTANCES, "--split", "--by-class", "--sort", "--csv", *WRITES],
    "search": ["ref", *SEARCH, "--csv", *WRITES],
    "profile-flops": ["what", *PROFILE, "--sort", "--csv", *WRITES],
    "export": [
        "ref",
        "--format",
        *BUDGET,
        "--from-search",
        "--instances",
        "--raw-input",
        "--precision",
        "--max-drop",
        "--opset",
        "--check",
        "--output -o",
        "--no-calibrate",
        *WRITES,
    ],
    "report": ["refs", "--format", "--output -o", "--latency", *WRITES],
    "import": ["file", "--arch", "--timm", "--torchvision", "--ema", "--set", "--dry-run", *READS, "--verbose -v"],
    "predict": ["ref", "images", *BUDGET, "--cascade", "--no-calibrate", *COMPUTES],
    "latency": ["files", "--batch", "--threads", "--repeats", "--instances", "--csv", "--force", "--json", "--quiet -q"],
    "models": ["pattern", "--points", "--image-size", "--json"],
    "doctor": READS,
    "recipe ls": ["folder", "--json"],
    "recipe show": ["recipe", "--set", "--json"],
    "recipe schema": [],
    "store ls": READS,
    "store show": ["ref", "--layer", *READS],
    "store tag": ["ref", "name", *READS],
    "store rm": ["name", "--dry-run", *READS],
    "store push": ["ref", "address", "--recursive -r", "--plain-http", "--force", "--dry-run", *READS],
    "store pull": ["address", "tag", "--recursive -r", "--plain-http", "--force", "--dry-run", *READS],
    "store verify": READS,
    "store gc": ["--untagged", "--grace", "--dry-run", *READS],
}
"""Arguments and options of each command in the order in which `--help` lists them."""


def commands(group, name=""):
    """Yield the words and the command of each command that a group holds."""
    for word, inner in group.commands.items():
        words = f"{name} {word}".strip()
        if hasattr(inner, "commands"):
            yield from commands(inner, words)
        else:
            yield words, inner


def test_the_commands_and_their_options_are_these():
    root = typer.main.get_command(app)
    found = {
        words: [" ".join(parameter.opts) for parameter in inner.params if parameter.name != "help"]
        for words, inner in commands(root)
    }
    assert found == COMMANDS
    assert list(found) == list(COMMANDS)
    assert [word for word, inner in root.commands.items() if inner.hidden] == ["eval"]


@pytest.fixture
def seen():
    """A command with every shared option and an argument of its own, and the list of its calls."""
    calls = []

    @command("seen", *SHARED)
    def seen(session: Session, ref: str, often: int = 1) -> None:
        """See."""
        calls.append((session, ref, often))

    return seen, calls


def test_shared_options_follow_the_own_parameters_of_a_command(seen):
    function, _ = seen
    parameters = inspect.signature(function).parameters
    assert list(parameters) == ["ref", "often", *SHARED]
    assert function.__annotations__ == {name: parameter.annotation for name, parameter in parameters.items()}


def test_a_session_holds_what_the_shared_options_say(seen, tmp_path):
    function, calls = seen
    cli = typer.Typer()
    cli.command()(function)
    words = ["x", "--often", "2", "--set", "a=1", "--set", "b=2", "--force", "--store", str(tmp_path), "--sort", "loss", "-q"]
    typer.main.get_command(cli).main([*words, "--csv", str(tmp_path / "a.csv")], standalone_mode=False)
    ((session, ref, often),) = calls
    assert (ref, often) == ("x", 2)
    assert (session.command, session.store, session.overrides) == ("seen", tmp_path, ("a=1", "b=2"))
    assert (session.force, session.dry_run, session.sort, session.csv) == (True, False, "loss", tmp_path / "a.csv")
    assert session.output.mode == "quiet"


@pytest.mark.parametrize("words", [["run", "x.yaml"], ["search", "x"], ["eval", "x"], ["profile-flops", "resnet18"]])
def test_the_path_of_a_csv_file_is_checked_before_any_work(tmp_path, words):
    done = called(tmp_path, *words, "--csv", "nowhere/x.csv")
    assert done.returncode == 2
    assert done.stderr.startswith("sdpctl: nowhere/x.csv: there is no folder nowhere")
