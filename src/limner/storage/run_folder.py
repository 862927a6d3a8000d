"""The files of a run's folder, by name."""

RESULT_FILE = "result.json"  # written last: which files the result is made of
CARD_FILE = "README.md"  # the model card
GRID_FILE = "preview.png"  # pictures for the model card
PUSHED_FILE = "pushed.json"  # which result was pushed, and where
METRICS_FILE = "metrics.jsonl"  # one JSON object per line
SKIPPED_FILE = "skipped.jsonl"  # records that were left out, with the reason
