"""The store: whole artifacts or none, whatever happens in between."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kd.errors import InputError, KDError
from kd.store import Store, digest, document, sha256_file, short, write_json


def made(store: Store, number: int = 0, text: str = "weights", inputs: dict[str, str] | None = None):
    words = document("kd.stages.Train", 1, {"seed": number}, inputs or {}, {})
    key = digest(words)
    out = store.work(key) / "out"
    out.mkdir(parents=True, exist_ok=True)
    (out / "model.safetensors").write_text(text)
    return store.put(key, out, {"schema": 1, "stage": "teacher", "document": words, "time": {"started": str(number)}})


def test_what_is_put_is_got_with_its_card(tmp_path):
    store = Store(tmp_path)
    put = made(store)
    got = Store(tmp_path).get(put.key)
    assert got is not None and got.file("model.safetensors").read_text() == "weights"
    assert got.card["files"]["model.safetensors"]["bytes"] == 7


def test_a_missing_key_is_none_and_creates_nothing(tmp_path):
    assert Store(tmp_path / "none").get("0" * 64) is None
    assert not (tmp_path / "none").exists()


def test_a_changed_byte_is_told_and_the_artifact_is_put_aside(tmp_path):
    store = Store(tmp_path)
    put = made(store)
    put.file("model.safetensors").write_text("weightz")
    fresh = Store(tmp_path)
    assert fresh.get(put.key) is None
    assert fresh.broken(put.key) == "model.safetensors does not match its checksum"
    aside = fresh.quarantine(put.key)
    assert (aside / "model.safetensors").exists() and fresh.broken(put.key) is None
    assert made(fresh).key == put.key


def test_a_missing_file_is_told(tmp_path):
    store = Store(tmp_path)
    put = made(store)
    put.file("model.safetensors").unlink()
    assert store.broken(put.key) == "model.safetensors is missing"


def test_a_document_that_is_not_the_keys_is_refused(tmp_path):
    store = Store(tmp_path)
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(KDError, match="does not hash"):
        store.put("0" * 64, out, {"document": document("kd.stages.Train", 1, {}, {}, {})})
    assert list(store) == []


def test_putting_twice_keeps_the_first(tmp_path):
    store = Store(tmp_path)
    first, second = made(store, text="one"), made(store, text="two")
    assert first.key == second.key and second.file("model.safetensors").read_text() == "one"


def test_prefixes_of_four_digits_or_more_find_one_artifact(tmp_path):
    store = Store(tmp_path)
    put = made(store)
    assert store.find(put.key[:4]).key == put.key == store.find(put.key).key
    for bad, said in (("abc", "four or more"), ("zzzz", "four or more"), ("0000", "no artifact")):
        if not put.key.startswith(bad):
            with pytest.raises(InputError, match=said):
                store.find(bad)


def test_an_ambiguous_prefix_is_refused(tmp_path):
    store = Store(tmp_path)
    first = made(store)
    twin = store.folder(first.key).with_name(first.key[:8] + "00000000")
    twin.mkdir()
    with pytest.raises(InputError, match="fits 2"):
        store.find(first.key[:8])


def test_removed_is_gone_and_users_are_known(tmp_path):
    store = Store(tmp_path)
    parent = made(store)
    child = made(store, 1, inputs={"teacher": parent.key})
    assert [a.key for a in store.users(parent.key)] == [child.key]
    store.remove(parent.key)
    assert store.get(parent.key) is None and store.get(child.key) is not None


def test_a_lock_is_held_by_one_and_free_when_its_holder_is_killed(tmp_path):
    code = (
        "import sys, time\nfrom kd.store import Store\n"
        f"with Store({str(tmp_path)!r}).lock('ab' * 32):\n    print('held', flush=True)\n    time.sleep(60)"
    )
    holder = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    store = Store(tmp_path)
    assert store.locked("ab" * 32)
    told: list[str] = []
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    holder.stdout.close()
    with store.lock("ab" * 32, told.append):
        assert not told or str(holder.pid) in told[0]


WRITER = """
import sys, itertools
from pathlib import Path
from kd.store import Store, digest, document
store = Store(sys.argv[1])
print("go", flush=True)
for n in itertools.count(int(sys.argv[2])):
    words = document("kd.stages.Train", 1, {"seed": n}, {}, {})
    key = digest(words)
    with store.lock(key):
        out = store.work(key) / "out"
        out.mkdir(parents=True, exist_ok=True)
        for i in range(3):
            (out / f"part{i}").write_bytes(bytes(200_000))
        store.put(key, out, {"schema": 1, "stage": "t", "document": words})
"""


def test_killed_at_random_moments_the_store_never_holds_half_an_artifact(tmp_path):
    generator = random.Random(0)
    folders: list[Path] = []
    for round_ in range(100):  # on a busy machine many writers die before their first artifact
        if round_ >= 12 and len(folders) > 5:
            break
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path), str(1000 * round_)], stdout=subprocess.PIPE, text=True
        )
        assert writer.stdout is not None and writer.stdout.readline() == "go\n"
        time.sleep(generator.uniform(0.0, 0.08))
        writer.kill()
        writer.wait()
        writer.stdout.close()
        folders = list((tmp_path / "artifacts").glob("*"))
    store = Store(tmp_path)
    assert len(folders) > 5
    assert [short(a.key) for a in store if store.damage(a)] == []
    assert len(list(store)) == len(folders)


def test_json_is_written_whole(tmp_path):
    write_json(tmp_path / "a.json", {"x": 0.1})
    with pytest.raises(ValueError):
        write_json(tmp_path / "a.json", {"x": float("nan")})
    assert json.loads((tmp_path / "a.json").read_text()) == {"x": 0.1}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


OUTSIDE = ["../../../secret", "..", "/etc/passwd", "ABCDEF0123456789", "a/b", "0123456789abcde", "", "zz" * 32]


@pytest.mark.parametrize("key", OUTSIDE)
def test_what_is_no_key_becomes_no_path(key, tmp_path):
    store = Store(tmp_path / "store")
    for asked in (store.get, store.folder, store.work, store.broken, store.locked, store.quarantine, store.remove):
        with pytest.raises(InputError, match="is no key"):
            asked(key)
    with pytest.raises(InputError, match="is no key"), store.lock(key):
        pass
    assert list(tmp_path.iterdir()) == []


def altered(put, **parts):
    card = put.path / "card.json"
    card.write_text(json.dumps({**json.loads(card.read_text()), **parts}))


@pytest.mark.parametrize("name", ["../../../secret", "/etc/passwd", "..", ".", "", "a/b", "a\\b", "a\0b"])
def test_a_card_that_lists_a_file_elsewhere_is_no_card(name, tmp_path):
    (tmp_path / "secret").write_text("not yours")
    store = Store(tmp_path / "store")
    put = made(store)
    altered(put, files={name: {"sha256": sha256_file(tmp_path / "secret"), "bytes": 9}})
    assert store.read(put.path) is None and store.get(put.key) is None and list(store) == []
    assert store.broken(put.key) == "its card cannot be read"
    assert made(Store(store.root), 1).key != put.key  # the rest of the store goes on


@pytest.mark.parametrize(
    "parts",
    [
        {"key": "ab/../../../x" + "0" * 51}, {"key": "0" * 64}, {"key": 3}, {"files": ["model.safetensors"]},
        {"files": {"model.safetensors": "sha256"}}, {"files": {"model.safetensors": {"sha256": 1}}},
        {"document": None}, {"document": {"inputs": ["x"]}},
    ],
    ids=str,
)  # fmt: skip
def test_a_card_of_another_shape_is_no_card(parts, tmp_path):
    store = Store(tmp_path)
    put, other = made(store), made(store, 1)
    altered(put, **parts)
    assert [a.key for a in store] == [other.key]
    assert store.users(other.key) == []
    with pytest.raises(InputError, match="cannot be read"):
        store.find(put.key)


def test_a_card_nested_without_end_is_no_card(tmp_path):
    store = Store(tmp_path)
    put = made(store)
    (put.path / "card.json").write_text("[" * 100_000)
    assert store.read(put.path) is None


def test_a_sweep_whose_id_is_not_its_files_name_is_left_out(tmp_path):
    good = {"id": "0123456789abcdef", "jobs": []}
    write_json(tmp_path / "sweeps" / "0123456789abcdef.json", good)
    write_json(tmp_path / "sweeps" / "1123456789abcdef.json", {**good, "id": "../../../../tmp/page"})
    write_json(tmp_path / "sweeps" / "page.json", {**good, "id": "page"})
    write_json(tmp_path / "sweeps" / "2123456789abcdef.json", ["no record"])
    assert Store(tmp_path).sweeps() == [good]
