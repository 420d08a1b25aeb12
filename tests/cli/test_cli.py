"""The command line: contracts of its JSON, examples that parse, errors in one line."""

import dataclasses
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from typer.main import get_command
from typer.testing import CliRunner

import cache4diffusion as c4d
import toys
from cache4diffusion.beside import BESIDE
from cache4diffusion.cli.app import app
from cache4diffusion.cli.measuring import DEMO_METHODS
from cache4diffusion.cli.models import Model, read_prompts
from cache4diffusion.compare import check_methods, parse_method, split_methods
from cache4diffusion.errors import SettingError, UnknownNameError
from cache4diffusion.method import FAMILIES, MethodInfo
from cache4diffusion.reference.checker import family_of
from cache4diffusion.reference.scenes import held_out_scenes
from cache4diffusion.sites import SingleContext, Trajectory, UNetEncoder, UNetLevel
from cache4diffusion.strip import planned_strip

COMMANDS = get_command(app).commands
METHODS = sorted(c4d.METHODS)


def run(*words, code=0):
    result = CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)
    assert result.exit_code == code, result.output
    return result


def facts(*words):
    return json.loads(run(*words, "--json").stdout)


# --- inspect ---------------------------------------------------------------------------------------------------------


def test_inspect_says_how_a_denoiser_is_built_and_what_can_serve_it():
    (found,) = facts("inspect", "FluxTransformer2DModel")
    assert found["class"] == "FluxTransformer2DModel"
    assert [(stack["path"], stack["blocks"], stack["main"]) for stack in found["stacks"]] == [
        ("transformer_blocks", 2, True),
        ("single_transformer_blocks", 2, True),
    ]
    assert {row["kind"] for row in found["streams"]} == {"image", "text"}
    assert {row["name"]: row["kind"] for row in found["parts"]} == {
        "attn": "attn", "ff": "ffn", "ff_context": "ffn", "proj_out": "fused",
    }  # fmt: skip
    assert found["token_grid"] == [1, 3, 3]
    assert found["batch_axes"]["hidden_states"] == 0
    assert found["batch_axes"]["img_ids"] is None
    assert found["sites"] | {"levels": True} == dict.fromkeys(["whole", "span", "parts", "levels"], True)
    assert found["methods"].keys() == c4d.METHODS.keys()
    not_served = {name: why for name, why in found["methods"].items() if why is not True}
    assert not_served.keys() == (toys.ELSEWHERE - {"text-kv-cache", "asymrnr"}) | {"cachequant"}
    assert "'cachequant' (calibrated with unit='span')" in not_served["cachequant"]
    assert "cross_attn" in not_served["t-gate-v1"]
    assert "where text and image meet in one attention" in not_served["tome"]
    assert "no U-Net levels" in not_served["deepcache"]
    assert found["hints"] == []


def test_inspect_of_a_pipeline_looks_at_its_denoisers(scenes):
    (found,) = facts("inspect", scenes)
    assert (found["name"], found["class"]) == ("transformer", "FluxTransformer2DModel")
    text = run("inspect", scenes).stdout
    assert "methods can serve it: " in text
    assert re.search(r"^not cachequant, dato, deepcache, faster-diffusion: .*no U-Net levels", text, re.MULTILINE)


def test_inspect_of_a_unet_gives_its_levels_and_declared_facts_are_named():
    (found,) = facts("inspect", "UNet2DModel")
    assert found["levels"]["skips"] == 4
    assert found["methods"]["deepcache"] is True
    assert "no stack of blocks" in found["methods"]["fbcache"]
    (found,) = facts("inspect", "UVit2DModel")
    assert found["timestep"] is None
    assert "codebook" in found["hints"][0]


def test_inspect_of_every_class_names_those_it_does_not_know(monkeypatch):
    class Unheard:
        pass

    known = {"DiTTransformer2DModel": None, "Unheard9Transformer": Unheard}
    monkeypatch.setattr("cache4diffusion.zoo.denoiser_classes", lambda: known)
    dit, unheard = facts("inspect", "--all-diffusers")
    assert dit["methods"]["taylorseer"] is True
    assert (unheard["class"], unheard["methods"]) == ("Unheard9Transformer", {})
    assert unheard["unknown"] == "no configuration is known of this class yet"


# --- help -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_help_has_one_line_of_purpose_and_an_example_that_parses(name):
    text = run(name, "--help").stdout
    example = re.search(r"Example: c4d (.+?)\n\s*\n", text, re.DOTALL)
    assert example, text
    words = shlex.split(" ".join(example[1].split()))
    assert words[0] == name
    COMMANDS[name].make_context(name, words[1:])  # raises if an option is unknown


def test_no_command_is_a_stub_and_every_command_speaks_json():
    assert sorted(COMMANDS) == [
        "bench",
        "calibrate",
        "cite",
        "demo",
        "generate",
        "inspect",
        "methods",
        "report",
        "selfcheck",
        "show",
    ]
    for name in COMMANDS:
        assert "--json" in run(name, "--help").stdout


# --- registry ---------------------------------------------------------------------------------------------------------


def test_methods_json_is_the_registry():
    rows = facts("methods")
    assert [row["name"] for row in rows] == sorted([*METHODS, *BESIDE])
    wanted = {
        "name", "title", "arxiv", "site", "gate", "predictor", "tokens", "needs_calibration", "needs_num_steps",
        "needs", "fidelity", "off", "use", "family", "when",
    }  # fmt: skip
    for row in rows:
        assert wanted <= set(row)
        assert row["fidelity"] in ("code", "paper", "reconstructed", "ours")
        assert isinstance(row["off"], dict)
        assert bool(row["off"]) == (row["name"] in METHODS)
        assert isinstance(row["needs_num_steps"], bool)


def test_the_list_says_which_methods_need_a_model_trained_for_them():
    wanted = {"ca2-vdm", "md-dit", "skip-dit"}
    needs = {row["name"]: row["needs"] for row in facts("methods") if row["needs"] and row["name"] not in BESIDE}
    assert needs.keys() == wanted
    assert all(need.startswith("a model trained for it") for several in needs.values() for need in several)
    lines = " ".join(run("methods").stdout.split())
    assert lines.count(" needs a model trained for it") == len(wanted)


@pytest.mark.parametrize("name", BESIDE)
def test_what_has_a_call_of_its_own_is_shown_and_cannot_be_attached(name):
    info = BESIDE[name]
    text, shown = run("show", name).stdout, facts("show", name)
    assert shown == info.row()
    assert all(words in text for words in (info.title, info.when, info.needs, "Args:", info.arxiv))
    assert facts("cite", name)["citation"] == info.citation
    assert name not in METHODS
    for words in (["show", name, "--set", "interval=2"], ["bench", "--methods", name, "--model", "scenes-flux"]):
        found = run(*words, code=2)
        assert f"{name!r} cannot be attached: it has {info.needs}." in found.stderr
    with pytest.raises(UnknownNameError, match="cannot be attached"):
        c4d.accelerate(toys.flux_pipeline(), name)


def test_methods_are_listed_by_family_with_one_line_each():
    lines = [line.rstrip() for line in run("methods").stdout.splitlines()]
    heads = [lines.index(family) for family in FAMILIES if family in lines]
    assert heads == sorted(heads)
    for name in [*METHODS, *BESIDE]:
        info = BESIDE.get(name) or c4d.METHODS[name].info
        (at,) = [i for i, line in enumerate(lines) if line.split()[:1] == [name]]
        assert lines[max(head for head in heads if head < at)] == info.family
        assert f" {info.when} " in lines[at], f"{name}: the line must fit beside the name"


@pytest.mark.parametrize("name", METHODS)
def test_the_family_of_a_method_is_that_of_its_parts(name):
    """What acts on the trajectory, in a U-Net, on tokens or on guidance alone is found there, and only there."""
    family, made = c4d.METHODS[name].info.family, c4d.method(name, **toys.CALIBRATED.get(name, {})).compose()
    assert (family == "trajectory") == isinstance(made.site, Trajectory)
    needs_unet = isinstance(made.site, (UNetEncoder, UNetLevel, SingleContext))
    assert (family == "tokens") == (made.tokens is not None and not needs_unet)
    assert (family == "guidance") == (made.cfg is not None)
    if needs_unet:
        assert family == "U-Net"
    if family == "adaptive gates":
        assert made.gate.watch is not None


def test_a_method_says_its_family_and_when_to_use_it():
    info = c4d.METHODS["fora"].info
    facts = {entry.name: getattr(info, entry.name) for entry in dataclasses.fields(info)}
    for missing in ("family", "when"):
        with pytest.raises(TypeError, match=f"missing 1 required .*'{missing}'"):
            MethodInfo(**{name: value for name, value in facts.items() if name != missing})
    with pytest.raises(SettingError, match=r"did you mean 'tokens'.* Families: forecasting, reuse of blocks"):
        dataclasses.replace(info, family="token")
    for wrong in ("", " ", "it is needed."):
        with pytest.raises(SettingError, match='go on from "use it when", without a full stop'):
            dataclasses.replace(info, when=wrong)
    with pytest.raises(SettingError, match=r"name='fbcache'. has no dial: say what it caches"):
        dataclasses.replace(c4d.METHODS["fbcache"].info, dial=None)


@pytest.mark.parametrize("name", METHODS)
def test_show_has_every_setting_and_the_strip(name):
    shown = facts("show", name)
    settings = [entry["name"] for entry in c4d.METHODS[name].describe()]
    assert [entry["name"] for entry in shown["settings"]] == settings
    text = run("show", name).stdout
    for setting in settings:
        assert f"\n  {setting} " in text
    assert (shown["strip"] or "20 steps   decided ") in text
    assert shown["strip"] is None or len(shown["strip"]) == 20


@pytest.mark.parametrize("name", METHODS)
def test_show_prints_the_card_of_the_docstring(name):
    text, shown, info = run("show", name).stdout, facts("show", name), c4d.METHODS[name].info
    assert text.splitlines()[1] == f"{info.family}: use it when {info.when}."
    body = shown["doc"].split("\nCost: ")[0]
    assert body in text
    assert shown["cost"], f"{name}: its docstring needs a line that begins with 'Cost: '"
    flat = " ".join(text.split())
    assert f"Cost {shown['cost']}" in flat
    assert f"Needs {'; '.join(shown['needs']) or 'nothing else'}" in flat
    assert all(part["part"] in text and part["doc"] for part in shown["parts"])
    assert "site" in {part["axis"] for part in shown["parts"]} or info.family == "guidance"
    assert f"Fidelity   {info.fidelity}" in text
    assert info.citation in text
    if "Differences from" in shown["doc"]:
        assert shown["differences"] in flat


def test_the_card_says_what_a_method_needs():
    assert facts("show", "taylorseer-lite")["needs"] == []
    for name, words in {
        "dpcache": ["a calibration made", "the number of steps", "blocks that carry"],
        "fastercache": ["the number of steps", "classifier-free guidance", "blocks with residual parts"],
        "t-gate-v2": ["classifier-free guidance", "blocks with cross-attention"],
        "fora": ["blocks with residual parts"],
        "deepcache": ["the levels of a U-Net"],
        "ca2-vdm": ["a model trained for it", "a declaration of where frames are"],
        "skip-dit": ["a model trained for it", "the number of steps", "blocks that carry"],
        "z-cache": ["the number of steps", "a solver without a history: FlowMatchEulerDiscreteScheduler"],
    }.items():
        needs = facts("show", name)["needs"]
        assert len(needs) == len(words)
        assert all(need.startswith(word) for need, word in zip(needs, words, strict=True))


@pytest.mark.parametrize("name", METHODS)
def test_show_says_what_of_the_published_settings_was_not_remeasured(name):
    info, text, shown = c4d.METHODS[name].info, run("show", name).stdout, facts("show", name)
    not_remeasured = [what for what in info.published if what not in info.remeasured]
    assert ("Published settings, not re-measured on real weights" in text) == bool(not_remeasured)
    assert {row["name"]: row["settings"] for row in shown["published"]} == json.loads(json.dumps(info.published))
    assert [row["name"] for row in shown["published"] if not row["remeasured"]] == not_remeasured
    for what, settings in info.published.items():
        assert re.search(rf"^  {re.escape(what)} +{re.escape(next(iter(settings)))}=", text, re.MULTILINE)
    quotes = any(source in text.split("Settings\n")[1] for source in ("Code:", "Paper:"))
    assert (not info.remeasured and quotes) == ("are published ones, not re-measured on real weights" in text)


def test_show_tells_remeasured_sets_from_others(monkeypatch):
    info = c4d.METHODS["taylorseer"].info
    changed = dataclasses.replace(info, remeasured=("FLUX.1-dev",))
    monkeypatch.setattr(c4d.METHODS["taylorseer"], "info", changed)
    here, others = (
        run("show", "taylorseer")
        .stdout.split("Published settings, re-measured here\n")[1]
        .split("Published settings, not re-measured on real weights\n")
    )
    assert "FLUX.1-dev" in here
    assert "HunyuanVideo" in others
    assert "HunyuanVideo" not in here


def test_show_counts_the_cache_on_a_model():
    shown = facts("show", "taylorseer-lite", "--set", "order=1", "--model", "flux.1-dev", "--resolution", 512)
    assert shown["cache"]["bytes"] == 2 * (512 // 16) ** 2 * 64 * 2  # two snapshots in bfloat16
    assert shown["cache"]["conditions"] == "flux.1-dev, 512 x 512 pixels, 50 steps, bfloat16"
    run("show", "fora", "--resolution", 512, code=2)
    run("show", "fora", "--model", "flux.1-dev", "--resolution", 500, code=2)


def test_strips_of_static_methods():
    assert planned_strip(c4d.method("fora", interval=3).compose(), 9) == "FccFccFcc"
    assert planned_strip(c4d.method("taylorseer", interval=5, warmup=3).compose(), 12) == "FFFccccFcccc"
    assert planned_strip(c4d.method("toca", interval=3, warmup=1).compose(), 6) == "FppFpp"
    assert planned_strip(c4d.method("dbcache").compose(), 9) is None


@pytest.mark.parametrize("name", METHODS)
def test_cite_names_authors_and_source(name):
    cited = facts("cite", name)
    assert re.search(r" et al\.|,|^cache4diffusion$", cited["citation"])
    assert cited["citation"] in run("cite", name).stdout


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["show", "taylorser"], "did you mean 'taylorseer'?"),
        (["cite", "fbcahe"], "did you mean 'fbcache'?"),
        (["bench", "--methods", "tocca", "--model", "scenes-flux"], "did you mean 'toca'?"),
        (["bench", "--methods", "fora(interval", "--model", "scenes-flux"], "write it like 'name(setting=value)'"),
        (["selfcheck", "--model", "scene-flux"], "did you mean 'scenes-flux'?"),
        (["generate", "--prompt", "x", "--model", "./nowhere"], "There is no folder ./nowhere"),
        (["generate", "--prompt", "x", "--set", "interval=3"], "--set needs a method"),
        (["bench", "--methods", "all", "--set", "interval=3"], "settings of its own: leave out --set"),
        (["bench", "--methods", "all", "--cache-dtype", "fp8"], "settings of its own: leave out --set"),
        (["bench", "--methods", "fora", "--calibrations", "x"], "--calibrations is for --methods all"),
        (["report", "nowhere.json"], "Cannot read results from nowhere.json"),
        (["demo", "--methods", "magcach"], "There is no method 'magcach'"),
        (
            ["bench", "--methods", "fora(intervall=3),toca(interval=3)"],
            "no setting 'intervall'; did you mean 'interval'",
        ),
        (["bench", "--methods", "fora,toca(ratio=0.5)"], "Method 'toca' has no setting 'ratio'"),
        (["bench", "--methods", "fora(gate='intervall')"], "no gate 'intervall'"),
        (["bench", "--methods", " , "], "--methods names none"),
        (["selfcheck", "--methods", "fora(interval=0)"], "interval must be 1 or more"),
        (["bench", "--methods", "fora", "--prompts", "nowhere.txt"], "nowhere.txt cannot be read: No such file"),
        (["bench", "--methods", "nowhere.yaml"], "The profile nowhere.yaml cannot be read: No such file"),
        (["bench", "--methods", "fora", "--model", "./nowhere"], "There is no folder ./nowhere"),
        (["generate", "--prompt", "x", "--device", "cida"], "write it like cpu, cuda"),
        (["generate", "--prompt", "x", "--dtype", "bf16"], "Use one of float32, bfloat16, float16"),
        (["generate", "--prompt", "x", "--out", "."], ". cannot be written: it is a folder."),
    ],
)
def test_errors_of_ours_are_one_line_and_exit_code_2(words, said):
    result = run(*words, code=2)
    assert result.stdout == ""
    assert said in result.stderr
    assert result.stderr.startswith("c4d: ")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--method", "fora", "--set", "interval=0"], "interval must be 1 or more"),
        (["--method", "fora", "--set", "fresh_threshold=3"], "here it is called 'interval'"),
        (["--method", "fora", "--set", "interval"], "write it like name=value"),
        (["--method", "fora", "--arg", "heigth=64"], "did you mean 'height'?"),
        (["--method", "deepcache"], "has no U-Net levels"),
    ],
)
def test_wrong_settings_fail_before_anything_is_written(words, said, scenes, tmp_path):
    out = tmp_path / "image.png"
    result = run("generate", "--model", scenes, "--prompt", "a red circle", "--steps", 4, "--out", out, *words, code=2)
    assert said in result.stderr
    assert not list(tmp_path.iterdir())


def test_a_broken_folder_and_a_broken_results_file_say_so(tmp_path):
    assert "no model_index.json" in run("generate", "-p", "x", "--model", tmp_path, code=2).stderr
    (tmp_path / "model_index.json").write_text("{}")
    assert "cannot be loaded" in run("generate", "-p", "x", "--model", tmp_path, code=2).stderr
    (tmp_path / "results.json").write_text("{}")
    assert "is no results file" in run("report", tmp_path / "results.json", code=2).stderr


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "holds no prompts: write one per line"),
        (b"\n  \n", "holds no prompts: write one per line"),
        (b"a red \xff circle", "cannot be read: it is no UTF-8 text"),
        ("a red circle".encode("utf-16"), "cannot be read: it is no UTF-8 text"),
    ],
)
def test_unusable_prompts_are_refused_before_the_model_is_loaded(content, said, tmp_path):
    (tmp_path / "prompts.txt").write_bytes(content)
    out = tmp_path / "out"
    words = ["bench", "--methods", "fora", "--model", "./nowhere", "--prompts", tmp_path / "prompts.txt", "--out", out]
    result = run(*words, code=2)
    assert said in result.stderr
    assert result.stderr.count("\n") == 1
    assert not out.exists()


def test_prompts_may_begin_with_a_mark_and_hold_empty_lines(tmp_path):
    (tmp_path / "prompts.txt").write_bytes(b"\xef\xbb\xbfa red circle\r\n\r\n  a blue star \r\n")
    assert read_prompts(tmp_path / "prompts.txt") == ["a red circle", "a blue star"]


@pytest.mark.parametrize("words", [["bench", "--methods", "fora"], ["demo"], ["generate", "--prompt", "x"]])
def test_an_output_that_cannot_be_written_is_refused_before_the_model_is_loaded(words, tmp_path):
    (tmp_path / "file").write_text("kept")
    result = run(*words, "--model", "./nowhere", "--out", tmp_path / "file" / "out", code=2)
    assert f"{tmp_path / 'file'} is no folder" in result.stderr
    assert result.stderr.count("\n") == 1
    assert (tmp_path / "file").read_text() == "kept"


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("p.json", "{", "is not valid JSON: Expecting property name"),
        ("p.yaml", "method: [fora", "is not valid YAML"),
        ("p.json", '{"method": "fora", "setings": {}}', "setings: Extra inputs are not permitted"),
        ("p.json", '{"method": "fora", "settings": {"intervall": 3}}', "did you mean 'interval'"),
    ],
)
def test_a_broken_profile_is_one_sentence(name, content, said, tmp_path):
    (tmp_path / name).write_text(content)
    for words in (["bench", "--methods"], ["selfcheck", "--methods"], ["generate", "--prompt", "x", "--method"]):
        result = run(*words, tmp_path / name, "--model", "./nowhere", code=2)
        assert said in result.stderr
        assert result.stderr.count("\n") == 1


def test_a_pipeline_that_fails_is_one_sentence(scenes, tmp_path):
    words = ["--model", scenes, "--steps", 2, "--arg", "max_sequence_length=4096", "--out", tmp_path / "out"]
    for first in (["generate", "--prompt", "a star on a gray background"], ["bench", "--methods", "fora", "-n", 1]):
        result = run(*first, *words, code=2)
        assert "max_sequence_length" in result.stderr
        assert result.stderr.count("\n") == 1
        assert not list(tmp_path.iterdir())


def test_an_interruption_says_that_nothing_was_written(monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("cache4diffusion.cli.models.load_model", interrupted)
    said = CliRunner().invoke(app, ["bench", "--model", "scenes-flux", "--methods", "fora"])
    assert said.exit_code == 130
    assert "interrupted; results are written when a command ends" in said.stderr


def test_the_list_of_methods_does_not_wait_for_what_only_samplers_need():
    code = "import sys; from cache4diffusion.cli import main; sys.argv = ['c4d', 'methods']\n"
    code += "try: main()\nexcept SystemExit: print({'diffusers', 'torch._dynamo'} & sys.modules.keys())"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.endswith("set()\n")


def test_classes_are_numbers():
    class ClassPipeline:
        def __call__(self, class_labels, num_inference_steps=50): ...

    model = Model(ClassPipeline(), "classes")
    assert model.prompt("207") == 207
    with pytest.raises(SettingError, match="ClassPipeline draws classes: give the number of one, not 'a cat'"):
        model.prompt("a cat")


def test_the_version_is_told():
    assert run("--version").stdout == f"cache4diffusion {c4d.__version__}\n"


# --- settings on the command line -------------------------------------------------------------------------------------


def test_methods_are_split_at_commas_outside_brackets():
    text = "taylorseer(interval=5,order=1), dbcache,fora(interval=3)"
    assert split_methods(text) == ["taylorseer(interval=5,order=1)", "dbcache", "fora(interval=3)"]
    assert parse_method("a(b=1, c='x', d=(True, False))") == ("a", {"b": 1, "c": "x", "d": (True, False)})
    assert parse_method("a(b=bf16, c=d(e=1, f=(2, 3)))") == ("a", {"b": "bf16", "c": "d(e=1, f=(2, 3))"})
    for wrong in ("a(1)", "a(b=1", "a(b=)", "a(**b)", "a(b=c.d)", "a(b=-c)", "a(b=1)(c=2)"):
        with pytest.raises(SettingError, match="write it like"):
            parse_method(wrong)


def test_families_are_those_the_scenes_were_drawn_from():
    for scene in held_out_scenes(60):
        assert family_of(scene.caption) == scene.family


def test_the_demo_compares_methods_that_exist():
    check_methods(DEMO_METHODS)


# --- runs -------------------------------------------------------------------------------------------------------------


def test_generate_writes_its_settings_into_the_png(scenes, tmp_path):
    out = tmp_path / "images" / "red.png"
    words = ["generate", "--model", scenes, "--prompt", "a red circle on a gray background", "--steps", 6, "--out", out]
    printed = facts(*words, "--method", "taylorseer(order=0)", "--set", "interval=2", "--set", "warmup=1", "--seed", 3)
    assert printed["strip"] == "FcFcFc"
    with Image.open(out) as image:
        assert image.size == (128, 128)
        kept = json.loads(image.text["cache4diffusion"])
    assert kept == {key: value for key, value in printed.items() if key not in ("path", "report")}
    assert (kept["method"], kept["seed"], kept["steps"]) == ("taylorseer", 3, 6)
    assert kept["settings"]["interval"] == 2
    assert any(line.startswith("speed-up") for line in printed["report"])
    plain = run(*words)
    assert plain.stdout.strip() == str(out)


def test_bench_json_has_the_agreed_rows(scenes, tmp_path):
    words = ["bench", "--model", scenes, "--methods", "fora(interval=2),fbcache(threshold=9)", "--captions", 6]
    found = facts(*words, "--steps", 6, "--batch", 4, "--out", tmp_path)
    names = [row["method"] for row in found["rows"]]
    assert names == ["uncached", "fewer-steps-3", "fewer-steps-1", "fora", "fbcache"] or names[0] == "uncached"
    assert names[-2:] == ["fora", "fbcache"]
    assert all(re.fullmatch(r"fewer-steps-\d+", name) for name in names[1:-2])
    keys = {
        "method", "settings", "full_steps", "total_steps", "flops_speedup", "latency_speedup", "psnr", "ssim", "flip",
        "accuracy", "cache_bytes", "peak_bytes", "strip", "fidelity", "pipeline_flops_speedup",
    }  # fmt: skip
    for row in found["rows"]:
        assert keys <= set(row)
        assert 0 <= row["accuracy"] <= 1
        assert isinstance(row["cache_bytes"], int)
        assert isinstance(row["peak_bytes"], int)
        assert len(row["accuracy_by_family"]) == 6
    fora = found["rows"][-2]
    assert (fora["strip"], fora["full_steps"], fora["settings"]["interval"]) == ("FcFcFc", 3, 2)
    assert fora["flops_speedup"] == pytest.approx(fora["predicted_flops_speedup"], rel=0.02)
    assert fora["pipeline_flops_speedup"] < fora["flops_speedup"]
    assert "denoiser" in found["conditions"]["flops_scope"]
    assert json.loads((tmp_path / "results.json").read_text()) == found
    for row in found["rows"][-2:]:
        assert all("6 steps leave" in note for note in row["notes"]), "nothing else was unusual"
        assert 1 <= row["predicted_latency_speedup"] <= row["predicted_flops_speedup"] * (1 + 1e-9)

    page = (tmp_path / "report.html").read_text()
    again = facts("report", tmp_path / "results.json", "--out", tmp_path / "again.html")
    assert again["images"]
    assert (tmp_path / "again.html").read_text() == page


def test_bench_on_prompts_of_a_users_own_folder(scenes, tmp_path):
    folder = shutil.copytree(scenes, tmp_path / "own", ignore=shutil.ignore_patterns("facts.json"))
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red panda\n\nreading a book\n")
    words = ["bench", "--model", folder, "--prompts", prompts, "--steps", 4, "--batch", 2]
    words += ["--arg", "height=64", "--arg", "width=64", "--arg", "max_sequence_length=16"]
    profile = tmp_path / "half.yaml"
    profile.write_text("method: fora\nsettings: {interval: 2}\n")
    found = facts(*words, "--methods", f"taylorseer-lite(interval=2, warmup=1),{profile}")
    assert [row["method"] for row in found["rows"]][-2:] == ["taylorseer-lite", "fora"]
    assert all(row["strip"] == "FcFc" for row in found["rows"][-2:])
    assert {row["accuracy"] for row in found["rows"]} == {None}, "no checker reads these prompts"
    assert found["conditions"]["denoiser"] == "own"
    assert found["conditions"]["resolution"] == [64, 64]
    assert found["rows"][-1]["latency_ms"] > 0
    prompts.write_text("\n")
    assert "write one per line" in run(*words, "--methods", "fora", code=2).stderr


def test_demo_writes_report_and_results(scenes, tmp_path):
    result = run(
        "demo", "--model", scenes, "--captions", 2, "--steps", 6, "--methods", "fora", "--out", tmp_path / "out"
    )
    assert str(tmp_path / "out" / "report.html") in result.stdout
    assert (tmp_path / "out" / "results.json").exists()


def test_selfcheck_says_what_was_proved(scenes):
    found = facts("selfcheck", "--model", scenes, "--methods", "taylorseer-lite,deepcache", "--steps", 4)
    assert found["ok"]
    assert len(found["invariants"]) == 9
    lite, deep = found["methods"]["taylorseer-lite"], found["methods"]["deepcache"]
    assert lite["off_is_off"]["status"] == lite["frozen_input"]["status"] == "passed"
    assert lite["linear_feature"]["status"] == "not applicable"
    assert all("U-Net levels" in finding["detail"] for finding in deep.values())


def test_the_package_runs_as_a_module_and_stays_light():
    script = (
        "import sys, cache4diffusion.cli.app\n"
        "heavy = {'skimage', 'plotly', 'transformers', 'diffusers', 'torchmetrics', 'jinja2'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "sys.argv = ['c4d', 'cite', 'fora']\n"
        "import runpy; runpy.run_module('cache4diffusion', run_name='__main__')\n"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", script], capture_output=True, text=True, check=True)
    assert "FORA" in done.stdout


# --- calibrate --------------------------------------------------------------------------------------------------------


def test_calibrate_writes_says_and_merges(monkeypatch, tmp_path):
    from cache4diffusion.calibration import load_calibration
    from cache4diffusion.cli import models

    pipe = toys.flux_pipeline()
    call = {"height": 16, "width": 16, "guidance_scale": 1.0, "output_type": "latent"}
    monkeypatch.setattr(models, "load_model", lambda *_: models.Model(pipe, "toy", call, 5))
    monkeypatch.setattr(
        models, "prompts_to_calibrate", lambda model, count, file, seed: [toys.prompt(seed + i) for i in range(2)]
    )
    parts = []
    for seed in (0, 2):
        out = tmp_path / f"part{seed}.safetensors"
        made = facts(
            "calibrate",
            "toy",
            "--method",
            "smoothcache(threshold=0.5)",
            "--trial",
            "1",
            "--seed",
            str(seed),
            "--out",
            str(out),
        )
        assert made["options"] == {"lookahead": 3}
        assert "explains" in made["quality"]["transformer"]["verdict"]
        assert made["trial"]["method"] == "smoothcache(threshold=0.5)"
        assert len(made["trial"]["errors"]) == 1
        assert made["verdict"].endswith("calibration here.")
        assert made["is_sound"] is (made["quality"]["transformer"]["r2"] >= 0.9 and "not worth" not in made["verdict"])
        assert Path(made["plots"][0]).read_text().startswith("<svg")
        parts.append(str(out))
    whole = tmp_path / "whole.safetensors"
    said = run("calibrate", "--merge", *parts, "--out", str(whole)).stdout.splitlines()
    assert said[0].startswith("transformer: the mean of a step explains")
    assert said[1:3] == ["It was not tried in sampling: compare before use.", str(whole)]
    assert len(load_calibration(whole).provenance.samples) == 4


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["calibrate", "toy", "--out", "x"], "--method is missing"),
        (["calibrate", "a", "b", "--method", "teacache", "--out", "x"], "give one model, or join"),
        (["calibrate", "toy", "--method", "fora", "--out", "x"], "fora needs no calibration"),
        (["calibrate", "toy", "--method", "teacache(treshold=1)", "--out", "x"], "did you mean 'threshold'"),
        (["calibrate", "toy", "--method", "teacache", "--set", "degre=3", "--out", "x"], "did you mean 'degree'"),
        (["calibrate", "--merge", "nowhere", "--out", "x"], "There is no calibration nowhere"),
        (["calibrate", "--merge", "a", "--method", "teacache", "--out", "x"], "--merge joins files"),
        (["bench", "--methods", "smoothcache"], "c4d calibrate MODEL --method smoothcache"),
    ],
)
def test_calibrate_is_answered_before_a_model_is_loaded(words, said):
    failed = run(*words, code=2)
    assert said in failed.stderr


def test_show_names_the_command_that_calibrates():
    text = run("show", "smoothcache").stdout
    assert "Needs a calibration on your denoiser: c4d calibrate MODEL --method smoothcache" in text
    assert "--set lookahead  3" in text
    assert "decided in the calibration" in text
    assert "Can be calibrated on your denoiser" in run("show", "teacache").stdout
    assert facts("show", "smoothcache")["calibration"]["options"][0]["name"] == "lookahead"
    assert facts("show", "fora")["calibration"] is None
