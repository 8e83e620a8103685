"""The report's metrics: known values, intervals, and scores that torch computes."""

import json
import sys

import numpy as np
import pytest
from report_cases import noisy
from skimage.metrics import structural_similarity

from dfa2_jax.report import metrics


def test_equal_images_have_the_best_scores():
    image, _ = noisy(0)
    assert metrics.psnr(image, image.copy()) == metrics.EQUAL_PSNR == 200
    assert metrics.ssim(image, image.copy()) == 1


@pytest.mark.parametrize("shift", [0.5, 0.1, 1e-3])
def test_psnr_and_ssim_of_shifted_images_are_those_of_the_formulas(shift):
    dark = np.full((16, 16, 3), 0.25, np.float32)
    light = dark + np.float32(shift)
    assert metrics.psnr(light, dark) == pytest.approx(-20 * np.log10(shift), abs=1e-3)
    c1 = 0.01**2  # Wang et al. 2004, equation 13: without variance there is the luminance alone
    want = (2 * 0.25 * (0.25 + shift) + c1) / (0.25**2 + (0.25 + shift) ** 2 + c1)
    assert metrics.ssim(light, dark) == pytest.approx(want, abs=1e-6)


def test_ssim_sees_the_noise_floor():
    """In float32, skimage's SSIM of images that differ in their last bits is off by 1e-7."""
    image, _ = noisy(1)
    near = np.nextafter(image, np.float32(1))
    assert 0 < 1 - metrics.ssim(near, image) < 1e-11
    _, far = noisy(1)
    want = structural_similarity(image, far, data_range=1.0, channel_axis=-1)
    assert metrics.ssim(far, image) == pytest.approx(want, abs=1e-5)


def test_the_interval_covers_the_mean_as_often_as_it_says(monkeypatch):
    monkeypatch.setattr(metrics, "RESAMPLES", 400)
    generator, covered = np.random.default_rng(0), 0
    for _ in range(200):
        low, high = metrics.mean_interval(generator.normal(3.0, 2.0, 30))
        covered += low <= 3 <= high
    assert 0.88 <= covered / 200 <= 0.98


def test_the_interval_is_reproducible_and_not_defined_for_one_prompt():
    values = np.random.default_rng(0).random(30)
    assert metrics.mean_interval(values) == metrics.mean_interval(values)
    assert metrics.mean_interval(values[:1]) is None


# On torch


def test_a_missing_package_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "lpips.safetensors").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "lpips", None)
    with pytest.raises(ValueError, match=r"lpips needs lpips: pip install 'dfa2-jax\[quality\]'"):
        metrics.lpips(tmp_path / "lpips.safetensors")


@pytest.mark.torch
def test_clip_score_is_the_models_cosine_and_runs_no_code_of_the_folder(tmp_path, monkeypatch):
    import torch
    from tiny import clip_tokenizer
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

    tokenizer = clip_tokenizer("<|endoftext|>")
    text = {"vocab_size": len(tokenizer), "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    text |= {"num_attention_heads": 2, "eos_token_id": len(tokenizer) - 1}
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 32, "patch_size": 8}
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).eval()
    processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    for part in (model, tokenizer, processor):
        part.save_pretrained(tmp_path)
    score = metrics.clip_score(tmp_path)
    image = noisy(0)[0]
    pixels = processor(images=(image * 255).round().astype(np.uint8), return_tensors="pt")
    tokens = tokenizer("a red circle", return_tensors="pt")
    with torch.no_grad():
        a, b = model.get_image_features(**pixels), model.get_text_features(**tokens)
    a, b = (getattr(x, "pooler_output", x)[0].numpy() for x in (a, b))
    cosine = float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
    assert score(image, "a red circle") == pytest.approx(max(100 * cosine, 0), abs=1e-3)
    assert 0 <= score(image, "a red circle " * 100) <= 100, "longer than the encoder"

    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asks whether to run the folder's code"))
    (tmp_path / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Own: pass\n")
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config |= {"auto_map": {"AutoTokenizer": ["own.Own", None]}, "tokenizer_class": "Own"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    metrics.clip_score(tmp_path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore:.*deprecated since 0.13")  # lpips 0.1.4 asks torchvision as one did before
@pytest.mark.parametrize("net", ["alex", "vgg"])
def test_lpips_is_the_packages(net, tmp_path):
    lpips = pytest.importorskip("lpips", reason="the extra `quality` is not in the locked environments")
    import torch
    from safetensors.torch import save_model

    torch.manual_seed(0)
    model = lpips.LPIPS(net=net, pretrained=False, pnet_rand=True, verbose=False).eval()
    save_model(model, tmp_path / "lpips.safetensors")
    distance = metrics.lpips(tmp_path / "lpips.safetensors")
    image, near = (np.tile(x, (2, 2, 1)) for x in noisy(0))
    pair = [torch.from_numpy(x.transpose(2, 0, 1)[None] * 2 - 1) for x in (near, image)]
    assert distance(image, image) == 0
    with torch.no_grad():
        assert distance(near, image) == pytest.approx(float(model(*pair)), rel=1e-5)
    (tmp_path / "other.safetensors").write_bytes((tmp_path / "lpips.safetensors").read_bytes()[:1000])
    with pytest.raises(ValueError, match="does not hold an lpips.LPIPS"):
        metrics.lpips(tmp_path / "other.safetensors")
