"""The page of a report shows what names and prompts hold, and a browser does nothing of it."""

import base64
import hashlib
import re
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np

from dfa2_jax.report import table
from dfa2_jax.report.page import page

HOSTILE = """</style><script>alert(1)</script><img src=x onerror="alert(1)"> ' & \x1b[2J \udcff"""

METRICS = {"psnr": {"mean": 30.0, "worst": 20.0, "interval": [25.0, 35.0], "values": [[30.0]]}}
FLOOR = {"name": HOSTILE, "kind": "floor", "against": HOSTILE, "metrics": METRICS, "not_finite": 0}
PLAN = FLOOR | {"kind": "plan", "digest": HOSTILE, "distances": [{"floor": HOSTILE, "within": False}]}
CONTENT = {
    "rows": [FLOOR, {"name": HOSTILE, "kind": "floor", "against": "", "left_out": HOSTILE}, PLAN],
    "prompts": [HOSTILE],
    "negative_prompt": HOSTILE,
    "seeds": [0],
    "failures": [HOSTILE],
    "limits": {"psnr": 1.0},
    "tiles": [16, 16],
    "model": {"folder": HOSTILE, "pipeline": HOSTILE, "dtype": HOSTILE, "fingerprint": HOSTILE},
    "arguments": {"width": 8, "height": 8, "num_inference_steps": 2, "guidance_scale": 1.0, "batch": 1},
    "machine": {"device": HOSTILE, "driver": HOSTILE},
    "versions": {HOSTILE: HOSTILE},
    "heads": {"half_windows": [4]},
    "attention_share": 0.5,
}


class Elements(HTMLParser):
    def __init__(self, html):
        super().__init__()
        self.tags, self.attributes, self.text, self.open = [], [], "", []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        self.open += [] if tag in ("meta", "img", "br") else [tag]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def hostile_page():
    image = np.zeros((4, 4, 3), np.float32)
    pair = SimpleNamespace(image=image, exact=image, shot=SimpleNamespace(prompt=HOSTILE, seed=0), scores={"psnr": 1.0})
    return page(CONTENT, {HOSTILE: [pair]}, {HOSTILE: b"PNG"})


def test_names_and_prompts_are_text():
    parsed = Elements(hostile_page())
    assert not parsed.open and not {"script", "iframe", "link", "a", "form"} & {*parsed.tags}
    assert {name for name, _ in parsed.attributes if name.startswith("on")} == set()
    assert all(value.startswith("data:image/png;base64,") for name, value in parsed.attributes if name == "src")
    shown = sum(HOSTILE in part for part in re.split(r"(?<=\udcff)", parsed.text))
    assert shown == hostile_page().count("&lt;script&gt;") > 15


def test_the_policy_allows_the_pages_own_style_and_pictures_alone():
    html = hostile_page()
    assert html.index("Content-Security-Policy") < html.index("<style>")
    policy = re.search(r'<meta http-equiv="Content-Security-Policy" content="([^"]*)">', html)[1]
    style = re.search("<style>(.*?)</style>", html, re.DOTALL)[1]
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    assert {*policy.split("; ")} == {
        "default-src 'none'", "img-src data:", f"style-src 'sha256-{digest}'", "base-uri 'none'", "form-action 'none'",
    }  # fmt: skip
    assert not [name for name, _ in Elements(html).attributes if name == "style"], "the policy would drop it"


def test_a_path_that_is_not_utf_8_loses_no_report(tmp_path, monkeypatch):
    monkeypatch.setattr(table, "page", lambda *_: "<p>\udcff</p>")
    made = table.Report((), (), (), {}, None, {"folder": "\udcff"})
    html = made.save(tmp_path)
    assert html.read_text() == r"<p>\udcff</p>"
    assert r'"folder": "\udcff"' in (tmp_path / "report.json").read_text()
