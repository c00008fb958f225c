"""Starting weights: ours and public ones, what is adapted and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tests.toy import TOY_MAE, TOY_MODEL
from workloads import artifact
from workloads.artifact import ArtifactError
from workloads.assemble import build_method
from workloads.methods.base import DataInfo
from workloads.models.vit import ViT, ViTConfig, resize_positions
from workloads.spec import JobSpec
from workloads.weights import is_public, load_initial, locate


def encoder(seed: int = 0, **changes: Any) -> ViT:
    torch.manual_seed(seed)
    return ViTConfig.model_validate({k: v for k, v in TOY_MODEL.items() if k != "name"} | changes).build()


def saved(path: Path, weights: dict[str, Tensor], prefix: str = "") -> str:
    save_file({prefix + name: value.contiguous() for name, value in weights.items()}, path)
    return str(path)


def refusal(model: nn.Module, reference: str, home: Path) -> str:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ArtifactError) as caught:
        load_initial(model, reference, home)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    return str(caught.value)


@pytest.fixture(scope="module")
def timm() -> Any:
    """Imported once: it costs seconds."""
    from workloads.models.timm_import import timm

    return timm


@pytest.fixture(scope="module")
def public(timm: Any) -> nn.Module:
    """A plain ViT of timm, as small as the toy model, with its head of 10 classes."""
    torch.manual_seed(3)
    sizes = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2}
    model: nn.Module = timm.create_model("vit_tiny_patch16_224", pretrained=False, num_classes=10, **sizes)
    return model


def test_a_file_gives_the_features_of_its_model(public: nn.Module, tmp_path: Path) -> None:
    ours = encoder()
    notes = load_initial(ours, saved(tmp_path / "vit.safetensors", public.state_dict()), tmp_path)
    assert notes == ["head.bias, head.weight are left out: no part of the encoder"]
    images = torch.randn(2, 3, 16, 16)
    expected = public.eval().forward_features(images)  # type: ignore[operator]
    torch.testing.assert_close(ours.eval().forward_features(images), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("prefix", ["module.", "encoder.", "backbone.", "model.", "module.encoder.", "model.backbone."])
def test_prefixes_of_public_files_are_stripped(prefix: str, tmp_path: Path) -> None:
    source, target = encoder(1), encoder(2)
    path = tmp_path / "a.safetensors"
    save_file(
        {prefix + name: value for name, value in source.state_dict().items()} | {"queue.keys": torch.zeros(3)}, path
    )
    notes = load_initial(target, str(path), tmp_path)
    assert notes == [f"names of {path} were taken without {prefix!r}", "queue.keys is left out: no part of the encoder"]
    assert all(torch.equal(value, source.state_dict()[name]) for name, value in target.state_dict().items())


def test_the_decoder_of_mae_is_left_out(tmp_path: Path) -> None:
    source, target = encoder(1), encoder(2)
    decoder = {f"decoder_blocks.{i}.weight": torch.zeros(1) for i in range(7)} | {"mask_token": torch.zeros(1, 1, 8)}
    notes = load_initial(target, saved(tmp_path / "mae.safetensors", source.state_dict() | decoder), tmp_path)
    assert len(notes) == 1
    assert "decoder_blocks.0.weight" in notes[0] and "and 3 more are left out" in notes[0]
    assert torch.equal(target.blocks[1].mlp.fc2.weight, source.blocks[1].mlp.fc2.weight)  # type: ignore[union-attr]


def test_an_artifact_of_a_classifier_at_another_size(tmp_path: Path) -> None:
    source = encoder(0).as_classifier(2)
    spec = {"name": "toy", "method": TOY_MAE, "model": TOY_MODEL, "data": {"train": {"shards": "x.tar"}}, "epochs": 1}
    card = {
        "kind": "classifier",
        "job_id": "j1",
        "spec": JobSpec.model_validate(spec),
        "paper": "a paper",
        "classes": ["a", "b"],
        "image_size": 16,
        "mean": (0.5, 0.5, 0.5),
        "std": (0.229, 0.224, 0.225),
        "num_instances": 10,
        "datasets": {},
    }
    artifact.write(tmp_path / "registry" / "toy" / "1", source, card, None)
    bigger = encoder(1, image_size=24)
    notes = load_initial(bigger, "toy@1", tmp_path)
    label = tmp_path / "registry" / "toy" / "1" / "model.safetensors"
    assert notes == [
        "pos_embed resized 4x4 -> 6x6",
        "fc_norm.bias, fc_norm.weight, head.bias, head.weight are left out: no part of the encoder",
        f"norm.weight, norm.bias are fresh: not in {label}",
        f"pixels are normalised by mean (0.485, 0.456, 0.406), those of {label} were by (0.5, 0.5, 0.5)",
    ]
    assert torch.equal(bigger.pos_embed, resize_positions(source.pos_embed, (4, 4), (6, 6)))
    assert torch.equal(bigger.blocks[1].mlp.fc1.weight, source.blocks[1].mlp.fc1.weight)  # type: ignore[union-attr]
    assert not any("pixels" in note for note in load_initial(bigger, "toy", tmp_path, mean=(0.5, 0.5, 0.5)))


def test_models_of_timm_with_other_prefix_tokens_and_grids(timm: Any, tmp_path: Path) -> None:
    sizes = {"embed_dim": 16, "depth": 1, "num_heads": 2, "patch_size": 4, "num_classes": 0, "reg_tokens": 2}

    def build(**more: Any) -> Any:
        return timm.create_model("vit_tiny_patch16_224", **sizes, **more)

    source, target = build(img_size=16), build(img_size=(24, 16))
    path = saved(tmp_path / "reg.safetensors", source.state_dict())
    assert load_initial(target, path, tmp_path) == ["pos_embed resized 4x4 -> 6x4"]
    assert target.pos_embed.shape == (1, 3 + 24, 16)
    assert torch.equal(target.pos_embed[:, :3], source.pos_embed[:, :3])

    without = build(img_size=24, no_embed_class=True)
    assert "pos_embed: got (1, 19, 16), expected (1, 36, 16)" in refusal(without, path, tmp_path)


def test_a_convolutional_network_takes_all_but_its_classifier(timm: Any, tmp_path: Path) -> None:
    source, target = timm.create_model("test_resnet"), timm.create_model("test_resnet", num_classes=0)
    weights = {n: v for n, v in source.state_dict().items() if not n.endswith("num_batches_tracked")}
    path = saved(tmp_path / "resnet.safetensors", weights)  # as of before PyTorch 0.4.1
    notes = load_initial(target, path, tmp_path)
    assert notes[0] == "fc.bias, fc.weight are left out: no part of the encoder"
    assert "num_batches_tracked" in notes[1] and len(notes) == 2
    assert torch.equal(target.layer1[0].conv1.weight, source.layer1[0].conv1.weight)


def test_mismatches_are_listed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = saved(tmp_path / "a.safetensors", encoder().state_dict())
    message = refusal(encoder(dim=32), path, tmp_path)
    assert "blocks.0.attn.proj.bias: got (16,), expected (32,)" in message
    assert message.count("expected (") == 10 and message.endswith("and 20 more, all of them in the log")
    assert caplog.text.count("expected (") == 30
    message = refusal(encoder(depth=1), path, tmp_path)
    assert "blocks.1.attn.qkv.weight: got (48, 16), expected no such weight" in message
    message = refusal(encoder(depth=3), path, tmp_path)
    assert "blocks.2.norm1.weight: got nothing, expected (16,)" in message
    message = refusal(encoder(patch_size=8), path, tmp_path)
    assert "their patches are 4x4 pixels, the model's 8x8: set patch_size" in message


def test_on_the_meta_device_only_shapes_are_compared(
    timm: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = saved(tmp_path / "a.safetensors", encoder().state_dict())
    monkeypatch.setattr("safetensors.torch.load_file", None)
    monkeypatch.setattr("timm.models._builder.load_pretrained", None)
    with torch.device("meta"):
        assert load_initial(encoder(image_size=24), path, tmp_path) == ["pos_embed resized 4x4 -> 6x6"]
        with pytest.raises(ArtifactError, match="do not fit the model"):
            load_initial(encoder(dim=32), path, tmp_path)
        fresh = timm.create_model("test_vit", num_classes=0)
        assert load_initial(fresh, "timm:test_vit.r160_in1k", tmp_path)[-1].startswith("pixels are normalised by std")


@pytest.mark.parametrize("reference", ["timm:vit_base_patch16_224.mae", "vit_base_patch16_224.mae"])
def test_weights_of_timm(
    reference: str, timm: Any, public: nn.Module, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[tuple[str, dict[str, Any]]] = []

    def create_model(name: str, **options: Any) -> nn.Module:
        asked.append((name, options))
        torch.rand(5)
        return public

    monkeypatch.setattr(timm, "create_model", create_model)
    monkeypatch.setattr(public, "pretrained_cfg", {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)})
    ours = encoder()
    state = torch.get_rng_state()
    notes = load_initial(ours, reference, tmp_path)
    assert asked == [("vit_base_patch16_224.mae", {"pretrained": True, "num_classes": 0})]
    assert torch.equal(ours.patch_embed.proj.bias, public.patch_embed.proj.bias)  # type: ignore[union-attr, arg-type]
    assert [note.split(" (")[0] for note in notes[1:]] == [
        "pixels are normalised by mean",
        "pixels are normalised by std",
    ]
    assert torch.equal(torch.get_rng_state(), state), "the method's fresh weights must not depend on timm's draws"


def test_public_names_are_those_of_which_timm_has_weights() -> None:
    assert is_public("resnet18.a1_in1k") and is_public("resnet18")
    assert not is_public("digits-mae") and not is_public("resnet18.none")


def test_without_network(timm: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import httpx

    for error in (ConnectionError("no route"), httpx.ReadTimeout("no route")):

        def create_model(name: str, error: Exception = error, **_: Any) -> nn.Module:
            raise error

        monkeypatch.setattr(timm, "create_model", create_model)
        message = refusal(encoder(), "timm:vit_base_patch16_224.mae", tmp_path)
        assert f"could not be downloaded ({type(error).__name__}: no route)" in message
        assert "fetch model.safetensors of https://huggingface.co/timm/vit_base_patch16_224.mae" in message


@pytest.mark.parametrize(
    ("reference", "words"),
    [
        ("timm:vit_base_patch16_224.mea", "vit_base_patch16_224.mae"),
        ("timm:resnet5", "resnet50"),
        ("timm:qqqqqqqqqqqq", "https://huggingface.co/timm lists them"),
        ("vit_base_patch16_225", "vit_base_patch16_224"),
        ("digits@3", "a .safetensors file, or timm:<name>"),
        ("job:j8", "names no artifact"),
        ("weights/mae.safetensors", "got weights/mae.safetensors, which is no file here"),
    ],
)
def test_references_that_name_nothing(reference: str, words: str, timm: Any, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError) as caught:
        locate(reference, tmp_path)
    assert words in str(caught.value)


def test_a_truncated_file(tmp_path: Path) -> None:
    path = Path(saved(tmp_path / "a.safetensors", encoder().state_dict()))
    path.write_bytes(path.read_bytes()[:-1])
    assert "expected a whole safetensors file" in refusal(encoder(), str(path), tmp_path)


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin", ".ckpt", ".pth.tar"])
def test_a_pickle_is_refused_and_the_command_converts_it(suffix: str, tmp_path: Path) -> None:
    source, target = encoder(1), encoder(2)
    path = tmp_path / f"mae{suffix}"
    torch.save({"model": source.state_dict(), "epoch": 800}, path)
    message = refusal(target, str(path), tmp_path)
    exec(message.partition('python -c "')[2].rstrip('"'))
    (converted,) = tmp_path.glob("*.safetensors")
    assert load_initial(target, str(converted), tmp_path) == []
    assert torch.equal(target.cls_token, source.cls_token)


def test_a_folder_of_the_hub_tells_its_normalisation(tmp_path: Path) -> None:
    path = saved(tmp_path / "model.safetensors", encoder().state_dict())
    (tmp_path / "config.json").write_text(
        json.dumps({"pretrained_cfg": {"mean": [0.485, 0.456, 0.406], "std": [1, 1, 1]}})
    )
    notes = load_initial(encoder(1), path, tmp_path)
    assert notes == [f"pixels are normalised by std (0.229, 0.224, 0.225), those of {path} were by (1, 1, 1)"]


def test_a_job_starts_from_them_and_logs_the_notes(
    toy_job: Callable[..., JobSpec], caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    source = encoder(5).as_classifier(2)
    spec = toy_job(init=saved(tmp_path / "a.safetensors", source.state_dict()))
    with caplog.at_level("INFO", logger="workloads.assemble"):
        method = build_method(spec, DataInfo(num_instances=80, num_classes=4, shape=(3, 16, 16)), tmp_path)
    assert torch.equal(method.get_parameter("encoder.cls_token"), source.cls_token)
    assert "init: norm.weight, norm.bias are fresh" in caplog.text


def test_positions_of_images_that_are_not_square(tmp_path: Path) -> None:
    """The grid is that of the images that they were trained on, not the square of as many patches."""
    source = encoder(0, image_size=(32, 8))  # 8 x 2 patches, as many as 4 x 4
    file = saved(tmp_path / "model.safetensors", source.state_dict())
    (tmp_path / "config.json").write_text(json.dumps({"pretrained_cfg": {"input_size": [3, 32, 8]}}))
    square = encoder(1, image_size=16)
    assert load_initial(square, file, tmp_path)[0] == "pos_embed resized 8x2 -> 4x4"
    assert torch.equal(square.pos_embed, resize_positions(source.pos_embed, (8, 2), (4, 4)))
    assert not any("resized" in note for note in load_initial(encoder(1, image_size=(32, 8)), file, tmp_path))
