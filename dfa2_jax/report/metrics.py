"""How near an image is to another, and how well it suits its prompt; and how sure a mean over prompts is.

A video is judged frame by frame, and its score is the mean of its frames': of PSNR, too, the mean is of dB. How the
frames follow each other is judged by `temporal_difference`.

PSNR and SSIM need nothing but the images and scikit-image (the extra `report`). LPIPS and CLIP score run on torch, from
weights that the user has on disk, as safetensors: nothing is downloaded, and pickle is never read.
"""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from dfa2_jax.io.extras import need

Image = Float[np.ndarray, "H W 3"]
"""Float32, from 0 to 1."""

Video = Float[np.ndarray, "F H W 3"]
"""Float32, from 0 to 1; an image is a video of one frame."""

HIGHER_IS_BETTER = {
    "limit_psnr": True, "psnr": True, "ssim": True, "lpips": False, "temporal_difference": False, "clip": True,
}  # fmt: skip

EQUAL_PSNR = 200.0
"""dB, in place of the infinity of equal images: beyond what float32 pixels can tell apart (about 150)."""

RESAMPLES = 10_000


def psnr(image: Image, exact: Image) -> float:
    """Peak signal-to-noise ratio in dB; higher is nearer."""
    from skimage.metrics import peak_signal_noise_ratio

    if np.array_equal(image, exact):
        return EQUAL_PSNR
    return min(float(peak_signal_noise_ratio(exact, image, data_range=1.0)), EQUAL_PSNR)


def ssim(image: Image, exact: Image) -> float:
    """Structural similarity (Wang et al. 2004) in windows of 7 x 7, 1 for equal images."""
    from skimage.metrics import structural_similarity

    exact, image = exact.astype(np.float64), image.astype(np.float64)  # 1 - SSIM of the noise floor is 1e-12
    similarity: Any = structural_similarity(exact, image, data_range=1.0, channel_axis=-1)
    return float(similarity)


def temporal_difference(video: Video, exact: Video) -> float:
    """How much the motion of two videos differs; 0 for equal motion, lower is nearer.

    It is the mean over pixels and pairs of neighbouring frames of |(x[t+1] - x[t]) - (y[t+1] - y[t])|, at most 2. So an
    error that stays the same from frame to frame counts for nothing, and flicker counts in full. One frame alone has
    no motion.
    """

    def error(frame: int) -> Float[np.ndarray, "H W 3"]:
        return video[frame].astype(np.float64) - exact[frame]

    changes = [np.abs(error(frame + 1) - error(frame)).mean() for frame in range(len(video) - 1)]
    return float(np.mean(changes)) if changes else 0.0


def lpips(weights: Path) -> Callable[[Image, Image], float]:
    """Perceptual distance (arXiv 1801.03924) of the lpips package, on AlexNet or VGG; 0 for equal images.

    Args:
        weights: all of it, backbone and heads, as `safetensors.torch.save_model(lpips.LPIPS(net="alex"), path)` writes.

    Raises:
        ValueError: a package is missing, or the file is not that.
    """
    if weights.suffix != ".safetensors" or not weights.is_file():
        raise ValueError(
            f"lpips={str(weights)!r} must be a .safetensors file (pickle, .pth, is never read): where lpips has its "
            'weights, safetensors.torch.save_model(lpips.LPIPS(net="alex"), "lpips.safetensors") writes it.'
        )
    package, torch, safetensors = (need(name, "lpips", "quality") for name in ("lpips", "torch", "safetensors.torch"))
    try:
        tensors = safetensors.load_file(weights)
        net = "alex" if tensors["net.slice1.0.weight"].shape[-1] == 11 else "vgg"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # lpips 0.1.4 builds torchvision's networks as one did before 0.13
            model = package.LPIPS(net=net, pretrained=False, pnet_rand=True, verbose=False).eval()
        safetensors.load_model(model, weights)
    except Exception as error:  # safetensors raises its own, torch RuntimeErrors
        raise ValueError(
            f"lpips={str(weights)!r} does not hold an lpips.LPIPS of alex or vgg: {error!s:.300}"
        ) from error

    def distance(image: Image, exact: Image) -> float:
        pair = [torch.from_numpy(x.transpose(2, 0, 1)[None] * 2 - 1) for x in (image, exact)]
        with torch.no_grad():
            return float(model(*pair))

    return distance


def clip_score(folder: Path) -> Callable[[Image, str], float]:
    """CLIP score (arXiv 2104.08718): 100 times the cosine of image and prompt, not below 0; higher suits better.

    Args:
        folder: a `CLIPModel` of transformers with its processor.

    Raises:
        ValueError: a package is missing, or the folder is not that.
    """
    if not any(folder.glob("*.safetensors")):
        raise ValueError(
            f"clip={str(folder)!r} must be a folder of transformers' CLIPModel in safetensors (pickle, .bin, is "
            "never read), as CLIPModel.save_pretrained and CLIPProcessor.save_pretrained write it."
        )
    transformers, torch = (need(name, "clip", "quality") for name in ("transformers", "torch"))
    try:
        local = {"local_files_only": True, "trust_remote_code": False}
        model = transformers.CLIPModel.from_pretrained(folder, use_safetensors=True, **local).eval()
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **local)
        pixels = transformers.CLIPImageProcessor.from_pretrained(folder, **local)
    except Exception as error:
        raise ValueError(f"clip={str(folder)!r} does not hold a CLIPModel and its processor: {error!s:.300}") from error
    length = model.config.text_config.max_position_embeddings

    def score(image: Image, prompt: str) -> float:
        text = tokenizer(prompt, truncation=True, max_length=length, return_tensors="pt")
        seen = pixels(images=np.round(image * 255).astype(np.uint8), return_tensors="pt")
        with torch.no_grad():
            out = model(**text, **seen)
        return max(100 * float(torch.nn.functional.cosine_similarity(out.image_embeds, out.text_embeds)), 0.0)

    return score


def image_reward(folder: Path) -> Callable[[Image, str], float]:
    """ImageReward (arXiv 2304.05977) cannot be had as this project wants it.

    Raises:
        NotImplementedError: always, with the reasons.
    """
    raise NotImplementedError(
        f"image_reward={str(folder)!r} is not supported: the image-reward package (1.5, its last) reads pickled "
        "weights, downloads a tokenizer when it starts, and does not import beside today's packages (it wants timm "
        "0.6.13 and OpenAI's clip, which no index has). Score the pictures in an environment of its own, or use clip."
    )


def mean_interval(values: Float[np.ndarray, " prompts"], confidence: float = 0.95) -> tuple[float, float] | None:
    """Percentile bootstrap interval of the mean over prompts, the same for the same numbers; None for one prompt."""
    count = len(values)
    if count < 2:
        return None
    drawn = np.random.default_rng(0).multinomial(count, [1 / count] * count, size=RESAMPLES)  # how often each prompt is
    means = drawn @ values / count
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)
