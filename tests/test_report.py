"""The quality report: metrics against known values, the noise floor, the gate, the two files, what heads do."""

import json
import pickle
import sys
import time
from html.parser import HTMLParser
from statistics import median
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from skimage.metrics import structural_similarity

from dfa2_jax import Pipeline, Plan, PlanError, cli, quality_report
from dfa2_jax.report import attention_maps as heads
from dfa2_jax.report import metrics as quality
from dfa2_jax.report import report
from dfa2_jax.report import table as report_table
from dfa2_jax.report.table import Judges, Line, Report, Shot
from pallas_kernels import Layout

PROMPTS = ["a large red circle", '猫が<b>座っている</b> & "', "قطة صغيرة", "🐱 star"]
SIZE = {"height": 64, "width": 96, "num_inference_steps": 4, "max_sequence_length": 16}


def noisy(seed, scale=0.1):
    generator = np.random.default_rng(seed)
    image = generator.random((32, 48, 3), np.float32)
    return image, np.clip(image + scale * generator.standard_normal(image.shape), 0, 1).astype(np.float32)


def test_equal_images_have_the_best_scores():
    image, _ = noisy(0)
    assert quality.psnr(image, image.copy()) == quality.EQUAL_PSNR == 200
    assert quality.ssim(image, image.copy()) == 1


@pytest.mark.parametrize("shift", [0.5, 0.1, 1e-3])
def test_psnr_and_ssim_of_shifted_images_are_those_of_the_formulas(shift):
    dark = np.full((16, 16, 3), 0.25, np.float32)
    light = dark + np.float32(shift)
    assert quality.psnr(light, dark) == pytest.approx(-20 * np.log10(shift), abs=1e-3)
    c1 = 0.01**2  # Wang et al. 2004, equation 13: without variance there is the luminance alone
    want = (2 * 0.25 * (0.25 + shift) + c1) / (0.25**2 + (0.25 + shift) ** 2 + c1)
    assert quality.ssim(light, dark) == pytest.approx(want, abs=1e-6)


def test_ssim_sees_the_noise_floor():
    """In float32, skimage's SSIM of images that differ in their last bits is off by 1e-7."""
    image, _ = noisy(1)
    near = np.nextafter(image, np.float32(1))
    assert 0 < 1 - quality.ssim(near, image) < 1e-11
    _, far = noisy(1)
    want = structural_similarity(image, far, data_range=1.0, channel_axis=-1)
    assert quality.ssim(far, image) == pytest.approx(want, abs=1e-5)


def test_the_interval_covers_the_mean_as_often_as_it_says(monkeypatch):
    monkeypatch.setattr(quality, "RESAMPLES", 400)
    generator, covered = np.random.default_rng(0), 0
    for _ in range(200):
        low, high = quality.mean_interval(generator.normal(3.0, 2.0, 30))
        covered += low <= 3 <= high
    assert 0.88 <= covered / 200 <= 0.98


def test_the_interval_is_reproducible_and_not_defined_for_one_prompt():
    values = np.random.default_rng(0).random(30)
    assert quality.mean_interval(values) == quality.mean_interval(values)
    assert quality.mean_interval(values[:1]) is None


# Heads


def hand_made(layout):
    """Queries and keys of five heads: uniform; self; the next but two; the first text token; half text, half self."""
    length, heads, dim = layout.length, 5, layout.length
    q, k = np.zeros((2, length, heads, dim), np.float32), np.zeros((2, length, heads, dim), np.float32)
    k[:] = np.eye(length)[:, None]
    sure = 60 * dim**0.5
    visual, text = np.arange(length)[layout.visual], np.arange(length)[layout.text]
    for place, token in enumerate(visual):
        q[:, token, 1, token] = sure
        q[:, token, 2, visual[(place + 3) % len(visual)]] = sure
        q[:, token, 3, text[0]] = sure
        q[:, token, 4, [token, text[-1]]] = sure
    return jnp.asarray(q), jnp.asarray(k)


@pytest.mark.parametrize("text_first", [True, False])
@pytest.mark.parametrize("rows", [1, 3, 100])
def test_masses_of_hand_made_attention(text_first, rows, monkeypatch):
    layout, windows = Layout(4, 10, text_first), (0, 3, 20)
    monkeypatch.setattr(heads, "WEIGHT_BYTES", 4 * 2 * layout.length * rows)
    found = np.asarray(heads.masses(*hand_made(layout), windows, layout))
    near = [np.mean([np.sum(np.abs(np.arange(10) - i) <= w) for i in range(10)]) for w in windows]
    uniform = [4 / 14, *(count / 14 for count in near)]
    jump = [0, 0, 0.7, 1]  # three of ten queries wrap around: their key is seven tokens away
    want = [uniform, [0, 1, 1, 1], jump, [1, 0, 0, 0], [0.5, 0.5, 0.5, 0.5]]
    np.testing.assert_allclose(found, want, atol=1e-6)


def test_masses_without_text():
    layout = Layout(0, 9, True)
    q = jnp.zeros((1, 9, 2, 4))
    found = np.asarray(heads.masses(q, q, (1,), layout))
    np.testing.assert_allclose(found, [[0, 25 / 81]] * 2, rtol=1e-5)


def test_masses_at_every_step_are_those_of_the_dense_trajectory(tiny_flux_schnell):
    pipeline = Pipeline.from_pretrained(tiny_flux_schnell)
    call = pipeline.prepare(prompt=PROMPTS[0], **SIZE, output_type="latent")
    plan = Plan.full(pipeline.setting_of(call)).with_method(2, 1, 0, "arrow(1/4)")
    visual = plan.setting.layers[0].num_visual
    assert heads.windows_of([plan]) == (visual // 8,)
    found = heads.watch(pipeline, call, (1, 3, visual), progress=False)
    assert found.text.shape == plan.choices.shape
    assert np.all(np.diff(found.near, axis=0) >= 0)
    np.testing.assert_allclose(found.text + found.near[-1], 1, atol=1e-5)

    run, tokens, _ = pipeline.denoiser(call, None)
    later = np.asarray(run(tokens, None, 0, 2)[0])  # the third step, from what two dense ones left
    options = {"heads": pipeline.config.num_attention_heads, "half_windows": (1, 3, visual)}
    transformer, inputs = pipeline.transformer, jax.device_put(call.inputs)
    _, third = heads.watched_step(transformer.graph, transformer.params, later, inputs, 2, **options)
    np.testing.assert_allclose(found.text[2], third[..., 0], atol=1e-5)
    assert np.abs(found.text[1] - third[..., 0]).max() > 1e-3


# The report


def broken(plan):
    """All heads cached after the first step."""
    return plan.with_method(slice(1, None), None, None, "cached")


@pytest.fixture(scope="module")
def full(request):
    pipeline = Pipeline.from_pretrained(request.getfixturevalue("tiny_sd35"))
    return Plan.full(pipeline.setting(prompt="", **SIZE))


@pytest.fixture(scope="module")
def plans(full):
    return {"full": full, "arrows": full.with_method(slice(1, None), None, None, "arrow(1/4)"), "broken": broken(full)}


@pytest.fixture(scope="module")
def made(plans, request):
    folder = request.getfixturevalue("tiny_sd35")
    limits = {"ssim": 0.97, "psnr": 20.0}
    return quality_report(folder, plans, PROMPTS[:3], seed=[0, 7], batch=4, limits=limits, progress=False)


def line_of(made, name):
    return next(line for line in made.lines if line.name == name)


def test_rows_are_the_plans_between_noise_and_another_seed(made):
    names = ["dense", "float32, sums reordered", "bfloat16 against float32", "bfloat16, sums reordered"]
    assert [one.name for one in made.lines] == [*names, "full", "arrows", "broken", "another seed"]
    psnr = {one.name: one.mean("psnr") for one in made.lines[1:]}
    assert quality.EQUAL_PSNR > psnr["float32, sums reordered"] > 120
    assert 70 > psnr["bfloat16 against float32"] > psnr["arrows"]
    assert 70 > psnr["bfloat16, sums reordered"] > psnr["broken"] > psnr["another seed"]
    assert all(len(one.scores["ssim"]) == 6 for one in made.lines[1:])


def test_a_full_plan_is_within_the_noise_and_the_others_are_not(made):
    for name, within in (("full", True), ("arrows", False), ("broken", False)):
        distances = made.distances(line_of(made, name))
        assert [one["within"] for one in distances] == [within] * 3
        assert all((one["psnr"] <= 0) == within for one in distances)
    floor, arrows = line_of(made, "bfloat16 against float32"), line_of(made, "arrows")
    assert made.distances(arrows)[1]["psnr"] == pytest.approx(floor.mean("psnr") - arrows.mean("psnr"))


def test_images_are_those_that_the_pipeline_gives(made, plans, tiny_sd35):
    pipeline = Pipeline.from_pretrained(tiny_sd35)
    arguments = {"prompt": [PROMPTS[1]] * 4, "seed": [0, 7, 1, 2], "output_type": "np", "progress": False}
    exact = pipeline(**arguments, **SIZE).images[1]
    image = pipeline(**arguments, plan=plans["broken"]).images[1]
    scores = made.content()["rows"][-2]["metrics"]
    assert scores["psnr"]["values"][1][1] == pytest.approx(quality.psnr(image, exact), abs=0.01)
    assert scores["ssim"]["values"][1][1] == pytest.approx(quality.ssim(image, exact), abs=1e-4)


def test_the_five_worst_pairs_are_kept(made):
    broken = line_of(made, "broken")
    assert [pair.scores["ssim"] for pair in broken.worst] == sorted(broken.scores["ssim"])[:5]
    for pair in broken.worst:
        assert pair.scores["ssim"] == pytest.approx(quality.ssim(pair.image, pair.exact))


def test_heads_are_told_by_layer(made, full):
    assert made.masses.text.shape == full.choices.shape
    no_text = [layer.num_text == 0 for layer in full.setting.layers]
    np.testing.assert_array_equal(made.masses.text.max((0, 2)) == 0, no_text)
    assert made.masses.half_windows == (24 // 8,)


def test_the_first_call_of_a_program_is_not_timed(no_shape_checks):
    compiled = []

    def denoiser(call, plan, implementation):
        def run(tokens, caches, start, stop):
            if (program := (plan is None, implementation)) not in compiled:
                compiled.append(program)
                time.sleep(0.5)
            return np.full(1, stop), caches

        return run, None, None

    sampler = report.Sampler(SimpleNamespace(denoiser=denoiser), {}, 1)
    call = SimpleNamespace(request=SimpleNamespace(steps=3))
    for implementation in (None, "reference", None):
        tokens, seconds = sampler.denoise(call, None, implementation)
        assert tokens == [3] and seconds < 0.1


def test_time_is_of_interleaved_rounds(made):
    dense, full = made.lines[0], line_of(made, "full")
    assert len(dense.seconds) == len(full.seconds) == report.ROUNDS
    assert made.speedup(full) == median(a / b for a, b in zip(dense.seconds, full.seconds, strict=True))


def test_predicted_speedup_is_that_of_the_kept_pairs(made, plans):
    share = made.facts["attention_share"]
    assert 0 < share < 1
    for one in made.content()["rows"]:
        if one["kind"] == "plan":
            kept = plans[one["name"]].density()
            assert one["density"]["exact"] == kept
            assert one["predicted_speedup"] == pytest.approx(1 / (1 - share * (1 - kept)))


class Page(HTMLParser):
    """Collects tags that never close, references to elsewhere, and text."""

    def __init__(self, html):
        super().__init__()
        self.open, self.references, self.pictures, self.text = [], [], 0, ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)
        for name, value in attrs:
            self.pictures += value.startswith("data:image/png;base64,") if name == "src" else 0
            if name in ("src", "href", "srcset", "action") and not value.startswith("data:"):
                self.references.append(value)
        if tag in ("script", "link", "iframe"):
            self.references.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_the_page_stands_alone_and_says_what_the_numbers_say(made, tmp_path):
    path = made.save(tmp_path / "new" / "out")
    page = Page(html := path.read_text(encoding="utf-8"))
    assert not page.open and not page.references and "url(" not in html
    assert page.pictures == 3 * 5 * 3 + 3
    for words in (
        *PROMPTS[:3],
        "within this noise",
        "outside of this noise",
        "times as fast",
    ):
        assert words in page.text
    assert "<b>座" not in html
    assert f"mean SSIM {line_of(made, 'broken').mean('ssim'):.4f} is below the limit 0.97" in page.text
    assert sorted(file.name for file in path.parent.iterdir()) == ["report.html", "report.json"]


def test_the_numbers_come_back_from_json(made, tmp_path, plans, tiny_sd35):
    made.save(tmp_path)
    found = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert found == json.loads(json.dumps(made.content()))
    assert found["prompts"] == PROMPTS[:3] and found["seeds"] == [0, 7]
    assert found["model"]["fingerprint"] == plans["full"].setting.weights
    assert {one["name"]: one["digest"] for one in found["rows"] if "digest" in one} == {
        name: plan.digest for name, plan in plans.items()
    }
    arrows = next(one for one in found["rows"] if one["name"] == "arrows")
    assert arrows["density"] == {"exact": plans["arrows"].density(), "tiles": plans["arrows"].density((128, 128))}
    low, high = arrows["metrics"]["psnr"]["interval"]
    assert low <= arrows["metrics"]["psnr"]["mean"] <= high
    assert arrows["metrics"]["psnr"]["worst"] == np.min(arrows["metrics"]["psnr"]["values"])
    assert np.shape(found["heads"]["near"]) == (1, *plans["full"].choices.shape)


def test_files_appear_together_or_not_at_all(made, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr(report_table, "json", SimpleNamespace(dumps=fail))  # when the page is written already
    with pytest.raises(OSError, match="No space"):
        made.save(tmp_path)
    assert not list(tmp_path.iterdir())


def test_an_image_that_is_not_finite_fails_any_gate():
    image, near = noisy(0)
    bad = near.copy()
    bad[3, 4] = np.nan
    judges = Judges({"psnr": quality.psnr, "ssim": quality.ssim}, {})
    one = Line("bad", "plan")
    one.add(judges, [Shot("a", 0), Shot("b", 0)], np.stack([near, bad]), np.stack([image, image]))
    found = Report((Line("dense", "dense"), one), ("a", "b"), (0,), {}, None, {})
    assert found.failures == ["plan bad: 1 of 2 images are not finite"]


def test_a_floor_that_does_not_fit_in_memory_is_left_out():
    floor, plan = Line("float32", "floor"), Line("plan", "plan")
    with report.fitting(floor):
        raise MemoryError("27 GB of scores")
    assert floor.left_out == "does not fit in memory: 27 GB of scores"
    with pytest.raises(MemoryError), report.fitting(plan):
        raise MemoryError
    with pytest.raises(jax.errors.JaxRuntimeError), report.fitting(Line("float32", "floor")):
        raise jax.errors.JaxRuntimeError("INTERNAL: another fault")


def test_a_16_bit_report_has_the_same_rows(plans, tiny_sd35, tmp_path, monkeypatch):
    """One prompt, so no interval; the floor of its own dtype is the one that a plan of all full meets."""
    monkeypatch.setattr(report, "watch", lambda *args, **options: None)  # its program takes 10 s to compile
    options = {"seed": [0, 1, 2, 3], "batch": 4, "dtype": "bfloat16", "progress": False}
    found = quality_report(tiny_sd35, {"full": plans["full"]}, PROMPTS[3:], **options)
    names = [one.name for one in found.lines]
    assert names[1:4] == ["float32, sums reordered", "bfloat16 against float32", "bfloat16, sums reordered"]
    assert found.distances(line_of(found, "full"))[2]["within"]
    reordered, rounded = line_of(found, "float32, sums reordered"), line_of(found, "bfloat16 against float32")
    assert reordered.mean("psnr") > 120 > rounded.mean("psnr")
    content = found.content()
    assert content["rows"][4]["metrics"]["psnr"]["interval"] is None
    assert "an interval of the mean is not defined" in Page(found.save(tmp_path).read_text(encoding="utf-8")).text


# The command


@pytest.fixture
def command(tiny_sd35, plans, tmp_path, cache):
    for name, plan in plans.items():
        plan.save(tmp_path / f"{name}.json")
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS), encoding="utf-8")

    def run(**changes):
        options = {"plan": tmp_path / "broken.json", "prompts": tmp_path / "prompts.txt", "out": tmp_path / "out"}
        words = [
            f"--{name.replace('_', '-')}={value}" for name, value in (options | changes).items() if value is not None
        ]
        return cli.main(["report", str(tiny_sd35), "--quick", "--batch=4", *words])

    return run


def test_the_gate_has_an_exit_code(command, tmp_path, capsys):
    assert command(min_psnr=18) == 0
    printed = capsys.readouterr()
    assert printed.out.strip() == str(tmp_path / "out" / "report.html") and "2/2" in printed.err
    assert command(min_psnr=18, min_ssim=0.97) == 1
    failures = [line for line in capsys.readouterr().err.splitlines() if line.startswith("dfa2 report: ")]
    assert len(failures) == 1 and "plan broken: mean SSIM 0." in failures[0] and "below the limit 0.97" in failures[0]
    assert (tmp_path / "out" / "report.json").exists(), "a failed gate has its report too"
    assert command(plan=tmp_path / "full.json", min_ssim=0.9999) == 0


def test_an_interrupted_report_leaves_no_file(command, tmp_path, monkeypatch, capsys):
    def stop(image, exact):
        raise KeyboardInterrupt

    monkeypatch.setattr(quality, "ssim", stop)
    assert command() == 130
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompts": "{tmp}/empty.txt"}, "holds no prompt: write one per line"),
        ({"prompts": "{tmp}/latin1.txt"}, "latin1.txt is not UTF-8"),
        ({"prompts": "{tmp}/absent.txt"}, "absent.txt"),
        ({"out": "{tmp}/prompts.txt/out"}, "prompts.txt"),
        ({"plan": "{tmp}/other.json"}, "plan other: The plan is for another sampling call."),
        ({"plan": "{tmp}/absent.json"}, "absent.json cannot be read"),
        ({"max_lpips": 0.1}, "give lpips too"),
        ({"min_ssim": "nan"}, "limits has ssim=nan"),
        ({"batch": 0}, "batch=0 must be at least 1"),
        ({"lpips": "{tmp}/lpips.pth"}, "must be a .safetensors file (pickle, .pth, is never read)"),
        ({"lpips": "{tmp}/absent.safetensors"}, "lpips.LPIPS(net="),
        ({"clip": "{tmp}"}, "in safetensors (pickle, .bin, is never read)"),
        ({"image_reward": "{tmp}"}, "is not supported: the image-reward package"),
    ],
)
def test_bad_input_is_told_in_one_line(changes, message, command, plans, tmp_path, capsys):
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "latin1.txt").write_bytes("Übung".encode("latin-1"))
    (tmp_path / "lpips.pth").write_bytes(pickle.dumps({"net": 1}))
    plans["full"].for_weights("another model").save(tmp_path / "other.json")
    changes = {name: value.format(tmp=tmp_path) if isinstance(value, str) else value for name, value in changes.items()}
    assert command(**changes) == 2
    told = capsys.readouterr().err.strip()
    assert told.startswith("dfa2 report: ") and message in told
    assert not list(tmp_path.glob("out/*"))


def test_plans_of_other_sizes_are_refused_by_name(full, tiny_sd35):
    pipeline = Pipeline.from_pretrained(tiny_sd35)
    wide = Plan.full(pipeline.setting(prompt="", **SIZE | {"width": 128}))
    with pytest.raises(PlanError, match=r"plan wide: (.|\n)*width is 128 in the plan and 96 in the call"):
        quality_report(tiny_sd35, {"full": full, "wide": wide}, PROMPTS, progress=False)


def test_plans_of_one_name_go_by_their_paths(command, plans, tiny_sd35, tmp_path, capsys):
    (tmp_path / "a").mkdir()
    plans["full"].save(tmp_path / "a" / "broken.json")
    first, second = str(tmp_path / "broken.json"), str(tmp_path / "a" / "broken.json")
    options = ["--prompts", str(tmp_path / "prompts.txt"), "--out", str(tmp_path / "out"), "--quick", "--batch=4"]
    assert cli.main(["report", str(tiny_sd35), "--plan", first, "--plan", first, *options]) == 2
    assert "broken.json is there twice" in capsys.readouterr().err
    assert cli.main(["report", str(tiny_sd35), "--plan", first, "--plan", second, *options, "--min-ssim", "0.97"]) == 1
    assert f"plan {first}: mean SSIM" in (told := capsys.readouterr().err) and second not in told


# Metrics on torch


def test_a_missing_package_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "lpips.safetensors").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "lpips", None)
    with pytest.raises(ValueError, match=r"lpips needs lpips: pip install 'dfa2-jax\[quality\]'"):
        quality.lpips(tmp_path / "lpips.safetensors")


@pytest.mark.torch
def test_clip_score_is_the_models_cosine(tmp_path):
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
    score = quality.clip_score(tmp_path)
    image = noisy(0)[0]
    pixels = processor(images=(image * 255).round().astype(np.uint8), return_tensors="pt")
    tokens = tokenizer("a red circle", return_tensors="pt")
    with torch.no_grad():
        a, b = model.get_image_features(**pixels), model.get_text_features(**tokens)
    a, b = (getattr(x, "pooler_output", x)[0].numpy() for x in (a, b))
    cosine = float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
    assert score(image, "a red circle") == pytest.approx(max(100 * cosine, 0), abs=1e-3)
    assert 0 <= score(image, "a red circle " * 100) <= 100, "longer than the encoder"


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
    distance = quality.lpips(tmp_path / "lpips.safetensors")
    image, near = (np.tile(x, (2, 2, 1)) for x in noisy(0))
    pair = [torch.from_numpy(x.transpose(2, 0, 1)[None] * 2 - 1) for x in (near, image)]
    assert distance(image, image) == 0
    with torch.no_grad():
        assert distance(near, image) == pytest.approx(float(model(*pair)), rel=1e-5)
    (tmp_path / "other.safetensors").write_bytes((tmp_path / "lpips.safetensors").read_bytes()[:1000])
    with pytest.raises(ValueError, match="does not hold an lpips.LPIPS"):
        quality.lpips(tmp_path / "other.safetensors")
