import base64
import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.toy_artifact import CLASSES, SIZE, image, write_artifact
from workloads import inference
from workloads.data.decode import ImageError
from workloads.inference import Model
from workloads.spec import Named


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return Model(write_artifact(tmp_path_factory.mktemp("classifier") / "artifact", "classifier"))


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return Model(write_artifact(tmp_path_factory.mktemp("encoder") / "artifact", "encoder"))


def normalised(seed: int) -> torch.Tensor:
    """What the network should see of `image(seed)`."""
    pixels = torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8))
    images = (pixels.double() / 255 - torch.tensor([0.4, 0.5, 0.6])) / torch.tensor([0.2, 0.25, 0.3])
    return images.float().permute(2, 0, 1)[None]


def test_predict_gives_the_five_most_probable_classes_in_order(classifier: Model) -> None:
    answers = classifier.predict([image(seed) for seed in range(3)])
    for seed, answer in enumerate(answers):
        with torch.no_grad():
            expected = classifier._network(normalised(seed)).softmax(dim=1)[0]
        values = list(answer["probabilities"].values())
        assert answer["index"] == int(expected.argmax())
        assert answer["label"] == CLASSES[answer["index"]] == next(iter(answer["probabilities"]))
        assert len(values) == 5 and values == sorted(values, reverse=True)
        assert answer["probabilities"] == pytest.approx(
            {CLASSES[i]: float(expected[i]) for i in expected.topk(5).indices}, abs=1e-5
        )
    assert len({answer["probabilities"][answer["label"]] for answer in answers}) == 3


def test_embed_is_what_the_encoder_says_and_of_a_classifier_what_its_head_sees(
    classifier: Model, encoder: Model
) -> None:
    with torch.no_grad():
        expected = encoder._network(normalised(1))[0]
    assert encoder.embed([image(0), image(1)])[1] == pytest.approx(expected.tolist(), abs=1e-5)
    features = torch.tensor(classifier.embed([image(1)]))
    assert features.shape == (1, classifier.card.num_features)
    with torch.no_grad():
        torch.testing.assert_close(classifier._network.head(features), classifier._network(normalised(1)))


def test_order_and_values_do_not_depend_on_chunks(
    classifier: Model, encoder: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = [image(seed) for seed in range(5)]
    whole = classifier.embed(images), encoder.reconstruct(images)
    monkeypatch.setattr(inference, "CHUNK", 2)
    np.testing.assert_allclose(classifier.embed(images), whole[0], atol=1e-5)
    drawn = encoder.reconstruct(images)
    for one, other in zip(drawn, whole[1], strict=True):
        np.testing.assert_allclose(pixels_of(one["reconstruction"]), pixels_of(other["reconstruction"]), atol=1)
        assert one["original"] == other["original"] and one["masked"] == other["masked"]


@pytest.mark.parametrize(("size", "kind"), [((64, 40), "JPEG"), ((5, 9), "PNG"), ((16, 16), "WEBP")])
def test_any_size_and_format_is_answered(classifier: Model, size: tuple[int, int], kind: str) -> None:
    assert classifier.predict([image(0, size, kind)])[0]["label"] in CLASSES


def pixels_of(png: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(png)))).astype(int)


def test_reconstruct_draws_the_same_for_the_same_bytes_wherever_they_stand(encoder: Model) -> None:
    first, second = encoder.reconstruct([image(0), image(1)])
    assert encoder.reconstruct([image(1)]) == [second]
    assert list(first) == ["original", "masked", "reconstruction"]
    original, masked, drawn = (pixels_of(first[name]) for name in first)
    given = np.asarray(Image.open(io.BytesIO(image(0))))
    np.testing.assert_allclose(original, given, atol=1)
    kept = (abs(masked - original) <= 1).all(axis=2)
    assert 0.2 < kept.mean() < 0.35  # a quarter of the patches stays
    np.testing.assert_allclose(drawn[kept], original[kept], atol=1)
    assert (pixels_of(second["masked"]) != masked).any()


def test_a_bad_image_is_named_by_its_position(classifier: Model, encoder: Model) -> None:
    for call in (classifier.predict, classifier.embed, encoder.reconstruct):
        with pytest.raises(ImageError, match="image 1: got 9 bytes"):
            call([image(0), b"no image!", image(1)])


def test_no_image_is_no_answer(classifier: Model, encoder: Model) -> None:
    assert classifier.predict([]) == classifier.embed([]) == encoder.reconstruct([]) == []


def test_what_an_artifact_cannot_do_is_said(classifier: Model, encoder: Model) -> None:
    with pytest.raises(ValueError, match="got an encoder, expected a classifier; use :embed"):
        encoder.predict([image(0)])
    with pytest.raises(ValueError, match="reconstruct"):
        classifier.reconstruct([image(0)])


def test_fewer_classes_than_five(tmp_path: Path) -> None:
    model = Model(write_artifact(tmp_path / "artifact", "classifier", classes=["ant", "bee"]))
    assert sum(model.predict([image(0)])[0]["probabilities"].values()) == pytest.approx(1)


def test_a_classifier_of_timm_embeds_before_its_head(tmp_path: Path) -> None:
    resnet = {"name": "resnet18", "image_size": SIZE}
    model = Model(write_artifact(tmp_path / "artifact", "classifier", model=resnet))
    assert model.card.spec.model == Named(**resnet)
    assert len(model.embed([image(0)])[0]) == model.card.num_features == 512


def test_an_image_of_more_pixels_than_are_allowed(tmp_path: Path) -> None:
    folder = write_artifact(tmp_path / "artifact", "encoder")
    assert len(Model(folder, max_pixels=SIZE * SIZE).embed([image(0)])) == 1
    with pytest.raises(ImageError, match=f"image 1: got {SIZE} x {SIZE} pixels, expected at most {SIZE * SIZE - 1}"):
        Model(folder, max_pixels=SIZE * SIZE - 1).embed([png_of_one_pixel(), image(0)])


def png_of_one_pixel() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (1, 1)).save(file, format="PNG")
    return file.getvalue()
