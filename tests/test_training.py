"""What a run does around its loop: where it goes on from, what it refuses, what it leaves."""

import errno
import json
import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
from PIL import Image

from limner.compat import diffusers
from limner.config import toml
from limner.config.schema import Config
from limner.data import contact_sheet
from limner.errors import InputError, NonFiniteError, Stopped
from limner.storage import atomic, checkpoint
from limner.storage.run_folder import RunFolder
from limner.storage.run_state import STATE_FILE
from limner.training import loop, result, setup, signals
from limner.training import push as push_module
from limner.training.signals import Stop


def settings(base: Path, pictures: Path, run: Path, **sections: Any) -> Config:
    raw: dict[str, Any] = {
        "run": str(run),
        "model": {"base": str(base)},
        "data": {"folder": str(pictures), "size": 32},
    }
    raw |= {"train": {"steps": 2, "batch_size": 2, "seed": 1}, "adapter": {"kind": "lora"}}
    return toml.build(Config, {**raw, **{k: {**raw.get(k, {}), **v} for k, v in sections.items()}})


def run(cfg: Config) -> list[str]:
    said: list[str] = []
    loop.run_training(cfg, report=said.append)
    return said


def test_checkpoints_of_another_tool_are_left_alone(base, pictures, tmp_path):
    (tmp_path / "checkpoint-1").mkdir()
    (tmp_path / "checkpoint-1" / "optimizer.bin").write_bytes(b"theirs")
    for resume in ("auto", "latest", "never"):
        with pytest.raises(InputError, match="checkpoint-1"):
            run(
                settings(
                    base, pictures, tmp_path, checkpoint={"every": 1, "keep": 1, "resume": resume}
                )
            )
    assert (tmp_path / "checkpoint-1" / "optimizer.bin").read_bytes() == b"theirs"
    assert not (tmp_path / "metrics.jsonl").exists()


def test_a_finished_checkpoint_of_another_folder_becomes_a_result_here(base, pictures, tmp_path):
    run(settings(base, pictures, tmp_path / "first"))
    run(
        settings(
            base,
            pictures,
            tmp_path / "second",
            checkpoint={"resume": str(tmp_path / "first" / "checkpoint-2")},
        )
    )
    results = [result.read_result(tmp_path / name) for name in ("first", "second")]
    assert results[0] == results[1] and result.is_result_whole(tmp_path / "second", 2)


def test_a_finished_run_is_pushed_once_when_it_is_asked_for(base, pictures, tmp_path, monkeypatch):
    run(settings(base, pictures, tmp_path))
    pushed = []

    def push(folder: Path, repository: str, private: bool, report: Any) -> None:
        pushed.append(repository)
        atomic.write_text(
            RunFolder(folder).pushed,
            json.dumps({"repository": repository, "digest": result.read_result(folder)["digest"]}),
        )

    monkeypatch.setattr(push_module, "check_push", lambda repository, private: f"me/{repository}")
    monkeypatch.setattr(push_module, "push_result", push)
    with_push = settings(base, pictures, tmp_path, export={"hub": "mine"})
    run(with_push)
    assert "nothing to do" in run(with_push)[-1]
    assert pushed == ["me/mine"]


def test_prompts_without_an_interval_are_drawn_first_and_last_in_a_size_that_pipelines_draw(
    base, pictures, tmp_path
):
    run(
        settings(
            base,
            pictures,
            tmp_path,
            data={"size": 36},
            preview={"prompts": ["red", "blue"], "steps": 1, "count": 2},
        )
    )
    drawn = sorted(p.name for p in (tmp_path / "previews").iterdir())
    assert drawn == ["step-000000", "step-000002"]
    sizes = [
        contact_sheet.read_picture(p).shape
        for p in sorted((tmp_path / "previews" / "step-000002").glob("*.png"))
    ]
    assert sizes == [(32, 32, 3)] * 4
    with Image.open(tmp_path / "preview.png") as sheet:
        assert sheet.size == (200 + 2 * 134 + 6, 6 + 2 * 134)


def test_captions_for_previews_are_of_held_out_records_first():
    said: list[str] = []
    records = SimpleNamespace(
        training=[SimpleNamespace(captions=c) for c in (["a", "b"], ["c"], ["a"], [], [""])],
        validation=[SimpleNamespace(captions=["c", "d"])],
    )
    for captions, prompts in ((0, ["x"]), (1, ["x", "c"]), (2, ["x", "c", "a"])):
        cfg = toml.build(Config, {"preview": {"prompts": "x", "captions": captions}})
        settled = setup.settle_previews(cfg, records, said.append).preview
        assert (list(settled.prompts), settled.captions, said) == (prompts, 0, [])
    cfg = toml.build(Config, {"preview": {"captions": 3}})
    assert setup.settle_previews(cfg, records, said.append).preview.prompts == ("c", "a")
    assert said == ["preview.captions: 3 are asked for, 2 are there"]


def test_a_run_says_what_it_does_and_draws_captions(base, tmp_path):
    pictures = tiny.pictures(
        tmp_path / "pictures", 6, captions=["one", "two", "two", "", "three", "four"]
    )
    given = settings(
        base,
        pictures,
        tmp_path / "run",
        data={"size": 32},
        preview={"prompts": ["mine"], "captions": 3, "steps": 1},
        validation={"hold_out": 0.34, "timesteps": 1},
        checkpoint={"every": 1},
        engine={"device": "cpu"},
    )
    said = run(given)
    kept = json.loads((tmp_path / "run" / "config.json").read_text())
    assert kept["preview"]["captions"] == 0
    assert kept["preview"]["prompts"][0] == "mine" and len(kept["preview"]["prompts"]) == 4
    text = "\n".join(said)
    for line in (
        f"model: {base} (sd); a LoRA of rank 4 on its unet learns, ",
        "data: 4 records to train on, 2 held out; one epoch is 2 steps",
        "steps: 2 of 2 examples (micro-batches of 2 x 1), 1 epochs; a checkpoint every 1",
        "device: cpu, float32",
        f"step 0: previews in {tmp_path}/run/previews/step-000000",
        f"step 1: saved {tmp_path}/run/checkpoint-1",
        f"step 2: previews in {tmp_path}/run/previews/step-000002",
        "step 2: held-out loss 1.",
    ):
        assert line in text, text


def test_only_settings_of_the_optimizer_may_be_allowed_to_change(base, pictures, tmp_path):
    with pytest.raises(InputError, match=r"'optim\.learning_rate'"):
        run(settings(base, pictures, tmp_path, checkpoint={"allow_changes": ["adapter.kind"]}))
    run(settings(base, pictures, tmp_path, optim={"ema": 0.9}))
    more: dict[str, Any] = {"train": {"steps": 3}}
    with pytest.raises(
        InputError,
        match=r"optim.learning_rate: was 0.0001, now "
        r'0.01[\s\S]*checkpoint.allow_changes=\["optim.learning_rate"\]',
    ):
        run(settings(base, pictures, tmp_path, optim={"ema": 0.9, "learning_rate": 1e-2}, **more))
    with pytest.raises(InputError) as refused:
        run(settings(base, pictures, tmp_path, **more))
    assert "optim.ema: was 0.9, now None" in str(
        refused.value
    ) and "checkpoint.allow_changes" not in str(refused.value)
    allowed = {
        "optim": {"ema": 0.9, "learning_rate": 1e-2, "ema_offload": True},
        "checkpoint": {"allow_changes": ["optim.learning_rate"]},
    }
    said = run(settings(base, pictures, tmp_path, **allowed, **more))
    assert "from step 2 on, optim.learning_rate: was 0.0001, now 0.01" in said
    assert checkpoint.find_latest(tmp_path).step == 3


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"adapter": {"targets": ["to_x"]}}, "no module named to_x"),
        ({"optim": {"kind": "adamw8bit"}}, "adamw8bit"),
    ],
)
def test_what_the_engine_cannot_do_is_refused_before_anything_is_loaded(
    base, pictures, tmp_path, monkeypatch, section, message
):
    from limner.engines.torch import encoders, initial_state

    for module in (initial_state, encoders):
        monkeypatch.setattr(module, "load_component", lambda *_: pytest.fail("a weight was loaded"))
    with pytest.raises(InputError, match=message):
        run(settings(base, pictures, tmp_path, **section))


def test_the_learning_rate_scales_with_the_batch_that_holds(tmp_path, monkeypatch):
    flags = [
        "--pretrained_model_name_or_path=x",
        "--dataset_name=y",
        f"--output_dir={tmp_path}",
        "--train_batch_size=2",
        "--scale_lr",
        "--learning_rate=1e-5",
    ]
    monkeypatch.setenv("WORLD_SIZE", "4")

    def rate(*more: str) -> float:
        return diffusers.to_config(
            "train_text_to_image",
            diffusers.make_parser("train_text_to_image").parse_args([*flags, *more]),
        ).optim.learning_rate

    assert rate() == pytest.approx(8e-5)
    (tmp_path / "checkpoint-5").mkdir()
    (tmp_path / "checkpoint-5" / STATE_FILE).write_text(json.dumps({"step": 5, "batch_size": 16}))
    assert rate("--resume_from_checkpoint=latest") == pytest.approx(16e-5)


def test_a_signal_while_looking_stops_at_once_and_later_is_a_request(capfd):
    with Stop(), pytest.raises(Stopped):
        signal.raise_signal(signal.SIGTERM)
    with Stop() as stop:
        stop.save_first = True
        signal.raise_signal(signal.SIGTERM)
        assert stop.asked
    assert "stopping as soon as the state is saved" in capfd.readouterr().err


@pytest.mark.parametrize("last", [True, False])
def test_no_signal_changes_the_end_of_a_stopped_process(last, monkeypatch):
    """Not while the contexts are closed, nor while Python ends, however late it comes."""
    now = [100.0]
    monkeypatch.setattr(signals.time, "monotonic", lambda: now[0])
    before = {number: signal.getsignal(number) for number in signals.NUMBERS}
    try:
        with pytest.raises(Stopped, match="is saved"), Stop(ends_process=last):
            try:
                with Stop() as stop:
                    stop.save_first = True
                    signal.raise_signal(signal.SIGTERM)
                    raise Stopped("checkpoint-4 is saved")
            finally:
                for now[0] in (101.0, 110.0):
                    for number in signals.NUMBERS:
                        signal.raise_signal(number)
        for number in signals.NUMBERS:
            assert signal.getsignal(number) == (signal.SIG_IGN if last else before[number])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_a_process_that_has_finished_is_ended_by_signals_as_any():
    before = {number: signal.getsignal(number) for number in signals.NUMBERS}
    with Stop(ends_process=True), Stop():
        pass
    assert {number: signal.getsignal(number) for number in signals.NUMBERS} == before


def test_a_closed_terminal_is_a_stop_too_but_not_under_nohup(monkeypatch):
    """Whose last words nobody reads."""

    def refuse(descriptor: int, message: bytes) -> int:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "write", refuse)
    before = signal.getsignal(signal.SIGHUP)
    try:
        for handler, asked in ((signal.SIG_DFL, True), (signal.SIG_IGN, False)):
            signal.signal(signal.SIGHUP, handler)
            with Stop() as stop:
                stop.save_first = True
                signal.raise_signal(signal.SIGHUP)
                assert stop.asked == asked
            assert signal.getsignal(signal.SIGHUP) == handler
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_bucket_that_cannot_fill_a_batch_is_told(base, tmp_path):
    pictures = tiny.pictures(tmp_path / "pictures", 5, size=(40, 40))
    wide = tiny.pictures(tmp_path / "wide", 2, size=(40, 80))
    sets = [{"folder": str(pictures)}, {"folder": str(wide)}]
    said = run(
        settings(
            base,
            pictures,
            tmp_path / "run",
            data={"folder": None, "sets": sets, "buckets": {"step": 8}},
            train={"batch_size": 4},
        )
    )
    assert (
        "1 of 2 buckets has fewer pictures than a batch of 4 (48x24: 2); 2 rows of every epoch's "
        "batches are empty for it, and nothing is repeated" in said
    )


def test_the_status_of_a_run_says_how_far_it_came_and_how_it_ended(base, pictures, tmp_path):
    from limner.storage.run_folder import RunFolder, read_status

    folder = tmp_path / "good"
    run(settings(base, pictures, folder))
    status = read_status(RunFolder(folder))
    assert (status.state, status.step, status.steps, status.error) == ("finished", 2, 2, None)
    assert status.images_per_second > 0 and status.began <= status.updated
    bad = settings(
        base, pictures, tmp_path / "bad", optim={"learning_rate": 1e30}, train={"steps": 9}
    )
    with pytest.raises(NonFiniteError):
        run(bad)
    status = read_status(RunFolder(tmp_path / "bad"))
    assert status.state == "failed" and "not a finite number" in status.error


def test_a_full_disk_for_the_status_stops_nobody(tmp_path, monkeypatch):
    from limner.errors import DiskError
    from limner.storage.run_folder import RunFolder
    from limner.training import status

    def refuse(*_: Any) -> None:
        raise DiskError("no room")

    monkeypatch.setattr(status, "write_status", refuse)
    with status.keep_status(RunFolder(tmp_path), 0, 2, writes=True) as file:
        file.update(step=1)
    assert (file.status.state, file.status.step) == ("finished", 1)
