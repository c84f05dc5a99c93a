"""ONNX files against the torch network that they were made from."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from facetrain.batch import network_input
from facetrain.data.decode import present_face
from facetrain.embed import BATCH_IMAGES
from facetrain.models.onnx_backbone import ONNX_DATA_KEY, OnnxBackbone, OnnxInput
from facetrain.networks import open_network
from facetrain.world import World

onnx = pytest.importorskip("onnx", reason="onnx is not installed")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")


def write_onnx(
    file: Path,
    *,
    batch: int | str = "n",
    channels: int = 3,
    px: int | str = 8,
    dim: int = 5,
    dtype: torch.dtype = torch.float32,
    stated: str | None = None,
) -> nn.Linear:
    """Write a network that flattens its input and multiplies it; return the same as a layer."""
    torch.manual_seed(0)
    layer = nn.Linear(channels * int(px if px != "h" else 8) ** 2, dim)
    weight, bias = (p.detach().to(dtype).numpy() for p in (layer.weight, layer.bias))
    helper = onnx.helper
    tensor = helper.np_dtype_to_tensor_dtype(weight.dtype)
    graph = helper.make_graph(
        [
            helper.make_node("Flatten", ["image"], ["flat"]),
            helper.make_node("Gemm", ["flat", "weight", "bias"], ["embedding"], transB=1),
        ],
        "net",
        [helper.make_tensor_value_info("image", tensor, [batch, channels, px, px])],
        [helper.make_tensor_value_info("embedding", tensor, [batch, dim])],
        [
            onnx.numpy_helper.from_array(weight, "weight"),
            onnx.numpy_helper.from_array(bias, "bias"),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    if stated:
        helper.set_model_props(model, {ONNX_DATA_KEY: stated})
    file.write_bytes(model.SerializeToString())
    return layer


def pixels(num_images: int, channels: int = 3) -> torch.Tensor:
    return torch.randint(0, 256, (num_images, 8, 8, channels), dtype=torch.uint8, generator=torch.Generator())


@pytest.mark.parametrize("batch", ["n", 1, 4])
@torch.no_grad()
def test_embeddings_are_those_of_the_network(tmp_path: Path, batch: int | str) -> None:
    layer = write_onnx(tmp_path / "n.onnx", batch=batch)
    backbone = OnnxBackbone(tmp_path / "n.onnx", OnnxInput())
    assert (backbone.channels, backbone.image_px) == (3, 8)
    images = network_input(pixels(6))
    torch.testing.assert_close(backbone(images), layer(images.flatten(1)), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_pixels_are_what_the_network_was_made_for(tmp_path: Path) -> None:
    layer = write_onnx(tmp_path / "n.onnx")
    images = pixels(3)
    backbone = OnnxBackbone(tmp_path / "n.onnx", OnnxInput(mean=100, std=50, colour="bgr"))
    expected = layer((images.flip(3).permute(0, 3, 1, 2).float() - 100).div(50).flatten(1))
    torch.testing.assert_close(backbone(network_input(images)), expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_bytes_are_turned_to_bgr_and_nothing_else(tmp_path: Path) -> None:
    helper, byte = onnx.helper, onnx.TensorProto.UINT8
    nodes = [
        helper.make_node("Cast", ["image"], ["floats"], to=onnx.TensorProto.FLOAT),
        helper.make_node("Flatten", ["floats"], ["embedding"]),
    ]
    image = helper.make_tensor_value_info("image", byte, ["n", 8, 8, 3])
    embedding = helper.make_tensor_value_info("embedding", onnx.TensorProto.FLOAT, ["n", 192])
    graph = helper.make_graph(nodes, "net", [image], [embedding])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    (tmp_path / "n.onnx").write_bytes(model.SerializeToString())
    images = pixels(2)
    for colour, expected in (("rgb", images), ("bgr", images.flip(3))):
        backbone = OnnxBackbone(tmp_path / "n.onnx", OnnxInput(colour=colour))  # type: ignore[arg-type]
        torch.testing.assert_close(backbone(network_input(images)), expected.flatten(1).float())
    with pytest.raises(ValueError, match=r"--onnx-mean, --onnx-std: .*n\.onnx takes pixels as they are"):
        OnnxBackbone(tmp_path / "n.onnx", OnnxInput(mean=0))


def test_no_batch_is_tried_out_on_a_gpu_for_what_onnxruntime_runs(tmp_path: Path) -> None:
    write_onnx(tmp_path / "n.onnx")
    world = World(device=torch.device("cuda"))
    assert open_network(tmp_path / "n.onnx", OnnxInput()).fitting_batch(world) == BATCH_IMAGES


@torch.no_grad()
def test_grey_networks_have_one_channel(tmp_path: Path) -> None:
    layer = write_onnx(tmp_path / "n.onnx", channels=1)
    backbone = OnnxBackbone(tmp_path / "n.onnx", OnnxInput())
    assert backbone.channels == 1
    images = network_input(pixels(2, 1))
    torch.testing.assert_close(backbone(images), layer(images.flatten(1)), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_half_precision_networks_get_half_precision(tmp_path: Path) -> None:
    layer = write_onnx(tmp_path / "n.onnx", dtype=torch.float16)
    images = network_input(pixels(3))
    embeddings = OnnxBackbone(tmp_path / "n.onnx", OnnxInput())(images)
    assert embeddings.dtype == torch.float32
    torch.testing.assert_close(embeddings, layer(images.flatten(1)), rtol=0, atol=5e-3)


def test_a_network_of_any_size_sees_images_resized_once(tmp_path: Path) -> None:
    write_onnx(tmp_path / "n.onnx", px=160)
    backbone = OnnxBackbone(tmp_path / "n.onnx", OnnxInput())
    face = np.random.default_rng(0).integers(0, 256, (160, 160, 3), dtype=np.uint8)
    assert np.array_equal(present_face(face, backbone.data), face)


def test_inputs_of_another_kind_than_expected_are_refused(tmp_path: Path) -> None:
    write_onnx(tmp_path / "n.onnx", dtype=torch.float64)
    expected = r"n\.onnx: expected an input of float, float16 or uint8, got tensor\(double\)"
    with pytest.raises(ValueError, match=expected):
        OnnxBackbone(tmp_path / "n.onnx", OnnxInput())
    write_onnx(tmp_path / "n.onnx", stated='{"image_px": 40, "colour": "grey"}')
    expected = r"n\.onnx: .* facetrain\.data: expected 3 channels of 8 px, as the input has, got 1 of 40 px"
    with pytest.raises(ValueError, match=expected):
        OnnxBackbone(tmp_path / "n.onnx", OnnxInput())


def test_files_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    (tmp_path / "text.onnx").write_text("not a network")
    with pytest.raises(ValueError, match=r"text\.onnx: not a readable ONNX network: ") as caught:
        OnnxBackbone(tmp_path / "text.onnx", OnnxInput())
    assert "\n" not in str(caught.value)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        OnnxBackbone(tmp_path / "nowhere.onnx", OnnxInput())
    for options in ({"channels": 4}, {"px": "h"}):
        write_onnx(tmp_path / "odd.onnx", **options)
        with pytest.raises(ValueError, match=r"odd\.onnx: expected one input \[B, 1 or 3, H, H\] of fixed H"):
            OnnxBackbone(tmp_path / "odd.onnx", OnnxInput())
    with pytest.raises(ValueError, match="std: expected more than 0, got 0"):
        OnnxInput(std=0)


class OnGpu3(torch.Tensor):
    """Says that it is on a GPU, where it isn't."""

    device = property(lambda self: torch.device("cuda", 3))  # type: ignore[assignment]


def test_the_network_runs_where_the_images_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime

    asked: list[list[object]] = []
    real = onnxruntime.InferenceSession

    def session(file: str, options: object, providers: list[object]) -> object:
        asked.append(providers)
        return real(file, options, providers=["CPUExecutionProvider"])

    write_onnx(tmp_path / "net.onnx")
    monkeypatch.setattr(onnxruntime, "InferenceSession", session)
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    network, images = OnnxBackbone(tmp_path / "net.onnx", OnnxInput()), network_input(pixels(2))
    network(images)
    with pytest.raises(Exception, match=r"CUDA|NVIDIA"):  # it would put the embeddings there
        network(images.as_subclass(OnGpu3))
    network(images)
    cpu = ["CPUExecutionProvider"]
    assert asked == [cpu, [("CUDAExecutionProvider", {"device_id": 3}), *cpu], cpu]
