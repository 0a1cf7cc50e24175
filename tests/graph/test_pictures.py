"""Pictures of the groups and of the modules: whole, well formed, and showing what there is."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import pytest
import torch
from architectures import samples
from networks import resnet18, small_llama
from torch import nn

from mergekit_ot import trace_model
from mergekit_ot.pictures.groups import group_svg
from mergekit_ot.pictures.modules import module_flow, module_svg

NETS = {
    "resnet18": (resnet18, torch.zeros(2, 3, 64, 64)),
    "llama": (small_llama, torch.zeros(2, 7, dtype=torch.long)),
    "mlp": (lambda: nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), torch.zeros(2, 3)),
    "nothing": (lambda: nn.Linear(3, 2), torch.zeros(2, 3)),
}
SVG = "{http://www.w3.org/2000/svg}"


def drawn(name: str):
    make, inputs = NETS[name]
    graph = trace_model(make(), inputs)
    return graph, ElementTree.fromstring(group_svg(graph)), ElementTree.fromstring(module_svg(graph))


@pytest.mark.parametrize("name", NETS)
def test_every_group_stands_once_in_the_picture(name: str) -> None:
    graph, picture, _ = drawn(name)
    texts = [element.text for element in picture.iter(f"{SVG}text")]
    for key in graph.free_groups:
        assert texts.count(key) == 1
    assert graph.free_groups or "no free neuron group was found" in texts


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("which", [1, 2])
def test_everything_lies_inside_the_picture(name: str, which: int) -> None:
    picture = drawn(name)[which]
    width, height = float(picture.get("width")), float(picture.get("height"))
    for element in picture.iter(f"{SVG}rect"):
        if element.get("x") is not None and not element.get("width").endswith("%"):
            assert float(element.get("x")) + float(element.get("width")) <= width
            assert float(element.get("y")) + float(element.get("height")) <= height
    for element in picture.iter(f"{SVG}path"):
        points = [float(number) for number in re.findall(r"-?\d+\.?\d*", element.get("d"))]
        assert all(-1 <= x <= width + 1 for x in points[::2])
        assert all(-1 <= y <= height + 1 for y in points[1::2])


@pytest.mark.parametrize("name", ["resnet18", "llama"])
def test_boxes_do_not_cover_each_other(name: str) -> None:
    picture = drawn(name)[1]
    boxes = [
        tuple(float(element.get(side)) for side in ("x", "y", "width", "height"))
        for element in picture.iter(f"{SVG}rect")
        if element.get("class") in (None, "stream") and not element.get("width").endswith("%")
    ]
    assert len(boxes) > 4
    for number, (x, y, width, height) in enumerate(boxes):
        for other_x, other_y, other_width, other_height in boxes[number + 1 :]:
            apart = x + width <= other_x or other_x + other_width <= x
            assert apart or y + height <= other_y or other_y + other_height <= y


def test_a_stream_is_a_band_and_families_stand_inside_their_heads() -> None:
    _, picture, _ = drawn("llama")
    kinds = [element.get("class") for element in picture.iter(f"{SVG}rect")]
    assert (kinds.count("stream"), kinds.count("band"), kinds.count("inner")) == (1, 1, 4)
    _, resnet, _ = drawn("resnet18")
    assert [element.get("class") for element in resnet.iter(f"{SVG}rect")].count("band") == 4


def test_the_flow_of_modules_has_no_cycle_and_every_called_module() -> None:
    graph, _, _ = drawn("resnet18")
    flow = module_flow(graph)
    titles = {data["title"] for _, data in flow.nodes(data=True)}
    assert {"conv1", "fc", "blocks.0.body"} <= titles or {"conv1", "fc", "blocks.0"} <= titles
    assert len(flow) <= 60


def test_a_shared_module_has_a_box_per_call() -> None:
    sample = samples("mixed")["siamese_convolutional"]
    flow = module_flow(trace_model(sample.make(), sample.inputs()))
    titles = [data["title"] for _, data in flow.nodes(data=True) if data["is_module"]]
    assert len(titles) > len(set(titles))
