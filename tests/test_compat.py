"""The scripts take exactly the flags of their namesakes, and each flag reaches its place in the
config, is refused, or is named as needless."""

import importlib
import json
import os
import re
import resource
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from flags_reached import REACHED

import limner
from limner.compat import diffusers
from limner.compat.scripts import SCRIPTS
from limner.config.schema import Config
from limner.config.toml import flatten, to_plain
from limner.errors import InputError

HERE = Path(__file__).parent
REFERENCE = json.loads((HERE / "data" / "diffusers_flags.json").read_text())
BASE = ["--pretrained_model_name_or_path=base", "--train_data_dir=pictures"]
FULL, LORA, XL, XL_LORA, PRIOR, DECODER, PRIOR_LORA, DECODER_LORA, FLAX = SCRIPTS
STAGES = (PRIOR, DECODER, PRIOR_LORA, DECODER_LORA)
BESIDES = {
    "--caption_column": {"type": "str", "default": None, "choices": None}
}  # the guide gives it to the decoders, whose originals know no such flag
HEAVY = ("torch", "diffusers", "transformers", "accelerate", "peft", "datasets", "jax", "numpy")


@pytest.fixture(autouse=True)
def surroundings(monkeypatch):
    """One process, two trackers installed, no token: whatever the machine has."""
    for name in ("WORLD_SIZE", "RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_TOKEN", "")
    monkeypatch.setattr(
        importlib.import_module("limner.training.sinks"),
        "list_installed_sinks",
        lambda: ("tensorboard", "wandb"),
    )


def config(script, *argv, base=None):
    base = (BASE[1:] if script in STAGES else BASE) if base is None else base
    return diffusers.to_config(script, diffusers.make_parser(script).parse_args([*base, *argv]))


def settings(cfg):
    return flatten(to_plain(cfg))


def remarks(script, *argv):
    return diffusers.list_remarks(
        script,
        diffusers.make_parser(script).parse_args(
            [*(BASE[1:] if script in STAGES else BASE), *argv]
        ),
    )


def written(action):
    """An argparse action as the reference file describes flags."""
    switch = type(action).__name__ == "_StoreTrueAction"
    out = {
        "type": "bool" if switch else action.type.__name__,
        "default": action.default,
        "choices": None if action.choices is None else list(action.choices),
    }
    return (
        out
        | ({"action": "store_true"} if switch else {})
        | ({"required": True} if action.required else {})
        | ({"nargs": action.nargs} if action.nargs not in (None, 0) else {})
    )


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_flags_are_those_of_the_namesake(script):
    ours = {
        action.option_strings[0]: written(action)
        for action in diffusers.make_parser(script)._actions
        if action.dest != "help"
    }
    assert ours == REFERENCE[f"{script}.py"] | (
        BESIDES if script in (DECODER, DECODER_LORA) else {}
    )
    assert [
        action.option_strings
        for action in diffusers.make_parser(script)._actions
        if len(action.option_strings) > 1
    ] == [["-h", "--help"]]


def test_the_reference_lists_have_the_size_that_was_read_from_diffusers():
    assert [len(REFERENCE[f"{script}.py"]) for script in SCRIPTS] == [
        57,
        51,
        59,
        55,
        42,
        43,
        42,
        42,
        34,
    ]


def test_a_flag_may_be_shortened_as_long_as_it_is_the_only_one():
    assert config(FULL, "--max_train_st=7").train.steps == 7
    with pytest.raises(SystemExit) as stop:
        config(FULL, "--max_train_s=7")
    assert stop.value.code == 2


CATS = {"preview.prompts": ["cat"]}
BESIDE = {
    "model.other_stage": "kandinsky-community/kandinsky-2-2-decoder"
}  # previews of a prior are drawn by a decoder, and only they
PRIOR_NAME, DECODER_NAME = (
    f"pretrained_{stage}_model_name_or_path" for stage in ("prior", "decoder")
)
SPELT = {
    ("validation_epochs", FULL): (
        "--validation_prompts cat --validation_epochs=9",
        CATS | {"preview.every_epochs": 9.0},
    ),
    ("validation_epochs", PRIOR): (
        "--validation_prompts cat --validation_epochs=9",
        CATS | BESIDE | {"preview.every_epochs": 9.0},
    ),
    ("validation_epochs", DECODER): (
        "--validation_prompts cat --validation_epochs=9",
        CATS | {"preview.every_epochs": 9.0},
    ),
    ("validation_prompts", PRIOR): (
        "--validation_prompts cat",
        CATS | BESIDE | {"preview.every_epochs": 5.0},
    ),
    ("validation_prompt", PRIOR_LORA): (
        "--validation_prompt=cat",
        CATS | BESIDE | {"preview.count": 4, "preview.every_epochs": 1.0},
    ),
    ("validation_epochs", PRIOR_LORA): (
        "--validation_prompt=cat --validation_epochs=9",
        CATS | BESIDE | {"preview.count": 4, "preview.every_epochs": 9.0},
    ),
    ("num_validation_images", PRIOR_LORA): (
        "--validation_prompt=cat --num_validation_images=2",
        CATS | BESIDE | {"preview.count": 2, "preview.every_epochs": 1.0},
    ),
    **{
        (PRIOR_NAME, script): (f"--{PRIOR_NAME}=me/prior", {"model.base": "me/prior"})
        for script in (PRIOR, PRIOR_LORA)
    },
    **{
        (PRIOR_NAME, script): (f"--{PRIOR_NAME}=me/prior", {"model.other_stage": "me/prior"})
        for script in (DECODER, DECODER_LORA)
    },
    **{
        (DECODER_NAME, script): (f"--{DECODER_NAME}=me/decoder", {"model.base": "me/decoder"})
        for script in (DECODER, DECODER_LORA)
    },
    (DECODER_NAME, PRIOR): (
        f"--validation_prompts cat --{DECODER_NAME}=me/decoder",
        CATS | {"model.other_stage": "me/decoder", "preview.every_epochs": 5.0},
    ),
    (DECODER_NAME, PRIOR_LORA): (
        f"--validation_prompt=cat --{DECODER_NAME}=me/decoder",
        CATS | {"model.other_stage": "me/decoder", "preview.count": 4, "preview.every_epochs": 1.0},
    ),
    ("scale_lr", FLAX): (
        "--scale_lr --train_batch_size=2",
        {"train.micro_batch_size": 2, "optim.learning_rate": 2e-4},
    ),
    ("seed", FLAX): ("--seed=7", {"train.seed": 7}),
    ("mixed_precision", FLAX): ("--mixed_precision=bf16", {"engine.precision": "bf16"}),
    ("from_pt", FLAX): ("--from_pt", {}),
    **{
        ("adam_weight_decay", script): ("--adam_weight_decay=0.1", {"optim.weight_decay": 0.1})
        for script in STAGES
    },
    **{
        ("caption_column", script): ("--caption_column=words", {})
        for script in (DECODER, DECODER_LORA)
    },
}

SCALED = (FLAX, "scale_lr")  # by the number of devices, which JAX counts
COUNTS_DEVICES = pytest.mark.frameworks


@pytest.mark.parametrize(
    ("script", "name"),
    [
        pytest.param(script, name, marks=COUNTS_DEVICES if (script, name) == SCALED else ())
        for script in SCRIPTS
        for name in SCRIPTS[script].flags
    ],
)
def test_every_flag_has_a_place(script, name):
    line, expected = SPELT[name, script] if (name, script) in SPELT else REACHED[name]
    before, after = settings(config(script)), settings(config(script, *line.split()))
    assert {key: value for key, value in after.items() if value != before.get(key)} == expected
    if not expected:
        says = SCRIPTS[script].flags[name].help
        assert remarks(script, *line.split()) == [f"--{name}: {says}"] and len(says.split()) > 5


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_place_exists(script):
    known = {"run", *settings(Config())}
    places = {
        place for flag in SCRIPTS[script].flags.values() for place in flag.setting_names
    } | set(SCRIPTS[script].fixed_settings)
    assert places <= known
    assert set(SCRIPTS[script].fixed_settings["checkpoint.allow_changes"]) <= known


PLAIN = {  # what differs from a recipe's defaults when only a model and a folder are given
    "run": "sd-model-finetuned",
    "model.base": "base",
    "data.folder": "pictures",
    "data.crop": "random",
    "data.threads": 1,
    "optim.warmup": 500,
    "train.epochs": 100.0,
    "train.micro_batch_size": 16,
    "train.accumulation_steps": 1,
    "checkpoint.resume": "never",
    "checkpoint.allow_changes": [
        f"optim.{k}"
        for k in (
            "learning_rate",
            "schedule",
            "warmup",
            "betas",
            "weight_decay",
            "eps",
            "max_grad_norm",
        )
    ],
    "preview.steps": 20,
    "log.to": ["tensorboard"],
    "log.project": "text2image-fine-tune",
}
PLAIN_XL = PLAIN | {
    "run": "sdxl-model-finetuned",
    "model.family": "sdxl",
    "data.size": 1024,
    "data.empty_caption": "encoded",
    "log.project": "text2image-fine-tune-sdxl",
}
PLAIN_XL = {k: v for k, v in PLAIN_XL.items() if k != "preview.steps"} | {
    "preview.guidance_scale": 5.0
}
PLAIN_LORA = PLAIN | {"run": "sd-model-finetuned-lora", "adapter.kind": "lora", "preview.steps": 30}


def changed(cfg):
    default = settings(Config())
    return {key: value for key, value in settings(cfg).items() if value != default[key]}


def test_without_further_flags_the_run_is_what_diffusers_runs():
    assert changed(config(FULL)) == PLAIN
    assert changed(config(LORA)) == PLAIN_LORA
    assert changed(config(XL)) == PLAIN_XL
    assert changed(config(XL_LORA)) == PLAIN_XL | {
        "run": "sd-model-finetuned-lora",
        "adapter.kind": "lora",
        "preview.steps": 50,
        "log.project": "text2image-fine-tune",
    }


def test_kandinsky_runs_what_diffusers_runs():
    plain = {k: v for k, v in PLAIN.items() if k not in ("data.crop", "model.base")} | {
        "run": "kandi_2_2-model-finetuned",
        "data.resample": "bicubic",
        "optim.weight_decay": 0.0,
        "train.micro_batch_size": 1,
        "preview.guidance_scale": 4.0,
    }
    prior, decoder = (
        "kandinsky-community/kandinsky-2-2-" + stage for stage in ("prior", "decoder")
    )
    lora = {"run": "kandi_2_2-model-finetuned-lora", "adapter.kind": "lora", "preview.steps": 30}
    assert changed(config(PRIOR)) == plain | {
        "model.family": "kandinsky22-prior",
        "model.base": prior,
    }
    assert changed(config(DECODER)) == plain | {
        "model.family": "kandinsky22-decoder",
        "model.base": decoder,
        "model.other_stage": prior,
    }
    assert changed(config(PRIOR_LORA)) == changed(config(PRIOR)) | lora
    assert changed(config(DECODER_LORA)) == changed(config(DECODER)) | lora


def test_the_flax_script_trains_in_jax():
    plain = {
        k: v
        for k, v in PLAIN.items()
        if k
        not in ("data.threads", "optim.warmup", "checkpoint.resume", "preview.steps", "log.project")
    }
    assert changed(config(FLAX)) == plain | {
        "engine.kind": "jax",
        "engine.precision": "no",
        "data.resample": "bilinear",
        "train.seed": 0,
    }
    assert config(FLAX, "--lr_scheduler=cosine").optim.schedule == "cosine"


def launched(guide):
    """A guide's commands in a shell: the script they start, and the config of it."""
    variables, words = (
        {},
        shlex.split((HERE / "data" / "guides" / guide).read_text().replace("\\\n", " ")),
    )
    for word in words[: words.index("accelerate")]:
        if word != "export":
            name, _, variables[name] = word.partition("=")
    at = next(i for i, word in enumerate(words) if word.endswith(".py"))
    script = words[at].removesuffix(".py")
    argv = [re.sub(r"\$\{?(\w+)\}?", lambda m: variables[m[1]], word) for word in words[at + 1 :]]
    return script, config(script, *argv, base=[])


SD14, SD15, NARUTO = (
    "CompVis/stable-diffusion-v1-4",
    "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "lambdalabs/naruto-blip-captions",
)


def without(expected, *names):
    return {key: value for key, value in expected.items() if key not in names}


GUIDE_FULL = without(PLAIN, "data.crop", "optim.warmup", "train.epochs", "data.folder") | {
    "run": "sd-naruto-model",
    "model.base": SD15,
    "data.hub": NARUTO,
    "data.flip": True,
    "train.micro_batch_size": 1,
    "train.accumulation_steps": 4,
    "train.steps": 15000,
    "optim.learning_rate": 1e-5,
    "optim.ema": 0.9999,
    "engine.gradient_checkpointing": True,
}


def test_the_text_to_image_guide_word_for_word():
    script, cfg = launched("text2image.sh")
    assert script == FULL
    assert changed(cfg) == GUIDE_FULL | {
        "engine.attention": "xformers",
        "export.hub": "sd-naruto-model",
    }


def test_the_readme_on_many_gpus_word_for_word():
    _, cfg = launched("readme_multi_gpu.sh")
    assert changed(cfg) == GUIDE_FULL | {"model.base": SD14}


def test_the_readme_with_a_local_folder_word_for_word():
    _, cfg = launched("readme_folder.sh")
    assert changed(cfg) == without(GUIDE_FULL, "data.hub") | {
        "model.base": SD14,
        "data.folder": "path_to_your_dataset",
    }


def test_the_lora_guide_word_for_word():
    script, cfg = launched("lora.sh")
    assert script == LORA
    assert changed(cfg) == without(
        PLAIN_LORA, "data.crop", "optim.warmup", "train.epochs", "data.folder"
    ) | {
        "run": "/sddata/finetune/lora/naruto",
        "model.base": SD15,
        "data.hub": NARUTO,
        "data.flip": True,
        "data.threads": 8,
        "train.micro_batch_size": 1,
        "train.accumulation_steps": 4,
        "train.steps": 15000,
        "train.seed": 1337,
        "optim.schedule": "cosine",
        "preview.prompts": ["A naruto with blue eyes."],
        "preview.count": 4,
        "preview.every_epochs": 1.0,
        "log.to": ["wandb"],
        "export.hub": "naruto-lora",
    }


def test_the_lora_readme_word_for_word():
    _, cfg = launched("readme_lora.sh")
    assert changed(cfg) == without(PLAIN_LORA, "optim.warmup", "data.folder") | {
        "run": "sd-naruto-model-lora",
        "model.base": SD14,
        "data.hub": NARUTO,
        "data.flip": True,
        "train.micro_batch_size": 1,
        "train.seed": 42,
        "checkpoint.every": 5000,
        "preview.prompts": ["cute dragon creature"],
        "preview.count": 4,
        "preview.every_epochs": 1.0,
        "log.to": ["wandb"],
    }


def test_the_learning_rate_is_scaled_by_all_that_makes_a_global_batch(monkeypatch):
    batch = ["--train_batch_size=3", "--gradient_accumulation_steps=4", "--learning_rate=1e-4"]
    assert config(FULL, *batch).optim.learning_rate == 1e-4
    assert config(FULL, *batch, "--scale_lr").optim.learning_rate == pytest.approx(12e-4, rel=1e-12)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert config(FULL, *batch, "--scale_lr").optim.learning_rate == pytest.approx(24e-4, rel=1e-12)
    assert config(FULL, *batch).optim.learning_rate == 1e-4


def test_train_data_dir_beside_a_data_set_is_a_folder_inside_it():
    data = config(FULL, "--dataset_name=hub/set").data
    assert (data.hub, data.hub_files, data.folder) == ("hub/set", "pictures", None)


def test_previews_without_prompt_or_with_no_pictures_are_none():
    assert (
        changed(config(LORA, "--num_validation_images=0")) == PLAIN_LORA
    )  # as diffusers' own example tests pass it
    assert (
        changed(config(LORA, "--num_validation_images=0", "--validation_prompt=a cat"))
        == PLAIN_LORA
    )
    assert changed(config(FULL, "--validation_epochs=0")) == PLAIN
    preview = config(FULL, "--validation_prompts", "a cat", "a dog").preview
    assert (
        preview.prompts,
        preview.count,
        preview.every_epochs,
        preview.steps,
        preview.guidance_scale,
    ) == (("a cat", "a dog"), 1, 5.0, 20, 7.5)


@pytest.mark.parametrize(
    ("asked", "installed", "expected"),
    [
        ("all", ("tensorboard", "comet_ml"), ("tensorboard", "comet_ml")),
        ("none", ("tensorboard",), ()),
        ("tensorboard", (), ()),
        ("comet_ml", (), ("comet_ml",)),  # opening it says what is missing
    ],
)
def test_trackers(monkeypatch, asked, installed, expected):
    monkeypatch.setattr(
        sys.modules["limner.training.sinks"], "list_installed_sinks", lambda: installed
    )
    assert config(FULL, f"--report_to={asked}").log.to == expected
    assert any(
        "TensorBoard is not installed" in line for line in remarks(FULL, f"--report_to={asked}")
    ) == (asked == "tensorboard")


def test_resume_takes_what_diffusers_takes_and_paths_elsewhere(tmp_path):
    run, other = tmp_path / "run", tmp_path / "other"
    for folder in (run / "checkpoint-4", other / "checkpoint-6"):
        folder.mkdir(parents=True)
    for given, expected in {
        "": "never",
        "latest": "latest",
        "checkpoint-4": "checkpoint-4",
        "moved/run/checkpoint-4": "checkpoint-4",  # diffusers looks at the last part of a path only
        f"{other}/checkpoint-6": f"{other}/checkpoint-6",
        "nowhere/checkpoint-8": "nowhere/checkpoint-8",
    }.items():
        assert (
            config(
                FULL, f"--output_dir={run}", f"--resume_from_checkpoint={given}"
            ).checkpoint.resume
            == expected
        )


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            ["--prediction_type=sample"],
            "--prediction_type: 'sample' was given, epsilon or v_prediction is expected",
        ),
        (
            ["--lr_scheduler=piecewise_constant"],
            "--lr_scheduler: piecewise_constant needs step rules",
        ),
        (["--lr_scheduler=cosin"], "optim.schedule (--lr_scheduler): 'cosin' was given"),
        (
            ["--report_to=mlflow"],
            "--report_to: 'mlflow' was given, one of tensorboard, wandb, comet_ml, all, none is "
            "expected",
        ),
        (["--report_to=wandb", "--hub_token=x"], "trackers store the command line"),
        (
            ["--learning_rate=0"],
            "optim.learning_rate (--learning_rate, --scale_lr): 0.0 is not above 0",
        ),
        (
            ["--checkpoints_total_limit=0"],
            "checkpoint.keep (--checkpoints_total_limit): 0 is not above 0",
        ),
        (["--seed=-1"], "train.seed (--seed): -1 is not within"),
    ],
)
@pytest.mark.parametrize("script", SCRIPTS)
def test_what_cannot_be_honoured_is_refused_with_the_reason(script, argv, message):
    if argv[0].partition("=")[0].removeprefix("--") not in SCRIPTS[script].flags:
        return  # its namesake has no such flag
    if "scale_lr" not in SCRIPTS[script].flags:
        message = message.replace(", --scale_lr", "")
    with pytest.raises(InputError) as fault:
        config(script, *argv)
    assert message in str(fault.value)


def test_no_data_at_all_is_refused_naming_both_flags():
    with pytest.raises(InputError, match=r"--dataset_name .* or --train_data_dir"):
        config(FULL, base=BASE[:1])


def test_flags_that_change_nothing_are_named():
    assert remarks(FULL) == []
    assert remarks(FULL, "--max_train_steps=5", "--num_train_epochs=3") == [
        "--num_train_epochs gives way to --max_train_steps"
    ]
    assert remarks(FULL, "--offload_ema", "--hub_model_id=x", "--dream_detail_preservation=2") == [
        "--hub_model_id does nothing without --push_to_hub",
        "--dream_detail_preservation does nothing without --dream_training",
        "--offload_ema does nothing without --use_ema",
    ]
    assert remarks(FULL, "--lr_warmup_steps=9") == [
        "--lr_warmup_steps does nothing with --lr_scheduler=constant; constant_with_warmup has a "
        "warm-up"
    ]
    assert remarks(FULL, "--lr_warmup_steps=9", "--lr_scheduler=linear") == []


@pytest.fixture
def trained(monkeypatch):
    """Stands for training: the configs it was called with."""
    seen = []
    monkeypatch.setattr(
        importlib.import_module("limner.training.loop"),
        "run_training",
        lambda cfg, report: seen.append(cfg),
    )
    return seen


def test_the_token_reaches_the_process_and_no_setting(trained, capsys, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "from a login")
    assert diffusers.main(FULL, [*BASE, "--push_to_hub", "--hub_token=hf_secret"]) == 0
    assert os.environ["HF_TOKEN"] == "hf_secret"
    assert "hf_secret" not in json.dumps(to_plain(trained[0])) + repr(trained[0])
    said = "".join(capsys.readouterr())
    assert "hf_secret" not in said
    assert "HF_TOKEN is safer" in said


def test_what_does_nothing_in_the_scripts_is_no_setting_of_the_run(trained, capsys):
    """Their defaults have a warm-up beside the constant schedule, which has none there either."""
    given = ["--rank=8", "--lr_scheduler=cosine", "--lr_warmup_steps=9"]
    assert diffusers.main(FULL, BASE) == 0
    assert diffusers.main(FULL, [*BASE, "--lr_warmup_steps=9", "--offload_ema"]) == 0
    assert diffusers.main(LORA, [*BASE, *given, "--validation_prompt=a cat"]) == 0
    plain, idle, active = trained
    assert plain == idle and (plain.optim.warmup, plain.optim.ema_offload) == (0, False)
    assert plain.preview.steps == 25
    assert (active.optim.warmup, active.adapter.rank, active.preview.steps) == (9, 8, 30)
    said = "".join(capsys.readouterr())
    assert said.count("--offload_ema does nothing without --use_ema") == 1
    assert said.count("--lr_warmup_steps does nothing with --lr_scheduler=constant") == 1


def test_a_folder_has_no_other_column_of_pictures(trained, capsys):
    assert diffusers.main(FULL, [*BASE, "--image_column=photo"]) == 2
    said = "".join(capsys.readouterr())
    assert "--image_column: 'photo' was given, but the pictures of a folder" in said
    assert diffusers.main(FULL, [*BASE, "--image_column=photo", "--dataset_name=me/set"]) == 0
    assert len(trained) == 1 and trained[0].data.image == "photo"


def test_only_the_first_process_speaks(trained, capsys, monkeypatch):
    for rank, expected in ("0", 1), ("1", 0):
        monkeypatch.setenv("RANK", rank)
        assert diffusers.main(FULL, [*BASE, "--foreach_ema"]) == 0
        assert "".join(capsys.readouterr()).count("--foreach_ema: it is not needed") == expected
    assert len(trained) == 2


def test_a_folder_with_checkpoints_is_refused_unless_resume_is_asked_for(
    tmp_path, capsys, monkeypatch
):
    resolve = importlib.import_module("limner.training.resolve")
    (tmp_path / "checkpoint-4").mkdir()
    with pytest.raises(InputError, match="--resume_from_checkpoint latest"):
        resolve.find_resume_point(tmp_path, config(FULL).checkpoint.resume, print)


def test_what_training_says_names_the_flags(monkeypatch, capsys):
    def refuse(cfg, report):
        report("finished; ask for more with train.steps.")
        raise InputError(
            "data.size: 100 is not a multiple of 8; see data.sizes, /tmp/data.size and data.size=64"
        )

    monkeypatch.setattr(importlib.import_module("limner.training.loop"), "run_training", refuse)
    assert diffusers.main(FULL, BASE) == 2
    said = "".join(capsys.readouterr())
    assert "ask for more with train.steps (--max_train_steps).\n" in said
    assert (
        "data.size (--resolution): 100 is not a multiple of 8; see data.sizes, /tmp/data.size and "
        "data.size=64" in said
    )
    assert "Traceback" not in said


def test_bad_flags_end_with_one_message_and_code_2(trained, capsys):
    assert diffusers.main(FULL, BASE[:1]) == 2
    said = "".join(capsys.readouterr())
    assert said.count("\n") == 1 and "--train_data_dir" in said
    assert trained == []


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_script_files_start_their_namesake(script, trained, monkeypatch):
    path = HERE.parent / "scripts" / f"{script}.py"
    monkeypatch.setattr(
        sys, "argv", [str(path), *(BASE[1:] if script in STAGES else BASE), "--max_train_steps=3"]
    )
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(path), run_name="__main__")
    assert stop.value.code == 0
    assert trained == [diffusers.drop_idle_settings(config(script, "--max_train_steps=3"))]


def test_help_is_quick_and_loads_no_framework():
    code = (
        "import sys\nfrom limner.compat.diffusers import main\ntry:\n    "
        "main('train_text_to_image', ['--help'])\n"
        f"finally:\n    print([m for m in {HEAVY} if m in sys.modules], file=sys.stderr)"
    )
    path = os.pathsep.join(
        [str(Path(limner.__file__).parent.parent), os.environ.get("PYTHONPATH", "")]
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": path, "COLUMNS": "200"},
        capture_output=True,
        text=True,
        check=True,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.stderr == "[]\n"
    assert "--resolution RESOLUTION" in done.stdout and "[data.size]" in done.stdout
    assert (after.ru_utime + after.ru_stime) - (
        before.ru_utime + before.ru_stime
    ) < 0.5  # seconds of processor time


def test_the_flag_table_of_the_docs_is_what_the_code_says():
    page = (HERE.parent / "docs" / "coming-from-diffusers.md").read_text(encoding="utf-8")
    assert diffusers.refresh_page(page) == page, (
        "run: python -m limner.compat.diffusers docs/coming-from-diffusers.md"
    )
    for name in {name for script in SCRIPTS for name in REFERENCE[f"{script}.py"]}:
        assert page.count(f"| `{name}` |") == 1
