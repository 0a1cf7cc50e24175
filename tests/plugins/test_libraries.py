"""Networks of other libraries by name: built without weights, and said clearly where a library is missing."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import mergeot_libraries
import pytest
from torch import nn

from mergekit_ot import ArchitectureError, PluginManager, resolve_architecture


def _builder(weights: object = "downloads", weights_backbone: object = "downloads", num_classes: int = 5) -> nn.Module:
    assert weights is None
    assert weights_backbone is None
    return nn.Linear(3, num_classes)


def _plain(weights: object = "downloads", num_classes: int = 5) -> nn.Module:
    assert weights is None
    return nn.Linear(4, num_classes)


@pytest.fixture
def manager(monkeypatch: pytest.MonkeyPatch) -> PluginManager:
    """Stand-ins for both libraries, which would download where they are asked for weights."""
    builders: dict[str, Any] = {"detector": _builder, "plain": _plain}

    def create_model(name: str, pretrained: bool = True, num_classes: int = 5) -> nn.Module:
        assert not pretrained
        return nn.Linear(len(name), num_classes)

    timm = ModuleType("timm")
    vars(timm).update(list_models=lambda: ["resnet18", "vit_tiny"], create_model=create_model)
    models = ModuleType("torchvision.models")
    vars(models).update(
        list_models=lambda: list(builders),
        get_model_builder=builders.__getitem__,
        get_model=lambda name, **arguments: builders[name](**arguments),
    )
    torchvision = ModuleType("torchvision")
    vars(torchvision).update(models=models)
    for module in (timm, torchvision, models):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return PluginManager([mergeot_libraries])


@pytest.mark.parametrize(
    ("spec", "shape"),
    [
        ("timm:resnet18", (5, 8)),
        ("timm:resnet18?num_classes=3", (3, 8)),
        ("timm:resnet18?pretrained=false&num_classes=3", (3, 8)),
        ("timm:vit_tiny.some_tag", (5, 17)),
        ("torchvision:plain?weights=none", (5, 4)),
        ("torchvision:Plain?num_classes=2", (2, 4)),
        ("torchvision:detector?num_classes=2", (2, 3)),
    ],
)
def test_a_name_gives_the_network_without_weights(manager: PluginManager, spec: str, shape: tuple[int, ...]) -> None:
    make = resolve_architecture(spec, manager)
    assert make().weight.shape == shape
    assert make == resolve_architecture(spec, manager)  # so that it is traced once for all checkpoints


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("timm:resnet18?pretrained=true", "pretrained=True asks timm for weights"),
        ("timm:resnet18?checkpoint_path=a.pt", "asks timm for weights"),
        ("torchvision:plain?weights=DEFAULT", "weights=DEFAULT asks torchvision for weights"),
        ("torchvision:detector?weights_backbone=DEFAULT", "weights_backbone=DEFAULT asks"),
        ("timm:resnet81", "Unknown network of timm 'resnet81'. Did you mean 'resnet18'? It has 2"),
        ("torchvision:plane", "Did you mean 'plain'"),
        ("timm:hf-hub:someone/net", "downloads nothing"),
        ("timm:resnet18?depth=3", "depth"),
    ],
)
def test_what_cannot_be_had_is_said(manager: PluginManager, spec: str, said: str) -> None:
    with pytest.raises(ArchitectureError) as error:
        resolve_architecture(spec, manager)()
    assert said in str(error.value)


@pytest.mark.parametrize("library", ["timm", "torchvision"])
def test_a_library_that_is_missing_is_one_message(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (library, f"{library}.models"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    finder = SimpleNamespace(find_spec=_refusing(library))
    monkeypatch.setattr(sys, "meta_path", [finder, *sys.meta_path])
    with pytest.raises(ArchitectureError) as error:
        resolve_architecture(f"{library}:resnet18", PluginManager([mergeot_libraries]))()
    assert f"{library}, which is not installed" in str(error.value)
    assert f"pip install 'mergekit-ot[{library}]'" in str(error.value)


def _refusing(library: str) -> Any:
    def find_spec(name: str, *_: object) -> None:
        if name.partition(".")[0] == library:
            raise ModuleNotFoundError(f"No module named '{library}'", name=library)

    return find_spec


def test_a_module_that_is_called_like_a_prefix_is_still_found(manager: PluginManager) -> None:
    make = resolve_architecture("torch.nn:Linear?in_features=3&out_features=2", manager)
    assert make().weight.shape == (2, 3)
