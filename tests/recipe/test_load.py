"""Reading recipes: what a recipe may say, and where errors point."""

import os
from pathlib import Path

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from sdpctl.errors import RecipeError, UsageError
from sdpctl.export.catalog import FORMATS
from sdpctl.recipe.load import dump_yaml, load_recipe, parse_recipe
from sdpctl.recipe.schema import STORED_DEFAULTS

HEAD = "name: a\nmodel: {arch: resnet20}\ndata: {dataset: cifar10}\n"
"""Three lines that make a recipe; what a test adds begins in line 4."""

RESNET20_POINTS = "stem, layer1.0, layer1.1, layer1.2, layer2.0, layer2.1, layer2.2, layer3.0, layer3.1, layer3.2"


def parse(text, *overrides):
    return parse_recipe(text, "r.yaml", overrides)


def problems(text, *overrides):
    with pytest.raises(RecipeError) as caught:
        parse(text, *overrides)
    assert caught.value.exit_code == 3
    assert str(caught.value).splitlines() == caught.value.problems
    return caught.value.problems


def test_values_reach_the_recipe():
    text = "train: {weight_decay: 1e-4, epochs: 0x1F, milestones: [1, 2]}\nsdpoint: off\nseed: 0o17\n"
    recipe = parse(HEAD + text)
    assert recipe.train.weight_decay == 0.0001
    assert (recipe.train.epochs, recipe.train.milestones, recipe.seed) == (31, (1, 2), 15)
    assert recipe.sdpoint is None
    assert parse(HEAD.replace("name: a", "name: no")).name == "no"


def test_a_share_may_be_a_percentage():
    assert parse(HEAD, "data.holdout=10%").data.holdout == parse(HEAD, "data.holdout=0.1").data.holdout


ONE_PROBLEM = {
    "a key given twice": ("seed: 1\nseed: 2\n", "5:1: seed: this key is given twice; the first is at r.yaml:4:1"),
    "a nested key given twice": (
        "train:\n  lr: 1\n  epochs: 2\n  lr: 1\n",
        "7:3: train.lr: this key is given twice; the first is at r.yaml:5:3",
    ),
    "an unknown key": ("train:\n  lrr: 0.1\n", "5:3: train.lrr: unknown key (did you mean 'lr'?)"),
    "an unknown section": ("trian: {lr: 0.1}\n", "4:1: trian: unknown key (did you mean 'train'?)"),
    "an unknown key like none": (
        "calibrate: {zzz: 1}\n",
        "4:13: calibrate.zzz: unknown key; known here: batches, batch_size, augment, image_size, estimator, keep, precision, "
        "finetune",
    ),
    "a nested unknown key": (
        "train: {validate: {evry: 1}}\n",
        "4:20: train.validate.evry: unknown key (did you mean 'every'?)",
    ),
    "a text for a number": ("train: {lr: fast}\n", '4:13: train.lr: this should be a valid number, got "fast"'),
    "a quoted number": ("seed: '1'\n", '4:7: seed: this should be a valid integer, got "1"'),
    "a fraction for an integer": ("train: {epochs: 1.5}\n", "4:17: train.epochs: this should be a valid integer, got 1.5"),
    "a truth for an integer": ("seed: true\n", "4:7: seed: this should be a valid integer, got true"),
    "a text for a list": (
        "train: {validate: {instances: full}}\n",
        '4:31: train.validate.instances: this should be a list, got "full"',
    ),
    "an unknown choice": ("train: {precision: fp8}\n", "4:20: train.precision: this should be 'fp32' or 'bf16', got \"fp8\""),
    "a point the network lacks": (
        "sdpoint: {points: [layer1.0, layer4.0]}\n",
        f"4:30: sdpoint.points.1: resnet20 has no point 'layer4.0' (did you mean 'layer3.0'?); it has {RESNET20_POINTS}",
    ),
    "an instance the network lacks": (
        "train:\n  validate:\n    instances:\n      - full\n      - maxpool@0.5\n",
        f"8:9: train.validate.instances.1: maxpool@0.5: the network has no point 'maxpool'; it has {RESNET20_POINTS}",
    ),
    "what is not an instance": (
        "train: {validate: {instances: [half]}}\n",
        "4:32: train.validate.instances.0: 'half' is not an instance; write 'full', 'layer2.3@0.5', or several joined by '+'",
    ),
    "milestones that fall": (
        "train: {milestones: [5, 3]}\n",
        "4:21: train.milestones: milestones are epochs that rise, got [5, 3]",
    ),
    "a long warm-up": (
        "train: {milestones: [3], warmup_epochs: 3.5}\n",
        "4:41: train.warmup_epochs: the warm-up must end before the first milestone",
    ),
    "two rates of the body": (
        "train: {lr_body: 0.01, layer_decay: 0.9}\n",
        "4:37: train.layer_decay: `lr_body` and `layer_decay` exclude each other; give one",
    ),
    "an average of nothing": ("train: {ema: 1}\n", "4:14: train.ema: this should be less than 1, got 1"),
    "mixing by nothing": ("train: {mixup: 0}\n", "4:16: train.mixup: this should be greater than or equal to 0.01, got 0"),
    "sdpoint: on": (
        "sdpoint: on\n",
        "4:10: sdpoint: write `off` to train the plain network, or a section with ratios, points and draw",
    ),
}


@pytest.mark.parametrize(("text", "line"), ONE_PROBLEM.values(), ids=ONE_PROBLEM)
def test_one_problem_is_one_line(text, line):
    assert problems(HEAD + text) == [f"r.yaml:{line}"]


@pytest.mark.parametrize("ratio", ["0", "1", "1.5", "-0.5", ".nan"])
def test_impossible_ratios(ratio):
    expected = f"a ratio is the size kept, above 0 and below 1, for example 0.5; got {float(ratio.lstrip('.')):g}"
    assert problems(HEAD + f"sdpoint:\n  ratios: [0.5, {ratio}]\n") == [f"r.yaml:5:17: sdpoint.ratios.1: {expected}"]
    assert problems(HEAD + f"profile: {{ratios: [0.5, {ratio}]}}\n") == [f"r.yaml:4:25: profile.ratios.1: {expected}"]


def test_one_impossible_ratio_is_one_problem():
    assert [line.partition(": ")[0] for line in problems(HEAD + "sdpoint: {ratios: [2]}\n")] == ["r.yaml:4:20"]


CHOICES = "choose one of surrogate, dqn, ppo, reinforce, agent, random, uniform, tpe, nsga2, greedy, exhaustive"
ONE_AND_SMALLER = "give 1 (no downsampling) and at least one smaller ratio, for example [1, 0.75, 0.5]"
NO_PASSWORD = "a password does not belong here; leave it to the environment (PGPASSWORD, or SDPCTL_STORAGE)"

OF_A_SEARCH = {
    "a strategy that does not exist": (
        "search: {strategy: surogate}\n",
        f"4:20: search.strategy: there is no strategy 'surogate' (did you mean 'surrogate'?); {CHOICES}",
    ),
    "a strategy like none": (
        "search: {strategy: annealing}\n",
        f"4:20: search.strategy: there is no strategy 'annealing'; {CHOICES}",
    ),
    "one of several": (
        "search:\n  compare: [dqn, rnadom]\n",
        f"5:18: search.compare.1: there is no strategy 'rnadom' (did you mean 'random'?); {CHOICES}",
    ),
    "ratios without 1": (
        "search: {ratios: [0.75, 0.5]}\n",
        f"4:18: search.ratios: {ONE_AND_SMALLER}; got [0.75, 0.5]",
    ),
    "only 1": (
        "search: {ratios: [1]}\n",
        f"4:18: search.ratios: {ONE_AND_SMALLER}; got [1.0]",
    ),
    "no ratios": (
        "search: {ratios: []}\n",
        f"4:18: search.ratios: {ONE_AND_SMALLER}; got []",
    ),
    "a ratio twice": (
        "search: {ratios: [1, 0.5, 0.5]}\n",
        "4:18: search.ratios: each value may occur only once, got 1.0, 0.5, 0.5",
    ),
    "a ratio above 1": (
        "search: {ratios: [1, 1.5]}\n",
        "4:22: search.ratios.1: a ratio is the size kept, above 0 and at most 1; got 1.5",
    ),
    "a ratio of 0": (
        "search: {ratios: [1, 0]}\n",
        "4:22: search.ratios.1: a ratio is the size kept, above 0 and at most 1; got 0",
    ),
    "ratios at some point without 1": (
        "search:\n  ratios_at:\n    layer1.0: [0.5]\n",
        f"6:15: search.ratios_at.layer1.0: {ONE_AND_SMALLER}; got [0.5]",
    ),
    "ratios at a point the network lacks": (
        "search:\n  ratios_at:\n    layer4.0: [1, 0.5]\n",
        "6:15: search.ratios_at.layer4.0: resnet20 has no point 'layer4.0' (did you mean 'layer3.0'?); "
        f"it has {RESNET20_POINTS}",
    ),
    "ratios at a point that is not searched": (
        "search: {points: [stem], ratios_at: {layer1.0: [1, 0.5]}}\n",
        "4:48: search.ratios_at.layer1.0: layer1.0 is not among the points that are searched; add it to search.points",
    ),
    "a point the network lacks": (
        "search: {points: [stem, layer2.3]}\n",
        f"4:25: search.points.1: resnet20 has no point 'layer2.3' (did you mean 'layer2.2'?); it has {RESNET20_POINTS}",
    ),
    "no points": (
        "search: {points: []}\n",
        "4:18: search.points: this list should have at least 1 item, not 0, got []",
    ),
    "no budget and no price": (
        "search:\n  strategy: dqn\n  max_macs: none\n",
        "6:13: search.max_macs: without a budget the most accurate is wanted, whatever it costs; "
        "set one, or choose a different search.reward",
    ),
    "no budget at all": (
        "search: {max_macs: null}\n",
        "4:20: search.max_macs: write a share of `full` as 50%, MACs as 1.2G, 350M or a number, or none",
    ),
    "a budget that is none": (
        "search: {max_macs: half}\n",
        "4:20: search.max_macs: 'half' is not a budget; write a share of `full` as 50%, or MACs as 1.2G, 350M or a number",
    ),
    "a budget of nothing": (
        "search: {max_macs: 0}\n",
        "4:20: search.max_macs: '0' is not a budget; write a share of `full` as 50%, or MACs as 1.2G, 350M or a number",
    ),
    "a single evaluation": (
        "search: {evaluations: 1}\n",
        "4:23: search.evaluations: 1 is too few; the strategy surrogate scores at least 2 networks",
    ),
    "a password": ("search: {storage: 'postgresql://user:geheim@host/studies'}\n", f"4:19: search.storage: {NO_PASSWORD}"),
    "a password with a driver": (
        "search: {storage: 'postgresql+psycopg://user:geheim@host:5432/studies'}\n",
        f"4:19: search.storage: {NO_PASSWORD}",
    ),
    "a password without a user": (
        "search: {storage: 'mysql://:geheim@host/studies'}\n",
        f"4:19: search.storage: {NO_PASSWORD}",
    ),
    "a password with a slash": (
        "search: {storage: 'postgresql://user:ge/heim@host/studies'}\n",
        f"4:19: search.storage: {NO_PASSWORD}",
    ),
    "listed draws of nothing": (
        "sdpoint: {draw: listed}\n",
        "4:1: sdpoint.instances: `draw: listed` and a list of instances belong together; give both or neither",
    ),
    "a reward that is code": (
        "search: {reward: \"__import__('os')\"}\n",
        "4:18: search.reward: \"__import__('os')\" is not a reward: there is no function '__import__'; the functions are log, "
        "exp, sqrt, abs, min, max; the named rewards are accuracy, amc, branch",
    ),
    "a reward that cannot be parsed": (
        "search: {reward: top1 -}\n",
        "4:18: search.reward: 'top1 -' is not a reward: it cannot be parsed; the named rewards are accuracy, amc, branch",
    ),
    "a number for a reward": ("search: {reward: 5}\n", "4:18: search.reward: this should be a valid string, got 5"),
    "a reward without costs and a budget": (
        "search: {reward: top1 - loss, max_macs: none}\n",
        "4:41: search.max_macs: without a budget the most accurate is wanted, whatever it costs; set one, or choose a "
        "different search.reward",
    ),
    "budgets that are not drawn from": (
        "sdpoint: {draw: independent, budgets: 30%..90%}\n",
        "4:39: sdpoint.budgets: `draw: independent` has no budgets; remove this key, or use draw: budgeted",
    ),
    "budgets in the wrong order": (
        "sdpoint: {draw: budgeted, budgets: 90%..30%}\n",
        "4:36: sdpoint.budgets: '90%..30%' is not a range of budgets: 90% is more than 30%; write the lower budget first",
    ),
    "one budget for a range": (
        "sdpoint: {draw: budgeted, budgets: 50%}\n",
        "4:36: sdpoint.budgets: '50%' is not a range of budgets; write two budgets with two dots between them, as 30%..90% or "
        "50M..1.2G",
    ),
    "a number for a range": (
        "sdpoint: {draw: budgeted, budgets: 50}\n",
        "4:36: sdpoint.budgets: write two budgets with two dots between them, as 30%..90% or 50M..1.2G; got 50",
    ),
    "weights of budgeted draws": (
        "sdpoint: {draw: budgeted, weights: cost}\n",
        "4:36: sdpoint.weights: weights belong to points that shrink alone: use draw: single, pair or sandwich",
    ),
    "a list that is not drawn from": (
        "sdpoint: {draw: single, instances: [full, stem@0.5]}\n",
        "4:36: sdpoint.instances: `draw: listed` and a list of instances belong together; give both or neither",
    ),
    "a listed instance the network lacks": (
        "sdpoint: {draw: listed, instances: [full, maxpool@0.5]}\n",
        f"4:43: sdpoint.instances.1: maxpool@0.5: the network has no point 'maxpool'; it has {RESNET20_POINTS}",
    ),
    "what is not an instance": (
        "sdpoint: {draw: listed, instances: [half]}\n",
        "4:37: sdpoint.instances.0: 'half' is not an instance; write 'full', 'layer2.3@0.5', or several joined by '+'",
    ),
}


@pytest.mark.parametrize(("text", "line"), OF_A_SEARCH.values(), ids=OF_A_SEARCH)
def test_one_problem_of_a_search_or_of_what_it_found_is_one_line(text, line):
    assert problems(HEAD + text) == [f"r.yaml:{line}"]


def test_an_empty_list_to_draw_from():
    lines = problems(HEAD + "sdpoint: {draw: listed, instances: []}\n")
    assert lines[0] == "r.yaml:4:36: sdpoint.instances: this list should have at least 1 item, not 0, got []"


def test_a_search_chooses_on_a_holdout():
    text = HEAD.replace("dataset: cifar10", "dataset: cifar10, holdout: 0")
    (line,) = problems(text + "train: {validate: {every: 0}}\nsearch: {}\n")
    assert line == "r.yaml:3:35: data.holdout: a search chooses on the holdout: use 10%, or more"


@pytest.mark.parametrize(
    ("override", "shown"),
    [
        ("search.storage=postgresql://user:geheim@host/studies", "search.storage=postgresql://user:***@host/studies"),
        ("search={storage: 'mysql://:geheim@host/studies'}", "search={storage: 'mysql://:***@host/studies'}"),
        ("search.storage=postgresql://user:ge/heim@host/studies", "search.storage=postgresql://user:***@host/studies"),
    ],
)
def test_a_password_is_not_repeated(override, shown):
    assert problems(HEAD, override) == [f"--set {shown}: search.storage: {NO_PASSWORD}"]


@pytest.mark.parametrize(
    "storage",
    ["sqlite:///studies.sqlite", "sqlite:////a:b/c@d.sqlite", "postgresql://user@host:5432/studies", "postgresql:///studies"],
)
def test_a_storage_without_a_password(storage):
    assert parse(HEAD, f"search.storage={storage}").search.storage == storage


def test_a_search_has_defaults():
    assert parse(HEAD).search is None
    assert parse(HEAD + "search:\n").search is None
    search = parse(HEAD + "search: {}\n").search
    assert (search.strategy, search.compare, search.seeds, search.evaluations) == ("surrogate", (), 1, 100)
    assert (search.points, search.ratios, search.ratios_at) == (None, (1.0, 0.75, 0.5), {})
    assert (search.max_macs, search.reward, search.storage, search.study) == ("50%", "accuracy", None, None)
    assert (search.images, search.rescore, search.rescore_images) == (1000, 8, 3000)


@pytest.mark.parametrize(
    ("given", "budget"), [("50%", "50%"), ("1.2G", "1.2G"), ("350000000", "350000000"), ("1.2e9", "1200000000"), ("'7k'", "7k")]
)
def test_budgets_may_be_shares_or_numbers(given, budget):
    assert parse(HEAD, f"search.max_macs={given}").search.max_macs == budget


def test_values_of_a_search_reach_the_recipe():
    text = """\
search:
  compare: [surrogate, dqn]
  points: [layer1.0, stem]
  ratios: [1, 0.5]
  ratios_at: {stem: [0.25, 1]}
  max_macs: none
  reward: amc
"""
    search = parse(HEAD + text).search
    assert search.compare == ("surrogate", "dqn")
    assert (search.points, search.ratios, search.ratios_at) == (("layer1.0", "stem"), (1.0, 0.5), {"stem": (0.25, 1.0)})
    assert (search.max_macs, search.reward) == (None, "amc")


def test_a_reward_may_be_an_expression():
    text = "search:\n  max_macs: none\n  reward: -(1 - top1/100) * log(macs)\n"
    assert parse(HEAD + text).search.reward == "-(1 - top1/100) * log(macs)"
    assert parse(HEAD + "search: {reward: 'min(top1, 90) - gmacs'}\n").search.reward == "min(top1, 90) - gmacs"
    assert parse(HEAD, "search.reward=min(top1, 90) - 2 * gmacs").search.reward == "min(top1, 90) - 2 * gmacs"
    identities = [parse(HEAD + f"search: {{reward: {text}}}\n").identity()["search"] for text in ("top1 - gmacs", "top1-gmacs")]
    assert [identity["reward"] for identity in identities] == ["top1 - gmacs", "top1-gmacs"]
    with pytest.raises(RecipeError, match=r"^--set search\.reward=top1 - gmac: search\.reward: 'top1 - gmac' is not a reward:"):
        parse(HEAD, "search.reward=top1 - gmac")


def test_top5_of_few_classes_is_refused_as_soon_as_the_classes_are_known():
    folder = "name: a\nmodel: {arch: resnet20CLASSES}\ndata: {dataset: imagefolder}\nsearch: {reward: top5 - gmacs}\n"
    assert problems(folder.replace("CLASSES", ", num_classes: 5")) == [
        "r.yaml:4:18: search.reward: top5 needs at least 6 classes, and there are 5; use top1"
    ]
    for classes in ("", ", num_classes: 6"):
        assert parse(folder.replace("CLASSES", classes)).search.reward == "top5 - gmacs"


def test_a_list_of_instances_to_draw_from():
    recipe = parse(HEAD + "sdpoint: {draw: listed, instances: [full, layer1.0@0.5+layer3.2@0.75]}\n")
    assert (recipe.sdpoint.draw, recipe.sdpoint.instances) == ("listed", ("full", "layer1.0@0.5+layer3.2@0.75"))


OF_AN_EXPORT = {
    "a format": (
        "export: {format: tflite}\n",
        f"4:18: export.format: there is no format 'tflite'; choose one of {', '.join(FORMATS)}",
    ),
    "an instance beside a budget": (
        "export: {instance: full, max_macs: 50%}\n",
        "4:36: export.max_macs: `instance` and `max_macs` exclude each other; give one",
    ),
    "a budget beside a search": (
        "search: {}\nexport: {max_macs: 50%, from_search: true}\n",
        "5:38: export.from_search: `max_macs` and `from_search` exclude each other; give one",
    ),
    "a bundle of one instance": (
        "export: {format: bundle, instance: full}\n",
        "4:36: export.instance: the format bundle has no `instance`; it chooses among its `instances` when it runs",
    ),
    "a bundle within a budget": (
        "export: {format: bundle, max_macs: 1G}\n",
        "4:36: export.max_macs: the format bundle has no `max_macs`; it chooses among its `instances` when it runs",
    ),
    "a bundle of raw pixels": (
        "export: {format: bundle, raw_input: true}\n",
        "4:37: export.raw_input: the format bundle does not take raw pixels; remove this key",
    ),
    "several in one file": (
        "export: {instances: pareto}\n",
        "4:21: export.instances: the format onnx holds one instance; name one `instance`, or set format: bundle or onnx-folder",
    ),
    "an unknown point": (
        "export: {instance: layer4.0@0.5}\n",
        f"4:20: export.instance: layer4.0@0.5: the network has no point 'layer4.0'; it has {RESNET20_POINTS}",
    ),
    "an unknown point of a bundle": (
        "export: {format: bundle, instances: [full, layer4.0@0.5]}\n",
        f"4:44: export.instances.1: layer4.0@0.5: the network has no point 'layer4.0'; it has {RESNET20_POINTS}",
    ),
    "no instance": (
        "export: {instance: half}\n",
        "4:20: export.instance: 'half' is not an instance; write 'full', 'layer2.3@0.5', or several joined by '+'",
    ),
    "no search": (
        "export: {from_search: true}\n",
        "4:23: export.from_search: the recipe has no search; add a section `search`",
    ),
    "a budget": (
        "export: {max_macs: half}\n",
        "4:20: export.max_macs: 'half' is not a budget; write a share of `full` as 50%, or MACs as 1.2G, 350M or a number",
    ),
    "an unknown key": ("export: {fromat: onnx}\n", "4:10: export.fromat: unknown key (did you mean 'format'?)"),
    "what is kept": ("calibrate: {keep: all}\n", "4:19: calibrate.keep: this should be 'full', got \"all\""),
}


@pytest.mark.parametrize(("text", "line"), OF_AN_EXPORT.values(), ids=OF_AN_EXPORT)
def test_one_problem_of_an_export_is_one_line(text, line):
    assert problems(HEAD + text) == [f"r.yaml:{line}"]


@pytest.mark.parametrize("value", ["best", "3", "[full, 3]", "[]"])
def test_what_a_bundle_cannot_hold(value):
    lines = problems(HEAD + f"export: {{format: bundle, instances: {value}}}\n")
    assert all(line.startswith("r.yaml:4:") and ": export.instances" in line for line in lines)


@pytest.mark.parametrize("section", ["{max_macs: 50%}", "{format: bundle, instances: pareto}"])
def test_an_export_that_chooses_does_so_on_a_holdout(section):
    text = HEAD.replace("dataset: cifar10", "dataset: cifar10, holdout: 0") + "train: {validate: {every: 0}}\n"
    (line,) = problems(text + f"export: {section}\n")
    assert line == "r.yaml:3:35: data.holdout: a budget is met by choosing on the holdout: use 10%, or more"
    assert parse(text + "export: {}\n").export.format == "onnx"


def test_an_export_has_defaults():
    assert parse(HEAD).export is None
    export = parse(HEAD + "export: {}\n").export
    assert (export.format, export.instance, export.max_macs, export.instances) == ("onnx", None, None, ("all",))
    assert (export.from_search, export.raw_input) == (False, False)
    assert parse(HEAD + "export: {max_macs: none}\n").export.max_macs is None


IN_THE_HEAD = {
    "architecture": (
        "name: a\nmodel:\n  arch: resnet19\ndata: {dataset: cifar10}\n",
        "3:9: model.arch: there is no architecture 'resnet19' (did you mean 'resnet18'?); `sdpctl models` lists them",
    ),
    "data set": (
        "name: a\nmodel: {arch: resnet20}\ndata: {dataset: cifar}\n",
        "3:17: data.dataset: there is no data set 'cifar' (did you mean 'cifar10'?); "
        "choose one of digits, mnist, fashion-mnist, cifar10, cifar100, tiny-imagenet, imagefolder",
    ),
    "image too small": (
        "name: a\nmodel: {arch: resnet18}\ndata: {dataset: cifar10, image_size: 16}\n",
        "3:38: data.image_size: 16 px is too small for resnet18 with the imagenet stem, which divides the size by 32: "
        "use 32 or more; or set model.stem=small",
    ),
    "image too small for the small stem": (
        "name: a\nmodel: {arch: resnet20}\ndata: {dataset: digits, image_size: 3}\n",
        "3:37: data.image_size: 3 px is too small for resnet20 with the small stem, which divides the size by 4: use 4 or more",
    ),
    "classes": (
        "name: a\nmodel: {arch: resnet20, num_classes: 7}\ndata: {dataset: cifar10}\n",
        "2:38: model.num_classes: cifar10 has 10 classes, not 7",
    ),
    "batches of one": (
        "name: a\nmodel: {arch: resnet20}\ndata: {dataset: digits, batch_size: 1}\n",
        "3:37: data.batch_size: this should be greater than or equal to 2, got 1",
    ),
    "download of what is not downloaded": (
        "name: a\nmodel: {arch: resnet20}\ndata: {dataset: digits, download: true}\n",
        "3:35: data.download: digits is not downloaded; remove this key",
    ),
    "no holdout": (
        "name: a\nmodel: {arch: resnet20}\ndata: {dataset: digits, holdout: 0}\n",
        "3:34: data.holdout: validation needs a holdout: use 10%, or set train.validate.every=0",
    ),
    "all held out": (
        "name: a\nmodel: {arch: resnet20}\ndata: {dataset: digits, holdout: 100%}\n",
        '3:34: data.holdout: this should be less than 1, got "100%"',
    ),
    "no share": (
        "name: a\nmodel: {arch: resnet20}\ndata: {dataset: digits, holdout: ten%}\n",
        "3:34: data.holdout: 'ten%' is not a share; write 10% or 0.1",
    ),
    "name": (
        "name: a b\nmodel: {arch: resnet20}\ndata: {dataset: digits}\n",
        "1:7: name: 'a b' is not a name: use letters, digits, '-' and '_'; it becomes the tag",
    ),
    "required key": ("name: a\nmodel: {num_classes: 10}\ndata: {dataset: digits}\n", "2:1: model.arch: this key is required"),
    "tab": (
        "name: a\nmodel:\n\tarch: resnet20\n",
        "3:1: this is not YAML: found character '\\t' that cannot start any token",
    ),
    "unclosed": ("name: a\nmodel: {arch: resnet20\n", "3:1: this is not YAML: expected ',' or '}', but got '<stream end>'"),
}


@pytest.mark.parametrize(("text", "line"), IN_THE_HEAD.values(), ids=IN_THE_HEAD)
def test_one_problem_in_the_first_lines(text, line):
    assert problems(text) == [f"r.yaml:{line}"]


def test_every_problem_is_reported_at_once():
    text = """\
name: two words
seed: -1
model: {arch: resnet20, num_classes: 7}
data:
  dataset: cifar10
  batch_size: 1
train:
  lrr: 0.1
  epochs: many
  epochs: 3
sdpoint: {ratios: [0.5, 1.5], points: [layer9.0]}
"""
    places = {line.split(": ")[0] + " " + line.split(": ")[1] for line in problems(text, "calibrate.batches=0")}
    assert places == {
        "r.yaml:1:7 name",
        "r.yaml:2:7 seed",
        "r.yaml:3:38 model.num_classes",
        "r.yaml:6:15 data.batch_size",
        "r.yaml:8:3 train.lrr",
        "r.yaml:10:3 train.epochs",
        "r.yaml:11:25 sdpoint.ratios.1",
        "r.yaml:11:40 sdpoint.points.0",
        "--set calibrate.batches=0 calibrate.batches",
    }


def test_an_empty_recipe_lacks_what_is_required():
    assert problems("") == [f"r.yaml: {key}: this key is required" for key in ("name", "model", "data")]


@pytest.mark.parametrize("text", ["- 1\n", "5\n", "resnet20\n"])
def test_a_recipe_is_a_mapping(text):
    assert problems(text) == ["r.yaml: a recipe is a mapping of keys, such as `name: digits`"]


@pytest.mark.parametrize("section", ["train", "data", "sdpoint", "model"])
def test_a_section_without_keys_is_refused_where_it_stands(section):
    lines = [line for line in HEAD.splitlines() if not line.startswith(section)]
    text = "\n".join([*lines, f"{section}:", ""])
    (line,) = problems(text)
    assert line.startswith(f"r.yaml:{len(lines) + 1}:{len(section) + 2}: {section}: ")


def test_profile_without_keys_is_no_profile():
    assert parse(HEAD + "profile:\n").profile is None


@pytest.mark.parametrize("text", [HEAD + "seed: ]\n", HEAD + "seed: *unknown\n", HEAD + "seed: %\n"])
def test_broken_yaml_is_one_line(text):
    (line,) = problems(text)
    assert line.startswith("r.yaml:")
    assert "this is not YAML: " in line


def test_an_alias_of_itself_is_a_problem_of_the_recipe():
    assert problems(HEAD + "evaluate: &x {batch_size: *x}\n")[0].startswith("r.yaml:4:")


class TestOverrides:
    def test_beat_the_text(self):
        assert parse(HEAD + "train: {lr: 0.3, gamma: 0.5}\n", "train.lr=0.2").train.lr == 0.2
        assert parse(HEAD + "train: {lr: 0.3, gamma: 0.5}\n", "train.lr=0.2").train.gamma == 0.5

    def test_the_last_wins(self):
        assert parse(HEAD, "seed=1", "seed=2").seed == 2

    def test_make_sections_that_are_not_there(self):
        assert parse(HEAD, "train.validate.every=3").train.validate.every == 3
        assert parse(HEAD + "train:\n", "train.lr=0.2").train.lr == 0.2
        assert parse(HEAD + "sdpoint: off\n", "sdpoint.p=0.2").sdpoint.p == 0.2

    def test_can_mend_what_the_text_lacks(self):
        assert parse("name: a\n", "model.arch=resnet20", "data.dataset=digits").model.arch == "resnet20"

    def test_values_are_yaml(self):
        assert parse(HEAD, "sdpoint.ratios=[0.25, 0.5]").ratios == (0.25, 0.5)
        assert parse(HEAD, "train={lr: 1e-3}").train.lr == 0.001
        assert parse(HEAD, "data.fingerprint=null").data.fingerprint is None

    @pytest.mark.parametrize(
        ("override", "same"),
        [
            ("sdpoint.ratios=0.5,0.75", "sdpoint.ratios=[0.5, 0.75]"),
            ("sdpoint.ratios=0.5, 0.75", "sdpoint.ratios=[0.5, 0.75]"),
            ("sdpoint.ratios=0.5", "sdpoint.ratios=[0.5]"),
            ("sdpoint.ratios=0.5 # one", "sdpoint.ratios=[0.5]"),
            ("sdpoint.points=stem,layer2.0", "sdpoint.points=[stem, layer2.0]"),
            ("sdpoint.points=all", "sdpoint={}"),
            ("search.points=stem", "search.points=[stem]"),
            ("search.compare=dqn,ppo", "search.compare=[dqn, ppo]"),
            ("search.ratios_at.stem=1,0.5", "search.ratios_at={stem: [1, 0.5]}"),
            ("train.milestones=5,8", "train.milestones=[5, 8]"),
            ("train.milestones=5", "train.milestones=[5]"),
            ("train.validate.instances=full,stem@0.5", "train.validate.instances=[full, stem@0.5]"),
            ("export={format: bundle, instances: pareto}", "export={format: bundle, instances: [pareto]}"),
        ],
    )
    def test_lists_may_be_separated_by_commas(self, override, same):
        assert parse(HEAD, override) == parse(HEAD, same)

    def test_of_a_bundle(self):
        assert parse(HEAD, "export.format=bundle", "export.instances=pareto").export.instances == ("pareto",)
        assert parse(HEAD, "export.format=bundle", "export.instances=full,stem@0.5").export.instances == ("full", "stem@0.5")

    def test_text_with_commas_stays_text(self):
        assert parse(HEAD, "data.root=a,b").data.root == "a,b"

    @pytest.mark.parametrize("value", ["0.5,,0.75", ",", "0.5,half", "true", ""])
    def test_what_is_no_list(self, value):
        (line,) = problems(HEAD, f"sdpoint.ratios={value}")
        assert line.startswith(f"--set sdpoint.ratios={value}:")

    def test_nothing_is_null(self):
        assert parse(HEAD + "seed: 3\n", "data.fingerprint=").data.fingerprint is None
        assert problems(HEAD, "seed=") == ["--set seed=: seed: this should be a valid integer, got null"]

    def test_off(self):
        assert parse(HEAD, "sdpoint=off").sdpoint is None

    def test_split_at_the_first_equals_sign(self):
        assert parse(HEAD, "data.root=a=b").data.root == "a=b"

    @pytest.mark.parametrize(
        ("override", "message"),
        [
            ("train.lrr=5", "train.lrr: unknown key (did you mean 'lr'?)"),
            ("train.lr=fast", 'train.lr: this should be a valid number, got "fast"'),
            (
                "sdpoint.ratios=[0.5, 2]",
                "sdpoint.ratios.1: a ratio is the size kept, above 0 and below 1, for example 0.5; got 2",
            ),
            (
                "data.batch_size=1",
                "data.batch_size: this should be greater than or equal to 2, got 1",
            ),
        ],
    )
    def test_errors_name_the_override(self, override, message):
        assert problems(HEAD + "train: {lr: 0.3}\nsdpoint: {ratios: [0.1, 0.2, 0.3]}\n", override) == [
            f"--set {override}: {message}"
        ]

    def test_are_shown_without_control_characters_and_cut(self):
        assert problems(HEAD, "name=\x1b[31m")[0].startswith("--set name=\\x1b[31m:1:1: the character \\x1b is not allowed")
        assert len(problems(HEAD, f"train.lr={LONG}")[0]) < 500
        with pytest.raises(UsageError, match=r"^--set \\x1b\[31m=1: write --set section\.key=value"):
            parse(HEAD, "\x1b[31m=1")
        with pytest.raises(UsageError, match=r"write --set section\.key=value"):
            parse(HEAD, "a." * 3000 + "b=1")

    def test_no_yaml_after_the_equals_sign(self):
        (line,) = problems(HEAD, "sdpoint.ratios=[0.5, 2")
        assert line.startswith("--set sdpoint.ratios=[0.5, 2:")
        assert "this is not YAML: " in line

    def test_a_key_given_twice(self):
        (line,) = problems(HEAD, "train={lr: 1, lr: 2}")
        assert line.startswith("--set train={lr: 1, lr: 2}")
        assert "given twice" in line

    @pytest.mark.parametrize("override", ["train.lr", "=5", "", ".=5", "train.=5", "train..lr=5"])
    def test_what_is_no_assignment(self, override):
        with pytest.raises(UsageError) as caught:
            parse(HEAD, override)
        assert str(caught.value) == f"--set {override}: write --set section.key=value, for example --set train.epochs=5"
        assert caught.value.exit_code == 2


class TestLocalValues:
    def test_hold_where_the_text_says_nothing(self):
        recipe = parse_recipe(HEAD, "r.yaml", (), {"data.root": "elsewhere", "device": "cpu"})
        assert (recipe.data.root, recipe.device) == ("elsewhere", "cpu")

    def test_the_text_and_overrides_beat_them(self):
        text = HEAD + "device: cuda\n"
        assert parse_recipe(text, "r.yaml", (), {"device": "cpu"}).device == "cuda"
        assert parse_recipe(HEAD, "r.yaml", ["device=cuda:1"], {"device": "cpu"}).device == "cuda:1"


class TestFiles:
    def test_errors_begin_with_the_path(self, tmp_path):
        path = tmp_path / "a.yaml"
        path.write_text(HEAD + "train: {lrr: 0.1}\n")
        with pytest.raises(RecipeError) as caught:
            load_recipe(path)
        assert caught.value.problems == [f"{path}:4:9: train.lrr: unknown key (did you mean 'lr'?)"]

    def test_overrides(self, tmp_path):
        path = tmp_path / "a.yaml"
        path.write_text(HEAD, encoding="utf-8")
        assert load_recipe(path, ["seed=7"]) == parse(HEAD, "seed=7")

    def test_a_missing_file(self, tmp_path):
        with pytest.raises(UsageError) as caught:
            load_recipe(tmp_path / "none.yaml")
        assert caught.value.exit_code == 2
        assert str(caught.value).startswith(
            f"{tmp_path / 'none.yaml'}: this recipe cannot be read (No such file or directory); "
        )

    @pytest.mark.parametrize(
        ("make", "kind"),
        [
            (Path.mkdir, "a folder"),
            (os.mkfifo, "a FIFO"),
            (lambda path: path.symlink_to("/dev/zero"), "a device"),
            (lambda path: path.symlink_to(path), "Too many levels of symbolic links"),
        ],
    )
    def test_only_regular_files_are_read(self, tmp_path, make, kind):
        path = tmp_path / "a.yaml"
        make(path)
        with pytest.raises(UsageError, match=rf"a\.yaml: this recipe cannot be read \(.*{kind}\)"):
            load_recipe(path)

    def test_what_is_not_utf8(self, tmp_path):
        path = tmp_path / "latin1.yaml"
        path.write_bytes(HEAD.encode() + b"# na\xefve\n")
        with pytest.raises(RecipeError) as caught:
            load_recipe(path)
        assert caught.value.problems == [f"{path}:4:5: byte 0xef is not UTF-8; save the recipe as UTF-8"]

    def test_a_byte_order_mark(self, tmp_path):
        path = tmp_path / "a.yaml"
        path.write_text(HEAD, encoding="utf-8-sig")
        assert load_recipe(path) == parse(HEAD)

    def test_the_name_of_a_file_is_shown_without_its_control_characters(self, tmp_path):
        path = tmp_path / "\x1b[31m.yaml"
        path.write_text("[")
        with pytest.raises(RecipeError, match=r"\\x1b\[31m\.yaml:1:2: this is not YAML"):
            load_recipe(path)


def test_merge_keys_and_keys_that_hold_anchors():
    text = "x-base: &b {epochs: 2, lr: 0.1}\nx-more: [1, {a: b}]\n" + HEAD + "train:\n  <<: *b\n  lr: 0.2\n"
    assert parse(text) == parse(HEAD + "train: {epochs: 2, lr: 0.2}\n")
    assert problems(text.replace("x-base", "base")) == [
        "r.yaml:1:1: base: unknown key; known here: name, seed, device, memory, model, data, sdpoint, train, calibrate, "
        "evaluate, profile, search, cascade, export, report; a key that only holds anchors begins with x-"
    ]


def test_only_keys_at_the_top_hold_anchors():
    assert "train.x-a: unknown key" in problems(HEAD + "train: {x-a: 1}\n")[0]


def test_many_problems_are_not_all_named():
    lines = problems(HEAD + "".join(f"key{i}: 1\n" for i in range(4000)))
    assert len(lines) == 21
    assert lines[-1] == "r.yaml: there are more problems; solve these first"


LONG = "x" * 100_000

CUT = {
    "a name": (f"name: {LONG}\n", "r.yaml:4:7: name: this should have at most 80 characters, got"),
    "a number": (f"train: {{lr: {LONG}}}\n", "r.yaml:4:13: train.lr: this should be a valid number, got"),
    "a key": (f"? {LONG}\n: 1\n", "r.yaml:4:3: xxxxx"),
    "an architecture": (f"model: {{arch: {LONG}}}\n", "r.yaml:4:15: model.arch: there is no architecture"),
    "a budget": (f"search: {{max_macs: {LONG}}}\n", "r.yaml:4:20: search.max_macs: 'xxxxx"),
    "a point": (f"sdpoint: {{points: [{LONG}]}}\n", "r.yaml:4:20: sdpoint.points.0: resnet20 has no point 'xxxxx"),
    "an instance": (f"export: {{instance: {LONG}}}\n", "r.yaml:4:20: export.instance: 'xxxxx"),
    "a size": (f"memory: {LONG}\n", "r.yaml:4:9: memory: 'xxxxx"),
    "a share": (f"data: {{dataset: cifar10, holdout: {LONG}%}}\n", "r.yaml:4:35: data.holdout: 'xxxxx"),
    "a folder": (f"data: {{dataset: cifar10, root: {LONG}}}\n", "r.yaml:4:32: data.root: xxxxx"),
}


@pytest.mark.parametrize(("text", "begin"), CUT.values(), ids=CUT)
def test_long_texts_are_cut(text, begin):
    key = text.partition(":")[0]
    others = "".join(f"{line}\n" if not line.startswith(key) else "\n" for line in HEAD.splitlines())
    line = problems(others + text)[0]
    assert line.startswith(begin)
    assert len(line) < 400


OUT_OF_BOUNDS = [
    *("train.epochs", "train.validate.every", "train.validate.batches", "train.warmup_epochs", "train.checkpoint.epochs"),
    *("data.batch_size", "data.workers", "data.image_size", "model.num_classes", "evaluate.batch_size", "evaluate.batches"),
    *("calibrate.batches", "search.seeds", "search.evaluations", "search.images", "search.calibration_batches"),
    *("search.rescore", "search.rescore_images", "search.weight", "seed", "memory", "train.gamma", "train.milestones"),
]


@pytest.mark.parametrize("key", OUT_OF_BOUNDS)
@pytest.mark.parametrize("value", [10**20, 10**30, 10**99])
def test_numbers_that_nobody_means(key, value):
    (line,) = problems(HEAD, f"{key}={value}")
    assert line.startswith(f"--set {key}={value}: {key}")
    assert "this should be less than" in line


def test_lists_that_nobody_means():
    (line,) = problems(HEAD, f"sdpoint.ratios={[i / 1000 for i in range(1, 200)]}")
    assert "sdpoint.ratios: this list should have at most 100 items" in line


@pytest.mark.parametrize(
    ("value", "hint"), [("10", "10% or 0.1"), ("1", "1% or 0.01"), ("12.5", "12.5% or 0.125"), ("99", "99% or 0.99")]
)
def test_a_share_without_its_percent_sign(value, hint):
    (line,) = problems(HEAD, f"data.holdout={value}")
    assert line == f"--set data.holdout={value}: data.holdout: this should be less than 1, got {value}; write {hint}"


@pytest.mark.parametrize("value", ["nan%", "inf%", "1_0%", "\u0661\u0660%", "%", "1e999%"])
def test_what_is_no_share(value):
    assert len(problems(HEAD, f"data.holdout={value}")) == 1


def test_a_truth_is_not_a_number_of_channels():
    assert problems(HEAD, "model.in_channels=true") == [
        "--set model.in_channels=true: model.in_channels: this should be a number, got true"
    ]


@pytest.mark.parametrize("device", ["cuda:1234", "cuda:\u0663", "cuda:", "gpu"])
def test_what_is_no_device(device):
    (line,) = problems(HEAD, f"device='{device}'")
    assert line.endswith(f"device: {device!r} is not a device: use auto, cpu, cuda or cuda:N")


def test_the_home_of_nobody():
    assert problems(HEAD, "data.root=~nosuch/x") == [
        "--set data.root=~nosuch/x: data.root: ~nosuch is not the home of a user of this machine; write ./~nosuch/x for a "
        "folder of this name"
    ]


@pytest.mark.parametrize("value", ["9" * 400 + "GiB", "1e999", "\u0669GiB", "1.2.3MB", "2.GiB", "2 GiB 3", "-2GiB"])
def test_what_is_no_memory(value):
    assert len(problems(HEAD, f"memory={value}")) == 1


@pytest.mark.parametrize(
    ("text", "size"),
    [("2GiB", 2 * 2**30), ("512MB", 512 * 10**6), ("1.5 GiB", 3 * 2**29), ("1000000", 10**6), ("1", 1), ("null", None)],
)
def test_memory_is_a_size(text, size):
    assert parse(HEAD + f"memory: {text}\n").memory == parse(HEAD, f"memory={text}").memory == size


@pytest.mark.parametrize("text", ["0", "-1", "lots", "''", "0MiB", "-2GiB", "2XB", "true", "[]", ".nan"])
def test_what_is_no_size_is_no_memory(text):
    (line,) = problems(HEAD + f"memory: {text}\n")
    assert line.startswith("r.yaml:4:9: memory: ")
    (line,) = problems(HEAD, f"memory={text}")
    assert line.startswith(f"--set memory={text}: memory: ")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        ("{dataset: cifar10, identify: stat}", "cifar10 has no image files to tell apart by their sizes; remove this key"),
        (
            "{dataset: imagefolder, identify: stat, skip_unreadable: true}",
            "decodes no image, so it finds none to leave out; use data.skip_unreadable=false or data.identify=content",
        ),
        ("{dataset: imagefolder, identify: size}", "identify"),
    ],
)
def test_what_cannot_be_identified_by_stat(data, reason):
    (line,) = problems(f"name: a\nmodel: {{arch: resnet20, num_classes: 10}}\n\ndata: {data}\n")
    assert line.startswith("r.yaml:4:")
    assert reason in line


def test_only_stat_is_part_of_the_identity():
    head = HEAD.replace("cifar10", "imagefolder")
    plain = parse(head).identity()
    assert parse(head, "data.identify=content").identity() == plain
    stat = parse(head, "data.identify=stat").identity()
    assert stat["data"].pop("identify") == "stat"
    assert stat == plain


def flat(plain, prefix=""):
    """Return values by dotted key."""
    found = {}
    for key, value in plain.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


def test_identity_lacks_what_cannot_change_a_result_and_nothing_else():
    recipe = parse(HEAD + "profile: {ratios: [0.5]}\n", "evaluate.batches=3", "data.fingerprint=abc", "memory=2GiB")
    complete, identity = flat(recipe.complete()), flat(recipe.identity())
    assert complete.keys() - identity.keys() == {
        "device",
        "memory",
        "data.root",
        "data.workers",
        "data.cache",
        "data.decoder",  # the images are in memory
        "data.download",
        "data.identify",  # only `content`, as in every recipe that is older than the key
        "data.skip_unreadable",
        "train.checkpoint.epochs",
        "train.checkpoint.minutes",
        "train.compile",
        "train.track",
    }
    assert {key: complete[key] for key in identity} == identity


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("train.ema", "0.999"),
        ("train.lr_body", "0"),
        ("train.layer_decay", "0.75"),
        ("train.mixup", "0.2"),
        ("train.cutmix", "1"),
        ("data.auto_augment", "trivial"),
        ("data.random_erasing", "0.25"),
        ("data.balance", "sampler"),
    ],
)
def test_identity_has_an_optional_key_only_if_it_is_set(key, value):
    assert key not in flat(parse(HEAD).identity())
    assert parse(HEAD, f"{key}=null").identity() == parse(HEAD).identity()
    assert flat(parse(HEAD, f"{key}={value}").identity()).keys() - flat(parse(HEAD).identity()).keys() == {key}


def test_recipes_without_sync_bn_keep_their_identity():
    usual = parse(HEAD).identity()
    assert "sync_bn" not in usual["train"]
    assert parse(HEAD, "train.sync_bn=false").identity() == usual
    assert parse(HEAD, "train.sync_bn=true").identity() == usual | {"train": usual["train"] | {"sync_bn": True}}


FILES = HEAD.replace("cifar10", "imagefolder")


@pytest.mark.parametrize("cache", ["none", "ram", "disk"])
@pytest.mark.parametrize("augment", ["none", "crop-flip", "resized-crop"])
@pytest.mark.parametrize("presize", ["null", "true", "false"])
def test_a_cache_is_recorded_only_as_what_its_crops_are_taken_from(presize, augment, cache):
    """The pixels of a cache differ from those without one only if random crops are taken from resized images."""
    recipe = parse(FILES, f"data.cache={cache}", f"data.augment={augment}", f"data.presize={presize}")
    data = recipe.identity()["data"]
    differ = augment == "resized-crop" and (presize == "true" or (presize == "null" and cache != "none"))
    assert data.get("presize") == (True if differ else None)
    assert "cache" not in data
    one_way = parse(FILES, f"data.augment={augment}", f"data.presize={str(differ).lower()}")
    assert dump_yaml(recipe.identity()) == dump_yaml(one_way.identity())
    stored = parse_recipe(dump_yaml(recipe.identity()), "s", (), STORED_DEFAULTS | {"data.cache": "disk"})
    assert stored.identity() == recipe.identity()


def test_a_stored_recipe_without_a_decoder_means_pil():
    stored = dump_yaml(parse(FILES, "data.decoder=pil").identity())
    assert parse_recipe(stored, "s", (), STORED_DEFAULTS).data.decoder == "pil"
    assert parse_recipe(stored, "r").data.decoder == "torchvision"
    recorded = dump_yaml(parse(FILES).identity())
    assert parse_recipe(recorded, "s", (), STORED_DEFAULTS).data.decoder == "torchvision"


@pytest.mark.parametrize("dataset", ["cifar10", "digits", "mnist"])
def test_images_in_memory_have_neither_decoder_nor_presize(dataset):
    text = HEAD.replace("cifar10", dataset)
    keys = ("data.augment=resized-crop", "data.image_size=32", "model.in_channels=3")
    plain = parse(text, *keys).identity()
    assert parse(text, *keys, "data.decoder=pil", "data.cache=ram", "data.presize=true").identity() == plain


@pytest.mark.parametrize(
    ("cores", "ranks", "processes"), [(1, None, 1), (2, None, 1), (8, None, 7), (64, None, 16), (16, "4", 3), (16, "16", 1)]
)
def test_automatic_workers_are_one_for_each_core_but_one(cores, ranks, processes, monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(cores)))
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if ranks is not None:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
    for recipe in (parse(HEAD), parse(HEAD, "data.workers=auto")):
        assert recipe.data.workers is None
        assert recipe.complete()["data"]["workers"] == "auto"
        assert recipe.data.processes == processes
    assert parse(HEAD, "data.workers=5").data.processes == 5


@pytest.mark.parametrize("value", ["maybe", "1", "0", "[]", "0.5"])
def test_what_is_neither_auto_nor_a_truth_is_refused(value):
    with pytest.raises(RecipeError) as caught:
        parse(HEAD, f"train.compile={value}")
    (line,) = caught.value.problems
    assert line.startswith(f"--set train.compile={value}: train.compile: ")
    assert line.endswith(" is not a choice; write auto, true or false")
    assert [parse(HEAD, f"train.compile={value}").train.compile for value in ("auto", "true", "false")] == ["auto", True, False]


def test_workers_that_are_no_number_are_refused():
    with pytest.raises(RecipeError) as caught:
        parse(HEAD, "data.workers=many")
    (line,) = caught.value.problems
    assert line.endswith("data.workers: 'many' is not a number of processes; write auto or a number")


def test_identity_of_a_search_lacks_where_it_is_kept():
    recipe = parse(HEAD, "search.storage=sqlite:///a.sqlite", "search.study=b")
    assert recipe.identity() == parse(HEAD + "search: {}\n").identity()
    lost = flat(recipe.complete()).keys() - flat(recipe.identity()).keys()
    assert {key for key in lost if key.startswith("search")} == {"search.storage", "search.study"}
    assert recipe.identity() != parse(HEAD, "search.evaluations=99").identity()


@pytest.mark.parametrize(
    "override",
    [
        *("device=cpu", "memory=2GiB", "data.root=x", "data.workers=7", "data.download=true", "train.checkpoint.minutes=1"),
        *("model.stem=small", "train.track=mlflow"),
    ],
)
def test_identity_does_not_change_with(override):
    assert parse(HEAD, override).identity() == parse(HEAD).identity()


@pytest.mark.parametrize(
    "override", ["seed=1", "train.lr=0.3", "sdpoint=off", "data.holdout=20%", "data.fingerprint=abc", "name=b"]
)
def test_identity_changes_with(override):
    assert parse(HEAD, override).identity() != parse(HEAD).identity()


def assert_reads_back(recipe):
    text = dump_yaml(recipe.identity())
    assert parse(text).identity() == recipe.identity()
    assert yaml.safe_load(text) == recipe.identity()


positive = st.floats(min_value=0, exclude_min=True, allow_infinity=False)


@given(
    lr=positive,
    decay=positive,
    ratios=st.lists(st.floats(0, 1, exclude_min=True, exclude_max=True), min_size=1, max_size=3, unique=True),
)
@example(lr=1e22, decay=1e-05, ratios=[5e-324])
@example(lr=1e16, decay=1.5e-07, ratios=[0.1, 1 / 3])
def test_numbers_read_back_the_same(lr, decay, ratios):
    assert_reads_back(parse(HEAD, f"train={{lr: {lr!r}, weight_decay: {decay!r}}}", f"sdpoint.ratios={ratios!r}"))


@given(
    seed=st.integers(min_value=0, max_value=2**64 - 1),
    sdpoint=st.sampled_from(["off", "{}", "{points: [layer2.0]}", "{points: [layer1.0, layer3.2], draw: independent}"]),
    milestones=st.sets(st.integers(1, 300)).map(sorted),
    stem=st.sampled_from(["small", "imagenet", "null"]),
)
def test_choices_read_back_the_same(seed, sdpoint, milestones, stem):
    assert_reads_back(parse(HEAD, f"seed={seed}", f"sdpoint={sdpoint}", f"train.milestones={milestones}", f"model.stem={stem}"))


@pytest.mark.parametrize(
    "override",
    [
        "search={}",
        "search={max_macs: none, reward: branch, weight: 1e-7}",
        "search={max_macs: 1.2e9, points: all, compare: [dqn, ppo]}",
        "search={points: [stem, layer1.0], ratios: [0.1, 1], ratios_at: {layer1.0: [1, 0.3333333333333333]}, precision: bf16}",
        "sdpoint={draw: listed, instances: [layer1.0@0.3333333333333333+stem@1e-05, full]}",
        "train.init=sha256:abc",
        "export={format: bundle, instances: [layer1.0@0.3333333333333333+stem@1e-05, full]}",
        "export={max_macs: 1e7, raw_input: true}",
        "export={instance: full}",
        "calibrate.keep=full",
    ],
)
def test_what_is_searched_tuned_and_exported_reads_back_the_same(override):
    assert_reads_back(parse(HEAD, override))


@pytest.mark.parametrize(
    "name", ["off", "null", "true", "12", "007", "1_0", "0x1F", "0o17", "1e-4", "12e3", "1e5", "2024-01-01"]
)
def test_names_that_look_like_something_else_read_back_the_same(name):
    assert_reads_back(parse(HEAD.replace("name: a", f"name: '{name}'")))


# What weights from elsewhere need said


PREPROCESSING = ("data.mean=[0.1, 0, 1]", "data.std=[0.2, 0.5, 1]", "data.resize=40", "data.interpolation=bicubic")


def test_shortcut_and_preprocessing_are_part_of_a_result_only_where_they_are_given():
    usual = parse(HEAD).identity()
    assert not usual["model"].keys() & {"shortcut"}
    assert not usual["data"].keys() & {"mean", "std", "resize", "interpolation"}
    assert_reads_back(parse(HEAD, *PREPROCESSING, "model.shortcut=padding-centred"))
    told = parse(HEAD, *PREPROCESSING, "model.shortcut=padding-centred").identity()
    assert told["model"].pop("shortcut") == "padding-centred"
    more = {key: told["data"].pop(key) for key in ("mean", "std", "resize", "interpolation")}
    assert more == {"mean": [0.1, 0, 1], "std": [0.2, 0.5, 1], "resize": 40, "interpolation": "bicubic"}
    assert told == usual


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["data.mean=[0.5]"], "data.mean: 1 number; give 3, one for each of model.in_channels=3"),
        (["data.std=[0.5, 0.5]"], "data.std: 2 numbers; give 3, one for each of model.in_channels=3"),
        (["data.resize=31"], "data.resize: 31 px is less than the 32 of data.image_size"),
        (["data.resize=1000000000000000000"], "data.resize: "),
        (["data.image_size=1000000000000000000"], "data.image_size: "),
        (["model.arch=preresnet18", "model.shortcut=padding"], "model.shortcut: preresnet18 has no shortcut to choose; remove"),
        (["model.arch=twopipe", "model.shortcut=projection"], "model.shortcut: twopipe has no shortcut to choose; remove"),
        (["data.mean=[0.5, 0.5, 1.5]"], "data.mean.2: "),
        (["data.std=[0.5, 0, 0.5]"], "data.std.1: "),
        (["data.std=[0.5, .nan, 0.5]"], "data.std.1: "),
        (["data.interpolation=lanczos"], "data.interpolation: "),
        (["model.shortcut=centred"], "model.shortcut: "),
    ],
)
def test_shortcut_and_preprocessing_that_do_not_hold(overrides, says):
    (line,) = [line for line in problems(HEAD, "data.image_size=32", *overrides) if "image_size: 32 px" not in line]
    assert says in line


FOLDER = "name: x\nmodel: {arch: resnet18}\n"


@pytest.mark.parametrize(
    ("data", "line"),
    [
        ("{dataset: digits, test_share: 20%}", "4:3: data.test_share: digits has its own folders; remove this key"),
        ("{dataset: imagefolder, folders: [a, b], test_share: 20%}", "data.test_share: `folders` names the test images"),
        ("{dataset: imagefolder, folders: [a, a]}", "data.folders: the same folder for training and test images"),
        ("{dataset: imagefolder, folders: [a, ../b]}", "data.folders.1: '../b' is not the name of a folder in data.root"),
        ("{dataset: imagefolder, folders: [a]}", "data.folders"),
        ("{dataset: imagefolder, test_share: 0}", "data.test_share: this should be greater than 0"),
    ],
)
def test_keys_of_a_differently_arranged_folder(data, line):
    (found,) = problems(FOLDER + f"data: {data}\n")
    assert line.partition(": ")[2] in found or line in found


def test_keys_of_a_differently_arranged_folder_are_part_of_a_result_only_if_they_are_set():
    plain = parse_recipe(FOLDER + "data: {dataset: imagefolder, image_size: 64}", "r.yaml").identity()["data"]
    assert {"folders", "test_share"}.isdisjoint(plain)
    shared = parse_recipe(FOLDER + "data: {dataset: imagefolder, image_size: 64, test_share: 20%}", "r.yaml").identity()["data"]
    assert shared == plain | {"test_share": 0.2}
