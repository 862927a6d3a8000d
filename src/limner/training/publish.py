"""The end of a run: its result, written from the last checkpoint on disk and pushed."""

from limner.data import contact_sheet
from limner.redaction import redact
from limner.storage import checkpoint
from limner.storage.run_folder import RunFolder
from limner.training import push, result
from limner.training.setup import Setup


def is_finished(setup: Setup) -> bool:
    """Whether the last step's checkpoint and the result are whole, and pushed where asked for."""
    checkpoint, hub = setup.checkpoint, setup.config.export.hub
    if checkpoint is None or checkpoint.step < setup.plan.steps:
        return False
    step, folder = checkpoint.step, setup.folder
    return setup.process.first(
        lambda: (
            result.is_result_whole(folder, step) and (hub is None or push.is_pushed(folder, hub))
        )
    )


def publish_result(setup: Setup) -> None:
    """Write the result from the last checkpoint on disk, and push it where asked for."""
    config, last, folder = setup.config, setup.checkpoint, RunFolder(setup.folder)
    if last is None or last.step < setup.plan.steps:
        last = checkpoint.open_checkpoint(folder.checkpoint(setup.plan.steps))
    previews = folder.list_previews()
    if previews and config.preview.prompts:
        contact_sheet.draw_sheet_of_files(
            sorted(previews[-1].glob("*.png")), redact(config.preview.prompts), folder.grid
        )
    # A run that was killed between its last checkpoint and this had no time for it.
    checkpoint.prune(setup.folder, last.step, config.checkpoint.keep)
    prediction_type = setup.stream.objective.prediction_type
    result.write_result(last, config, setup.base, setup.family, prediction_type)
    setup.report(f"{setup.folder}: the result of step {last.step} is here")
    if config.export.hub is not None:
        push.push_result(setup.folder, config.export.hub, config.export.private, setup.report)
