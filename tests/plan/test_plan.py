"""Plans: what they compute, what their files hold, and what they refuse."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mutations import sample_plan

import dfa2_jax
from dfa2_jax import Method, Plan, PlanError
from dfa2_jax.plan.file import schema
from dfa2_jax.plan.view import density_table, draw, summary
from pallas_kernels import CACHED, FULL
from pallas_kernels.mask import dense_mask


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "plan.json"
    sample_plan(0).save(path)
    return path


def edit(path, change):
    """A file after `change(content)`, with the digest it had."""
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@given(seed=st.integers(0, 1000), steps=st.integers(1, 6))
def test_a_file_gives_the_plan_back(seed, steps, tmp_path_factory):
    plan, path = sample_plan(seed, steps), tmp_path_factory.mktemp("plan") / "plan.json"
    plan.save(path)
    again = Plan.load(path)
    assert again == plan and again.setting == plan.setting and again.calibration == plan.calibration
    assert again.methods == plan.methods and (again.choices == plan.choices).all()
    assert plan != sample_plan(seed + 1, steps + 1)


def test_plans_of_version_1_load_and_keep_their_digest(tmp_path):
    """The file is as the first release wrote it."""
    path = Path(__file__).with_name("plan-version-1.json")
    plan = Plan.load(path)
    assert plan.digest == "sha256:5d40970fb5308a4aee081a262d2d0ad41e1e22e9a8c7cd044b99e6ea4d8bdafa"
    assert plan == sample_plan(3) and plan.calibration.num_prompts == sample_plan(3).calibration.num_prompts
    plan.save(tmp_path / "plan.json")
    assert (tmp_path / "plan.json").read_bytes() == path.read_bytes()


def test_a_plan_says_in_three_lines_what_it_is():
    plan = sample_plan(3)
    first, second, third = repr(plan).splitlines()
    assert first == "Plan for StableDiffusion3Pipeline: 128 x 128, 3 steps, guided"
    assert sum(plan.shares().values()) == pytest.approx(1)
    assert all(f"{name} {share:.1%}" in second for name, share in plan.shares().items()) and "full" in second
    assert f"density {plan.density():.3f}" in third and plan.digest[:19] in third and "edited" not in third
    assert repr(plan.for_weights("other")).endswith("edited by hand")


def test_a_file_has_a_line_for_each_layer_of_a_step(file):
    plan, lines = sample_plan(0), file.read_text().splitlines()
    letters = "fcab"
    for step in plan.choices:
        for layer, heads in zip(plan.setting.layers, step, strict=True):
            text = f'"{layer.name}": "{"".join(letters[head] for head in heads)}"'
            assert any(line.strip().removesuffix(",") == text for line in lines)


def test_methods_are_windows_of_each_layers_own_length():
    assert [Method(name).half_window(4096) for name in ("full", "cached", "arrow(1/8)", "arrow(1/32)")] == [
        FULL, CACHED, 256, 64,
    ]  # fmt: skip
    assert Method("arrow(1/32)").half_window(5) == 1 and Method.arrow(8) == Method("arrow(1/8)")
    for wrong in ("arrow(1/0)", "arrow(1/08)", "arrow(1/-8)", "arrow(8)", "Full", "", "arrow(1/123456)", "arrow(1/٨)"):
        with pytest.raises(PlanError, match="is not a method"):
            Method(wrong)
    with pytest.raises(PlanError, match="'cachd' is not a method.* Did you mean 'cached'"):
        Method("cachd")


def test_density_is_that_of_the_mask():
    plan = sample_plan(3)
    windows, kept, total = plan.half_windows(), 0, 0
    for step in windows:
        for layer, row in zip(plan.setting.layers, step, strict=True):
            mask = np.asarray(dense_mask(jnp.asarray(row), layer.layout)) & (row != CACHED)[:, None, None]
            kept, total = kept + mask.sum(), total + mask.size
    assert plan.density() == pytest.approx(kept / total)
    assert density_table(plan).shape == (3, 3) and density_table(plan)[0].tolist() == [1, 1, 1]
    assert kept / total < plan.density((16, 16)) < 1
    assert Plan.full(plan.setting).density() == Plan.full(plan.setting).density((16, 16)) == 1


def test_heads_with_most_work_come_first():
    plan = sample_plan(5)
    windows = np.where(plan.half_windows() == FULL, 10**6, plan.half_windows())
    ordered = np.take_along_axis(windows, plan.head_order(), 2)
    assert (np.diff(ordered, axis=2) <= 0).all()
    assert (np.sort(plan.head_order(), 2) == np.arange(4)).all()


def test_other_methods_for_some_heads():
    plan = Plan.full(sample_plan(0).setting)
    changed = plan.with_method(slice(1, None), ["joint.0", 2], 3, "cached").with_method(
        2, "attn2.0", None, "arrow(1/8)"
    )
    expected = np.full((3, 3, 4), FULL)
    expected[1:, [0, 2], 3] = CACHED
    expected[2, 1] = 4
    np.testing.assert_array_equal(changed.half_windows(), expected)
    assert changed.edited and not plan.edited and (plan.choices == 0).all()
    for selectors, message in (
        ((0, None, None), "steps.0..joint.0: head 0 is cached, but the first step is always full"),
        ((3, 0, 0), r"nodes: \[3\] are not from 0 to 2"),
        ((1, "joint.7", 0), r"layers: \['joint.7'\] are not among joint.0 ... joint.1"),
        ((1, 0, [0, -1]), r"heads: \[-1\] are not from 0 to 3"),
    ):
        with pytest.raises(PlanError, match=message):
            plan.with_method(*selectors, "cached")
    assert plan.for_weights("other").setting.weights == "other"


CHANGES = {
    "not a plan": (lambda c: c.update(format="x"), "format: Input should be 'dfa2-plan'"),
    "unknown key": (lambda c: c.update(extra=1), "extra: Extra inputs are not permitted"),
    "missing key": (lambda c: c.pop("methods"), "methods: Field required"),
    "future version": (
        lambda c: c.update(version=3),
        "version is 3, made by a newer dfa2_jax; this one reads up to 2",
    ),
    "NaN": (lambda c: c["setting"].update(sigmas=[1.0, float("nan"), 0.5, 0.0]), "setting.sigmas.1: .*finite"),
    "wrong type": (lambda c: c["setting"].update(height="128"), "setting.height: Input should be a valid integer"),
    "absurd size": (lambda c: c["setting"].update(num_heads=10**6), "setting.num_heads: .*less than or equal to 256"),
    "first step": (
        lambda c: c["steps"][0].update({"joint.1": "fffc"}),
        "steps.0..joint.1: head 3 is cached, but the first step is always full",
    ),
    "heads": (lambda c: c["steps"][1].update({"attn2.0": "fff"}), "steps.1..attn2.0 has 3 heads, but .*num_heads is 4"),
    "letter": (
        lambda c: c["steps"][2].update({"joint.0": "ffz?"}),
        r"steps.2..joint.0 has \['\?', 'z'\], which methods",
    ),
    "layers": (lambda c: c["steps"][1].pop("joint.0"), "steps.1.: layers are not those of setting.layers"),
    "steps": (lambda c: c["steps"].pop(), "steps: there are 2, but setting.sigmas has 3"),
    "method": (lambda c: c["methods"].update(a="arrow(1/x)"), r"'arrow\(1/x\)' is not a method"),
    "errors": (lambda c: c["calibration"]["errors"].pop(), "calibration.errors must be 3 rows of 3"),
    "a negative noise": (
        lambda c: c["setting"].update(sigmas=[1.0, 0.5, -0.5, 0.0]),
        "sigmas: .*rises from -0.5 to 0.0",
    ),
    "rising noise": (lambda c: c["setting"].update(sigmas=[0.5, 0.75, 0.25, 0.0]), "sigmas: .*rises from 0.5 to 0.75"),
    "noise left": (lambda c: c["setting"].update(sigmas=[1.0, 0.5, 0.25, 0.25]), "sigmas: .*last one is 0.25, not 0"),
    "no tiles": (lambda c: c["calibration"].update(tiles=[0, 16]), "calibration.tiles.0: .*greater than or equal to 1"),
    "a density": (
        lambda c: c["calibration"]["predicted_density"].update(exact=1.5),
        "exact: .*less than or equal to 1",
    ),
    "a negative budget": (lambda c: c["calibration"].update(delta=-0.4), "delta: .*greater than or equal to 0"),
    "a negative error": (lambda c: c["calibration"]["errors"][1].__setitem__(0, -1.0), "errors.1.0: .*equal to 0"),
    "digest": (lambda c: c["steps"][1].update({"joint.0": "ffff"}), "digest is .*edited or damaged.*dfa2 plan sign"),
}


@pytest.mark.parametrize("case", CHANGES)
def test_faults_are_named(case, file):
    change, message = CHANGES[case]
    edit(file, change)
    with pytest.raises(PlanError, match=message) as caught:
        Plan.load(file)
    assert str(file) in str(caught.value)
    if case != "digest":
        with pytest.raises(PlanError, match=message):
            Plan.sign(file)


HOSTILE = "\x1b]0;owned\x07\x1b[2J\u202e\udcff"


def test_what_a_plan_says_is_shown_and_never_obeyed(file):
    """By a terminal: escape sequences, another direction of writing, what no encoding knows."""

    def rename(content):
        content["setting"].update(pipeline_class=HOSTILE, weights=HOSTILE)

    edit(file, rename)
    plan = Plan.sign(file)
    for text in (summary(plan), repr(plan)):
        assert "\\x1b]0;owned\\x07\\x1b[2J\\u202e\\udcff" in text
        assert text.replace("\n", "").isprintable()
    faults = {
        "a method": lambda c: c["methods"].update(a=HOSTILE),
        "a layer": lambda c: c["steps"][1].update({HOSTILE: "ffff"}),
        "a letter": lambda c: c["steps"][1].update({"joint.0": "fff\x1b"}),
        "a key": lambda c: c.update({HOSTILE[:-1]: 1}),
        "a call": lambda c: c["setting"].update(weights="another"),
    }
    good = file.read_bytes()
    for case, change in faults.items():
        file.write_bytes(good)
        edit(file, change)
        with pytest.raises(PlanError) as caught:
            Plan.sign(file).check(plan.setting)
        assert str(caught.value).replace("\n", "").isprintable() and "\\x1b" in str(caught.value), case


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1]", "must hold a JSON object"),
        ('{"format": "dfa2-plan", "format": 1}', "duplicate key 'format'"),
        ("[" * 100_000, "not valid JSON"),
        ('{"setting":' * 900 + "1" + "}" * 900, "is not a plan"),
        (" " * 20_000_001, "20000001 bytes, more than the 20000000"),
    ],
)
def test_files_that_are_no_plans(text, message, tmp_path):
    path = tmp_path / "plan.json"
    path.write_text(text)
    with pytest.raises(PlanError, match=message):
        Plan.load(path)
    with pytest.raises(PlanError, match="cannot be read: No such file"):
        Plan.load(tmp_path / "missing.json")


def test_more_arrows_than_letters_are_refused(file):
    plan = Plan.load(file)
    for fraction in range(1, 61):
        plan = plan.with_method(1, 0, 0, f"arrow(1/{fraction})")
    arrows = sum(str(method).startswith("arrow") for method in plan.methods)
    with pytest.raises(PlanError, match=f"there are {61 if arrows == 60 else arrows + 1} arrows, but letters for 60"):
        for fraction in range(100, 170):
            plan = plan.with_method(1, 0, 0, f"arrow(1/{fraction})")
    plan.save(file)
    assert Plan.load(file) == plan
    content = json.loads(file.read_text())
    content["methods"] |= {letter: f"arrow(1/{number + 200})" for number, letter in enumerate("!?", start=1)}
    file.write_text(json.dumps(content))
    with pytest.raises(PlanError, match="letters for 60"):
        Plan.load(file)


def test_signing_accepts_an_edit_and_marks_it(file):
    edit(file, lambda content: content["steps"][1].update({"joint.0": "fcaf"}))
    signed = Plan.sign(file)
    assert signed.edited and Plan.load(file) == signed
    assert signed.half_windows()[1, 0].tolist() == [FULL, CACHED, 4, FULL]
    edit(file, lambda content: content["steps"][1].update({"joint.0": "fca"}))
    before = file.read_bytes()
    with pytest.raises(PlanError, match="has 3 heads"):
        Plan.sign(file)
    assert file.read_bytes() == before


def test_a_call_that_differs_is_told_every_field(file):
    plan = sample_plan(0)
    plan.check(plan.setting)
    nearly = plan.setting.model_copy(update={"sigmas": tuple(sigma + 1e-8 for sigma in plan.setting.sigmas)})
    plan.check(nearly)
    other = plan.setting.layers[0].model_copy(update={"num_text": 9})
    changes = {"weights": "ffff", "height": 256, "layers": (other, *plan.setting.layers[1:])}
    with pytest.raises(PlanError) as caught:
        plan.check(plan.setting.model_copy(update=changes))
    lines = str(caught.value).splitlines()[1:]
    assert len(lines) == 3
    assert "weights is 0123456789abcdef in the plan and ffff in the call: plan.for_weights(pipeline)" in lines[0]
    assert "height is 128 in the plan and 256 in the call" in lines[1]
    assert "num_text=8" in lines[2] and "num_text=9" in lines[2] and "max_sequence_length" in lines[2]


def test_the_schema_in_the_package_is_the_models():
    """python -c "import json; from dfa2_jax.plan.file import schema; print(json.dumps(schema(), indent=1))" \\
    > dfa2_jax/plan/plan.schema.json"""
    path = Path(dfa2_jax.__file__).with_name("plan") / "plan.schema.json"
    assert json.loads(path.read_text()) == schema()


def test_a_summary_and_a_picture(tmp_path):
    plan = sample_plan(0)
    text = summary(plan)
    for part in ("StableDiffusion3Pipeline, 3 layers x 4 heads", "128 x 128, 3 steps, guided", f"{plan.density():.3f}"):
        assert part in text
    draw(plan, tmp_path / "plan.png")
    from PIL import Image

    with Image.open(tmp_path / "plan.png") as picture:
        pixels = np.asarray(picture.convert("RGB")).reshape(-1, 3)
    for colour in ((0x20, 0x12, 0x4D), (0xF4, 0xA2, 0x59)):  # full and cached are there
        assert (pixels == colour).all(1).sum() > 100
    assert [file.name for file in tmp_path.iterdir()] == ["plan.png"]


def test_dollars_in_a_plan_are_no_markup(tmp_path):
    """Mathtext would refuse this, and TeX run it."""
    import matplotlib

    plan = sample_plan(0)
    layers = tuple(layer.model_copy(update={"name": rf"$\frac{i}$"}) for i, layer in enumerate(plan.setting.layers))
    setting = plan.setting.model_copy(update={"pipeline_class": "$\\input{x}$ \x1b[2J", "layers": layers})
    with matplotlib.rc_context({"text.usetex": True}):
        draw(replace(plan, setting=setting), tmp_path / "plan.png")
        assert matplotlib.rcParams["text.usetex"]
    assert (tmp_path / "plan.png").stat().st_size > 1000


def test_a_picture_needs_no_backend_of_the_environments():
    """As `!dfa2 plan show` in a notebook, whose backend is not installed here."""
    code = """
import io, os
from dfa2_jax.plan.canvas import new_figure
with new_figure(1, 1, "A test") as figure:
    figure.savefig(file := io.BytesIO(), format="png")
print(file.getvalue()[1:4], os.environ["MPLBACKEND"])
"""
    environment = os.environ | {"MPLBACKEND": "module://not.there"}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert run.stdout == "b'PNG' module://not.there\n", run.stderr
