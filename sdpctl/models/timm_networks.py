"""The networks of timm."""

import logging
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import timm
from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from timm.data.config import resolve_data_config
from timm.data.imagenet_info import ImageNetInfo, infer_imagenet_subset
from timm.layers._fx import get_notrace_functions, get_notrace_modules
from timm.layers.drop import DropBlock2d, DropPath
from torch import Tensor, nn

from sdpctl.errors import ModelError
from sdpctl.models.pretrained import OLD_DENSENET, Preprocessing, Pretrained


class TimmNetworks:
    """The networks of timm that classify images."""

    def build(
        self, name: str, *, num_classes: int, in_channels: int, dropout: float | None = None, drop_path: float | None = None
    ) -> nn.Module:
        """Build a network with fresh weights, on the current default device."""
        rates = {"drop_rate": dropout, "drop_path_rate": drop_path}
        given: dict[str, Any] = {option: rate for option, rate in rates.items() if rate is not None}
        try:
            network: nn.Module = timm.create_model(name, num_classes=num_classes, in_chans=in_channels, **given)
        except TypeError as error:
            if (refused := next((option for option in given if option in str(error)), None)) is None:
                raise
            key = {"drop_rate": "dropout", "drop_path_rate": "drop_path"}[refused]
            raise ModelError(f"timm's {name} takes no {key}; leave model.{key} out") from error
        return network

    def leaves(self) -> tuple[type[nn.Module], ...]:
        """Return the types of modules that are recorded as one operation: timm's list, and those that draw random numbers."""
        return (*get_notrace_modules(), DropPath, DropBlock2d)  # type: ignore[no-untyped-call]

    def functions(self) -> tuple[Any, ...]:
        """Return the functions that are recorded as one operation: timm's list."""
        return tuple(get_notrace_functions())  # type: ignore[no-untyped-call]

    def image_size(self, name: str) -> int:
        """Return the height and width of the images that a network is meant for, in pixels."""
        config = timm.get_pretrained_cfg(name)
        return 224 if config is None else int(config.input_size[1])

    def old_names(self, name: str) -> tuple[tuple[str, str], ...]:
        """Return parts of parameter names in old checkpoints of a network, each with the part that replaced it."""
        return OLD_DENSENET if name.startswith("densenet") else ()

    def renew_head(self, network: nn.Module) -> None:
        """Draw a new classifier from torch's global generator, as the library does for pretrained networks.

        The weights of a classifier that was built with few classes are ten times larger in some families.
        """
        network.reset_classifier(network.num_classes)  # type: ignore[operator]

    def weights(self, name: str) -> tuple[str, ...]:
        """Return the names of the weights of a network, the default first."""
        names = [full.partition(".")[2] for full in timm.list_pretrained(f"{name}.*")]
        config = timm.get_pretrained_cfg(name) if names else None
        default = config.tag if config is not None else None
        return (*(name for name in names if name == default), *(name for name in names if name != default))

    def pretrained(self, name: str, weights: str) -> Pretrained:
        """Return weights of a network by their name. Nothing is fetched."""
        full = f"{name}.{weights}"
        found = timm.get_pretrained_cfg(full)
        assert found is not None
        config = found.to_dict()  # type: ignore[no-untyped-call]
        return Pretrained(
            library="timm",
            network=name,
            weights=weights,
            source=f"https://huggingface.co/{found.hf_hub_id}" if found.hf_hub_id else str(found.url or found.file),
            preprocessing=_preprocessing(config),
            classes=_classes(config),
            load=lambda: _state(full),
        )


def _preprocessing(config: dict[str, Any]) -> Preprocessing:
    """Return how timm's own transform prepares images: `timm.data.transforms_factory.transforms_imagenet_eval`."""
    train = resolve_data_config(pretrained_cfg=config)  # type: ignore[no-untyped-call]
    test = resolve_data_config(pretrained_cfg=config, use_test_size=True)  # type: ignore[no-untyped-call]
    if test["input_size"][1] < train["input_size"][1]:
        test = train
    size = test["input_size"][1]
    return Preprocessing(
        image_size=train["input_size"][1],
        test_size=size,
        resize=math.floor(size / test["crop_pct"]),
        mean=tuple(map(float, test["mean"])),
        std=tuple(map(float, test["std"])),
        interpolation=test["interpolation"],
    )


def _classes(config: dict[str, Any]) -> tuple[str, ...]:
    """Return the names of the classes: those of the configuration, or those of the part of ImageNet with as many classes."""
    if names := config.get("label_names"):
        described = config.get("label_descriptions") or {}
        return tuple(described.get(name, name) for name in names)
    subset = infer_imagenet_subset(config)
    if subset is None:
        return ()
    info = ImageNetInfo(subset)
    return tuple(info.index_to_description(number) for number in range(int(config["num_classes"])))


def _state(name: str) -> Mapping[str, Tensor]:
    with _quiet():
        network = timm.create_model(name, pretrained=True)
    state: Mapping[str, Tensor] = network.state_dict()
    return state


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep timm and huggingface_hub from writing to the terminal; what goes wrong is an exception."""
    loggers = [logging.getLogger(name) for name in ("timm", "huggingface_hub")]
    levels = [logger.level for logger in loggers]
    showed_progress = not are_progress_bars_disabled()
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    disable_progress_bars()
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if showed_progress:
            enable_progress_bars()
