"""Demonstrations in the public formats: the same episodes from every one, and damaged ones."""

import io
import json

import numpy as np
import pytest
import torch
from PIL import Image

from flowkit.data import Demonstrations
from flowkit.policies import chunks

CAMERA = "observation.images.top"


def episodes(count=12, images=False):
    rng, found = np.random.default_rng(0), []
    for k in range(count):
        steps = 3 + k % 4
        own = {
            "obs": rng.normal(size=(steps, 3)).astype(np.float32),
            "action": rng.normal(size=(steps, 2)).astype(np.float32),
        }
        if images:
            own["image"] = rng.integers(0, 256, (steps, 8, 8, 3), np.uint8)
        found.append(own)
    return found


def png(image):
    content = io.BytesIO()
    Image.fromarray(image).save(content, "PNG")
    return content.getvalue()


def npz(folder, found):
    arrays = {key: np.concatenate([e[key] for e in found]) for key in found[0]}
    ends = np.cumsum([len(e["obs"]) for e in found])
    np.savez(folder / "shown.npz", **arrays, episode_ends=ends)
    return folder / "shown.npz"


def robomimic(folder, found):
    h5py = pytest.importorskip("h5py")
    with h5py.File(folder / "low_dim.hdf5", "w") as file:
        file.create_group("data").attrs["env_args"] = "{}"
        for k, own in enumerate(found):
            demo = file.create_group(f"data/demo_{k}")
            demo.attrs["num_samples"] = len(own["obs"])
            demo["actions"] = own["action"].astype(np.float64)
            demo["obs/a_pos"], demo["obs/b_grip"] = own["obs"][:, :2], own["obs"][:, 2:]
            if "image" in own:
                demo["obs/top"] = own["image"]
    return folder / "low_dim.hdf5"


def features(images, dtype):
    found = {
        "observation.state": {"dtype": "float32", "shape": [3], "names": None},
        "action": {"dtype": "float32", "shape": [2], "names": None},
    }
    return found | ({CAMERA: {"dtype": dtype, "shape": [8, 8, 3]}} if images else {})


def table(number, own, first):
    steps = len(own["obs"])
    found = {
        "observation.state": own["obs"].tolist(),
        "action": own["action"].tolist(),
        "timestamp": (np.arange(steps) / 10).tolist(),
        "frame_index": list(range(steps)),
        "episode_index": [number] * steps,
        "index": list(range(first, first + steps)),
        "task_index": [0] * steps,
    }
    if "image" in own:
        found[CAMERA] = [
            {"bytes": png(image), "path": f"{k}.png"} for k, image in enumerate(own["image"])
        ]
    return found


def write_parquet(file, columns):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    file.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.table(columns), file)


def lerobot(folder, found, version="v2.1", dtype="image"):
    """Version 2.1: a file an episode; 3.0: files of five episodes."""
    meta = folder / "meta"
    meta.mkdir()
    info = {"codebase_version": version, "fps": 10, "total_episodes": len(found)}
    info |= {
        "features": features("image" in found[0] or dtype == "video", dtype),
        "chunks_size": 1000,
    }
    stats = {"action": {"mean": np.concatenate([e["action"] for e in found]).mean(0).tolist()}}
    rows, first, files = [], 0, {}
    for k, own in enumerate(found):
        steps = len(own["obs"])
        row = {"episode_index": k, "tasks": ["push"], "length": steps}
        if version == "v3.0":
            row |= {"data/chunk_index": 0, "data/file_index": k // 5}
            row |= {"dataset_from_index": first, "dataset_to_index": first + steps}
            columns = files.setdefault(f"data/chunk-000/file-{k // 5:03d}.parquet", {})
        else:
            columns = files.setdefault(f"data/chunk-000/episode_{k:06d}.parquet", {})
        for key, cells in table(k, own, first).items():
            columns.setdefault(key, []).extend(cells)
        rows.append(row)
        first += steps
    for name, columns in files.items():
        write_parquet(folder / name, columns)
    if version == "v3.0":
        info["data_path"] = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
        info["video_path"] = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
        columns = {key: [row[key] for row in rows] for key in rows[0]}
        write_parquet(meta / "episodes/chunk-000/file-000.parquet", columns)
        (meta / "stats.json").write_text(json.dumps(stats))
    else:
        info["data_path"] = "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet"
        info["video_path"] = (
            "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4"
        )
        (meta / "episodes.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        (meta / "tasks.jsonl").write_text('{"task_index": 0, "task": "push"}\n')
    (meta / "info.json").write_text(json.dumps(info))
    return folder


def lerobot3(folder, found):
    return lerobot(folder, found, "v3.0")


def vipra(folder, found):
    lines = []
    for k, own in enumerate(found):
        for step, (obs, action) in enumerate(zip(own["obs"], own["action"], strict=True)):
            name = f"images/ep{k:05d}/step{step:04d}.png"
            line = {"id": f"task/ep{k:05d}/step{step:04d}", "instruction": "push", "image": [name]}
            lines.append(line | {"raw_action": action.tolist(), "proprio": obs.tolist()})
            if "image" in own:
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                (folder / name).write_bytes(png(own["image"][step]))
    order = np.random.default_rng(0).permutation(len(lines))  # in no order
    (folder / "steps.jsonl").write_text("".join(f"{json.dumps(lines[k])}\n" for k in order))
    return folder / "steps.jsonl"


FORMATS = {"npz": npz, "robomimic": robomimic, "v2.1": lerobot, "v3.0": lerobot3, "vipra": vipra}
CAMERAS = {"npz": "image", "robomimic": "top", "v2.1": CAMERA, "v3.0": CAMERA, "vipra": "image"}


def opened(root, **options):
    data = Demonstrations(root, horizon=4, batch_size=4, **options)
    data.setup()
    return data


def rows_of(data):
    """All chunks of all splits as comparable rows."""
    whole = [data.split(name)[:] for name in ("train", "val", "test")]
    x1 = torch.cat([batch["x1"].flatten(1) for batch in whole])
    vector = torch.cat([batch["cond"]["vector"] for batch in whole])
    rows = torch.cat([vector, x1], 1)
    return rows[rows[:, 0].argsort()]


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_chunks(name, tmp_path):
    """Those of `chunks`, with actions normalized by the training split alone."""
    found = episodes()
    data = opened(FORMATS[name](tmp_path, found), val_fraction=0.2, test_fraction=0.2)
    mean, std = data.actions.center, data.actions.scale
    expected = []
    for own in found:
        normal = (torch.from_numpy(own["action"]) - mean) / std
        batch = chunks({"obs": torch.from_numpy(own["obs"]), "action": normal}, 4)
        expected.append(torch.cat([batch["cond"]["vector"], batch["x1"].flatten(1)], 1))
    rows = torch.cat(expected)
    assert torch.allclose(rows_of(data), rows[rows[:, 0].argsort()], atol=1e-5)
    train = data.train[:]
    actions = train["x1"][:, :, 0]  # the first of each chunk: every action once
    assert actions.mean(0).abs().max() < 1e-5
    assert (actions.std(0, correction=0) - 1).abs().max() < 1e-5


@pytest.mark.parametrize("name", FORMATS)
def test_images_of_every_format_are_those_of_their_steps(name, tmp_path):
    found = episodes(6, images=True)
    root = FORMATS[name](tmp_path, found)
    data = opened(root, camera=CAMERAS[name], image_size=8, val_fraction=0.2, test_fraction=0.2)
    expected = {
        own["obs"][k].tobytes(): own["image"][k] for own in found for k in range(len(own["obs"]))
    }
    for split in ("train", "val", "test"):
        batch = data.split(split)[:]
        pairs = zip(batch["cond"]["vector"], batch["cond"]["image"], strict=True)
        for obs, image in pairs:
            assert np.array_equal(image.permute(1, 2, 0).numpy(), expected[obs.numpy().tobytes()])
    with pytest.raises(ValueError, match=r"camera of .* must be one of .*, got wrist"):
        opened(root, camera="wrist")


def test_no_episode_is_in_two_splits_and_more_episodes_move_none(tmp_path):
    found = episodes(30)
    places = []
    for count in (20, 30):
        data = opened(npz(tmp_path, found[:count]))
        seen = [
            set(data.split(n)[:]["cond"]["vector"][:, 0].tolist()) for n in ("train", "val", "test")
        ]
        assert sum(map(len, seen)) == len(set.union(*seen))
        for own in found[:count]:
            assert sum(set(own["obs"][:, 0].tolist()) <= split for split in seen) == 1
        places.append(seen)
    assert all(few <= many for few, many in zip(*places, strict=True))


def test_the_order_of_arrays_in_memory_changes_nothing(tmp_path):
    """Columns that were picked from a larger array lie one behind the other, also in the file."""
    plain = opened(npz(tmp_path, episodes(30)))
    arrays = {name: np.asfortranarray(array) for name, array in np.load(plain.root).items()}
    np.savez(tmp_path / "columns.npz", **arrays)
    other = opened(tmp_path / "columns.npz")
    for split in ("train", "val", "test"):
        assert other.fingerprint(split) == plain.fingerprint(split)


def test_some_training_episodes_leave_val_and_test_as_they_are(tmp_path):
    root = npz(tmp_path, episodes(30))
    every, some = opened(root), opened(root, episodes=5)
    assert every.fingerprint("test") != every.fingerprint("val")
    few = set(some.train[:]["cond"]["vector"][:, 0].tolist())
    assert few < set(every.train[:]["cond"]["vector"][:, 0].tolist())
    assert torch.equal(some.test[:]["cond"]["vector"], every.test[:]["cond"]["vector"])
    assert "5 train" in some.summary()


def test_the_future_needs_no_action(tmp_path):
    found = [{"obs": own["obs"]} for own in episodes(12)]
    data = opened(npz(tmp_path, found), predict="future")
    batch = data.train[:]
    later = {}
    for own in found:
        for k, obs in enumerate(own["obs"]):
            later[obs.tobytes()] = own["obs"][min(k + 4, len(own["obs"]) - 1)]
    for now, then in zip(batch["cond"]["vector"], batch["x1"], strict=True):
        assert np.array_equal(then.numpy(), later[now.numpy().tobytes()])
    with pytest.raises(
        ValueError, match=r"action of episode 0 of .* must be given, got none; pred"
    ):
        opened(tmp_path / "shown.npz")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"action": np.full((6, 2), np.nan)},
            "action of episode 3 of .* NaN or infinity at step 0",
        ),
        ({"obs": np.full((6, 3), np.inf)}, "obs of episode 3 of .* NaN or infinity at step 0"),
        ({"action": np.zeros((0, 2)), "obs": np.zeros((0, 3))}, "episode_ends of .* must increase"),
    ],
)
def test_damaged_episodes_are_named(change, message, tmp_path):
    found = episodes()
    found[3] = {**found[3], **change}
    with pytest.raises(ValueError, match=message):
        opened(npz(tmp_path, found))


def test_actions_of_another_size_are_named_with_both_episodes(tmp_path):
    found = episodes()
    found[7]["action"] = np.zeros((len(found[7]["obs"]), 5), np.float32)
    with pytest.raises(
        ValueError, match=r"action .* one shape, got \(2,\) in demo_0 .* \(5,\) in demo_7"
    ):
        opened(robomimic(tmp_path, found))


@pytest.mark.parametrize("version", ["v2.1", "v3.0"])
def test_a_video_that_cannot_be_decoded_is_named(version, tmp_path):
    pytest.importorskip("imageio")
    found = episodes(6)
    root = lerobot(tmp_path, found, version, "video")
    name = "chunk-000/file-000.mp4" if version == "v3.0" else "episode_000000.mp4"
    place = root / "videos" / (CAMERA if version == "v3.0" else f"chunk-000/{CAMERA}") / name
    if version == "v3.0":
        import pyarrow.parquet as parquet

        file = root / "meta/episodes/chunk-000/file-000.parquet"
        columns = parquet.read_table(file).to_pydict()
        count = len(columns["length"])
        columns |= {f"videos/{CAMERA}/{key}_index": [0] * count for key in ("chunk", "file")}
        columns[f"videos/{CAMERA}/from_timestamp"] = [0.0] * count
        write_parquet(file, columns)
    place.parent.mkdir(parents=True)
    place.write_bytes(b"no video")
    with pytest.raises(ValueError, match=rf"video must be decoded, got .*{name}"):
        opened(root, camera=CAMERA)


def test_a_video_gives_each_episode_its_own_frames(tmp_path):
    """A GIF stands for a video: its decoder is always there. Episodes follow one another in it."""
    pytest.importorskip("imageio")
    found, shade = episodes(6), 0
    root = lerobot(tmp_path, found, "v3.0", "video")
    import pyarrow.parquet as parquet

    info = json.loads((root / "meta/info.json").read_text())
    info["video_path"] = info["video_path"].replace("mp4", "gif")
    (root / "meta/info.json").write_text(json.dumps(info))
    file = root / "meta/episodes/chunk-000/file-000.parquet"
    columns = parquet.read_table(file).to_pydict()
    count = len(columns["length"])
    columns |= {f"videos/{CAMERA}/{key}_index": [0] * count for key in ("chunk", "file")}
    columns[f"videos/{CAMERA}/from_timestamp"] = [n / 10 for n in columns["dataset_from_index"]]
    write_parquet(file, columns)
    frames, shades = [], {}
    for own in found:
        for obs in own["obs"]:
            frames.append(Image.new("RGB", (8, 8), (shade, shade, shade)))
            shades[obs.tobytes()] = shade
            shade += 5
    place = root / "videos" / CAMERA / "chunk-000" / "file-000.gif"
    place.parent.mkdir(parents=True)
    frames[0].save(place, save_all=True, append_images=frames[1:], duration=100)
    data = opened(root, camera=CAMERA, image_size=8, val_fraction=0.2, test_fraction=0.2)
    batch = data.train[:]
    for obs, image in zip(batch["cond"]["vector"], batch["cond"]["image"], strict=True):
        assert (image.float() - shades[obs.numpy().tobytes()]).abs().max() <= 2


def test_files_of_no_format_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="root must be a file or folder of demonstrations"):
        opened(tmp_path / "none.npz")
    (tmp_path / "a.csv").touch()
    with pytest.raises(ValueError, match=r"root must be a .npz, .hdf5 or .jsonl file, or a folder"):
        opened(tmp_path / "a.csv")
    (tmp_path / "a.hdf5").write_bytes(b"no file")
    pytest.importorskip("h5py")
    with pytest.raises(ValueError, match=r"root must be a whole HDF5 file, got .*a.hdf5"):
        opened(tmp_path / "a.hdf5")


def test_too_few_episodes_are_counted_as_episodes(tmp_path):
    with pytest.raises(ValueError, match=r"^number of episodes must .* 2 episodes and none for"):
        opened(npz(tmp_path, episodes(2)))
    (tmp_path / "a.jsonl").touch()
    with pytest.raises(ValueError, match=r"^root must hold episodes, got none in .*a\.jsonl"):
        opened(tmp_path / "a.jsonl")


def test_images_of_vipra_lie_beside_their_file(tmp_path):
    folder = tmp_path / "inner"
    folder.mkdir()
    root = vipra(folder, episodes(4, images=True))
    root.write_text(root.read_text().replace("images/ep00001", "../secret"))
    with pytest.raises(ValueError, match=r"images must lie in .*, got .*secret"):
        opened(root, camera="image")
