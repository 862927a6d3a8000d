"""The local Hub speaks what the real client libraries ask, so that tests against it mean something;
and its refusals are told in words."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import httpx2
import pytest
import tiny
from hub_server import Hub
from huggingface_hub import HfApi
from huggingface_hub.errors import EntryNotFoundError

from limner.base_model.hub import hub_errors
from limner.errors import DiskError, HubError

CLIENT = """
import json, sys
import datasets, huggingface_hub
datasets.disable_progress_bars()
out = {}
for name in ("someone/pictures", "someone/table"):
    rows = datasets.load_dataset(name)["train"]
    out[name] = [[row["text"], row["image"].size, row["image"].getpixel((0, 0))] for row in rows]
out["push"] = huggingface_hub.create_repo("mine", private=True).repo_id
huggingface_hub.create_repo("tester/mine", exist_ok=True)
for _ in range(2):
    settings = {"folder_path": sys.argv[1], "ignore_patterns": ["*.log"]}
    commit = huggingface_hub.upload_folder(repo_id="tester/mine", **settings)
out["commit"] = commit.oid
print(json.dumps(out))
"""


def test_data_sets_and_uploads_with_the_real_client(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet

    folder = tiny.pictures(tmp_path / "pictures", 3)
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    images = [
        {"bytes": (folder / row["file_name"]).read_bytes(), "path": row["file_name"]}
        for row in rows
    ]
    (tmp_path / "table" / "data").mkdir(parents=True)
    features = {
        "info": {
            "features": {"image": {"_type": "Image"}, "text": {"dtype": "string", "_type": "Value"}}
        }
    }
    table = pa.table(
        {"image": images, "text": [row["text"] for row in rows]}
    ).replace_schema_metadata({"huggingface": json.dumps(features)})
    pyarrow.parquet.write_table(table, tmp_path / "table" / "data" / "train-00000-of-00001.parquet")

    mine = tmp_path / "mine"
    (mine / "unet").mkdir(parents=True)
    files = {
        "README.md": b"---\nlicense: mit\n---\n",
        "unet/config.json": b"{}",
        "unet/weights.safetensors": bytes(range(256)) * 100,
        "empty.txt": b"",
    }
    for name, content in files.items():
        (mine / name).write_bytes(content)
    (mine / "run.log").write_text("no")

    with Hub(token="hf_right", large_from=10_000) as hub:
        hub.add("someone/pictures", folder, kind="dataset")
        hub.add("someone/table", tmp_path / "table", kind="dataset")
        environment = hub.environment(tmp_path / "home", token="hf_right")
        done = subprocess.run(
            [sys.executable, "-c", CLIENT, str(mine)],
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        out = json.loads(done.stdout)
        assert out["someone/pictures"] == out["someone/table"]
        assert [row[0] for row in out["someone/pictures"]] == [row["text"] for row in rows] and out[
            "someone/table"
        ][0][1] == [36, 40]
        assert hub.received("tester/mine") == files
        assert [sorted(names) for names in hub.pushed["tester/mine"]] == [sorted(files)]
        assert out["commit"] == hub.repos[("model", "tester/mine")].commit("main")
        assert hub.repos[("model", "tester/mine")].private
        assert list(hub.large) == [hashlib.sha256(files["unet/weights.safetensors"]).hexdigest()]
        assert [r[0] for r in hub.requests if "/large/" in r[1]] == ["PUT", "POST"]


def test_answers_told_beforehand_and_ranges(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b.bin").write_bytes(b"0123456789")
    with Hub(token="hf_right") as hub:
        hub.add("someone/thing", tmp_path)
        url = f"{hub.url}/someone/thing/resolve/main/a/b.bin"
        part = httpx2.get(url, headers={"Range": "bytes=2-4"})
        assert (part.status_code, part.content, part.headers["content-range"]) == (
            206,
            b"234",
            "bytes 2-4/10",
        )
        api = HfApi(endpoint=hub.url)
        assert [e.path for e in api.list_repo_tree("someone/thing")] == ["a"]
        assert [e.path for e in api.list_repo_tree("someone/thing", recursive=True)] == [
            "a",
            "a/b.bin",
        ]
        assert [
            type(e).__name__ for e in api.get_paths_info("someone/thing", ["a", "a/b.bin", "none"])
        ] == ["RepoFolder", "RepoFile"]
        with pytest.raises(EntryNotFoundError):
            api.hf_hub_download("someone/thing", "nothing", cache_dir=tmp_path / "cache")
        hub.answer("GET /someone/thing/resolve/main/a/", 429, times=2)
        assert [httpx2.get(url).status_code for _ in range(3)] == [429, 429, 200]
        assert (
            httpx2.get(
                f"{hub.url}/api/whoami-v2", headers={"Authorization": "Bearer hf_wrong"}
            ).status_code
            == 401
        )
        assert (
            httpx2.get(
                f"{hub.url}/api/whoami-v2", headers={"Authorization": "Bearer hf_right"}
            ).json()["name"]
            == "tester"
        )
        assert httpx2.get(f"{hub.url}/nothing/of/this").status_code == 404
        assert {r[1] for r in hub.requests if r[0] == "GET"} >= {
            "/someone/thing/resolve/main/a/b.bin",
            "/api/whoami-v2",
        }


def test_only_the_hub_is_blamed_for_what_the_hub_did() -> None:
    with pytest.raises(KeyError), hub_errors("someone/thing"):
        raise KeyError("a mistake of ours")
    with pytest.raises(DiskError), hub_errors("someone/thing"):
        raise DiskError("full")
    with (
        pytest.raises(
            HubError, match=r"someone/thing: the Hub cannot be reached .* Say this last\."
        ),
        hub_errors("someone/thing", then="Say this last."),
    ):
        try:
            raise RuntimeError("upload failed") from httpx2.ConnectError("refused")
        except RuntimeError as error:
            raise ValueError("batch failed") from error
    with (
        pytest.raises(HubError, match=r"someone/thing: Consistency check failed\. Try again\."),
        hub_errors("someone/thing"),
    ):
        raise OSError("Consistency check failed\nmore")
