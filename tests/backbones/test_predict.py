"""Prediction: whatever form an image comes in, the answer is that of the network on the image as it was tested."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import finetune_bn as fbn
from finetune_bn.backbones.card import Transform
from finetune_bn.data.transforms import image_transform
from finetune_bn.errors import BadData, FinetuneBNError
from tests.models import settle

timm = pytest.importorskip("timm")
pytest.importorskip("safetensors")

HALF = (0.5, 0.5, 0.5)
CLASSES = ("red", "green", "blue")


class ByColor(nn.Module):
    """Stands in for the network: its logits are the mean of each channel, so that the answer is known."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(10.0))
        self.batches: list[int] = []

    def forward(self, images: Tensor) -> Tensor:
        self.batches.append(len(images))
        return images.mean((2, 3)) * self.scale


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    net = settle(timm.create_model("test_resnet", num_classes=3))
    file = tmp_path_factory.mktemp("model") / "model.safetensors"
    return fbn.save(net, file, classes=CLASSES, transform=Transform((24, 24), HALF, HALF, crop_pct=0.9))


@pytest.fixture
def model(path: Path) -> fbn.TrainedModel:
    loaded = fbn.load(path)
    loaded.net = ByColor()
    return loaded


def picture(color: str = "red", size: tuple[int, int] = (40, 30)) -> Image.Image:
    return Image.new("RGB", size, color)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, color in (("b/blue.png", "blue"), ("a/red.jpg", "red"), ("green.bmp", "lime"), ("b/.hidden.png", "red")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        picture(color).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no image", encoding="utf-8")
    (tmp_path / ".cache").mkdir()
    picture().save(tmp_path / ".cache" / "x.png")
    (tmp_path / "b" / "loop").symlink_to(tmp_path)
    return tmp_path


def test_the_forms_of_one_image_give_one_answer(model: fbn.TrainedModel, tmp_path: Path) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8))
    noise.save(tmp_path / "noise.png")
    pixels = torch.from_numpy(np.asarray(noise).copy()).permute(2, 0, 1)
    forms: list[Any] = [noise, str(tmp_path / "noise.png"), tmp_path / "noise.png", pixels, pixels.float() / 255]
    answers = [model.predict(form) for form in forms]
    assert all(isinstance(answer, fbn.Prediction) for answer in answers)
    assert len({(answer.classes, answer.scores) for answer in answers}) == 1
    assert [answer.image for answer in answers] == ["image 0", *[str(tmp_path / "noise.png")] * 2, "image 0", "image 0"]
    assert [answer.scores for answer in model.predict(forms)] == [answer.scores for answer in answers]


def test_classes_come_best_first_with_their_probabilities(model: fbn.TrainedModel) -> None:
    answer = model.predict(picture("red"))
    expected = torch.tensor([10.0, -10.0, -10.0]).softmax(0)
    assert (answer.label, answer.classes[0]) == ("red", "red")
    assert set(answer.classes) == set(CLASSES)
    assert answer.scores == pytest.approx(sorted(expected.tolist(), reverse=True))
    assert str(answer).startswith("image 0: red 100.0 %, ")
    assert model.predict(picture("red"), top=1).classes == ("red",)
    assert len(model.predict(picture("red"), top=None).scores) == 3


@pytest.mark.parametrize("size", [(40, 30), (30, 41), (24, 24), (500, 20)])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_an_image_is_prepared_as_the_data_modules_prepare_test_images(
    model: fbn.TrainedModel, size: tuple[int, int], interpolation: str
) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8))
    reference = image_transform("none", 24, HALF, HALF, interpolation, 0.9)(noise)
    transform = Transform((24, 24), HALF, HALF, interpolation, 0.9)
    assert torch.equal(transform.build()(noise), reference)
    if interpolation == "bicubic":
        assert torch.equal(model.transform(noise), reference)


def test_a_folder_is_searched_once_in_the_order_of_paths_without_hidden_files_and_links(
    model: fbn.TrainedModel, folder: Path
) -> None:
    answers = model.predict(folder)
    assert [Path(answer.image).relative_to(folder).as_posix() for answer in answers] == [
        "a/red.jpg",
        "b/blue.png",
        "green.bmp",
    ]
    assert [answer.label for answer in answers] == ["red", "blue", "green"]
    assert [answer.label for answer in model.predict([folder / "a", picture("blue")])] == ["red", "blue"]


@pytest.mark.parametrize(("size", "batches"), [(1, [1] * 5), (2, [2, 2, 1]), (64, [5])])
def test_images_go_through_in_batches_and_the_answers_do_not_depend_on_them(
    model: fbn.TrainedModel, size: int, batches: list[int]
) -> None:
    colors = ["red", "blue", "lime", "blue", "red"]
    answers = model.predict([picture(color) for color in colors], batch_size=size)
    assert [answer.label for answer in answers] == ["red", "blue", "green", "blue", "red"]
    assert [answer.image for answer in answers] == [f"image {i}" for i in range(5)]
    assert model.net.batches == batches


def test_one_tensor_of_many_images_is_a_list_of_answers(model: fbn.TrainedModel) -> None:
    pixels = torch.zeros(2, 3, 10, 10, dtype=torch.uint8)
    pixels[0, 2], pixels[1, 0] = 255, 255
    assert [answer.label for answer in model.predict(pixels)] == ["blue", "red"]
    assert len(model.predict(pixels[:1])) == 1


def test_predicting_leaves_modes_random_state_and_gradients_as_they_are(path: Path) -> None:
    model = fbn.load(path)
    model.net.train()
    state, mean = torch.get_rng_state(), model.net.bn1.running_mean.clone()
    first = model.predict(picture())
    assert model.net.bn1.training
    assert torch.equal(model.net.bn1.running_mean, mean)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.predict(picture()) == first


def test_gray_images_go_into_a_network_of_one_channel(tmp_path: Path) -> None:
    net = settle(timm.create_model("test_resnet", num_classes=3, in_chans=1))
    model = fbn.load(fbn.save(net, tmp_path / "model.safetensors", transform=Transform((32, 32), (0.5,), (0.5,))))
    pixels = torch.full((1, 20, 20), 255, dtype=torch.uint8)
    white = model.predict(pixels)
    assert white.scores == model.predict(Image.new("RGB", (20, 20), "white")).scores
    assert white.scores == model.predict(Image.new("L", (20, 20), 255)).scores
    with torch.no_grad():
        expected = model(torch.ones(1, 1, 32, 32)).softmax(1).max()
    assert white.score == pytest.approx(float(expected), abs=1e-5)


def test_a_network_for_metric_learning_answers_with_embeddings(tmp_path: Path) -> None:
    net = settle(timm.create_model("test_resnet", num_classes=0))
    file = fbn.save(net, tmp_path / "model.safetensors", task="embedding", normalize=True)
    model = fbn.load(file)
    one, other = model.predict([picture("red"), picture("blue")])
    assert isinstance(one, fbn.Embedding)
    assert one.vector.shape == (net.num_features,)
    assert float(one.vector.norm()) == pytest.approx(1.0, abs=1e-5)
    assert not torch.allclose(one.vector, other.vector)
    torch.testing.assert_close(model.predict(picture("red")).vector, one.vector, rtol=1e-4, atol=1e-5)
    assert one.to_dict() == {"image": one.image, "vector": one.vector.tolist()}
    assert str(one) == f"{one.image}: a vector of {net.num_features} numbers"


def test_a_bar_is_shown_where_it_is_asked_for(model: fbn.TrainedModel, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("rich")
    model.predict([picture()] * 3, progress=True)
    assert "3 images" in capsys.readouterr().err
    model.predict([picture()] * 3, progress=False)
    assert capsys.readouterr().err == ""


# --- bad input --------------------------------------------------------------------------------------------------------


def test_an_image_that_cannot_be_read_is_named_or_left_out(model: fbn.TrainedModel, folder: Path) -> None:
    bad = folder / "a" / "broken.png"
    bad.write_bytes(b"\x89PNG nothing more")
    with pytest.raises(BadData, match=r"image: got .*broken\.png"):
        model.predict(folder)
    with pytest.warns(UserWarning, match=r"1 of 4 images cannot be read and are left out: \['.*broken\.png'\]"):
        answers = model.predict(folder, on_bad_image="skip", batch_size=1)
    assert [answer.label for answer in answers] == ["red", "blue", "green"]
    with pytest.warns(UserWarning, match="1 of 1"), pytest.raises(BadData, match=r"broken\.png"):
        model.predict(bad, on_bad_image="skip")


def test_a_folder_or_a_list_without_images_is_one_error(model: fbn.TrainedModel, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no image", encoding="utf-8")
    with pytest.raises(BadData, match=r"images: got .*a folder with images\. Suffixes that count: "):
        model.predict(tmp_path)
    with pytest.raises(BadData, match=r"images: got \[\].*It holds no image"):
        model.predict([])
    with pytest.raises(BadData, match="There is no such file or folder"):
        model.predict(tmp_path / "missing.jpg")


@pytest.mark.parametrize(
    ("images", "words"),
    [
        (3, "images: got 'int'; allowed: the path of an image"),
        (None, "images: got 'NoneType'"),
        (np.zeros((4, 4, 3)), r"images: got 'ndarray'.*PIL\.Image\.fromarray"),
        ([picture(), 3], "images: got 'int'"),
        (torch.randn(3, 8, 8), r"images: got 'floats from -.*call the model itself"),
        (torch.zeros(3, 8, 8, dtype=torch.int64), r"images: got 'a tensor of torch\.int64'"),
        (torch.zeros(4, 8, 8), r"images: got 'a tensor \[4, 8, 8\]'"),
        (torch.zeros(8, 8), r"images: got 'a tensor \[8, 8\]'"),
        (torch.full((3, 8, 8), float("nan")), "images: got 'floats from nan"),
    ],
)
def test_what_is_no_image_is_named(model: fbn.TrainedModel, images: Any, words: str) -> None:
    with pytest.raises(FinetuneBNError, match=words):
        model.predict(images)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"batch_size": 0}, "batch_size: got 0"),
        ({"batch_size": 2.5}, r"batch_size: got 2\.5"),
        ({"top": 0}, "top: got 0"),
        ({"on_bad_image": "ignore"}, "on_bad_image: got 'ignore'"),
        ({"device": "toaster"}, "device: got 'toaster'"),
    ],
)
def test_a_wrong_argument_is_named(model: fbn.TrainedModel, arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(FinetuneBNError, match=words):
        model.predict(picture(), **arguments)


def test_images_for_more_than_three_channels_are_left_to_the_caller(tmp_path: Path) -> None:
    net = settle(timm.create_model("test_resnet", num_classes=3, in_chans=5))
    model = fbn.load(fbn.save(net, tmp_path / "m.safetensors", transform=Transform((32, 32), (0.5,) * 5, (0.5,) * 5)))
    with pytest.raises(FinetuneBNError, match="call the model itself"):
        model.predict(picture())
    assert model(torch.randn(1, 5, 32, 32)).shape == (1, 3)


def test_answers_that_are_not_finite_are_an_error(model: fbn.TrainedModel) -> None:
    model.net.scale.data.fill_(float("inf"))
    with pytest.raises(FinetuneBNError, match="model: got 'NaN or infinity for image 0"):
        model.predict(picture())


def test_a_pipe_is_not_waited_for(model: fbn.TrainedModel, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(BadData, match="There is no such file"):
        model.predict(tmp_path / "pipe.png")
